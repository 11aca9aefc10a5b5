# SPDX-License-Identifier: MIT
"""
Training a Transformer: Section 5 of the paper, from two text files to a translator.

    python train.py                                 # learns to copy, in about half a minute
    python train.py --src=a.en --tgt=a.de --val_src=b.en --val_tgt=b.de --out_dir=out
    python train.py --out_dir=out                   # goes on with the run in out
    torchrun --nproc_per_node=2 train.py ...        # the same run on two GPUs, or two CPU processes

Every setting below can be overridden as --name=value. --help prints them.

Where to begin: search for "---- the step". Those thirty lines are the training; the loop around
them, at the end of this file, is the whole of a run. Above it stand the functions that the step
calls (schedule, optimizers, loss), then text and batches, then validation, then how a run begins.

Three ideas keep this file short.

The folder is the run. out_dir holds data.pt (the text as ids, and the tokenizer), last.pt (all that
the next step needs), model.pt (the best model so far, or without validation the newest) and
log.jsonl. The same command again goes on where last.pt is. A run that has ended says so, and
changes nothing.

Step n follows from last.pt, data.pt and n. A step is the sum of `accumulate` micro-batches, each of
them computed at once. Their sentences follow from the seed and the epoch, the random numbers of
micro-batch j from the seed, n and j. It makes no difference which process computes it. So with the
same `accumulate`, the number of processes does not change the run.

All gradients are one tensor. Each weight's gradient is a view into it. So several processes sum
their gradients in one call, and one norm clips them.
"""

# The other imports stand below the settings, because a reader wants these first.
from transformer import settings_of

# ---- settings ---------------------------------------------------------------
# The defaults train the copy task. With --src, a column of RECIPES below takes the place of what
# the command line leaves open: a recipe for small texts and few hours, or the paper's.
src = ""                    # source side of the training text, one sentence per line; "": copy task
tgt = ""                    # target side: line i is the translation of line i of src
val_src = ""                # validation text, likewise; "": none
val_tgt = ""                # and its target side
out_dir = "out"             # everything this run writes goes here; a run in it goes on
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
batch_tokens = 1280         # a step has at most so many source ids, and as many target ids, with
                            # padding; all processes together
accumulate = 0              # micro-batches in a step, on all processes together; 0: as few as fit
max_steps = 600             # optimizer steps; 0: as many as `epochs` needs
epochs = 0.0                # passes over the training pairs, if max_steps is 0
learning_rate = 3e-3        # of Adam after warm-up; 0: the paper's (d_model * warmup_steps)^-0.5
muon = 5e-3                 # of Muon (see below), which trains the layers' matrices, and lets them
                            # decay by 0.1 times the rate; 0: Adam trains all, as in the paper
embedding_decay = 0.0       # AdamW's weight decay of the embeddings; 0: none, as in the paper
warmup_steps = 30           # steps of linear rise; unless given, at most a tenth of the run
decay = "linear"            # of the rate: inverse_sqrt (§5.3); linear: in the second half, to 0
grad_clip = 1.0             # largest norm of the gradient; 0: no clipping
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
dtype = "auto"              # of matrix products: bfloat16, float32; auto: bfloat16 in hardware
compile = "auto"            # True, False; auto: where the run has steps enough to win the time back
# ---- end of settings --------------------------------------------------------
settings = settings_of(globals())

import copy
import ctypes
import gzip
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zlib
from array import array
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from transformer import (
    BOS, EOS, PAD, Config, Tokenizer, Transformer, beam_search, bleu, clean, cuda_graph, fail,
    find_device, for_inference, has_bfloat16, load, override, read_checkpoint, save, translate,
    write_atomically)

try:
    import fcntl
except ImportError:         # Windows has no such locks
    fcntl = None

# What a text gets: its column is the first whose millions of characters, both sides together, are
# enough. The last is the paper's base model. A small text needs a small model, much dropout and
# many epochs. Muon is not the paper's: it learns more from each pair than Adam does, which counts
# where pairs are few.
RECIPES = """
millions                0.5       2      15     100     600           inf
vocab_size             1000    3000    8000   10000   32000         37000
max_len                 128     256     256     256     256           256
d_model                 128     128     128     256     512           512
d_ff                    256     256     256    1024    2048          2048
n_heads                   4       4       4       4       8             8
n_encoder_layers          2       4       4       4       6             6
n_decoder_layers          2       4       4       4       6             6
norm_first             True    True    True    True    True         False
dropout                 0.2     0.3     0.2     0.2     0.1           0.1
batch_tokens           1024    4096    4096    4096    8192         25000
max_steps                 0       0       0       0       0        100000
epochs                  120      50      36      20      15             0
learning_rate          4e-3    4e-3    4e-3    2e-3    1e-3             0
muon                   1e-2    1e-2    1e-2    1e-2    1e-2             0
embedding_decay         0.1     0.1     0.1     0.1     0.1             0
warmup_steps            200     200     200     200    1000          4000
decay                linear  linear  linear  linear  linear  inverse_sqrt
grad_clip                 1       1       1       1       1             0
patience                  5       5       5       5       5             0
eval_interval           100     500     500     500     500          1000
checkpoint_interval     100     500     500     500     500          1000
"""

# What makes the model; and what makes the model, the data or the step, and can't change in a run.
SIZES = "vocab_size d_model d_ff n_heads n_encoder_layers n_decoder_layers norm_first"
FIXED = ("src tgt init_from batch_tokens accumulate seed max_len max_ratio embedding_decay "
         + SIZES)

# The numbers that must be at least 1, and two others; all else must be at least 0. Then the words
# that a setting may be.
FROM_1 = ("max_len max_ratio batch_tokens warmup_steps log_interval eval_interval "
          "checkpoint_interval beam_size")
LEAST = dict.fromkeys(FROM_1.split(), 1) | {"vocab_size": EOS + 4, "length_penalty": -1}
CHOICES = dict(decay="inverse_sqrt linear", compile="auto True False",
               bleu_tokenize="13a none char", dtype="auto float32 bfloat16")

VERSION = 2                 # of the form of last.pt
COMPILE_STEPS = {"cpu": 1500, "cuda": 20_000}   # a run of fewer steps ends sooner uncompiled
GRAPH_SIZE = 5e6            # ids x width up to which a GPU works faster than Python launches
MOST_GRAPHS = 256           # shapes that get a graph; others run without

# torchrun starts several processes, `world` of them. This one is number `rank`, from 0 on. On its
# own machine it is number `local_rank` of `local_world`.
rank = int(os.environ.get("RANK", "0"))
world = int(os.environ.get("WORLD_SIZE", "1"))
local_rank = int(os.environ.get("LOCAL_RANK", "0"))
local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def say(text):
    """Of all processes, the first alone speaks."""
    if rank > 0:
        return
    try:
        print(text, flush=True)
    except OSError:         # a closed terminal, or a reader that is gone, must not end the run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


next_progress = time.time() + 10


def progress(n):
    """In slow work that goes through lines of text: says every ten seconds how far it is."""
    global next_progress
    if time.time() > next_progress:
        next_progress = time.time() + 10
        say(f"{n:,} lines so far")


# ---- §5.3 Optimizers ---------------------------------------------------------------

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
    Five Newton-Schulz iterations come near with products alone. Each takes every singular value s
    to a·s + b·s³ + c·s⁵, and so brings all but the tiniest close to 1. The coefficients are those
    of Jordan et al. (2024).
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
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            by_shape = {}
            for weight in group["params"]:
                if weight.grad is not None:
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
        return loss


def make_optimizers(model, dev):
    """AdamW, and Muon for the matrices of the layers if that is on. Frozen weights get neither. The
    projections of keys and of values lie in one matrix (kv), and are one to Muon."""
    embedding = []
    matrices = []
    others = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if name == "embedding.weight":
            embedding.append(weight)
        elif muon and weight.dim() == 2 and name.startswith(("encoder.", "decoder.")):
            matrices.append(weight)
        else:
            others.append(weight)

    groups = [{"params": embedding, "weight_decay": embedding_decay},
              {"params": others, "weight_decay": 0.0}]
    fused = dev.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9, fused=fused)]
    if matrices:
        narrow = has_bfloat16(dev) and dtype != "float32"
        optimizers.append(Muon(matrices, torch.bfloat16 if narrow else torch.float32))
    return optimizers


# ---- §5.4 Dropout and loss ---------------------------------------------------------

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
        # Two rounds of multiply and xorshift, with odd numbers that mix bits well. A shift of an
        # int32 draws in copies of its sign, and the & clears these.
        h = torch.arange(x.numel(), dtype=torch.int32).view(x.shape) * -1640531535 ^ self.seed
        h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D
        h = (h ^ (h >> 15 & 0x1FFFF)) * -2073254261
        kept = (h >> 16 & 0xFFFF) < self.kept
        return torch.where(kept, x * (65536 / self.kept), 0.0)


class Loss(nn.Module):
    """The model and its loss in one module.

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
        dropouts = (self.model.src_dropout, self.model.tgt_dropout)
        for part in (*self.model.encoder, *self.model.decoder, *dropouts):
            part.compile(dynamic=True)
        self.score = torch.compile(self.score, dynamic=True)


# ---- A micro-batch, and on a GPU its graph -----------------------------------------

def flat_gradient(model):
    """One tensor of zeros that holds the gradients of all trained weights: each p.grad is a view
    into it, and backward() adds to it. -> (n,)

    Whatever replaces weights or their gradients (model.to, zero_grad) must have been done before.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    sizes = [weight.numel() for weight in weights]
    flat = torch.zeros(sum(sizes), device=weights[0].device)
    for weight, part in zip(weights, flat.split(sizes), strict=True):
        weight.grad = part.view_as(weight)
    return flat


def make_work(loss_fn, autocast):
    """What is done with a micro-batch: a function of tensors that reads no number from them."""
    def work(x, y, n_tgt):
        """Adds a micro-batch's share to the gradients of the step.

        x: (B, S), y: (B, T + 1), n_tgt: (), the target ids of the whole step
        -> (2,): the sums of loss and nll over this micro-batch
        """
        with autocast:
            loss, nll = loss_fn(x, y)
        (loss / n_tgt).backward()
        return torch.stack((loss.detach(), nll.detach()))

    return work


class Graphs:
    """`work`, launched as a whole: one CUDA graph for each shape of its inputs.

    A micro-batch is more than a thousand kernels, and Python takes longer to launch a small one
    than the GPU to compute it. A graph is recorded once. To replay it is one launch. It computes
    from what its inputs hold then, and its random numbers follow from the seed set then.
    """

    def __init__(self, work, gradient):
        self.work = work
        self.gradient = gradient
        self.graphs = {}                # shapes -> the recorded inputs, the graph, its result
        self.most = MOST_GRAPHS
        self.pool = None                # memory that all graphs share

    def __call__(self, *inputs):
        """work(*inputs), right after torch.manual_seed."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.graphs and len(self.graphs) < self.most:
            self.record(shapes, inputs)
        if shapes not in self.graphs:
            return self.work(*inputs)
        kept, graph, result = self.graphs[shapes]
        for there, here in zip(kept, inputs, strict=True):
            there.copy_(here)
        graph.replay()
        return result

    def record(self, shapes, inputs):
        """Makes a graph, and believes it only if it computes what work does. All this must not
        count: at the end the gradient and the seed are what they were."""
        seed = torch.initial_seed()
        before = self.gradient.clone()
        plain = self.alone(self.work, inputs, seed)
        kept = [x.clone() for x in inputs]
        graph, result = cuda_graph(self.work, kept, self.pool)
        self.pool = graph.pool()
        self.graphs[shapes] = (kept, graph, result)
        replayed = self.alone(self, inputs, seed)
        same_loss = math.isclose(plain[0], replayed[0], rel_tol=0.02)
        if not same_loss or not math.isclose(plain[1], replayed[1], rel_tol=0.2):
            print("the run goes on without CUDA graphs: one computed a loss and a norm of "
                  f"{replayed} instead of {plain}")
            self.graphs.clear()
            self.most = 0
        self.gradient.copy_(before)
        torch.manual_seed(seed)

    def alone(self, call, inputs, seed):
        """The loss of one call, and the norm of what it adds to the gradient. -> [float, float]"""
        self.gradient.zero_()
        torch.manual_seed(seed)
        loss, _ = call(*inputs)
        return torch.stack((loss, self.gradient.norm())).tolist()


def filled_up(x, y, size):
    """More padding, so that batches have few shapes, and few graphs serve them. -> x, y

    Each side is widened to a multiple of 4. A batch of `size` ids has the more rows the narrower it
    is, and up to 3 columns may have been added. So rows of nothing but PAD are added up to what the
    narrowest batch can have. Padding changes no loss and no gradient.
    """
    S = x.size(1)
    T = y.size(1) - 1
    more_S = min(-S % 4, max_len - S)
    more_T = min(-T % 4, max_len - T)
    narrowest = max(5, S + more_S - 3, T + more_T - 3)  # the very narrow ones would become too many
    more_rows = max(0, size // narrowest - len(x))
    x = F.pad(x, (0, more_S, 0, more_rows), value=PAD)
    y = F.pad(y, (0, more_T, 0, more_rows), value=PAD)
    return x, y


def to_device(batch, dev):
    """The tensors on that device. A copy to a GPU need not be waited for from pinned memory."""
    if dev.type == "cuda":
        batch = [ids.pin_memory() for ids in batch]
    return [ids.to(dev, non_blocking=True) for ids in batch]


# ---- §5.1 Batches: pairs "batched together by approximate sequence length" ---------

def flat(pairs):
    """Pairs of lists of ids as two arrays, for a Corpus. -> ids, lengths, both int32

    >>> flat([([5, 6], [7])])           # a source: ids, EOS; a target: BOS, ids, EOS
    (array([5, 6, 2, 1, 7, 2], dtype=int32), array([3, 3], dtype=int32))
    """
    ids = array("i")
    lengths = array("i")
    for x, y in pairs:
        for sequence in ([*x, EOS], [BOS, *y, EOS]):
            ids.extend(sequence)
            lengths.append(len(sequence))
    return np.frombuffer(ids, np.int32), np.frombuffer(lengths, np.int32)


class Corpus:
    """Pairs of id sequences, in memory or on disk, from the two arrays that `flat` makes."""

    def __init__(self, ids, lengths):
        self.ids = ids
        self.lengths = lengths.astype(np.int64)
        self.start = np.cumsum(self.lengths) - self.lengths     # where in ids a sequence begins
        self.n_src = self.lengths[0::2]                 # with EOS
        self.n_tgt = self.lengths[1::2] - 1             # with EOS; BOS is no target

    def __len__(self):
        return len(self.n_src)

    def padded(self, sequences):
        """Sequences, by their numbers (B,), as rows filled up with PAD. -> (B, longest) int64"""
        lengths = self.lengths[sequences][:, None]              # (B, 1)
        column = np.arange(lengths.max())                       # (longest,)
        place = self.start[sequences][:, None] + column         # (B, longest)
        ids = self.ids.take(place, mode="clip")     # beyond the end of ids there is nothing to read
        return torch.from_numpy(np.where(column < lengths, ids, PAD).astype(np.int64))

    def batch(self, rows):
        """The pairs with these numbers. -> src (B, S): ids, EOS; tgt (B, T + 1): BOS, ids, EOS"""
        return self.padded(2 * rows), self.padded(2 * rows + 1)


def plan_epoch(corpus, size, seed, epoch):
    """All batches of an epoch, in order: each an array with the numbers of its pairs, and with at
    most `size` ids a side, padding included, or with one longer pair. Every pair is in exactly one.

    The plan follows from its arguments alone: every process makes the same one.
    """
    rng = np.random.default_rng((seed, epoch))

    # Neighbours should be alike on both sides. So pairs are sorted by target length, two lengths to
    # a group, and within a group by source length: rising in one group and falling in the next,
    # so that it does not jump where a group ends. Noise shuffles equals. (lexsort sorts by its last
    # argument first.)
    group = corpus.n_tgt // 2
    up_or_down = np.where(group % 2, -corpus.n_src, corpus.n_src)
    order = np.lexsort((up_or_down + rng.random(len(corpus)), group))

    # It is cut wherever one more pair, with all rows as wide as the widest, would be too much.
    longer = np.maximum(corpus.n_src, corpus.n_tgt)
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


def batches_from(corpus, size, seed, skip):
    """Endless: the batches of one epoch after the other, but for the first `skip`."""
    for epoch in itertools.count():
        plan = plan_epoch(corpus, size, seed, epoch)
        yield from plan[skip:]
        skip = max(0, skip - len(plan))


def copy_task(n, seed):
    """n different sequences of random symbols, each its own translation."""
    rng = np.random.default_rng(seed)
    rows = {}
    while len(rows) < n:
        row = rng.integers(EOS + 1, vocab_size, rng.integers(5, 11))
        rows[tuple(row.tolist())] = None
    return [(row, row) for row in rows]


# ---- §5.1 Text: read, turned into ids, written to data.pt --------------------------

def read_lines(path):
    """The lines of a text file, plain or gzip, each without stray spaces. Only \n ends one."""
    n = 0
    try:
        with open(path, "rb") as file:
            text = file
            if file.peek(2)[:2] == b"\x1f\x8b":         # its first bytes say so, not its name
                text = gzip.open(file)
            for line in text:
                n += 1
                yield clean(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        fail(f"line {n:,} of {path} is not UTF-8; if it is Latin-1, this makes it so: "
             f"iconv -f latin1 -t utf-8 {shlex.quote(path)} > new.txt")
    except (OSError, EOFError, zlib.error) as error:
        fail(f"cannot read {path} after line {n:,}: {error}")


def read_pairs(src_path, tgt_path):
    """(source line, target line), to the end of both files."""
    n = 0
    for x, y in itertools.zip_longest(read_lines(src_path), read_lines(tgt_path)):
        if x is None or y is None:
            fail(f"{src_path} and {tgt_path} must have as many lines, but one ends after {n:,}")
        n += 1
        progress(n)
        yield x, y
    if n == 0:
        fail(f"{src_path} and {tgt_path} are empty, expected one sentence a line")


def learn_tokenizer():
    """The tokenizer for both sides of the training text. Rare words don't decide a merge, but they
    fill the memory, so not all of them are taken."""
    counts = Counter()
    for pair in read_pairs(src, tgt):
        for line in pair:
            counts.update(Tokenizer.words(line))
    counts = Counter(dict(counts.most_common(500_000)))
    return Tokenizer.train(counts, vocab_size)


def fit_pairs(pairs, left_out):
    """Yields the pairs of ids that are fit for training, and counts the others by their reason."""
    for x, y in pairs:
        short, long = sorted((len(x), len(y)))
        if short == 0:
            left_out["empty"] += 1
        elif long >= max_len:
            left_out["too long"] += 1
        elif long > max_ratio * short + 5:
            left_out["of unlikely proportions"] += 1
        else:
            yield x, y


def write_data(pairs, merges):
    """Writes data.pt: the ids of the pairs that are fit for training, and the tokenizer."""
    left_out = Counter()
    ids, lengths = flat(fit_pairs(pairs, left_out))
    if not len(ids):
        fail(f"no pair of {src} and {tgt} is fit for training; left out: {dict(left_out)}")
    write_atomically(place("data.pt"), dict(
        ids=torch.from_numpy(ids), lengths=torch.from_numpy(lengths), merges=merges,
        left_out=dict(left_out)))


def read_data():
    """What write_data wrote; the ids stay on the disk. -> Corpus, Tokenizer or None, left_out"""
    data = or_fail(read_checkpoint, place("data.pt"), mapped=True)
    tokenizer = None
    if data["merges"] is not None:
        tokenizer = Tokenizer(data["merges"])
    return Corpus(data["ids"].numpy(), data["lengths"].numpy()), tokenizer, data["left_out"]


# ---- validation --------------------------------------------------------------------

def validation_ids(tokenizer):
    """The ids of the first 2,000 pairs of the text to validate with: they do until the end.
    -> [[source ids, target ids], ...]"""
    if not val_src:
        return []
    pairs = list(read_pairs(val_src, val_tgt))
    return [[tokenizer.encode(line)[:max_len - 1] for line in pair] for pair in pairs[:2000]]


@torch.no_grad()
def mean_nll(model, corpus, batches, dev, autocast):
    """What these batches add to the mean negative log-likelihood, in nats, of all target ids of the
    corpus. -> ()"""
    loss_fn = Loss(model, 0.0)
    total = torch.zeros((), device=dev)
    for rows in batches:
        x, y = to_device(corpus.batch(rows), dev)
        with autocast:
            _, nll = loss_fn(x, y)
        total += nll
    return total / corpus.n_tgt.sum()


# ---- the machine -------------------------------------------------------------------

def available_cores():
    """The cores this process may use: in a container or a batch job, fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def set_up(name):
    """Makes torch ready for training on the device of that name: "cuda" is this process's own GPU,
    "auto" the same where there is one, and else the CPU. -> torch.device

    A device that can't be used ends the run in one line.
    """
    dev = or_fail(find_device, name, local_rank)
    if dev.type == "cuda":
        torch.cuda.set_device(dev)      # or every process would wait for the first GPU
        torch.backends.cuda.enable_cudnn_sdp(False)     # it makes a new plan for every new shape
    elif world > 1:
        torch.set_num_threads(max(1, available_cores() // local_world))
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    return dev


def leave_group():
    """Ends what the processes do together; the first goes on alone."""
    dist.destroy_process_group()
    if rank > 0:
        os._exit(0)     # at once: Python's own end may meet a thread of gloo, and abort


def why_not_compile(dev):
    """Compiles a function of one line, to see if that works here. -> the reason why not, or ""."""
    size = 1000 + time.time_ns() % 1_000_000        # a size that no cache of compiled code has seen
    try:
        torch.compile(lambda x: x + x, dynamic=False)(torch.ones(size, device=dev))
    except Exception as error:      # of compilers there are many, and each fails in its own way
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


# ---- how a run begins, or goes on: the first process finds out, and tells the others ------

def place(name):
    """The path of a file of this run."""
    return os.path.join(out_dir, name)


def or_fail(call, *args, **options):
    """call(*args, **options), which refuses a file or sizes that are wrong with a ValueError. Here
    that ends the run in one line."""
    try:
        return call(*args, **options)
    except ValueError as error:
        fail(str(error))


lock = None                 # an open file; until this process ends, no other run writes to out_dir


def hold_folder():
    """Makes out_dir, and locks it. A killed process frees its memory before its lock, so a lock is
    tried for half a minute."""
    global lock
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = open(place("lock"), "w")
    except OSError as error:
        fail(f"cannot write to --out_dir={out_dir}: {error.strerror}")
    for _ in range(30):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(1)
        except (OSError, AttributeError):   # a file system, or a system, without locks
            return
    fail(f"another run is writing to {out_dir}; give this one its own --out_dir")


def check_settings():
    """Ends the run in one line if a setting makes no sense, before anything is written."""
    for name, default in settings.items():
        value = globals()[name]
        least = LEAST.get(name, 0)
        if type(default) in (int, float) and not least <= value <= 1e9:     # nan is neither
            fail(f"--{name} must be from {least} to a billion, got {value!r}")
    for name, choices in CHOICES.items():
        if globals()[name] not in choices.split():
            fail(f"--{name} must be one of: {choices}; got {globals()[name]!r}")
    if bool(src) != bool(tgt) or bool(val_src) != bool(val_tgt) or val_src and not src:
        fail("--src and --tgt belong together, and --val_src and --val_tgt to them, "
             f"got {src!r}, {tgt!r}, {val_src!r}, {val_tgt!r}")
    if not max_steps and not epochs:
        fail("--max_steps and --epochs are both 0: nothing to do")
    if src and vocab_size < 259:
        fail(f"text needs a --vocab_size of at least 259 (3 specials, 256 bytes), got {vocab_size}")
    if max(dropout, label_smoothing) >= 1:
        fail(f"--dropout and --label_smoothing must be below 1, got {dropout}, {label_smoothing}")
    if world > 1 and ":" in device:
        fail(f"--device={device} is one device for {world} processes: say --device=cuda")


def recipe():
    """The column of RECIPES for the size of the training text. -> dict"""
    size = sum(len(x) + len(y) for x, y in read_pairs(src, tgt)) / 1e6
    limits, *rows = [line.split() for line in RECIPES.strip().splitlines()]
    column = next(i for i, limit in enumerate(limits[1:], 1) if size <= float(limit))
    return override(settings, [f"--{row[0]}={row[column]}" for row in rows], __file__)


def refuse(new, fixed, owner):
    """Ends the run if a setting that is fixed is to have another value. new, fixed: dicts"""
    for name, value in fixed.items():
        if new.get(name, value) != value:
            fail(f"{owner} has --{name}={value!r}, which can't become {new[name]!r}: leave it out, "
                 "or begin a new run in another --out_dir")


def settle(base, given):
    """Makes the settings what base says; what is given is stronger. Two dicts"""
    global accumulate, max_steps
    globals().update(base | given)
    if given.get("epochs"):
        max_steps = 0
    check_settings()
    if accumulate == 0:     # as few as fit: the logits, ids x vocabulary, are most of the memory
        dev = set_up(device)
        most = 4e8
        if dev.type == "cuda" and torch.cuda.get_device_properties(dev).total_memory >= 40e9:
            most = 1e9
        accumulate = world
        while batch_tokens // accumulate * vocab_size > most:
            accumulate += world
    if accumulate % world:
        fail(f"--accumulate={accumulate} must be a multiple of the number of processes, {world}")
    if batch_tokens // accumulate < max_len:
        fail(f"a micro-batch has {batch_tokens} // {accumulate} = {batch_tokens // accumulate} "
             f"ids, fewer than --max_len={max_len}: raise --batch_tokens, or lower --accumulate "
             "or --max_len")


def resolve(steps_per_epoch):
    """Works out what else 0 stands for."""
    global max_steps, learning_rate
    max_steps = max_steps or max(1, round(epochs * steps_per_epoch))
    learning_rate = learning_rate or (d_model * warmup_steps) ** -0.5   # where Eq. 3 peaks


def current_settings():
    """All settings, as they are now. -> dict"""
    return {name: globals()[name] for name in settings}


def new_run(given):
    """Begins a run: writes data.pt, and last.pt as it is before the first step. -> that step, 0"""
    global max_len, warmup_steps
    say(f"a new run in {out_dir}")
    config = Config()
    tokenizer = None
    base = {}
    if src and tgt:
        base = recipe()
    if init_from:
        trained, tokenizer = or_fail(load, init_from)
        if tokenizer is None or not src:
            fail(f"--init_from={init_from} needs a model of text, and --src and --tgt")
        config = trained.config
        sizes = {name: getattr(config, name) for name in SIZES.split()}
        refuse(given, sizes, init_from)
        base.update(sizes)
    settle(base, given)
    max_len = min(max_len, config.learned_positions or max_len)     # if it has these (Config)
    sizes = {name: globals()[name] for name in SIZES.split()}
    config = or_fail(replace, config, dropout=dropout, **sizes)

    if src:
        tokenizer = tokenizer or learn_tokenizer()
        val = validation_ids(tokenizer)
        pairs = ([tokenizer.encode(line) for line in pair] for pair in read_pairs(src, tgt))
        write_data(pairs, tokenizer.merges)
    else:
        pairs = copy_task(21_000, seed)
        val = pairs[20_000:]
        write_data(pairs[:20_000], None)
    if src and not init_from:               # a small text has fewer ids than were asked for
        config = replace(config, vocab_size=len(tokenizer))

    corpus, _, _ = read_data()
    steps_per_epoch = len(plan_epoch(corpus, batch_tokens // accumulate, seed, 0)) / accumulate
    resolve(steps_per_epoch)
    if "warmup_steps" not in given:         # the recipe's is too long for a short run
        warmup_steps = max(1, min(warmup_steps, max_steps // 10))
    torch.manual_seed(seed)
    model = Transformer(config)
    if init_from:
        model.load_state_dict(trained.state_dict())
    write_atomically(place("last.pt"), dict(
        version=VERSION, settings=current_settings(), given=given, config=vars(config),
        steps_per_epoch=steps_per_epoch, val=val, step=0, best=math.inf, n_worse=0,
        log_bytes=0, ended=False, model=model.state_dict(), optimizers=[]))
    return 0


def go_on(given):
    """Goes on with the run in out_dir. Its settings stand, but for what is new. -> its last step"""
    state = or_fail(read_checkpoint, place("last.pt"))
    if not isinstance(state, dict) or state.get("version") != VERSION:
        fail(f"{place('last.pt')} is not of a run that this train.py can go on with: "
             "begin a new one in another --out_dir")
    old = state["settings"]
    # What is given again as it was given before is not new. So a 0, whose value was worked out when
    # the run began, is not worked out again.
    new = {name: value for name, value in given.items() if state["given"].get(name) != value}
    fixed = {name: old[name] for name in FIXED.split()}
    if bool(new.get("muon", old["muon"])) != bool(old["muon"]):     # its rate may change, no more
        fixed["muon"] = old["muon"]
    refuse(new, fixed, f"the run in {out_dir}")

    longest = new.get("max_steps") or round(new.get("epochs", 0) * state["steps_per_epoch"])
    if state["ended"] and longest <= old["max_steps"]:
        say(f"{out_dir} holds a run that has ended, {state['step']:,} of {old['max_steps']:,} "
            "steps; a longer --max_steps goes on with it, another --out_dir begins a new one")
        sys.exit(0)
    settle(old, new | {"out_dir": out_dir})
    resolve(state["steps_per_epoch"])
    say(f"going on with the run in {out_dir}, after step {state['step']:,} of {max_steps:,}")
    if max_steps > old["max_steps"]:
        state["n_worse"] = 0
    _, tokenizer, _ = read_data()
    if src:
        val = validation_ids(tokenizer)
        if val != state["val"]:
            say("the validation text has changed, so the best score so far no longer counts")
            state.update(val=val, best=math.inf, n_worse=0)
            new["val"] = "changed"
    if new:
        # Of max_steps and epochs, what was given last counts.
        given = state["given"] | {"max_steps": 0, "epochs": 0.0} | given
        state.update(settings=current_settings(), given=given, ended=False)
        write_atomically(place("last.pt"), state)
    return state["step"]


def begin(argv):
    """Finds out, from the command line and the folder, what is to be done. -> its last step"""
    given = override(settings, argv, __file__)
    if given.get("max_steps") and given.get("epochs"):
        fail("--max_steps and --epochs both say how long the run is: give one of them")
    globals().update(given)
    hold_folder()
    if os.path.exists(place("last.pt")):
        return go_on(given)
    if os.path.exists(place("model.pt")):
        fail(f"{out_dir} has a model.pt, but no last.pt to go on from: give this run another "
             "--out_dir")
    return new_run(given)


# ---- while a run goes on ---------------------------------------------------------------

def record(**values):
    """Adds a line to log.jsonl, on the first process."""
    if rank == 0:
        values["seconds"] = round(time.time() - start_time, 2)
        print(json.dumps(values), file=log, flush=True)


def keep(model):
    """Writes model.pt, on the first process."""
    if rank == 0:
        save(place("model.pt"), model, tokenizer)


def due(step, interval):
    """Is this step the last of an interval, or of the run?"""
    return step % interval == 0 or step == max_steps


stop_signal = 0


def on_signal(number, frame):
    """The first signal asks the loop to save and leave; a second one ends the run at once."""
    global stop_signal
    if stop_signal:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    stop_signal = number


if __name__ == "__main__":
    start_time = time.time()

    # ---- the first process decides, and tells the others -----------------------------------
    if world > 1:
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        # torchrun may keep its store over restarts, with what ended processes have put there. So
        # each restart has a part of its own.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    if rank == 0:
        decision = 1                # an exit status; or, to go on, the settings and the last step
        try:
            step = begin(sys.argv[1:])
            decision = current_settings() | {"step": step}
        except SystemExit as stop:
            decision = stop.code
            raise
        finally:
            if world > 1:
                store.set("decision", json.dumps(decision))
                time.sleep(1)       # the store may end with this process: now all have read it
    else:
        store.wait(["decision"], timedelta(days=1))
        decision = json.loads(store.get("decision"))
        if type(decision) is int:
            sys.exit(decision)
        globals().update(decision)                      # `step` too

    # ---- this process among the others -----------------------------------------------------
    dev = set_up(device)
    cuda = dev.type == "cuda"
    amp = torch.float32                                 # the dtype of matrix products
    if dtype != "auto":
        amp = getattr(torch, dtype)
    elif has_bfloat16(dev) and (cuda or d_model >= 128):    # narrow ones don't win back the casts
        amp = torch.bfloat16
    autocast = torch.autocast(dev.type, amp, enabled=amp != torch.float32)
    if world > 1:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)

    # ---- data, model and optimizers, as they were after the last step ----------------------
    corpus, tokenizer, left_out = read_data()
    state = or_fail(read_checkpoint, place("last.pt"))
    if state["step"] != step:
        fail(f"rank {rank} finds step {state['step']} in {place('last.pt')}, rank 0 finds {step}: "
             "all machines must share --out_dir")
    best = state["best"]                                # the lowest validation nll
    n_worse = state["n_worse"]                          # validations since that one
    config = replace(Config(**state["config"]), dropout=dropout)
    model = Transformer(config)
    model.load_state_dict(state["model"])
    if length_penalty >= 0:
        model.length_penalty = length_penalty           # goes into model.pt
    model = model.to(dev).train()
    if world > 1:                                       # should another machine see an older file
        for weight in model.parameters():
            dist.broadcast(weight.data, 0)
    # A second module for validation, never compiled. Its weights are the same tensors, so it knows
    # every update.
    plain = copy.deepcopy(model).eval()
    plain.load_state_dict(model.state_dict(), assign=True)
    optimizers = make_optimizers(model, dev)
    for optimizer, values in zip(optimizers, state["optimizers"], strict=False):
        optimizer.load_state_dict(values)               # before the first step there are none
    val_plan = []
    if state["val"]:
        val = Corpus(*flat(state["val"]))
        val_plan = plan_epoch(val, 4096, 0, 0)
    if rank == 0:                                       # log.jsonl up to where last.pt was written
        log = open(place("log.jsonl"), "a")
        log.truncate(min(log.tell(), state["log_bytes"]))
        log.seek(0, os.SEEK_END)

    # ---- what a step does with a micro-batch -----------------------------------------------
    loss_fn = Loss(model, label_smoothing)
    compiled = compile == "True"
    if compile == "auto":
        compiled = max_steps >= COMPILE_STEPS.get(dev.type, math.inf)
    reason = compiled and why_not_compile(dev)
    if reason:
        say(f"torch.compile does not work here, so the run goes on without: {reason}")
        compiled = False
    if compiled:
        say("compiling, which takes a minute or two")
        loss_fn.compile_parts()
    micro_tokens = batch_tokens // accumulate           # ids a side
    gradient = flat_gradient(model)
    work = make_work(loss_fn, autocast)
    graphs = cuda and compile != "False" and micro_tokens * d_model <= GRAPH_SIZE
    if graphs:
        work = Graphs(work, gradient)

    # ---- what is about to run ----------------------------------------------------------------
    changed = [f"{name}={value}" for name, value in current_settings().items()
               if value != settings[name]]
    where = torch.cuda.get_device_name(dev) if cuda else f"{dev}, {torch.get_num_threads()} threads"
    say(f"settings  {' '.join(changed)}\n"
        f"machine   {world} x {where}, torch {torch.__version__}, {amp}, compiled: {compiled}, "
        f"graphs: {graphs}\n"
        f"model     {sum(weight.numel() for weight in model.parameters()):,} parameters\n"
        f"data      {len(corpus):,} pairs, {corpus.n_src.sum():,} + {corpus.n_tgt.sum():,} ids, "
        f"left out: {left_out or 'none'}\n"
        f"run       {max_steps:,} steps, {state['steps_per_epoch']:.1f} an epoch, micro-batches in "
        f"a step: {accumulate}")

    # ---- training ----------------------------------------------------------------------------
    if world == 1:      # of several processes, each could hear a signal at another step, and wait
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)        # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:   # as nohup sets it
                signal.signal(number, on_signal)
    enough = patience or math.inf                       # validations that are no better, in a row
    # The sums of loss and nll since the last progress line stay on the device. To read a number
    # from a GPU is to wait until it has done all it was given, so that happens for a line only.
    totals = torch.zeros(2, device=dev)
    since = Counter()                                   # the last progress line: targets, ids...
    tick = time.time()
    batches = batches_from(corpus, micro_tokens, seed, skip=step * accumulate)
    while step < max_steps and n_worse < enough:
        # ---- the step ------------------------------------------------------------------------
        step += 1
        # The rates. (Without Muon there is one optimizer.)
        for optimizer, peak in zip(optimizers, (learning_rate, muon), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, peak)

        # The sentences. Every process knows the whole plan, and so how many target ids there are in
        # all micro-batches. Divided by that number, sums of losses add up to the mean of the step.
        micro_batches = list(itertools.islice(batches, accumulate))
        rows = np.concatenate(micro_batches)
        n_tgt = corpus.n_tgt[rows].sum()
        divisor = torch.full((), n_tgt, dtype=torch.float32, device=dev)

        # The gradients: those of this process's micro-batches, then the sum of all processes.
        gradient.zero_()
        for j in range(rank, accumulate, world):
            x, y = corpus.batch(micro_batches[j])
            if graphs:
                x, y = filled_up(x, y, micro_tokens)
            x, y = to_device((x, y), dev)
            # A hash of the three numbers: their sum would be the same in another step.
            mixed = np.random.SeedSequence((seed, step, j))
            torch.manual_seed(mixed.generate_state(1).item())
            try:
                totals += work(x, y, divisor)
            except RuntimeError as error:
                if not re.search("out of memory|allocate memory", str(error)):
                    raise
                fail(f"out of memory; a new run with more than --accumulate={accumulate} would "
                     "need less")
        if world > 1:
            dist.all_reduce(gradient)

        # The update.
        norm = gradient.norm()
        if grad_clip:
            gradient.mul_((grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for optimizer in optimizers:
            optimizer.step()
        since.update(steps=1, targets=n_tgt, ids=n_tgt + corpus.n_src[rows].sum())
        # ---- end of the step -----------------------------------------------------------------

        # ---- once in a while: is all well? ---------------------------------------------------
        leave = stop_signal             # read once for this step: a signal may come at any moment
        intervals = (log_interval, eval_interval, checkpoint_interval)
        if not leave and not any(due(step, n) for n in intervals):
            continue
        # A gradient that is not finite leaves weights and norms that are not, in all later steps.
        if not norm.isfinite():
            fail(f"the gradient is {norm.item()} at step {step:,}, or since shortly before; "
                 f"{place('last.pt')} is from before; lower --learning_rate?")

        # ---- once in a while: a progress line ------------------------------------------------
        if due(step, log_interval):
            if world > 1:
                dist.all_reduce(totals)
            loss, nll = (totals / since["targets"]).tolist()
            seconds = time.time() - tick
            speed = since["ids"] / seconds
            left = timedelta(seconds=int((max_steps - step) * seconds / since["steps"]))
            rate = learning_rate_at(step, learning_rate)
            record(step=step, loss=loss, nll=nll, learning_rate=rate, grad_norm=norm.item(),
                   tokens_per_second=speed)
            say(f"step {step:6d}  loss {loss:.4f}  nll {nll:.4f}  lr {rate:.2e}  "
                f"norm {norm.item():.2f}  {speed:,.0f} ids/s  left {left}")
            totals.zero_()
            since.clear()
            tick = time.time()

        # ---- once in a while: validate -------------------------------------------------------
        pause = time.time()
        if val_plan and due(step, eval_interval):
            share = mean_nll(plain, val, val_plan[rank::world], dev, autocast)
            if world > 1:
                dist.all_reduce(share)
            nll = share.item()
            record(step=step, val_nll=nll)
            say(f"step {step:6d}  validation nll {nll:.4f}")
            n_worse += 1
            if nll < best:
                best = nll
                n_worse = 0
                keep(plain)

        # ---- once in a while: save -----------------------------------------------------------
        if rank == 0 and (leave or due(step, checkpoint_interval) or n_worse >= enough):
            if best == math.inf:                        # nothing has been validated yet
                keep(plain)
            state.update(step=step, best=best, n_worse=n_worse, log_bytes=log.tell(),
                         model=model.state_dict(),
                         optimizers=[optimizer.state_dict() for optimizer in optimizers])
            write_atomically(place("last.pt"), state)
        tick += time.time() - pause

        # ---- once: stop ----------------------------------------------------------------------
        if leave:
            say(f"{signal.Signals(leave).name} after step {step:,}; to go on: "
                f"python train.py --out_dir={shlex.quote(out_dir)}")
            sys.exit(128 + leave)

    # ---- the end, on the first process alone -------------------------------------------------
    if world > 1:
        leave_group()
        torch.set_num_threads(available_cores())
    del work                                            # graphs hold memory
    if stop_signal:                                     # it came with the last step, which is saved
        sys.exit(128 + stop_signal)
    stop_signal = 1                                     # now the first signal ends the run at once
    if step < max_steps:
        say(f"step {step:6d}  {patience} validations without a better one: enough")
    final, _ = or_fail(load, place("model.pt"), dev)

    if val_src:
        sources, references = zip(*read_pairs(val_src, val_tgt), strict=True)
        fast = for_inference(final, "bfloat16" if amp == torch.bfloat16 else "float32")
        penalties = [length_penalty]
        if length_penalty < 0:
            penalties = [0.6, 1.0, 1.4]
        scores = {}
        for alpha in penalties:
            found = translate(fast, tokenizer, sources, beam_size, alpha)
            scores[alpha] = bleu([texts[0][0] for texts in found], references, bleu_tokenize)
        alpha = max(scores, key=scores.get)
        final.length_penalty = alpha
        keep(final)
        say(f"validation BLEU {scores[alpha]:.2f}, all {len(references):,} lines (tokenizer "
            f"{bleu_tokenize}, beam {beam_size}, length penalty {alpha})")
        record(step=step, bleu=scores[alpha])
    if not src:
        x, _ = val.batch(np.arange(len(val)))
        out, _ = beam_search(final, x.to(dev), beam_size=1, max_len=x.size(1))
        out = F.pad(out.cpu(), (0, x.size(1) - out.size(1)))
        accuracy = (out == x).all(1).float().mean().item()
        say(f"exact-sequence accuracy on {len(val):,} unseen sequences: {accuracy:.1%}, as in\n"
            f"  in   {x[0].tolist()}\n  out  {out[0].tolist()}")
        record(step=step, accuracy=accuracy)
    state["ended"] = True
    write_atomically(place("last.pt"), state)
    say(f"the model is {place('model.pt')}")
    if src:
        path = shlex.quote(place("model.pt"))
        say(f"use it:  python transformer.py --checkpoint={path} < in.txt > out.txt")
