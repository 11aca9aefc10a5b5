# SPDX-License-Identifier: MIT
"""
The Transformer of "Attention Is All You Need" (Vaswani et al., 2017,
https://arxiv.org/abs/1706.03762) in one file.

    python transformer.py           # a guided tour that checks itself, in seconds
    python transformer.py --checkpoint=out/model.pt < in.txt > out.txt  # translate, line by line

Read it from top to bottom: what a function or a class uses is defined above it, and where it can't
be, the comment says "below". This is Figure 1, with the names of this file. Data flows upwards; the
names are explained where they come:

                                                   logits (B, T, V)
                                                      ↑  output: the embedding matrix, transposed
      memory (B, S, D) ───────────────────┐        states (B, T, D)
         ↑  EncoderLayer × 6              │           ↑  DecoderLayer × 6
         │      add_norm2(ffn)            │           │      add_norm3(ffn)
         │      add_norm1(self_attn)      └───────────│───── add_norm2(cross_attn)
         │                                            │      add_norm1(self_attn): causal
         ↑  embed: embedding · √D + sinusoids         ↑  embed: the same
      src (B, S)                                   tgt_in (B, T)

The encoder reads the source once. The decoder then writes the target one token at a time, and looks
at the source through cross-attention. Tokens are ids: whole numbers below V. Logits are scores: one
number for each of the V words, and softmax turns them into probabilities.

Each axis of a tensor has one letter: B batch (sentences), S source length, T target length, D
d_model (the width), H heads, V vocabulary, and in decoding N beams (the hypotheses kept for each
sentence) and L the length of the longest result. Inside attention, T counts the queries and S the
keys, whatever sentence they come from. The width of one head has the paper's name: d_k, which is
D/H.
"""

import contextlib
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

# Padding, beginning and end of a sentence: these ids are reserved.
PAD = 0
BOS = 1
EOS = 2

@dataclass(frozen=True)
class Config:
    """Sizes of a Transformer. The defaults are the paper's base model (Table 3)."""

    vocab_size: int = 37000         # V. §5.1: one vocabulary for both languages
    d_model: int = 512              # D: the width of everything that flows through the model
    n_heads: int = 8                # H: each sees D/H of the width
    d_ff: int = 2048                # the inner width of the feed-forward network
    n_encoder_layers: int = 6
    n_decoder_layers: int = 6
    dropout: float = 0.1            # P_drop of §5.4
    norm_first: bool = False        # the norm: False: after a sub-layer, True: before it
    learned_positions: int = 0      # 0: sinusoids; n: learned ones, n of them (Table 3, E)
    tied_output: bool = True        # §3.4: the target embedding is also the output projection
    src_vocab_size: int = 0         # 0: source and target share vocab_size and the embedding
    attention_bias: bool = False    # biases in attention, as torch.nn.Transformer has them
    final_norms: bool = False       # True: a norm after each stack, as torch.nn.Transformer

    def __post_init__(self):
        # Only checks: skip them at first reading.
        for field in fields(self):
            name = field.name
            kind = type(field.default)
            value = getattr(self, name)
            if hasattr(value, "item"):          # a number of numpy's or torch's becomes Python's
                value = value.item()
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
            object.__setattr__(self, name, value)       # the way into a frozen dataclass
        for name in ("d_model", "n_heads", "d_ff", "n_encoder_layers", "n_decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.vocab_size <= EOS:
            raise ValueError(f"vocab_size must be above {EOS}, got {self.vocab_size}")
        if self.src_vocab_size != 0 and self.src_vocab_size <= EOS:
            raise ValueError(f"src_vocab_size must be 0 or above {EOS}, got {self.src_vocab_size}")
        if self.learned_positions < 0:
            raise ValueError(f"learned_positions must be at least 0, got {self.learned_positions}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if self.d_model % self.n_heads != 0:
            got = f"{self.d_model} and {self.n_heads}"
            raise ValueError(f"d_model must be divisible by n_heads, got {got}")
        if self.d_model % 2 != 0:  # sinusoids come in pairs, a sine and a cosine
            raise ValueError(f"d_model must be even, got {self.d_model}")

BASE = Config()
BIG = Config(d_model=1024, n_heads=16, d_ff=4096, dropout=0.3)

# ---- §3.5 Positional encoding ------------------------------------------------

def sinusoids(positions, d_model):
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(same). §3.5

    positions: (...) -> (..., D), float32

    The encoder's layers see a sentence as a set of words, without an order. Without this, "dog
    bites man" and "man bites dog" would be the same to them. (To the decoder's, masks tell a little
    of the order.) So each word's vector gets its position added.

    Each pair of columns, a sine and a cosine, is a clock hand with its own speed. To move by n
    positions turns each hand by a fixed angle, wherever one starts. Such a turn is a matrix
    product. So a layer can learn a matrix that turns the hands back by n positions. As a query (see
    attention, below) the turned hands resemble most the key of the word n places before. And a
    formula can be computed for any length.
    """
    two_i = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32)
    frequency = torch.exp(two_i * (-math.log(10000.0) / d_model))   # (D/2,) = 10000^(-2i/D)
    angle = positions[..., None].float() * frequency                # (..., 1) * (D/2,) = (..., D/2)
    # Sine and cosine take turns column by column, as the formula says.
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)      # (..., D)

# ---- §3.2 Attention ----------------------------------------------------------
#
# Attention looks things up in a dictionary, softly. A dictionary holds pairs of a key and a value,
# and gives the value whose key equals the query. Here queries, keys and values are vectors. No key
# equals the query, but each resembles it more or less, and that is measured by their dot product.
# The answer is the average of all values, in which the values of the more similar keys weigh more.
#
# All three are made from the vectors of words, each by a learned matrix of its own, because they
# answer three questions: what am I looking for (query), by what am I found (key), and what do I
# give to those who find me (value)? "bites" may look for a subject, and "dog" offers itself as one.
#
# Why not read the sentence word by word, as a recurrent network does? Its steps must wait for one
# another, and a signal from the first word to the last passes through all words between. With
# attention all positions are computed at the same time, and any two of them are one step apart (§4,
# Table 1). The price: T queries and S keys make T·S products of vectors, about T·S·D
# multiplications, and the averages of the values take as many again. For a text of twice the length
# this part of the work is four times as much.
#
# A mask says which keys a query may look at. Every mask in this file is boolean, and True means
# "may attend".

def causal_mask(n, device=None):
    """Position t (a row) may attend to the positions up to t (columns), to none after. -> (n, n)

    So no prediction can depend on the words that are to be predicted. §3.2.3

    >>> causal_mask(4).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()

def at_least_float32(x):
    """float16 and bfloat16 have too few digits for exponentials and sums. float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def attention_weights(q, k, mask=None):
    """For each query, the share that each value has in its average: softmax(q·kᵀ / √d_k), in Eq. 1.

    q: (..., T, d_k), k: (..., S, d_k), mask: broadcasts to the result -> (..., T, S), float32 or
    better. A row sums to 1. One query and three keys with d_k = 4: the products q·k are 2, 0 and 4.
    Divided by √4 they are 1, 0 and 2, and the weights are e¹, e⁰ and e², each divided by their sum:

    >>> q = torch.tensor([[2.0, 0, 0, 0]])
    >>> k = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0]])
    >>> attention_weights(q, k)
    tensor([[0.2447, 0.0900, 0.6652]])

    With the third key masked, the other two share its part. With all masked, each share is zero:

    >>> attention_weights(q, k, mask=torch.tensor([[True, True, False]]))
    tensor([[0.7311, 0.2689, 0.0000]])
    >>> attention_weights(q, k, mask=torch.tensor([[False, False, False]]))
    tensor([[0., 0., 0.]])
    """
    # A dot product of random vectors is a sum of d_k terms. Each has variance 1, the sum d_k, so
    # its typical size is √d_k. A softmax of numbers that lie far apart is nearly 1 for one of them
    # and 0 for the others, and has almost no gradient. So the products are divided by √d_k
    # (§3.2.1). Here the queries are divided, not the products: in float16 a product could overflow
    # before its division.
    d_k = q.size(-1)
    scores = (q / math.sqrt(d_k)) @ k.transpose(-2, -1)             # (..., T, S)
    scores = at_least_float32(scores)
    if mask is None:
        return scores.softmax(-1)
    hidden = ~mask
    # The lowest finite number, not -inf: the softmax of nothing but -inf is 0/0 = NaN.
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(hidden, lowest).softmax(-1)        # (..., T, S)
    return weights.masked_fill(hidden, 0.0)  # without this, a row with all masked has equal shares

def attention_by_definition(q, k, v, mask=None):
    """softmax(q·kᵀ / √d_k)·v, Eq. 1: each query gets a weighted average of the values.

    q: (B, H, T, d_k), k and v: (B, H, S, d_k), mask: broadcasts to (B, H, T, S) -> (B, H, T, d_k).
    """
    weights = attention_weights(q, k, mask)                         # (B, H, T, S)
    return weights.to(v.dtype) @ v

# On a CPU the definition is also the faster way, as measured, up to this many weights (T·S) for
# each head.
MAX_WEIGHTS_ON_CPU = 512 * 512

def attention(q, k, v, mask=None, causal=False):
    """The same, faster: skip it at first reading.

    A fused kernel is one program for the whole formula. It works block by block and never writes
    all weights to memory. Shapes are those of attention_by_definition. causal=True adds
    causal_mask(T) to the mask, and T must be S. The mask must leave each query at least one key:
    for a query without any, the result depends on the kernel.
    """
    T = q.size(-2)
    S = k.size(-2)
    if causal and T != S:
        raise ValueError(f"causal=True needs as many queries as keys, got {T} and {S}")
    if causal and mask is not None:
        mask = mask & causal_mask(T, q.device)                      # (..., T, S)
        causal = False

    # torch.export writes one program for sentences of all lengths, so it cannot choose by length.
    may_choose = q.device.type == "cpu" and not torch.compiler.is_exporting()
    if may_choose and T * S <= MAX_WEIGHTS_ON_CPU:
        if causal:
            mask = causal_mask(T, q.device)
        return attention_by_definition(q, k, v, mask)

    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

class MultiHeadAttention(nn.Module):
    """H attentions side by side, each on projections of its own, d_k wide. §3.2.2

    Why several: one softmax gives one average, so one head can ask one question of the sentence. H
    heads look at H different places, and as each is only D/H wide, together they cost about as much
    as one head of width D.

    This one class serves all three uses of §3.2.3, because keys and values may come from outside.
    Self-attention looks at the positions of x itself. Cross-attention looks at the encoder's
    output: every target position asks with its query, and the source positions answer. In decoding,
    keys and values of earlier steps come from a cache.
    """

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        bias = config.attention_bias
        self.n_heads = config.n_heads
        self.q = nn.Linear(D, D, bias=bias)                         # W^Q of all heads, stacked
        self.kv = nn.Linear(D, 2 * D, bias=bias)                # W^K and W^V of all heads, stacked
        self.out = nn.Linear(D, D, bias=bias)                       # W^O

    def split_heads(self, x):
        """(B, T, D) -> (B, H, T, d_k)"""
        x = x.unflatten(-1, (self.n_heads, -1))                     # (B, T, H, d_k)
        return x.transpose(1, 2)

    def keys_values(self, x):
        """What the positions of x offer to those who look. (B, S, D) -> (B, H, S, d_k) twice"""
        k, v = self.kv(x).chunk(2, dim=-1)                          # (B, S, D) each
        return self.split_heads(k), self.split_heads(v)

    def forward(self, x, seen=None, mask=None, causal=False):
        """Each position of x makes a query and looks at keys and values. (B, T, D) -> (B, T, D)

        seen: the keys and the values to look at, a pair that keys_values() returned. None: those of
        x itself, which makes this self-attention.
        mask: broadcasts to (B, H, T, S). causal=True: a position sees itself and earlier ones.
        """
        if seen is None:
            seen = self.keys_values(x)
        k, v = seen                                                 # (B, H, S, d_k) each
        q = self.split_heads(self.q(x))                             # (B, H, T, d_k)
        y = attention(q, k, v, mask, causal)                        # (B, H, T, d_k)
        side_by_side = y.transpose(1, 2).flatten(2)                 # (B, T, D)
        return self.out(side_by_side)                           # (B, T, D): W^O mixes the heads

# ---- §3.3 Position-wise feed-forward network ---------------------------------

class FeedForward(nn.Module):
    """FFN(x) = max(0, x·W₁ + b₁)·W₂ + b₂, Eq. 2, at every position alone. (B, T, D) -> (B, T, D)

    Attention moves information between positions, and this network works on what has arrived. With
    the paper's d_ff = 4D it holds two thirds of the weights of an encoder layer, and half of those
    of a decoder layer.
    """

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff)
        self.w2 = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x):
        return self.w2(F.relu(self.w1(x)))

# ---- §3.1 Encoder and decoder stacks -----------------------------------------

class AddNorm(nn.Module):
    """A residual connection and a norm: LayerNorm(x + Dropout(Sublayer(x))). §3.1, §5.4

    The residual: x goes on, and the sub-layer only adds to it. In the backward pass the sum hands
    the gradient to x as well as to the sub-layer, so part of it reaches the lowest layer without
    passing through any weight matrix.

    The norm: at each position alone, over the D numbers there, LayerNorm subtracts their mean,
    divides by their standard deviation, and then scales and shifts each column by learned numbers.
    So sums do not grow from layer to layer.

    This order is the paper's, post-norm. In a fresh stack of this kind the gradients of the upper
    layers are large, and large first steps ruin it (Xiong et al., 2020). A learning rate that rises
    from zero avoids them. The paper has one (§5.3), but gives no reason.

    With norm_first the order is pre-norm: x + Dropout(Sublayer(LayerNorm(x))). From the bottom of
    the stack to its top, x is only added to. Deep stacks then train more easily, and the learning
    rate may rise faster (Xiong et al.), but their output needs one norm more.

    Dropout stands where §5.4 puts it: on what a sub-layer returns, and on the embeddings.
    torch.nn.Transformer also drops attention weights, and values within the feed-forward network.
    """

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_first = config.norm_first

    def forward(self, x, sublayer):
        """(B, T, D) -> (B, T, D). sublayer: a function that this calls before or after the norm."""
        if self.norm_first:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))

class EncoderLayer(nn.Module):
    """Every source position looks at all of them, then works alone.

    x: (B, S, D), mask: (B, 1, 1, S) -> (B, S, D)
    """

    def __init__(self, config):
        super().__init__()
        self.self_attn = MultiHeadAttention(config)
        self.ffn = FeedForward(config)
        self.add_norm1 = AddNorm(config)
        self.add_norm2 = AddNorm(config)

    def forward(self, x, mask):
        # In the paper's order these lines compute
        #     x = norm1(x + dropout(self_attn(x)))
        #     x = norm2(x + dropout(ffn(x)))
        # A lambda is a function without a name: it gives self_attn its other arguments.
        x = self.add_norm1(x, lambda y: self.self_attn(y, mask=mask))
        x = self.add_norm2(x, self.ffn)
        return x

class DecoderLayer(nn.Module):
    """Every target position looks at itself and earlier ones, then at the source, then works alone.

    x: (B, T, D), memory: (B, S, D), the encoder's output, memory_mask: (B, 1, 1, S) -> (B, T, D)
    """

    def __init__(self, config):
        super().__init__()
        self.self_attn = MultiHeadAttention(config)
        self.cross_attn = MultiHeadAttention(config)
        self.ffn = FeedForward(config)
        self.add_norm1 = AddNorm(config)
        self.add_norm2 = AddNorm(config)
        self.add_norm3 = AddNorm(config)

    def forward(self, x, memory, memory_mask):
        memory_kv = self.cross_attn.keys_values(memory)             # (B, H, S, d_k) twice
        # Targets need no padding mask. Their padding stands on the right, and causality keeps every
        # word from seeing what stands to its right. What the padding itself computes is never used.
        x = self.add_norm1(x, lambda y: self.self_attn(y, causal=True))
        x = self.add_norm2(x, lambda y: self.cross_attn(y, memory_kv, memory_mask))
        x = self.add_norm3(x, self.ffn)
        return x

# ---- §3 The model ------------------------------------------------------------

def source_mask(src):
    """Any query may look at the words of a source, and not at its padding.

    src: (B, S) ids -> (B, 1, 1, S), which broadcasts over heads and queries

    A row of nothing but padding has no word to look at, as where a caller fills up a batch with
    empty rows. But `attention` needs a key for each query. So in such a row all is visible. Its
    layers then compute something without a meaning, and `encode` replaces all of it by zeros.
    """
    is_word = src != PAD                                            # (B, S)
    empty = ~is_word.any(-1, keepdim=True)                          # (B, 1)
    return (is_word | empty)[:, None, None, :]

class Transformer(nn.Module):
    """Source ids and the target ids so far in, a score for each possible next id out. Figure 1.

    model(src, tgt_in) -> logits: (B, S) and (B, T) int64 -> (B, T, V). Sources end with EOS and
    targets begin with BOS; rows are padded with PAD on the right, and PAD stands nowhere else: it
    would be taken for padding there too. logits[:, t] scores the token that follows tgt_in[:, t].

    The parameters of the base model, in millions:

        embedding: V·D                                         18.94
        6 encoder layers: attention 1.05, ffn 2.10             18.90
        6 decoder layers: attention 2 · 1.05, ffn 2.10         25.20
        in all (Table 3 says 65)                               63.05

    Attention has four D·D matrices, and the ffn two D·d_ff ones. Each layer's biases and norms are
    counted too, though they are few. The output is the embedding again and adds none. The paper
    says "about 37000" words; with 41,100 there would be 65 million.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.d_model

        # §3.4: one matrix embeds the source, embeds the target, and, transposed, turns states into
        # logits. Words with similar vectors then also get similar scores, each word learns from all
        # three uses, and the model is a third smaller. Both languages need the same vocabulary.
        # These are three parts, and tie_weights(), below, gives them the same matrix.
        # (from_pretrained: an embedding of a given matrix, so that no second one is made first.)
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.src_embedding = nn.Embedding.from_pretrained(self.embedding.weight, freeze=False)
        if config.src_vocab_size:
            self.src_embedding = nn.Embedding(config.src_vocab_size, D)
        self.output = nn.Linear(D, config.vocab_size, bias=False)

        self.learned_src = None
        self.learned_tgt = None
        if config.learned_positions:
            self.learned_src = nn.Embedding(config.learned_positions, D)
            self.learned_tgt = nn.Embedding(config.learned_positions, D)
        # nn.Dropout draws anew at each call, so one module would do for both sides. There are two
        # so that each can be replaced by a dropout with a seed of its own.
        self.src_dropout = nn.Dropout(config.dropout)
        self.tgt_dropout = nn.Dropout(config.dropout)

        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_decoder_layers))

        # A post-norm layer ends in a norm, so the paper's stacks need no other. A pre-norm layer
        # ends in a sum.
        self.encoder_norm = nn.Identity()
        self.decoder_norm = nn.Identity()
        if config.norm_first or config.final_norms:
            self.encoder_norm = nn.LayerNorm(D)
            self.decoder_norm = nn.LayerNorm(D)
        self.length_penalty = 0.6       # for `translate` (§6.1); beam_search has an argument
        self.init_weights()

    def tie_weights(self):
        """Tied weights are the same tensor, not a copy: one gradient, one update. §3.4"""
        if not self.config.src_vocab_size:
            self.src_embedding.weight = self.embedding.weight
        if self.config.tied_output:
            self.output.weight = self.embedding.weight

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As in every nn.Module. assign=True replaces all tensors, so it ties them again."""
        result = super().load_state_dict(state_dict, strict, assign)
        if assign:
            self.tie_weights()
        return result

    @torch.no_grad()
    def init_weights(self):
        """Ties the weights, and sets every one anew. Each matrix draws its own numbers, so no two
        layers start the same.

        A model made on PyTorch's meta device has no numbers: call `to_empty`, and then this.
        """
        self.tie_weights()
        for name, weight in self.named_parameters():
            if "embedding" in name or "learned" in name or name == "output.weight":
                # `embed` multiplies words by √D, but not learned positions. So at the start a word
                # counts for more than its position, and training finds the right share.
                weight.normal_(0, self.config.d_model ** -0.5)
            elif name.endswith("kv.weight"):
                for matrix in weight.chunk(2):      # W^K and W^V: Glorot's range is for one matrix
                    nn.init.xavier_uniform_(matrix)
            elif weight.dim() == 2:
                nn.init.xavier_uniform_(weight)
            elif name.endswith("bias"):
                weight.zero_()
            else:
                weight.fill_(1.0)  # the learned scale of a LayerNorm starts by changing nothing

    def embed(self, ids, embedding, learned, start=0):
        """Embedding · √D + position. §3.4, §3.5

        ids: (..., T), the first at position start -> (..., T, D)
        """
        n = ids.size(-1)
        if learned is not None and n > learned.num_embeddings:
            most = learned.num_embeddings
            raise ValueError(f"expected at most the {most} positions learned, got {n}")
        positions = start + torch.arange(n, device=ids.device)      # (T,)
        if learned is None:
            encoding = sinusoids(positions, self.config.d_model)    # (T, D)
        else:
            encoding = learned(positions)                           # (T, D)
        # Embeddings start with variance 1/D, for the logits of the tied output to start with about
        # variance 1. √D brings them to the size of sinusoids.
        x = embedding(ids) * math.sqrt(self.config.d_model)         # (..., T, D)
        return x + encoding.to(x.dtype)

    def encode(self, src):
        """The source, every token in the light of all others: the decoder's memory.

        (B, S) -> (B, S, D)
        """
        mask = source_mask(src)                                     # (B, 1, 1, S)
        x = self.embed(src, self.src_embedding, self.learned_src)   # (B, S, D)
        x = self.src_dropout(x)
        for layer in self.encoder:
            x = layer(x, mask)                                      # (B, S, D)
        x = self.encoder_norm(x)
        # Padding has computed something too. With zeros in its place nothing can depend on it by
        # mistake.
        return x.masked_fill((src == PAD)[..., None], 0.0)

    def decode(self, tgt_in, memory, src):
        """Target states, each made of the memory and of the target so far.

        tgt_in: (B, T), memory: (B, S, D), src: (B, S) -> (B, T, D)
        """
        memory_mask = source_mask(src)                              # (B, 1, 1, S)
        x = self.embed(tgt_in, self.embedding, self.learned_tgt)    # (B, T, D)
        x = self.tgt_dropout(x)
        for layer in self.decoder:
            x = layer(x, memory, memory_mask)                       # (B, T, D)
        x = self.decoder_norm(x)
        return x.masked_fill((tgt_in == PAD)[..., None], 0.0)

    def forward(self, src, tgt_in):
        memory = self.encode(src)                                   # (B, S) -> (B, S, D)
        states = self.decode(tgt_in, memory, src)                   # (B, T) -> (B, T, D)
        return self.output(states)              # (B, T, V): tied, a product with each word's vector

    def log_probs(self, src, tgt_in):
        """log P(next token | src, target so far), the linear layer and softmax of Figure 1. §3.4

        (B, S) and (B, T) -> (B, T, V), float32 or better
        """
        logits = self(src, tgt_in)                                  # (B, T, V)
        return at_least_float32(logits).log_softmax(-1)

# ---- Training, in its simplest form ------------------------------------------

def learn_by_heart(model, src, tgt, n_steps=100):
    """Trains on one batch until the model knows it, and prints the loss at a few steps.

    src: (B, S), tgt: (B, T + 1), each row BOS, words, EOS, padding.
    """
    # Teacher forcing: the input at each position is the right answer so far, not what the model
    # would have written. So no position has to wait for another, and all T predictions are learned
    # at once.
    tgt_in = tgt[:, :-1]                    # (B, T): BOS and the words; in short rows EOS, too
    tgt_out = tgt[:, 1:]                    # (B, T): the words and EOS; padding does not count
    # For so small a model one learning rate will do. A larger one needs a schedule (§5.3).
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-9)
    model.train()
    for step in range(1, n_steps + 1):
        logits = model(src, tgt_in)                                 # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tgt_out.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, 10, n_steps):
            print(f"  step {step:3}  loss {loss.item():.3f}")

# ---- §6.1 Decoding -----------------------------------------------------------
#
# First what it is (greedy), then the same without computing anything twice (Cache), then several
# guesses at once (beam_search). At first reading you may stop after greedy: with it the model is
# complete.

@contextlib.contextmanager
def eval_mode(model):
    """Inside `with eval_mode(model):` dropout is off.

    Afterwards each part is as it was before, even after an error.
    """
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True

def length_limits(model, src, max_len, min_len=0):
    """How many ids, EOS included, each translation may have. -> (B,)

    That is max_len, or for None the length of its source + 50, as in §6.1, or min_len if that is
    more. It is never more than learned_positions, if the model has these.
    """
    lengths = (src != PAD).sum(1)                                   # (B,)
    if max_len is None:
        limits = (lengths + 50).clamp(min=min_len)
    elif max_len < max(min_len, 1):
        got = f"max_len={max_len}, min_len={min_len}"
        raise ValueError(f"max_len must be at least 1 and at least min_len, got {got}")
    else:
        limits = torch.full_like(lengths, max_len)
    if model.config.learned_positions:
        limits = limits.clamp(max=model.config.learned_positions)
    return limits

@torch.no_grad()
def greedy(model, src, max_len=None):
    """The most probable next token, again and again, until it is EOS.

    src: (B, S) ids -> (B, L) int64 ids without BOS

    Decoding is no more than this. It is slow, as each step computes the whole target so far anew;
    beam_search with beam_size=1 gives the same. Rows end with EOS, then PAD. A row that reaches its
    length limit gets EOS there.
    """
    limits = length_limits(model, src, max_len)                     # (B,)
    ids = src.new_full((len(src), 1), BOS)  # (B, 1), and one longer with each step
    ended = torch.zeros_like(limits, dtype=torch.bool)              # (B,)
    with eval_mode(model):
        memory = model.encode(src)                                  # (B, S, D)
        while not ended.all():
            states = model.decode(ids, memory, src)                 # (B, length so far, D)
            logits = model.output(states[:, -1])                    # (B, V)
            token = EOS + logits[:, EOS:].argmax(-1)                # (B,): any id but PAD and BOS
            # ids holds BOS and n - 1 tokens: this token is the n-th, and counts up to the limit.
            n = ids.size(1)
            token = token.masked_fill(limits == n, EOS)
            token = token.masked_fill(ended, PAD)
            ids = torch.cat((ids, token[:, None]), 1)
            ended = ended | (token == EOS)
    return ids[:, 1:]

class Cache:
    """The keys and values of the source and of all positions so far, so that no step computes them
    again. An earlier position never sees a later one, so what is stored stays right. Each step
    stores one key and one value more, and its query, the newest, looks at all of them.

    That is all for one hypothesis, N = 1. With N beams a sentence has N new tokens at each step.
    They are N queries, and all look at the same memory, of which there is one copy. In
    self-attention a step stores N keys side by side: the key of beam n at step s is column
    (s - 1)·N + n. A beam may see only the keys of its own past, and `visible` says which these are.

    Two beams, three steps; a row for each beam, a column for each key, 1 for "sees it". Step 1 has
    one hypothesis, BOS in beam 0, so both pasts begin there:

        step       1   2   3
        beam      0 1 0 1 0 1
        beam 0    1 0 1 0 1 0
        beam 1    1 0 0 1 0 1

    Now both of the best continuations come from beam 1, so beam 0 takes over its past:
    reorder(parents=[[1, 1]]). Only these booleans change; the keys and values stay where they are.
    The fourth step opens with a new key for each beam:

        step       1   2   3   4
        beam      0 1 0 1 0 1 0 1
        beam 0    1 0 0 1 0 1 1 0
        beam 1    1 0 0 1 0 1 0 1
    """

    def __init__(self, model, memory, src, n_beams, max_len):
        """Allocates room for max_len steps. memory: (B, S, D), model.encode(src)"""
        self.n_beams = n_beams
        self.length = 0                 # positions stored so far
        self.mask = None                # (B, 1, N, keys so far) of this step; None for one beam
        self.memory_mask = None
        if (src == PAD).any():
            self.memory_mask = source_mask(src)                     # (B, 1, 1, S)

        n_keys = max_len * n_beams
        self.memory_kv = []  # for each layer (B, H, S, d_k) twice
        self.self_kv = []  # for each layer (B, H, n_keys, d_k) twice
        for layer in model.decoder:
            k, v = layer.cross_attn.keys_values(memory)
            # Contiguous only for speed: otherwise every step would copy them before it multiplies.
            self.memory_kv.append((k.contiguous(), v.contiguous()))
            B, H, _, d_k = k.shape
            self.self_kv.append((k.new_empty(B, H, n_keys, d_k), v.new_empty(B, H, n_keys, d_k)))
        self.visible = torch.zeros(len(src), n_beams, n_keys, dtype=torch.bool, device=src.device)

    def open_position(self):
        """Makes room for the next position: a beam will see its own new key, not the others'."""
        self.position = self.length
        self.length += 1
        start = self.position * self.n_beams
        end = start + self.n_beams
        own = torch.eye(self.n_beams, dtype=torch.bool, device=self.visible.device)     # (N, N)
        self.visible[:, :, start:end] = own
        if self.n_beams > 1:                                    # a single beam sees all there is
            self.mask = self.visible[:, None, :, :end]  # (B, 1, N, keys so far), for all layers

    def append(self, i, k, v):
        """Stores the newest keys and values of layer i, (B, H, N, d_k) each; returns all so far."""
        end = self.length * self.n_beams
        start = end - self.n_beams
        all_k, all_v = self.self_kv[i]
        all_k[:, :, start:end] = k
        all_v[:, :, start:end] = v
        return all_k[:, :, :end], all_v[:, :, :end]

    def reorder(self, parents):
        """Beam n becomes a continuation of what was beam parents[:, n]. (B, N)"""
        # visible[b, n] becomes visible[b, parents[b, n]].
        self.visible.copy_(self.visible.gather(1, parents[..., None].expand_as(self.visible)))

    def should_select(self, n_done, n):
        """Whether to drop the n_done finished of n sentences: moving the others takes time, too."""
        return 4 * n_done >= n

    def select(self, rows):
        """Keeps the sentences with these numbers, (n,) int64: finished ones cost nothing more."""
        self.memory_kv = [(k[rows], v[rows]) for k, v in self.memory_kv]
        self.self_kv = [(k[rows], v[rows]) for k, v in self.self_kv]
        self.visible = self.visible[rows]
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask[rows]

    def step(self, model, newest):
        """One position more for all hypotheses: next_log_probs, below. A subclass may be faster."""
        self.open_position()
        return next_log_probs(model, newest, self)

def cached_self_attention(x, self_attn, cache, i):
    """self_attn(x, causal=True) at the newest position; layer i of the cache has the earlier ones.

    x: (B, N, D) -> (B, N, D)
    """
    k, v = self_attn.keys_values(x)                                 # (B, H, N, d_k) each
    seen = cache.append(i, k, v)                                    # (B, H, keys so far, d_k) twice
    return self_attn(x, seen, cache.mask)

def cached_layer(x, layer, cache, i):
    """DecoderLayer.forward at the newest position. x: (B, N, D) -> (B, N, D)"""
    x = layer.add_norm1(x, lambda y: cached_self_attention(y, layer.self_attn, cache, i))
    x = layer.add_norm2(x, lambda y: layer.cross_attn(y, cache.memory_kv[i], cache.memory_mask))
    x = layer.add_norm3(x, layer.ffn)
    return x

def next_log_probs(model, newest, cache):
    """log P(next token) for each of N hypotheses a sentence, from their newest tokens.

    newest: (B, N) ids -> (B, N, V), float32

    This is Transformer.decode for one position. The keys and values of all earlier positions, and
    those of the source, come from the cache, whose open_position has made room. The parts of a
    layer are called here, not the layer itself, so decoding needs whole weights: it does not run
    after `fully_shard`.
    """
    # All N tokens of a sentence stand at the same position, so for `embed` they are N sequences of
    # one id each.
    ids = newest[..., None]                                         # (B, N, 1)
    x = model.embed(ids, model.embedding, model.learned_tgt, start=cache.position)   # (B, N, 1, D)
    x = x.squeeze(2)                                                # (B, N, D)
    for i, layer in enumerate(model.decoder):
        x = cached_layer(x, layer, cache, i)                        # (B, N, D)
    logits = model.output(model.decoder_norm(x))                    # (B, N, V)
    return logits.log_softmax(-1, dtype=torch.float32)

def penalty(n_ids, alpha):
    """The length penalty, by which log P is divided: ((5 + n) / 6)^alpha. Wu et al., 2016, Eq. 14

    Each id makes a sentence less probable, so by log P alone the shortest would win. Dividing by
    something that grows with the length makes up for that; a larger alpha favours longer
    translations. n_ids: a number or a tensor of them.
    """
    return ((5 + n_ids) / 6) ** alpha

def pick(rows, index):
    """Whole hypotheses by their numbers. rows: (B, n, L), index: (B, m) -> (B, m, L)"""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.size(2)))

# One step of beam_search by hand, with N = 2 hypotheses. For each of them the model gives each word
# a log P. Added to the log P of the hypothesis itself, that makes N·V sums. Three of the V words
# are shown, the others are far less probable:
#
#                             "cat"   "dog"     EOS
#     beam 0  "a"   -1.0       -1.6    -2.3    -0.4     sums  -2.6  -3.3  -1.4
#     beam 1  "the" -1.5       -0.5    -1.2    -2.6     sums  -2.0  -2.7  -4.1
#
# Grow:   the 2N best sums are "a EOS" -1.4, "the cat" -2.0, "a cat" -2.6 and "the dog" -2.7.
# Retire: "a EOS" has ended, with 2 ids. Its score is -1.4 / penalty(2, 0.6) = -1.4 / 1.097 = -1.28.
# Keep:   the new beam is "the cat" and "a cat". Their parents are the beams 1 and 0.
# Stop:   not yet. If 10 ids are the limit, and all that follows "the cat" were certain, it could
#         still reach -2.0 / penalty(10, 0.6) = -2.0 / 1.733 = -1.15. That is better than -1.28.

@torch.no_grad()
def beam_search(model, src, beam_size=4, length_penalty=0.6, max_len=None, min_len=0, n_best=1,
                make_cache=Cache):
    """The best translations that a beam can find. §6.1

    Greedy decoding cannot take back a word. A beam keeps the N best hypotheses of each sentence and
    grows all of them, so a word may turn out well although it was only the second best. Hypotheses
    are compared by their score, which is log P(ids | src) / penalty(number of ids with EOS,
    length_penalty).

    src: (B, S) ids, each row words, EOS, then PAD.
    beam_size: N; with 1 this is greedy decoding. max_len and min_len count ids with EOS.
    max_len=None is the paper's limit: source length + 50 (see length_limits). But for roundings, a
    translation does not depend on the other sentences of the batch.
    make_cache: Cache, or a class with the same methods.

    Returns ids, (B, L) int64 without BOS, each row ending with EOS, then PAD, and float32 scores,
    (B,). With n_best > 1 both get an axis after the first, best first: (B, n_best, L) and (B,
    n_best); a row where the beam found fewer is PAD, its score -inf. Raises ValueError for sizes
    that make no sense.
    """
    if not 1 <= n_best <= beam_size:
        got = f"n_best={n_best}, beam_size={beam_size}"
        raise ValueError(f"expected 1 <= n_best <= beam_size, got {got}")
    limits = length_limits(model, src, max_len, min_len)  # (B,): each sentence has one of its own
    stops = set(limits.tolist())  # the lengths at which some sentence must end
    longest = max(stops, default=0)
    B = len(src)
    N = beam_size
    V = model.config.vocab_size
    ids_like = dict(dtype=torch.int64, device=src.device)
    scores_like = dict(dtype=torch.float32, device=src.device)

    # The beam: the hypotheses that still grow. At first all N are the same BOS, and only one of
    # them may count: otherwise the beam would hold N copies of one hypothesis for ever.
    beam = torch.full((B, N, longest), PAD, **ids_like)
    newest = torch.full((B, N), BOS, **ids_like)                    # the last id of each
    log_prob = torch.full((B, N), -math.inf, **scores_like)         # log P of each
    log_prob[:, 0] = 0.0

    # The best that have ended, for each sentence of src. The tensors above lose the rows of
    # sentences that are finished, these do not. So sentence[b] says which sentence of src the row b
    # of the others belongs to.
    best = torch.full((B, n_best, longest), PAD, **ids_like)
    best_score = torch.full((B, n_best), -math.inf, **scores_like)
    sentence = torch.arange(B, device=src.device)                   # (B,)

    with eval_mode(model):
        cache = make_cache(model, model.encode(src), src, N, longest)
        for length in range(1, longest + 1):
            # Grow every hypothesis by every word, and take the 2N best. Of the V words only
            # one, EOS, ends a hypothesis. So at most N of the 2N end here, and N are left to go on.
            word_log_prob = cache.step(model, newest)               # (B, N, V)
            word_log_prob[..., :EOS] = -math.inf                # PAD and BOS are never proposed
            # At its limit a sentence can only end. A limit is at least min_len, so there EOS is
            # allowed. (But learned_positions may set one below it: then it is that of all.)
            if length in stops:
                at_limit = (limits == length)[:, None, None]        # (B, 1, 1)
                word_log_prob[..., EOS + 1:].masked_fill_(at_limit, -math.inf)
            elif length < min_len:
                word_log_prob[..., EOS] = -math.inf
            every = word_log_prob.add_(log_prob[..., None]).flatten(1)      # (B, N·V)
            grown_log_prob, place = every.topk(2 * N)               # (B, 2N), best first
            parent = place // V                 # (B, 2N): place is beam·V + word
            word = place % V                                        # (B, 2N)
            grown = pick(beam, parent)                              # (B, 2N, longest)
            grown[:, :, length - 1] = word
            ends = word == EOS                                      # (B, 2N)

            # Retire those that end among the N best. One that ends below these is dropped: 2N were
            # taken only so that N are left to go on. (With N = 1 this is greedy: EOS must be the
            # best word of all.) The new ends and the earlier ones stand in one list, and the n_best
            # of it stay. What has not ended has a score of -inf there. `best` has a row for each
            # sentence of src, so best[sentence] are the rows of those still here.
            score = torch.where(ends, grown_log_prob / penalty(length, length_penalty), -math.inf)
            rivals = torch.cat((best[sentence], grown[:, :N]), 1)   # (B, n_best + N, longest)
            rival_score = torch.cat((best_score[sentence], score[:, :N]), 1)    # (B, n_best + N)
            winner_score, winner = rival_score.topk(n_best)     # (B, n_best)
            best[sentence] = pick(rivals, winner)
            best_score[sentence] = winner_score

            # Keep the best N of the others: they are the new beam.
            log_prob, kept = grown_log_prob.masked_fill(ends, -math.inf).topk(N)        # (B, N)
            beam = pick(grown, kept)
            newest = word.gather(1, kept)
            cache.reorder(parent.gather(1, kept))

            # Stop when nothing that still grows can win. log P is negative, and it only falls. A
            # larger penalty makes the score better (-6/2 = -3 is better than -6/1). Penalties grow
            # with the length, so the best score in reach is today's log P divided by the penalty of
            # the length limit. All n_best are found when the last of them is as good as that.
            # (With a negative length_penalty, penalties shrink with the length. Then the largest is
            # that of the next step: see `clamp`.)
            largest = penalty(limits.float(), length_penalty)                           # (B,)
            largest = largest.clamp(min=penalty(length + 1, length_penalty))
            done = winner_score[:, -1] >= log_prob[:, 0] / largest                      # (B,)
            if N == 1:
                done = done | ends[:, 0]                            # greedy stops at its first EOS
            n_done = int(done.sum())
            if n_done == len(done):
                break

            # A finished sentence finds nothing more: with a log P of -inf it stays done, and no
            # score of it is better than what `best` holds. When enough have finished, they leave.
            log_prob.masked_fill_(done[:, None], -math.inf)
            if cache.should_select(n_done, len(done)):
                left = (~done).nonzero().squeeze(1)             # numbers of the rows that go on
                cache.select(left)
                sentence = sentence[left]
                limits = limits[left]
                beam = beam[left]
                log_prob = log_prob[left]
                newest = newest[left]

    # Where fewer than n_best have ended, the last rows hold ids without a meaning: clear them.
    best.masked_fill_(best_score[..., None] == -math.inf, PAD)
    if B > 0:
        lengths = (best != PAD).sum(-1)                             # (B, n_best)
        best = best[..., :int(lengths.max())]
    if n_best == 1:
        return best[:, 0], best_score[:, 0]
    return best, best_score

# ---- Where this differs from the paper, and why (a test holds each point) ----
#
# 1. Padding. The paper does not mention it, but a batch needs it: id PAD fills the ends of short
#    rows. No word of a sentence attends to it, and there the encoder and decoder return zeros.
# 2. Initial weights, and the ε in LayerNorm. The paper does not say. Matrices are Glorot-uniform;
#    embeddings are normal with variance 1/D, so that the √D of §3.4 brings them to the scale of
#    the positions; ε is PyTorch's.
# 3. Beam search never proposes PAD or BOS, ends a hypothesis (EOS) that reaches its length limit,
#    and stops when no unfinished one can still win. The paper says only "terminate early when
#    possible".
# 4. Text becomes byte-level BPE, with a space put before the first word. The pieces of the paper
#    are made of characters. With bytes any string can be written, so there is no unknown word.
# 5. `Config` offers what the paper does not use: norms before the sub-layers, an output matrix
#    that is not tied to the embedding, a source vocabulary of its own, biases on the attention
#    projections, norms at the end of the stacks.

# =============================================================================
# THE MODEL ENDS HERE. What follows is text, files and the command line. Delete it, and the model
# is still complete.
# =============================================================================

import copy
import difflib
import heapq
import os
import re
import shlex
import sys
import textwrap
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache, partial
from itertools import groupby, pairwise

# ---- §5.1 Text: byte-level byte-pair encoding, shared by both languages -------

def merge(ids, pair, new):
    """Every occurrence of pair in ids, from the left, becomes new.

    >>> merge([1, 2, 1, 2, 1], (1, 2), new=9)
    [9, 9, 1]
    """
    a, b = pair
    out = []
    for i in ids:
        if i == b and out and out[-1] == a:
            out[-1] = new
        else:
            out.append(i)
    return out

def combining_marks():
    """The characters that belong to the letter before them, as ranges for a regular expression.

    An accent can be a character of its own, and so are the vowel signs of Hindi. `re` has no name
    for them, Unicode has: all categories that begin with M. The last two characters are joiners,
    which some scripts write inside words.
    """
    characters = map(chr, [*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0)])
    ranges = ""
    for category, run in groupby(characters, unicodedata.category):
        if category[0] == "M":
            marks = list(run)
            ranges += f"{marks[0]}-{marks[-1]}"
    return ranges + "\u200c\u200d"

class Tokenizer:
    """Text to ids and back, by byte-pair encoding (Sennrich et al., 2016).

    A vocabulary of whole words would never be complete, and one of letters makes long sequences.
    So frequent words get an id of their own, and rare ones are written in several pieces.

    Ids 0, 1, 2 are PAD, BOS, EOS; 3..258 are the 256 bytes; the rest are merges, in order.
    `merges` is a list of pairs of ids: the i-th pair of neighbours becomes the one id 259 + i.
    Byte b is id b + 3, so "a" is 100, "b" is 101, and a space, which the first word gets as well,
    is 35:

    >>> Tokenizer([(100, 101)]).encode("aab ab")
    [35, 100, 259, 35, 259]

    Every byte has an id, so every string has an encoding, and decode(encode(s)) == s. No text
    becomes an id below 3.
    """

    # How a text is cut into words. They end at 32 characters, so that no input can make merging
    # slow. In re.VERBOSE, white space and comments in the expression mean nothing.
    MARKS = combining_marks()
    WORD = re.compile(rf"""
        [ ]?\w[\w{MARKS}]{{0,31}}     # letters, digits and their marks, with the space before them
        | [ ]?[^\w\s]{{1,32}}         # symbols, with the space before them. A mark that follows no
                                     # letter is one, too: an emoji keeps its marks
        | \s{{1,32}}(?!\S)            # white space, without the last before a word: a space there
                                     # belongs to the word
        | \s                         # that last one, if it is no space
        """, re.VERBOSE)

    def __init__(self, merges):
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.bytes = [b""] * 3 + [bytes([i]) for i in range(256)]      # id -> its bytes
        for a, b in self.merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.joined = {pair: 259 + i for i, pair in enumerate(self.merges)}
        self.cache = {}                 # word -> its ids: text repeats its words

    def __len__(self):
        return len(self.bytes)

    @classmethod
    def words(cls, text):
        """Text cut into the pieces that merges never cross.

        The first gets a space, so that it is the same word as in the middle of a sentence.
        """
        return cls.WORD.findall(" " + text) if text else []

    @classmethod
    def train(cls, lines, vocab_size):
        """Learns merges from strings, or from a Counter of words.

        The most frequent pair of neighbours is merged, again and again, until there are vocab_size
        ids, or no pair occurs twice; of equals, the pair with the smaller ids:

        >>> def train_slowly(lines, vocab_size):
        ...     words = [word.encode() for line in lines for word in Tokenizer.words(line)]
        ...     words = [[3 + byte for byte in word] for word in words]
        ...     merges = []
        ...     while 259 + len(merges) < vocab_size:
        ...         counts = Counter(pair for word in words for pair in pairwise(word))
        ...         pair = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        ...         if counts[pair] < 2:
        ...             break
        ...         words = [merge(word, pair, 259 + len(merges)) for word in words]
        ...         merges.append(pair)
        ...     return merges
        >>> lines = ["low lower lowest", "slow slower slowest"]
        >>> Tokenizer.train(lines, 270).merges == train_slowly(lines, 270)
        True

        To count all pairs anew for each merge would take hours. So each pair knows the words that
        have it (`where`), and a merge changes the counts of its neighbours in these words alone. A
        heap gives the next pair. A merge makes new pairs, which go into the heap. The counts of the
        pairs already there can only fall. So an entry of the heap that is out of date stands too
        high: it is met in time, and goes back with its true count.

        Raises ValueError for a vocab_size below 259.
        """
        if vocab_size < 259:
            raise ValueError("vocab_size must be at least 259 (3 special ids and 256 bytes), "
                             f"got {vocab_size}")
        counts = lines
        if not isinstance(lines, Counter):
            counts = Counter(word for line in lines for word in cls.words(line))
        words = [[3 + byte for byte in word.encode("utf-8", "surrogatepass")] for word in counts]
        times = list(counts.values())   # how often each of the words occurs in the text

        total = Counter()               # pair -> how often it occurs in the text
        where = defaultdict(set)        # pair -> the numbers of words that have it, or had it
        for i, word in enumerate(words):
            for pair in pairwise(word):
                total[pair] += times[i]
                where[pair].add(i)
        heap = [(-n, pair) for pair, n in total.items()]
        heapq.heapify(heap)

        merges = []
        while heap and 259 + len(merges) < vocab_size:
            n, pair = heapq.heappop(heap)
            if -n != total[pair]:
                heapq.heappush(heap, (-total[pair], pair))
                continue
            if n > -2:
                break                   # no pair occurs twice
            a, b = pair
            new = 259 + len(merges)
            merges.append(pair)
            fresh = set()
            for i in where.pop(pair):
                words[i] = merge(words[i], pair, new)
                # "x a b y" is "x new y" now: (x, a) became (x, new), and (b, y) became (new, y).
                for left, right in pairwise(words[i]):
                    if new in (left, right):
                        old = (b if left == new else left, a if right == new else right)
                        total[old] -= times[i]
                        total[left, right] += times[i]
                        where[left, right].add(i)
                        fresh.add((left, right))
            del total[pair]
            for made in fresh:
                heapq.heappush(heap, (-total[made], made))
        return cls(merges)

    def encode(self, text):
        """str -> list of ids, no BOS or EOS.

        Each word's bytes are joined by the merge that was learnt first, until none fits.
        """
        ids = []
        for word in self.words(text):
            piece = self.cache.get(word)
            if piece is None:
                piece = [3 + byte for byte in word.encode("utf-8", "surrogatepass")]
                while pairs := [pair for pair in pairwise(piece) if pair in self.joined]:
                    first = min(pairs, key=self.joined.get)
                    piece = merge(piece, first, self.joined[first])
                if len(self.cache) < 1_000_000:
                    self.cache[word] = piece
            ids.extend(piece)
        return ids

    def decode(self, ids):
        """List of ids -> str. Raises ValueError for ids that there are not.

        Special ids have no text. Bytes that are not UTF-8, as a model may write, become U+FFFD. But
        lone surrogates, if nothing else is wrong, stay what they are.
        """
        for i in ids:
            if not 0 <= i < len(self.bytes):
                raise ValueError(f"expected ids from 0 to {len(self.bytes) - 1}, got {i}")
        data = b"".join([self.bytes[i] for i in ids]).removeprefix(b" ")
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

# ---- Lines of text -----------------------------------------------------------------

def clean(line):
    """A line as a model should read it: one space between words, and none at its ends.

    Stray spaces are common in files, and a model that never saw any translates them badly.

    >>> clean("  two\u3000words ")
    'two words'
    """
    return " ".join(line.split())

def as_list(lines):
    """Any iterable of lines as a list. Raises TypeError for a string: each letter of it would count
    as a line."""
    if isinstance(lines, str):
        raise TypeError(f"expected a list of lines, got the string {lines!r}")
    return list(lines)

# ---- BLEU: how much a translation shares with a reference --------------------------

def words_13a(line):
    """The words of mteval-v13a: punctuation stands apart, but not inside numbers."""
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(entity, char)
    line = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {line} ")
    line = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", line)
    line = re.sub(r"([\.,])([^0-9])", r" \1 \2", line)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()

def characters(line):
    """Every character but the spaces is a word: for languages without spaces."""
    return list("".join(line.split()))

def n_grams(words, n):
    """How often each sequence of n words occurs. -> Counter"""
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))

BLEU_WORDS = {"13a": words_13a, "none": str.split, "char": characters}

def bleu(hypotheses, references, tokenize="13a"):
    """Corpus BLEU in percent, one reference a line, as sacreBLEU has it (Papineni et al., 2002).

    tokenize: what a word is: "13a", as sacreBLEU's default; "none", what stands between spaces;
    "char", every character. Raises ValueError if there are not as many references as hypotheses,
    and TypeError for a string in place of a list.

    The share of a translation's 1- to 4-grams that its reference has too: the mean of the four
    shares, as logarithms, times a penalty if all in all the translations are shorter. A count of 0
    becomes 1/2, the next 1/4, and so on.
    """
    words = BLEU_WORDS[tokenize]
    match = Counter()
    total = Counter()
    n_hyp = 0
    n_ref = 0
    for hypothesis, reference in zip(as_list(hypotheses), as_list(references), strict=True):
        hyp = words(hypothesis)
        ref = words(reference)
        n_hyp += len(hyp)
        n_ref += len(ref)
        for n in (1, 2, 3, 4):
            grams = n_grams(hyp, n)
            total[n] += grams.total()
            match[n] += (grams & n_grams(ref, n)).total()
    if not any(match.values()) or not all(total.values()):
        return 0.0

    log_precision = 0.0
    smoothed = 1.0
    for n in total:
        if match[n] == 0:
            smoothed /= 2
        log_precision += math.log(100 * (match[n] or smoothed) / total[n]) / 4
    brevity = min(1.0, math.exp(1 - n_ref / n_hyp))
    return brevity * math.exp(log_precision)

# ---- Checkpoints: tensors and plain values, nothing that could run -------------

def write_atomically(path, content):
    """Writes content, anything that torch.save takes, so that path is always a whole file.

    The content goes to a file beside path, then to the disk, and only then gets path's name.
    Whenever the power goes, path is the old file or the new one. Raises OSError with the path.
    """
    path = os.path.realpath(path)
    unfinished = path + ".tmp"
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:        # torch puts its own around that of a full disk
        if os.path.exists(unfinished):
            os.remove(unfinished)
        raise OSError(f"cannot write {path}: {error.__context__ or error}") from error

def plain_state(model):
    """The state_dict, with the parameters themselves and without what torch.compile puts before
    names. Raises ValueError for a part of which names and shapes would not tell what it computes.
    """
    for name, part in model.named_modules():
        # An adapter may inherit from Linear, but it has a forward of its own.
        is_other = isinstance(part, nn.Linear) and type(part).forward != nn.Linear.forward
        if is_other or getattr(part, "eps", 1e-5) != 1e-5:
            raise ValueError(f"expected a plain Linear, or eps 1e-5, as {name}, got {part}")
    state = model.state_dict(keep_vars=True)
    return {name.replace("_orig_mod.", ""): weight for name, weight in state.items()}

def summary(state):
    """Names, shapes, and which weights are tied to the embedding. -> {(name, shape, tied), ...}"""
    embedding = state.get("embedding.weight")
    # A quantised part has more than tensors, and so no shape.
    return {(name, getattr(weight, "shape", None), weight is embedding)
            for name, weight in state.items()}

def save(path, model, tokenizer=None, length_penalty=None):
    """Writes the model, and all it takes to translate with it, to one file, atomically.

    length_penalty: what `translate` will use by default; None: the model's own.
    Raises OSError if the file can't be written, and ValueError, naming the weights, for a model
    that `load` would not give back: one with packed weights, or with parts replaced by others.
    """
    if length_penalty is None:
        length_penalty = model.length_penalty
    weights = plain_state(model)
    with torch.device("meta"):          # without memory: only names, shapes and ties count
        expected = plain_state(Transformer(model.config))
    strange = sorted({name for name, *_ in summary(weights) ^ summary(expected)})
    if strange:                         # better now than when the file is needed
        raise ValueError("`load` could not read this model, which has other weights than a "
                         f"Transformer of its config: {', '.join(strange[:4])}")

    # One piece of memory is written once, so tied weights take no more room.
    weights = {name: weight.detach() for name, weight in weights.items()}
    write_atomically(path, {"config": vars(model.config), "model": weights,
                            "merges": tokenizer and tokenizer.merges,
                            "length_penalty": float(length_penalty)})

def read_checkpoint(path, mapped=False):
    """What write_atomically wrote, if every bit is still right. Raises ValueError, in one line.

    mapped: the tensors stay in the file and are read where they are used, so nothing compares their
    checksums.
    """
    try:
        # torch.load compares no checksums, so a flipped bit would become a wrong weight.
        if not mapped:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:          # strange bytes raise many types
        raise ValueError(f"expected the path of a whole checkpoint, but {path} can't be read as "
                         f"one ({type(error).__name__})") from None

def load(path, device="cpu"):
    """Reads what `save` wrote. -> (model in eval mode, tokenizer or None)

    The model's length_penalty is the one that was saved. Raises ValueError, in one line, if the
    file can't be read, is damaged or does not fit.
    """
    checkpoint = read_checkpoint(path)
    try:
        config = Config(**checkpoint["config"])
        with torch.device("meta"):      # weights take no memory before their sizes are compared
            model = Transformer(config)
        model.load_state_dict(checkpoint["model"], assign=True)
        model.length_penalty = checkpoint.get("length_penalty", 0.6)
        tokenizer = None
        if checkpoint["merges"] is not None:
            tokenizer = Tokenizer(checkpoint["merges"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        # torch lists the weights that differ over many lines: the first ones tell enough.
        reason = textwrap.shorten(str(error), 300)
        got = textwrap.shorten(repr(checkpoint), 120)
        raise ValueError(f"{path} does not fit this transformer.py: {reason}; expected what `save` "
                         f"writes, as in model.pt, got {got}") from None
    return model.to(device).eval(), tokenizer

# ---- Weights from torch.nn.Transformer and back ---------------------------------

# A weight has another name there, in these pieces (here: there). W^Q, W^K and W^V are one matrix
# there, in_proj_weight, in this order. Here they are q, and kv for the other two.
NAME_PIECES = {
    "coder.": "coder.layers.",
    "coder_norm.": "coder.norm.",
    "cross_attn.": "multihead_attn.",
    ".out.": ".out_proj.",
    "add_norm1.norm.": "norm1.",
    "add_norm2.norm.": "norm2.",
    "add_norm3.norm.": "norm3.",
    "ffn.w1.": "linear1.",
    "ffn.w2.": "linear2.",
}

def fill(model, weights):
    """load_state_dict, where a missing bias is zero and embeddings stay. Raises ValueError with
    the names of what does not fit."""
    for name, weight in model.state_dict().items():
        if "coder" not in name:
            weights[name] = weight
        elif name.endswith("bias"):
            weights.setdefault(name, torch.zeros_like(weight))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(textwrap.shorten(str(error), 600)) from None

def from_torch(module, config):
    """A Transformer with the weights of a torch.nn.Transformer, which has no embeddings: those
    start fresh.

    Its biases on the projections (attention_bias) and the norms at the end of its post-norm stacks
    (final_norms), which the paper lacks, come along, and so does its training or eval mode. Raises
    ValueError, naming the difference, if it does not fit the config, and for a part that was
    replaced by another (but for torch.compile).
    """
    D = config.d_model
    weights = {}
    for old_name, weight in plain_state(module).items():
        name = old_name
        for here, there in NAME_PIECES.items():
            name = name.replace(there, here)
        if "in_proj_" in name:
            weights[name.replace("in_proj_", "q.")] = weight[:D]
            weights[name.replace("in_proj_", "kv.")] = weight[D:]
        else:
            weights[name] = weight

    has_norm = "encoder_norm.weight" in weights
    config = replace(config, attention_bias="encoder.0.self_attn.q.bias" in weights,
                     final_norms=has_norm and not config.norm_first)
    # What neither names nor shapes tell.
    expected = (config.n_heads, config.norm_first, True)
    for layer in (*module.encoder.layers, *module.decoder.layers):
        is_relu = layer.activation in (F.relu, torch.relu) or isinstance(layer.activation, nn.ReLU)
        got = (module.nhead, layer.norm_first, is_relu)
        if got != expected:
            raise ValueError("this torch.nn.Transformer does not fit: expected n_heads, "
                             f"norm_first and ReLU to be {expected}, got {got}")

    model = Transformer(config).to(next(module.parameters()))       # its device and dtype
    fill(model, weights)
    return model.train(module.training)

def to_torch(model):
    """The same encoder and decoder as a torch.nn.Transformer (batch_first), whose inputs are
    embedded already: (B, S, D) and (B, T, D). Raises ValueError for a part that was replaced."""
    config = model.config
    module = nn.Transformer(config.d_model, config.n_heads, config.n_encoder_layers,
                            config.n_decoder_layers, config.d_ff, config.dropout,
                            batch_first=True, norm_first=config.norm_first)
    if not (config.norm_first or config.final_norms):
        module.encoder.norm = None
        module.decoder.norm = None
    module.to(model.embedding.weight)   # its device and dtype

    pieces = defaultdict(list)          # name there -> one weight, or q and kv, in this order
    for old_name, weight in plain_state(model).items():
        name = old_name
        for here, there in NAME_PIECES.items():
            name = name.replace(here, there)
        if "coder" in name:
            pieces[re.sub(r"\b(q|kv)\.", "in_proj_", name)].append(weight)
    fill(module, {name: torch.cat(weights) for name, weights in pieces.items()})
    return module.train(model.training)

# People expect both as methods. They stand down here because the model does not need them.
Transformer.from_torch = staticmethod(from_torch)
Transformer.to_torch = to_torch

# ---- A loaded model, made fast on this machine -----------------------------------

def find_device(name, local_rank=0):
    """The torch.device of that name. "auto" is "cuda" where there is a GPU, and else the CPU. Of
    several processes on a machine, "cuda" gives each its own GPU. Raises ValueError, in one line,
    if the device can't be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device={name} can't be used: {reason}") from None

# The fast products of a CPU are private to torch, so any version may lack some of them. They are
# looked for by name, and where one is missing, the layer stays what it is.

def cpu_has(feature):
    """Whether this CPU has the feature, as far as this version of torch can say."""
    question = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return question is not None and question()

def has_bfloat16(device):
    """Whether the device multiplies bfloat16 in hardware. Where it doesn't, float32 is faster."""
    if device.type == "cpu":
        return cpu_has("avx512_bf16") or cpu_has("amx_tile")
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

def has_int8(device):
    """Whether torch has products of matrices of 8-bit integers for this device."""
    has_product = hasattr(torch.ops.quantized, "linear_dynamic")
    return device.type == "cpu" and has_product and torch.backends.quantized.engine != "none"

def has_packed(device):
    """Whether torch has products with packed weights for this device."""
    has_product = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return device.type == "cpu" and has_product and "AVX" in torch.backends.cpu.get_cpu_capability()

class PackedLinear(nn.Module):
    """A Linear layer whose weights lie in the order in which a CPU's kernels read them.

    To sort the weights at every call would take longer than the product of a few rows. In int8
    each row of the weights is rounded with a scale of its own, and all inputs of a call with one.
    That scale comes from the largest input, so a sentence's numbers depend, by a rounding, on the
    rest of its batch.
    """

    def __init__(self, linear, int8, out_dtype):
        super().__init__()
        self.int8 = int8
        self.in_dtype = linear.weight.dtype
        self.out_dtype = out_dtype
        self.bias = linear.bias
        weight = linear.weight
        if not int8:
            n_rows = 32                 # of inputs, for which the order is best; any number works
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
            return
        # Without VNNI, sums of products have 16 bits, and so the inputs only 7.
        self.reduce_range = not cpu_has("vnni")
        scale = weight.abs().amax(1).clamp(min=1e-8).double() / 127
        zero = torch.zeros_like(scale).long()
        with warnings.catch_warnings():
            # torch plans to drop this kind of tensor, but has no other for the product yet.
            warnings.simplefilter("ignore")
            weight = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, self.bias)

    def forward(self, x):
        if self.int8:
            return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)
        x = x.to(self.in_dtype)
        y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y.to(self.out_dtype)

# For each dtype of for_inference, that of the numbers which flow from one product to the next.
BETWEEN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}

def for_inference(model, dtype="auto"):
    """A copy to translate with, in eval mode, on the same device. The model stays as it is.

    dtype: "float32", "bfloat16", "int8" or "auto", else ValueError. "auto" is bfloat16 where the
    hardware has it, and float32 elsewhere; "int8" means "auto" where has_int8 says no.
    On a CPU the weights may be packed. Such a copy can't be trained, copied or saved: use the model
    itself for that.
    """
    device = model.embedding.weight.device
    if dtype == "auto" or (dtype == "int8" and not has_int8(device)):
        dtype = "bfloat16" if has_bfloat16(device) else "float32"
    if dtype not in BETWEEN:
        raise ValueError(f"dtype must be float32, bfloat16, int8 or auto, got {dtype!r}")
    between = BETWEEN[dtype]
    model = getattr(model, "_orig_mod", model)          # what torch.compile has wrapped
    fast = copy.deepcopy(model)
    fast.to(between).eval().requires_grad_(False)
    can_pack = has_packed(device) and (dtype == "float32" or has_bfloat16(device))
    if dtype != "int8" and not can_pack:
        return fast
    for parent in list(fast.modules()):
        # A subclass of Linear may compute something else, and so does one with hooks: they stay.
        linears = {name: part for name, part in parent.named_children()
                   if type(part) is nn.Linear
                   and not part._forward_hooks and not part._forward_pre_hooks}
        # A CPU is slow with many small products in bfloat16, so attention itself, between its
        # projections, is in float32: if all three are packed, for q, k and v must have one dtype.
        is_attention = isinstance(parent, MultiHeadAttention) and len(linears) == 3
        for name, linear in linears.items():
            out_dtype = between
            if is_attention and name != "out":
                out_dtype = torch.float32
            setattr(parent, name, PackedLinear(linear, dtype == "int8", out_dtype))
    return fast

@lru_cache
def side_stream(device):
    """The stream of that GPU on which graphs are recorded. (Each stream has a workspace of its own,
    which stays: so there is one.)"""
    return torch.cuda.Stream(device)

def cuda_graph(call, inputs, pool=None):
    """Records what call(*inputs) launches on a GPU. Raises RuntimeError if that can't be recorded.

    inputs: tensors. pool: graph.pool() of another graph, whose result is no longer needed when this
    one is replayed.
    Returns the graph, whose replay() computes the same again from what the inputs hold then, and
    the result, a tensor that is in the same place each time. Before the first replay it is NaN.
    """
    device = inputs[0].device
    stream = side_stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        for _ in range(2):              # what libraries set up at their first calls is not recorded
            call(*inputs)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = call(*inputs)
    return graph, result.fill_(math.nan)

class StaticCache(Cache):
    """A cache for a GPU. A step of a search is hundreds of small kernels, and Python takes longer
    to launch them than the GPU to compute them. So a step is recorded once, as a CUDA graph, and
    then launched as a whole.

    A graph computes with the same shapes, at the same places in memory. So here the keys have their
    full length from the start, the mask says which of them count, and the position is a tensor.
    """

    may_record = True                   # until a graph has failed

    def __init__(self, model, memory, src, n_beams, max_len):
        super().__init__(model, memory, src, n_beams, max_len)
        for k, v in self.self_kv:
            k.zero_()                   # what memory holds may be NaN, and 0 times NaN is NaN
            v.zero_()
        self.position_tensor = torch.zeros(1, dtype=torch.int64, device=src.device)
        self.columns = torch.arange(-n_beams, 0, device=src.device)     # of the newest keys
        self.graph = None

    def open_position(self):
        super().open_position()
        self.mask = self.visible[:, None]                           # (B, 1, N, n_keys)
        self.position = self.position_tensor.fill_(self.length - 1)
        self.columns += self.n_beams

    def append(self, i, k, v):
        all_k, all_v = self.self_kv[i]
        return all_k.index_copy_(2, self.columns, k), all_v.index_copy_(2, self.columns, v)

    def should_select(self, n_done, n):
        """On a GPU few sentences take as long as many, and a new graph as long as several steps."""
        return 2 * n_done >= n and n - n_done >= 64

    def select(self, rows):
        super().select(rows)
        self.graph = None               # its shapes are the old ones

    def step(self, model, newest):
        if not (newest.is_cuda and StaticCache.may_record):
            return super().step(model, newest)
        self.open_position()
        if self.graph is None:
            return self.record(model, newest)
        self.ids.copy_(newest)
        self.graph.replay()
        return self.log_probs

    def record(self, model, newest):
        """A step without a graph, and the graph for the next ones, if it computes the same."""
        expected = next_log_probs(model, newest, self)
        self.ids = newest.clone()
        call = partial(next_log_probs, model, cache=self)
        try:
            self.graph, self.log_probs = cuda_graph(call, [self.ids])
            self.graph.replay()
            # Both run the same kernels. What is less probable than e^-20 need not be the same.
            error = (self.log_probs - expected).abs().where(expected > -20, 0.0).max().item()
            if not error <= 0.05:       # it may be NaN
                raise RuntimeError(f"its log-probabilities differ by {error}")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"searching without CUDA graphs from now on: {error}", stacklevel=2)
            StaticCache.may_record = False
        return expected

def cache_for(device):
    """The kind of cache with which beam_search is the fastest on that device."""
    return StaticCache if device.type == "cuda" else Cache

# ---- Translation: text in, text out ----------------------------------------------

def longest_source(model, max_src):
    """How many ids of a source the model can read, of at most max_src. EOS is not counted."""
    learned = model.config.learned_positions or math.inf
    return min(max_src, learned - 1)

def translate(model, tokenizer, lines, beam_size=4, length_penalty=None, batch_tokens=0, n_best=1,
              max_src=1024):
    """Translations of an iterable of strings, in order: [[(text, score), ...n_best], ...].

    An empty line stays empty. White space is made regular, in lines and translations (see clean).
    Sources are cut after max_src ids, since the time of attention grows with the square of the
    length.
    length_penalty: None is the model's own.
    batch_tokens: ids that the sentences of a batch may need together: their sources, and for each
        hypothesis of the beam a target of the greatest length, source length + 50. 0: 25,000, or on
        a GPU 250,000, and half as many whenever its memory is too small.
    Raises TypeError for a string in place of lines.
    """
    device = model.embedding.weight.device
    if length_penalty is None:
        length_penalty = model.length_penalty
    if batch_tokens == 0:
        batch_tokens = 250_000 if device.type == "cuda" else 25_000
    max_src = longest_source(model, max_src)
    lines = [clean(line) for line in as_list(lines)]
    sources = {i: tokenizer.encode(line)[:max_src] + [EOS] for i, line in enumerate(lines) if line}
    results = [[("", 0.0)] * n_best for _ in lines]

    # Sentences of like length share a batch, so there is little padding. The longest go first: if
    # the memory is too small, that shows at once.
    order = sorted(sources, key=lambda i: -len(sources[i]))
    while order:
        length = len(sources[order[0]])
        need = length + beam_size * (length + 50)       # of each, as it is filled up
        batch = order[:max(1, batch_tokens // need)]
        src = torch.tensor([sources[i] + [PAD] * (length - len(sources[i])) for i in batch])
        try:
            ids, scores = beam_search(model, src.to(device), beam_size, length_penalty,
                                      n_best=n_best, make_cache=cache_for(device))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            batch_tokens = need * (len(batch) // 2)
            warnings.warn(f"out of memory: going on with batch_tokens={batch_tokens}", stacklevel=2)
            continue
        order = order[len(batch):]
        ids = ids.view(len(batch), n_best, -1).tolist()
        scores = scores.view(len(batch), n_best).tolist()
        for i, rows, values in zip(batch, ids, scores, strict=True):
            results[i] = []
            for row, value in zip(rows, values, strict=True):
                results[i].append((clean(tokenizer.decode(row)), value))
    return results

# ---- Where the model looks --------------------------------------------------------

def note_weights(maps, attn, x, seen=None, mask=None, causal=False):
    """Adds to the list the weights of what attn.forward computes from the same arguments."""
    if seen is None:
        seen = attn.keys_values(x)
    if causal:
        mask = causal_mask(x.size(1), x.device)
    q = attn.split_heads(attn.q(x))
    maps.append(attention_weights(q, seen[0], mask))

@torch.no_grad()
def attention_maps(model, src, tgt_in):
    """Who looks at whom, without dropout. (B, S) and (B, T) ids -> a dict of three tensors:

    "encoder": (n_encoder_layers, B, H, S, S)
    "decoder": (n_decoder_layers, B, H, T, T)
    "cross":   (n_decoder_layers, B, H, T, S)
    """
    model = getattr(model, "_orig_mod", model)          # a compiled model would run without hooks
    maps = {"encoder": [], "decoder": [], "cross": []}
    with contextlib.ExitStack() as hooks, eval_mode(model):     # at the end the hooks are removed
        for name, part in model.named_modules():
            if isinstance(part, MultiHeadAttention):
                kind = "cross" if "cross" in name else name.split(".")[0]

                def hook(attn, args, options, layers=maps[kind]):
                    note_weights(layers, attn, *args, **options)

                hooks.enter_context(part.register_forward_pre_hook(hook, with_kwargs=True))
        model(src, tgt_in)
    return {name: torch.stack(layers) for name, layers in maps.items()}

def token_text(tokenizer, i):
    """What the token with id i looks like: a dot if it can't be seen."""
    if i == EOS:
        return "</s>"
    text = tokenizer.decode([i]).strip()
    if not text or not text.isprintable():
        return "·"
    return text

def draw_attention(model, tokenizer, source, target, max_src=1024):
    """Where the model looks while it writes the target, as lines for a terminal. Two str -> str

    A row is a token of the target, a column a token of the source, and darker means a larger
    weight: those of the last layer's cross-attention, averaged over its heads.
    """
    src = tokenizer.encode(clean(source))[:longest_source(model, max_src)] + [EOS]
    tgt = tokenizer.encode(target) + [EOS]
    tgt = tgt[:model.config.learned_positions or None]
    device = model.embedding.weight.device
    src_row = torch.tensor([src], device=device)
    tgt_in_row = torch.tensor([[BOS] + tgt[:-1]], device=device)
    cross = attention_maps(model, src_row, tgt_in_row)["cross"]         # (layers, 1, H, T, S)
    weights = cross[-1, 0].float().mean(0).tolist()                     # T lists of S numbers

    # The names of the columns stand upright, one letter below the other.
    names = [token_text(tokenizer, i)[:10] for i in src]
    height = max(map(len, names))
    names = [name.rjust(height) for name in names]
    lines = [" " * 17 + " ".join(letters) for letters in zip(*names, strict=True)]
    for i, row in zip(tgt, weights, strict=True):
        shades = [" ░▒▓█"[min(4, int(w * 5))] * 2 for w in row]
        lines.append(f"{token_text(tokenizer, i)[:16]:>16} " + "".join(shades))
    return "\n".join(line.rstrip() for line in lines)

# ---- The tour: python transformer.py ----------------------------------------------

def show_shape(what, x):
    print(f"  {what:<44} {tuple(x.shape)}")

def check(condition, claim):
    """Prints a claim that holds. An assert would check nothing under python -O.

    Raises AssertionError if it doesn't hold.
    """
    if not condition:
        raise AssertionError(f"this does not hold: {claim}")
    print(f"  {claim}")

@torch.no_grad()
def show(model, src, tgt_in):
    """One forward pass: the shapes, and the claims of this file about masks, batches and cache."""
    attn = model.encoder[0].self_attn
    x = model.embed(src, model.src_embedding, model.learned_src)
    show_shape("embedded and placed", x)
    q = attn.split_heads(attn.q(x))
    k, _ = attn.keys_values(x)
    show_shape("queries, keys and values, for each head", q)
    mask = source_mask(src)
    show_shape("mask: which keys are words", mask)
    weights = attention_weights(q, k, mask)
    show_shape("attention weights: query by key", weights)
    memory = model.encode(src)
    show_shape("memory: the encoder's output", memory)
    show_shape("states: the decoder's output", model.decode(tgt_in, memory, src))
    logits = model(src, tgt_in)
    show_shape("logits: a score for every word", logits)

    print("\nChecked:")
    sums_to_1 = torch.allclose(weights.sum(-1), torch.ones(()))
    padding = weights[1, :, :, 3:]
    check(sums_to_1 and not padding.any(), "weights sum to 1, and padding gets none")
    changed_in = tgt_in.clone()
    changed_in[:, 3] = 10
    differs = (model(src, changed_in) != logits).any(-1).any(0)     # (T,)
    from_there = [False] * 3 + [True] * 3
    check(differs.tolist() == from_there, "no prediction depends on a later target word")
    alone = model(src[1:, :3], tgt_in[1:, :4])
    same_alone = torch.allclose(alone, logits[1:, :4], atol=1e-5)
    check(same_alone, "a sentence gets the same logits alone and in a batch")
    found, _ = beam_search(model, src, beam_size=1)
    check(torch.equal(greedy(model, src), found), "the cache changes nothing but the time")

def tour():
    """A small model, step by step, with every claim checked."""
    torch.manual_seed(0)
    config = Config(vocab_size=11, d_model=32, n_heads=4, d_ff=64, n_encoder_layers=2,
                    n_decoder_layers=2, dropout=0.0)
    model = Transformer(config).eval()
    src = torch.tensor([[3, 4, 5, 6, 7, EOS], [8, 9, EOS, PAD, PAD, PAD]])
    tgt = torch.tensor([[BOS, 7, 6, 5, 4, 3, EOS], [BOS, 9, 8, EOS, PAD, PAD, PAD]])

    print("The shapes, for 2 sentences of up to 6 ids on either side, D = 32, 4 heads, 11 words")
    show(model, src, tgt[:, :-1])
    print("\nLearning this batch by heart: every target is its source in reverse")
    learn_by_heart(model, src, tgt)
    written = greedy(model, src)
    check(torch.equal(written, tgt[:, 1:]), f"greedy decoding writes {written.tolist()}")
    print("All of it holds. Next: python train.py")

# ---- The command line, of this script and of train.py and bench.py ---------------

def fail(message):
    """One line for a mistake of the user's, and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def settings_of(names):
    """The settings of a script: of its globals so far, those with a plain value. -> dict"""
    plain = (bool, int, float, str)
    return {name: value for name, value in names.items()
            if name.islower() and name[0] != "_" and type(value) in plain}

def show_help(path):
    """Prints the docstring and the settings of the script at path, as they stand there."""
    with open(path, encoding="utf-8") as file:
        _, about, rest = file.read().split('"""', 2)
    names = re.split("\n# ---- (?:end of )?settings.*\n", rest)[1]
    sys.stdout.reconfigure(errors="replace")    # an old Windows console has no arrows
    print(about.strip(), names, sep="\n\n")

# What a setting must be, for each type of a default.
EXPECTED = {bool: "True or False", int: "a whole number", float: "a number"}

def override(settings, argv, path):
    """The settings that argv (--name=value) changes, each of the type of its default. -> dict

    "~" at the beginning of a text is the home folder, since many settings are paths. --help prints
    the settings of the script at path. A mistake costs one line and exit status 2.
    """
    given = {}
    for arg in argv:
        if arg in ("--help", "-h"):
            show_help(path)
            sys.exit(0)
        name, equals, value = arg.removeprefix("--").partition("=")     # a value may hold a "="
        if not arg.startswith("--") or name not in settings:
            near = difflib.get_close_matches(name, settings, 1)
            advice = f"did you mean --{near[0]}?" if near else "--help lists them all"
            fail(f"unknown setting {arg!r}, {advice}")
        if not equals:
            example = shlex.quote(f"--{name}={settings[name]}")
            fail(f"--{name} needs a value, as in {example}")
        kind = type(settings[name])
        try:
            if kind is bool:            # bool("False") would be True
                value = {"True": True, "False": False}[value]
            given[name] = os.path.expanduser(value) if kind is str else kind(value)
        except (KeyError, ValueError):
            fail(f"--{name} must be {EXPECTED[kind]}, got {value!r}")
    return given

# ---- settings ---------------------------------------------------------------
checkpoint = ""             # a model.pt that train.py wrote; "": the tour
beam_size = 4               # hypotheses kept for each sentence; 1 is greedy
length_penalty = -1.0       # its alpha: larger, longer translations; -1: the checkpoint's own
n_best = 1                  # translations for each line; above 1: line from 0, score, text, tabs
batch_tokens = 0            # ids in work at a time, targets at their longest; 0: see translate
max_src = 1024              # source ids after which a line is cut
show_attention = False      # True draws each translation's attention map under it
reference = ""              # a file of right translations, to print the BLEU at the end; "": none
bleu_tokenize = "13a"       # what a word of it is: 13a, none (stands between spaces) or char
device = "auto"             # cpu, cuda, cuda:1, mps; auto: cuda where there is one
dtype = "auto"              # float32, bfloat16, int8 (fastest on a CPU); auto: see for_inference
# ---- end of settings --------------------------------------------------------
settings = settings_of(globals())

LONGEST_LINE = 1 << 20      # bytes of a line that are kept, or a little more

def read_windows(stream):
    """Yields lists of lines from a binary stream: each list is what one read brings.

    A file comes in large blocks, and a pipe as it is written, so an endless input is translated as
    it comes. Only \\n ends a line. What is not UTF-8 becomes U+FFFD, a byte-order mark goes.
    """
    rest = b""                          # the beginning of a line whose end has not come yet
    while block := stream.read1(1 << 19):
        *lines, rest = (rest + block).split(b"\n")
        rest = rest[:LONGEST_LINE]      # a file of one endless line takes little memory
        yield [line.decode("utf-8-sig", "replace") for line in lines]
    if rest:
        yield [rest.decode("utf-8-sig", "replace")]

def check_settings():
    if batch_tokens < 0 or max_src < 1:
        fail("expected batch_tokens of at least 0, and max_src of at least 1")
    if not 1 <= n_best <= beam_size:
        fail("expected 1 <= n_best <= beam_size")
    if length_penalty != -1 and not 0 <= length_penalty <= 10:
        fail("expected length_penalty of -1, or from 0 to 10")
    if bleu_tokenize not in BLEU_WORDS:
        fail(f"--bleu_tokenize must be 13a, none or char, got {bleu_tokenize!r}")

def compare_lengths(n_lines, references):
    if n_lines != len(references):
        fail(f"the input has {n_lines} lines, {reference} has {len(references)}")

def warn_of_cuts(model, tokenizer, lines, n_before):
    longest = longest_source(model, max_src)
    for number, line in enumerate(lines, n_before + 1):
        if len(tokenizer.encode(line)) > longest:
            print(f"line {number} is cut after {longest} ids", file=sys.stderr)

def print_best(number, line, best, model, tokenizer):
    """The translations of one line: the text alone, or with n_best > 1 a table."""
    for text, score in best:
        print(f"{number}\t{score:.4f}\t{text}" if n_best > 1 else text)
    if show_attention and line:
        print(draw_attention(model, tokenizer, line, best[0][0], max_src), end="\n\n")

def translate_stdin():
    """Standard input to standard output, line by line, so that whoever stops it has whole lines."""
    check_settings()
    if os.name == "posix":              # a parent may leave an input that does not wait for more
        os.set_blocking(sys.stdin.fileno(), True)
    windows = read_windows(sys.stdin.buffer)
    if reference:
        with open(reference, "rb") as file:
            references = sum(read_windows(file), [])
        if sys.stdin.seekable():        # a file: a mistake shows before the work
            windows = list(windows)
            compare_lengths(sum(map(len, windows)), references)
    try:
        model, tokenizer = load(checkpoint, find_device(device))
        model = for_inference(model, dtype)
    except ValueError as error:
        fail(str(error))
    if tokenizer is None:
        fail(f"{checkpoint} holds no tokenizer: its model was trained on ids, not on text")
    if length_penalty >= 0:
        model.length_penalty = length_penalty
    torch.backends.cuda.enable_cudnn_sdp(False)     # it makes a new plan for the shape of each step
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)

    n_lines = 0
    hypotheses = []
    for window in windows:
        lines = [clean(line) for line in window]
        warn_of_cuts(model, tokenizer, lines, n_lines)
        results = translate(model, tokenizer, lines, beam_size, None, batch_tokens, n_best, max_src)
        for number, (line, best) in enumerate(zip(lines, results, strict=True), n_lines):
            print_best(number, line, best, model, tokenizer)
            if reference:
                hypotheses.append(best[0][0])
        n_lines += len(lines)

    if reference:
        compare_lengths(n_lines, references)
        score = bleu(hypotheses, references, bleu_tokenize)
        print(f"BLEU {score:.2f} (tokenizer {bleu_tokenize}, {n_lines} lines)", file=sys.stderr)

def main():
    if not checkpoint:
        return tour()
    try:
        translate_stdin()
    except OSError as error:
        # At its end Python writes what is left of the output. Here that would fail again, so it
        # goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):      # a broken pipe: the reader has had enough
            fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    globals().update(override(settings, sys.argv[1:], __file__))
    main()
