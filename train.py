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
# The defaults train the copy task. With --src, those of `text_recipe` below take their place.
src = ""                    # source side of the training text, one sentence a line, plain or .gz; "": the copy task
tgt = ""                    # target side: line i is the translation of line i of src
val_src = ""                # validation text, likewise; "": none
val_tgt = ""                # and its target side
out_dir = "out"             # everything this run writes goes here
# text
vocab_size = 11             # ids, both languages together; on text: 3 specials, 256 bytes, and merges
max_len = 256               # ids; longer sentences are left out of training, and counted
max_ratio = 5.0             # a pair is left out if one side is more than this many times the other, plus 5 ids
bleu_tokenize = "13a"       # how BLEU splits words: 13a, sacreBLEU's default, or none for text that is split already
# model: as in transformer.Config
d_model = 64                # width
d_ff = 128                  # inner width of the feed-forward networks
n_heads = 4                 # attention heads
n_encoder_layers = 2        # layers that read the source
n_decoder_layers = 2        # layers that write the target
dropout = 0.1               # probability
norm_first = False          # False: the paper's post-norm; True: pre-norm
# optimisation
batch_tokens = 2048         # source ids, and target ids, of a micro-batch, padding included
accumulate = 1              # micro-batches whose gradients make one step, on each process
max_steps = 600             # optimizer steps; 0: as many as `epochs` needs
epochs = 0.0                # passes over the training pairs, if max_steps is 0
learning_rate = 0.0         # at the end of warm-up; 0: the paper's (d_model * warmup_steps)^-0.5
warmup_steps = 200          # steps of linear rise
decay = "inverse_sqrt"      # after warm-up: inverse_sqrt (§5.3), or linear, down to 0 at max_steps
label_smoothing = 0.1       # §5.4
grad_clip = 1.0             # the gradient's largest norm; 0: any
average_last = 1            # model.pt is the mean of this many checkpoints, the last ones (§6.1 uses 5)
# evaluation
eval_interval = 200         # steps between validations
checkpoint_interval = 200   # steps between checkpoints
log_interval = 50           # steps between progress lines
beam_size = 4               # hypotheses for each sentence in the final BLEU (§6.1)
length_penalty = 0.6        # its alpha
# the machine
seed = 1                    # of weights, batches and dropout
device = "auto"             # cpu, cuda, cuda:1, mps; auto: cuda where there is one
dtype = "auto"              # bfloat16, float16 or float32 for matrix products; auto: the fastest that is safe
compile = "auto"            # True, False; auto: where the run is long enough to win back the minute it takes
resume = False              # continue from out_dir/last.pt
# ---- end of settings --------------------------------------------------------

text_recipe = dict(vocab_size=8000, d_model=256, d_ff=1024, n_heads=4, n_encoder_layers=3, n_decoder_layers=3, norm_first=True,
                   batch_tokens=4096, max_steps=0, epochs=10.0, learning_rate=1e-3, warmup_steps=400, decay="linear",
                   eval_interval=500, checkpoint_interval=500)

import difflib
import os
import re
import sys
import time


def override(settings, argv, path):
    """Settings with those of argv (--name=value) in place. Each keeps the type of its default. -> the new values only

    A user's mistake costs one line and exit status 2. Values are never evaluated as code.
    """
    def fail(message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    given = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            text = open(path, encoding="utf-8").read()
            print(text.split('"""')[1].strip() + "\n\n" + text.split("# ---- settings")[1].split("\n", 1)[1].split("# ---- end")[0].rstrip())
            sys.exit(0)
        name, equals, value = arg.removeprefix("--").partition("=")     # the first "=" only: a value may hold more
        if not arg.startswith("--") or name not in settings:
            near = difflib.get_close_matches(name, settings, 1)
            fail(f"unknown setting {arg!r}" + (f", did you mean --{near[0]}?" if near else "; --help lists them all"))
        kind = type(settings[name])
        if not equals:
            fail(f"--{name} needs a value: --{name}={settings[name]}")
        try:
            given[name] = {"True": True, "False": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            what = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
            fail(f"--{name} must be {what}, got {value!r}")
    return given


settings = {name: value for name, value in globals().items() if not name.startswith("_") and type(value) in (bool, int, float, str)}
if __name__ == "__main__":                                              # before torch is imported: a typo costs no waiting
    given = override(settings, sys.argv[1:], __file__)
    globals().update(given)

import gzip
import json
import math
import shutil
from collections import Counter, deque
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from transformer import BOS, EOS, PAD, Config, Tokenizer, Transformer, beam_search, fail, has_bfloat16, load, save, translate, write_atomically


# -----------------------------------------------------------------------------
# §5.1 Training data

class Corpus:
    """Pairs of id sequences, flat: sentence i of a side is ids[start[i]:start[i + 1]]. Arrays in memory or on disk."""

    def __init__(self, src_ids, src_start, tgt_ids, tgt_start):
        self.src, self.tgt = (src_ids, src_start), (tgt_ids, tgt_start)
        self.n_src, self.n_tgt = np.diff(src_start), np.diff(tgt_start)     # lengths

    @classmethod
    def of(cls, src_rows, tgt_rows):
        flat = lambda rows: (np.array([i for row in rows for i in row], np.int64), np.cumsum([0] + [len(row) for row in rows]))
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
    """(source line, target line), to the end of both files. Raises ValueError if one is longer, empty or unreadable."""
    a, b, n = read_lines(src), read_lines(tgt), 0
    try:
        while True:
            x, y = next(a, None), next(b, None)
            if x is None or y is None:
                break
            n += 1
            yield x, y
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise ValueError(f"cannot read {src} and {tgt}: {error}") from None
    if (x is None) != (y is None):
        extra = sum(1 for _ in (b if x is None else a)) + 1
        raise ValueError(f"{src} and {tgt} must have as many lines, got {n + extra * (y is None)} and {n + extra * (x is None)}")
    if not n:
        raise ValueError(f"{src} is empty, expected one sentence a line")


def prepare(folder):
    """Learns the tokenizer and writes the ids of the training text below folder, unless they are there already.

    What is there is used if it was made from the same files (by size and time) with the same settings. Neither the text
    nor the ids have to fit in memory. -> (Corpus on disk, Tokenizer, counts of the pairs left out)
    """
    made_from = {"vocab_size": vocab_size, "max_len": max_len, "max_ratio": max_ratio,
                 "files": [[os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in (src, tgt)]}
    index = os.path.join(folder, "index.json")
    try:
        found = json.load(open(index, encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    kind = np.uint16 if vocab_size <= 1 << 16 else np.uint32            # ids above 65,535 don't fit two bytes
    names = [os.path.join(folder, name) for name in ("src.ids", "src.start", "tgt.ids", "tgt.start")]
    if found.get("made_from") != made_from:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(index):
            os.remove(index)
        counts = Counter()
        for pair in read_pairs(src, tgt):
            for line in pair:
                counts.update(Tokenizer.words(line[:100 * max_len]))
        tokenizer = Tokenizer.from_word_counts(counts, vocab_size)
        skipped = Counter(empty=0, too_long=0, ratio=0)
        files, at = [open(name, "wb") for name in names], [0, 0]
        for f in files[1::2]:
            f.write(np.zeros(1, np.int64).tobytes())
        for x, y in read_pairs(src, tgt):
            if not x.strip() or not y.strip():
                skipped["empty"] += 1
                continue
            if max(len(x), len(y)) > 100 * max_len:
                skipped["too_long"] += 1
                continue
            x, y = tokenizer.encode(x), tokenizer.encode(y)
            if max(len(x), len(y)) >= max_len:
                skipped["too_long"] += 1
            elif max(len(x), len(y)) > max_ratio * min(len(x), len(y)) + 5:
                skipped["ratio"] += 1
            else:
                for side, ids in enumerate((x, y)):
                    at[side] += len(ids)
                    files[2 * side].write(np.array(ids, kind).tobytes())
                    files[2 * side + 1].write(np.array([at[side]], np.int64).tobytes())
        for f in files:
            f.close()
        if not at[0]:
            raise ValueError(f"no pair of {src} and {tgt} is fit for training: {dict(skipped)}")
        found = {"made_from": made_from, "skipped": skipped, "merges": tokenizer.merges}
        write_atomically(index, lambda f: f.write(json.dumps(found).encode()))
    arrays = [np.memmap(name, kind if name.endswith("ids") else np.int64, "r") for name in names]
    return Corpus(arrays[0], np.array(arrays[1]), arrays[2], np.array(arrays[3])), Tokenizer(found["merges"]), found["skipped"]


# -----------------------------------------------------------------------------
# §5.1 Batches: sentence pairs "batched together by approximate sequence length"

def widths(lengths, n=8):
    """The n widths that waste least padding when every length is rounded up to one of them. Dynamic programme: O(n·max²)."""
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
    return [batches[i] for i in rng.permutation(len(batches))]


class Batches:
    """The endless sequence of micro-batches, epoch after epoch. batches[i] is (rows, S, T, epoch) for any i."""

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
                return (*self.plans[epoch][i - self.starts[epoch]], epoch)


# -----------------------------------------------------------------------------
# §5.3, §5.4 Schedule and loss

def learning_rate_at(step):
    """§5.3, Eq. 3, for steps from 1: a linear rise to the peak, then ∝ 1/√step. Or a straight line down to zero."""
    peak = learning_rate or (d_model * warmup_steps) ** -0.5                # 0: exactly d_model^-0.5 · min(...) of Eq. 3
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay == "linear":
        return peak * max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))
    return peak * (warmup_steps / step) ** 0.5


class Loss(nn.Module):
    """Summed cross-entropy with label smoothing (§5.4): the true token's share is 1 - ε, and ε is spread over all V."""

    def __init__(self, model, label_smoothing):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, src, tgt):
        """(B, S), (B, T + 1) -> (smoothed loss to train on, negative log-likelihood to report), sums over target tokens."""
        tgt_in, tgt_out = tgt[:, :-1], tgt[:, 1:]
        logits = self.model(src, tgt_in).flatten(0, 1).float()
        target = tgt_out.flatten()
        smoothed = F.cross_entropy(logits, target, ignore_index=PAD, reduction="sum", label_smoothing=self.label_smoothing)
        with torch.no_grad():
            nll = F.cross_entropy(logits, target, ignore_index=PAD, reduction="sum")
        return smoothed, nll


def flops(c, n_src, n_tgt, S, T):
    """FLOPs of forward and backward for that many real tokens in sentences of mean length S and T."""
    attention, ffn = 4 * c.d_model ** 2, 2 * c.d_model * c.d_ff
    per_src = 6 * (c.n_encoder_layers * (attention + ffn) + c.n_decoder_layers * attention / 2) + 12 * c.n_encoder_layers * S * c.d_model
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
        bar = "".join("█" if m is not None and abs(m - level) <= (high - low) / height / 2 + 1e-12 else " " for m in means)
        lines.append(f"{high - (high - low) * row / (height - 1):8.3f} ┤{bar}".rstrip())
    return "\n".join(lines + [f"{'':9}└{'─' * width}", f"{'step':>8}  {int(steps[0]):<{width // 2}}{int(steps[-1]):>{width // 2}}"])


def clock(seconds):
    return f"{seconds // 3600:.0f}:{seconds % 3600 // 60:02.0f}:{seconds % 60:02.0f}" if seconds >= 3600 else f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


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

def main():
    start_time = time.time()

    # ---- processes and device ---------------------------------------------------
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rank0 = rank == 0
    say = print if rank0 else lambda *a, **k: None
    stop = fail if rank0 else lambda message: sys.exit(2)
    check_settings(stop)
    dev = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if dev == "cuda":
        dev = f"cuda:{local_rank}"
    try:
        dev = torch.device(dev)
        torch.zeros(1, device=dev)
    except (RuntimeError, AssertionError) as error:
        stop(f"--device={device} can't be used: {str(error).splitlines()[0]}")
    cuda = dev.type == "cuda"
    if cuda:
        torch.cuda.set_device(dev)
        torch.backends.cuda.enable_cudnn_sdp(False)     # its backward with a mask can give NaN on Hopper
    elif local_world > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)

    # ---- data -------------------------------------------------------------------
    tokenizer, skipped, val_lines = None, {}, None
    os.makedirs(out_dir, exist_ok=True)
    if src:
        try:
            if rank0:
                say(f"preparing {src} and {tgt} ...")
                prepare(os.path.join(out_dir, "data"))
            if world > 1:
                dist.barrier()
            corpus, tokenizer, skipped = prepare(os.path.join(out_dir, "data"))
            val_lines = list(zip(*read_pairs(val_src, val_tgt))) if val_src else None
        except (OSError, ValueError) as error:
            stop(str(error))
    else:
        rows = copy_task(20_000, seed)
        corpus = Corpus.of(rows, rows)
        val_rows = copy_task(1_000, seed + 1, without=rows)
        val = Corpus.of(val_rows, val_rows)
    if val_lines:
        val = Corpus.of(*([tokenizer.encode(line)[:max_len - 1] for line in side] for side in val_lines))
    batches = Batches(corpus, seed)
    steps_per_epoch = len(plan_epoch(corpus, 0, seed)) / (world * accumulate)
    if not max_steps:
        globals()["max_steps"] = max(1, round(epochs * steps_per_epoch))

    # ---- model, optimizer ---------------------------------------------------------
    try:
        config = Config(vocab_size=len(tokenizer) if tokenizer else vocab_size, d_model=d_model, n_heads=n_heads, d_ff=d_ff,
                        n_encoder_layers=n_encoder_layers, n_decoder_layers=n_decoder_layers, dropout=dropout, norm_first=norm_first)
    except ValueError as error:
        stop(str(error))
    model = Transformer(config).to(dev)
    n_parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9, fused=dev.type in ("cpu", "cuda"))   # §5.3
    amp = dtype if dtype != "auto" else ("bfloat16" if has_bfloat16(dev) else "float16") if cuda else \
        "bfloat16" if has_bfloat16(dev) and d_model >= 128 else "float32"       # narrow matrices don't win back the casts
    autocast = lambda: torch.autocast(dev.type, getattr(torch, amp), enabled=amp != "float32")
    scaler = torch.amp.GradScaler(dev.type, enabled=amp == "float16")           # float16 gradients underflow without

    # One epoch's work says how long the run will be, and so whether compiling pays.
    real = corpus.n_src.sum() + len(corpus), corpus.n_tgt.sum() + len(corpus)
    S, T = real[0] / len(corpus), real[1] / len(corpus)
    plan = plan_epoch(corpus, 0, seed)
    padding = 1 - sum(real) / sum(len(rows) * (s + t) for rows, s, t in plan)
    run_flops = flops(config, *real, S, T) / steps_per_epoch * max_steps
    rate = matmul_rate(dev, getattr(torch, amp) if amp != "float16" or cuda else torch.float32)
    estimate = run_flops / world / (0.35 * rate)
    compiled = compile == "True" or compile == "auto" and estimate > 600
    if compiled and not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        say("compile: no C++ compiler found, running without")
        compiled = False
    loss_fn = Loss(model, label_smoothing)
    if compiled:
        torch._dynamo.config.optimize_ddp = False       # one graph under DDP, not one for each bucket
        loss_fn.compile(dynamic=True)
    step_fn = nn.parallel.DistributedDataParallel(loss_fn, device_ids=[dev.index] if cuda else None) if world > 1 else loss_fn

    # ---- resume -------------------------------------------------------------------
    last, first_step, history, recent = os.path.join(out_dir, "last.pt"), 1, [], deque(maxlen=average_last)
    if resume:
        try:
            state = torch.load(last, map_location=dev, weights_only=True)
        except OSError:
            stop(f"--resume=True, but there is no {last}; start without it")
        for name in ("vocab_size", "d_model", "d_ff", "n_heads", "n_encoder_layers", "n_decoder_layers", "norm_first", "batch_tokens",
                     "accumulate", "seed", "src", "tgt", "max_len", "max_ratio"):
            if state["settings"][name] != globals()[name]:
                stop(f"{last} was made with {name}={state['settings'][name]!r}, got {globals()[name]!r}")
        if state["world"] != world:
            stop(f"{last} was made by {state['world']} processes, got {world}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first_step, history = state["step"] + 1, [tuple(point) for point in state["history"]]
        recent.extend(state["recent"])
        torch.set_rng_state(state["rng"][rank].cpu())
        if cuda:
            torch.cuda.set_rng_state(state["cuda_rng"][rank].cpu())
    else:
        torch.manual_seed(seed + rank)                  # the same weights on every rank, other dropout

    # ---- banner -------------------------------------------------------------------
    changed = " ".join(f"{name}={globals()[name]}" for name in settings if globals()[name] != settings[name])
    say(f"settings   {changed or 'the defaults: learning to copy'}")
    say(f"machine    {world} x {dev} {torch.cuda.get_device_name(dev) if cuda else f'{torch.get_num_threads()} threads'}, torch {torch.__version__}, "
        f"{amp}, {'compiled' if compiled else 'not compiled'}, {rate / 1e12:.3g} TFLOP/s of matrix products")
    say(f"model      {n_parameters:,} parameters")
    say(f"data       {len(corpus):,} pairs, {real[0]:,} + {real[1]:,} ids, {padding:.1%} padding; left out: "
        + (", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "none"))
    say(f"run        {max_steps:,} steps of about {sum(real) / steps_per_epoch:,.0f} ids, {steps_per_epoch:.1f} steps an epoch, "
        f"{run_flops:.2g} FLOPs, about {clock(estimate)}")
    log = open(os.path.join(out_dir, "log.jsonl"), "a" if resume else "w", encoding="utf-8") if rank0 else None

    def record(**entry):
        if rank0:
            log.write(json.dumps(entry) + "\n")
            log.flush()

    def save_checkpoint(step):
        """last.pt: everything it takes to go on as if nothing had happened."""
        rng = [torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else torch.empty(0, dtype=torch.uint8)]
        all_rng = [rng]
        if world > 1:
            all_rng = [[torch.empty_like(r) for r in rng] for _ in range(world)]
            for k in range(1 + cuda):
                gathered = [r[k].to(dev) for r in all_rng]
                dist.all_gather(gathered, rng[k].to(dev))
                for r, g in zip(all_rng, gathered):
                    r[k] = g.cpu()
        weights = {name: w.detach().cpu().clone() for name, w in model.state_dict().items()}
        if average_last > 1:
            recent.append(weights)
        if rank0:
            state = {"step": step, "world": world, "settings": {name: globals()[name] for name in settings}, "model": weights,
                     "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": [r[0] for r in all_rng],
                     "cuda_rng": [r[1] for r in all_rng], "history": history, "recent": list(recent)}
            write_atomically(last, lambda f: torch.save(state, f))

    def validate(step):
        """The loss of the validation set, and two translations to look at. Rank 0 alone; the model is as it was after."""
        model.eval()
        total = np.zeros(3)
        with torch.inference_mode(), autocast():
            for rows, s, t in plan_epoch(val, 0, 0):
                x, y = (a.to(dev) for a in val.batch(rows, s, t))
                smoothed, nll = loss_fn.forward(x, y)
                total += smoothed.item(), nll.item(), (y[:, 1:] != PAD).sum().item()
        loss, nll = total[0] / total[2], total[1] / total[2]
        say(f"step {step:6d}  validation: loss {loss:.4f}, nll {nll:.4f}, perplexity {math.exp(min(nll, 50)):.2f}")
        if val_lines:
            picks = [0, len(val_lines[0]) // 2]
            for i, best in zip(picks, translate(model, tokenizer, [val_lines[0][i] for i in picks], 1)):
                say(f"    source {val_lines[0][i]}\n    model  {best[0][0]}\n    truth  {val_lines[1][i]}")
        record(step=step, val_loss=loss, val_nll=nll, val_perplexity=math.exp(min(nll, 50)), seconds=time.time() - start_time)
        model.train()

    # ---- training -----------------------------------------------------------------
    model.train()
    tick, done_tokens = time.time(), 0
    totals = torch.zeros(3, device=dev, dtype=torch.float64)    # loss, nll, target tokens since the last line, never leaving the device
    for step in range(first_step, max_steps + 1):
        rate_now = learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate_now
        # All processes know the whole plan, so each knows how many target tokens the step has, everywhere together.
        first = (step - 1) * world * accumulate
        micro = [batches[first + i] for i in range(world * accumulate)]
        n_tgt = sum(int((corpus.n_tgt[rows] + 1).sum()) for rows, *_ in micro)
        for i in range(accumulate):
            rows, S_, T_, _ = micro[i * world + rank]
            x, y = (a.to(dev, non_blocking=True) for a in corpus.batch(rows, S_, T_))
            if world > 1:
                step_fn.require_backward_grad_sync = i == accumulate - 1        # one all-reduce for each step
            with autocast():
                smoothed, nll = step_fn(x, y)
            scaler.scale(smoothed * (world / n_tgt)).backward()                 # DDP takes the mean over processes: undo it
            totals += torch.stack((smoothed.detach(), nll, (y[:, 1:] != PAD).sum()))
        scaler.unscale_(optimizer)                                              # before clipping, or it would clip the scale
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        done_tokens += sum(int((corpus.n_src[rows] + corpus.n_tgt[rows] + 2).sum()) for rows, *_ in micro)

        # ---- diagnostics: nothing below touches the weights ---------------------------
        if step % log_interval == 0 or step == max_steps:
            if world > 1:
                dist.all_reduce(totals)
            loss, nll, n = totals.tolist()
            totals.zero_()
            seconds, tick = time.time() - tick, time.time()
            speed, done_tokens = done_tokens / seconds, 0
            mfu = speed * flops(config, *real, S, T) / sum(real) / (rate * world)
            left = (max_steps - step) * seconds / log_interval
            history.append((step, nll / n))
            say(f"step {step:6d}  loss {loss / n:.4f}  nll {nll / n:.4f}  ppl {math.exp(min(nll / n, 50)):8.2f}  lr {rate_now:.2e}  "
                f"norm {norm.item():.2f}  {speed:,.0f} tok/s  mfu {mfu:.0%}  epoch {step / steps_per_epoch:.1f}  left {clock(left)}", flush=True)
            record(step=step, loss=loss / n, nll=nll / n, perplexity=math.exp(min(nll / n, 50)), learning_rate=rate_now,
                   grad_norm=norm.item(), tokens_per_second=speed, mfu=mfu, seconds=time.time() - start_time)
        if step % checkpoint_interval == 0 or step == max_steps:
            save_checkpoint(step)
        if (step % eval_interval == 0 or step == max_steps) and (val_lines or not src):
            if rank0:
                validate(step)
            if world > 1:
                dist.barrier()

    # ---- the end --------------------------------------------------------------------
    if rank0:
        if len(recent) > 1:
            mean = {name: torch.stack([w[name].float() for w in recent]).mean(0) for name in recent[0]}
            model.load_state_dict(mean)
            say(f"averaged the last {len(recent)} checkpoints")
        model.eval()
        save(os.path.join(out_dir, "model.pt"), model, tokenizer)
        if len(history) > 1:
            say("\nnegative log-likelihood\n" + draw_curve(history) + "\n")
        if val_lines:
            if amp == "bfloat16":
                model.to(torch.bfloat16)
            hypotheses = [best[0][0] for best in translate(model, tokenizer, val_lines[0], beam_size, length_penalty)]
            score = bleu(hypotheses, val_lines[1], str.split if bleu_tokenize == "none" else tokenize_13a)
            say(f"validation BLEU {score:.2f} ({bleu_tokenize}, beam {beam_size}, length penalty {length_penalty})")
            record(step=max_steps, bleu=score, seconds=time.time() - start_time)
        elif not src:
            right, shown = 0, 0
            for rows, s, t in plan_epoch(val, 0, 0):
                x, y = (a.to(dev) for a in val.batch(rows, s, t))
                ids, _ = beam_search(model, x, beam_size=1, max_len=t + 5)
                for source, want, got in zip(x.tolist(), y[:, 1:].tolist(), ids.tolist()):
                    trim = lambda row: row[:row.index(EOS)]
                    right += trim(want) == trim(got)
                    if shown < 3:
                        shown += 1
                        say(f"  in  {' '.join(map(str, trim(source)))}\n  out {' '.join(map(str, trim(got)))}")
            say(f"exact sequence accuracy on {len(val):,} unseen sequences: {right / len(val):.1%}")
            record(step=max_steps, accuracy=right / len(val), seconds=time.time() - start_time)
        say(f"{clock(time.time() - start_time)} in all. The model is {os.path.join(out_dir, 'model.pt')}"
            + (f"; use it:\n  python transformer.py --checkpoint={os.path.join(out_dir, 'model.pt')} < in.txt > out.txt" if src else ""))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def check_settings(stop):
    """Stops the run in one line for values that make no sense, before anything is read or written."""
    texts = {"src": src, "tgt": tgt, "val_src": val_src, "val_tgt": val_tgt}
    for a, b in (("src", "tgt"), ("val_src", "val_tgt")):
        if bool(texts[a]) != bool(texts[b]):
            stop(f"--{a} and --{b} belong together, got {a}={texts[a]!r} and {b}={texts[b]!r}")
    if val_src and not src:
        stop("--val_src without --src: there is nothing to train on")
    for name, path in texts.items():
        if path and not os.path.isfile(path):
            stop(f"--{name}={path}: expected a text file, found {'a directory' if os.path.isdir(path) else 'nothing there'}")
    for name in ("batch_tokens", "accumulate", "log_interval", "eval_interval", "checkpoint_interval", "average_last", "beam_size",
                 "warmup_steps", "max_len"):
        if globals()[name] < 1:
            stop(f"--{name} must be at least 1, got {globals()[name]}")
    for name in ("max_steps", "epochs", "learning_rate", "grad_clip", "max_ratio", "seed"):
        if not 0 <= globals()[name] < math.inf:
            stop(f"--{name} must be 0 or more, got {globals()[name]}")
    if not 0 <= label_smoothing < 1:
        stop(f"--label_smoothing must lie in [0, 1), got {label_smoothing}")
    if not max_steps and not epochs:
        stop("nothing to do: --max_steps and --epochs are both 0")
    for name, options in (("decay", ("inverse_sqrt", "linear")), ("compile", ("auto", "True", "False")), ("bleu_tokenize", ("13a", "none")),
                          ("dtype", ("auto", "float32", "bfloat16", "float16"))):
        if globals()[name] not in options:
            stop(f"--{name} must be one of {', '.join(options)}, got {globals()[name]!r}")


if __name__ == "__main__":
    if src:                                             # text: what the command line left open comes from the recipe
        globals().update({name: value for name, value in text_recipe.items() if name not in given})
    main()
