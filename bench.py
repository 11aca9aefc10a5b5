# SPDX-License-Identifier: MIT
"""
What you need to believe the numbers: this model and torch.nn.Transformer, on the same ids.

    python bench.py                                   # a small model, minutes on two CPU cores
    python bench.py --size=base                       # the paper's base model
    torchrun --nproc_per_node=2 bench.py              # what a second process brings
    python bench.py --plan=True --size=base --vocab_size=37000 --plan_tokens=5e9 --plan_devices=8

The last one measures this machine and says what a whole training run would cost.
Prints a table for people and, as the last line, one JSON object for programs.
Speed is in real ids a second, source and target together: padding is not counted.
"""

from transformer import settings_of

# ---- settings ---------------------------------------------------------------
size = "small"          # copy, tiny, small, base or big: see SIZES below
batch = 64              # sentence pairs in a step
length = 32             # ids in the longest sentence; the shortest has half of that
vocab_size = 8000       # words that the model knows
steps = 8               # timed steps; the median counts
seconds = 20.0          # no row of one process goes on after so long; warm-up is extra
decode_batch = 32       # sentences decoded together
decode_len = 32         # ids decoded for each
device = "auto"         # cpu or cuda; auto: cuda where there is one
dtype = "auto"          # bfloat16, float32, or int8 to decode in; auto: bfloat16 in hardware
plan = False            # True: measures this machine and says what a run would cost
plan_tokens = 5e9       # source and target ids the run reads in all; the paper's: 100,000 x 50,000
plan_devices = 1        # devices like this one; gradients are summed over them once a step
compile = True          # False: this model's training step is neither compiled nor a CUDA graph
seed = 1                # of the weights and the ids
# ---- end of settings --------------------------------------------------------
settings = settings_of(globals())

import json
import math
import statistics
import sys
import time
import warnings
from functools import partial

try:
    import resource
except ImportError:     # Windows does not say how much memory a process has had
    resource = None

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from train import (
    GRAPH_SIZE, Graphs, Loss, flat_gradient, leave_group, make_work, rank, set_up, why_not_compile,
    world)
from transformer import (
    BOS, EOS, PAD, Config, Transformer, beam_search, cache_for, fail, for_inference, has_bfloat16,
    has_int8, override, sinusoids)

# d_model, d_ff, heads, layers on each side. The last two are Table 3 of the paper.
SIZES = {
    "copy": (64, 128, 4, 2),
    "tiny": (128, 256, 4, 4),
    "small": (256, 1024, 4, 3),
    "base": (512, 2048, 8, 6),
    "big": (1024, 4096, 16, 6),
}
# What the smallest sensible value is, where it isn't 1. Three ids are specials.
LEAST = {"vocab_size": EOS + 2, "seed": 0}

def check_settings():
    """Ends the run, in one line, if a setting makes no sense: before anything is measured."""
    if size not in SIZES:
        fail(f"--size must be one of {', '.join(SIZES)}, got {size!r}")
    if dtype not in ("auto", "float32", "bfloat16", "int8"):
        fail(f"--dtype must be auto, float32, bfloat16 or int8, got {dtype!r}")
    for name, default in settings.items():
        value = globals()[name]
        least = LEAST.get(name, 1)
        if type(default) in (int, float) and not least <= value <= 1e15:
            fail(f"--{name} must be from {least} to 1e15, got {value}")
    if plan and world > 1:
        fail("--plan=True measures one process: start it without torchrun")

# ---- What a step costs, and what the machine can do -------------------------

def flops(config, n_src, n_tgt, S, T):
    """FLOPs of forward and backward for n_src and n_tgt real ids, in sentences of mean length S, T.

    An id that passes a weight costs two: a product and a sum. The backward pass costs twice as much
    as the forward pass, so a weight costs six. Norms, softmax and the like are left out.
    """
    D = config.d_model
    attention = 4 * D**2                        # weights of one attention: query, key, value, out
    ffn = 2 * D * config.d_ff

    # The keys and values of cross-attention, half of its weights, are computed for source ids.
    src_weights = config.n_encoder_layers * (attention + ffn)
    src_weights += config.n_decoder_layers * attention / 2
    tgt_weights = config.n_decoder_layers * (1.5 * attention + ffn)
    tgt_weights += D * config.vocab_size        # the output matrix; looking up an embedding is free

    # Scores and averages: each id meets every other one twice, D wide. A target id meets only the
    # ids before it, on average half of them.
    src_meetings = config.n_encoder_layers * 12 * S * D
    tgt_meetings = config.n_decoder_layers * (6 * T + 12 * S) * D

    return n_src * (6 * src_weights + src_meetings) + n_tgt * (6 * tgt_weights + tgt_meetings)

def peak_memory(device):
    """Bytes that this process has had at most, on the GPU or in all. 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return 1024 * peak                          # elsewhere it comes in kilobytes

# ---- What is compared -------------------------------------------------------

class TorchTransformer(nn.Module):
    """torch.nn.Transformer with what it lacks, embeddings and masks, as its documentation suggests.

    Its methods are those of transformer.Transformer, so that train.Loss can train both.
    """

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, D)
        nn.init.normal_(self.embedding.weight, 0, D**-0.5)
        self.core = nn.Transformer(
            D,
            config.n_heads,
            config.n_encoder_layers,
            config.n_decoder_layers,
            config.d_ff,
            config.dropout,
            batch_first=True,
            norm_first=True,
        )
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, ids):
        """(B, T) -> (B, T, D)"""
        D = self.embedding.embedding_dim
        x = self.embedding(ids) * D**0.5
        positions = torch.arange(ids.size(1), device=ids.device)
        return self.dropout(x + sinusoids(positions, D).to(x.dtype))

    def encode(self, src):
        """(B, S) -> (B, S, D)"""
        return self.core.encoder(self.embed(src), src_key_padding_mask=src == PAD)

    def decode(self, tgt_in, memory, src):
        """(B, T), (B, S, D), (B, S) -> (B, T, D)"""
        T = tgt_in.size(1)
        later = torch.ones(T, T, dtype=torch.bool, device=src.device).triu(1)
        return self.core.decoder(
            self.embed(tgt_in),
            memory,
            tgt_mask=later,                     # True is hidden: the opposite of this project
            tgt_is_causal=True,
            tgt_key_padding_mask=tgt_in == PAD,
            memory_key_padding_mask=src == PAD,
        )

    def output(self, states):
        """(..., D) -> logits (..., V)"""
        return F.linear(states, self.embedding.weight)

@torch.inference_mode()
def greedy(model, src, n):
    """n ids for each source, without a cache: every step computes the whole prefix again.

    (B, S) -> (B, n)
    """
    ids = torch.full((len(src), 1), BOS, device=src.device)
    memory = model.encode(src)
    for _ in range(n):
        states = model.decode(ids, memory, src)
        logits = model.output(states[:, -1:])
        best = logits[..., EOS:].argmax(-1) + EOS           # never PAD or BOS
        ids = torch.cat((ids, best), 1)
    return ids[:, 1:]

def random_batch():
    """Sentence pairs of random words, as train.py gives them to its step.

    -> src (batch, length), tgt (batch, 1 + length) after BOS, (): target ids of all processes
    Each process has its own words, but in sentences of the same lengths: equally much to do.
    """
    torch.manual_seed(seed)
    shortest = max(1, length // 2)
    lengths = torch.randint(shortest, length + 1, (batch,))
    torch.manual_seed(seed + rank)
    real = torch.arange(length) < lengths[:, None]
    src = torch.randint(EOS + 1, vocab_size, (batch, length)).where(real, PAD)
    tgt_out = torch.randint(EOS + 1, vocab_size, (batch, length)).where(real, PAD)
    start = torch.full((batch, 1), BOS)
    return src, torch.cat((start, tgt_out), 1), world * lengths.sum()

# ---- Measuring --------------------------------------------------------------

def timed(call, n, warmup, limit):
    """Median seconds of n calls after warmup others, of fewer if limit seconds end before."""
    times = []
    for i in range(-warmup, n):
        if sum(times) >= limit:
            break
        start = time.perf_counter()
        call()
        if torch.accelerator.is_available():    # a GPU is still at work when the call returns
            torch.accelerator.synchronize()
        if i >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times)

def matmul_rate(device, dtype):
    """FLOP/s of large square matrix products on this device, measured: the ceiling of any step."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    took = timed(partial(torch.matmul, a, b), 100, 2, 0.2)
    return 2 * n**3 / took

def autocast(device, numbers):
    """The context in which matrix products are computed in "float32" or "bfloat16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=numbers == "bfloat16")

def adam(model):
    """The paper's optimizer (§5.3) in one kernel, at a rate that doesn't matter here."""
    return torch.optim.Adam(model.parameters(), 1e-4, (0.9, 0.98), 1e-9, fused=True)

def training_step(work, gradient, optimizer, clear, inputs):
    """Forward, loss, backward, Adam. gradient: what all processes sum; None: nothing"""
    work(*inputs)
    if gradient is not None:
        dist.all_reduce(gradient)
    optimizer.step()
    clear()

def time_own(config, inputs, numbers, compiled, graph, together=False):
    """A training step of a new model of this project, as train.py takes it.

    together: with all other processes. -> median seconds, how it ran (a text), number of weights
    """
    device = inputs[0].device
    torch.manual_seed(seed)                     # every process has the same weights
    model = Transformer(config).to(device)
    loss_fn = Loss(model, 0.1)
    how = ""
    if compiled:
        loss_fn.compile_parts()
        how += ", compiled"
    gradient = flat_gradient(model)
    work = make_work(loss_fn, autocast(device, numbers))
    if graph:
        work = Graphs(work, gradient)

    shared = None
    limit = seconds
    if together:
        shared = gradient
        limit = math.inf        # all must take equally many steps: the clock of one can't end them
    step = partial(training_step, work, shared, adam(model), gradient.zero_, inputs)
    took = timed(step, steps, 2, limit)
    if graph and work.graphs:                   # else the graph was wrong, and is not used
        how += ", graph"
    return took, how, gradient.numel()

def add_row(table, what, took, n_ids, ideal=None):
    """Prints a row and adds it to the table. took: seconds for n_ids real ids.

    ideal: the seconds that matrix products of as many FLOPs take, where their number is known.
    ideal / took is the model FLOPs utilization, MFU.
    """
    speed = n_ids / took
    share = None
    mfu = ""
    if ideal:
        share = ideal / took
        mfu = f"{share:.0%}"
    print(f"{what:<50}{speed:>12,.0f}{1e3 * took:>12,.1f}{mfu:>7}", flush=True)
    table.append({
        "what": what,
        "tokens_per_second": speed,
        "ms": 1e3 * took,
        "share_of_matmul_rate": share,
    })

# ---- The three questions. Each adds to the table and returns keys of the JSON object ----

def compare(table, config, inputs, numbers, n_ids, ideal, own):
    """This model beside torch.nn.Transformer. own: seconds of this model's rows, the plain first.

    Where this model has bfloat16, the reference is timed in it too. Narrow types don't win
    everywhere, so the better time of the reference counts.
    """
    warnings.filterwarnings("ignore", "enable_nested_tensor")   # about a way that isn't taken here
    precisions = sorted({"float32", numbers}, reverse=True)    # one or two
    src = inputs[0]
    reference = TorchTransformer(config).to(src.device)
    optimizer = adam(reference)
    loss_fn = Loss(reference, 0.1)
    slow = math.inf
    for precision in precisions:
        work = make_work(loss_fn, autocast(src.device, precision))
        step = partial(training_step, work, None, optimizer, optimizer.zero_grad, inputs)
        took = timed(step, steps, 2, seconds)
        known = None
        if precision == numbers:                # the rate of products was measured in these
            known = ideal
        add_row(table, f"train, torch.nn.Transformer, {precision}", took, n_ids, known)
        slow = min(slow, took)
    found = {"train_speedup": slow / min(own), "train_speedup_plain": slow / own[0]}

    # One sentence without padding, many times, and every translation of the same length.
    source = src[:1, :24].clamp(min=EOS + 1).repeat(decode_batch, 1)
    n_ids = decode_batch * decode_len
    reference.eval()
    slow = math.inf
    for precision in precisions:
        reference.to(getattr(torch, precision))
        took = timed(partial(greedy, reference, source, decode_len), 1, 1, seconds)
        add_row(table, f"decode, greedy, torch.nn.Transformer, {precision}", took, n_ids)
        slow = min(slow, took)

    if dtype == "int8" and has_int8(src.device):
        numbers = "int8"
    model = for_inference(Transformer(config).to(src.device), numbers)
    search = partial(beam_search, model, source, max_len=decode_len, min_len=decode_len,
                     make_cache=cache_for(src.device))
    for beam_size in (1, 4):
        took = timed(partial(search, beam_size=beam_size), 3, 1, seconds)
        add_row(table, f"decode, beam {beam_size}, this model, {numbers}", took, n_ids)
        found[f"decode_speedup_beam_{beam_size}"] = slow / took

    found["peak_memory_bytes"] = peak_memory(src.device)
    print("""
training {train_speedup:.1f}x, neither compiled nor as a graph {train_speedup_plain:.1f}x,
decoding with beam 1 {decode_speedup_beam_1:.1f}x as fast
as torch.nn.Transformer, run as its documentation shows, not compiled, in the better of its rows
peak memory of this process, all rows together: {peak_memory_bytes:,} bytes""".format_map(found))
    return found

def compare_processes(table, config, inputs, numbers, way, n_ids, ideal, own):
    """The same step on all processes together, each with a batch like this.

    way: compiled, graph. own: seconds of the rows on rank 0, the last in this way, while the others
    wait here.
    """
    dist.barrier()
    together, how, n_weights = time_own(config, inputs, numbers, *way, together=True)
    if rank > 0:
        return {}

    add_row(table, f"the same on {world} processes{how}", together, n_ids * world, ideal)
    efficiency = own[-1] / together
    n_bytes = 4 * n_weights
    print(f"\nscaling efficiency {efficiency:.0%}; all-reduce: {n_bytes / 1e6:,.1f} MB a step")
    return {"scaling_efficiency": efficiency, "all_reduce_bytes": n_bytes}

def plan_run(n, took, n_ids, step_flops, peak):
    """What a run of plan_tokens costs.

    n: weights. took: seconds of a step. n_ids: ids in it. peak: bytes of memory it needed.
    """
    n_steps = plan_tokens / n_ids
    work = step_flops * n_steps
    hours = took * n_steps / plan_devices / 3600
    all_reduce = 4 * n if plan_devices > 1 else 0
    print(f"""
{plan_tokens:,.0f} ids; devices like this one: {plan_devices:,}, if what connects them keeps up
  {n:,} parameters, {work:.3g} FLOPs, {hours:,.1f} hours
  model.pt {4 * n / 1e6:,.0f} MB; last.pt {12 * n / 1e6:,.0f} MB: weights and Adam's two moments
  memory of a device: {16 * n / 1e9:.2f} GB for weights, gradients and moments
    (with everything else, this process had {peak / 1e9:.2f} GB)
  all-reduce: {all_reduce / 1e6:,.0f} MB a step""")
    return {
        "parameters": n,
        "flops": work,
        "hours": hours,
        "model_pt_bytes": 4 * n,
        "last_pt_bytes": 12 * n,
        "state_bytes_per_device": 16 * n,
        "measured_peak_bytes": peak,
        "all_reduce_bytes_per_step": all_reduce,
    }

# ---- A run ------------------------------------------------------------------

def choose_numbers(device, d_model):
    """What this model trains in: "float32" or "bfloat16", as train.py does by default."""
    if dtype in ("float32", "bfloat16"):
        return dtype
    # On a CPU, narrow matrices don't win back the casts.
    wide = device.type == "cuda" or d_model >= 128
    if wide and has_bfloat16(device):
        return "bfloat16"
    return "float32"

def choose_ways(device, d_model):
    """How this model's training step is timed: [(compiled, graph), ...]. The plain way comes first,
    that of a long run of train.py last."""
    if not compile:
        return [(False, False)]
    reason = why_not_compile(device)
    if reason:
        fail(f"torch.compile does not work here, so add --compile=False: {reason}")
    if device.type == "cuda" and batch * length * d_model <= GRAPH_SIZE:
        return [(False, False), (False, True), (True, True)]
    return [(False, False), (True, False)]

def main():
    check_settings()
    here = set_up(device)
    if world > 1:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo")

    D, d_ff, n_heads, n_layers = SIZES[size]
    ways = choose_ways(here, D)
    numbers = choose_numbers(here, D)
    config = Config(vocab_size, D, n_heads, d_ff, n_layers, n_layers, norm_first=True)
    inputs = [x.to(here) for x in random_batch()]
    n_src = int(inputs[2]) // world             # and as many target ids
    n_ids = 2 * n_src
    step_flops = flops(config, n_src, n_src, n_src / batch, n_src / batch)
    rate = matmul_rate(here, getattr(torch, numbers))
    ideal = step_flops / rate

    if rank == 0:
        print(f"""{size}: {D}/{d_ff}/{n_heads}/{n_layers}+{n_layers}, {vocab_size:,} words
{n_ids:,} real ids in a step, {1 - n_src / (batch * length):.0%} padding
{here}, {torch.get_num_threads()} threads, torch {torch.__version__}, processes: {world}
{rate / 1e12:.3f} TFLOP/s in matrix products, {numbers}; MFU is the share of it that a step makes

{'':50}{'ids/s':>12}{'ms':>12}{'MFU':>7}""", flush=True)

    # The rows of one process. Any others wait in compare_processes.
    table = []
    own = []
    if rank == 0:
        for compiled, graph in ways:
            took, how, n_weights = time_own(config, inputs, numbers, compiled, graph)
            add_row(table, f"train, this model, {numbers}{how}", took, n_ids, ideal)
            own.append(took)

    if world > 1:
        found = compare_processes(table, config, inputs, numbers, ways[-1], n_ids, ideal, own)
        leave_group()
    elif plan:
        found = plan_run(n_weights, min(own), n_ids, step_flops, peak_memory(here))
    else:
        found = compare(table, config, inputs, numbers, n_ids, ideal, own)

    if rank == 0:
        result = {
            "size": size,
            "device": str(here),
            "torch": torch.__version__,
            "world": world,
            "matmul_tflops": rate / 1e12,
            "rows": table,
        }
        print(json.dumps(result | found))

if __name__ == "__main__":
    globals().update(override(settings, sys.argv[1:], __file__))
    try:
        main()
    except RuntimeError as error:
        # A CPU says so in an ordinary RuntimeError, and a GPU in other words.
        text = str(error)
        if "memory" not in text or "allocate" not in text:
            raise
        fail(f"out of memory: lower --batch={batch}, --length={length} or "
             f"--decode_batch={decode_batch}, or take a smaller --size")
