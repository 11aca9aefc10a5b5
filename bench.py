"""
What you need to believe the numbers: this model and torch.nn.Transformer, on the same ids, in one run.

    python bench.py                                   # a small model, about two minutes on two CPU cores
    python bench.py --size=base --batch=32            # the paper's base model
    torchrun --nproc_per_node=2 bench.py              # adds what a second process brings
    python bench.py --plan=True --size=base --vocab_size=37000 --plan_tokens=5e9 --plan_devices=8  # what would it cost?

Prints a table for people and, as the last line, one JSON object for programs. Tokens are real: padding is not counted.
"""

# ---- settings ---------------------------------------------------------------
size = "small"              # tiny 128/256/4/4+4, small 256/1024/4/3+3, base 512/2048/8/6+6, copy 64/128/4/2+2
batch = 64                  # sentence pairs in a step
length = 32                 # ids in the longest sentence; the shortest has half of that
vocab_size = 8000
steps = 8                   # timed steps; the median counts
decode_batch = 32           # sentences decoded together
decode_len = 32             # ids decoded for each
device = "auto"             # cpu or cuda; auto: cuda where there is one
dtype = "auto"              # bfloat16, float32, or int8 to decode in; auto: bfloat16 where the hardware has it
plan = False                # True: measures this machine and says what a run would cost, on as many of it
plan_tokens = 5e9           # source and target ids the run reads, all epochs together; the paper's: 100,000 x 50,000
plan_devices = 1            # devices like this one; gradients are summed over them once a step
compile = True              # the training step of this model; torch.nn.Transformer runs as its documentation shows
seed = 1
# ---- end of settings --------------------------------------------------------
settings = {k: v for k, v in globals().items() if k[0] != "_" and type(v) in (bool, int, float, str)}

import json
import os
import statistics
import sys
import time
from functools import partial

try:
    import resource
except ImportError:         # Windows does not say how much memory a process has had
    resource = None

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from train import Loss, find_device, flops, keep_freed_memory, matmul_rate
from transformer import (BOS, EOS, PAD, Config, Transformer, beam_search, fail, for_inference, has_bfloat16, has_int8,
                         override, sinusoids)

SIZES = {"copy": (64, 128, 4, 2), "tiny": (128, 256, 4, 4), "small": (256, 1024, 4, 3), "base": (512, 2048, 8, 6),
         "big": (1024, 4096, 16, 6)}

class TorchTransformer(nn.Module):
    """torch.nn.Transformer with what it lacks, embeddings and masks, put together as its documentation suggests."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        nn.init.normal_(self.embedding.weight, 0, c.d_model ** -0.5)
        self.core = nn.Transformer(c.d_model, c.n_heads, c.n_encoder_layers, c.n_decoder_layers, c.d_ff, c.dropout,
                                   batch_first=True, norm_first=True)
        self.dropout = nn.Dropout(c.dropout)

    def embed(self, ids):
        D = self.embedding.embedding_dim
        return self.dropout(self.embedding(ids) * D ** 0.5 + sinusoids(torch.arange(ids.size(1), device=ids.device), D))

    def encode(self, src):
        return self.core.encoder(self.embed(src), src_key_padding_mask=src == PAD)

    def decode(self, tgt_in, memory, src):
        causal = nn.Transformer.generate_square_subsequent_mask(tgt_in.size(1), device=src.device, dtype=torch.bool)
        return self.core.decoder(self.embed(tgt_in), memory, tgt_mask=causal, tgt_is_causal=True,
                                 tgt_key_padding_mask=tgt_in == PAD, memory_key_padding_mask=src == PAD)

    def output(self, states):
        return F.linear(states, self.embedding.weight)

def greedy(model, src, n):
    """Greedy decoding with a model that has no cache: every step computes the whole prefix again. -> (B, n)"""
    ids = torch.full((len(src), 1), BOS, device=src.device)
    with torch.inference_mode():
        memory = model.encode(src)
        for _ in range(n):
            ids = torch.cat((ids, model.output(model.decode(ids, memory, src)[:, -1:])[..., EOS:].argmax(-1) + EOS), 1)
    return ids[:, 1:]

def timed(fn, n, sync, warmup=2):
    """Median seconds of n calls."""
    times = []
    for i in range(n + warmup):
        sync()
        start = time.perf_counter()
        fn()
        sync()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])

def peak_memory(cuda):
    """Bytes that this process has had at most, on the GPU or in all. 0: unknown."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0

def training_step(call, optimizer, src, tgt, amp):
    """Forward, loss, backward, Adam."""
    with torch.autocast(src.device.type, torch.bfloat16, enabled=amp):
        smoothed, _ = call(src, tgt)
    (smoothed / (tgt[:, 1:] != PAD).sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

def time_training(src, tgt, amp, model, compiled, sync, parallel=False):
    """Seconds of one training step of the model on that batch."""
    loss_fn = Loss(model.train(), 0.1)
    if compiled:
        loss_fn.compile_parts()
    call = loss_fn
    if parallel:
        call = nn.parallel.DistributedDataParallel(loss_fn, device_ids=[src.device.index] if src.is_cuda else None)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, (0.9, 0.98), 1e-9, fused=True)
    return timed(partial(training_step, call, optimizer, src, tgt, amp), steps, sync)

def add_row(rows, rate, what, seconds, tokens, work=None):
    """One row of the table, printed by rank 0 and kept for the JSON object. work: FLOPs, where they are known."""
    rows.append({"what": what, "tokens_per_second": tokens / seconds, "ms": 1e3 * seconds,
                 "share_of_matmul_rate": work / seconds / rate if work else None})
    if int(os.environ.get("RANK", 0)) == 0:
        share = f"{work / seconds / rate:6.0%}" if work else ""
        print(f"{what:<46}{tokens / seconds:>12,.0f} tok/s{1e3 * seconds:>11,.1f} ms {share}", flush=True)

def main():
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size not in SIZES:
        fail(f"--size must be one of {', '.join(SIZES)}, got {size!r}")
    if dtype not in ("auto", "float32", "bfloat16", "int8"):
        fail(f"--dtype must be auto, float32, bfloat16 or int8, got {dtype!r}")
    for name in ("batch", "length", "steps", "decode_batch", "decode_len", "plan_tokens", "plan_devices"):
        if globals()[name] < 1:
            fail(f"--{name} must be at least 1, got {globals()[name]}")
    if vocab_size < 4:
        fail(f"--vocab_size must be at least 4, got {vocab_size}")
    dev = find_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    cuda = dev.type == "cuda"
    sync = torch.cuda.synchronize if cuda else lambda: None
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        if not cuda:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()                                 # torch.nn.Transformer gains by it as well
    torch._dynamo.config.optimize_ddp = False
    D, FF, H, N = SIZES[size]
    wide = cuda or D >= 128                             # as in train.py: narrow matrices don't win back the casts
    low = torch.bfloat16 if dtype == "bfloat16" or dtype != "float32" and has_bfloat16(dev) and wide else torch.float32
    config = Config(vocab_size, d_model=D, d_ff=FF, n_heads=H, n_encoder_layers=N, n_decoder_layers=N, norm_first=True)
    rate = matmul_rate(dev, low)
    torch.manual_seed(seed)
    lengths = torch.randint(max(1, length // 2), length + 1, (batch,))
    real = torch.arange(length) < lengths[:, None]
    src = torch.randint(EOS + 1, vocab_size, (batch, length)).where(real, PAD).to(dev)
    tgt_out = torch.randint(EOS + 1, vocab_size, (batch, length)).where(real, PAD)
    tgt = torch.cat((torch.full((batch, 1), BOS), tgt_out), 1).to(dev)
    n_tokens = 2 * int(real.sum())
    step_flops = flops(config, n_tokens // 2, n_tokens // 2, n_tokens / 2 / batch, n_tokens / 2 / batch)
    rows = []
    train = partial(time_training, src, tgt, low != torch.float32)
    row = partial(add_row, rows, rate)
    half = str(low).removeprefix("torch.")
    if rank == 0:
        gpu = torch.cuda.get_device_name(dev) if cuda else f"{torch.get_num_threads()} threads"
        print(f"{size}: {D}/{FF}/{H}/{N}+{N}, {vocab_size:,} words; {n_tokens:,} real ids a step, "
              f"{1 - n_tokens / 2 / real.numel():.0%} padding\n{dev} ({gpu}), torch {torch.__version__}, "
              f"{rate / 1e12:.3f} TFLOP/s in {half} matrix products, world {world}\n")

    result = {"size": size, "device": str(dev), "torch": torch.__version__, "world": world,
              "matmul_tflops": rate / 1e12, "rows": rows}
    torch.manual_seed(seed)
    model = Transformer(config).to(dev)
    if world > 1:
        # The same process with the same threads, first alone, then all together.
        alone = train(model, compile, sync) if rank == 0 else 0.0
        dist.barrier()
        together = train(Transformer(config).to(dev), compile, sync, parallel=True)
        if rank == 0:
            row("train, one process", alone, n_tokens, step_flops)
            row(f"train, {world} processes", together, n_tokens * world, step_flops)
            n_bytes = 4 * sum(p.numel() for p in model.parameters())
            print(f"scaling efficiency {alone / together:.0%}; one all-reduce of {n_bytes / 1e6:,.1f} MB a step")
            result |= {"scaling_efficiency": alone / together, "all_reduce_bytes": n_bytes}
        dist.barrier()
        dist.destroy_process_group()
    elif plan:
        seconds = train(model, compile, sync)
        row(f"train, this model, {half}{', compiled' if compile else ''}", seconds, n_tokens, step_flops)
        n = sum(p.numel() for p in model.parameters())
        peak = peak_memory(cuda)
        hours = seconds / n_tokens * plan_tokens / plan_devices / 3600
        cost = {"parameters": n, "flops": step_flops / n_tokens * plan_tokens, "hours": hours, "model_pt_bytes": 4 * n,
                "last_pt_bytes": 12 * n, "state_bytes_per_device": 16 * n, "measured_peak_bytes": peak,
                "all_reduce_bytes_per_step": 4 * n if plan_devices > 1 else 0}
        print(f"\n{plan_tokens:,.0f} ids on {plan_devices} such device{'s' * (plan_devices > 1)}, if wires keep up:\n"
              f"  {n:,} parameters, {cost['flops']:.3g} FLOPs, {hours:,.1f} hours\n"
              f"  model.pt {4 * n / 1e6:,.0f} MB, last.pt {12 * n / 1e6:,.0f} MB (weights and Adam's two moments), "
              f"and as much as model.pt for each of --average_last\n  memory: {16 * n / 1e9:.2f} GB a device for "
              f"weights, gradients and moments; {peak / 1e9:.2f} GB in all here\n"
              f"  all-reduce: {cost['all_reduce_bytes_per_step'] / 1e6:,.0f} MB a step")
        result |= cost
    else:
        reference = TorchTransformer(config).to(dev)
        slow = time_training(src, tgt, False, reference, False, sync)
        row("train, torch.nn.Transformer, float32", slow, n_tokens, step_flops)
        fast = train(model, compile, sync)
        row(f"train, this model, {half}{', compiled' if compile else ''}", fast, n_tokens, step_flops)
        result["train_speedup"] = slow / fast
        source = src[:1, :24].repeat(decode_batch, 1).clamp(min=EOS + 1)
        generated = decode_batch * decode_len
        numbers = "int8" if dtype == "int8" and has_int8(dev) else half
        model, reference = for_inference(Transformer(config).to(dev), numbers), reference.eval()
        slow = timed(lambda: greedy(reference, source, decode_len), 1, sync, 1)
        row("greedy, torch.nn.Transformer, no cache, float32", slow, generated)
        for beam in (1, 4):
            decode = lambda: beam_search(model, source, beam, max_len=decode_len, min_len=decode_len)
            fast = timed(decode, 3, sync, 1)
            row(f"{'greedy' if beam == 1 else 'beam 4'}, this model, {numbers}", fast, generated)
            result[f"decode_speedup_beam_{beam}"] = slow / fast
        peak = result["peak_memory_bytes"] = peak_memory(cuda)
        print(f"\ntraining {result['train_speedup']:.1f}x, greedy decoding {result['decode_speedup_beam_1']:.1f}x "
              f"torch.nn.Transformer; peak memory {peak / 1e9:.2f} GB")
    if rank == 0:
        print(json.dumps(result))

if __name__ == "__main__":
    globals().update(override(settings, sys.argv[1:], __file__))
    try:
        main()
    except (ValueError, torch.OutOfMemoryError) as error:
        fail(str(error).splitlines()[0])
