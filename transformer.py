"""
The Transformer of "Attention Is All You Need" (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762) in one file.

    python transformer.py                                             # a guided tour that checks itself, in seconds
    python transformer.py --checkpoint=out/model.pt < in.txt > out.txt  # translate: one line in, one line out

Read it from top to bottom; what is used was defined above, but for two helpers of from_torch. The order is the paper's:

    Config                                   Table 3: the sizes
    sinusoids                      §3.5      where a token stands
    attention, MultiHeadAttention  §3.2      who looks at whom
    FeedForward                    §3.3      what each position computes alone
    AddNorm, Encoder-/DecoderLayer §3.1      how they are stacked
    Transformer                    §3, §3.4  ids in, logits out
    Cache, beam_search             §6.1      from logits to a translation

Below the line "THE MODEL ENDS HERE" stand the tokenizer, the checkpoint and the command line. Delete from there on,
and what is left is the model, complete.

One letter for each axis, in every comment:
    B batch, S source length, T target length, D d_model, H heads, K d_head = D/H, V vocabulary;
    in decoding, N beams (hypotheses of a sentence) and L the longest that a translation may become

Where this differs from the paper, and why (every point has a test):

 1. Padding. The paper does not mention it. A batch needs it, so id PAD fills the ends of short rows: it is never
    attended to, and the encoder's and decoder's outputs there are zeros.
 2. Initial weights. The paper is silent. Matrices are Glorot-uniform, embeddings are normal with variance 1/D, so that
    the √D of §3.4 brings them to the scale of the positions and the tied logits start near zero.
 3. LayerNorm's ε, silent too, is PyTorch's.
 4. Beam search never proposes PAD or BOS, and makes a hypothesis end (EOS) when it reaches its length limit.
    It stops when no unfinished hypothesis can still win; the paper says only "terminate early when possible".
 5. Text becomes byte-level BPE with a space put before the first word, where the paper has character BPE:
    any string can be written, so there is no unknown word.
 6. `Config` offers what the paper does not use by default: norms before the sub-layers (norm_first), an output matrix
    of its own (tied_output=False), a source vocabulary of its own, biases on the attention projections.
"""

import copy
import math
from dataclasses import asdict, dataclass, fields, replace

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
    norm_first: bool = False        # True: x + f(norm(x)), with a final norm; trains deep stacks with less care
    learned_positions: int = 0      # 0: sinusoids; n: a learned vector for each of n positions (Table 3, row E)
    tied_output: bool = True        # §3.4: the target embedding is also the output projection
    src_vocab_size: int = 0         # 0: source and target share vocab_size and the embedding
    attention_bias: bool = False    # the paper's projections are plain matrices; torch.nn.Transformer adds biases

    def __post_init__(self):
        for field in fields(self):
            value, want = getattr(self, field.name), field.type
            if want == float and type(value) == int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) != want:
                raise ValueError(f"{field.name} must be {want.__name__}, got {value!r}")
        for name in ("vocab_size", "d_model", "n_heads", "d_ff", "n_encoder_layers", "n_decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learned_positions", "src_vocab_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.vocab_size <= EOS or 0 < self.src_vocab_size <= EOS:
            raise ValueError(f"a vocabulary needs more than the {EOS + 1} special ids, got "
                             f"vocab_size={self.vocab_size} and src_vocab_size={self.src_vocab_size}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model must be divisible by n_heads, got {self.d_model} and {self.n_heads}")
        if self.d_model % 2:
            raise ValueError(f"d_model must be even (a sine and a cosine for each frequency), got {self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


BASE = Config()
BIG = Config(d_model=1024, n_heads=16, d_ff=4096, dropout=0.3)


# -----------------------------------------------------------------------------
# §3.5 Positional encoding

def sinusoids(positions, d_model):
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(same). positions: (...) -> (..., D), float32. §3.5

    Attention is a sum over a set: without this, "dog bites man" and "man bites dog" would be the same sentence.
    Each pair of columns is a clock hand of its own speed, and moving by k positions turns every hand by a fixed
    angle, so "k words ago" is a linear function of the encoding. Being a formula, it has no longest sentence.
    """
    i = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32)
    frequency = torch.exp(i * (-math.log(10000.0) / d_model))                   # (D/2,) = 10000^(-2i/D)
    angle = positions[..., None].float() * frequency                            # (..., D/2)
    # stack, then flatten: sine and cosine interleave column by column, as the formula says, and not half by half
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)          # (..., D)


# -----------------------------------------------------------------------------
# §3.2 Attention

def attention_weights(q, k, mask=None):
    """softmax(QKᵀ/√d_k), Eq. 1. q: (..., T, K), k: (..., S, K), mask: boolean, broadcasts to (..., T, S) -> (..., T, S)

    mask is True where a query may attend. A query that may attend to nothing gets zeros: it is part of the padding.
    """
    # The dot products of random vectors grow like √d_k, and a softmax of large numbers has no gradient. (§3.2.1)
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1))
    if mask is None:
        return scores.softmax(-1)
    # The lowest finite number, not -inf: a row of nothing but -inf would be 0/0 = NaN, forward and backward.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def attention(q, k, v, mask=None, causal=False):
    """softmax(QKᵀ/√d_k) V, Eq. 1: every query takes the average of the values, weighted by how well the keys match it.

    q: (B, H, T, K), k and v: (B, H, S, K), mask: boolean, True = may attend -> (B, H, T, K).
    causal=True lets position t see positions up to t only, and needs T = S.
    """
    T, S = q.size(-2), k.size(-2)
    # A fused kernel never writes the (T, S) weights to memory. But on a CPU it is slow where that would not hurt:
    # training on sentences of everyday length is 1.3 times faster by the definition, below.
    if q.is_cuda or T * S > 512 * 512:
        if causal:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v)
        # What a kernel returns for a query without a key depends on the kernel. So let such a query see everything...
        nothing = ~mask.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | nothing)
        return y.masked_fill(nothing, 0.0)  # ...and then give it the zeros of the definition.
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    return attention_weights(q, k, mask).to(v.dtype) @ v


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each on its own D/H-wide projection of queries, keys and values. §3.2.2

    It serves all three uses of §3.2.3, because keys and values come from outside: from the queries' own sequence
    (self-attention), from the encoder's output (cross-attention), or from a cache of earlier steps (decoding).

        y = attn(x, attn.keys_values(x), mask)          # self
        y = attn(x, attn.keys_values(memory), mask)     # cross
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

    def forward(self, x, keys_values, mask=None, causal=False, seen=None):
        """x: (B, T, D) -> (B, T, D). `seen`, a list, is given the attention weights (B, H, T, S)."""
        q, (k, v) = self.split_heads(self.q(x)), keys_values
        y = attention(q.to(k.dtype), k, v, mask, causal).to(q.dtype)    # (B, H, T, K); a cache may be in float32
        if seen is not None:
            T = q.size(-2)
            if causal:
                mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
            seen.append(attention_weights(q, k, mask))
        return self.out(y.transpose(1, 2).flatten(2))                   # heads side by side again, then W^O


# -----------------------------------------------------------------------------
# §3.3 Position-wise feed-forward network

class FeedForward(nn.Module):
    """FFN(x) = max(0, xW₁ + b₁)W₂ + b₂, Eq. 2, at every position alone. (B, T, D) -> (B, T, D)

    Attention moves information between positions; this is where it is worked on. Two thirds of a layer's weights.
    """

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff)
        self.w2 = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x):
        return self.w2(F.relu(self.w1(x)))


# -----------------------------------------------------------------------------
# §3.1 Encoder and decoder stacks

class Dropout(nn.Module):
    """Zeroes each number with probability p while training, and scales the others by 1/(1 - p). §5.4

    torch's own dropout, but for compiled training on a CPU, where drawing random numbers one after the other costs a
    fifth of a step. There the random bits are a hash of a number's place and of one seed a call: plain integer
    arithmetic, which the compiler runs sixteen numbers at a time, inside the loop that uses them.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p
        # Of 65536. An integer is a constant to torch.compile, but a float is an input: from its cache, a program made
        # for one p would be taken for another.
        self.kept = max(1, round((1 - p) * 65536))
        self.seed = None        # an int32 tensor, if a trainer that compiles this fills it anew before each forward

    def forward(self, x):
        if not self.training or self.kept == 65536:
            return x
        if x.device.type != "cpu" or not torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        seed = torch.randint(1 << 31, (), dtype=torch.int32) if self.seed is None else self.seed
        h = torch.arange(x.numel(), dtype=torch.int32).view(x.shape) * -1640531535 ^ seed
        h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D                       # two rounds of a multiply-xorshift hash
        h = (h ^ (h >> 15 & 0x1FFFF)) * -2073254261
        return torch.where((h >> 16 & 0xFFFF) < self.kept, x * (65536 / self.kept), 0.0)


class AddNorm(nn.Module):
    """A residual connection around a sub-layer, and a norm: LayerNorm(x + Dropout(Sublayer(x))). §3.1, §5.4

    The paper's order is post-norm. With norm_first it is x + Dropout(Sublayer(LayerNorm(x))): the sum itself is never
    normalised, so gradients reach the bottom of the stack unchanged, and the stack needs one more norm at its end.
    """

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout)
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

    def forward(self, x, mask, seen=None):
        x = self.add_norm1(x, lambda y: self.self_attn(y, self.self_attn.keys_values(y), mask, seen=seen))
        return self.add_norm2(x, self.ffn)


class DecoderLayer(nn.Module):
    """Every target position looks at those before it, then at the source, then thinks. (B, T, D) -> (B, T, D)"""

    def __init__(self, config):
        super().__init__()
        self.self_attn = MultiHeadAttention(config)
        self.cross_attn = MultiHeadAttention(config)
        self.ffn = FeedForward(config)
        self.add_norm1, self.add_norm2, self.add_norm3 = AddNorm(config), AddNorm(config), AddNorm(config)

    def forward(self, x, memory_kv, memory_mask, seen=None, seen_memory=None):
        x = self.add_norm1(x, lambda y: self.self_attn(y, self.self_attn.keys_values(y), causal=True, seen=seen))
        x = self.add_norm2(x, lambda y: self.cross_attn(y, memory_kv, memory_mask, seen=seen_memory))
        return self.add_norm3(x, self.ffn)

    def step(self, x, cache, layer):
        """The same for the newest position alone, with the earlier ones in the cache. (B, N, D) -> (B, N, D)"""
        keys_values = self.self_attn.keys_values
        x = self.add_norm1(x, lambda y: self.self_attn(y, cache.append(layer, *keys_values(y)), cache.mask()))
        x = self.add_norm2(x, lambda y: self.cross_attn(y, cache.memory_kv[layer], cache.memory_mask))
        return self.add_norm3(x, self.ffn)


# -----------------------------------------------------------------------------
# §3 The model

class Transformer(nn.Module):
    """Source ids and the target ids so far in, a score for every possible next target id out. Figure 1.

    model(src, tgt_in) -> logits: (B, S) and (B, T) int64 -> (B, T, V). Rows are padded with PAD on the right; targets
    begin with BOS. logits[:, t] scores the token that follows tgt_in[:, t].
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.d_model
        # §3.4: one matrix embeds the source, embeds the target, and, transposed, turns states into logits.
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.src_embedding = nn.Embedding(config.src_vocab_size, D) if config.src_vocab_size else self.embedding
        self.output = nn.Linear(D, config.vocab_size, bias=False)
        if config.tied_output:
            self.output.weight = self.embedding.weight                  # the same tensor: one gradient, one update
        if config.learned_positions:
            self.src_positions = nn.Embedding(config.learned_positions, D)
            self.tgt_positions = nn.Embedding(config.learned_positions, D)
        self.dropout = Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_decoder_layers))
        final_norm = nn.LayerNorm if config.norm_first else nn.Identity  # a post-norm stack already ends in a norm
        self.encoder_norm, self.decoder_norm = final_norm(D), final_norm(D)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initial values, in one place. Every layer draws its own."""
        for name, weight in self.named_parameters():
            if "embedding" in name or "positions" in name or name == "output.weight":
                weight.normal_(0, self.config.d_model ** -0.5)
            elif weight.dim() == 2:
                for matrix in weight.chunk(2 if name.endswith("kv.weight") else 1):     # W^K and W^V each on its own
                    nn.init.xavier_uniform_(matrix)
            elif name.endswith("bias"):
                weight.zero_()                                          # what is left are norm weights: ones already

    def embed(self, ids, embedding, positions, start=0):
        """Embedding · √D + position, then dropout. §3.4, §3.5. (B, T) -> (B, T, D)"""
        end = start + ids.size(1)
        place = torch.arange(start, end, device=ids.device)
        if positions is None:
            encoding = sinusoids(place, self.config.d_model)
        elif end > positions.num_embeddings:
            raise ValueError(f"expected at most the {positions.num_embeddings} positions learned, got {end}")
        else:
            encoding = positions(place)
        x = embedding(ids) * math.sqrt(self.config.d_model)
        return self.dropout(x + encoding.to(x.dtype))

    def embed_src(self, src):
        return self.embed(src, self.src_embedding, getattr(self, "src_positions", None))

    def embed_tgt(self, tgt_in, start=0):
        return self.embed(tgt_in, self.embedding, getattr(self, "tgt_positions", None), start)

    def encode(self, src, seen=None):
        """The source, every token in the light of all others: the decoder's memory. (B, S) -> (B, S, D)"""
        mask = (src != PAD)[:, None, None, :]                           # (B, 1, 1, S): no query may look at padding
        x = self.embed_src(src)                                         # (B, S, D)
        for layer in self.encoder:
            x = layer(x, mask, seen)                                    # (B, S, D)
        return self.encoder_norm(x).masked_fill((src == PAD)[..., None], 0.0)

    def decode(self, tgt_in, memory, src, seen=None, seen_memory=None):
        """Target states, each made of memory and of what precedes it. (B, T), (B, S, D), (B, S) -> (B, T, D)"""
        memory_mask = (src != PAD)[:, None, None, :]                    # (B, 1, 1, S)
        x = self.embed_tgt(tgt_in)                                      # (B, T, D)
        for layer in self.decoder:
            memory_kv = layer.cross_attn.keys_values(memory)            # (B, H, S, K) twice
            x = layer(x, memory_kv, memory_mask, seen, seen_memory)     # (B, T, D)
        # Targets need no padding mask: it stands on the right, and causality keeps every real position from seeing it.
        return self.decoder_norm(x).masked_fill((tgt_in == PAD)[..., None], 0.0)

    def logits(self, states):
        """§3.4: the similarity of each state to each word's vector. (..., D) -> (..., V)"""
        return self.output(states)

    def forward(self, src, tgt_in):
        memory = self.encode(src)                                       # (B, S) -> (B, S, D)
        states = self.decode(tgt_in, memory, src)                       # (B, T) -> (B, T, D)
        return self.logits(states)                                      # (B, T, V)

    def log_probs(self, src, tgt_in):
        """log P(next token | source, target so far), float32: forward, then a log-softmax. -> (B, T, V)"""
        return self.forward(src, tgt_in).float().log_softmax(-1)

    def attention_maps(self, src, tgt_in):
        """Who looked at whom: {"encoder": (Le, B, H, S, S), "decoder": (Ld, B, H, T, T), "cross": (Ld, B, H, T, S)}"""
        encoder, decoder, cross = [], [], []
        self.decode(tgt_in, self.encode(src, encoder), src, decoder, cross)
        return {"encoder": torch.stack(encoder), "decoder": torch.stack(decoder), "cross": torch.stack(cross)}

    @classmethod
    def from_torch(cls, module, config):
        """A Transformer with the weights of a torch.nn.Transformer, which has no embeddings: those start fresh.

        Post-norm is nn.Transformer's encoder and decoder without the extra norm at their ends (encoder.norm = None,
        decoder.norm = None). Biases on the projections come along: attention_bias is set as the module has it.
        Raises ValueError, naming the difference, if the module does not fit the config.
        """
        bias = module.encoder.layers[0].self_attn.in_proj_bias is not None
        model = cls(replace(config, attention_bias=bias))
        difference = _difference(module, model)
        if difference:
            raise ValueError(f"this torch.nn.Transformer does not fit the config: {difference}")
        with torch.no_grad():
            for ours, theirs in _weight_pairs(model, module):
                ours.zero_() if theirs is None else ours.copy_(theirs)  # a bias that is missing there is zero here
        return model

    def to_torch(self):
        """The same encoder and decoder as a torch.nn.Transformer (batch_first), whose inputs are embedded already."""
        c = self.config
        module = nn.Transformer(c.d_model, c.n_heads, c.n_encoder_layers, c.n_decoder_layers, c.d_ff, c.dropout,
                                batch_first=True, norm_first=c.norm_first)
        if not c.norm_first:
            module.encoder.norm = module.decoder.norm = None
        with torch.no_grad():
            for name, weight in module.named_parameters():
                if name.endswith("bias"):
                    weight.zero_()
            for ours, theirs in _weight_pairs(self, module):
                theirs.copy_(ours)
        return module.train(self.training)


def _weight_pairs(model, module):
    """(weight of a Transformer, its place in a torch.nn.Transformer or None) for every weight but the embeddings."""
    attentions, plain = [], []
    for ours, theirs in zip(model.encoder, module.encoder.layers):
        attentions += [(ours.self_attn, theirs.self_attn)]
        plain += [(ours.ffn.w1, theirs.linear1), (ours.ffn.w2, theirs.linear2),
                  (ours.add_norm1.norm, theirs.norm1), (ours.add_norm2.norm, theirs.norm2)]
    for ours, theirs in zip(model.decoder, module.decoder.layers):
        attentions += [(ours.self_attn, theirs.self_attn), (ours.cross_attn, theirs.multihead_attn)]
        plain += [(ours.ffn.w1, theirs.linear1), (ours.ffn.w2, theirs.linear2), (ours.add_norm1.norm, theirs.norm1),
                  (ours.add_norm2.norm, theirs.norm2), (ours.add_norm3.norm, theirs.norm3)]
    if model.config.norm_first:
        plain += [(model.encoder_norm, module.encoder.norm), (model.decoder_norm, module.decoder.norm)]
    for ours, theirs in attentions:                                     # in_proj is W^Q, W^K and W^V in one tensor
        D = model.config.d_model
        plain += [(ours.out, theirs.out_proj)]
        yield ours.q.weight, theirs.in_proj_weight[:D]
        yield ours.kv.weight, theirs.in_proj_weight[D:]
        if model.config.attention_bias:
            yield ours.q.bias, theirs.in_proj_bias[:D]
            yield ours.kv.bias, theirs.in_proj_bias[D:]
    for ours, theirs in plain:
        yield ours.weight, theirs.weight
        if ours.bias is not None:
            yield ours.bias, theirs.bias


def _difference(module, model):
    """The first thing in which a torch.nn.Transformer differs from a Transformer, as text, or None."""
    c, layer = model.config, module.encoder.layers[0]
    facts = [("d_model", c.d_model, module.d_model), ("n_heads", c.n_heads, module.nhead),
             ("n_encoder_layers", c.n_encoder_layers, len(module.encoder.layers)),
             ("n_decoder_layers", c.n_decoder_layers, len(module.decoder.layers)),
             ("d_ff", c.d_ff, layer.linear1.out_features)]
    for each in (*module.encoder.layers, *module.decoder.layers):
        facts += [("norm_first", c.norm_first, each.norm_first),
                  ("ReLU", True, each.activation in (F.relu, torch.relu) or isinstance(each.activation, nn.ReLU)),
                  ("LayerNorm eps", model.encoder[0].add_norm1.norm.eps, each.norm1.eps)]
    facts += [("a final norm", c.norm_first, stack.norm is not None) for stack in (module.encoder, module.decoder)]
    return next((f"{name} is {theirs} there and {ours} here" for name, ours, theirs in facts if ours != theirs), None)


# -----------------------------------------------------------------------------
# §6.1 Decoding: beam search over cached keys and values

class PackedLinear(nn.Module):
    """A Linear layer with its weights in the order in which a CPU's matrix kernels read them.

    A step multiplies few rows with many weights: to sort the weights for each product takes longer than the product.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight, 32), linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(model):
    """The decoder layers and the output matrix with their weights packed, where that is possible, for one search.

    The copies share all other parameters with the model. One to two times faster steps, for the time of one step.
    """
    weight, kinds = model.output.weight, [torch.float32]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        kinds.append(torch.bfloat16)
    if weight.device.type != "cpu" or weight.dtype not in kinds or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return model.decoder, model.output
    # deepcopy takes from this table, by identity, what it is not to copy.
    instead = {id(w): w for w in model.parameters()}
    instead |= {id(part): PackedLinear(part) for part in model.modules() if isinstance(part, nn.Linear)}
    return copy.deepcopy((model.decoder, model.output), instead)


class Cache:
    """What decoding need not compute again: the keys and values of the source and of every position so far.

    All memory is allocated here, once. The N hypotheses (beams) of a sentence share it: they are N queries in the place
    where training has T, so cross-attention needs no copy of the memory for each. In self-attention each step
    writes its N keys side by side, (B, H, L·N, K) in the end, and `visible` says which of them lie in a hypothesis's
    own past. When beams are re-ordered, only that small table of booleans moves; keys and values stay where they are.
    """

    def __init__(self, model, memory, src, n_beams, max_len):
        self.decoder, self.output = packed(model)
        # Contiguous, heads outermost: otherwise each step would copy them all once more before it multiplies. A CPU is
        # slow with many small products in bfloat16, so there keys and values are in float32: a tenth of a step.
        kind = memory.dtype if memory.is_cuda else torch.float32
        keys_values = [layer.cross_attn.keys_values(memory) for layer in model.decoder]
        self.memory_kv = [tuple(x.to(kind).contiguous() for x in kv) for kv in keys_values]
        self.memory_mask = (src != PAD)[:, None, None, :] if (src == PAD).any() else None
        B, (_, H, _, K) = src.size(0), self.memory_kv[0][0].shape
        empty = lambda: memory.new_empty(B, H, max_len * n_beams, K, dtype=kind)
        self.self_kv = [(empty(), empty()) for _ in model.decoder]
        self.visible = torch.zeros(B, n_beams, max_len * n_beams, dtype=torch.bool, device=src.device)
        self.n_beams, self.length = n_beams, 0

    def begin_step(self):
        """Opens the next position: every beam may see its own new key."""
        here = slice(self.length * self.n_beams, (self.length + 1) * self.n_beams)
        self.visible[:, :, here] = torch.eye(self.n_beams, dtype=torch.bool, device=self.visible.device)
        self.length += 1

    def append(self, layer, k, v):
        """Stores the keys and values of the newest position, (B, H, N, K) each; returns those of all so far."""
        end = self.length * self.n_beams
        for buffer, new in zip(self.self_kv[layer], (k, v)):
            buffer[:, :, end - self.n_beams:end] = new
        return tuple(buffer[:, :, :end] for buffer in self.self_kv[layer])

    def mask(self):
        """(B, 1, N, length·N), or None where a single beam sees all there is."""
        return self.visible[:, None, :, :self.length * self.n_beams] if self.n_beams > 1 else None

    def reorder(self, parents):
        """Beam n continues what was beam parents[:, n]. (B, N)"""
        self.visible = self.visible.gather(1, parents[..., None].expand_as(self.visible))

    def keep(self, rows):
        """Drops all sentences but `rows`: finished ones cost nothing more."""
        self.memory_kv = [(k[rows], v[rows]) for k, v in self.memory_kv]
        self.self_kv = [(k[rows], v[rows]) for k, v in self.self_kv]
        self.visible = self.visible[rows]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask[rows]


def next_log_probs(model, tokens, cache):
    """log P of every continuation of N hypotheses a sentence, given their last tokens. (B, N) -> (B, N, V), float32"""
    cache.begin_step()
    x = model.embed_tgt(tokens.flatten()[:, None], cache.length - 1).view(*tokens.shape, -1)    # (B, N, D)
    for i, layer in enumerate(cache.decoder):
        x = layer.step(x, cache, i)                                     # (B, N, D)
    return cache.output(model.decoder_norm(x)).log_softmax(-1, dtype=torch.float32)     # (B, N, V)


@torch.inference_mode()
def beam_search(model, src, beam_size=4, length_penalty=0.6, max_len=None, min_len=0, n_best=1):
    """The best translations a beam can find. §6.1, with the length penalty of GNMT (Wu et al., 2016, Eq. 14).

    src: (B, S) ids. Returns (B, L) int64 ids without BOS, each row ending with EOS, then PAD, and (B,) float32 scores,
    log P(ids | src) / ((5 + n) / 6)^length_penalty, where n counts the ids, EOS included. With n_best > 1 both get
    an axis after the first, best first: (B, n_best, L) and (B, n_best), rows of PAD with score -inf where the beam
    found fewer. max_len and min_len count ids, EOS included; max_len=None is the paper's limit, source length + 50.
    beam_size=1 is greedy decoding. A sentence's result does not depend on the rest of the batch.
    Raises ValueError for sizes that make no sense.
    """
    if beam_size < 1 or not 1 <= n_best <= beam_size:
        raise ValueError(f"expected 1 <= n_best <= beam_size, got n_best={n_best}, beam_size={beam_size}")
    if max_len is not None and max_len < max(min_len, 1):
        raise ValueError(f"max_len must be at least 1 and at least min_len, got max_len={max_len}, min_len={min_len}")
    training, device = model.training, src.device
    model.eval()
    B, N, V = src.size(0), beam_size, model.config.vocab_size
    n_src = (src != PAD).sum(1)                                         # each sentence has a limit of its own
    limit = (n_src + 50).clamp(min=min_len) if max_len is None else torch.full_like(n_src, max_len)
    limits = set(limit.tolist())
    longest = max(limits, default=0)
    penalty = lambda n: ((5 + n) / 6) ** length_penalty
    cache = Cache(model, model.encode(src), src, N, longest)

    # Hypotheses still growing. All N start as the same BOS, so only the first counts, or the beam would hold N twins.
    ids = src.new_full((B, N, longest), PAD)
    logp = torch.full((B, N), -math.inf, device=device)
    logp[:, 0] = 0
    tokens = src.new_full((B, N), BOS)
    # The n best that have ended, and for each row in work the sentence it belongs to.
    best_ids = src.new_full((B, n_best, longest), PAD)
    best_scores = torch.full((B, n_best), -math.inf, device=device)
    row = torch.arange(B, device=device)
    final_ids, final_scores = best_ids.clone(), best_scores.clone()

    for n in range(1, longest + 1):
        step = next_log_probs(model, tokens, cache)                     # (B, N, V)
        step[..., :EOS] = -math.inf                                     # PAD and BOS are never proposed
        if n < min_len:
            step[..., EOS] = -math.inf
        if n in limits:                                                 # at its limit a hypothesis can only end
            step[limit == n, :, EOS + 1:] = -math.inf

        # 2N candidates: even if N of them end here, N are left to go on.
        score, index = step.add_(logp[..., None]).flatten(1).topk(min(2 * N, N * V))    # (B, 2N), best first
        parent, token = index // V, index % V
        ends = token == EOS

        # Those that end have to be among the N best: with N = 1, greedy, EOS must be the best token of all.
        ended = torch.where(ends, score / penalty(n), -math.inf)[:, :N]
        ended_ids = ids.gather(1, parent[:, :N, None].expand(-1, -1, longest))
        ended_ids[:, :, n - 1] = EOS
        best_scores, keep = torch.cat((best_scores, ended), 1).topk(n_best)
        best_ids = torch.cat((best_ids, ended_ids), 1).gather(1, keep[..., None].expand(-1, -1, longest))

        # The best N of the others are the new beam.
        logp, keep = score.masked_fill(ends, -math.inf).topk(N)
        parent, tokens = parent.gather(1, keep), token.gather(1, keep)
        ids = ids.gather(1, parent[..., None].expand(-1, -1, longest))
        ids[:, :, n - 1] = tokens
        if N > 1:
            cache.reorder(parent)

        # log P only falls. Divided by the largest penalty still to come, it bounds what a growing hypothesis can reach.
        bound = logp[:, 0] / penalty(limit.float()).clamp(min=penalty(n + 1))
        done = best_scores[:, -1] >= bound
        if N == 1:
            done |= ends[:, 0]
        logp.masked_fill_(done[:, None], -math.inf)                     # nothing found after this could count
        n_done = int(done.sum())
        if n_done == len(row) or 4 * n_done >= len(row):                # finished sentences leave, a quarter at a time
            final_ids[row[done]], final_scores[row[done]] = best_ids[done], best_scores[done]
            if n_done == len(row):
                break
            left = ~done
            row, limit, logp, tokens, ids = row[left], limit[left], logp[left], tokens[left], ids[left]
            best_ids, best_scores = best_ids[left], best_scores[left]
            cache.keep(left)

    final_ids.masked_fill_(final_scores[..., None] == -math.inf, PAD)
    final_ids = final_ids[..., :int((final_ids != PAD).sum(-1).max()) if B else 0]
    model.train(training)
    return (final_ids[:, 0], final_scores[:, 0]) if n_best == 1 else (final_ids, final_scores)


# =============================================================================
# THE MODEL ENDS HERE. What follows is text, files and the command line.
# =============================================================================

import argparse
import ctypes
import difflib
import heapq
import io
import os
import re
import select
import sys
import zipfile
from collections import Counter, defaultdict

# -----------------------------------------------------------------------------
# §5.1 Text: byte-level byte-pair encoding (Sennrich et al., 2016), shared by both languages

class Tokenizer:
    """Text to ids and back. Ids 0, 1, 2 are PAD, BOS, EOS; 3..258 are the 256 bytes; the rest are merges, in order.

    `merges` is a list of pairs of ids: the i-th pair of neighbours becomes the one id 259 + i. An example:

        merges = [(100, 104)] turns "ab" (ids 100, 104: byte + 3) into 259, and then "aab" into 100, 259.

    Because every byte has an id, every string has an encoding, and decode(encode(s)) == s. The names of the special
    symbols have no meaning in text: encode never returns an id below 3.
    """

    N_SPECIAL = 3
    # A word takes the space before it along. Words end at 32 characters, so that no input can make merging slow.
    MAX_BYTES = 33 * 4
    WORD = re.compile(r" ?\w{1,32}| ?[^\w\s]{1,32}|\s{1,32}(?!\S)|\s")

    def __init__(self, merges):
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.bytes = [b""] * self.N_SPECIAL + [bytes([i]) for i in range(256)]      # id -> the bytes it stands for
        for i, (a, b) in enumerate(self.merges):
            if not (self.N_SPECIAL <= a < len(self.bytes) and self.N_SPECIAL <= b < len(self.bytes)):
                raise ValueError(f"merge {i} joins ids {a} and {b}, expected ids from 3 to {len(self.bytes) - 1}")
            self.bytes.append(self.bytes[a] + self.bytes[b])
            if len(self.bytes[-1]) > self.MAX_BYTES:                    # else 60 merges in a bad file fill any memory
                raise ValueError(f"merge {i} makes {len(self.bytes[-1])} bytes, expected {self.MAX_BYTES} at most")
        self.rank = {pair: self.N_SPECIAL + 256 + i for i, pair in enumerate(self.merges)}
        self.cache = {}                                                 # word -> its ids: text repeats its words

    def __len__(self):
        return len(self.bytes)

    @classmethod
    def words(cls, text):
        """Text cut into the pieces that merges never cross. The first word gets a space too, so that it has the same
        ids as in the middle of a sentence; decode takes it off again."""
        return cls.WORD.findall(" " + text) if text else []

    @classmethod
    def train(cls, lines, vocab_size):
        """Learns merges from an iterable of strings until there are vocab_size ids, or no pair occurs twice."""
        counts = Counter()
        for line in lines:
            counts.update(cls.words(line))
        return cls.from_word_counts(counts, vocab_size)

    @classmethod
    def from_word_counts(cls, counts, vocab_size):
        """Merges the most frequent pair of neighbours, again and again. Ties go to the pair with the smaller ids.

        Counting all pairs anew for each merge would take hours: a merge changes the counts only in the words it occurs
        in, so those are remembered (`where`), and a heap gives the next pair. Its entries may be out of date; such an
        entry is pushed back with the count of today when it comes up.
        """
        smallest = cls.N_SPECIAL + 256
        if vocab_size < smallest:
            raise ValueError(f"vocab_size must be at least {smallest} (3 special ids and 256 bytes), got {vocab_size}")
        words = [[b + cls.N_SPECIAL for b in word.encode("utf-8", "surrogatepass")] for word in counts]
        weights = list(counts.values())
        total, where = Counter(), defaultdict(set)                      # pair -> occurrences; pair -> words it is in
        for i, word in enumerate(words):
            for pair in zip(word, word[1:]):
                total[pair] += weights[i]
                where[pair].add(i)
        heap = [(-n, pair) for pair, n in total.items()]
        heapq.heapify(heap)
        merges = []
        while heap and smallest + len(merges) < vocab_size:
            n, pair = heapq.heappop(heap)
            if -n != total[pair]:
                if total[pair] > 1:
                    heapq.heappush(heap, (-total[pair], pair))
                continue
            if -n < 2:
                break
            new = smallest + len(merges)
            merges.append(pair)
            grown = set()
            for i in where.pop(pair):
                word, weight = words[i], weights[i]
                for old in zip(word, word[1:]):
                    total[old] -= weight
                words[i] = word = merge(word, pair, new)
                for fresh in zip(word, word[1:]):
                    total[fresh] += weight
                    if new in fresh:
                        where[fresh].add(i)
                        grown.add(fresh)
            del total[pair]
            for fresh in grown:
                heapq.heappush(heap, (-total[fresh], fresh))
        return cls(merges)

    def encode(self, text):
        """str -> list of ids, no BOS or EOS: each word's bytes, joined by the merge learnt first until none fits."""
        ids = []
        for word in self.words(text):
            piece = self.cache.get(word)
            if piece is None:
                piece = [b + self.N_SPECIAL for b in word.encode("utf-8", "surrogatepass")]
                while pairs := [pair for pair in zip(piece, piece[1:]) if pair in self.rank]:
                    pair = min(pairs, key=self.rank.get)
                    piece = merge(piece, pair, self.rank[pair])
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


def merge(ids, pair, new):
    """Every occurrence of pair in ids, from the left, becomes new. merge([1, 2, 1, 2], (1, 2), 9) == [9, 9]"""
    out, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


# -----------------------------------------------------------------------------
# Checkpoints: tensors and plain values, nothing that could run

FORMAT = "attention-is-all-you-need/1"


def write_atomically(path, content):
    """Puts content, bytes or anything torch.save takes, in a file beside path, flushes it to disk, and only then gives
    it path's name. Whenever the power goes, path is the old file or the new one, whole."""
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getbuffer()
    path = os.path.realpath(path)
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError as error:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise OSError(error.errno, error.strerror, path) from None      # "No space left on device", and where


def save(path, model, tokenizer=None):
    """Writes the model, its config and its tokenizer to one file, atomically. Raises OSError if it can't."""
    merges = None if tokenizer is None else torch.tensor(tokenizer.merges, dtype=torch.int32).view(-1, 2)
    weights = {name: w.detach().cpu() for name, w in model.state_dict().items()}
    write_atomically(path, {"format": FORMAT, "config": asdict(model.config), "model": weights, "merges": merges})


def read_checkpoint(path):
    """The dict that write_atomically wrote, if every bit of it is still right. Raises ValueError in one line if not."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"cannot read {path}: it is not a file")
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
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT!r}, got {found!r}")
    try:
        config = Config(**checkpoint["config"])
        if config.n_encoder_layers + config.n_decoder_layers > len(checkpoint["model"]):
            raise ValueError("the config has more layers than there are weights")
        with torch.device("meta"):                                     # no memory is taken for sizes nobody has checked
            model = Transformer(config)
        model.load_state_dict(checkpoint["model"], assign=True)
        if config.tied_output:
            model.output.weight = model.embedding.weight
        model.requires_grad_(True)
        tokenizer = None if checkpoint["merges"] is None else Tokenizer(checkpoint["merges"].tolist())
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: its config and weights don't fit this transformer.py: {reason}") from None
    return model.to(device).eval(), tokenizer


# -----------------------------------------------------------------------------
# Translation: text in, text out

def pad_rows(rows, device="cpu"):
    """Lists of ids -> one (B, longest) int64 tensor, filled up with PAD on the right."""
    out = torch.full((len(rows), max(map(len, rows), default=0)), PAD)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.tensor(row, dtype=torch.int64)
    return out.to(device)


def has_bfloat16(device):
    """Does this device multiply bfloat16 in hardware? Where it only imitates that, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def keep_freed_memory():
    """Asks the C library to keep large blocks when they are freed, where it is glibc.

    Otherwise each goes back to the system and comes again page by page, zeroed: an eighth of a training step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)                                            # M_MMAP_THRESHOLD: smaller ones go to the heap
        mallopt(-1, -1)                                                 # M_TRIM_THRESHOLD: and the heap never shrinks
    except (OSError, AttributeError, TypeError):
        pass


def translate(model, tokenizer, lines, beam_size=4, length_penalty=0.6, batch_tokens=4096, n_best=1, max_src=1024):
    """Translations of a list of strings, in order: [[(text, score), ...n_best], ...]. An empty line stays empty.

    Sentences of like length go through together, as many as make batch_tokens source ids with padding. Sources are cut
    after max_src ids: memory grows with the square of the length. Line breaks in a translation become spaces.
    """
    device = next(model.parameters()).device
    # No id covers more than a word, so what lies beyond max_src words need not be looked at.
    encode = lambda line: tokenizer.encode(line[:40 * max_src])[:max_src] + [EOS]
    sources = {i: encode(line) for i, line in enumerate(lines) if line.strip()}
    results = [[("", 0.0)] * n_best for _ in lines]
    order = sorted(sources, key=lambda i: -len(sources[i]))             # longest first: too little memory shows at once
    while order:
        n = max(1, batch_tokens // len(sources[order[0]]))
        batch, order = order[:n], order[n:]
        src = pad_rows([sources[i] for i in batch], device)
        ids, scores = beam_search(model, src, beam_size, length_penalty, n_best=n_best)
        for i, rows, values in zip(batch, ids.view(len(batch), n_best, -1).tolist(), scores.view(-1, n_best).tolist()):
            results[i] = [(" ".join(tokenizer.decode(row).splitlines()), value) for row, value in zip(rows, values)]
    return results


def draw_attention(weights, src_tokens, tgt_tokens):
    """An attention map for the terminal: a row a target token, a column a source token, darker = more. (T, S) -> str"""
    weights, shades = weights.tolist(), " ░▒▓█"
    wide = 2 if 2 * len(src_tokens) + 17 <= 80 else 1
    clean = lambda token, n: "".join(c if c.isprintable() else "·" for c in token.strip() or "·")[:n]
    names = [clean(token, 10) for token in src_tokens]
    tall = max(map(len, names), default=0)
    lines = [" " * 17 + "".join(name.rjust(tall)[row].ljust(wide) for name in names) for row in range(tall)]
    for token, row in zip(tgt_tokens, weights):
        lines.append(clean(token, 16).rjust(16) + " " + "".join(shades[min(4, int(w * 5))] * wide for w in row))
    return "\n".join(line.rstrip() for line in lines)


def attention_map(model, tokenizer, source, target):
    """The cross-attention of the decoder's last layer, averaged over its heads, for one pair of strings, drawn."""
    src, tgt = tokenizer.encode(source) + [EOS], tokenizer.encode(target) + [EOS]
    device = next(model.parameters()).device
    with torch.inference_mode():
        maps = model.attention_maps(pad_rows([src], device), pad_rows([[BOS] + tgt[:-1]], device))
    name = lambda i: "</s>" if i == EOS else tokenizer.bytes[i].decode("utf-8", "replace")
    return draw_attention(maps["cross"][-1, 0].float().mean(0), list(map(name, src)), list(map(name, tgt)))


def read_windows(stream, size=4096):
    """Lists of lines from a binary stream: all that has arrived, at most `size` lines, at least one. Never reads
    ahead of that, so an endless input is translated as it comes. Only \\n ends a line; bytes not UTF-8 turn U+FFFD."""
    buffer, lines, more = b"", [], True
    while more:
        block = os.read(stream.fileno(), 1 << 16)
        more = bool(block)
        *complete, buffer = (buffer + block).split(b"\n") if more else ([buffer, b""] if buffer else [b""])
        lines += [line.removesuffix(b"\r").decode("utf-8", "replace") for line in complete]
        waiting = more and len(lines) < size and select.select([stream], [], [], 0)[0]
        while lines and not waiting:
            yield lines[:size]
            lines = lines[size:]


# -----------------------------------------------------------------------------
# The tour: python transformer.py

def tour():
    """A small model, step by step, with every claim checked. Raises AssertionError if one does not hold."""
    torch.manual_seed(0)
    show = lambda what, x: print(f"  {what:<44} {tuple(x.shape)}")
    config = Config(vocab_size=11, d_model=32, n_heads=4, d_ff=64, n_encoder_layers=2, n_decoder_layers=2)
    model = Transformer(config).eval()
    src = torch.tensor([[3, 4, 5, 6, 7, EOS], [8, 9, EOS, PAD, PAD, PAD]])
    tgt_in = torch.tensor([[BOS, 7, 6, 5, 4], [BOS, 9, 8, PAD, PAD]])

    print("The shapes, for 2 sentences of up to 6 source and 5 target ids, D = 32, 4 heads, 11 words")
    with torch.inference_mode():
        show("src", src)
        show("embedded and placed", x := model.embed_src(src))
        attn = model.encoder[0].self_attn
        q, (k, v) = attn.split_heads(attn.q(x)), attn.keys_values(x)
        show("queries of layer 1, a head each", q)
        mask = (src != PAD)[:, None, None, :]
        show("mask: which keys are words", mask)
        show("attention weights: query by key", weights := attention_weights(q, k, mask))
        show("values, averaged by weight", attention(q, k, v, mask))
        show("memory: the encoder's output", memory := model.encode(src))
        show("states: the decoder's output", model.decode(tgt_in, memory, src))
        show("logits: a score for every word", logits := model(src, tgt_in))

        print("\nThe claims")
        by_hand = torch.zeros_like(q)
        for b in range(2):
            for h in range(4):
                for t in range(6):
                    e = [math.exp(q[b, h, t] @ k[b, h, s] / math.sqrt(8)) * bool(src[b, s]) for s in range(6)]
                    by_hand[b, h, t] = sum(e[s] / sum(e) * v[b, h, s] for s in range(6))
        assert torch.allclose(attention(q, k, v, mask), by_hand, atol=1e-5)
        print("  attention is softmax(QKᵀ/√d_k)V, worked out by hand")
        assert torch.allclose(weights.sum(-1), torch.ones(())) and not weights[1, :, :, 3:].any()
        print("  weights sum to 1, and padding gets none")
        changed = tgt_in.clone()
        changed[0, 3] = 9
        assert torch.equal(model(src, changed)[0, :3], logits[0, :3]) and not torch.equal(model(src, changed), logits)
        print("  changing a target word changes no prediction before it")
        alone = model(src[1:, :3], tgt_in[1:, :3])
        assert torch.allclose(alone, logits[1:, :3], atol=1e-5)
        print("  a sentence gets the same logits alone and in a batch")
        ids, _ = beam_search(model, src, beam_size=1, max_len=5)
        for b in range(2):
            slow = [BOS]                                                # greedy decoding without a cache
            while len(slow) < 5 and slow[-1] != EOS:
                slow.append(int(model(src[b:b + 1], torch.tensor([slow]))[0, -1, EOS:].argmax()) + EOS)
            assert ids[b].tolist()[:len(slow) - 1] == slow[1:]
        print("  the cache changes nothing but the time")
        with torch.device("meta"):
            count = lambda config: sum(p.numel() for p in Transformer(config).parameters())
            sizes = {"base": count(BASE), "big": count(BIG)}
        assert sizes == {"base": 63_045_632, "big": 214_171_648}, sizes
        print("  " + ", ".join(f"{name}: {n:,} parameters" for name, n in sizes.items()))
    print("\nAll of it holds. Next: python train.py")


# -----------------------------------------------------------------------------
# The command line

def fail(message):
    """One line for a mistake of the user's, and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(prog="transformer.py", allow_abbrev=False, description=__doc__.split("Read it")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    def true_or_false(value):
        if value not in ("True", "False"):
            raise ValueError
        return value == "True"

    option = lambda name, default, what: parser.add_argument(
        "--" + name, default=default, type=true_or_false if default is False else type(default),
        help=f"{what} (default: {default})")
    option("checkpoint", "", "a file that train.py wrote; without it, the tour")
    option("beam_size", 4, "hypotheses kept for each sentence; 1 is greedy")
    option("length_penalty", 0.6, "alpha of the length penalty: larger favours longer translations")
    option("n_best", 1, "translations for each line; above 1 each is printed as line number, score, text, with tabs")
    option("batch_tokens", 4096, "source ids translated together, padding included")
    option("max_src", 1024, "source ids after which a line is cut")
    option("attention", False, "True draws each translation's attention map under it")
    option("device", "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    option("dtype", "auto", "float32, bfloat16, or auto: bfloat16 where the hardware has it")
    args, unknown = parser.parse_known_args()
    names = ["--" + name for name in vars(args)]
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        fail(f"unknown setting {unknown[0]!r}" + (f", did you mean {near[0]}?" if near else "; --help lists them all"))
    if not args.checkpoint:
        return tour()
    if args.beam_size < 1 or not 1 <= args.n_best <= args.beam_size or args.batch_tokens < 1 or args.max_src < 1:
        fail("expected beam_size, batch_tokens and max_src of at least 1, and 1 <= n_best <= beam_size")
    try:
        device = torch.device(args.device)
        model, tokenizer = load(args.checkpoint, device)
    except (ValueError, RuntimeError, AssertionError) as error:
        fail(str(error).splitlines()[0])
    if tokenizer is None:
        fail(f"{args.checkpoint} holds no tokenizer: its model was trained on ids, not on text")
    if args.dtype not in ("auto", "float32", "bfloat16"):
        fail(f"dtype must be float32, bfloat16 or auto, got {args.dtype!r}")
    if args.dtype == "bfloat16" or args.dtype == "auto" and has_bfloat16(device):
        model.to(torch.bfloat16)

    keep_freed_memory()
    n_lines = 0
    # Line by line, so that whoever kills this finds whole lines. "?" is what can't be written in UTF-8.
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        for lines in read_windows(sys.stdin.buffer):
            results = translate(model, tokenizer, lines, args.beam_size, args.length_penalty, args.batch_tokens,
                                args.n_best, args.max_src)
            for i, (line, best) in enumerate(zip(lines, results), n_lines):
                if args.n_best > 1:
                    print(*(f"{i}\t{score:.4f}\t{text}" for text, score in best), sep="\n")
                else:
                    print(best[0][0])
                if args.attention and line.strip():
                    print(attention_map(model, tokenizer, line, best[0][0]), end="\n\n")
            n_lines += len(lines)
            if sys.stderr.isatty():
                print(f"\r{n_lines:,} lines", end="", file=sys.stderr, flush=True)
    except BrokenPipeError:                                             # the reader has had enough (head, less)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
