"""
Training a Transformer: Section 5 of the paper.

    python train.py                                                   # learns to copy, in a quarter of a minute
    python train.py --src=a.en --tgt=a.de --val_src=b.en --val_tgt=b.de --out_dir=out       # learns to translate
    torchrun --nproc_per_node=2 train.py ...                          # the same on two GPUs, or two CPU processes

Every setting below can be overridden as --name=value. --help prints them.
It writes out_dir/model.pt (to use), out_dir/last.pt (to resume with --resume=True) and out_dir/log.jsonl.
"""

# ---- settings ---------------------------------------------------------------
# The defaults train the copy task. With --src, RECIPES below replace those that the command line leaves open: Section 5
# is their last row, and the others leave it for what small corpora and few hours need.
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
batch_tokens = 1280         # source ids, and target ids, of a micro-batch, padding included
accumulate = 1              # micro-batches whose gradients make one step, on each process
max_steps = 300             # optimizer steps; 0: as many as `epochs` needs
epochs = 0.0                # passes over the training pairs, if max_steps is 0
learning_rate = 4e-3        # of Adam at the end of warm-up; 0: the paper's (d_model * warmup_steps)^-0.5
muon = 5e-3                 # learning rate of Muon for the matrices of the layers; 0: Adam for all, as in the paper
embedding_decay = 0.0       # AdamW's weight decay of the embeddings, for small corpora; 0: none, as in the paper
warmup_steps = 50           # steps of linear rise
decay = "linear"            # after warm-up: inverse_sqrt (§5.3), or linear, down to 0 at max_steps
label_smoothing = 0.1       # §5.4
grad_clip = 1.0             # the gradient's largest norm; 0: any
average_last = 1            # model.pt is the mean of the last so many checkpoints (§6.1 uses 5), if that is better
patience = 0                # stop after this many validations in a row without a better one; 0: never
# evaluation
log_interval = 50           # steps between progress lines
eval_interval = 150         # steps between validations
checkpoint_interval = 150   # steps between checkpoints
beam_size = 4               # hypotheses for each sentence in the final BLEU (§6.1)
length_penalty = -1.0       # its alpha, kept in model.pt; -1: the best of 0.6, 1.0 and 1.4 on the validation text
# the machine
seed = 1                    # of weights, batches and dropout
device = "auto"             # cpu, cuda, cuda:1, mps; auto: cuda where there is one
dtype = "auto"              # bfloat16, float16 or float32 for matrix products; auto: the fastest that is safe
compile = "auto"            # True, False; auto: where the run is long enough to win back the minutes it takes
group_timeout = 600         # seconds; a process that the others hear nothing from for so long counts as lost
resume = False              # continue from out_dir/last.pt
# ---- end of settings --------------------------------------------------------
settings = {k: v for k, v in globals().items() if k[0] != "_" and type(v) in (bool, int, float, str)}

# With --src, these take the place of what the command line leaves open: the first row whose size, in MB of text on both
# sides, is not below that of the corpus. A small corpus needs a small model, much dropout and many epochs.
SMALL = dict(n_encoder_layers=4, n_decoder_layers=4, norm_first=True, batch_tokens=4096, max_steps=0, muon=1e-2,
             embedding_decay=0.1, warmup_steps=200, eval_interval=500, checkpoint_interval=500, patience=5)
RECIPES = {
    2: dict(SMALL, vocab_size=3000, d_model=128, d_ff=256, dropout=0.3, epochs=50.0),                  # 15,000 pairs
    15: dict(SMALL, vocab_size=5000, d_model=128, d_ff=256, dropout=0.2, epochs=36.0),                 # 100,000
    100: dict(SMALL, vocab_size=10000, d_model=256, d_ff=1024, dropout=0.2, epochs=20.0,
              learning_rate=2e-3),                                                                     # 700,000
    600: dict(SMALL, vocab_size=32000, d_model=512, d_ff=2048, n_heads=8, n_encoder_layers=6, n_decoder_layers=6,
              dropout=0.1, epochs=15.0, batch_tokens=8192, learning_rate=1e-3, warmup_steps=1000),     # 4 million
    10 ** 9: dict(vocab_size=37000, d_model=512, d_ff=2048, n_heads=8, n_encoder_layers=6, n_decoder_layers=6,
                  dropout=0.1, batch_tokens=3125, accumulate=8, max_steps=100_000, learning_rate=0.0,
                  muon=0.0, warmup_steps=4000, decay="inverse_sqrt", grad_clip=0.0, average_last=5,
                  eval_interval=1000, checkpoint_interval=1000),                                   # the paper
}
# The smallest and the largest value that makes sense, or all that do.
BOUNDS = dict.fromkeys("""batch_tokens accumulate log_interval eval_interval checkpoint_interval average_last beam_size
    warmup_steps max_len group_timeout""".split(), (1, 1e9))
BOUNDS |= dict.fromkeys("""max_steps epochs learning_rate muon embedding_decay grad_clip max_ratio patience
    seed""".split(), (0, 1e9))
BOUNDS |= dict(vocab_size=(6, 1e9), label_smoothing=(0, 0.999), length_penalty=(-1, 10),
               decay=["inverse_sqrt", "linear"], compile=["auto", "True", "False"], bleu_tokenize=["13a", "none"],
               dtype=["auto", "float32", "bfloat16", "float16"])
# What a resumed run must not change, besides its text, its kinds of optimizers and the number of its processes.
FIXED = """vocab_size d_model d_ff n_heads n_encoder_layers n_decoder_layers norm_first batch_tokens accumulate seed
    src tgt max_len max_ratio embedding_decay""".split()

import ctypes
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from transformer import (BOS, EOS, PAD, Config, Tokenizer, Transformer, beam_search, fail, for_inference, has_bfloat16,
                         load, override, read_checkpoint, save, translate, write_atomically)

try:
    import fcntl
except ImportError:         # Windows has no such locks: there, nothing keeps two runs out of one folder
    fcntl = None

now = lambda: {name: globals()[name] for name in settings}                      # what they are in this run
clock = lambda seconds: str(timedelta(seconds=int(seconds)))                    # h:mm:ss

def check_settings():
    """Ends the run, in one line, if a setting makes no sense: before anything is read or written."""
    files = {name: globals()[name] for name in ("src", "tgt", "val_src", "val_tgt")}
    if bool(src) != bool(tgt) or bool(val_src) != bool(val_tgt) or val_src and not src:
        fail(f"--src and --tgt belong together, and --val_src and --val_tgt to them, got {files}")
    for name, path in files.items():
        if path and not os.path.isfile(path):
            found = "another thing" if os.path.exists(path) else "nothing there"
            fail(f"--{name}={path}: expected a text file, found {found}")
    for name, allowed in BOUNDS.items():
        value, choice = globals()[name], isinstance(allowed, list)
        if not (value in allowed if choice else allowed[0] <= value <= allowed[1]):
            expected = f"one of {', '.join(allowed)}" if choice else f"from {allowed[0]} to {allowed[1]:g}"
            fail(f"--{name} must be {expected}, got {value!r}")
    if not max_steps and not epochs:
        fail("--max_steps and --epochs are both 0: nothing to do")

def recipe():
    """The row of RECIPES for the training text, by its size in MB, .gz files counted four times. -> (MB, dict)"""
    files = [path for path in (src, tgt) if os.path.isfile(path)]
    size = sum(os.path.getsize(path) * (4 if path.endswith(".gz") else 1) for path in files) / 1e6
    return size, next(row for limit, row in RECIPES.items() if size <= limit)

def find_device(name, local_rank=0):
    """The torch.device of that name; "auto" and "cuda" are this process's own GPU. Raises ValueError if it won't do."""
    try:
        if name == "cuda" or name == "auto" and torch.cuda.is_available():
            name = f"cuda:{local_rank}"
        device = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={name} can't be used: {str(error).splitlines()[0]}") from None

def keep_freed_memory():
    """Asks the C library, where it is glibc, to keep large blocks when they are freed. Otherwise each goes back to the
    system and comes again page by page, zeroed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)                                            # M_MMAP_THRESHOLD: smaller ones go to the heap
        mallopt(-1, -1)                                                 # M_TRIM_THRESHOLD: and the heap never shrinks
    except (OSError, AttributeError, TypeError):
        pass

# ---- §5.1 Training data ------------------------------------------------------

class Corpus:
    """Pairs of id sequences, one after the other in one array, in memory or on disk: a source, its target, a source...
    lengths: how many ids each of them has. Sequence i is ids[start[i]:start[i + 1]]."""

    def __init__(self, ids, lengths):
        self.ids, self.start = ids, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self.n_src, self.n_tgt = lengths[0::2], lengths[1::2]

    @classmethod
    def of(cls, pairs):
        """From (list of source ids, list of target ids) pairs."""
        rows = [row for pair in pairs for row in pair]
        return cls(np.array([i for row in rows for i in row], np.int64), np.array([len(row) for row in rows], np.int64))

    def __len__(self):
        return len(self.n_src)

    def n_ids(self, rows):
        """How many real ids those pairs have, EOS included: (source, target)"""
        return int(self.n_src[rows].sum()) + len(rows), int(self.n_tgt[rows].sum()) + len(rows)

    def batch(self, rows, S, T):
        """Those pairs as tensors. -> src (B, S): ids, EOS; tgt (B, T + 1): BOS, ids, EOS; PAD after."""
        src, tgt = (np.full((len(rows), width), PAD, np.int64) for width in (S, T + 1))
        tgt[:, 0] = BOS
        for i, row in enumerate(rows):
            a, b, c = self.start[2 * row:2 * row + 3]
            src[i, :b - a], src[i, b - a] = self.ids[a:b], EOS
            tgt[i, 1:c - b + 1], tgt[i, c - b + 1] = self.ids[b:c], EOS
        return torch.from_numpy(src), torch.from_numpy(tgt)

def copy_task(n, seed, without=()):
    """n sequences of random symbols, each its own translation, none of them in `without`. -> list of pairs of tuples"""
    rng, pairs, taken = np.random.default_rng(seed), [], set(without)
    while len(pairs) < n:
        row = tuple(rng.integers(EOS + 1, vocab_size, rng.integers(5, 11)).tolist())
        if (row, row) not in taken:
            pairs.append((row, row))
    return pairs

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

def be_a_worker():
    """Ctrl-C is for the parent alone, and SIGTERM is the end: what the parent does then would be wrong here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def on_all_cores(work, pairs, n=5000):
    """work(list of n pairs) for all pairs, in order, on every core. Reads two lists a core ahead at most."""
    parts = iter(lambda: list(itertools.islice(pairs, n)), [])
    first = list(itertools.islice(parts, 2))
    parts = itertools.chain(first, parts)
    if len(first) < 2 or not sys.platform.startswith("linux"):          # elsewhere a forked process is not safe
        yield from map(work, parts)
        return
    with multiprocessing.get_context("fork").Pool(initializer=be_a_worker) as pool:
        while batch := list(itertools.islice(parts, 2 * os.cpu_count())):
            yield from pool.map(work, batch, chunksize=1)

def count_words(pairs):
    """The work of one process on a list of pairs, first pass: how often each word occurs."""
    return Counter(word for pair in pairs for line in pair for word in Tokenizer.words(line[:100 * max_len]))

tokenizer = None            # set by `prepare`, for the worker processes of its second pass to find it

def encode_pairs(pairs):
    """Second pass: ids and lengths of the pairs fit for training, as in Corpus, and counts of the others by reason."""
    rows, left_out = [], Counter(empty=0, too_long=0, ratio=0)
    for x, y in pairs:
        if not x.strip() or not y.strip():
            left_out["empty"] += 1
            continue
        a, b = (tokenizer.encode(line[:100 * max_len]) for line in (x, y))
        short, long = sorted((len(a), len(b)))
        if long >= max_len:
            left_out["too_long"] += 1
        elif long > max_ratio * short + 5:
            left_out["ratio"] += 1
        else:
            rows += a, b
    ids, lengths = [i for row in rows for i in row], [len(row) for row in rows]
    return np.array(ids, np.uint32), np.array(lengths, np.uint32), left_out

def prepare(folder):
    """Learns the tokenizer and writes the ids of the training text into folder, unless they are there already.

    What is there is used if it was made from the same files (by size and time) with the same settings. Of several
    processes the first one works, and the others wait. New files replace old ones whole, so a run that reads those is
    not hurt. Neither text nor ids have to fit in memory. -> (Corpus on disk, Tokenizer, what else there is to know)
    """
    global tokenizer
    os.makedirs(folder, exist_ok=True)
    ids_path, lengths_path, index_path = (os.path.join(folder, name) for name in ("ids", "lengths", "index"))
    with open(os.path.join(folder, "lock"), "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        stats = [[os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in (src, tgt)]
        made_from = [vocab_size, max_len, max_ratio, stats]
        sizes = lambda: [os.path.getsize(path) for path in (ids_path, lengths_path)]
        try:
            index = read_checkpoint(index_path)
            fresh = index["made_from"] == made_from and index["sizes"] == sizes()
        except (OSError, ValueError, KeyError, TypeError):
            fresh = False
        if not fresh:
            counts, left_out, digest = Counter(), Counter(), hashlib.sha256()
            for part in on_all_cores(count_words, read_pairs(src, tgt)):
                counts.update(part)
                if len(counts) > 3_000_000:             # rare words don't decide a merge, but they fill the memory
                    counts = Counter({word: n for word, n in counts.items() if n > 1})
            tokenizer = Tokenizer.train(Counter(dict(counts.most_common(500_000))), vocab_size)
            digest.update(repr(tokenizer.merges).encode())
            with open(ids_path + ".tmp", "wb") as f, open(lengths_path + ".tmp", "wb") as g:
                for ids, lengths, reasons in on_all_cores(encode_pairs, read_pairs(src, tgt)):
                    left_out.update(reasons)
                    for file, array in ((f, ids), (g, lengths)):
                        file.write(array.tobytes())
                        digest.update(array.tobytes())
            if not os.path.getsize(lengths_path + ".tmp"):
                raise ValueError(f"no pair of {src} and {tgt} is fit for training; left out: {dict(left_out)}")
            for path in (ids_path, lengths_path):
                os.replace(path + ".tmp", path)
            index = {"made_from": made_from, "sizes": sizes(), "left_out": dict(left_out),
                     "merges": tokenizer.merges, "digest": digest.hexdigest()}
            write_atomically(index_path, index)
        corpus = Corpus(np.memmap(ids_path, np.uint32, "r"), np.fromfile(lengths_path, np.uint32).astype(np.int64))
    return corpus, Tokenizer(index["merges"]), index

# ---- §5.1 Batches: sentence pairs "batched together by approximate sequence length" ----

def plan_epoch(corpus, epoch, seed):
    """All batches of an epoch in the order of training: [(rows, S, T), ...]. Every pair is in exactly one.

    The plan follows from its arguments alone: every process makes the same one, and a resumed run makes it again.
    """
    rng = np.random.default_rng((seed, epoch))
    n_src, n_tgt = corpus.n_src + 1, corpus.n_tgt + 1                       # with EOS
    longer = np.maximum(n_src, n_tgt)
    # Sorted by target length into groups of about eight batches, and in each group by source length, up and down in
    # turn: neighbours are alike in both. The noise lets a pair meet other company in every epoch.
    by_target = np.argsort(n_tgt + rng.uniform(-1, 1, len(corpus)))
    group = np.empty(len(corpus), np.int64)
    group[by_target] = np.cumsum(longer[by_target]) // (8 * batch_tokens)
    order = np.lexsort((rng.random(len(corpus)), np.where(group % 2, -n_src, n_src), group))
    batches, at = [], 0
    while at < len(order):
        window = order[at:at + batch_tokens]
        size = np.arange(1, len(window) + 1) * np.maximum.accumulate(longer[window])
        rows = window[:max(1, np.count_nonzero(size <= batch_tokens))]      # as many as fit, padded to the longest
        batches.append((rows, int(n_src[rows].max()), int(n_tgt[rows].max())))
        at += len(rows)
    order = rng.permutation(len(batches))
    if epoch == 0:                                                          # the largest first: too little memory shows
        size = [len(batches[i][0]) * batches[i][1] * batches[i][2] for i in order]
        order = np.roll(order, -int(np.argmax(size)))
    return [batches[i] for i in order]

def micro_batches(corpus, n, start):
    """The endless sequence of lists of n micro-batches, one list a step, from step `start` (counted from 0) on."""
    plans = (batch for epoch in itertools.count() for batch in plan_epoch(corpus, epoch, seed))
    batches = itertools.islice(plans, start * n, None)
    while True:
        yield list(itertools.islice(batches, n))

# ---- §5.3, §5.4 Schedule and loss --------------------------------------------

def peak_rate():
    """The rate at the end of warm-up: in Eq. 3, where the two sides of its min meet, (d_model·warmup_steps)^-0.5."""
    return learning_rate or (d_model * warmup_steps) ** -0.5

def learning_rate_at(step):
    """§5.3, Eq. 3, for steps from 1: a linear rise to the peak, then ∝ 1/√step. Or a straight line down to zero."""
    if step < warmup_steps:
        return peak_rate() * step / warmup_steps
    if decay == "linear":
        return peak_rate() * max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))
    return peak_rate() * (warmup_steps / step) ** 0.5

class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices: every direction in one then learns at the same rate.

    Five Newton–Schulz iterations in bfloat16 take all singular values of the step close to 1 (Jordan et al., 2024). It
    is then scaled to the size of Adam's steps (Liu et al., 2025). torch.optim.Muon computes the same matrix by matrix;
    here all matrices of one shape, or its transpose, go through the products together.
    """

    def __init__(self, matrices, lr=1e-2, momentum=0.95, weight_decay=0.1):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            wide, like = lambda x: x if x.size(0) <= x.size(1) else x.T, {}
            for w in group["params"]:
                mean = self.state[w].setdefault("momentum", torch.zeros_like(w))
                mean.lerp_(w.grad, 1 - group["momentum"])
                like.setdefault(wide(w).shape, []).append((w, wide(w.grad.lerp(mean, group["momentum"]))))
            for shape, pairs in like.items():
                x = torch.stack([step for _, step in pairs]).bfloat16()
                x /= x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
                for (w, _), step in zip(pairs, x):
                    w.mul_(1 - group["lr"] * group["weight_decay"])
                    wide(w).sub_(step, alpha=group["lr"] * 0.2 * max(shape) ** 0.5)

class HashedDropout(nn.Module):
    """Dropout for compiled training on a CPU, where drawing random numbers one after the other takes long. The random
    bits are a hash of a number's place and of one seed a call: integer arithmetic inside the loop that uses them."""

    def __init__(self, p):
        super().__init__()
        # Of 65536. An integer is a constant to torch.compile, but a float is an input: from its cache, a program made
        # for one p would be taken for another.
        self.kept = max(1, round((1 - p) * 65536))
        self.seed = torch.zeros((), dtype=torch.int32)                  # Loss fills it anew for each batch

    def forward(self, x):
        if not self.training or self.kept == 65536:
            return x
        h = torch.arange(x.numel(), dtype=torch.int32).view(x.shape) * -1640531535 ^ self.seed
        h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D                       # two rounds of a multiply-xorshift hash
        h = (h ^ (h >> 15 & 0x1FFFF)) * -2073254261
        return torch.where((h >> 16 & 0xFFFF) < self.kept, x * (65536 / self.kept), 0.0)

class Loss(nn.Module):
    """Cross-entropy against a softened target: 1 - ε on the true token, and ε spread evenly over all V. §5.4

    One module around the model, for DistributedDataParallel: the logits and the loss are one compiled part.
    """

    def __init__(self, model, label_smoothing):
        super().__init__()
        self.model, self.label_smoothing, self.seeds = model, label_smoothing, []

    def forward(self, src, tgt):
        """(B, S), (B, T + 1) -> (loss to train on, negative log-likelihood to report): sums over the target tokens."""
        for seed in self.seeds if self.training else []:
            seed.random_()
        tgt_in, tgt_out = tgt[:, :-1], tgt[:, 1:].flatten()             # each position predicts the next one
        states = self.model.decode(tgt_in, self.model.encode(src), src).flatten(0, 1)
        if not states.is_cuda:      # padding needs no logits; but to count it on a GPU would be to wait for it
            real = (tgt_out != PAD).nonzero().flatten()
            states, tgt_out = states.index_select(0, real), tgt_out[real]
        return self.score(states, tgt_out)

    def score(self, states, tgt_out):
        """(n, D), (n,) -> the two sums. With x the logits, -log p of word y is logsumexp(x) - x_y."""
        x = self.model.output(states).float()                           # (n, V): most of a small model's memory
        true = torch.arange(x.size(1), device=x.device) == tgt_out[:, None]
        total = x.logsumexp(-1)
        nll = total - torch.where(true, x, 0.0).sum(-1)                 # a gather's gradient would be a slow scatter
        smoothed = (1 - self.label_smoothing) * nll + self.label_smoothing * (total - x.mean(-1))
        real = tgt_out != PAD
        return (smoothed * real).sum(), (nll * real).sum()

    def compile_parts(self):
        """Compiles one layer of each kind for all of them, and what stands before and after: a fifth of the code that
        the whole model would be. Sizes are symbols, so that one compilation serves the batches of every shape."""
        if next(self.model.parameters()).device.type == "cpu":
            for part in list(self.model.modules()):
                for name, child in part.named_children():
                    if type(child) is nn.Dropout:
                        setattr(part, name, HashedDropout(child.p))
                        self.seeds.append(getattr(part, name).seed)
            # Masks and ReLUs are cheaper computed again in the backward pass than stored bit by bit. But what is drawn
            # must not be drawn again, so dropout's seeds come from outside the graph.
            from torch._functorch import config as functorch
            functorch.aggressive_recomputation = True
        torch._dynamo.config.specialize_float = True                    # or one cached with another dropout is taken
        torch._dynamo.config.optimize_ddp = False                       # DDP would cut each of the parts at its buckets
        for layer in (*self.model.encoder, *self.model.decoder):
            layer.compile(dynamic=True)
        self.model.embed = torch.compile(self.model.embed, dynamic=True)
        self.score = torch.compile(self.score, dynamic=True)

# ---- What a run says of itself -----------------------------------------------

def flops(c, n_src, n_tgt, S, T):
    """FLOPs of forward and backward for that many real tokens in sentences of mean length S and T."""
    attention, ffn = 4 * c.d_model ** 2, 2 * c.d_model * c.d_ff
    per_src = (6 * (c.n_encoder_layers * (attention + ffn) + c.n_decoder_layers * attention / 2)
               + 12 * c.n_encoder_layers * S * c.d_model)
    per_tgt = (6 * (c.n_decoder_layers * (1.5 * attention + ffn) + c.d_model * c.vocab_size)
               + c.n_decoder_layers * (6 * T + 12 * S) * c.d_model)
    return n_src * per_src + n_tgt * per_tgt

def matmul_rate(device, dtype, seconds=0.2):
    """FLOP/s of square matrix products on this device, measured: the ceiling of any step."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    (a @ b)[0, 0].item()                                # to read a number is to wait for the device
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        (a @ b)[0, 0].item()
        count += 1
    return 2 * n ** 3 * count / (time.perf_counter() - start)

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
    """Corpus BLEU in percent, one reference a line: case-sensitive, 4-grams, exponential smoothing of zero counts. §6.1
    (Papineni et al., 2002), as sacreBLEU computes it by default."""
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
        halved = halved if m else 2 * halved
        log_precision += math.log(100 * m / t if m else 100 / (halved * t)) / 4
    return min(1.0, math.exp(1 - n_ref / n_hyp)) * math.exp(log_precision)

# ---- The run. What several functions share is in one object, `run`, which they take as their argument ----

def gathered(value, run):
    """[what rank 0 has, what rank 1 has, ...], on every rank."""
    values = [value] * run.world
    if run.world > 1:
        dist.all_gather_object(values, value)
    return values

signals = []

def on_signal(number, frame):
    """The first SIGTERM or Ctrl-C is noted, for a run to end where nothing is lost; a second one ends it at once.
    Within a second it is the same one: torchrun passes on what the terminal has sent already."""
    signals.append((number, time.time()))
    if time.time() - signals[0][1] > 1:
        os._exit(128 + number)

def leave_if_told(run):
    """Ends the run if one of its processes has heard a signal: they agree, and all end at the same place."""
    heard = signals[0][0] if signals else 0
    if run.world > 1:
        flag = torch.tensor(heard, device=run.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        heard = int(flag)
    if heard:
        if run.training:                                # otherwise that has been done already
            save_checkpoint(run, on_time=False)
        run.say(f"{signal.Signals(heard).name} after step {run.step:,}: saved {run.last}; "
                "go on with the same command and --resume=True")
        sys.exit(128 + heard)

def my_share(parts, run):
    """This rank's parts of a list. Between any two of them a run that was told to end does so."""
    for i in range(0, len(parts), run.world):
        leave_if_told(run)
        yield from parts[i + run.rank:i + run.rank + 1]

@torch.no_grad()
def validation_nll(run):
    """Mean negative log-likelihood of a target id of the validation set, computed by all ranks together."""
    total, n = 0.0, 0
    for rows, S, T in my_share(plan_epoch(run.val, 0, 0), run):
        with run.autocast():
            total += Loss(run.plain, 0.0)(*(ids.to(run.device) for ids in run.val.batch(rows, S, T)))[1].item()
        n += run.val.n_ids(rows)[1]
    total, n = map(sum, zip(*gathered((total, n), run)))
    return total / n

def translations(lines, run, **options):
    """Translations of the lines, by all ranks together, a hundred of like length at a time."""
    fast = for_inference(run.plain, run.amp if run.amp != "float16" else "float32")
    order, found = sorted(range(len(lines)), key=lambda i: -len(lines[i])), {}          # number -> translation
    for part in my_share([order[i:i + 100] for i in range(0, len(order), 100)], run):
        results = translate(fast, run.tokenizer, [lines[i] for i in part], **options)
        found |= {i: best[0][0] for i, best in zip(part, results)}
    found = {i: text for part in gathered(found, run) for i, text in part.items()}
    return [found[i] for i in range(len(lines))]

def record(run, **values):
    """One line of log.jsonl."""
    if run.rank == 0:
        run.log.write(json.dumps(dict(step=run.step, **values, seconds=round(time.time() - run.start_time, 2))) + "\n")
        run.log.flush()

def save_model(run, alpha=0.6):
    """Writes model.pt: what the model is now, and the length penalty its translations are to have."""
    if run.rank == 0:
        save(run.model_path, run.plain, run.tokenizer, length_penalty if length_penalty >= 0 else alpha)

def validate(run):
    """Scores the model, and writes model.pt if it is the best so far."""
    nll, samples = validation_nll(run), ""
    values = dict(val_nll=nll, val_perplexity=math.exp(min(nll, 50)))
    if run.val_text:                                    # greedy, and not all of a long file: to watch, not to report
        sources, truths = ([pair[side] for pair in run.val_text[:500]] for side in (0, 1))
        out = translations(sources, run, beam_size=1)
        values["val_bleu"] = bleu(out, truths, run.words)
        samples = f"  (greedy, {len(out)} lines)"
        for i in {0, len(out) // 2}:
            samples += f"\n    source  {sources[i]}\n    model   {out[i]}\n    truth   {truths[i]}"
    record(run, **values)
    scores = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
    run.say(f"step {run.step:6d}  {scores}{samples}", flush=True)
    run.n_worse, run.validated = run.n_worse + 1, run.step
    if nll < run.best_nll:
        run.best_nll, run.n_worse = nll, 0
        save_model(run)

PROGRESS = "step validated saved best_nll n_worse n_skipped recent compiled made_with".split()   # of a run, in last.pt

def save_checkpoint(run, on_time=True):
    """last.pt: everything it takes to go on as if nothing had happened. All ranks call it, rank 0 writes."""
    if on_time:         # not for a signal: a run that goes on from there still saves, and averages, at its own steps
        run.saved = run.step
        if average_last > 1 and run.rank == 0:
            weights = {name: w.detach().cpu().clone() for name, w in run.plain.named_parameters()}
            run.recent = (run.recent + [weights])[-average_last:]
    cuda_rng = torch.cuda.get_rng_state() if run.cuda else None
    ranks = gathered((torch.get_rng_state(), cuda_rng, run.totals.cpu()), run)
    if run.rank == 0:
        write_atomically(run.last, {
            **{name: getattr(run, name) for name in PROGRESS}, "ranks": ranks, "settings": now(),
            "model": run.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "scaler": run.scaler.state_dict()})

def start(run):
    """This process's place among the others, its device, and out_dir, which no two runs may share."""
    env = lambda name, other=0: int(os.environ.get(name, other))        # set by torchrun
    run.world, run.rank, run.restarts = env("WORLD_SIZE", 1), env("RANK"), env("TORCHELASTIC_RESTART_COUNT")
    run.say = print if run.rank == 0 else lambda *args, **options: None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))         # until there is something to save
    check_settings()
    run.config = Config(vocab_size, d_model, n_heads, d_ff, n_encoder_layers, n_decoder_layers, dropout, norm_first)
    run.device = find_device(device, env("LOCAL_RANK"))
    run.cuda = run.device.type == "cuda"
    if run.cuda:
        torch.cuda.set_device(run.device)
        torch.backends.cuda.enable_cudnn_sdp(False)     # its backward with a mask can give NaN on Hopper
    elif run.world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // env("LOCAL_WORLD_SIZE", 1)))
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    run.last, log, run.model_path = (os.path.join(out_dir, name) for name in ("last.pt", "log.jsonl", "model.pt"))
    if resume and not os.path.exists(run.last):
        fail(f"--resume=True, but there is no {run.last}; start without it")
    os.makedirs(out_dir, exist_ok=True)
    if run.rank == 0:
        run.log = open(log, "a", encoding="utf-8")
        try:
            if fcntl:
                fcntl.flock(run.log, fcntl.LOCK_EX | fcntl.LOCK_NB)     # held until this process ends, however it ends
        except BlockingIOError:
            fail(f"another run is writing to {out_dir}; give this one its own --out_dir")

def read_data(run):
    """The training pairs, the validation pairs, and what a resumed run has to find as it was."""
    run.val, run.val_text, run.tokenizer, index = None, None, None, {}
    if src:
        run.val_text = list(read_pairs(val_src, val_tgt)) if val_src else None          # first: mistakes show at once
        run.say(f"preparing {src} and {tgt} ...", flush=True)
        run.corpus, run.tokenizer, index = prepare(os.path.join(out_dir, "data"))
        if val_src:
            run.val = Corpus.of([[run.tokenizer.encode(line)[:max_len - 1] for line in pair] for pair in run.val_text])
    else:
        pairs = copy_task(20_000, seed)
        run.corpus, run.val = Corpus.of(pairs), Corpus.of(copy_task(1_000, seed + 1, without=pairs))
    run.words = str.split if bleu_tokenize == "none" else tokenize_13a
    run.left_out = ", ".join(f"{n} {reason}" for reason, n in index.get("left_out", {}).items()) or "none"
    run.made_with = {"the digest of the text": index.get("digest"), "processes": run.world, "Muon": muon > 0,
                     **{f"--{name}": globals()[name] for name in FIXED}}

def join_the_others(run):
    """The processes find each other in a store that torchrun keeps over restarts, with what the dead left in it."""
    timeout = timedelta(seconds=group_timeout)
    store, _, _ = next(dist.rendezvous("env://", run.rank, run.world, timeout=timeout))
    dist.init_process_group("nccl" if run.cuda else "gloo", store=dist.PrefixStore(str(run.restarts), store),
                            rank=run.rank, world_size=run.world, timeout=timeout)

def build(run):
    """The model, its optimizers, and in what numbers they compute."""
    torch.manual_seed(seed)
    run.model = Transformer(run.config).to(run.device)
    torch.manual_seed(seed + run.rank)                  # the same weights on every rank, but other dropout
    with torch.device("meta"):                          # the same weights in a model that stays as it is, not compiled
        run.plain = Transformer(run.config).eval()
    run.plain.load_state_dict(run.model.state_dict(), assign=True)
    run.plain.output.weight = run.plain.embedding.weight
    layers = nn.ModuleList((*run.model.encoder, *run.model.decoder))
    matrices = [w for w in layers.parameters() if w.dim() == 2 and muon]
    embedding = run.model.embedding.weight
    others = [w for w in run.model.parameters() if not any(w is other for other in (*matrices, embedding))]
    groups = [dict(params=[embedding], weight_decay=embedding_decay), dict(params=others, weight_decay=0.0)]
    run.optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9, fused=run.device.type in ("cpu", "cuda"))]
    if muon:
        run.optimizers.append(Muon(matrices))
    # Narrow matrices don't win back the casts to bfloat16; a GPU without it has float16, which needs its loss scaled.
    fast = has_bfloat16(run.device) and (run.cuda or d_model >= 128)
    run.amp = dtype if dtype != "auto" else "bfloat16" if fast else "float16" if run.cuda else "float32"
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp == "float16")
    run.autocast = lambda: torch.autocast(run.device.type, getattr(torch, run.amp), enabled=run.amp != "float32")
    # Loss, nll, target ids and bad gradients since the last progress line. To read them is to wait for the device.
    run.totals = torch.zeros(4, dtype=torch.float32 if run.device.type == "mps" else torch.float64, device=run.device)

def resumed(run):
    """Puts the run where out_dir/last.pt left it, if it is to go on from there.
    -> this rank's random states, for training to go on with, or None"""
    mine = None
    if gathered(resume or run.restarts > 0 and os.path.exists(run.last), run)[0]:       # the latter: --max-restarts
        state = read_checkpoint(run.last)
        try:
            for name, value in run.made_with.items():
                if state["made_with"][name] != value:
                    fail(f"{run.last} was made with {name}={state['made_with'][name]}, got {value}; "
                         "change it back, or start without --resume=True")
            run.model.load_state_dict(state["model"])
            for optimizer, values in zip(run.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            if run.scaler.is_enabled() and state["scaler"]:
                run.scaler.load_state_dict(state["scaler"])
            vars(run).update({name: state[name] for name in PROGRESS if name != "recent" or run.rank == 0})
            *mine, totals = state["ranks"][run.rank]
            run.totals.copy_(totals)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = f"{type(error).__name__}, {str(error).splitlines()[0]}"
            fail(f"{run.last} is not a checkpoint that this train.py can resume from: {what}")
    elif run.rank == 0 and not run.restarts:            # a new run where an old one was: keep that
        for path in filter(os.path.exists, (run.last, run.model_path)):
            os.replace(path, path + ".old")
            run.say(f"an earlier run's {path} is now {path}.old")
    if run.rank == 0:                   # the log's lines on steps to come go, in one cut: no kill loses other lines
        with open(run.log.name, "rb") as f:
            known = lambda line: run.step and line.endswith(b"}\n") and json.loads(line)["step"] <= run.step
            run.log.truncate(sum(map(len, itertools.takewhile(known, f))))
    return mine

def compile_if_worth_it(run):
    """The loss, compiled if asked for, or if the run is long enough; a resumed run does as it did before."""
    run.loss_fn = Loss(run.model, label_smoothing)
    compiled = compile == "True" or compile == "auto" and (run.compiled if run.step else run.estimate > 120)
    if compiled and not run.cuda and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        run.say("no C++ compiler found: running without torch.compile")
        compiled = False
    run.compiled = gathered(compiled, run)[0]
    if run.compiled:
        run.loss_fn.compile_parts()

def banner(run):
    """Says what is about to run, and how long it will take."""
    changed = " ".join(f"{name}={value}" for name, value in now().items() if value != settings[name])
    where = torch.cuda.get_device_name(run.device) if run.cuda else f"{run.device}, {torch.get_num_threads()} threads"
    run.say(f"settings  {changed or 'the defaults: learning to copy'}")
    if src:
        mine = " ".join(name for name in recipe()[1] if name not in given)
        run.say(f"recipe    for {recipe()[0]:.1f} MB of text, from its size: {mine or 'nothing, all is given'}")
    run.say(f"machine   {run.world} x {where}, torch {torch.__version__}, {run.amp}, "
            f"{'' if run.compiled else 'not '}compiled, {run.peak / 1e12:.3g} TFLOP/s in matrix products\n"
            f"model     {sum(p.numel() for p in run.model.parameters()):,} parameters\n"
            f"data      {len(run.corpus):,} pairs, {run.real[0]:,} + {run.real[1]:,} ids, {run.padding:.1%} padding; "
            f"left out: {run.left_out}\n"
            f"run       {max_steps:,} steps of about {sum(run.real) / run.steps_per_epoch:,.0f} ids, "
            f"{run.steps_per_epoch:.1f} steps an epoch, {run.flops:.2g} FLOPs, {clock(run.estimate)}"
            f"{' and compilation' * run.compiled}"
            + f"\nresumed   from {run.last}, after step {run.step:,}" * (run.step > 0), flush=True)

def finish(run):
    """Chooses what model.pt is to be, and shows what it can do."""
    n = gathered(len(run.recent), run)[0]
    if n > 1:                                           # §6.1
        for name, weight in run.plain.named_parameters():
            if run.rank == 0:
                weight.data.copy_(torch.stack([weights[name] for weights in run.recent]).mean(0))
            if run.world > 1:
                dist.broadcast(weight.data, 0)
    nll = validation_nll(run) if run.val else -math.inf
    if n > 1 and run.val:
        run.say(f"mean of the last {n} checkpoints: validation nll {nll:.4f}, best {run.best_nll:.4f}")
    if nll <= run.best_nll:
        save_model(run)
    gathered(None, run)                                 # model.pt is there now
    run.plain, _ = load(run.model_path, run.device)
    if run.val_text:
        sources, truths = zip(*run.val_text)
        scores = {alpha: bleu(translations(sources, run, beam_size=beam_size, length_penalty=alpha), truths, run.words)
                  for alpha in ([0.6, 1.0, 1.4] if length_penalty < 0 else [length_penalty])}
        alpha = max(scores, key=scores.get)
        save_model(run, alpha)                          # its translations have this penalty from now on
        run.say(f"validation BLEU {scores[alpha]:.2f}, all {len(truths):,} lines (tokenizer {bleu_tokenize}, "
                f"beam {beam_size}, length penalty {alpha})")
        record(run, bleu=scores[alpha])
    elif not src:
        pairs, words = [], lambda row: row[:row.index(EOS)]
        for rows, S, T in my_share(plan_epoch(run.val, 0, 0), run):
            x, y = (ids.to(run.device) for ids in run.val.batch(rows, S, T))
            out, _ = beam_search(run.plain, x, beam_size=1, max_len=T + 5)
            pairs += [(words(a), words(b)) for a, b in zip(y[:, 1:].tolist(), out.tolist())]
        pairs = sum(gathered(pairs, run), [])
        accuracy = sum(a == b for a, b in pairs) / len(pairs)
        run.say(f"exact-sequence accuracy on {len(pairs):,} unseen sequences: {accuracy:.1%}, as in"
                f"\n  in  {' '.join(map(str, pairs[0][0]))}\n  out {' '.join(map(str, pairs[0][1]))}")
        record(run, accuracy=accuracy)
    run.say(f"{clock(time.time() - run.start_time)} in all; the model is {run.model_path}"
            + (f"\nuse it:  python transformer.py --checkpoint={run.model_path} < in.txt > out.txt" if src else ""))

def main():
    run = SimpleNamespace(start_time=time.time(), step=0, validated=0, saved=0, best_nll=math.inf, n_worse=0,
                          n_skipped=0, recent=[], training=True)
    start(run)
    read_data(run)
    plan = plan_epoch(run.corpus, 0, seed)
    run.steps_per_epoch = len(plan) / (run.world * accumulate)
    globals()["max_steps"] = max_steps or max(1, round(epochs * run.steps_per_epoch))
    if run.world > 1:
        join_the_others(run)
    run.config = replace(run.config, vocab_size=len(run.tokenizer) if src else vocab_size)
    build(run)
    random_states = resumed(run)

    # ---- what it will cost, and so whether to compile ------------------------------
    run.real = run.corpus.n_ids(np.arange(len(run.corpus)))
    run.padding = 1 - sum(run.real) / sum(len(rows) * (S + T) for rows, S, T in plan)
    id_flops = flops(run.config, *run.real, *(n / len(run.corpus) for n in run.real)) / sum(run.real)
    run.flops = id_flops * sum(run.real) / run.steps_per_epoch * max_steps
    run.peak = matmul_rate(run.device, getattr(torch, run.amp)) * run.world
    run.estimate = run.flops / (0.35 * run.peak)
    compile_if_worth_it(run)
    step_fn = run.loss_fn
    if run.world > 1:
        step_fn = nn.parallel.DistributedDataParallel(run.loss_fn, device_ids=[run.device.index] if run.cuda else None)
    everyone = gathered([now(), run.made_with, run.step, torch.__version__], run)
    for r in range(run.world):
        if everyone[r] != everyone[0]:
            fail(f"rank {r} has other settings, text or torch than rank 0: {everyone[r]} there, {everyone[0]} here")
    banner(run)

    # ---- training ------------------------------------------------------------------
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    run.loss_fn.train()
    if random_states:                                   # only now, for nothing above to draw from them
        torch.set_rng_state(random_states[0])
        if run.cuda and random_states[1] is not None:
            torch.cuda.set_rng_state(random_states[1])
    due = lambda interval: run.step % interval == 0 or run.step == max_steps
    steps = micro_batches(run.corpus, run.world * accumulate, run.step)
    tick, n_ids = time.time(), 0
    while True:
        # Once in a while: is it better, is it saved, is it over?
        if run.val and due(eval_interval) and run.validated < run.step:
            validate(run)
        if due(checkpoint_interval) and run.saved < run.step:
            save_checkpoint(run)
        if run.world == 1 or not run.cuda or due(log_interval):
            leave_if_told(run)
        if run.step >= max_steps or patience and run.n_worse >= patience:
            break

        # ---- the step ----------------------------------------------------------
        run.step += 1
        rate = learning_rate_at(run.step)
        for optimizer, scale in zip(run.optimizers, (1.0, muon / peak_rate())):     # one schedule for both
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        # Every process knows the whole plan, and so how many target ids the step has on all of them together.
        micro = next(steps)
        n_tgt = sum(run.corpus.n_ids(rows)[1] for rows, _, _ in micro)
        for i in range(accumulate):
            batch = run.corpus.batch(*micro[i * run.world + run.rank])
            if run.cuda:                # a copy from ordinary memory would wait until the GPU has nothing left to do
                batch = [ids.pin_memory() for ids in batch]
            x, y = (ids.to(run.device, non_blocking=run.cuda) for ids in batch)
            if run.world > 1:
                step_fn.require_backward_grad_sync = i == accumulate - 1            # one all-reduce a step
            with run.autocast():
                loss, nll = step_fn(x, y)
            run.scaler.scale(loss * (run.world / n_tgt)).backward()                 # DDP averages over ranks: undo that
            run.totals[:3] += torch.stack((loss.detach(), nll.detach(), (y[:, 1:] != PAD).sum()))
        for optimizer in run.optimizers:
            run.scaler.unscale_(optimizer)                                          # or clipping would clip the scale
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), grad_clip or math.inf)
        # A gradient that is not finite must not reach the weights. To look would be to wait for a GPU: there it becomes
        # zero, and the next progress line or checkpoint, which looks, ends the run.
        bad = ~norm.isfinite()
        run.totals[3] += bad
        look = not run.cuda or run.scaler.is_enabled() or due(log_interval) or due(checkpoint_interval)
        skip = look and bool(run.totals[3])
        if skip and not run.scaler.is_enabled():
            sentences = sorted(int(r) for rows, _, _ in micro for r in rows)[:20]
            fail(f"the gradient is {norm.item()} at step {run.step:,}{' or shortly before' * run.cuda}, in sentences "
                 f"{sentences}...; {run.last} is from before; lower --learning_rate?")
        for w in run.model.parameters() if not look else []:
            w.grad = torch.where(bad, 0.0, w.grad)
        for optimizer in run.optimizers if not skip else []:
            run.scaler.step(optimizer)
        run.scaler.update()                                                         # after a skipped step, scale less
        run.model.zero_grad(set_to_none=True)
        # ---- end of the step ---------------------------------------------------

        if skip:
            run.n_skipped += 1
            run.totals[3] = 0
        n_ids += sum(sum(run.corpus.n_ids(rows)) for rows, _, _ in micro)
        if due(log_interval):
            seconds = time.time() - tick
            if run.world > 1:
                dist.all_reduce(run.totals)
            loss, nll = (run.totals[:2] / run.totals[2]).tolist()
            values = dict(loss=loss, nll=nll, perplexity=math.exp(min(nll, 50)), learning_rate=rate,
                          grad_norm=norm.item(), skipped=run.n_skipped, tokens_per_second=n_ids / seconds,
                          mfu=n_ids / seconds * id_flops / run.peak)
            record(run, **values)
            line = ("step {:6d}  loss {loss:.4f}  nll {nll:.4f}  ppl {perplexity:8.2f}  lr {learning_rate:.2e}  "
                    "norm {grad_norm:.2f}  {tokens_per_second:,.0f} ids/s  mfu {mfu:.0%}  left {}")
            run.say(line.format(run.step, clock((max_steps - run.step) * seconds / log_interval), **values), flush=True)
            run.totals.zero_()
            tick, n_ids = time.time(), 0

    # ---- the end -------------------------------------------------------------------
    if patience and run.n_worse >= patience:
        run.say(f"step {run.step:6d}  {patience} validations without a better one: enough")
    if run.saved < run.step:
        save_checkpoint(run)                            # before the model becomes a mean
    run.training = False
    finish(run)
    if run.world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    given = override(settings, sys.argv[1:], __file__)
    globals().update(given)
    sys.stdout.reconfigure(errors="replace")            # "?" is what the terminal or the log can't show
    if src:
        globals().update({name: value for name, value in recipe()[1].items() if name not in given})
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        fail(f"{error}; what was saved before is intact" if isinstance(error, OSError) else str(error))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            fail(f"out of memory: lower --batch_tokens={batch_tokens} and raise --accumulate={accumulate} to make up")
        # The other processes are gone, or can't be reached any more.
        if "RANK" not in os.environ or not re.search("gloo|NCCL|onnection|imed out|ocket|store", str(error)):
            raise
        fail(f"rank {os.environ['RANK']} lost the other processes ({str(error).splitlines()[0][:200]}); "
             f"start all of them again with --resume=True")
