"""GPT: a decoder-only transformer, dense or with mixtures of experts, that one person can read in one sitting.

    x = embedding[tokens] * sqrt(n_embd)
    for each layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))
    logits = norm(x) @ embedding.T

Defaults are what learned fastest in a small study: rotary positions, RMSNorm, SwiGLU, no biases, tied embedding, Xavier
weights with the residual projections divided by sqrt(2 n_layer). ``init="gpt2"`` is the alternative: N(0, 0.02),
residual projections 0.02 / sqrt(2 n_layer), and no factor on the embedding.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np

import numformer as nf
from numformer.models.pretrained import Pretrained
from numformer.models.sampling import check_options, sample
from numformer.nn import MLP, Dropout, Embedding, KVCache, LayerNorm, Module, MultiHeadAttention, RMSNorm, rotary_tables
from numformer.nn.layers import project
from numformer.ops.arguments import as_ids, as_integer, as_number, need_generator
from numformer.quant.weight import QuantizedWeight
from numformer.tensor import Tensor, is_recording, unrecorded

__all__ = ["GPT", "GPTConfig"]


class _Derived(int):
    """A size that was not given and follows from others, also in ``dataclasses.replace``."""


@dataclass
class GPTConfig:
    """The shape of a :class:`GPT`.

    Attributes
    ----------
    vocab_size, block_size : int
        Tokens known, and positions at most.
    n_layer, n_head, n_embd : int
    n_kv_head : int, optional
        Heads of keys and values (grouped queries); n_head where None.
    n_expert : int
        0: dense. Otherwise each feed-forward layer has so many SwiGLU experts of n_inner / top_k features, so that a
        token passes through as many parameters as in the dense model.
    top_k : int
        Experts that each token goes to.
    position : {"rotary", "learned", "alibi"}
        Rotary turns of queries and keys, an embedding of each position, or scores that fall with distance
        (Press et al. 2022).
    dropout : float
        Of the embedding, the attention weights and what the layers add, in training mode.
    n_inner : int, optional
        Hidden features that a token passes in each feed-forward layer: 3 n_embd (swiglu) or 4 n_embd (gelu) where None.
    layer_heads : list of (n_head, n_kv_head), optional
        Heads of each layer where they differ (after pruning); the size of a head stays n_embd / n_head.
    alibi_heads : list of lists of int, optional
        With position "alibi" and `layer_heads`: which of the n_head heads each layer has, as each has its own slope.
    window : int, optional
        A token sees itself and the window - 1 tokens before it; all where None.
    norm : {"rms", "layer"}
    activation : {"swiglu", "gelu", "gelu_tanh"}
    bias : bool
    tie_embedding : bool
        Use the embedding as the weight of the last layer too.
    init : {"xavier", "gpt2"}
    rope_theta : float
    load_balancing : float
        Weight of the experts' load-balancing loss (mean over the layers, Switch form) in :meth:`GPT.loss`.
    recompute : bool
        Keep only what enters each block, and compute its inside again when the gradient is wanted
        (:func:`numformer.nn.checkpoint`): less memory, a third more work, the same bits.
    dtype : {"float32", "float64"}
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int | None = None
    n_expert: int = 0
    top_k: int = 2
    position: str = "rotary"
    dropout: float = 0.0
    n_inner: int | None = None
    layer_heads: list | None = None
    norm: str = "rms"
    activation: str = "swiglu"
    bias: bool = False
    tie_embedding: bool = True
    init: str = "xavier"
    rope_theta: float = 10000.0
    load_balancing: float = 0.01
    recompute: bool = False
    dtype: str = "float32"
    window: int | None = None
    alibi_heads: list | None = None

    def __post_init__(self):
        choices = {"position": ("rotary", "learned", "alibi"), "norm": ("rms", "layer"), "init": ("xavier", "gpt2"),
                   "activation": ("swiglu", "gelu", "gelu_tanh"), "dtype": ("float32", "float64")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"GPTConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self._check_numbers()
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(f"GPTConfig: rotary positions need an even head size, got {self.n_embd // self.n_head}")
        self._check_heads()
        if self.n_expert and self.activation != "swiglu":
            raise ValueError(f"GPTConfig: experts are SwiGLU, got activation {self.activation!r}")
        if self.n_expert and self.top_k > self.n_expert:
            raise ValueError(f"GPTConfig: top_k must be at most n_expert, got {self.top_k} and {self.n_expert}")
        if self.n_inner is None or type(self.n_inner) is _Derived:
            self.n_inner = _Derived(self.n_embd * (3 if self.activation == "swiglu" else 4))
        if self.n_expert and self.n_inner < self.top_k:
            raise ValueError("GPTConfig: n_inner must be at least top_k, as an expert has n_inner / top_k features, "
                             f"got {self.n_inner} and {self.top_k}")

    def _check_numbers(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "top_k"):
            if as_integer(getattr(self, name), "GPTConfig", name) < 1:
                raise ValueError(f"GPTConfig: {name} must be 1 or more, got {getattr(self, name)}")
        for name in ("n_kv_head", "n_inner", "window"):
            if getattr(self, name) is not None and as_integer(getattr(self, name), "GPTConfig", name) < 1:
                raise ValueError(f"GPTConfig: {name} must be 1 or more, or None, got {getattr(self, name)}")
        if as_integer(self.n_expert, "GPTConfig", "n_expert") < 0:
            raise ValueError(f"GPTConfig: n_expert must be 0 or more, got {self.n_expert}")
        if not 0 <= as_number(self.dropout, "GPTConfig", "dropout") < 1:
            raise ValueError(f"GPTConfig: dropout must be in [0, 1), got {self.dropout}")
        if not as_number(self.rope_theta, "GPTConfig", "rope_theta") > 0:
            raise ValueError(f"GPTConfig: rope_theta must be above 0, got {self.rope_theta}")
        if not 0 <= as_number(self.load_balancing, "GPTConfig", "load_balancing") < math.inf:
            raise ValueError(f"GPTConfig: load_balancing must be finite and 0 or more, got {self.load_balancing}")
        for name in ("bias", "tie_embedding", "recompute"):
            if np.ndim(getattr(self, name)) or getattr(self, name) not in (False, True):
                raise TypeError(f"GPTConfig: {name} must be True or False, got {getattr(self, name)!r}")

    def _check_heads(self):
        if self.layer_heads and len(self.layer_heads) != self.n_layer:
            raise ValueError(f"GPTConfig: layer_heads must have an entry for each of {self.n_layer} layers, "
                             f"got {len(self.layer_heads)}")
        for heads in self.layer_heads or ():
            if len(heads) != 2 or min(heads) < 1:
                raise ValueError(f"GPTConfig: layer_heads must be pairs (n_head, n_kv_head) of 1 or more, got {heads}")
        sizes = [heads for heads, _ in self.layer_heads] if self.layer_heads and self.position == "alibi" else None
        got = self.alibi_heads and [len(heads) for heads in self.alibi_heads]
        if got != sizes:
            raise ValueError("GPTConfig: alibi_heads must say which heads each layer has where there are both alibi "
                             f"and layer_heads, and only there: expected so many in each layer: {sizes}, got {got}")
        for heads in self.alibi_heads or ():
            if any(not 0 <= head < self.n_head for head in heads):
                raise ValueError(f"GPTConfig: alibi_heads must be 0..{self.n_head - 1}, got {heads}")

    def slopes(self, layer):
        """ALiBi's slopes of the heads of a layer (n_head,), or False where positions come otherwise."""
        if self.position != "alibi":
            return False
        slopes = nf.alibi_slopes(self.n_head)
        return slopes[self.alibi_heads[layer]] if self.alibi_heads else slopes


def need_config(config, model):
    """`config`. TypeError unless it is a GPTConfig, of which the `model` is to be made."""
    if not isinstance(config, GPTConfig):
        raise TypeError(f"{model}: config must be a GPTConfig, got {type(config).__name__}; make one of a dict by "
                        "GPTConfig(**config)")
    return config


def real_positions(targets):
    """Which of `targets` (B, S) are no padding: all but what stands behind a row's last one that counts."""
    return np.logical_or.accumulate(targets[:, ::-1] != -100, axis=1)[:, ::-1]


class Block(Module):
    """One layer: attention, then the feed-forward part, each on a normalized copy and added to the stream."""

    def __init__(self, config, layer, rng):
        c = config
        n_head, n_kv_head = c.layer_heads[layer] if c.layer_heads else (c.n_head, c.n_kv_head)
        self.norm_1 = _norm(c)
        self.attention = MultiHeadAttention(c.n_embd, n_head, n_kv_head, head_dim=c.n_embd // c.n_head, bias=c.bias,
                                            dropout=c.dropout,
                                            window_size=(-1 if c.window is None else c.window - 1, -1),
                                            alibi=c.slopes(layer), rng=rng, dtype=np.dtype(c.dtype))
        self.norm_2 = _norm(c)
        if c.n_expert:
            self.mlp = nf.nn.MoE(c.n_embd, c.n_inner // c.top_k, c.n_expert, c.top_k, rng=rng, dtype=np.dtype(c.dtype))
        else:
            self.mlp = MLP(c.n_embd, c.n_inner, activation=c.activation, bias=c.bias, rng=rng, dtype=np.dtype(c.dtype))
        self.drop = Dropout(c.dropout, rng=rng)

    def __call__(self, x, rotary, cache, layer):
        if self.training and self.drop.p:
            x = x + self.drop(self.attention(self.norm_1(x), rotary, cache, layer))
            return x + self.drop(self.mlp(self.norm_2(x)))
        x = self.attention(self.norm_1(x), rotary, cache, layer, residual=x)
        return self.mlp(self.norm_2(x), residual=x)


def _norm(config):
    dtype = np.dtype(config.dtype)
    return RMSNorm(config.n_embd, dtype=dtype) if config.norm == "rms" else LayerNorm(config.n_embd, bias=config.bias,
                                                                                     dtype=dtype)


class GPT(Module, Pretrained):
    """The model of :class:`GPTConfig`.

    Parameters
    ----------
    config : GPTConfig
    rng : numpy.random.Generator
        Draws the weights, and later dropout.
    """

    config_class = GPTConfig
    model_type = "numformer-gpt"

    def __init__(self, config, *, rng):
        c = self.config = need_config(config, "GPT")
        dtype = np.dtype(c.dtype)
        self.rng = rng
        self.embedding = Embedding(c.vocab_size, c.n_embd, rng=rng, dtype=dtype)
        if c.position == "learned":
            self.position = Embedding(c.block_size, c.n_embd, rng=rng, dtype=dtype)
            self.rotary = None
        else:
            self.position = self.rotary = None
            if c.position == "rotary":
                self.rotary = rotary_tables(c.block_size, c.n_embd // c.n_head, theta=c.rope_theta, dtype=dtype)
        self.drop = Dropout(c.dropout, rng=rng)
        self.blocks = [Block(c, layer, rng) for layer in range(c.n_layer)]
        self.norm = _norm(c)
        self.head = None if c.tie_embedding else nf.nn.init.xavier_uniform(rng, c.vocab_size, c.n_embd, dtype=dtype)
        self.scale = math.sqrt(c.n_embd) if c.init == "xavier" else 1.0
        for name, parameter in self.named_parameters():
            if c.init == "gpt2" and parameter.ndim > 1:
                parameter.data[...] = rng.standard_normal(parameter.shape) * 0.02
            if name.endswith(("attention.out", "mlp.down")):
                parameter.data /= math.sqrt(2 * c.n_layer)

    def hidden(self, tokens, cache=None):
        """What the last norm gives for `tokens` (B, S): (B, S, n_embd). `cache` holds what came before."""
        x, rotary = self.enter(tokens, cache)
        recompute = self.config.recompute and cache is None and is_recording() and type(x) is Tensor
        for layer, block in enumerate(self.blocks):
            if recompute:
                x = nf.nn.checkpoint(block, x, rotary, cache, layer)
            else:
                x = block(x, rotary, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)

    def enter(self, tokens, cache=None):
        """What the first block is given: the stream (B, S, n_embd) and the rotary tables of its positions, or None."""
        start = cache.length if cache is not None else 0
        tokens = self._tokens(tokens, start)
        end = start + tokens.shape[1]
        x = self.embedding(tokens)
        if self.scale != 1.0:
            x = x * self.scale
        if self.position is not None:
            x = x + self.position(np.arange(start, end))
        return self.drop(x), None if self.rotary is None else tuple(table[start:end] for table in self.rotary)

    @property
    def output_weight(self):
        """The weight (vocab_size, n_embd) that turns :meth:`hidden` into logits."""
        return self.embedding.weight if self.head is None else self.head

    def __call__(self, tokens):
        """Logits (B, S, vocab_size) of the token after each of `tokens` (B, S): a Tensor.

        Nothing is recorded inside ``no_grad``, and the whole model then runs on plain arrays.
        """
        if not is_recording() and not self.training and type(self.norm.weight) is Tensor:
            return unrecorded(self.as_arrays()(tokens), self.parameters())
        return project(self.hidden(tokens), self.output_weight)

    def loss(self, tokens, targets):
        """Mean cross-entropy of `targets` (B, S; -100 is ignored), plus the experts' load-balancing loss.

        The logits are never held, unless the output matrix is quantized. What stands behind a row's last target that
        counts is padding, of which the balancing loss takes no notice. The cross-entropy alone is left in
        ``cross_entropy`` (a float) and the balancing loss in ``balance``; :meth:`expert_load` tells the shares.
        """
        targets = np.asarray(targets)
        if targets.shape != np.shape(tokens):
            raise ValueError(f"GPT: targets must have the shape of tokens, {np.shape(tokens)}, got {targets.shape}")
        hidden = self.hidden(tokens)
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        weight = self.output_weight
        if type(weight) is QuantizedWeight:
            loss = nf.cross_entropy(project(hidden, weight), targets)
        else:
            loss = nf.linear_cross_entropy(hidden, weight, targets)
        self.cross_entropy, self.balance = loss.item(), 0.0
        routings = self.routings()
        if routings and self.config.load_balancing:
            real = real_positions(targets.reshape(np.shape(tokens))).reshape(-1)
            mask = None if real.all() else real
            losses = [nf.moe.load_balancing_loss(routing, token_mask=mask) for routing in routings]
            balance = sum(losses[1:], losses[0]) * (1 / len(losses))
            self.balance = balance.item()
            loss = loss + balance * self.config.load_balancing
        return loss

    def routings(self):
        """How the last forward pass distributed its tokens: a Routing for each layer with experts."""
        return [block.mlp.routing for block in self.blocks if getattr(block.mlp, "routing", None) is not None]

    def expert_load(self):
        """The share of each expert in the last forward pass: (layers, experts), each row adds up to 1."""
        return np.array([r.counts / max(r.counts.sum(), 1) for r in self.routings()])

    def generate(self, ids, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, min_p=None, eos_id=None,
                 rng=None, cache_dtype=None):
        """Continue prompts.

        All rows go through the model in step, from the end of the shortest prompt on; a longer prompt's own tokens
        are fed before its first new one. So there is no padding, and a row's logits have the bits of the full forward.

        Parameters
        ----------
        ids : sequence of int, (B, S) array, or sequence of sequences of any lengths
            One prompt, or a batch; none may be empty.
        max_new_tokens : int
        temperature, top_k, top_p, min_p
            As in :func:`numformer.models.sampling.sample`; temperature 0 is greedy.
        eos_id : int, optional
            A row ends with this token.
        rng : numpy.random.Generator
            Needed unless temperature is 0.
        cache_dtype : dtype, optional
            Of the keys and values that are kept (:class:`numformer.nn.KVCache`): float16 or bfloat16 halve a float32
            model's, which are then no longer those of the full forward to the bit.

        Returns
        -------
        list of int, or a list of such lists for a batch
            The prompt and what follows it, eos_id included.

        Raises
        ------
        ValueError
            For a prompt that is empty or does not fit block_size with its new tokens, ids out of range, options out
            of range, an eos_id that the model does not know, no rng.
        TypeError
            For ids or options that are no such numbers, or another rng.
        """
        check_options(temperature, top_k, top_p, min_p)
        if temperature > 0:
            if rng is None:
                raise ValueError("generate: give rng, a numpy.random.Generator, or temperature 0")
            need_generator(rng, "generate")
        vocab_size = self.config.vocab_size
        if eos_id is not None and not 0 <= as_integer(eos_id, "generate", "eos_id") < vocab_size:
            raise ValueError(f"generate: eos_id must be within 0 .. {vocab_size - 1}, got {eos_id}")
        if as_integer(max_new_tokens, "generate", "max_new_tokens") < 0:
            raise ValueError(f"generate: max_new_tokens must be 0 or more, got {max_new_tokens}")
        ids = ids.data if type(ids) is Tensor else ids
        ids = list(ids) if np.iterable(ids) else ids
        single = not np.iterable(ids) or not all(map(np.iterable, ids))
        rows = [as_ids(row, "generate", "ids") for row in ([ids] if single else ids)]
        if not rows:
            return []
        if min(map(len, rows)) == 0:
            raise ValueError("generate: a prompt must have at least one token")
        total = max(map(len, rows)) + max_new_tokens
        if total > self.config.block_size:
            raise ValueError(f"generate: prompt and new tokens are {total} positions, block_size is "
                             f"{self.config.block_size}")
        if max_new_tokens > 0:
            model = self.as_arrays() if type(self.norm.weight) is Tensor else self
            choose = functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, rng=rng)
            model._continue(rows, max_new_tokens, total, eos_id, choose, cache_dtype or self.config.dtype)
        return rows[0] if single else rows

    def _continue(self, rows, max_new_tokens, total, eos_id, choose, cache_dtype):
        """Append to `rows` in place; self holds arrays."""
        ends = [len(row) + max_new_tokens for row in rows]
        active = list(range(len(rows)))         # the rows of the cache
        length = min(map(len, rows))
        cache = KVCache([block.attention for block in self.blocks], len(rows), total, cache_dtype)
        tokens = np.array([row[:length] for row in rows])
        while True:
            hidden = self.hidden(tokens, cache)
            chosen = choose(project(np.ascontiguousarray(hidden[:, -1]), self.output_weight))
            done = []
            for i, r in enumerate(active):
                row = rows[r]
                if len(row) == length:
                    row.append(int(chosen[i]))
                    if len(row) == ends[r] or row[-1] == eos_id:
                        done.append(i)
            if done:
                keep = [i for i in range(len(active)) if i not in set(done)]
                if not keep:
                    return
                cache.select(keep)
                active = [active[i] for i in keep]
            tokens = np.array([[rows[r][length]] for r in active])
            length += 1

    def _tokens(self, tokens, start):
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu":
            raise TypeError(f"GPT: tokens must be integers, got {tokens.dtype}")
        if tokens.ndim != 2:
            raise ValueError(f"GPT: tokens must have shape (B, S), got {tokens.shape}")
        if start + tokens.shape[1] > self.config.block_size:
            raise ValueError(f"GPT: {start + tokens.shape[1]} positions are more than block_size "
                             f"{self.config.block_size}")
        return tokens

    def config_dict(self):
        """What config.json holds of the config."""
        return dataclasses.asdict(self.config)
