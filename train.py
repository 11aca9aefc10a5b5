"""
Training a Transformer: Section 5 of the paper.

    python train.py                                                   # learns to copy, in under a minute
    python train.py --src=a.en --tgt=a.de --val_src=b.en --val_tgt=b.de --out_dir=out       # learns to translate
    torchrun --nproc_per_node=2 train.py ...                          # the same on two GPUs, or two CPU processes
    torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --nproc_per_node=8 train.py ...  # and on two machines

Every setting below can be overridden as --name=value. --help prints them.
It writes out_dir/model.pt (to use), out_dir/last.pt (to resume with --resume=True) and out_dir/log.jsonl.
"""

# ---- settings ---------------------------------------------------------------
# The defaults train the copy task. With --src, `text_recipe` below replaces those the command line leaves open.
src = ""                    # source side of the training text, one sentence a line, plain or .gz; "": the copy task
tgt = ""                    # target side: line i is the translation of line i of src
val_src = ""                # validation text, likewise; "": none
val_tgt = ""                # and its target side
out_dir = "out"             # everything this run writes goes here
# text
vocab_size = 11             # ids, both languages together; on text: 3 specials, 256 bytes, and merges
max_len = 256               # ids; pairs with a longer side are left out of training, and counted
max_ratio = 5.0             # a pair is left out if one side is more than this many times the other, plus 5 ids
bleu_tokenize = "13a"       # how BLEU splits words: 13a, sacreBLEU's default, or none for text that is split already
# model: as in transformer.Config
d_model = 64                # width
d_ff = 128                  # inner width of the feed-forward networks
n_heads = 4                 # attention heads
n_encoder_layers = 2        # layers that read the source
n_decoder_layers = 2        # layers that write the target
dropout = 0.0               # probability; random sequences leave nothing to overfit, text does
norm_first = False          # False: the paper's post-norm; True: pre-norm
# optimisation
batch_tokens = 2048         # source ids, and target ids, of a micro-batch, padding included
accumulate = 1              # micro-batches whose gradients make one step, on each process
max_steps = 500             # optimizer steps; 0: as many as `epochs` needs
epochs = 0.0                # passes over the training pairs, if max_steps is 0
learning_rate = 4e-3        # of Adam at the end of warm-up; 0: the paper's (d_model * warmup_steps)^-0.5
muon = 0.0                  # learning rate of Muon for the matrices of the layers; 0: Adam for all, as in the paper
warmup_steps = 100          # steps of linear rise
decay = "linear"            # after warm-up: inverse_sqrt (§5.3), or linear, down to 0 at max_steps
label_smoothing = 0.1       # §5.4
grad_clip = 1.0             # the gradient's largest norm; 0: any
average_last = 1            # model.pt is the mean of the last so many checkpoints (§6.1 uses 5), if that is better
patience = 0                # stop after this many validations in a row without a better one; 0: never
# evaluation
log_interval = 50           # steps between progress lines
eval_interval = 200         # steps between validations
checkpoint_interval = 200   # steps between checkpoints
beam_size = 4               # hypotheses for each sentence in the final BLEU (§6.1)
length_penalty = 0.6        # its alpha
# the machine
seed = 1                    # of weights, batches and dropout
device = "auto"             # cpu, cuda, cuda:1, mps; auto: cuda where there is one
dtype = "auto"              # bfloat16, float16 or float32 for matrix products; auto: the fastest that is safe
compile = "auto"            # True, False; auto: where the run is long enough to win back the minutes it takes
resume = False              # continue from out_dir/last.pt
# ---- end of settings --------------------------------------------------------

# With --src, these take the place of what the command line leaves open: the first row whose size, in MB of text on both
# sides, is not below that of the corpus. A small corpus needs a small model, much dropout and many epochs.
SMALL = dict(n_encoder_layers=4, n_decoder_layers=4, norm_first=True, batch_tokens=4096, max_steps=0, muon=1e-2,
             warmup_steps=200, eval_interval=500, checkpoint_interval=500, patience=5)
RECIPES = {
    2: dict(SMALL, vocab_size=3000, d_model=128, d_ff=256, dropout=0.3, epochs=50.0),                  # 15,000 pairs
    15: dict(SMALL, vocab_size=5000, d_model=128, d_ff=256, dropout=0.2, epochs=36.0),                 # 100,000
    100: dict(SMALL, vocab_size=10000, d_model=256, d_ff=1024, dropout=0.2, epochs=20.0,
              learning_rate=2e-3),                                                                     # 700,000
    600: dict(SMALL, vocab_size=32000, d_model=512, d_ff=2048, n_heads=8, n_encoder_layers=6, n_decoder_layers=6,
              dropout=0.1, epochs=15.0, batch_tokens=8192, learning_rate=1e-3, warmup_steps=1000),     # 4 million
    10 ** 9: dict(vocab_size=37000, d_model=512, d_ff=2048, n_heads=8, n_encoder_layers=6, n_decoder_layers=6,
                  dropout=0.1, batch_tokens=3125, accumulate=8, max_steps=100_000, learning_rate=0.0,
                  warmup_steps=4000, decay="inverse_sqrt", average_last=5, eval_interval=1000,
                  checkpoint_interval=1000),                                                           # the paper
}
# The model and its data: what a resumed run must not change.
FIXED = """vocab_size d_model d_ff n_heads n_encoder_layers n_decoder_layers norm_first batch_tokens accumulate seed
    src tgt max_len max_ratio""".split()

import difflib
import os
import re
import sys
import time


def fail(message):
    """A mistake of the user's: one line, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def override(settings, argv, path):
    """The settings that argv (--name=value) changes, each of the type of its default; nothing is evaluated as code.

    --help prints the docstring and the settings block of the script at path.
    """
    given = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            text = open(path, encoding="utf-8").read()
            block = text.split("# ---- settings")[1].split("# ---- end")[0].split("\n", 1)[1]
            print(text.split('"""')[1].strip(), block.rstrip(), sep="\n\n")
            sys.exit(0)
        name, equals, value = arg.removeprefix("--").partition("=")     # the first "=" only: a value may hold more
        if not arg.startswith("--") or name not in settings:
            near = difflib.get_close_matches(name, settings, 1)
            fail(f"unknown setting {arg!r}" + (f", did you mean --{near[0]}?" if near else "; --help lists them all"))
        kind = type(settings[name])
        if not equals:
            fail(f"--{name} needs a value, as in --{name}={settings[name]}")
        try:
            given[name] = {"True": True, "False": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            what = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
            fail(f"--{name} must be {what}, got {value!r}")
    return given


settings = {k: v for k, v in globals().items() if k[0] != "_" and type(v) in (bool, int, float, str)}   # the defaults
now = lambda: {name: globals()[name] for name in settings}                      # what they are in this run
if __name__ == "__main__":                              # before torch is imported: a typo costs no waiting
    given = override(settings, sys.argv[1:], __file__)
    globals().update(given)

import fcntl
import gzip
import itertools
import json
import math
import multiprocessing
import shutil
import signal
import threading
import uuid
import zlib
from collections import Counter
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from transformer import (BOS, EOS, PAD, Config, Dropout, Tokenizer, Transformer, beam_search, has_bfloat16,
                         keep_freed_memory, load, read_checkpoint, save, translate, write_atomically)


# -----------------------------------------------------------------------------
# §5.1 Training data

class Corpus:
    """Pairs of id sequences, flat: sentence i of a side is ids[start[i]:start[i + 1]]. Arrays in memory or on disk."""

    def __init__(self, src_ids, src_start, tgt_ids, tgt_start):
        self.src, self.tgt = (src_ids, src_start), (tgt_ids, tgt_start)
        self.n_src, self.n_tgt = np.diff(src_start), np.diff(tgt_start)     # lengths

    @classmethod
    def of(cls, src_rows, tgt_rows):
        flat = lambda rows: (np.array([i for row in rows for i in row], np.int64),
                             np.cumsum([0] + [len(row) for row in rows]))
        return cls(*flat(src_rows), *flat(tgt_rows))

    def __len__(self):
        return len(self.n_src)

    def batch(self, rows, S, T):
        """Those pairs as tensors. -> src (B, S): ids, EOS; tgt (B, T + 1): BOS, ids, EOS; PAD after."""
        def fill(side, width):
            ids, start = side
            begin, n = start[rows, None], start[rows + 1, None] - start[rows, None]
            at = np.arange(width)
            inside = ids[np.minimum(begin + at, len(ids) - 1)] if len(ids) else np.zeros((len(rows), width))
            return np.where(at < n, inside, np.where(at == n, EOS, PAD)).astype(np.int64)
        tgt_out = fill(self.tgt, T)
        tgt = np.concatenate((np.full((len(rows), 1), BOS), tgt_out), 1)
        return torch.from_numpy(fill(self.src, S)), torch.from_numpy(tgt)


def copy_task(n, seed, without=()):
    """n sequences of random symbols, each its own translation, none of them in `without`. -> list of tuples"""
    rng, rows, taken = np.random.default_rng(seed), [], set(without)
    while len(rows) < n:
        row = tuple(rng.integers(EOS + 1, vocab_size, rng.integers(5, 11)).tolist())
        if row not in taken:
            rows.append(row)
    return rows


def read_lines(path):
    """The lines of a plain or .gz text file. Only \\n ends one; invalid UTF-8 becomes U+FFFD."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
        for line in f:
            yield line.rstrip(b"\r\n").decode("utf-8", "replace").removeprefix("\ufeff")


def read_pairs(src, tgt):
    """(source line, target line), to the end of both files. Raises ValueError if they don't match or can't be read."""
    n = 0
    try:
        for n, (x, y) in enumerate(itertools.zip_longest(read_lines(src), read_lines(tgt)), 1):
            if x is None or y is None:
                short = src if x is None else tgt
                raise ValueError(f"{src} and {tgt} must have as many lines, but {short} ends after {n - 1:,}")
            yield x, y
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {src} and {tgt} after line {n:,}: {error}") from None
    if not n:
        raise ValueError(f"{src} and {tgt} are empty, expected one sentence a line")


def count_words(pairs):
    """The work of one process on a list of pairs, first pass: how often each word occurs."""
    return Counter(word for pair in pairs for line in pair for word in Tokenizer.words(line[:100 * max_len]))


def encode_pairs(pairs):
    """Second pass: [source ids, target ids] of the pairs fit for training, and counts of the others by reason."""
    kept, skipped = [], Counter(empty=0, too_long=0, ratio=0)
    for x, y in pairs:
        if not x.strip() or not y.strip():
            skipped["empty"] += 1
        elif max(len(x), len(y)) > 100 * max_len:       # not worth encoding
            skipped["too_long"] += 1
        else:
            a, b = (prepare.tokenizer.encode(line) for line in (x, y))
            short, long = sorted((len(a), len(b)))
            if long >= max_len:
                skipped["too_long"] += 1
            elif long > max_ratio * short + 5:
                skipped["ratio"] += 1
            else:
                kept.append((a, b))
    kind = np.uint16 if vocab_size <= 1 << 16 else np.uint32            # ids above 65,535 don't fit two bytes
    sides = [(np.array([i for row in rows for i in row], kind), np.array([len(row) for row in rows], np.int64))
             for rows in (zip(*kept) if kept else ((), ()))]
    return sides, skipped


def on_all_cores(work, pairs, n=5000):
    """work(list of n pairs) for all pairs, in order, on every core. Reads only as far ahead as the cores can use."""
    parts = iter(lambda: list(itertools.islice(pairs, n)), [])
    first = list(itertools.islice(parts, 2))
    if len(first) < 2 or not sys.platform.startswith("linux"):          # elsewhere a forked process is not safe
        yield from map(work, itertools.chain(first, parts))
    else:
        ignore = (signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the parent alone
        with multiprocessing.get_context("fork").Pool(initializer=signal.signal, initargs=ignore) as pool:
            yield from pool.imap(work, itertools.chain(first, parts))


def prepare(folder):
    """Learns the tokenizer and writes the ids of the training text below folder, unless they are there already.

    What is there is used if it was made from the same files (by size and time) with the same settings. Neither the text
    nor the ids have to fit in memory. -> (Corpus on disk, Tokenizer, counts of the pairs left out)
    """
    stats = [os.stat(path) for path in (src, tgt)]
    made_from = [vocab_size, max_len, max_ratio, [[s.st_size, s.st_mtime_ns] for s in stats],
                 os.path.abspath(src), os.path.abspath(tgt)]
    index, names = os.path.join(folder, "index.json"), [os.path.join(folder, name) for name in ("src", "tgt")]
    sizes = lambda: [os.path.getsize(name + kind) for name in names for kind in (".ids", ".lengths")]
    try:
        with open(index, encoding="utf-8") as f:
            found = json.load(f)
        fresh = found["made_from"] == made_from and found["sizes"] == sizes()
    except (OSError, ValueError, KeyError, TypeError):
        fresh = False
    if not fresh:
        os.makedirs(folder, exist_ok=True)
        counts = Counter()
        for part in on_all_cores(count_words, read_pairs(src, tgt)):
            counts.update(part)
            if len(counts) > 3_000_000:                 # rare words don't decide a merge, but they fill the memory
                counts = Counter({word: n for word, n in counts.items() if n > 1})
        prepare.tokenizer = Tokenizer.from_word_counts(dict(counts.most_common(500_000)), vocab_size)
        skipped = Counter()
        with open(names[0] + ".ids", "wb") as a, open(names[0] + ".lengths", "wb") as b, \
                open(names[1] + ".ids", "wb") as c, open(names[1] + ".lengths", "wb") as d:
            for sides, reasons in on_all_cores(encode_pairs, read_pairs(src, tgt)):
                skipped.update(reasons)
                for f, array in zip((a, b, c, d), itertools.chain(*sides)):
                    f.write(array.tobytes())
        if not any(sizes()):
            raise ValueError(f"no pair of {src} and {tgt} is fit for training; left out: {dict(skipped)}")
        found = {"made_from": made_from, "sizes": sizes(), "skipped": skipped, "merges": prepare.tokenizer.merges}
        write_atomically(index, json.dumps(found).encode())
    sides = []
    for name in names:
        start = np.concatenate(([0], np.cumsum(np.fromfile(name + ".lengths", np.int64))))
        sides += [np.memmap(name + ".ids", np.uint16 if vocab_size <= 1 << 16 else np.uint32, "r"), start]
    return Corpus(*sides), Tokenizer(found["merges"]), found["skipped"]


# -----------------------------------------------------------------------------
# §5.1 Batches: sentence pairs "batched together by approximate sequence length"

def widths(lengths, n=8):
    """The n widths that waste least padding when every length is rounded up to one of them: a dynamic programme."""
    top = int(lengths.max())
    count = np.bincount(lengths, minlength=top + 1)
    total, mass = np.cumsum(count), np.cumsum(count * np.arange(top + 1))
    # waste[i, j]: padding if all lengths in (i, j] become j
    i, j = np.arange(top + 1)[:, None], np.arange(top + 1)[None]
    waste = np.where(i < j, (total[j] - total[i]) * j - (mass[j] - mass[i]), np.inf)
    best, cuts = waste[0].copy(), []
    best[0] = 0
    for _ in range(n - 1):
        options = best[:, None] + waste
        options[np.arange(top + 1), np.arange(top + 1)] = best              # or no further width
        cuts.append(options.argmin(0))
        best = options.min(0)
    chosen = [top]
    for cut in reversed(cuts):
        chosen.append(int(cut[chosen[-1]]))
    return np.array(sorted(set(chosen) - {0}))


def plan_epoch(corpus, epoch, seed):
    """All batches of an epoch in the order of training: [(rows, S, T), ...]. Every pair is in exactly one.

    The plan follows from its arguments alone: every process makes the same one, and a resumed run makes it again.
    """
    rng = np.random.default_rng((seed, epoch))
    n_src, n_tgt = corpus.n_src + 1, corpus.n_tgt + 1                       # with EOS
    src_widths, tgt_widths = widths(n_src), widths(n_tgt)
    S, T = src_widths[np.searchsorted(src_widths, n_src)], tgt_widths[group := np.searchsorted(tgt_widths, n_tgt)]
    # Alike in both lengths, otherwise at random: by target width, and within it by source length, up and down in turn.
    order = np.lexsort((rng.random(len(corpus)), np.where(group % 2, -n_src, n_src), T))
    batches, at = [], 0
    while at < len(order):
        window = order[at:at + batch_tokens]
        wide = np.maximum.accumulate(np.maximum(S[window], T[window]))
        n = max(1, int((np.arange(1, len(window) + 1) * wide <= batch_tokens).sum()))
        # A batch of two widths pads the narrower rows. It ends where the width changes, if it is half full by then.
        rows = window[:n]
        changes = 1 + np.flatnonzero(np.diff(S[rows]) | np.diff(T[rows]))
        rows = rows[:changes[-1]] if len(changes) and changes[-1] >= n / 2 else rows
        batches.append((rows, int(S[rows].max()), int(T[rows].max())))
        at += len(rows)
    order = rng.permutation(len(batches))
    if epoch == 0:                                                          # the largest first: too little memory shows
        size = [len(batches[i][0]) * batches[i][1] * batches[i][2] for i in order]
        order = np.roll(order, -int(np.argmax(size)))
    return [batches[i] for i in order]


class Batches:
    """The endless sequence of micro-batches, epoch after epoch: batches[i] is (rows, S, T), for any i in any order."""

    def __init__(self, corpus, seed):
        self.corpus, self.seed, self.plans = corpus, seed, {}
        self.starts = [0]                                                   # the index at which each epoch begins

    def __getitem__(self, i):
        while True:
            epoch = int(np.searchsorted(self.starts, i, side="right")) - 1
            if epoch not in self.plans:
                self.plans = {e: p for e, p in self.plans.items() if e >= epoch - 1}
                self.plans[epoch] = plan_epoch(self.corpus, epoch, self.seed)
                if len(self.starts) == epoch + 1:
                    self.starts.append(self.starts[-1] + len(self.plans[epoch]))
            if i < self.starts[epoch + 1]:
                return self.plans[epoch][i - self.starts[epoch]]


# -----------------------------------------------------------------------------
# §5.3, §5.4 Schedule and loss

def peak_rate():
    """The rate at the end of warm-up: in Eq. 3, where the two sides of its min meet, (d_model·warmup_steps)^-0.5."""
    return learning_rate or (d_model * warmup_steps) ** -0.5


def learning_rate_at(step):
    """§5.3, Eq. 3, for steps from 1: a linear rise to the peak, then ∝ 1/√step. Or a straight line down to zero."""
    peak = peak_rate()
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay == "linear":
        return peak * max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))
    return peak * (warmup_steps / step) ** 0.5


class Loss(nn.Module):
    """Cross-entropy against a softened target: 1 - ε on the true token, and ε spread evenly over all V. §5.4

    One module around the model, for DistributedDataParallel: the logits and the loss are one compiled part.
    """

    def __init__(self, model, label_smoothing):
        super().__init__()
        self.model, self.label_smoothing, self.seeds = model, label_smoothing, []

    def forward(self, src, tgt):
        """(B, S), (B, T + 1) -> (loss to train on, negative log-likelihood to report): sums over the target tokens."""
        for seed in self.seeds:
            seed.random_()
        tgt_in, tgt_out = tgt[:, :-1], tgt[:, 1:]                       # each position predicts the next one
        states = self.model.decode(tgt_in, self.model.encode(src), src).flatten(0, 1)
        tgt_out = tgt_out.flatten()
        if not states.is_cuda:      # padding needs no logits; but to count it on a GPU would be to wait for it
            real = (tgt_out != PAD).nonzero().flatten()
            states, tgt_out = states.index_select(0, real), tgt_out[real]
        return self.score(states, tgt_out)

    def score(self, states, tgt_out):
        """(n, D), (n,) -> the two sums. With x the logits, -log p of word y is logsumexp(x) - x_y."""
        x = self.model.logits(states).float()                           # (n, V): most of a small model's memory
        true = torch.arange(x.size(1), device=x.device) == tgt_out[:, None]
        total = x.logsumexp(-1)
        nll = total - torch.where(true, x, 0.0).sum(-1)                # a gather's gradient is a scatter: 10% of a step
        smoothed = (1 - self.label_smoothing) * nll + self.label_smoothing * (total - x.mean(-1))
        real = tgt_out != PAD
        return (smoothed * real).sum(), (nll * real).sum()

    def compile_parts(self):
        """Compiles one layer of each kind for all of them, and what stands before and after: a fifth of the code that
        the whole model would be. Sizes are symbols, so that one compilation serves the batches of every shape."""
        # Masks and ReLUs are cheaper computed again in the backward pass than stored bit by bit: 11% of a CPU step. But
        # what is drawn must not be drawn again, so dropout's seeds come from outside the graph.
        if next(self.model.parameters()).device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, Dropout):
                    module.seed = torch.zeros((), dtype=torch.int32)
                    self.seeds.append(module.seed)
            from torch._functorch import config as functorch
            functorch.aggressive_recomputation = True
        torch._dynamo.config.specialize_float = True                    # or one cached with another dropout is taken
        torch._dynamo.config.optimize_ddp = False                       # DDP would cut each of the parts at its buckets
        for layer in (*self.model.encoder, *self.model.decoder):
            layer.compile(dynamic=True)
        self.model.embed = torch.compile(self.model.embed, dynamic=True)
        self.score = torch.compile(self.score, dynamic=True)


def flops(c, n_src, n_tgt, S, T):
    """FLOPs of forward and backward for that many real tokens in sentences of mean length S and T."""
    attention, ffn = 4 * c.d_model ** 2, 2 * c.d_model * c.d_ff
    per_src = (6 * (c.n_encoder_layers * (attention + ffn) + c.n_decoder_layers * attention / 2)
               + 12 * c.n_encoder_layers * S * c.d_model)
    per_tgt = (6 * (c.n_decoder_layers * (1.5 * attention + ffn) + c.d_model * c.vocab_size)
               + c.n_decoder_layers * (6 * T + 12 * S) * c.d_model)
    return n_src * per_src + n_tgt * per_tgt


# -----------------------------------------------------------------------------
# §6.1 BLEU (Papineni et al., 2002), as sacreBLEU computes it by default

def tokenize_13a(line):
    """The tokenizer of mteval-v13a: punctuation apart, but not inside numbers."""
    line = line.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(entity, char)
    line = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {line} ")
    line = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", line)
    line = re.sub(r"([\.,])([^0-9])", r" \1 \2", line)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()


def bleu(hypotheses, references, tokenize=tokenize_13a):
    """Corpus BLEU in percent, one reference a line: case-sensitive, 4-grams, exponential smoothing of zero counts."""
    match, total, n_hyp, n_ref = [0] * 4, [0] * 4, 0, 0
    for hyp, ref in zip(hypotheses, references, strict=True):
        hyp, ref = tokenize(hyp), tokenize(ref)
        n_hyp, n_ref = n_hyp + len(hyp), n_ref + len(ref)
        for n in range(4):
            grams = lambda words: Counter(zip(*(words[i:] for i in range(n + 1))))
            match[n] += (grams(hyp) & grams(ref)).total()
            total[n] += max(0, len(hyp) - n)
    if not any(match) or 0 in total:
        return 0.0
    log_precision, halved = 0.0, 1
    for m, t in zip(match, total):
        if not m:
            halved *= 2
        log_precision += math.log(100 * m / t if m else 100 / (halved * t)) / 4
    return min(1.0, math.exp(1 - n_ref / n_hyp)) * math.exp(log_precision)


# -----------------------------------------------------------------------------
# What a run shows

def draw_curve(points, width=64, height=10):
    """(step, loss) pairs as a plot for the terminal. -> str"""
    steps, values = np.array(points, float).T
    columns = np.minimum((steps - steps[0]) / max(1, steps[-1] - steps[0]) * width, width - 1).astype(int)
    means = [values[columns == c].mean() if (columns == c).any() else None for c in range(width)]
    low, high = values.min(), max(values.max(), values.min() + 1e-9)
    lines = []
    for row in range(height):
        level = high - (high - low) * (row + 0.5) / height
        near = lambda mean: mean is not None and abs(mean - level) <= (high - low) / height / 2 + 1e-12
        bar = "".join("█" if near(mean) else " " for mean in means)
        lines.append(f"{high - (high - low) * row / (height - 1):8.3f} ┤{bar}".rstrip())
    ends = f"{'step':>8}  {int(steps[0]):<{width // 2}}{int(steps[-1]):>{width // 2}}"
    return "\n".join(lines + [f"{'':9}└{'─' * width}", ends])


def clock(seconds):
    """Seconds as h:mm:ss, or m:ss below an hour."""
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02}:{s:02}" if m >= 60 else f"{m}:{s:02}"


def matmul_rate(device, dtype, seconds=0.2):
    """FLOP/s of square matrix products on this device, measured: the ceiling of any step."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a @ b, sync()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            a @ b
        sync()
        count += 4
    return 2 * n ** 3 * count / (time.perf_counter() - start)


# -----------------------------------------------------------------------------
# The run

def fresh_store(rank, world):
    """A clean corner of the store in which torchrun's processes find each other.

    torchrun keeps its store over restarts, with the addresses of the dead in it: to call one of those is to hang. So
    each process sends a greeting that no dead one can have sent, and rank 0 answers with the name of a new corner.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timedelta(minutes=2)))
    me = uuid.uuid4().hex
    if rank:
        store.set(f"greeting {rank}", me)
        corner = store.get(f"corner for {me}").decode()
        store.set(f"{me} is in {corner}", "")
        return dist.PrefixStore(corner, store)
    missing = set(range(1, world))
    while missing:
        for r in sorted(missing):
            them = store.get(f"greeting {r}").decode()
            store.set(f"corner for {them}", me)
            if store.check([f"{them} is in {me}"]):
                missing.remove(r)
        time.sleep(0.01)
    return dist.PrefixStore(me, store)


def on_rank_0(work, rank, group):
    """Rank 0 does the work, which returns a whole number; the others wait for that number, as long as it takes.

    But all the while they are sent signs of life. To wait without is to wait for ever when rank 0 or the wire is gone.
    """
    if group is None:
        return work()
    sign = torch.zeros(2, dtype=torch.int64)            # is it done, and the number
    if rank:
        while not sign[0]:
            dist.broadcast(sign, 0, group)
        return int(sign[1])
    done = threading.Event()

    def give_signs():
        while not done.wait(5):
            try:
                dist.broadcast(sign, 0, group)
            except RuntimeError:                        # the others are gone; the next broadcast will say so
                return

    signs = threading.Thread(target=give_signs, daemon=True)
    signs.start()
    try:
        result = work()
    finally:
        done.set()
    signs.join()
    dist.broadcast(torch.tensor([1, result]), 0, group)
    return result


def main():
    start_time = time.time()

    # ---- processes and device ---------------------------------------------------
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))      # set by torchrun
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *args, **options: None
    stop = fail if rank == 0 else lambda message: sys.exit(2)
    check_settings(stop)
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        dev = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=dev)
    except (RuntimeError, AssertionError) as error:
        stop(f"--device={device} can't be used: {str(error).splitlines()[0]}")
    cuda = dev.type == "cuda"
    if cuda:
        torch.cuda.set_device(dev)
        torch.backends.cuda.enable_cudnn_sdp(False)     # its backward with a mask can give NaN on Hopper
    elif local_world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    # A process that nobody hears from for a minute is gone, and so are the others then, instead of waiting for it.
    signs_of_life = None
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", store=fresh_store(rank, world), rank=rank, world_size=world,
                                timeout=timedelta(seconds=60))
        signs_of_life = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()

    # ---- data -------------------------------------------------------------------
    tokenizer, left_out, val, val_text = None, {}, None, None
    last, log_path, model_path = (os.path.join(out_dir, name) for name in ("last.pt", "log.jsonl", "model.pt"))
    if resume and not os.path.exists(last):
        stop(f"--resume=True, but there is no {last}; start without it")
    try:
        os.makedirs(out_dir, exist_ok=True)
        if rank == 0:
            log = open(log_path, "a", encoding="utf-8")
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)     # held until this process ends, however it ends
        if src:
            say(f"preparing {src} and {tgt} ...", flush=True)           # the first one works, the others find it done
            on_rank_0(lambda: len(prepare(os.path.join(out_dir, "data"))[0]), rank, signs_of_life)
            corpus, tokenizer, left_out = prepare(os.path.join(out_dir, "data"))
            if val_src:
                val_text = list(zip(*read_pairs(val_src, val_tgt)))
                val = Corpus.of(*([tokenizer.encode(line)[:max_len - 1] for line in side] for side in val_text))
        else:
            rows = copy_task(20_000, seed)
            unseen = copy_task(1_000, seed + 1, without=rows)
            corpus, val = Corpus.of(rows, rows), Corpus.of(unseen, unseen)
    except BlockingIOError:
        stop(f"another run is writing to {out_dir}; give this one its own --out_dir")
    except (OSError, ValueError) as error:
        stop(str(error))
    batches, plan = Batches(corpus, seed), plan_epoch(corpus, 0, seed)
    steps_per_epoch = len(plan) / (world * accumulate)
    globals()["max_steps"] = max_steps or max(1, round(epochs * steps_per_epoch))

    # ---- model and optimizers -------------------------------------------------------
    torch.manual_seed(seed)
    try:
        config = Config(len(tokenizer) if tokenizer else vocab_size, d_model, n_heads, d_ff, n_encoder_layers,
                        n_decoder_layers, dropout, norm_first)
    except ValueError as error:
        stop(str(error))
    model = Transformer(config).to(dev)
    torch.manual_seed(seed + rank)                      # the same weights on every rank, but other dropout
    # §5.3 has Adam for all. Muon makes each matrix's step orthogonal: every direction in it learns at the same rate.
    matrices = [w for part in (model.encoder, model.decoder) for w in part.parameters() if w.dim() == 2 and muon]
    taken = set(map(id, matrices))
    optimizers = [torch.optim.Adam([w for w in model.parameters() if id(w) not in taken], betas=(0.9, 0.98), eps=1e-9,
                                   fused=dev.type in ("cpu", "cuda"))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))

    # Narrow matrices don't win back the casts to bfloat16; a GPU without it has float16, which needs its loss scaled.
    amp = dtype if dtype != "auto" else "bfloat16" if has_bfloat16(dev) and (cuda or d_model >= 128) else \
        "float16" if cuda else "float32"
    scaler = torch.amp.GradScaler(dev.type, enabled=amp == "float16")
    autocast = lambda: torch.autocast(dev.type, getattr(torch, amp), enabled=amp != "float32")

    # How long will this take? From the FLOPs, and from the rate of plain matrix products on this machine.
    real = int(corpus.n_src.sum()) + len(corpus), int(corpus.n_tgt.sum()) + len(corpus)
    padding = 1 - sum(real) / sum(len(rows) * (S + T) for rows, S, T in plan)
    id_flops = flops(config, *real, real[0] / len(corpus), real[1] / len(corpus)) / sum(real)
    run_flops = id_flops * sum(real) / steps_per_epoch * max_steps
    peak = matmul_rate(dev, getattr(torch, amp)) * world
    estimate = run_flops / (0.35 * peak)
    compiled = compile == "True" or compile == "auto" and estimate > 120
    if compiled and not cuda and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        say("no C++ compiler found: running without torch.compile")
        compiled = False
    step_fn = loss_fn = Loss(model, label_smoothing)
    if compiled:
        loss_fn.compile_parts()
    if world > 1:
        step_fn = nn.parallel.DistributedDataParallel(loss_fn, device_ids=[dev.index] if cuda else None)
        ours = [now(), len(corpus), sum(real), config.vocab_size, torch.__version__]
        theirs = [None] * world
        dist.all_gather_object(theirs, ours)
        different = [r for r in range(world) if theirs[r] != theirs[0]]
        if different:
            stop(f"rank {different[0]} has other settings, another corpus or another torch than rank 0: "
                 f"{theirs[different[0]]} there, {theirs[0]} here")

    # ---- resume -------------------------------------------------------------------
    progress = dict(step=0, best_nll=math.inf, n_worse=0, n_skipped=0, history=[], recent=[])
    # Loss, nll and target ids since the last progress line, on the device: to read them would be to wait for it.
    totals = torch.zeros(3, dtype=torch.float64, device=dev)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and os.path.exists(last)   # --max-restarts
    if resume or restarted:
        try:
            state = read_checkpoint(last)
        except ValueError as error:
            stop(str(error))
        if not isinstance(state, dict) or "ranks" not in state:
            stop(f"{last} is a checkpoint, but not one that train.py resumes from")
        try:
            for name in FIXED:
                if state["settings"][name] != globals()[name]:
                    stop(f"{last} was made with --{name}={state['settings'][name]}, got {globals()[name]}")
            if state["world"] != world:
                stop(f"{last} was made by {state['world']} processes, got {world}")
            model.load_state_dict(state["model"])
            for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            scaler.load_state_dict(state["scaler"])
            progress = {name: state[name] for name in progress}
            rng, cuda_rng, mine = state["ranks"][rank]
            torch.set_rng_state(rng)
            if cuda:
                torch.cuda.set_rng_state(cuda_rng)
            totals.copy_(mine)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = f"{type(error).__name__}, {str(error).splitlines()[0]}"
            stop(f"{last} was saved by another version of train.py: {what}")
    if rank == 0:                       # the log's lines on steps to come go, in one cut: no kill loses other lines
        n_bytes = 0
        with open(log_path, "rb") as f:
            for line in f:
                if not progress["step"] or not line.endswith(b"}\n") or json.loads(line)["step"] > progress["step"]:
                    break
                n_bytes += len(line)
        log.truncate(n_bytes)

    # ---- banner -------------------------------------------------------------------
    changed = " ".join(f"{name}={value}" for name, value in now().items() if value != settings[name])
    where = torch.cuda.get_device_name(dev) if cuda else f"{dev}, {torch.get_num_threads()} threads"
    say(f"settings  {changed or 'the defaults: learning to copy'}")
    if src:
        mine = " ".join(name for name in recipe()[1] if name not in given)
        say(f"recipe    for {recipe()[0]:.1f} MB of text, from its size: {mine or 'nothing, all is given'}")
    say(f"machine   {world} x {where}, torch {torch.__version__}, {amp}, {'' if compiled else 'not '}compiled, "
        f"{peak / 1e12:.3g} TFLOP/s in matrix products")
    say(f"model     {sum(p.numel() for p in model.parameters()):,} parameters")
    say(f"data      {len(corpus):,} pairs, {real[0]:,} + {real[1]:,} ids, {padding:.1%} padding; left out: "
        + (", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none"))
    say(f"run       {max_steps:,} steps of about {sum(real) / steps_per_epoch:,.0f} ids, {steps_per_epoch:.1f} steps "
        f"an epoch, {run_flops:.2g} FLOPs, about {clock(estimate)}{' and a minute to compile' * compiled}", flush=True)
    if progress["step"]:
        say(f"resumed   from {last}, after step {progress['step']:,}")

    bleu_words = str.split if bleu_tokenize == "none" else tokenize_13a

    # ---- what happens between the steps; none of it changes what is learnt ----------
    def record(**values):
        """One line of log.jsonl."""
        seconds = round(time.time() - start_time, 2)
        log.write(json.dumps({"step": progress["step"], **values, "seconds": seconds}) + "\n")
        log.flush()

    def report(norm, n_ids, seconds):
        """The progress line. All ranks call it."""
        step, sums = progress["step"], totals.clone()
        totals.zero_()
        if world > 1:
            dist.all_reduce(sums)
        loss, nll = (sums[:2] / sums[2]).tolist()
        progress["history"].append([step, nll])
        if rank == 0:
            values = dict(loss=loss, nll=nll, perplexity=math.exp(min(nll, 50)), learning_rate=learning_rate_at(step),
                          grad_norm=norm.item(), skipped=progress["n_skipped"], tokens_per_second=n_ids / seconds,
                          mfu=n_ids / seconds * id_flops / peak)
            record(**values)
            left = clock((max_steps - step) * seconds / log_interval)
            line = ("step {:6d}  loss {loss:.4f}  nll {nll:.4f}  ppl {perplexity:8.2f}  lr {learning_rate:.2e}  "
                    "norm {grad_norm:.2f}  {tokens_per_second:,.0f} ids/s  mfu {mfu:.0%}  left {}")
            say(line.format(step, left, **values), flush=True)

    def validation_nll():
        """Mean negative log-likelihood of a target id of the validation set."""
        total, n = 0.0, 0
        with torch.inference_mode(), autocast():
            for rows, S, T in plan_epoch(val, 0, 0):
                x, y = (ids.to(dev) for ids in val.batch(rows, S, T))
                total += loss_fn(x, y)[1].item()
                n += int((val.n_tgt[rows] + 1).sum())
        return total / n

    def validate():
        """Scores the model, and writes model.pt if it is the best so far. -> validations since the best"""
        model.eval()
        torch.compiler.set_stance("force_eager")        # what runs once in a while is not worth compiling
        nll, samples = validation_nll(), ""
        values = dict(val_nll=nll, val_perplexity=math.exp(min(nll, 50)))
        if val_text:                                    # greedy, and not all of a long file: to watch, not to report
            sources, truths = (side[:500] for side in val_text)
            out = [best[0][0] for best in translate(model, tokenizer, sources, beam_size=1)]
            values["val_bleu"] = bleu(out, truths, bleu_words)
            for i in {0, len(out) // 2}:
                samples += f"\n    source  {sources[i]}\n    model   {out[i]}\n    truth   {truths[i]}"
        record(**values)
        scores = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        say(f"step {progress['step']:6d}  {scores}{samples}", flush=True)
        progress["n_worse"] += 1
        if nll < progress["best_nll"]:
            progress.update(best_nll=nll, n_worse=0)
            save(model_path, model, tokenizer)
        torch.compiler.set_stance("default")
        model.train()
        return progress["n_worse"]

    def save_checkpoint():
        """last.pt: everything it takes to go on as if nothing had happened. All ranks call it, rank 0 writes."""
        mine = (torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None, totals.cpu())
        everyone = [mine]
        if world > 1:
            everyone = [None] * world
            dist.all_gather_object(everyone, mine)

        def write():
            write_atomically(last, {
                **progress, "world": world, "ranks": everyone, "settings": now(), "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers], "scaler": scaler.state_dict()})
            return 0
        on_rank_0(write, rank, signs_of_life)

    def leave_if_told():
        """One process may have heard a signal that the others have not: they agree, and all end after the same step."""
        heard = signals[0] if signals else 0
        if world > 1:
            flag = torch.tensor(heard, device=dev)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            heard = int(flag)
        if heard:
            save_checkpoint()
            say(f"{signal.Signals(heard).name} after step {progress['step']:,}: saved {last}; "
                "go on with the same command and --resume=True")
            sys.exit(128 + heard)

    def finish():
        """Chooses what model.pt is to be, averaged weights or the best so far, and shows what it can do."""
        recent = progress["recent"]
        if len(recent) > 1:                             # §6.1
            model.load_state_dict({name: torch.stack([w[name] for w in recent]).mean(0) for name in recent[0]})
        model.eval()
        nll = validation_nll() if val else -math.inf
        if len(recent) > 1 and val:
            say(f"mean of the last {len(recent)} checkpoints: validation nll {nll:.4f}, "
                f"best without {progress['best_nll']:.4f}")
        if nll <= progress["best_nll"]:
            save(model_path, model, tokenizer)
        best, _ = load(model_path, dev)
        if len(progress["history"]) > 1:
            say("\nnegative log-likelihood of the training text\n" + draw_curve(progress["history"]) + "\n")
        if val_text:
            best.to(getattr(torch, amp))
            out = [found[0][0] for found in translate(best, tokenizer, val_text[0], beam_size, length_penalty)]
            score = bleu(out, val_text[1], bleu_words)
            say(f"validation BLEU {score:.2f} (tokenizer {bleu_tokenize}, beam {beam_size}, "
                f"length penalty {length_penalty})")
            record(bleu=score)
        elif not src:
            pairs, words = [], lambda row: row[:row.index(EOS)]
            for rows, S, T in plan_epoch(val, 0, 0):
                x, y = (ids.to(dev) for ids in val.batch(rows, S, T))
                out, _ = beam_search(best, x, beam_size=1, max_len=T + 5)
                pairs += [(words(a), words(b)) for a, b in zip(y[:, 1:].tolist(), out.tolist())]
            for a, b in pairs[:3]:
                say(f"  in  {' '.join(map(str, a))}\n  out {' '.join(map(str, b))}")
            accuracy = sum(a == b for a, b in pairs) / len(pairs)
            say(f"exact-sequence accuracy on {len(val):,} unseen sequences: {accuracy:.1%}")
            record(accuracy=accuracy)
        say(f"{clock(time.time() - start_time)} in all; the model is {model_path}"
            + (f"\nuse it:  python transformer.py --checkpoint={model_path} < in.txt > out.txt" if src else ""))
        return 0

    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))

    # ---- training -----------------------------------------------------------------
    model.train()
    tick, n_ids = time.time(), 0
    for step in range(progress["step"] + 1, max_steps + 1):
        if patience and progress["n_worse"] >= patience:
            say(f"step {step - 1:6d}  {patience} validations without a better one: enough")
            break
        for optimizer, scale in zip(optimizers, (1.0, muon / peak_rate())):             # one schedule for both
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step) * scale
        # Every process knows the whole plan, and so how many target ids the step has on all of them together.
        start = (step - 1) * world * accumulate
        micro = [batches[start + i] for i in range(world * accumulate)]
        n_tgt = sum(int(corpus.n_tgt[rows].sum()) + len(rows) for rows, _, _ in micro)
        for i in range(accumulate):
            rows, S, T = micro[i * world + rank]
            # A copy from ordinary memory would wait until the GPU has nothing left to do.
            batch = corpus.batch(rows, S, T)
            x, y = (ids.pin_memory().to(dev, non_blocking=True) if cuda else ids.to(dev) for ids in batch)
            if world > 1:
                step_fn.require_backward_grad_sync = i == accumulate - 1            # one all-reduce a step
            with autocast():
                loss, nll = step_fn(x, y)
            scaler.scale(loss * (world / n_tgt)).backward()                         # DDP averages over ranks: undo that
            totals += torch.stack((loss.detach(), nll.detach(), (y[:, 1:] != PAD).sum()))
        for optimizer in optimizers:
            scaler.unscale_(optimizer)                                              # or clipping would clip the scale
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        due = lambda interval: step % interval == 0 or step == max_steps
        # A GPU is asked for the norm only when it must be: to read it is to wait for it.
        look = due(log_interval) or due(checkpoint_interval) or not cuda or world == 1 and bool(signals)
        # What is saved has been checked either way. Under float16 the scaler takes no step, and scales less.
        if (look or scaler.is_enabled()) and not math.isfinite(norm.item()):
            progress["n_skipped"] += 1
            if not scaler.is_enabled():
                sentences = sorted(int(r) for rows, _, _ in micro for r in rows)[:20]
                stop(f"the gradient is {norm.item()} at step {step:,}{' or shortly before' * cuda}, in sentences "
                     f"{sentences}...; {last} is from before; lower --learning_rate?")
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)

        progress["step"] = step
        n_ids += sum(int(corpus.n_src[rows].sum() + corpus.n_tgt[rows].sum()) + 2 * len(rows) for rows, _, _ in micro)
        if due(log_interval):
            report(norm, n_ids, time.time() - tick)
            tick, n_ids = time.time(), 0
        if val and due(eval_interval):
            progress["n_worse"] = on_rank_0(validate, rank, signs_of_life)
        if due(checkpoint_interval):
            if average_last > 1:
                weights = {name: w.detach().cpu().clone() for name, w in model.state_dict().items()}
                progress["recent"] = (progress["recent"] + [weights])[-average_last:]
            save_checkpoint()
        if look:
            leave_if_told()

    # ---- the end --------------------------------------------------------------------
    torch.compiler.set_stance("force_eager")
    on_rank_0(finish, rank, signs_of_life)
    if world > 1:
        dist.destroy_process_group()


def check_settings(stop):
    """Stops the run, in one line, for values that make no sense: before anything is read or written."""
    files = {"src": src, "tgt": tgt, "val_src": val_src, "val_tgt": val_tgt}
    for a, b in (("src", "tgt"), ("val_src", "val_tgt")):
        if bool(files[a]) != bool(files[b]):
            stop(f"--{a} and --{b} belong together, got {a}={files[a]!r} and {b}={files[b]!r}")
    if val_src and not src:
        stop("--val_src is given without --src: there is nothing to train on")
    for name, path in files.items():
        if path and not os.path.isfile(path):
            found = "another thing" if os.path.exists(path) else "nothing there"
            stop(f"--{name}={path}: expected a text file, found {found}")
    for name, low in dict(batch_tokens=1, accumulate=1, log_interval=1, eval_interval=1, checkpoint_interval=1,
                          average_last=1, beam_size=1, warmup_steps=1, max_len=1, max_steps=0, epochs=0,
                          learning_rate=0, muon=0, grad_clip=0, max_ratio=0, patience=0, seed=0).items():
        if not low <= globals()[name] < math.inf:
            stop(f"--{name} must be at least {low}, got {globals()[name]}")
    if not 0 <= label_smoothing < 1:
        stop(f"--label_smoothing must lie in [0, 1), got {label_smoothing}")
    if not max_steps and not epochs:
        stop("--max_steps and --epochs are both 0: nothing to do")
    for name, options in dict(decay=("inverse_sqrt", "linear"), compile=("auto", "True", "False"),
                              bleu_tokenize=("13a", "none"), dtype=("auto", "float32", "bfloat16", "float16")).items():
        if globals()[name] not in options:
            stop(f"--{name} must be one of {', '.join(options)}, got {globals()[name]!r}")


def recipe():
    """The row of RECIPES for the training text, by its size in MB, .gz files counted four times. -> (MB, dict)"""
    files = [path for path in (src, tgt) if os.path.isfile(path)]
    size = sum(os.path.getsize(path) * (4 if path.endswith(".gz") else 1) for path in files) / 1e6
    return size, next(row for limit, row in RECIPES.items() if size <= limit)


if __name__ == "__main__":
    if src:
        megabytes, row = recipe()
        globals().update({name: value for name, value in row.items() if name not in given})
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        fail(f"{error}; what was saved before is intact")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            fail(f"out of memory: lower --batch_tokens={batch_tokens} and raise --accumulate={accumulate} to make up")
        # The other processes are gone, or can't be reached any more.
        if "RANK" not in os.environ or not re.search("gloo|NCCL|onnection|imed out|ocket|store", str(error)):
            raise
        fail(f"rank {os.environ['RANK']} lost the other processes ({str(error).splitlines()[0][:200]}); "
             f"start all of them again with --resume=True")
