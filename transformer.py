"""
The Transformer of "Attention Is All You Need" (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762) in one file.

    python transformer.py                                               # a guided tour that checks itself, in seconds
    python transformer.py --checkpoint=out/model.pt < in.txt > out.txt  # translate: one line in, one line out

Read it from top to bottom: whatever a line uses is defined above it. This is Figure 1, with the names of this file:

                                                   logits (B, T, V)
                                                      ↑  output: the embedding matrix, transposed
      memory (B, S, D) ───────────────────┐        states (B, T, D)
         ↑  EncoderLayer × 6              │           ↑  DecoderLayer × 6
         │      add_norm2(ffn)            │           │      add_norm3(ffn)
         │      add_norm1(self_attn)      └───────────│───── add_norm2(cross_attn)
         │                                            │      add_norm1(self_attn): no position sees a later one
         ↑  embed: embedding · √D + sinusoids         ↑  embed: the same
      src (B, S)                                   tgt_in (B, T)

One letter for each axis, in every comment: B batch, S source length, T target length, D d_model, H heads,
K d_head = D/H, V vocabulary, and in decoding N beams, the hypotheses that are kept for each sentence.

Where this differs from the paper, and why (a test holds each point):

 1. Padding. The paper does not mention it, but a batch needs it: id PAD fills the ends of short rows. Nothing attends
    to it, and the outputs of encoder and decoder are zeros there.
 2. Initial weights, and the ε in LayerNorm. The paper does not say. Matrices are Glorot-uniform; embeddings are normal
    with variance 1/D, so that the √D of §3.4 brings them to the scale of the positions; ε is PyTorch's.
 3. Beam search never proposes PAD or BOS, ends a hypothesis (EOS) that reaches its length limit, and stops when no
    unfinished one can still win; the paper says only "terminate early when possible".
 4. Text becomes byte-level BPE, with a space put before the first word. The paper splits characters. With bytes any
    string can be written, so there is no unknown word.
 5. `Config` offers what the paper does not use: norms before the sub-layers, an output matrix that is not tied to the
    embedding, a source vocabulary of its own, biases on the attention projections, norms at the end of the stacks.
"""

import contextlib
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

PAD, BOS, EOS = 0, 1, 2     # padding, beginning and end of a sentence: the ids no word may have

@dataclass(frozen=True)
class Config:
    """Sizes of a Transformer. The defaults are the paper's base model (Table 3). Raises ValueError if they can't be."""

    vocab_size: int = 37000         # §5.1: one vocabulary for both languages
    d_model: int = 512              # D: the width of everything that flows between sub-layers
    n_heads: int = 8                # H: each sees D/H of the width
    d_ff: int = 2048                # the inner width of the feed-forward network
    n_encoder_layers: int = 6
    n_decoder_layers: int = 6
    dropout: float = 0.1            # P_drop of §5.4
    norm_first: bool = False        # True: x + f(norm(x)) and a norm at the end of each stack; deep stacks train easier
    learned_positions: int = 0      # 0: sinusoids; n: a learned vector for each of n positions (Table 3, row E)
    tied_output: bool = True        # §3.4: the target embedding is also the output projection
    src_vocab_size: int = 0         # 0: source and target share vocab_size and the embedding
    attention_bias: bool = False    # the paper's projections are plain matrices; torch.nn.Transformer adds biases
    final_norms: bool = False       # True: post-norm stacks end in one more norm, as those of torch.nn.Transformer do

    def __post_init__(self):
        for field in fields(self):
            name, value, kind = field.name, getattr(self, field.name), type(field.default)
            value = value.item() if hasattr(value, "item") else value           # numpy's and torch's numbers
            value = float(value) if kind is float and type(value) is int else value
            least = EOS + 1 if "vocab" in name else 0 if kind is float else 1   # a default of 0, none, may stay
            most = 1 if kind is float else math.inf
            if type(value) is not kind or not (kind is bool or least <= value < most or value == field.default == 0):
                raise ValueError(f"{name} must be {kind.__name__} from {least} to below {most}, got {value!r}")
            object.__setattr__(self, name, value)                               # the way into a frozen dataclass
        if self.d_model % self.n_heads or self.d_model % 2:                     # a sine and a cosine for each frequency
            raise ValueError(f"d_model must be even and divisible by n_heads, got {self.d_model} and {self.n_heads}")

BASE = Config()
BIG = Config(d_model=1024, n_heads=16, d_ff=4096, dropout=0.3)

# ---- §3.5 Positional encoding ------------------------------------------------

def sinusoids(positions, d_model):
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(same). positions: (...) -> (..., D), float32. §3.5

    Attention is a sum over a set: without this, "dog bites man" and "man bites dog" would be the same sentence.
    Each pair of columns is a clock hand of its own speed, and moving by k positions turns every hand by a fixed
    angle, so "k words ago" is a linear function of the encoding. Being a formula, it has no longest sentence.
    """
    i = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32)
    frequency = torch.exp(i * (-math.log(10000.0) / d_model))                   # (D/2,) = 10000^(-2i/D)
    angle = positions[..., None].float() * frequency                            # (..., D/2)
    # Stack, then flatten: sine and cosine take turns column by column, as the formula says, and not half by half.
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)          # (..., D)

# ---- §3.2 Attention. Every mask here is boolean, and True means "may attend" ---

def causal_mask(n, device=None):
    """Position t (a row) may attend to the positions up to t (columns), and to none after it. §3.2.3 -> (n, n)

    >>> causal_mask(4).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()

def attention_weights(q, k, mask=None):
    """softmax(QKᵀ/√d_k), Eq. 1. q: (..., T, K), k: (..., S, K), mask: broadcasts to the result -> (..., T, S), float32

    One query and three keys with d_k = 4. The products q·k are 2, 0 and 4. Divided by √4 they are 1, 0 and 2, and the
    weights are e¹, e⁰ and e², each divided by their sum:

    >>> q = torch.tensor([[2.0, 0, 0, 0]])
    >>> k = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0]])
    >>> attention_weights(q, k)
    tensor([[0.2447, 0.0900, 0.6652]])

    With the third key masked, the other two share its part. A query that may attend to nothing gets nothing but zeros:

    >>> attention_weights(q, k, mask=torch.tensor([[True, True, False]]))
    tensor([[0.7311, 0.2689, 0.0000]])
    >>> attention_weights(q, k, mask=torch.tensor([[False, False, False]]))
    tensor([[0., 0., 0.]])
    """
    # The dot products of random vectors grow like √d_k, and a softmax of large numbers has no gradient (§3.2.1). The
    # queries are divided before the product, not the scores after it: in float16 the product itself could overflow.
    scores = ((q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)).float()
    if mask is None:
        return scores.softmax(-1)
    # The lowest finite number, not -inf: a row of nothing but -inf would be 0/0 = NaN, forward and backward.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)

def attention(q, k, v, mask=None, causal=False):
    """softmax(QKᵀ/√d_k) V, Eq. 1: every query takes the average of the values, weighted by how well the keys match it.

    q: (B, H, T, K), k and v: (B, H, S, K), mask: broadcasts to (B, H, T, S) -> (B, H, T, K).
    causal=True stands for mask=causal_mask(T), and needs T = S.
    """
    if not q.is_cuda and q.size(-2) * k.size(-2) <= 512 * 512:
        # The definition. On a CPU it is also the faster way, as long as the (T, S) weights are small.
        mask = causal_mask(q.size(-2), q.device) if causal else mask
        return attention_weights(q, k, mask).to(v.dtype) @ v
    # Everywhere else a fused kernel computes the same without ever writing the weights to memory.
    if causal or mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # What a kernel returns for a query that may attend to nothing depends on the kernel. So let it see everything...
    nothing = ~mask.any(-1, keepdim=True)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | nothing)
    return y.masked_fill(nothing, 0.0)      # ...and then give it the zeros of the definition

class MultiHeadAttention(nn.Module):
    """H attentions side by side, each on its own D/H-wide projection of queries, keys and values. §3.2.2

    It serves all three uses of §3.2.3, because keys and values come from outside: from the queries' own sequence
    (self-attention), from the encoder's output (cross-attention), or from a cache of earlier steps (decoding).
    """

    def __init__(self, config):
        super().__init__()
        D, self.n_heads = config.d_model, config.n_heads
        self.q = nn.Linear(D, D, bias=config.attention_bias)            # W^Q of all heads, stacked
        self.kv = nn.Linear(D, 2 * D, bias=config.attention_bias)       # W^K and W^V of all heads, stacked
        self.out = nn.Linear(D, D, bias=config.attention_bias)          # W^O

    def split_heads(self, x):
        """(B, T, D) -> (B, H, T, K)"""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def keys_values(self, x):
        """What the positions of x offer to those who look at them. (B, S, D) -> (B, H, S, K) twice"""
        k, v = self.kv(x).chunk(2, dim=-1)
        return self.split_heads(k), self.split_heads(v)

    def forward(self, x, keys_values, mask=None, causal=False):
        """The positions of x look at those behind keys_values. (B, T, D), what keys_values() returned -> (B, T, D)"""
        y = attention(self.split_heads(self.q(x)), *keys_values, mask, causal)          # (B, H, T, K)
        return self.out(y.transpose(1, 2).flatten(2))                   # heads side by side again, then W^O

# ---- §3.3 Position-wise feed-forward network ---------------------------------

class FeedForward(nn.Module):
    """FFN(x) = max(0, xW₁ + b₁)W₂ + b₂, Eq. 2, at every position alone. (B, T, D) -> (B, T, D)

    Attention moves information between positions; this is where it is worked on. With the paper's d_ff = 4D it holds
    two thirds of the weights of an encoder layer, and half of those of a decoder layer.
    """

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff)
        self.w2 = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x):
        return self.w2(F.relu(self.w1(x)))

# ---- §3.1 Encoder and decoder stacks -----------------------------------------

class AddNorm(nn.Module):
    """A residual connection around a sub-layer, and a norm: LayerNorm(x + Dropout(Sublayer(x))). §3.1, §5.4

    This is the paper's order, post-norm. With norm_first it is x + Dropout(Sublayer(LayerNorm(x))): the sum itself is
    never normalised, so gradients reach the bottom of the stack unchanged, and the stack needs one more norm at its
    end. The sub-layer comes as a function, because in one order it runs before the norm and in the other after it.
    """

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_first = config.norm_first

    def forward(self, x, sublayer):
        if self.norm_first:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))

class EncoderLayer(nn.Module):
    """Every source position looks at every other, then thinks for itself. (B, S, D) -> (B, S, D)"""

    def __init__(self, config):
        super().__init__()
        self.self_attn = MultiHeadAttention(config)
        self.ffn = FeedForward(config)
        self.add_norm1, self.add_norm2 = AddNorm(config), AddNorm(config)

    def forward(self, x, mask):
        x = self.add_norm1(x, lambda y: self.self_attn(y, self.self_attn.keys_values(y), mask))
        return self.add_norm2(x, self.ffn)

class DecoderLayer(nn.Module):
    """Every target position looks at those before it, then at the source, then thinks. (B, T, D) -> (B, T, D)"""

    def __init__(self, config):
        super().__init__()
        self.self_attn = MultiHeadAttention(config)
        self.cross_attn = MultiHeadAttention(config)
        self.ffn = FeedForward(config)
        self.add_norm1, self.add_norm2, self.add_norm3 = AddNorm(config), AddNorm(config), AddNorm(config)

    def forward(self, x, memory_kv, memory_mask):
        x = self.add_norm1(x, lambda y: self.self_attn(y, self.self_attn.keys_values(y), causal=True))
        x = self.add_norm2(x, lambda y: self.cross_attn(y, memory_kv, memory_mask))
        return self.add_norm3(x, self.ffn)

# ---- §3 The model ------------------------------------------------------------

class Transformer(nn.Module):
    """Source ids and the target ids so far in, a score for every possible next target id out. Figure 1.

    model(src, tgt_in) -> logits: (B, S) and (B, T) int64 -> (B, T, V). Sources end with EOS and targets begin with
    BOS; rows are padded with PAD on the right. logits[:, t] scores the token that follows tgt_in[:, t].
    """

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.d_model
        # §3.4: one matrix embeds the source, embeds the target, and, transposed, turns states into logits.
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.src_embedding = nn.Embedding(config.src_vocab_size, D) if config.src_vocab_size else self.embedding
        self.output = nn.Linear(D, config.vocab_size, bias=False)
        if config.tied_output:
            self.output.weight = self.embedding.weight                  # the same tensor: one gradient, one update
        self.learned_src, self.learned_tgt = (nn.Embedding(n, D) if n else None for n in [config.learned_positions] * 2)
        self.src_dropout, self.tgt_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_decoder_layers))
        # A post-norm layer ends in a norm, so the paper's stacks need no other. A pre-norm layer ends in a sum.
        final_norm = nn.LayerNorm if config.norm_first or config.final_norms else nn.Identity
        self.encoder_norm, self.decoder_norm = final_norm(D), final_norm(D)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draws all initial values, here and nowhere else: no two layers start with the same numbers."""
        for name, weight in self.named_parameters():
            if "embedding" in name or "learned" in name or name == "output.weight":
                weight.normal_(0, self.config.d_model ** -0.5)
            elif weight.dim() == 2:
                for matrix in weight.chunk(2 if name.endswith("kv.weight") else 1):     # W^K and W^V each on its own
                    nn.init.xavier_uniform_(matrix)
            elif name.endswith("bias"):
                weight.zero_()                                          # what is left are norm weights: ones already

    def embed(self, ids, embedding, learned, start=0):
        """Embedding · √D + position; the first position is `start`. §3.4, §3.5. (B, T) -> (B, T, D)"""
        end = start + ids.size(1)
        if learned is not None and end > learned.num_embeddings:
            raise ValueError(f"expected at most the {learned.num_embeddings} positions learned, got {end}")
        positions = torch.arange(start, end, device=ids.device)
        encoding = sinusoids(positions, self.config.d_model) if learned is None else learned(positions)
        x = embedding(ids) * math.sqrt(self.config.d_model)
        return x + encoding.to(x.dtype)

    def encode(self, src):
        """The source, every token in the light of all others: the decoder's memory. (B, S) -> (B, S, D)"""
        mask = (src != PAD)[:, None, None, :]                           # (B, 1, 1, S): no query may look at padding
        x = self.embed(src, self.src_embedding, self.learned_src)       # (B, S, D)
        x = self.src_dropout(x)                                         # §5.4: of the sums, too
        for layer in self.encoder:
            x = layer(x, mask)                                          # (B, S, D)
        return self.encoder_norm(x).masked_fill((src == PAD)[..., None], 0.0)

    def decode(self, tgt_in, memory, src):
        """Target states, each made of memory and of what precedes it. (B, T), (B, S, D), (B, S) -> (B, T, D)"""
        memory_mask = (src != PAD)[:, None, None, :]                    # (B, 1, 1, S)
        x = self.embed(tgt_in, self.embedding, self.learned_tgt)        # (B, T, D)
        x = self.tgt_dropout(x)
        for layer in self.decoder:
            memory_kv = layer.cross_attn.keys_values(memory)            # (B, H, S, K) twice
            x = layer(x, memory_kv, memory_mask)                        # (B, T, D)
        # Targets need no padding mask: it stands on the right, and causality keeps every real position from seeing it.
        return self.decoder_norm(x).masked_fill((tgt_in == PAD)[..., None], 0.0)

    def forward(self, src, tgt_in):
        memory = self.encode(src)                                       # (B, S) -> (B, S, D)
        states = self.decode(tgt_in, memory, src)                       # (B, T) -> (B, T, D)
        return self.output(states)                                      # (B, T, V): how much like each word's vector

# ---- §6.1 Decoding: what it is, then the same without computing anything twice, then several guesses at once ----

@contextlib.contextmanager
def eval_mode(model):
    """`with eval_mode(model):` is without dropout. Afterwards, even after an error, each part is as it was before."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True

def length_limits(model, src, max_len, min_len=0):
    """How many ids, EOS included, each translation may have: max_len, or its source's length + 50 (§6.1). -> (B,)"""
    lengths = (src != PAD).sum(1)
    limits = (lengths + 50).clamp(min=min_len) if max_len is None else torch.full_like(lengths, max_len)
    return limits.clamp(max=model.config.learned_positions) if model.config.learned_positions else limits

@torch.no_grad()
def greedy(model, src, max_len=None):
    """The most probable next token, again and again, until it is EOS. (B, S) -> (B, L) int64 ids without BOS

    This is all that decoding is. It computes the whole target so far anew for each token, so it is slow; but it shows
    what beam_search has to give for beam_size=1. Rows end with EOS, by force where they reach their limit, then PAD.
    """
    limits = length_limits(model, src, max_len)
    ids, length = src.new_full((len(src), 1), BOS), 0
    with eval_mode(model):
        memory = model.encode(src)
        while not (ended := (ids == EOS).any(1)).all():
            length += 1
            states = model.decode(ids, memory, src)                     # (B, length, D)
            token = EOS + model.output(states[:, -1])[:, EOS:].argmax(-1)       # (B,): any id but PAD and BOS
            token = token.masked_fill(limits == length, EOS).masked_fill(ended, PAD)
            ids = torch.cat((ids, token[:, None]), 1)
    return ids[:, 1:]

class Cache:
    """The keys and values of the source and of all positions so far: what a step of decoding need not compute again.

    The N hypotheses (beams) of a sentence are N queries in the place where training has T, so all of them look at one
    copy of the memory. In self-attention every step writes its N keys side by side, and `visible` says which of them
    lie in a beam's own past. Two beams, three steps; a row for each beam, a column for each key, 1 for "sees it":

        step       1   2   3
        beam      0 1 0 1 0 1
        beam 0    1 0 1 0 1 0
        beam 1    0 1 0 1 0 1

    Now both of the best continuations come from beam 1, so beam 0 takes over its past: reorder(parents=[1, 1]). Only
    these booleans move; the keys and values stay where they are. The fourth step opens with a new key for each beam:

        step       1   2   3   4
        beam      0 1 0 1 0 1 0 1
        beam 0    0 1 0 1 0 1 1 0
        beam 1    0 1 0 1 0 1 0 1
    """

    def __init__(self, model, memory, src, n_beams, max_len):
        """Takes all its memory here, once, for max_len steps. memory: (B, S, D), what model.encode(src) returned."""
        self.n_beams, self.length = n_beams, 0
        # Contiguous, heads outermost: otherwise every step would copy them once more before it multiplies.
        self.memory_kv = [[x.contiguous() for x in layer.cross_attn.keys_values(memory)] for layer in model.decoder]
        self.memory_mask = (src != PAD)[:, None, None, :] if (src == PAD).any() else None       # (B, 1, 1, S)
        B, H, _, K = self.memory_kv[0][0].shape
        empty = lambda like: like.new_empty(B, H, max_len * n_beams, K)
        self.self_kv = [(empty(k), empty(v)) for k, v in self.memory_kv]
        self.visible = torch.zeros(B, n_beams, max_len * n_beams, dtype=torch.bool, device=src.device)

    def open_position(self):
        """Makes room for the next position: every beam will see its own new key, and no other beam's."""
        new = slice(self.length * self.n_beams, (self.length + 1) * self.n_beams)
        self.visible[:, :, new] = torch.eye(self.n_beams, dtype=torch.bool, device=self.visible.device)
        self.length += 1

    def append(self, layer, k, v):
        """Stores the keys and values of the newest position, (B, H, N, K) each; returns all so far, and their mask."""
        end = self.length * self.n_beams
        for buffer, newest in zip(self.self_kv[layer], (k, v)):
            buffer[:, :, end - self.n_beams:end] = newest
        mask = self.visible[:, None, :, :end] if self.n_beams > 1 else None     # a single beam sees all there is
        return tuple(buffer[:, :, :end] for buffer in self.self_kv[layer]), mask

    def reorder(self, parents):
        """Beam n becomes a continuation of what was beam parents[:, n]. (B, N)"""
        self.visible = self.visible.gather(1, parents[..., None].expand_as(self.visible))

    def select(self, rows):
        """Keeps the sentences `rows` (a boolean for each), so that finished ones cost nothing more."""
        self.memory_kv = [(k[rows], v[rows]) for k, v in self.memory_kv]
        self.self_kv = [(k[rows], v[rows]) for k, v in self.self_kv]
        self.visible = self.visible[rows]
        self.memory_mask = None if self.memory_mask is None else self.memory_mask[rows]

def next_log_probs(model, newest, cache):
    """log P(next token) for each of N hypotheses a sentence, from their newest tokens. (B, N) -> (B, N, V), float32

    This is Transformer.decode for one position. Where that one computes keys and values, this one asks the cache.
    """
    cache.open_position()
    x = model.embed(newest.view(-1, 1), model.embedding, model.learned_tgt, cache.length - 1).view(*newest.shape, -1)
    for i, layer in enumerate(model.decoder):                           # as in DecoderLayer.forward:
        own, cross = layer.self_attn, layer.cross_attn
        x = layer.add_norm1(x, lambda y: own(y, *cache.append(i, *own.keys_values(y))))
        x = layer.add_norm2(x, lambda y: cross(y, cache.memory_kv[i], cache.memory_mask))
        x = layer.add_norm3(x, layer.ffn)                               # (B, N, D)
    return model.output(model.decoder_norm(x)).log_softmax(-1, dtype=torch.float32)             # (B, N, V)

@torch.no_grad()
def beam_search(model, src, beam_size=4, length_penalty=0.6, max_len=None, min_len=0, n_best=1):
    """The best translations a beam can find. §6.1, with the length penalty of GNMT (Wu et al., 2016, Eq. 14).

    src: (B, S) ids, each row ending with EOS, then PAD. Returns ids, (B, L) int64 without BOS, in the same form, and
    float32 scores, (B,): log P(ids | src) / ((5 + n) / 6)^length_penalty, where n counts the ids with EOS. beam_size=1
    is greedy decoding. With n_best > 1 both get an axis after the first, best first: (B, n_best, L) and (B, n_best);
    a row where the beam found fewer is PAD, its score -inf. max_len and min_len count ids with EOS; max_len=None is
    the paper's limit, source length + 50. No translation is longer than the positions that a model has learned, and
    none depends on the rest of the batch. Raises ValueError for sizes that make no sense.
    """
    if not 1 <= n_best <= beam_size or max_len is not None and max_len < max(min_len, 1):
        raise ValueError(f"expected 1 <= n_best <= beam_size and 1 <= max_len >= min_len, got n_best={n_best}, "
                         f"beam_size={beam_size}, max_len={max_len}, min_len={min_len}")
    limits = length_limits(model, src, max_len, min_len)                # (B,): each sentence has one of its own
    stops = set(limits.tolist())                                        # the lengths at which some sentence must end
    longest = max(stops, default=0)
    penalty = lambda n: ((5 + n) / 6) ** length_penalty
    B, N, V, device = len(src), beam_size, model.config.vocab_size, src.device
    with eval_mode(model):
        cache = Cache(model, model.encode(src), src, N, longest)
        # The beam: hypotheses that still grow. All N start as the same BOS, so only the first may count: otherwise the
        # beam would hold the same hypothesis N times, for ever.
        beam = torch.full((B, N, longest), PAD, device=device)
        log_prob = torch.full((B, N), -math.inf, device=device)
        log_prob[:, 0] = 0
        newest = torch.full((B, N), BOS, device=device)
        # The best that have ended, for each sentence of src; and for each row in work, the sentence it belongs to.
        result = torch.full((B, n_best, longest), PAD, device=device)
        result_score = torch.full((B, n_best), -math.inf, device=device)
        sentence = torch.arange(B, device=device)
        pick = lambda ids, index: ids.gather(1, index[..., None].expand(-1, -1, longest))       # whole hypotheses
        for length in range(1, longest + 1):
            total = next_log_probs(model, newest, cache)                # (B, N, V)
            total[..., :EOS] = -math.inf                                # PAD and BOS are never proposed
            if length in stops:                                         # at its limit a hypothesis can only end
                total[limits == length, :, EOS + 1:] = -math.inf
            elif length < min_len:
                total[..., EOS] = -math.inf

            # The 2N best continuations: even if N of them end here, N are left to go on.
            total, index = total.add_(log_prob[..., None]).flatten(1).topk(min(2 * N, N * V))   # (B, 2N), best first
            parent, token = index // V, index % V
            ends = token == EOS

            # Those that end have to be among the N best: with N = 1, greedy, EOS must be the best token of all.
            score = torch.where(ends, total / penalty(length), -math.inf)[:, :N]
            complete = pick(beam, parent[:, :N])
            complete[:, :, length - 1] = EOS
            best_score, index = torch.cat((result_score[sentence], score), 1).topk(n_best)
            result[sentence] = pick(torch.cat((result[sentence], complete), 1), index)
            result_score[sentence] = best_score

            # The best N of the others are the new beam.
            log_prob, index = total.masked_fill(ends, -math.inf).topk(N)
            parent, newest = parent.gather(1, index), token.gather(1, index)
            beam = pick(beam, parent)
            beam[:, :, length - 1] = newest
            cache.reorder(parent)

            # log P only falls. Divided by the largest penalty still to come, it bounds what the beam can still reach.
            bound = log_prob[:, 0] / penalty(limits.float()).clamp(min=penalty(length + 1))
            done = (best_score[:, -1] >= bound) | (ends[:, 0] if N == 1 else False)     # greedy ends at its first EOS
            log_prob.masked_fill_(done[:, None], -math.inf)             # what a finished sentence still finds is void
            n_done = int(done.sum())
            if n_done == len(done):
                break
            if 4 * n_done >= len(done):                                 # finished sentences leave, a quarter at a time
                cache.select(left := ~done)
                sentence, limits, beam, log_prob, newest = (x[left] for x in (sentence, limits, beam, log_prob, newest))

    result.masked_fill_(result_score[..., None] == -math.inf, PAD)
    result = result[..., :int((result != PAD).sum(-1).max()) if B else 0]
    return (result[:, 0], result_score[:, 0]) if n_best == 1 else (result, result_score)

# ---- From torch.nn.Transformer and back --------------------------------------

# Our names of weights, and its own. Its in_proj is W^Q, W^K and W^V in one matrix, of which our q is the first third.
TORCH_NAMES = (("coder.", "coder.layers."), ("add_norm", "norm"), (".norm.", "."), ("coder_norm", "coder.norm"),
               ("cross_attn", "multihead_attn"), (".out.", ".out_proj."), (".q.", ".in_proj_"), (".kv.", ".in_proj_"),
               ("ffn.w", "linear"))

def pairs_of_weights(model, module):
    """(ours, the same weight of a torch.nn.Transformer, or None if it lacks that), for all but embedding and output."""
    places, D = dict(module.named_parameters()), model.config.d_model
    for name, ours in model.named_parameters():
        if name.startswith(("encoder", "decoder")):
            part = slice(D) if ".q." in name else slice(D, None) if ".kv." in name else slice(None)
            for old, new in TORCH_NAMES:
                name = name.replace(old, new)
            yield ours, places[name][part] if name in places else None

@torch.no_grad()
def from_torch(module, config):
    """A Transformer with the weights of a torch.nn.Transformer, which has no embeddings: those start fresh.

    Its biases on the projections (attention_bias) and the norms at the end of its post-norm stacks (final_norms), both
    of which the paper lacks, come along. Raises ValueError, naming the difference, if it does not fit the config.
    """
    layers, final = (*module.encoder.layers, *module.decoder.layers), module.encoder.norm is not None
    bias = layers[0].self_attn.in_proj_bias is not None
    c = replace(config, attention_bias=bias, final_norms=final and not config.norm_first)
    facts = [("d_model", c.d_model, module.d_model), ("n_heads", c.n_heads, module.nhead),
             ("n_encoder_layers", c.n_encoder_layers, len(module.encoder.layers)),
             ("n_decoder_layers", c.n_decoder_layers, len(module.decoder.layers)),
             ("a final norm", c.norm_first or final, final), ("a final norm", final, module.decoder.norm is not None)]
    for layer in layers:
        relu = layer.activation in (F.relu, torch.relu) or isinstance(layer.activation, nn.ReLU)
        facts += [("norm_first", c.norm_first, layer.norm_first), ("d_ff", c.d_ff, layer.linear1.out_features),
                  ("ReLU", True, relu), ("LayerNorm eps", nn.LayerNorm(1).eps, layer.norm1.eps)]
    for name, ours, theirs in facts:
        if ours != theirs:
            raise ValueError(f"this torch.nn.Transformer doesn't fit the config: {name} is {theirs} there, {ours} here")
    model = Transformer(c)
    for ours, theirs in pairs_of_weights(model, module):
        ours.zero_() if theirs is None else ours.copy_(theirs)          # a bias that is missing there is zero here
    return model

@torch.no_grad()
def to_torch(model):
    """The same encoder and decoder as a torch.nn.Transformer (batch_first), whose inputs are embedded already."""
    c = model.config
    module = nn.Transformer(c.d_model, c.n_heads, c.n_encoder_layers, c.n_decoder_layers, c.d_ff, c.dropout,
                            batch_first=True, norm_first=c.norm_first)
    if not (c.norm_first or c.final_norms):
        module.encoder.norm = module.decoder.norm = None
    for ours, theirs in pairs_of_weights(model, module):
        theirs.copy_(ours)                                              # biases that are missing here start as zeros
    return module.train(model.training)

Transformer.from_torch, Transformer.to_torch = staticmethod(from_torch), to_torch       # they are methods as well

# =============================================================================
# THE MODEL ENDS HERE. What follows is text, files and the command line: delete it, and the model is still complete.
# =============================================================================

import copy
import difflib
import heapq
import io
import os
import re
import sys
import warnings
import zipfile
from collections import Counter, defaultdict

# ---- §5.1 Text: byte-level byte-pair encoding (Sennrich et al., 2016), shared by both languages ----

def merge(ids, pair, new):
    """Every occurrence of pair in ids, from the left, becomes new.

    >>> merge([1, 2, 1, 2, 1], (1, 2), new=9)
    [9, 9, 1]
    """
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out

class Tokenizer:
    """Text to ids and back. Ids 0, 1, 2 are PAD, BOS, EOS; 3..258 are the 256 bytes; the rest are merges, in order.

    `merges` is a list of pairs of ids: the i-th pair of neighbours becomes the one id 259 + i. Byte b is id b + 3, so
    "a" is 100, "b" is 101, and a space, which the first word gets as well, is 35:

    >>> Tokenizer([(100, 101)]).encode("aab ab")
    [35, 100, 259, 35, 259]

    Every byte has an id, so every string has an encoding, and decode(encode(s)) == s. No text becomes an id below 3.
    """

    # A word takes the space before it along. Words end at 32 characters, so that no input can make merging slow.
    WORD = re.compile(r" ?\w{1,32}| ?[^\w\s]{1,32}|\s{1,32}(?!\S)|\s")

    def __init__(self, merges):
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.bytes = [b""] * 3 + [bytes([i]) for i in range(256)]      # id -> the bytes it stands for
        for i, (a, b) in enumerate(self.merges):
            if not (3 <= a < 259 + i and 3 <= b < 259 + i) or len(self.bytes[a] + self.bytes[b]) > 33 * 4:
                raise ValueError(f"merge {i} joins ids {a} and {b}, expected earlier ones, of few bytes")
            self.bytes.append(self.bytes[a] + self.bytes[b])            # of any number, 60 merges would fill all memory
        self.joined = {pair: 259 + i for i, pair in enumerate(self.merges)}
        self.cache = {}                                                 # word -> its ids: text repeats its words

    def __len__(self):
        return len(self.bytes)

    @classmethod
    def words(cls, text):
        """Text cut into the pieces that merges never cross; the first gets a space, as in the middle of a sentence."""
        return cls.WORD.findall(" " + text) if text else []

    @classmethod
    def train(cls, lines, vocab_size):
        """Learns merges from strings, or a Counter of words, until there are vocab_size ids or no pair occurs twice.

        The most frequent pair of neighbours is merged, again and again; of equals, the pair with the smaller ids. To
        count all pairs anew each time would take hours. A merge changes the counts only in the words it occurs in, so
        those are remembered (`where`), and a heap gives the next pair; an entry that is out of date goes back into it.
        """
        if vocab_size < 259:
            raise ValueError(f"vocab_size must be at least 259 (3 special ids and 256 bytes), got {vocab_size}")
        counts = lines if isinstance(lines, Counter) else Counter(word for line in lines for word in cls.words(line))
        words = [[3 + byte for byte in word.encode("utf-8", "surrogatepass")] for word in counts]
        weights = list(counts.values())
        total, where = Counter(), defaultdict(set)                      # pair -> occurrences; pair -> words it is in
        for i, word in enumerate(words):
            for pair in zip(word, word[1:]):
                total[pair] += weights[i]
                where[pair].add(i)
        heap, merges = [(-n, pair) for pair, n in total.items()], []
        heapq.heapify(heap)
        while heap and 259 + len(merges) < vocab_size:
            n, pair = heapq.heappop(heap)
            if -n != total[pair]:
                heapq.heappush(heap, (-total[pair], pair))
            elif n < -1:
                new, grown = 259 + len(merges), set()
                merges.append(pair)
                for i in where.pop(pair):
                    for old in zip(words[i], words[i][1:]):
                        total[old] -= weights[i]
                    words[i] = merge(words[i], pair, new)
                    for fresh in zip(words[i], words[i][1:]):
                        total[fresh] += weights[i]
                        if new in fresh:
                            where[fresh].add(i)
                            grown.add(fresh)
                for fresh in grown:
                    heapq.heappush(heap, (-total[fresh], fresh))
        return cls(merges)

    def encode(self, text):
        """str -> list of ids, no BOS or EOS: each word's bytes, joined by the merge learnt first until none fits."""
        ids = []
        for word in self.words(text):
            piece = self.cache.get(word)
            if piece is None:
                piece = [3 + byte for byte in word.encode("utf-8", "surrogatepass")]
                while pairs := [pair for pair in zip(piece, piece[1:]) if pair in self.joined]:
                    first = min(pairs, key=self.joined.get)
                    piece = merge(piece, first, self.joined[first])
                if len(self.cache) < 1_000_000:
                    self.cache[word] = piece
            ids.extend(piece)
        return ids

    def decode(self, ids):
        """List of ids -> str. Special ids have no text; bytes that are not UTF-8, as a model may write, are U+FFFD."""
        if not all(0 <= i < len(self.bytes) for i in ids):
            raise ValueError(f"expected ids from 0 to {len(self.bytes) - 1}, got {min(ids)} to {max(ids)}")
        data = b"".join([self.bytes[i] for i in ids]).removeprefix(b" ")
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

# ---- Checkpoints: tensors and plain values, nothing that could run ----------

FORMAT = "attention-is-all-you-need/1"

def write_atomically(path, content):
    """Puts content, anything torch.save takes, in a file beside path, flushes it to disk, and only then gives it path's
    name. Whenever the power goes, path is the old file or the new one, whole. Raises OSError with the path."""
    buffer, path = io.BytesIO(), os.path.realpath(path)
    torch.save(content, buffer)
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError as error:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise OSError(error.errno, error.strerror, path) from None      # "No space left on device", and where

def save(path, model, tokenizer=None, length_penalty=0.6):
    """Writes the model with all it takes to translate to one file, atomically. Raises OSError if it can't."""
    merges = None if tokenizer is None else torch.tensor(tokenizer.merges, dtype=torch.int32).view(-1, 2)
    on_cpu = {w.data_ptr(): w.detach().cpu() for w in model.state_dict().values()}      # tied weights only once
    write_atomically(path, {"format": FORMAT, "config": vars(model.config), "merges": merges,
                            "model": {name: on_cpu[w.data_ptr()] for name, w in model.state_dict().items()},
                            "length_penalty": length_penalty})

def read_checkpoint(path):
    """The dict that write_atomically wrote, if every bit of it is still right. Raises ValueError in one line if not."""
    try:
        with zipfile.ZipFile(path) as archive:          # torch.load checks no checksum: a flipped bit would be a weight
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:       # both raise half a dozen types for bytes that are not their own; the meaning is one
        raise ValueError(f"{path} is not a checkpoint, or it is damaged") from None

def load(path, device="cpu"):
    """Reads what `save` wrote. -> (model in eval mode, tokenizer or None). Raises ValueError, one line, if it can't."""
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint, dict) and "optimizers" in checkpoint:
        other = os.path.join(os.path.dirname(path), "model.pt")
        raise ValueError(f"{path} is for resuming a training; the model to use is {other}")
    try:
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}, got {checkpoint['format']!r}")
        config = Config(**checkpoint["config"])
        if config.n_encoder_layers + config.n_decoder_layers > len(checkpoint["model"]):
            raise ValueError("the config has more layers than there are weights")
        with torch.device("meta"):                                      # no memory is taken for sizes not checked yet
            model = Transformer(config)
        model.load_state_dict(checkpoint["model"], assign=True)
        if config.tied_output:
            model.output.weight = model.embedding.weight
        tokenizer = None if checkpoint["merges"] is None else Tokenizer(checkpoint["merges"].tolist())
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit this transformer.py: {str(error).splitlines()[0]}") from None
    model.length_penalty = checkpoint.get("length_penalty", 0.6)
    return model.to(device).eval(), tokenizer

# ---- A loaded model, made fast on this machine ------------------------------

def has_bfloat16(device):
    """Does this device multiply bfloat16 in hardware? Where it only imitates that, float32 is faster."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

def has_int8(device):
    """Has this build of torch matrix products in 8-bit integers for this device?"""
    return device.type == "cpu" and torch.backends.quantized.engine != "none"

def packed(linear, dtype, out_dtype):
    """A Linear layer as a function whose weights lie as a CPU's kernels read them: to sort them anew takes longer than
    the product of a few rows. In int8 every row of the weights is rounded to a scale of its own, and all inputs of a
    call to one: so what shares a batch with a sentence can move its numbers, by a rounding."""
    weight, bias = linear.weight, linear.bias
    if dtype != "int8":
        ready, product = torch.ops.mkldnn._reorder_linear_weight(weight, 32), torch.ops.mkldnn._linear_pointwise
        return lambda x: product(x.to(weight.dtype), ready, bias, "none", [], "").to(out_dtype)
    scale = weight.abs().amax(1).clamp(min=1e-8).double() / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # torch plans to drop this kind of tensor, but has no other yet
        weight = torch.quantize_per_channel(weight, scale, torch.zeros_like(scale).long(), 0, torch.qint8)
    ready, narrow = torch.ops.quantized.linear_prepack(weight, bias), not torch.cpu._is_vnni_supported()
    return lambda x: torch.ops.quantized.linear_dynamic(x, ready, narrow)       # narrow: sums of products in 16 bits

def for_inference(model, dtype="auto"):
    """A copy of the model to translate with, in eval mode and on the same device; the model itself stays as it is.
    dtype: "float32", "bfloat16", "int8" or "auto", else ValueError. "auto" is bfloat16 where the hardware has it, else
    float32, and so is int8 where has_int8 says no. A copy whose weights are packed can't be trained or saved."""
    device = model.embedding.weight.device
    if dtype == "auto" or dtype == "int8" and not has_int8(device):
        dtype = "bfloat16" if has_bfloat16(device) else "float32"
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"dtype must be float32, bfloat16, int8 or auto, got {dtype!r}")
    between = torch.bfloat16 if dtype == "bfloat16" else torch.float32          # what flows from product to product
    fast = copy.deepcopy(model).to(between).eval().requires_grad_(False)
    on_cpu = device.type == "cpu" and torch.backends.mkldnn.is_available()
    packs = on_cpu and "AVX" in torch.backends.cpu.get_cpu_capability() and (dtype == "float32" or has_bfloat16(device))
    for parent in list(fast.modules()) if packs or dtype == "int8" else []:
        # A subclass of Linear may compute something else, so it stays as it is.
        linears = {name: part for name, part in parent.named_children() if type(part) is nn.Linear}
        for name, linear in linears.items():
            # A CPU is slow with many small products in bfloat16, so queries, keys and values are float32.
            wide = name != "out" and linears.keys() == {"q", "kv", "out"}
            delattr(parent, name)                       # a module gives way to a function
            setattr(parent, name, packed(linear, dtype, torch.float32 if wide else between))
    return fast

# ---- Translation: text in, text out -----------------------------------------

def pad_rows(rows, device="cpu"):
    """Lists of ids -> one (B, longest) int64 tensor, filled up with PAD on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, PAD).to(device)

def translate(model, tokenizer, lines, beam_size=4, length_penalty=0.6, batch_tokens=4096, n_best=1, max_src=1024):
    """Translations of a list of strings, in order: [[(text, score), ...n_best], ...]. An empty line stays empty.
    Sentences of like length go through together, as many as make batch_tokens source ids with padding. Sources are cut
    after max_src ids: memory grows with the square of the length. Line breaks in a translation become spaces."""
    max_src = min(max_src, (model.config.learned_positions or math.inf) - 1)            # one is for EOS
    sources = {i: tokenizer.encode(line)[:max_src] + [EOS] for i, line in enumerate(lines) if line.strip()}
    results = [[("", 0.0)] * n_best for _ in lines]
    order = sorted(sources, key=lambda i: -len(sources[i]))             # longest first: too little memory shows at once
    while order:
        n = max(1, batch_tokens // len(sources[order[0]]))
        batch, order = order[:n], order[n:]
        src = pad_rows([sources[i] for i in batch], model.embedding.weight.device)
        ids, scores = beam_search(model, src, beam_size, length_penalty, n_best=n_best)
        for i, rows, values in zip(batch, ids.view(len(batch), n_best, -1).tolist(), scores.view(-1, n_best).tolist()):
            results[i] = [(" ".join(tokenizer.decode(row).splitlines()), value) for row, value in zip(rows, values)]
    return results

@torch.no_grad()
def attention_maps(model, src, tgt_in):
    """Who looks at whom, without dropout; every tensor has the layers first, and then a map for each sentence and head.
    -> {"encoder": (n_encoder_layers, B, H, S, S), "decoder": (n_decoder_layers, B, H, T, T), "cross": (..., T, S)}"""
    maps = {"encoder": [], "decoder": [], "cross": []}
    weights = lambda attn, x, keys_values, mask=None, causal=False: attention_weights(
        attn.split_heads(attn.q(x)), keys_values[0], causal_mask(x.size(1), x.device) if causal else mask)
    with eval_mode(model), contextlib.ExitStack() as hooks:             # at its end, the hooks are gone
        for name, part in model.named_modules():
            if isinstance(part, MultiHeadAttention):
                seen = maps["cross" if "cross" in name else name.split(".")[0]]
                look = lambda attn, args, options, seen=seen: seen.append(weights(attn, *args, **options))
                hooks.enter_context(part.register_forward_pre_hook(look, with_kwargs=True))
        model(src, tgt_in)
    return {name: torch.stack(seen) for name, seen in maps.items()}

def draw_attention(model, tokenizer, source, target, max_src=1024):
    """Where the model looks while it writes target: the cross-attention of its last layer, averaged over the heads, as
    lines for the terminal. A row is a target token, a column a source token, and darker is more. Two strings -> str"""
    src, tgt = tokenizer.encode(source)[:max_src] + [EOS], tokenizer.encode(target) + [EOS]
    rows = [pad_rows([ids], model.embedding.weight.device) for ids in (src, [BOS] + tgt[:-1])]
    text = lambda i: "</s>" if i == EOS else tokenizer.bytes[i].decode("utf-8", "replace").strip() or "·"
    names = lambda ids, n: ["".join(c if c.isprintable() else "·" for c in text(i))[:n] for i in ids]
    columns, wide = names(src, 10), 2 if 2 * len(src) + 17 <= 80 else 1
    tall = max(map(len, columns))
    lines = [" " * 17 + "".join(name.rjust(tall)[row].ljust(wide) for name in columns) for row in range(tall)]
    for name, weights in zip(names(tgt, 16), attention_maps(model, *rows)["cross"][-1, 0].float().mean(0).tolist()):
        lines.append(f"{name:>16} " + "".join(" ░▒▓█"[min(4, int(w * 5))] * wide for w in weights))
    return "\n".join(line.rstrip() for line in lines)

def read_windows(stream):
    """Lists of lines from a binary stream, each what one read brings: a file comes in large blocks, and a pipe as it is
    written, so an endless input is translated as it comes. Only \\n ends a line; bytes not UTF-8 turn U+FFFD."""
    rest, text = b"", lambda line: line.rstrip(b"\r\n").decode("utf-8", "replace").removeprefix("\ufeff")
    while block := stream.read1(1 << 19):
        *lines, rest = (rest + block).split(b"\n")
        yield [text(line) for line in lines]
    if rest:
        yield [text(rest)]

# ---- The tour: python transformer.py ----------------------------------------

def tour():
    """A small model, step by step, with every claim checked. Raises AssertionError if one does not hold."""
    torch.manual_seed(0)
    show = lambda what, x: print(f"  {what:<44} {tuple(x.shape)}")
    config = Config(vocab_size=11, d_model=32, n_heads=4, d_ff=64, n_encoder_layers=2, n_decoder_layers=2, dropout=0)
    model = Transformer(config).eval()
    src = torch.tensor([[3, 4, 5, 6, 7, EOS], [8, 9, EOS, PAD, PAD, PAD]])
    tgt = torch.tensor([[BOS, 7, 6, 5, 4, 3, EOS], [BOS, 9, 8, EOS, PAD, PAD, PAD]])
    tgt_in, tgt_out = tgt[:, :-1], tgt[:, 1:]           # BOS goes in, EOS comes out: each position predicts the next id
    print("The shapes, for 2 sentences of up to 6 ids on either side, D = 32, 4 heads, 11 words")
    with torch.no_grad():
        show("embedded and placed", x := model.embed(src, model.src_embedding, model.learned_src))
        attn = model.encoder[0].self_attn
        q, (k, v) = attn.split_heads(attn.q(x)), attn.keys_values(x)
        show("queries, keys and values, for each head", q)
        show("mask: which keys are words", mask := (src != PAD)[:, None, None, :])
        show("attention weights: query by key", weights := attention_weights(q, k, mask))
        show("memory: the encoder's output", memory := model.encode(src))
        show("states: the decoder's output", model.decode(tgt_in, memory, src))
        show("logits: a score for every word", logits := model(src, tgt_in))
        assert torch.allclose(weights.sum(-1), torch.ones(())) and not weights[1, :, :, 3:].any()
        changed = tgt_in.index_fill(1, torch.tensor([3]), 10)
        assert torch.equal(model(src, changed)[:, :3], logits[:, :3]) and not torch.equal(model(src, changed), logits)
        assert torch.allclose(model(src[1:, :3], tgt_in[1:, :4]), logits[1:, :4], atol=1e-5)
        assert torch.equal(greedy(model, src), beam_search(model, src, beam_size=1)[0])
    print("\nChecked: weights sum to 1, and padding gets none; no prediction depends on a later target word;\n"
          "a sentence gets the same logits alone and in a batch; the cache changes nothing but the time\n"
          "\nLearning this batch by heart: every target is its source in reverse")
    optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-9)
    for step in range(1, 101):
        logits = model(src, tgt_in)                                             # (B, T, V)
        loss = F.cross_entropy(logits.transpose(1, 2), tgt_out, ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, 10, 100):
            print(f"  step {step:3}  loss {loss.item():.3f}")
    assert torch.equal(greedy(model, src), tgt_out)
    print("  greedy decoding writes", *tgt_out.tolist(), "\nAll of it holds. Next: python train.py")

# ---- The command line, of this script and of train.py and bench.py -----------

def fail(message):
    """One line for a mistake of the user's, and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def override(settings, argv, path):
    """The settings that argv (--name=value) changes, each of the type of its default; nothing is evaluated as code.
    --help prints the docstring and the settings of the script at path. A mistake costs one line and exit status 2."""
    given = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            what, names = re.split("\n *# ---- (?:end of )?settings.*\n", open(path, encoding="utf-8").read())[:2]
            print(what.split('"""')[1].split("\nRead it")[0].strip(), names, sep="\n\n")
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
            if kind is str:                             # "~" is the home folder, in every path
                given[name] = os.path.expanduser(value)
        except (KeyError, ValueError):
            what = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
            fail(f"--{name} must be {what}, got {value!r}")
    return given

def main(*,
    # ---- settings ---------------------------------------------------------------
    checkpoint="",          # a file that train.py wrote; "": the tour
    beam_size=4,            # hypotheses kept for each sentence; 1 is greedy
    length_penalty=-1.0,    # its alpha, larger for longer translations; -1: what train.py found best in validation
    n_best=1,               # translations for each line; above 1 each is printed as line number, score, text, with tabs
    batch_tokens=4096,      # source ids translated together, padding included
    max_src=1024,           # source ids after which a line is cut
    attention=False,        # True draws each translation's attention map under it
    device="auto",          # cpu, cuda, cuda:1, mps; auto: cuda where there is one
    dtype="auto",           # float32, bfloat16, int8 (the fastest on a CPU); auto: bfloat16 where the hardware has it
    # ---- end of settings --------------------------------------------------------
):
    if not checkpoint:
        return tour()
    if batch_tokens < 1 or max_src < 1 or not 1 <= n_best <= beam_size or not -1 <= length_penalty <= 10:
        fail("expected batch_tokens, max_src >= 1; 1 <= n_best <= beam_size; and -1 <= length_penalty <= 10")
    torch.backends.cuda.enable_cudnn_sdp(False)         # it makes a new plan for every new shape: at every step
    try:
        model, tokenizer = load(checkpoint, device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
        model = for_inference(model, dtype)
    except (ValueError, RuntimeError, AssertionError) as error:         # the latter two for a device that isn't there
        fail(f"--device={device} can't be used: " * (not isinstance(error, ValueError)) + str(error).splitlines()[0])
    if dtype == "int8" and not has_int8(model.embedding.weight.device):
        print("this device has no products in int8: translating as with --dtype=auto", file=sys.stderr)
    if tokenizer is None:
        fail(f"{checkpoint} holds no tokenizer: its model was trained on ids, not on text")
    # Line by line, so that whoever kills this finds whole lines. "?" is what can't be written in UTF-8.
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    n, alpha = -1, length_penalty if length_penalty >= 0 else model.length_penalty
    try:
        for lines in read_windows(sys.stdin.buffer):
            results = translate(model, tokenizer, lines, beam_size, alpha, batch_tokens, n_best, max_src)
            for n, (line, best) in enumerate(zip(lines, results), n + 1):
                print(*(f"{n}\t{score:.4f}\t{text}" if n_best > 1 else text for text, score in best), sep="\n")
                if attention and line.strip():
                    print(draw_attention(model, tokenizer, line, best[0][0], max_src), end="\n\n")
    except BrokenPipeError:                                             # the reader has had enough (head, less)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        fail(f"out of memory: lower --batch_tokens={batch_tokens} or --beam_size={beam_size}")

if __name__ == "__main__":
    main(**override(main.__kwdefaults__, sys.argv[1:], __file__))
