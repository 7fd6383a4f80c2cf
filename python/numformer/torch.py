"""Attention for PyTorch on the CPU: torch's signature, torch's autograd, and no copies.

    import numformer.torch          # from here on transformers knows attn_implementation="numformer"
    numformer.torch.scaled_dot_product_attention(query, key, value, is_causal=True)

Nothing else in numformer imports torch, and the compiled kernels know nothing of it: a CPU tensor is an array at the
same place in memory, and goes in as one.
"""
import contextlib
import functools
import inspect
import math
import sys

import numpy as np
import torch
from torch.autograd.forward_ad import unpack_dual

import numformer as nf
from numformer.ops.attention import scaled_dot_product_attention_backward as attention_backward
from numformer.ops.attention import scaled_dot_product_attention_forward as attention_forward

__all__ = ["attention_of_transformers", "mask_of_transformers", "scaled_dot_product_attention"]

_OP = "scaled_dot_product_attention"
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _array(x, name):
    """The memory of a tensor as an ndarray, or None for None."""
    if x is None:
        return None
    x = x.detach().resolve_neg()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(_bfloat16(name))
    return x.numpy()


def _bfloat16(name):
    """NumPy's dtype for it."""
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise TypeError(f"{_OP}: {name} is bfloat16, which NumPy knows by the package ml_dtypes: install it, or give "
                        "float32, float64 or float16") from None
    return bfloat16


def _tensor(x):
    """The way back, without a copy either."""
    if x is None:
        return None
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _check(x, name, dtypes):
    """Refuse what is not a dense tensor in the memory of the CPU."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{_OP}: {name} must be a torch tensor, got {type(x).__name__}; arrays go to "
                        f"numformer.{_OP}")
    if x.device.type != "cpu" or x.layout != torch.strided:
        kind = f"on {x.device}" if x.device.type != "cpu" else f"of layout {x.layout}"
        raise TypeError(f"{_OP}: {name} must be a dense tensor on the CPU, got one {kind}; use .cpu(), .to_dense() or "
                        f"torch.nn.functional.{_OP}")
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{_OP}: {name} must be of one of the dtypes {names}, got {x.dtype}")


class _Attention(torch.autograd.Function):
    """The pure pair of the op; whatever is kept between them, torch keeps, watches and frees."""

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, alibi_slopes, sinks, keywords):
        inputs = query, key, value, attn_mask, alibi_slopes, sinks
        wanted = [name for name, need in zip(("mask", "slopes", "sinks"), ctx.needs_input_grad[3:6]) if need]
        arrays = {name: _array(x, name) for x, name in zip(inputs, _NAMES)}
        (out, lse), saved = attention_forward(**arrays, return_lse=True, gradients=wanted, **keywords)
        # of what backward needs, numbers and tuples stay here
        ctx.rest, exact, stats = saved[4:9], *saved[9:]
        whole = exact is out
        out, lse = _tensor(out), _tensor(lse)
        ctx.save_for_backward(*inputs, out if whole else _tensor(exact), _tensor(stats))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 7
        query, key, value, attn_mask, _, _, exact, stats = (_array(x, "a saved tensor") for x in ctx.saved_tensors)
        saved = (query, key, value, attn_mask, *ctx.rest, exact, stats)
        gradients = attention_backward((_array(dout, "the gradient"), _array(dlse, "the gradient")), saved)
        return *[_tensor(g) if need else None for g, need in zip(gradients, ctx.needs_input_grad)], None


_NAMES = "query", "key", "value", "attn_mask", "alibi_slopes", "sinks"


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False, *, causal_align="top_left", window_size=(-1, -1), softcap=0.0,
                                 alibi_slopes=None, sinks=None, kv_lengths=None, return_lse=False):
    """Compute :func:`torch.nn.functional.scaled_dot_product_attention` by numformer's kernels, with gradients.

    Tensors are read and results handed back without a copy, whatever the strides, as long as the last axis is
    contiguous. Within torch.autocast query, key and value become its dtype, as there.

    Parameters
    ----------
    query : torch.Tensor, (..., H, L, E), on the CPU; float32, float64, float16 or bfloat16
        bfloat16 takes the package ml_dtypes.
    key : (..., H, S, E), of the same dtype
        With `enable_gqa`, of fewer heads, of which H is a multiple.
    value : (..., H, S, Ev)
    attn_mask : torch.Tensor that broadcasts to (..., H, L, S), optional
        Boolean, True where a query attends, or floating and added to the scores; then it gets its gradient.
    dropout_p : float
        The weights to drop follow from one number of torch's default generator: ``torch.manual_seed`` repeats them, and
        torch.utils.checkpoint drops the same again.
    is_causal : bool
        With `attn_mask`, both hold.
    scale : float, optional
        ``1/sqrt(E)`` by default.
    enable_gqa : bool
        Allow fewer heads of keys and values.
    causal_align : {"top_left", "bottom_right"}
        torch's meaning here, unlike in :func:`numformer.scaled_dot_product_attention`.
    window_size, softcap, alibi_slopes, sinks, kv_lengths, return_lse
        As in :func:`numformer.scaled_dot_product_attention`; slopes and sinks are tensors and get their gradients.

    Returns
    -------
    torch.Tensor, (..., H, L, Ev)
        A row that sees no key is 0, and so are its gradients.

    Raises
    ------
    TypeError
        If something is not a dense CPU tensor, or is of another dtype.
    ValueError
        If shapes do not fit together, or a number is out of its range.
    RuntimeError
        If a gradient of the gradient, or one of forward mode, is asked for, or a transform of torch.func (grad, vjp,
        vmap ...) is on: autograd's ``backward`` and ``grad`` are what there is.
    """
    inputs = [query, key, value, attn_mask, alibi_slopes, sinks]
    for x, name in zip(inputs, _NAMES):
        if x is not None:
            _check(x, name, (torch.bool, *_FLOATS) if name == "attn_mask" else _FLOATS)
    if torch.is_autocast_enabled("cpu"):
        inputs[:4] = _cast(inputs[:4], torch.get_autocast_dtype("cpu"))
        query, key, value, attn_mask = inputs[:4]
    lead, shape = query.shape[:-3], query.shape[:-1]
    if query.ndim < 2 or not query.ndim == key.ndim == value.ndim or not lead == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(f"{_OP}: query, key and value must have as many axes, at least 2, and the same leading ones, "
                         f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    if query.ndim > 2 and query.shape[-3] != key.shape[-3] and not enable_gqa:
        raise ValueError(f"{_OP}: query has {query.shape[-3]} heads and key {key.shape[-3]}: pass enable_gqa=True "
                         "where several query heads share one of key and value")
    if attn_mask is not None and query.dtype == torch.float64 and attn_mask.dtype == torch.float32:
        inputs[3] = attn_mask.double()          # torch takes a float32 mask for any query
    inputs[:4] = _four_axes(inputs[:4], lead)
    rng = None
    if dropout_p != 0:
        rng = np.random.default_rng(torch.randint(2**62, (), dtype=torch.int64).item())
    keywords = {"is_causal": bool(is_causal), "causal_align": causal_align, "scale": scale, "window_size": window_size,
                "softcap": softcap, "kv_lengths": None if kv_lengths is None else np.asarray(kv_lengths),
                "dropout_p": dropout_p, "rng": rng}
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if recorded or any(x is not None and unpack_dual(x).tangent is not None for x in inputs):
        out, lse = _Attention.apply(*inputs, keywords)
    else:
        query, key, value, attn_mask, slopes, sinks = (_array(x, name) for x, name in zip(inputs, _NAMES))
        result = nf.scaled_dot_product_attention(query, key, value, attn_mask, alibi_slopes=slopes, sinks=sinks,
                                                 return_lse=return_lse, **keywords)
        out, lse = (_tensor(x) for x in result) if return_lse else (_tensor(result), None)
    if len(shape) != 3:
        out, lse = out.reshape(*shape, out.shape[3]), None if lse is None else lse.reshape(shape)
    return (out, lse) if return_lse else out


def _cast(inputs, dtype):
    """query, key, value and attn_mask as torch's autocast has them; a mask of float32, whose least is no number of a
    short type, stays what it is."""
    *heads, mask = (x if x is None or x.dtype in (torch.bool, torch.float64) else x.to(dtype) for x in inputs)
    return [*heads, inputs[3] if inputs[3] is not None and inputs[3].dtype == torch.float32 else mask]


def _four_axes(inputs, lead):
    """query, key, value and attn_mask as (B, H, L, E): views for up to four axes."""
    *heads, mask = inputs
    if len(lead) <= 1:
        return [*(x[(None,) * (4 - x.ndim)] for x in heads), mask]
    if mask is not None and mask.ndim > 3:
        mask = mask.expand(*lead, *mask.shape[-3:]).reshape(math.prod(lead), *mask.shape[-3:])
    return [*(x.reshape(math.prod(lead), *x.shape[-3:]) for x in heads), mask]


def attention_of_transformers(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None,
                              position_bias=None, softcap=None, s_aux=None, **kwargs):
    """What ``attn_implementation="numformer"`` calls in a model of Hugging Face's transformers.

    Parameters
    ----------
    module : torch.nn.Module
        Says by ``is_causal`` what holds where there is no mask; in a model made for "eager" alone, all is seen there.
    query, key, value : torch.Tensor, (B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev)
    attention_mask : torch.Tensor, optional
        What :func:`mask_of_transformers` gave, or a tensor, boolean or added: then it is all that is to be masked,
        window and causality included.
    dropout, scaling : float
    is_causal : bool, optional
        Instead of the module's.
    position_bias : torch.Tensor, optional
        Added to the scores.
    softcap : float, optional
    s_aux : torch.Tensor (H,), optional
        Attention sinks.

    Returns
    -------
    out : torch.Tensor, (B, L, H, Ev)
    weights : None

    Raises
    ------
    ValueError
        If the weights are asked for (``output_attentions``): they are never held. If a causal model gives one row of
        a mask for several queries, and not as it was made. If the model's attention is sparse by chosen keys or blocks
        of them (DeepSeek V3.2, MiniMax M3), or has sinks that differ from query to query (Inkling 2).
    """
    if kwargs.get("output_attentions"):
        raise ValueError('attn_implementation="numformer" holds no attention weights, so output_attentions=True needs '
                         '"eager"')
    for name in ("indices", "block_indices", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="numformer" cannot do the attention of {type(module).__name__}, '
                             f'which is given {name}: use "eager"')
    # A layer that does not say so is causal where there is no mask; one that it has made itself is all there is.
    own = is_causal is None and not hasattr(module, "is_causal") and attention_mask is not None and (
        attention_mask.dtype != torch.bool)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and not _habits(type(getattr(module, "config", None)))[1]
    # One query is the last; and where the first of several meet more keys, the rest of a static cache is empty.
    rules = _rules_of(attention_mask)
    if rules is not None:
        rules = _placed(*rules, query.shape[2], key.shape[2], len(query))
    elif attention_mask is not None and is_causal and not own and attention_mask.ndim == 4 and (
            attention_mask.shape[2] < query.shape[2]):
        raise ValueError(f"{_OP}: a mask of shape {tuple(attention_mask.shape)} for {query.shape[2]} queries of a "
                         "causal model does not say what each of them sees: hand on the mask that the model was given "
                         "as it is, or make one of all queries")
    else:
        rules = {"is_causal": bool(is_causal) and attention_mask is None and query.shape[2] > 1}
    if position_bias is not None:
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, position_bias, -torch.inf)
        else:
            attention_mask = position_bias if attention_mask is None else position_bias + attention_mask
    out = scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True,
                                       softcap=softcap or 0.0, sinks=s_aux, **rules)
    return out.transpose(1, 2).contiguous(), None


def _placed(causal, window, offset, queries, keys, batch):
    """The keywords for queries of which the first stands at key `offset`."""
    rules = {"is_causal": causal, "window_size": window, "causal_align": "bottom_right"}
    if offset == 0:
        rules["causal_align"] = "top_left"
    elif offset != keys - queries:          # the rest of a static cache is empty
        rules["kv_lengths"] = [offset + queries] * batch
    return rules


def mask_of_transformers(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None,
                         attention_mask=None, **kwargs):
    """The mask of ``attn_implementation="numformer"``: one row a sequence, and what each query sees in a word.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset : int
        The queries stand at positions from `q_offset` on, the keys from `kv_offset` on.
    mask_function : callable
        Which of transformers' rules holds: causal, causal within a window, or both ways. Others, such as those of
        packed sequences, chunks or a user, get the mask (B, 1, q_length, kv_length) that "sdpa" has.
    attention_mask : torch.Tensor, (B, positions), boolean, optional
        False is padding, on either side.

    Returns
    -------
    torch.Tensor, (B, 1, 1, kv_length), boolean, with the rule as an attribute; or None where nothing but causality
    from the first key on holds. O(kv_length), not O(q_length kv_length), but for models that go by the elements of
    their masks: those that ask transformers for one in any case (Doge, T5Gemma 2) get that of "sdpa", and those made
    for "eager" alone (Pegasus-X, Splinter) get its.

    Raises
    ------
    ValueError
        If the model computes its attention itself, whatever is asked for, and would misread this mask.
    """
    from transformers import masking_utils

    config = type(kwargs.get("config"))
    itself, eager = _habits(config)
    if itself:
        raise ValueError(f'a model of {config.__name__} computes its attention itself, so '
                         'attn_implementation="numformer" cannot do it: use "eager"')
    sizes = batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask
    if eager:
        return masking_utils.eager_mask(*sizes, **kwargs)
    tracing = torch.compiler.is_compiling()         # a tensor's attributes would be lost
    rule = None if tracing else _rule(mask_function, masking_utils)
    if rule is None or kwargs.get("use_vmap"):
        return masking_utils.sdpa_mask(*sizes, **kwargs)
    causal, window = rule
    offset = int(q_offset) - int(kv_offset)
    rules = causal, window, offset if causal or window != (-1, -1) else kv_length - q_length
    if not kwargs.get("allow_is_causal_skip" if causal else "allow_is_bidirectional_skip", True):
        mask = masking_utils.sdpa_mask(*sizes, **kwargs)
        if q_length == 1:           # also of each step with a static cache, the rest of which need not be read
            mask.numformer_rules = rules
        return mask
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset:kv_offset + kv_length]
    plain = window == (-1, -1) and (not causal or (offset == kv_length - q_length and (offset == 0 or q_length == 1)))
    if plain and (padding is None or bool(padding.all())):
        return None
    if padding is None:
        padding = torch.ones((batch_size, kv_length), dtype=torch.bool)
    # In memory of its own, on which the rule hangs too, since reentrant checkpoints detach what they are given; and
    # contiguous, since generate() copies what is not.
    mask = padding[:, None, None, :].clone(memory_format=torch.contiguous_format)
    mask.numformer_rules = mask.untyped_storage().numformer_rules = rules
    return mask


def _rules_of(mask):
    """The rules of a mask that was made here, detached or not; None of another, or a part of one."""
    rules = getattr(mask, "numformer_rules", None)
    if rules is None and mask is not None and not torch.compiler.is_compiling():
        memory = mask.untyped_storage()
        rules = getattr(memory, "numformer_rules", None) if mask.numel() == memory.nbytes() else None
    return rules


@functools.cache
def _habits(config):
    """Whether the models of this class of configs never ask for an implementation of attention; and whether they are
    made for the masks of "eager" alone, which they may change, and which alone make them causal.
    """
    from transformers import PreTrainedModel

    def below(model):
        return [m for x in model.__subclasses__() for m in (x, *below(x))]

    models = [m for m in below(PreTrainedModel) if m.config_class is config]
    asks = [m._supports_sdpa or hasattr(sys.modules[m.__module__], "ALL_ATTENTION_FUNCTIONS") for m in models]
    others = [m._supports_sdpa or (m._supports_attention_backend and m._supports_flash_attn) for m in models]
    return bool(models) and not any(asks), bool(models) and not any(others)


def _rule(function, masking_utils):
    """(causal, window) of one of transformers' functions of (batch, head, query, key); None where it is another."""
    simple = {masking_utils.causal_mask_function: (True, (-1, -1)),
              masking_utils.bidirectional_mask_function: (False, (-1, -1))}
    if function in simple:
        return simple[function]
    parts = inspect.getclosurevars(function).nonlocals.get("mask_functions", ())
    if len(parts) == 2 and parts[1] is masking_utils.causal_mask_function and (
            parts[0].__qualname__.startswith("sliding_window_overlay.")):
        return True, (inspect.getclosurevars(parts[0]).nonlocals["sliding_window"] - 1, -1)
    return None


def _register():
    """Tell transformers, if there is one that asks, how attention and its masks are made here."""
    with contextlib.suppress(ImportError):
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register("numformer", attention_of_transformers)
        AttentionMaskInterface.register("numformer", mask_of_transformers)


_register()
