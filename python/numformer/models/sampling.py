"""Choose the next token from logits, in the order of Hugging Face's samplers: temperature, top-k, top-p, min-p."""
import numpy as np

from numformer import _core
from numformer.ops.arguments import as_integer, as_number

__all__ = ["check_options", "sample"]


def check_options(temperature, top_k, top_p, min_p):
    """ValueError for a value out of range, TypeError for what is no number."""
    if not as_number(temperature, "generate", "temperature") >= 0:
        raise ValueError(f"generate: temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and as_integer(top_k, "generate", "top_k") < 1:
        raise ValueError(f"generate: top_k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < as_number(top_p, "generate", "top_p") <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if min_p is not None and not 0 <= as_number(min_p, "generate", "min_p") <= 1:
        raise ValueError(f"generate: min_p must be in [0, 1], got {min_p}")


def sample(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None, rng=None):
    """One token for each row of `logits` (B, V), as int64 (B,).

    temperature 0 takes the largest, the first of equals. top_k keeps the k largest; top_p the fewest of the rest that
    hold that much probability (and always one); min_p those with at least min_p times the largest probability.
    `rng` gives one number a row, whatever the options. ValueError where a logit is NaN.
    """
    if temperature == 0:
        column = logits.argmax(-1)          # of the first NaN, if there is one
        _refuse_nan(np.take_along_axis(logits, column[:, None], -1)[:, 0])
        return column
    x = logits
    if temperature < 1e-20:                 # the quotients could overflow: the largest becomes 0 first
        x = x - x.max(-1, keepdims=True)
        temperature = max(temperature, float(np.finfo(x.dtype).tiny))
    if temperature != 1:
        with np.errstate(over="ignore"):
            x = x / x.dtype.type(temperature)
    tokens = None               # the vocabulary entry of each column, where they were sorted
    if top_k is not None and top_k < x.shape[-1]:
        tokens = np.argpartition(x, -top_k, axis=-1)[:, -top_k:]
        x = np.take_along_axis(x, tokens, -1)
    if tokens is not None or top_p is not None:
        order = np.argsort(-x, axis=-1, kind="stable")
        x = np.take_along_axis(x, order, -1)
        tokens = order if tokens is None else np.take_along_axis(tokens, order, -1)
    p = _core.softmax(x)
    _refuse_nan(p[:, 0])                  # a NaN makes its whole row NaN
    if top_p is not None and top_p < 1:
        before = np.cumsum(p, -1, dtype=np.float64) - p
        p = np.where(before < top_p * p.sum(-1, keepdims=True, dtype=np.float64), p, 0)
    if min_p is not None:
        p = np.where(p >= min_p * p.max(-1, keepdims=True), p, 0)
    column = _core.categorical(p, rng.random(len(p)))
    return column if tokens is None else np.take_along_axis(tokens, column[:, None], -1)[:, 0]


def _refuse_nan(values):
    if np.isnan(values).any():
        raise ValueError(f"generate: logits of row {np.isnan(values).argmax()} are NaN: the model's weights are not "
                         "finite, or grew so large that its sums are not")
