# SPDX-License-Identifier: MIT
"""
Training a Transformer: Section 5 of the paper.

    python train.py                                 # learns to copy, in about half a minute
    python train.py --src=a.en --tgt=a.de --val_src=b.en --val_tgt=b.de --out_dir=out
    python train.py --resume=True --out_dir=out     # goes on where that run stopped
    torchrun --nproc_per_node=2 train.py ...        # the same run on two GPUs, or two CPU processes

It writes out_dir/model.pt (to use), out_dir/last.pt (to resume from) and out_dir/log.jsonl.
Every setting below can be overridden as --name=value. --help prints them.

All that a run carries from step to step is in last.pt: the weights, the optimizers, float16's loss
scale, the number of the step, what it knows of validation, and the checkpoints it will average.
Step n follows from these, the settings, the seed and n: its batches come from (seed, epoch), the
random numbers of its micro-batch j from (seed, n, j), whichever process computes it. So a run that
was killed ends like one that was not, and with the same --accumulate the number of processes
changes nothing but roundings. last.pt is replaced every checkpoint_interval steps. On a single
process, Ctrl-C and SIGTERM save it once more before they end the run.
"""

# ---- settings ---------------------------------------------------------------
# The defaults train the copy task. With --src, a row of RECIPES below takes the place of what the
# command line leaves open: a recipe for small texts and few hours, or the paper's.
src = ""                    # source side of the training text, one sentence per line; "": copy task
tgt = ""                    # target side: line i is the translation of line i of src
val_src = ""                # validation text, likewise; "": none
val_tgt = ""                # and its target side
out_dir = "out"             # everything this run writes goes here
init_from = ""              # a model.pt to start from: its weights, sizes and tokenizer; "": none
# text
vocab_size = 11             # ids, both languages together; text: 3 specials, 256 bytes, and merges
max_len = 16                # ids; pairs with a longer side are left out of training, and counted
max_ratio = 5.0             # likewise if a side has more than this many times the other's, plus 5
bleu_tokenize = "13a"       # BLEU's words: 13a, as sacreBLEU; none, what stands between spaces;
                            # char, every character, for languages without spaces
# model: as in transformer.Config
d_model = 64                # width
n_heads = 4                 # attention heads
d_ff = 128                  # inner width of the feed-forward networks
n_encoder_layers = 2        # layers that read the source
n_decoder_layers = 2        # layers that write the target
dropout = 0.0               # probability; random sequences leave nothing to overfit, text does
norm_first = False          # False: the paper's post-norm; True: pre-norm
# optimisation
label_smoothing = 0.1       # §5.4
batch_tokens = 1280         # source ids, and target ids, of a step on all processes, with padding
accumulate = 0              # micro-batches that a step is cut into; 0: one for each process
max_steps = 600             # optimizer steps; 0: as many as `epochs` needs
epochs = 0.0                # passes over the training pairs, if max_steps is 0
learning_rate = 3e-3        # of Adam after warm-up; 0: the paper's (d_model * warmup_steps)^-0.5
muon = 5e-3                 # of Muon, which trains the layers' matrices, and lets them decay by
                            # 0.1 times the rate; 0: Adam trains all, as in the paper
embedding_decay = 0.0       # AdamW's weight decay of the embeddings; 0: none, as in the paper
warmup_steps = 30           # steps of linear rise; unless given, at most a tenth of the run
decay = "linear"            # of the rate: inverse_sqrt (§5.3); linear: in the second half, to 0
grad_clip = 1.0             # largest norm of the gradient; 0: no clipping
average_last = 1            # model.pt is the mean of so many checkpoints (§6.1: 5), unless worse
patience = 0                # stop after this many validations in a row that are no better; 0: never
# evaluation
log_interval = 50           # steps between progress lines
eval_interval = 300         # steps between validations
checkpoint_interval = 300   # steps between checkpoints
beam_size = 4               # hypotheses for each sentence in the final BLEU (§6.1)
length_penalty = -1.0       # alpha (§6.1), kept in model.pt; -1: the best of 0.6, 1.0 and 1.4
# the machine
seed = 1                    # of weights, batches and dropout
device = "auto"             # cpu, cuda, cuda:1, mps; auto: cuda where there is one
dtype = "auto"              # of matrix products: bfloat16, float16, float32; auto: fastest safe one
compile = "auto"            # True, False; auto: where the run has steps enough to win the time back
group_timeout = 600         # seconds of silence after which another process counts as lost
resume = False              # go on from out_dir/last.pt, with the settings that stand in it
# ---- end of settings --------------------------------------------------------
KINDS = (bool, int, float, str)         # read before there are any other globals than settings
settings = {k: v for k, v in globals().items() if k[0] != "_" and type(v) in KINDS}

import copy
import ctypes
import gc
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from transformer import (
    BOS, EOS, PAD, Config, Tokenizer, Transformer, beam_search, fail, for_inference, has_bfloat16,
    load, override, read_checkpoint, save, translate, write_atomically)

try:
    import fcntl
except ImportError:         # Windows has no such locks
    fcntl = None

# A small text needs a small model, much dropout and many epochs. Muon is not the paper's: it learns
# from each pair more than Adam does, which counts where pairs are few.
SMALL = dict(
    max_len=256, d_model=128, d_ff=256, n_encoder_layers=4, n_decoder_layers=4, norm_first=True,
    batch_tokens=4096, max_steps=0, learning_rate=4e-3, muon=1e-2, embedding_decay=0.1,
    warmup_steps=200, eval_interval=500, checkpoint_interval=500, patience=5)
BASE = dict(
    max_len=256, d_model=512, d_ff=2048, n_heads=8, n_encoder_layers=6, n_decoder_layers=6)
PAPER = dict(
    BASE, vocab_size=37000, dropout=0.1, batch_tokens=25_000, accumulate=8, max_steps=100_000,
    learning_rate=0.0, muon=0.0, warmup_steps=4000, decay="inverse_sqrt", grad_clip=0.0,
    average_last=5, eval_interval=1000, checkpoint_interval=1000)

# The first row that the text fits into counts. The limits are MB of text, both sides together.
RECIPES = {
    0.5: dict(SMALL, vocab_size=1000, n_encoder_layers=2, n_decoder_layers=2, dropout=0.2,
              batch_tokens=1024, epochs=120.0, eval_interval=100,
              checkpoint_interval=100),                                          # 4,000 pairs
    2: dict(SMALL, vocab_size=3000, dropout=0.3, epochs=50.0),                   # 15,000
    15: dict(SMALL, vocab_size=8000, dropout=0.2, epochs=36.0),                  # 100,000
    100: dict(SMALL, vocab_size=10_000, d_model=256, d_ff=1024, dropout=0.2, epochs=20.0,
              learning_rate=2e-3),                                               # 700,000
    600: dict(SMALL | BASE, vocab_size=32_000, dropout=0.1, epochs=15.0, batch_tokens=8192,
              learning_rate=1e-3, warmup_steps=1000),                            # 4 million
    math.inf: PAPER,
}

# What fine-tuning takes instead: a trained model needs small steps, and few.
FINE_TUNING = dict(learning_rate=1e-3, muon=2e-3, warmup_steps=100, max_steps=0, epochs=10.0)

# Allowed values. A number is from 0 to a billion, if nothing else is said here.
FROM_ONE = [
    "max_len", "max_ratio", "batch_tokens", "warmup_steps", "average_last", "log_interval",
    "eval_interval", "checkpoint_interval", "beam_size", "group_timeout"]
LEAST = dict.fromkeys(FROM_ONE, 1) | {"vocab_size": EOS + 4, "length_penalty": -1}
MOST = {"label_smoothing": 0.999, "length_penalty": 10}
CHOICES = {
    "decay": ["inverse_sqrt", "linear"], "compile": ["auto", "True", "False"],
    "bleu_tokenize": ["13a", "none", "char"], "dtype": ["auto", "float32", "bfloat16", "float16"]}
# What makes the model, and what makes the data. A resumed run can't change these.
SIZES = ("vocab_size", "d_model", "d_ff", "n_heads", "n_encoder_layers", "n_decoder_layers",
         "norm_first")
FIXED = (*SIZES, "batch_tokens", "accumulate", "seed", "max_len", "max_ratio", "embedding_decay")

COMPILE_STEPS = 1500        # a run of fewer steps ends sooner without torch.compile
DATA_VERSION = 1            # of the form of the prepared text
STATE_VERSION = 1           # of the form of last.pt

# This process among the others, as torchrun says it.
rank = int(os.environ.get("RANK", "0"))
world = int(os.environ.get("WORLD_SIZE", "1"))
local_rank = int(os.environ.get("LOCAL_RANK", "0"))
local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def say(text):
    """Of all processes, the first alone speaks."""
    if rank == 0:
        print(text, flush=True)


last_progress = time.time()


def progress(text):
    """Says text, at most once in ten seconds: for slow work, to show how far it is."""
    global last_progress
    if time.time() - last_progress > 10:
        last_progress = time.time()
        say(text)


# ---- settings and the machine ------------------------------------------------

def check_settings():
    """Ends the run in one line if a setting makes no sense, before anything is read or written."""
    files = {name: globals()[name] for name in ("src", "tgt", "val_src", "val_tgt")}
    if bool(src) != bool(tgt) or bool(val_src) != bool(val_tgt) or (val_src and not src):
        fail(f"--src and --tgt belong together, and --val_src and --val_tgt to them, got {files}")
    for name, path in files.items():
        if path and not os.path.isfile(path):
            found = "another thing" if os.path.exists(path) else "nothing there"
            fail(f"--{name}={path}: expected a text file, found {found}")

    for name, choices in CHOICES.items():
        if globals()[name] not in choices:
            fail(f"--{name} must be one of {', '.join(choices)}, got {globals()[name]!r}")
    for name, default in settings.items():
        if type(default) in (int, float):
            value = globals()[name]
            least = LEAST.get(name, 0)
            most = MOST.get(name, 1e9)
            if not least <= value <= most:              # so written, it refuses nan as well
                fail(f"--{name} must be from {least} to {most:g}, got {value!r}")
    if -1 < length_penalty < 0:
        fail(f"--length_penalty must be -1, or from 0 to {MOST['length_penalty']}, "
             f"got {length_penalty}")
    if not max_steps and not epochs:
        fail("--max_steps and --epochs are both 0: nothing to do")


def recipe():
    """The row of RECIPES for the size of the training text. -> dict"""
    total = 0.0
    for path in filter(os.path.isfile, (src, tgt)):
        size = os.path.getsize(path) / 1e6
        if is_gzip(path):
            size *= 4
        total += size
    return next(row for limit, row in RECIPES.items() if total <= limit)


def refuse_changes(path, values, names, given):
    """Ends the run if the command line has one of these settings otherwise than path has it."""
    for name in names:
        if name in given and given[name] != values[name]:
            fail(f"{path} was made with --{name}={values[name]}, got {given[name]}: leave it out")


def available_cores():
    """The cores this process may use: in a container or a batch job, fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_device(name, local_rank=0):
    """The torch.device of that name. "cuda" is this process's own GPU. "auto" is the same where
    there is a GPU, and the CPU elsewhere. Raises ValueError if the device can't be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=found).item()
        return found
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device={name} can't be used: {reason}") from None


def keep_freed_memory():
    """Asks glibc, where it is the C library, to keep large blocks that are freed. Otherwise each
    goes back to the system and comes again page by page, zeroed: 6% of a step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: smaller blocks come from the heap. Old versions allow 32 MB at most.
        if not mallopt(-3, 1 << 30):
            mallopt(-3, 1 << 25)
        mallopt(-1, -1)             # M_TRIM_THRESHOLD: the heap never shrinks
    except (OSError, AttributeError, TypeError):
        pass


def why_not_compile(dev):
    """Compiles a function of one line, to see if that works here. -> the reason why not, or ""."""
    size = 1000 + time.time_ns() % 1_000_000        # a size that no cache of compiled code has seen
    try:
        torch.compile(lambda x: x + x, dynamic=False)(torch.ones(size, device=dev))
        return ""
    except Exception as error:      # of compilers there are many, and each fails in its own way
        text = str(error).strip() or type(error).__name__
        return text.splitlines()[0]


def explain(kind, error, trace):
    """What Python does with an error that nobody caught: one line for what a user can cause."""
    lines = str(error).splitlines() or [kind.__name__]
    if kind is KeyboardInterrupt:
        sys.exit(130)
    if kind in (torch.OutOfMemoryError, MemoryError) or "allocate memory" in lines[0]:
        fail(f"out of memory; a new run with more than --accumulate={accumulate} would need less")
    if isinstance(error, OSError):
        fail(f"{error}; what was saved before is intact")
    if isinstance(error, ValueError):
        fail(lines[0])
    if world > 1 and re.search("gloo|NCCL|onnection|imed out|ocket|store", lines[0]):
        fail(f"rank {rank} lost the other processes ({lines[0][:200]}); "
             "start all of them again with --resume=True")
    sys.__excepthook__(kind, error, trace)


# ---- several processes ---------------------------------------------------------

def gathered(value):
    """[the value of rank 0, of rank 1, ...], on every rank."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


# ---- §5.1 Training data ----------------------------------------------------------

class Corpus:
    """Pairs of id sequences, in memory or on disk.

    ids holds all sequences, one after the other: a source, its target, the next source...
    lengths says how many ids each of them has, without BOS and EOS.
    """

    def __init__(self, ids, lengths):
        self.ids = ids
        ends = np.cumsum(lengths, dtype=np.int64)
        self.start = ends - lengths             # where in ids each sequence begins
        self.n_src = lengths[0::2]
        self.n_tgt = lengths[1::2]

    @classmethod
    def of(cls, pairs):
        """From a list of (list of source ids, list of target ids)."""
        sequences = [sequence for pair in pairs for sequence in pair]
        ids = [i for sequence in sequences for i in sequence]
        lengths = [len(sequence) for sequence in sequences]
        return cls(np.array(ids, np.int64), np.array(lengths, np.int64))

    def __len__(self):
        return len(self.n_src)

    def count(self, rows):
        """How many source ids and how many target ids these pairs have, with EOS. -> (int, int)"""
        return int(self.n_src[rows].sum()) + len(rows), int(self.n_tgt[rows].sum()) + len(rows)

    def padded(self, start, lengths):
        """Sequences as rows: ids, EOS, then PAD. (B,), (B,) -> (B, longest + 1) int64"""
        column = np.arange(lengths.max() + 1)
        inside = column < lengths[:, None]
        place = np.where(inside, start[:, None] + column, 0)
        ids = np.where(inside, self.ids[place], PAD).astype(np.int64)
        ids[column == lengths[:, None]] = EOS
        return ids

    def batch(self, rows):
        """These pairs as tensors, each row filled up with PAD.
        -> src (B, S): ids, EOS; tgt (B, T + 1): BOS, ids, EOS"""
        src = self.padded(self.start[2 * rows], self.n_src[rows])
        tgt_out = self.padded(self.start[2 * rows + 1], self.n_tgt[rows])
        bos = np.full((len(rows), 1), BOS)
        tgt = np.concatenate((bos, tgt_out), axis=1)
        return torch.from_numpy(src), torch.from_numpy(tgt)


def copy_task(n, seed, without=()):
    """n sequences of random symbols, each its own translation, none of them in `without`."""
    rng = np.random.default_rng(seed)
    taken = frozenset(without)
    pairs = []
    while len(pairs) < n:
        length = rng.integers(5, 11)
        row = tuple(rng.integers(EOS + 1, vocab_size, length).tolist())
        if (row, row) not in taken:
            pairs.append((row, row))
    return pairs


# How files of bzip2, xz, zip, zstd, 7z, lz4 and compress begin.
COMPRESSED = rb"BZh|\xfd7zXZ|PK\x03\x04|\x28\xb5\x2f\xfd|7z\xbc\xaf|\x04\x22\x4d\x18|\x1f\x9d"


def is_gzip(path):
    """Its first bytes say so, not its name."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_text(path):
    """A plain or gzip file, whatever its name is, open to be read as bytes.
    Raises ValueError if its first bytes show that it is something else."""
    file = gzip.open(path) if is_gzip(path) else open(path, "rb")
    head = file.peek(1000)[:1000]
    if re.match(COMPRESSED, head):
        raise ValueError(f"{path} is compressed, expected plain text or gzip: unpack it")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) / 3:
        raise ValueError(f"{path} is UTF-16, expected UTF-8; to convert it: "
                         f"iconv -f UTF-16 -t UTF-8 {path} > new.txt")
    return file


def read_lines(path, damaged):
    """The lines of a text file; only \\n ends one. Bytes that are not UTF-8 become U+FFFD, and the
    number of their line is added to the list `damaged`."""
    with open_text(path) as file:
        for number, raw in enumerate(file, 1):
            data = raw.rstrip(b"\r\n")
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = data.decode("utf-8", "replace")
                damaged.append(number)
            yield text.removeprefix("\ufeff")


def read_pairs(src_path, tgt_path, damaged=None):
    """(source line, target line), to the end of both files.
    Raises ValueError if the files don't match or can't be read."""
    n = 0
    if damaged is None:
        damaged = []
    try:
        src_lines = read_lines(src_path, damaged)
        tgt_lines = read_lines(tgt_path, damaged)
        for x, y in itertools.zip_longest(src_lines, tgt_lines):
            if x is None or y is None:
                short = src_path if x is None else tgt_path
                raise ValueError(f"{src_path} and {tgt_path} must have as many lines, "
                                 f"but {short} ends after {n:,}")
            n += 1
            yield x, y
    except (OSError, EOFError, zlib.error) as error:
        files = f"{src_path} and {tgt_path}"
        raise ValueError(f"cannot read {files} after line {n:,}: {error}") from None
    if n == 0:
        raise ValueError(f"{src_path} and {tgt_path} are empty, expected one sentence a line")


worker_tokenizer = None             # of a worker process, which turns text into ids


def start_worker(tokenizer):
    """The first thing that a worker process does."""
    global worker_tokenizer
    worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the parent
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: ends with its parent


PART = 5000                         # pairs that a worker takes at a time


def in_parts(pairs):
    """Lists of PART pairs, the last one shorter."""
    while part := list(itertools.islice(pairs, PART)):
        yield part


def on_all_cores(work, pairs, tokenizer=None):
    """work(list of pairs), for all pairs, in order, on every core. It reads a few lists ahead."""
    global worker_tokenizer
    parts = in_parts(pairs)
    first = list(itertools.islice(parts, 2))
    parts = itertools.chain(first, parts)

    # A short text is not worth the processes, and outside Linux a forked process is not safe.
    if len(first) < 2 or not sys.platform.startswith("linux"):
        worker_tokenizer = tokenizer
        yield from map(work, parts)
        return

    cores = available_cores()
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, fork, start_worker, (tokenizer,)) as pool:
        while window := list(itertools.islice(parts, 2 * cores)):
            try:
                yield from pool.map(work, window)
            except BrokenProcessPool:
                fail("a process that prepared text was killed; is there too little memory?")


# An id stands for 33 characters at most. A line of more than 33 * max_len is surely too long, so
# the rest of it need not be read.
LONGEST_ID = 33


def count_words(pairs):
    """First pass over the text: how often each word occurs in these pairs."""
    counts = Counter()
    for pair in pairs:
        for line in pair:
            counts.update(Tokenizer.words(line[:LONGEST_ID * max_len]))
    return counts


def encode_pairs(pairs):
    """Second pass: the pairs that are fit for training, and how many are not, by reason.
    -> ids and lengths as in Corpus, Counter"""
    ids = []
    lengths = []
    left_out = Counter(empty=0, too_long=0, ratio=0)
    for x, y in pairs:
        if not x.strip() or not y.strip():
            left_out["empty"] += 1
            continue
        a = worker_tokenizer.encode(x[:LONGEST_ID * max_len])
        b = worker_tokenizer.encode(y[:LONGEST_ID * max_len])
        short, long = sorted((len(a), len(b)))
        if long >= max_len:
            left_out["too_long"] += 1
        elif long > max_ratio * short + 5:
            left_out["ratio"] += 1
        else:
            ids += a + b
            lengths += [len(a), len(b)]
    return np.array(ids, np.uint32), np.array(lengths, np.uint32), left_out


def at_work(folder, text):
    """Shows the user, and the processes that wait for the folder, that the work goes on."""
    os.utime(folder)
    progress(text)


def learn_tokenizer(folder):
    """The tokenizer for both sides of the training text. Rare words don't decide a merge, but they
    fill the memory, so not all of them are counted."""
    counts = Counter()
    n = 0
    for part in on_all_cores(count_words, read_pairs(src, tgt)):
        counts.update(part)
        n += PART
        at_work(folder, f"counting words: {n:,} pairs so far")
        if len(counts) > 3_000_000:
            counts = Counter({word: count for word, count in counts.items() if count > 1})
    counts = Counter(dict(counts.most_common(500_000)))
    at_work(folder, f"learning up to {vocab_size:,} ids from {len(counts):,} words")
    return Tokenizer.train(counts, vocab_size)


def prepared(folder, made_from, tokenizer):
    """The index of the data in folder, if that was made from this text with this tokenizer (None:
    with one that was learnt from the text); otherwise None."""
    try:
        index = read_checkpoint(os.path.join(folder, "index"))
        fits = index["made_from"] == made_from
        if tokenizer is None:
            fits = fits and index["learnt"]
        else:
            fits = fits and index["merges"] == tokenizer.merges
        if fits:
            return index
    except (ValueError, KeyError, TypeError):
        pass
    return None


def write_data(folder, made_from, tokenizer):
    """Writes the ids of the training text into folder. The index comes last: what has one is whole.
    Neither text nor ids have to fit in memory."""
    if os.path.exists(os.path.join(folder, "index")):
        os.remove(os.path.join(folder, "index"))
    learnt = tokenizer is None
    tokenizer = tokenizer or learn_tokenizer(folder)
    digest = hashlib.sha256(repr(tokenizer.merges).encode())
    left_out = Counter()
    damaged = []
    n = 0
    ids_path = os.path.join(folder, "ids")
    lengths_path = os.path.join(folder, "lengths")
    with open(ids_path, "wb") as ids_file, open(lengths_path, "wb") as lengths_file:
        pairs = read_pairs(src, tgt, damaged)
        for ids, lengths, reasons in on_all_cores(encode_pairs, pairs, tokenizer):
            ids_file.write(ids.tobytes())
            lengths_file.write(lengths.tobytes())
            digest.update(ids.tobytes() + lengths.tobytes())
            left_out.update(reasons)
            n += len(lengths) // 2
            at_work(folder, f"turning text into ids: {n:,} pairs so far")
        for file in (ids_file, lengths_file):           # on the disk before the index says so
            file.flush()
            os.fsync(file.fileno())
    if n == 0:
        reasons = dict(left_out)
        raise ValueError(f"no pair of {src} and {tgt} is fit for training; left out: {reasons}")
    write_atomically(os.path.join(folder, "index"), {
        "made_from": made_from, "learnt": learnt, "merges": tokenizer.merges,
        "digest": digest.hexdigest(), "left_out": dict(left_out), "damaged": len(damaged)})


def prepare(folder, tokenizer=None):
    """Puts the ids of the training text into folder, unless they are there already. Rank 0 works,
    the others wait. tokenizer: one to use; None: learn it. -> Corpus on disk, Tokenizer, index"""
    os.makedirs(folder, exist_ok=True)
    made_from = [DATA_VERSION, vocab_size, max_len, max_ratio]
    for path in (src, tgt):
        made_from += [os.path.abspath(path), os.path.getsize(path), os.path.getmtime(path)]
    if rank == 0 and prepared(folder, made_from, tokenizer) is None:
        write_data(folder, made_from, tokenizer)

    # The others ask the same question as rank 0 did, and give up when nothing moves any more.
    seen = 0.0
    since = time.time()
    while (index := prepared(folder, made_from, tokenizer)) is None:
        if os.path.getmtime(folder) != seen:
            seen = os.path.getmtime(folder)
            since = time.time()
        if time.time() - since > group_timeout:
            fail(f"rank {rank} has waited in vain for rank 0 to prepare {folder}")
        time.sleep(0.5)
    ids = np.memmap(os.path.join(folder, "ids"), np.uint32, "r")
    lengths = np.fromfile(os.path.join(folder, "lengths"), np.uint32).astype(np.int64)
    return Corpus(ids, lengths), Tokenizer(index["merges"]), index


# ---- §5.1 Batches: pairs "batched together by approximate sequence length" ---------

def plan_epoch(corpus, size, seed, epoch):
    """All batches of an epoch, in order: each an array with the numbers of its pairs, and with at
    most `size` ids a side, padding included, or with one longer pair. Every pair is in exactly one.

    The plan follows from its arguments alone: every process makes the same one.
    """
    rng = np.random.default_rng((seed, epoch))
    n_src = corpus.n_src + 1                            # with EOS
    n_tgt = corpus.n_tgt + 1

    # Neighbours should be alike on both sides. So pairs are sorted by target length, two lengths to
    # a group, and within a group by source length: rising in one group and falling in the next,
    # so that it does not jump where a group ends. Noise shuffles equals.
    group = n_tgt // 2
    up_or_down = np.where(group % 2, -n_src, n_src)
    order = np.lexsort((up_or_down + rng.random(len(corpus)), group))

    # It is cut wherever one more pair, with all rows as wide as the widest, would be too much.
    longer = np.maximum(n_src, n_tgt)
    cuts = []
    first = 0
    width = 0
    for i, length in enumerate(longer[order].tolist()):
        width = max(width, length)
        if i > first and (i - first + 1) * width > size:
            cuts.append(i)
            first = i
            width = length
    batches = np.split(order, cuts)

    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(corpus, size, seed, n, start):
    """Endless: for each step, the list of its n micro-batches. Begins after `start` steps."""
    epochs = (plan_epoch(corpus, size, seed, epoch) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    batches = itertools.islice(batches, start * n, None)
    while True:
        yield list(itertools.islice(batches, n))


def to_device(batch, dev):
    """The tensors on that device. A copy to a GPU need not be waited for from pinned memory."""
    if dev.type == "cuda":
        batch = [ids.pin_memory() for ids in batch]
    return [ids.to(dev, non_blocking=True) for ids in batch]


# ---- §5.3, §5.4 Schedule and loss ---------------------------------------------------

def learning_rate_at(step, peak):
    """The rate of a step, from 1 on: a linear rise to the peak, then one of two ways down.

    inverse_sqrt is §5.3, Eq. 3: it falls with 1/√step, and the paper needs no end for it. linear
    holds the peak for the first half of the run, and then goes straight down, to 0 one step after
    the last.

    Adam's first steps know little of the gradient's size, and large steps ruin a fresh post-norm
    stack. So the rate starts near 0. It ends low for the weights to settle.
    """
    rise = step / warmup_steps
    if decay == "linear":
        left = (max_steps + 1 - step) / (max_steps + 1)
        return peak * min(1.0, rise, 2 * left)
    return peak * min(rise, (warmup_steps / step) ** 0.5)


def orthogonal(matrices):
    """(n, A, B) -> the same matrices, nearly orthogonal.

    A gradient has a few large singular values and many small ones. Made equal, the rare directions
    move the weights as much as the others. The singular value decomposition would do it exactly.
    Five Newton-Schulz iterations come near with products alone: each takes every singular value s
    to as + bs³ + cs⁵, and so brings all but the tiniest close to 1. The coefficients are those of
    Jordan et al. (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    x = matrices
    if tall:
        x = x.mT                                        # the shorter side makes smaller products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)    # no singular value is above 1 now
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.mT
    return x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices (Jordan et al., 2024).

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" takes the same steps, but one matrix after
    the other, and always in bfloat16, which is slow on a CPU that lacks it in hardware. This one
    takes all matrices of one shape through the products together, in the dtype that it is given.
    """

    def __init__(self, matrices, dtype):
        super().__init__(matrices, dict(lr=0.0, momentum=0.95, weight_decay=0.1))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)

            for shape, weights in by_shape.items():
                ahead = []                              # Nesterov: where the momentum will be
                for weight in weights:
                    state = self.state[weight]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(weight)
                    momentum = state["momentum_buffer"]
                    momentum.lerp_(weight.grad, 1 - group["momentum"])
                    ahead.append(weight.grad.lerp(momentum, group["momentum"]))
                updates = orthogonal(torch.stack(ahead).to(self.dtype))

                # A number in an orthogonal matrix is about 1 / √(its longer side), in a step of
                # Adam's 0.2. This factor makes them equal, so that learning rates mean the same to
                # both (Liu et al., 2025).
                scale = 0.2 * max(shape) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(update, alpha=group["lr"] * scale)


def make_optimizers(model, dev):
    """AdamW, and Muon for the matrices of the layers if that is on. The projections of keys and of
    values lie in one matrix (kv), and are one to Muon."""
    embedding = model.embedding.weight
    matrices = []
    if muon:
        layers = nn.ModuleList((*model.encoder, *model.decoder))
        matrices = [weight for weight in layers.parameters() if weight.dim() == 2]
    taken = {id(weight) for weight in (embedding, *matrices)}
    others = [weight for weight in model.parameters() if id(weight) not in taken]

    groups = [{"params": [embedding], "weight_decay": embedding_decay},
              {"params": others, "weight_decay": 0.0}]
    fused = dev.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9, fused=fused)]
    if muon:
        dtype = torch.float32
        if has_bfloat16(dev):
            dtype = torch.bfloat16
        optimizers.append(Muon(matrices, dtype))
    return optimizers


class HashedDropout(nn.Module):
    """Dropout whose random bits are a hash of each number's place and of one seed a batch. Drawing
    them one after the other would take a third of a compiled step on a CPU."""

    def __init__(self, p):
        super().__init__()
        # Each number gets a hash of 16 bits, and is kept if that is below this.
        self.kept = max(1, round((1 - p) * 65536))
        self.seed = torch.zeros((), dtype=torch.int32)          # Loss fills it anew for each batch

    def forward(self, x):
        if not self.training or self.kept == 65536:
            return x
        # Two rounds of multiply and xorshift.
        h = torch.arange(x.numel(), dtype=torch.int32).view(x.shape) * -1640531535 ^ self.seed
        h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D
        h = (h ^ (h >> 15 & 0x1FFFF)) * -2073254261
        kept = (h >> 16 & 0xFFFF) < self.kept
        return torch.where(kept, x * (65536 / self.kept), 0.0)


class Loss(nn.Module):
    """The model and its loss in one module, for DistributedDataParallel and for the compiler.

    Cross-entropy against a softened target: 1 - ε on the true token, ε spread evenly over all V.
    So the model gains nothing by being ever more certain, which costs dear where it is wrong. §5.4
    """

    def __init__(self, model, label_smoothing):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.seeds = []                                 # of HashedDropout

    def forward(self, src, tgt):
        """(B, S), (B, T + 1) -> loss to train on, negative log-likelihood to report.
        Both are sums over the target tokens."""
        if self.training:
            for seed in self.seeds:
                seed.random_()
        tgt_in = tgt[:, :-1]
        tgt_out = tgt[:, 1:].flatten()                  # each position predicts the next token
        memory = self.model.encode(src)
        states = self.model.decode(tgt_in, memory, src).flatten(0, 1)
        # Padding needs no logits. But a GPU would have to wait until the rest is counted.
        if not states.is_cuda:
            real = (tgt_out != PAD).nonzero().flatten()
            states = states.index_select(0, real)
            tgt_out = tgt_out[real]
        return self.score(states, tgt_out)

    def score(self, states, tgt_out):
        """(n, D), (n,) -> the two sums."""
        logits = self.model.output(states).float()      # (n, V): most of a small model's memory
        options = {"ignore_index": PAD, "reduction": "sum"}
        loss = F.cross_entropy(logits, tgt_out, label_smoothing=self.label_smoothing, **options)
        nll = F.cross_entropy(logits.detach(), tgt_out, **options)
        return loss, nll

    def compile_parts(self):
        """Compiles one layer of each kind for all of them, dropout and the loss: a fifth of the
        code that the whole model would be. It serves batches of every shape. But not the embedding:
        its gradient would be summed in another order each time, so no run could be repeated."""
        if next(self.model.parameters()).device.type == "cpu":
            for part in list(self.model.modules()):
                for name, child in part.named_children():
                    if type(child) is nn.Dropout:
                        hashed = HashedDropout(child.p)
                        setattr(part, name, hashed)
                        self.seeds.append(hashed.seed)
            # Masks and ReLUs are cheaper computed again in the backward pass than stored. What is
            # drawn must not be drawn again, so the seeds come from outside the graph.
            from torch._functorch import config as functorch
            functorch.aggressive_recomputation = True
        torch._dynamo.config.specialize_float = True    # a program for each float, never another's
        torch._dynamo.config.optimize_ddp = False       # DDP would cut each part at its buckets
        dropouts = (self.model.src_dropout, self.model.tgt_dropout)
        for part in (*self.model.encoder, *self.model.decoder, *dropouts):
            part.compile(dynamic=True)
        self.score = torch.compile(self.score, dynamic=True)


# ---- validation ------------------------------------------------------------------------

def words_13a(line):
    """The words of mteval-v13a: punctuation stands apart, but not inside numbers."""
    line = line.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(entity, char)
    line = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {line} ")
    line = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", line)
    line = re.sub(r"([\.,])([^0-9])", r" \1 \2", line)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()


# For "char", every character but the spaces is a word.
WORDS = {"13a": words_13a, "none": str.split, "char": lambda line: list("".join(line.split()))}


def bleu(hypotheses, references, words=words_13a):
    """Corpus BLEU in percent, one reference a line, as sacreBLEU has it (Papineni et al., 2002).

    The share of a translation's 1- to 4-grams that its reference has too: the mean of the four
    shares, as logarithms, times a penalty if all in all the translations are shorter. A count of 0
    becomes 1/2, the next 1/4, and so on.
    """
    match = [0] * 4
    total = [0] * 4
    n_hyp = 0
    n_ref = 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        hyp = words(hypothesis)
        ref = words(reference)
        n_hyp += len(hyp)
        n_ref += len(ref)
        for n in range(4):
            hyp_grams = Counter(zip(*(hyp[i:] for i in range(n + 1)), strict=False))
            ref_grams = Counter(zip(*(ref[i:] for i in range(n + 1)), strict=False))
            match[n] += (hyp_grams & ref_grams).total()
            total[n] += hyp_grams.total()
    if not any(match) or 0 in total:
        return 0.0

    log_precision = 0.0
    smoothed = 1.0
    for m, t in zip(match, total, strict=True):
        if m == 0:
            smoothed /= 2
        log_precision += math.log(100 * (m or smoothed) / t) / 4
    brevity = min(1.0, math.exp(1 - n_ref / n_hyp))
    return brevity * math.exp(log_precision)


@torch.no_grad()
def mean_nll(model, corpus, dev, autocast):
    """Mean negative log-likelihood of a target id, in nats, computed by all processes together."""
    loss_fn = Loss(model, 0.0)
    total = 0.0
    for rows in plan_epoch(corpus, 4096, 0, 0)[rank::world]:
        x, y = to_device(corpus.batch(rows), dev)
        with autocast:
            _, nll = loss_fn(x, y)
        total += nll.item()
    _, n_tgt = corpus.count(np.arange(len(corpus)))
    return sum(gathered(total)) / n_tgt


def translations(model, tokenizer, lines, amp, beam_size, alpha):
    """Translations of the lines, a hundred of like length at a time, by all processes together."""
    fast = for_inference(model, "bfloat16" if amp == torch.bfloat16 else "float32")
    order = sorted(range(len(lines)), key=lambda i: -len(lines[i]))
    parts = [order[i:i + 100] for i in range(0, len(order), 100)]
    found = {}                                          # number of the line -> translation
    for part in parts[rank::world]:
        texts = [lines[i] for i in part]
        results = translate(fast, tokenizer, texts, beam_size, alpha)
        for i, best in zip(part, results, strict=True):
            text, _ = best[0]
            found[i] = text
        n = min(len(found) * world, len(lines))         # the others are about as far
        progress(f"translating: {n:,} of {len(lines):,} lines")
    for others in gathered(found):
        found |= others
    return [found[i] for i in range(len(lines))]


# ---- what a run leaves -----------------------------------------------------------------

def set_aside(paths):
    """Renames the files of an older run: .old is added, or where that is taken .old2, and so on."""
    ending = ".old"
    n = 1
    while any(os.path.exists(path + ending) for path in paths):
        n += 1
        ending = f".old{n}"
    for path in paths:
        if os.path.exists(path):
            os.rename(path, path + ending)
            say(f"an earlier run's {path} is now {path}{ending}")


def open_log(path):
    """log.jsonl, to be continued. A full disk may have left half a line at its end: that goes."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")


def record(log, **values):
    """One line of log.jsonl, if this process writes one."""
    if log:
        values["seconds"] = round(time.time() - start_time, 2)
        log.write(json.dumps(values) + "\n")
        log.flush()


def save_model(path, model, tokenizer, alpha=0.6):
    """Writes model.pt, on rank 0. alpha: its length penalty, if that is not set."""
    if rank == 0:
        save(path, model, tokenizer, alpha if length_penalty < 0 else length_penalty)


def due(step, interval):
    """Is this step the last of an interval, or of the run?"""
    return step % interval == 0 or step == max_steps


stop_signal = 0


def on_signal(number, frame):
    """The first SIGTERM or Ctrl-C asks the loop to save and leave; a second one ends it at once."""
    global stop_signal
    stop_signal = number
    for either in (signal.SIGTERM, signal.SIGINT):
        signal.signal(either, signal.SIG_DFL)


if __name__ == "__main__":
    start_time = time.time()
    sys.excepthook = explain
    sys.stdout.reconfigure(errors="replace")            # prints ? for what the terminal can't show

    # ---- settings: the defaults, then the recipe or last.pt, then the command line ---------
    given = override(settings, sys.argv[1:], __file__)
    if given.get("max_steps") and given.get("epochs"):
        fail("--max_steps and --epochs both say how long the run is: give one of them")
    globals().update(given)
    model_path = os.path.join(out_dir, "model.pt")
    last_path = os.path.join(out_dir, "last.pt")
    log_path = os.path.join(out_dir, "log.jsonl")

    state = None                                        # of the run to go on with
    trained = None                                      # the model to start from
    tokenizer = None
    has_last = os.path.exists(last_path)
    # torchrun starts the same command again and again. So there, --resume=True may also be given
    # at the first start, with what the run needs.
    can_start = world > 1 and bool(given.keys() - {"resume", "out_dir"})
    if resume and not has_last and not can_start:
        fail(f"--resume=True, but there is no {last_path}; start without it")
    if resume and init_from and not can_start:
        fail("--init_from starts a new run, --resume=True goes on with one: choose")
    if has_last and (resume or restarts):
        state = read_checkpoint(last_path)
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            fail(f"{last_path} is not a checkpoint that this train.py can resume from")
        # A restart is the same command as before. If another one has made this file, it is of an
        # earlier run, and this one crashed before it had a last.pt of its own: it begins anew.
        if not resume and state.get("command") != sys.argv[1:]:
            state = None
    if state:
        # 0 asks for a value to be worked out. That was done when the run began, so it stays.
        for name in ("max_steps", "accumulate", "learning_rate"):
            if given.get(name) == 0:
                del given[name]
        refuse_changes(last_path, state["settings"], FIXED, given)
        for name, value in state["settings"].items():
            known = name in settings and type(value) is type(settings[name])
            if known and name not in ("out_dir", "resume"):
                globals()[name] = value
        if bool(given.get("muon", muon)) != bool(muon):
            fail(f"{last_path} was made with --muon={muon}, which can't be turned on or off")
    elif init_from:
        trained, tokenizer = load(init_from)
        if tokenizer is None or not src:
            fail(f"--init_from={init_from} needs a model of text, and --src and --tgt")
        sizes = {name: getattr(trained.config, name) for name in SIZES}
        refuse_changes(init_from, sizes, SIZES, given)
        globals().update(recipe() | FINE_TUNING | sizes)
    elif src:
        globals().update(recipe())
    globals().update(given)
    if given.get("epochs"):
        max_steps = 0
    check_settings()
    if state:
        config = Config(**state["config"])
    elif trained:
        config = trained.config
    else:
        config = Config(vocab_size, d_model, n_heads, d_ff, n_encoder_layers, n_decoder_layers,
                        dropout, norm_first)
    config = replace(config, dropout=dropout)

    # ---- this process among the others, and its folder -------------------------------------
    dev = find_device(device, local_rank)
    cuda = dev.type == "cuda"
    if dtype != "auto":
        amp = getattr(torch, dtype)
    elif has_bfloat16(dev) and (cuda or d_model >= 128):    # narrow ones don't win back the casts
        amp = torch.bfloat16
    elif cuda:
        amp = torch.float16
    else:
        amp = torch.float32
    if cuda:
        torch.cuda.set_device(dev)
        torch.backends.cuda.enable_cudnn_sdp(False)     # it makes a new plan for every new shape
    elif world > 1:
        torch.set_num_threads(max(1, available_cores() // local_world))
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()

    accumulate = accumulate or world
    if accumulate % world:
        good = ", ".join(str(n) for n in range(1, accumulate + 1) if accumulate % n == 0)
        fail(f"--accumulate={accumulate} can be shared by {good} processes, not by {world}")
    micro_tokens = batch_tokens // accumulate
    if micro_tokens < max_len:
        fail(f"a micro-batch has {batch_tokens} // {accumulate} = {micro_tokens} ids, fewer than "
             f"--max_len={max_len}: raise --batch_tokens, or lower --accumulate or --max_len")

    if rank == 0:
        os.makedirs(out_dir, exist_ok=True)
        lock = open(os.path.join(out_dir, "lock"), "w")     # held until this process ends
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"another run is writing to {out_dir}; give this one its own --out_dir")
        except OSError:                     # a file system without locks
            pass

    # ---- data --------------------------------------------------------------------------------
    val = None                                          # Corpus of the validation text
    val_pairs = []
    if src:
        if val_src:                                     # first, so that its mistakes show at once
            val_pairs = list(read_pairs(val_src, val_tgt))
        if state and state["merges"] is None:
            fail(f"{last_path} is of the copy task, so no text fits it: leave out --src and --tgt")
        if state:
            tokenizer = Tokenizer(state["merges"])
        say(f"preparing {src} and {tgt} ...")
        corpus, tokenizer, index = prepare(os.path.join(out_dir, "data"), tokenizer)
        n_words = len(tokenizer)
        if index["damaged"]:
            say(f"{index['damaged']:,} lines have bytes that are not UTF-8: they become U+FFFD")
        if len(val_pairs) > 2000:
            say(f"until the end, validation takes the first 2,000 of {len(val_pairs):,} pairs")
        if val_pairs:
            val = Corpus.of([[tokenizer.encode(line)[:max_len - 1] for line in pair]
                             for pair in val_pairs[:2000]])
    else:
        pairs = copy_task(20_000, seed)
        corpus = Corpus.of(pairs)
        val = Corpus.of(copy_task(1_000, seed + 1, without=pairs))
        index = {"digest": "", "merges": None, "left_out": {}}
        n_words = vocab_size
    digests = [index["digest"], hashlib.sha256(repr(val_pairs).encode()).hexdigest()]
    if state and state["digests"][0] != digests[0]:
        fail(f"{last_path} was made from another text than {src} and {tgt}")

    steps_per_epoch = len(plan_epoch(corpus, micro_tokens, seed, 0)) / accumulate
    max_steps = max_steps or max(1, round(epochs * steps_per_epoch))
    if state and decay == "linear" and max_steps > state["settings"]["max_steps"]:
        say("a longer run: the learning rate goes back up to where the longer schedule has it")
    # Where Eq. 3 peaks with the warm-up that was asked for. To cut that does not raise the rate.
    learning_rate = learning_rate or (d_model * warmup_steps) ** -0.5
    if not state and "warmup_steps" not in given:       # the recipe's is too long for a short run
        warmup_steps = max(1, min(warmup_steps, max_steps // 10))

    # ---- model and optimizers ----------------------------------------------------------------
    if world > 1:
        # torchrun may keep one store over its restarts, with what the dead have left in it. So each
        # restart gets a part of its own.
        part = str(restarts) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else ""
        timeout = timedelta(seconds=group_timeout)
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=dist.PrefixStore(part, store),
            rank=rank, world_size=world, timeout=timeout)
        sys.excepthook = explain        # torch has put one around it that loses what is printed
    if not state and not trained:
        config = replace(config, vocab_size=n_words)    # a small text has fewer than were asked for
    torch.manual_seed(seed)
    model = Transformer(config)
    if trained:
        model.load_state_dict(trained.state_dict())
    model = model.to(dev).train()
    # A second module for validation, never compiled. Its weights are the same tensors, so it knows
    # every update.
    plain = copy.deepcopy(model).eval()
    plain.load_state_dict(model.state_dict(), assign=True)
    optimizers = make_optimizers(model, dev)
    scaler = torch.amp.GradScaler(dev.type, enabled=amp == torch.float16)
    autocast = torch.autocast(dev.type, amp, enabled=amp != torch.float32)

    step = 0
    best = math.inf                                     # the lowest validation nll
    n_worse = 0                                         # validations since that one
    recent = []                                         # rank 0: the checkpoints to average
    if state:
        step = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if rank == 0:
            recent = state["recent"][-average_last:]
        if state["digests"] == digests:
            best = state["best"]
            n_worse = state["n_worse"]
        else:
            say("the validation text has changed, so the best score so far no longer counts")
        del state                                       # its weights take memory
    resumed_at = step

    # ---- compilation -------------------------------------------------------------------------
    loss_fn = Loss(model, label_smoothing)
    # The whole run counts, not what is left of it: a resumed run has to compute the same bits.
    compiled = compile == "True" or (compile == "auto" and max_steps >= COMPILE_STEPS)
    if compiled:
        reasons = [reason for reason in gathered(why_not_compile(dev)) if reason]
        if reasons:
            say(f"torch.compile does not work here, so the run goes on without: {reasons[0]}")
            compiled = False
    if compiled:
        loss_fn.compile_parts()
    step_fn = loss_fn
    if world > 1:
        step_fn = nn.parallel.DistributedDataParallel(loss_fn)

    # ---- what is about to run ----------------------------------------------------------------
    now = {name: globals()[name] for name in settings}
    for r, theirs in enumerate(gathered([now, digests, step, torch.__version__])):
        if theirs != [now, digests, step, torch.__version__]:
            fail(f"rank {r} has other settings, text or torch than rank {rank}: {theirs}")

    # Only now, when nothing can be wrong with the command any more, does a new run rename what an
    # older one has left in the folder.
    if rank == 0 and resumed_at == 0:
        set_aside([last_path, model_path, log_path])
    log = open_log(log_path) if rank == 0 else None

    changed = " ".join(f"{name}={value}" for name, value in now.items() if value != settings[name])
    where = torch.cuda.get_device_name(dev) if cuda else f"{dev}, {torch.get_num_threads()} threads"
    n_src, n_tgt = corpus.count(np.arange(len(corpus)))
    left_out = ", ".join(f"{n} {reason}" for reason, n in index["left_out"].items() if n)
    say(f"settings  {changed}\n"
        f"machine   {world} x {where}, torch {torch.__version__}, {amp}, compiled: {compiled}\n"
        f"model     {sum(weight.numel() for weight in model.parameters()):,} parameters\n"
        f"data      {len(corpus):,} pairs, {n_src:,} + {n_tgt:,} ids, "
        f"left out: {left_out or 'none'}\n"
        f"run       {max_steps:,} steps, {steps_per_epoch:.1f} an epoch, micro-batches in a step: "
        f"{accumulate}")
    if step:
        say(f"resumed   from {last_path}, after step {step:,}")

    # The compiler makes its choices by the first batch that it meets. For a resumed run to compute
    # the same bits, that is always the first batch of the run. What it gives is thrown away.
    if compiled and step < max_steps:
        say("compiling, which takes a minute or two")
        first = next(micro_batches(corpus, micro_tokens, seed, accumulate, 0))
        x, y = to_device(corpus.batch(first[rank]), dev)
        with autocast:
            loss, _ = step_fn(x, y)
        loss.backward()
        model.zero_grad(set_to_none=True)

    # ---- training ----------------------------------------------------------------------------
    if world == 1:      # of several processes, each could hear a signal at another step, and wait
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
    # The sums of loss and nll since the last progress line stay on the device. To read a number
    # from a GPU is to wait until it has done all it was given, so that happens for a line only.
    totals = torch.zeros(2, dtype=torch.float32 if dev.type == "mps" else torch.float64, device=dev)
    n_targets = 0
    n_ids = 0
    n_steps = 0
    intervals = (log_interval, eval_interval, checkpoint_interval)
    skipped = 0
    leave = 0                                           # the signal that asks this run to stop
    tick = time.time()
    steps = micro_batches(corpus, micro_tokens, seed, accumulate, step)
    while True:
        # ---- once in a while: validate, save, stop -----------------------------------------
        # All this is about the step that has just been taken. It stands before the next one, so
        # that a finished run takes no further step when it is resumed. Right after resuming it is
        # left out: it was done before last.pt was written.
        pause = time.time()
        if step > resumed_at and val and due(step, eval_interval):
            nll = mean_nll(plain, val, dev, autocast)
            perplexity = math.exp(min(nll, 50))
            record(log, step=step, val_nll=nll, val_perplexity=perplexity)
            say(f"step {step:6d}  validation nll {nll:.4f}  perplexity {perplexity:.2f}")
            n_worse += 1
            if nll < best:
                best = nll
                n_worse = 0
                save_model(model_path, plain, tokenizer)
        finished = step >= max_steps or (patience and n_worse >= patience)
        if step > resumed_at and (due(step, checkpoint_interval) or leave or finished):
            if rank == 0 and average_last > 1 and due(step, checkpoint_interval):
                weights = {name: weight.detach().to("cpu", copy=True)
                           for name, weight in model.named_parameters()}
                recent = [*recent, weights][-average_last:]
            if rank == 0:
                write_atomically(last_path, {
                    "version": STATE_VERSION, "command": sys.argv[1:],
                    "settings": now, "config": vars(config),
                    "merges": index["merges"], "digests": digests,
                    "step": step, "best": best, "n_worse": n_worse, "recent": recent,
                    "model": model.state_dict(), "scaler": scaler.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            if not val:
                save_model(model_path, plain, tokenizer)
        if leave:
            say(f"{signal.Signals(leave).name} after step {step:,}; to go on: "
                f"python train.py --resume=True --out_dir={out_dir}")
            sys.exit(128 + leave)
        if finished:
            break
        tick += time.time() - pause

        # ---- the step --------------------------------------------------------------------
        step += 1
        for optimizer, peak in zip(optimizers, (learning_rate, muon), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, peak)

        # Every process knows the whole plan, and so how many target ids all of them have.
        batches = next(steps)
        n_src, n_tgt = corpus.count(np.concatenate(batches))
        for j in range(rank, accumulate, world):
            x, y = to_device(corpus.batch(batches[j]), dev)
            # A hash of the three numbers: their sum would be the same in another step.
            mixed = np.random.SeedSequence((seed, step, j)).generate_state(1)
            torch.manual_seed(int(mixed[0]))
            if world > 1:                               # gradients are exchanged once a step
                step_fn.require_backward_grad_sync = j + world >= accumulate
            with autocast:
                loss, nll = step_fn(x, y)
            mean_loss = loss * (world / n_tgt)          # DDP takes the mean over ranks: undo that
            scaler.scale(mean_loss).backward()
            totals += torch.stack((loss.detach(), nll.detach()))

        for optimizer in optimizers:
            scaler.unscale_(optimizer)                  # or clipping would clip the scale
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        # A gradient that is not finite ends the run. To look at it is to wait for a GPU, so there
        # the run looks only before it writes something. NaN stays NaN in all steps between.
        leave = stop_signal             # read once for this step: a signal may come at any moment
        look = not cuda or scaler.is_enabled() or leave
        look = look or any(due(step, interval) for interval in intervals)
        finite = not look or bool(norm.isfinite())
        # In float16 a gradient may overflow only because its scale is too large.
        scaled_up = scaler.is_enabled() and scaler.get_scale() >= 1
        if not finite and not scaled_up:
            fail(f"the gradient is {norm.item()} at step {step:,}, or on a GPU shortly before; "
                 f"{last_path} is from before; lower --learning_rate?")
        if finite:
            for optimizer in optimizers:
                scaler.step(optimizer)
        else:                                           # scale less, and go on
            skipped += 1
        scaler.update()
        model.zero_grad(set_to_none=True)
        # ---- end of the step -------------------------------------------------------------

        n_targets += n_tgt
        n_ids += n_src + n_tgt
        n_steps += 1
        if due(step, log_interval):
            if world > 1:
                dist.all_reduce(totals)
            loss, nll = (totals / n_targets).tolist()
            perplexity = math.exp(min(nll, 50))
            rate = learning_rate_at(step, learning_rate)
            seconds = time.time() - tick
            left = timedelta(seconds=int((max_steps - step) * seconds / n_steps))
            record(log, step=step, loss=loss, nll=nll, perplexity=perplexity, learning_rate=rate,
                   grad_norm=norm.item(), skipped=skipped, tokens_per_second=n_ids / seconds)
            say(f"step {step:6d}  loss {loss:.4f}  nll {nll:.4f}  ppl {perplexity:8.2f}  "
                f"lr {rate:.2e}  norm {norm.item():.2f}  {n_ids / seconds:,.0f} ids/s  left {left}")
            totals.zero_()
            n_targets = 0
            tick = time.time()
            n_ids = 0
            n_steps = 0

    # ---- the end -----------------------------------------------------------------------------
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if stop_signal:                                     # it came with the last step, which is saved
        sys.exit(128 + stop_signal)
    if step < max_steps:
        say(f"step {step:6d}  {patience} validations without a better one: enough")
    n_averaged = gathered(len(recent))[0]
    if n_averaged > 1:                                  # §6.1
        for name, weight in model.named_parameters():
            if rank == 0:
                mean = torch.stack([weights[name] for weights in recent]).mean(0)
                weight.data.copy_(mean)
            if world > 1:
                dist.broadcast(weight.data, 0)
        say(f"model.pt may become the mean of the last {n_averaged} checkpoints")
        nll = -math.inf
        if val:
            nll = mean_nll(plain, val, dev, autocast)
            say(f"its validation nll is {nll:.4f}, the best so far {best:.4f}")
        if nll < best:
            save_model(model_path, plain, tokenizer)
    gathered(None)                                      # wait until rank 0 has written model.pt
    final, _ = load(model_path, dev)

    if val_pairs:
        sources, references = zip(*val_pairs, strict=True)
        text = "".join(references)
        if bleu_tokenize == "13a" and text.count(" ") < len(text) / 20:
            say("the references have almost no spaces: --bleu_tokenize=char counts characters")
        penalties = [0.6, 1.0, 1.4]
        if length_penalty >= 0:
            penalties = [length_penalty]
        scores = {}
        for alpha in penalties:
            out = translations(final, tokenizer, sources, amp, beam_size, alpha)
            scores[alpha] = bleu(out, references, WORDS[bleu_tokenize])
        alpha = max(scores, key=scores.get)
        save_model(model_path, final, tokenizer, alpha)
        say(f"validation BLEU {scores[alpha]:.2f}, all {len(references):,} lines (tokenizer "
            f"{bleu_tokenize}, beam {beam_size}, length penalty {alpha})")
        record(log, step=step, bleu=scores[alpha])
    if not src:
        x, _ = val.batch(np.arange(len(val)))
        out, _ = beam_search(final, x.to(dev), beam_size=1, max_len=x.size(1))
        out = F.pad(out.cpu(), (0, x.size(1) - out.size(1)))
        accuracy = (out == x).all(1).float().mean().item()
        say(f"exact-sequence accuracy on {len(val):,} unseen sequences: {accuracy:.1%}, as in\n"
            f"  in   {x[0].tolist()}\n  out  {out[0].tolist()}")
        record(log, step=step, accuracy=accuracy)
    took = timedelta(seconds=int(time.time() - start_time))
    say(f"{took} in all; the model is {model_path}")
    if src:
        say(f"use it:  python transformer.py --checkpoint={model_path} < in.txt > out.txt")

    if world > 1:           # what exchanges gradients must be gone before the group that it uses
        step_fn = loss = nll = mean_loss = None
        gc.collect()
        dist.destroy_process_group()
