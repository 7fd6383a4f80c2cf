"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""
from numpy import ndarray

from numformer import _core
from numformer.ops.arguments import as_array, as_gradient, as_integer, check_apart
from numformer.tensor import Tensor, apply

__all__ = ["rotary_embedding", "rotary_embedding_backward", "rotary_embedding_forward"]


def rotary_embedding_forward(x, cos, sin, interleaved=False, rotary_dim=None, out=None):
    """Return ``(y, saved)``; `saved` is what :func:`rotary_embedding_backward` needs."""
    if type(x) is not ndarray:
        x = as_array(x, "rotary_embedding", "x")
    if type(cos) is not ndarray or type(sin) is not ndarray:
        cos, sin = as_array(cos, "rotary_embedding", "cos"), as_array(sin, "rotary_embedding", "sin")
    if x.ndim and cos.ndim and sin.ndim:
        rotary_dim = x.shape[-1] if rotary_dim is None else as_integer(rotary_dim, "rotary_embedding", "rotary_dim")
        if rotary_dim and cos.shape[-1] == rotary_dim:
            cos = cos[..., ::2] if interleaved else cos[..., : rotary_dim // 2]
        if rotary_dim and sin.shape[-1] == rotary_dim:
            sin = sin[..., ::2] if interleaved else sin[..., : rotary_dim // 2]
    y = _core.rotary(x, cos, sin, rotary_dim or 0, interleaved, False, out)
    return y, (x.shape, cos, sin, rotary_dim, interleaved)


def rotary_embedding_backward(dy, saved):
    """Return the gradients of `x` and, None, of `cos` and `sin`."""
    shape, cos, sin, rotary_dim, interleaved = saved
    dy = as_gradient(dy, shape, cos.dtype, "rotary_embedding_backward")
    return _core.rotary(dy, cos, sin, rotary_dim or 0, interleaved, True, None), None, None


def rotary_embedding(x, cos, sin, *, interleaved=False, rotary_dim=None, out=None):
    """Turn pairs of elements by the angle of their position.

    Parameters
    ----------
    x : array_like or Tensor, float32 or float64, shape (B, H, S, D), (H, S, D) or (S, D)
        Any strides (a view of fused queries, keys and values is read in place); only a last axis that is not
        contiguous is copied.
    cos, sin : array_like of the dtype of `x`, shape (S, rotary_dim / 2)
        Or (S, rotary_dim) with every angle twice, as Hugging Face gives them (in halves, or in pairs where
        `interleaved`): the second of the two is not looked at. May have leading axes that broadcast against those of
        `x`, e.g. (B, 1, S, rotary_dim / 2). They are constants: no gradient.
    interleaved : bool
        Pairs are ``(x[2i], x[2i+1])`` (GPT-J), not ``(x[i], x[i + rotary_dim/2])`` (GPT-NeoX, Llama).
    rotary_dim : int, optional
        Turn only this many first elements of D (even); the others are copied. Default: D.
    out : ndarray, optional
        Where to write the result: `x` itself (unless it is a Tensor), or an array that is C-contiguous and shares no
        memory with the others.

    Returns
    -------
    ndarray, or Tensor where `x` is one, C-contiguous, of the shape and dtype of `x`

    Raises
    ------
    TypeError
        If the dtypes are not all float32 or all float64.
    ValueError
        If the shapes do not fit, `rotary_dim` is odd or above D, or `out` is not as above.
    """
    if out is not None and type(x) is Tensor:
        check_apart(out, x.data, "rotary_embedding")
    return apply(rotary_embedding_forward, rotary_embedding_backward, x, cos, sin, interleaved=interleaved,
                 rotary_dim=rotary_dim, out=out)
