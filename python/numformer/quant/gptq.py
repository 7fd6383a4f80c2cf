"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): each column's rounding error is made good by the columns to come."""
import numpy as np

from numformer.ops.arguments import as_integer, as_number
from numformer.quant.report import as_activations, report_on
from numformer.quant.weight import Grid, QuantizedWeight, as_spec, as_weight, groups_of

__all__ = ["gptq"]


def gptq(weight, activations, spec, *, damp=0.01, block_size=128, act_order=True, static_groups=None, held_out=None):
    """Quantize so that the layer's output on `activations` changes least.

    With H = 2/n X^T X and U the upper Cholesky factor of H^-1, columns are rounded one after the other and

        e = (w_i - q_i) / U_ii,    w_j -= e U_ij for all j > i

    Parameters
    ----------
    weight : (N, K) array_like, float32 or float64
    activations : (rows, K) array_like
        What reaches the layer: some hundred rows at least.
    spec : QuantSpec
    damp : float
        Added to the diagonal of H, as a share of its mean; ten times more, and again, until H has a Cholesky factor
        (the report says what it was).
    block_size : int
        Columns whose updates reach the rest of the matrix together. Changes rounding errors and speed alone.
    act_order : bool
        Columns in the order of falling diagonal of H: the most important first, while all others can still make good.
    static_groups : bool, optional
        Whether the grids are those of the weight as it came, and not as it is when the group's turn comes. Needed,
        and the default, with `act_order`: so a group stays a run of columns and inference needs no index of groups.
    held_out : (rows, K) array_like, optional
        Activations for the output error of the report; without them it is that on `activations`, and the report says
        so.

    Returns
    -------
    (QuantizedWeight, Report)

    Raises
    ------
    TypeError
        If a dtype is wrong, `spec` is no QuantSpec, or an option no number.
    ValueError
        If shapes disagree, something is NaN or infinite, or an option is out of its range.
    """
    w, spec = as_weight(weight, "gptq"), as_spec(spec, "gptq")
    k = w.shape[1]
    x = as_activations(activations, k, "gptq", "activations")
    test = x if held_out is None else as_activations(held_out, k, "gptq", "held_out")
    if static_groups is None:
        static_groups = act_order
    if not as_number(damp, "gptq", "damp") >= 0 or damp == float("inf"):
        raise ValueError(f"gptq: damp must be 0 or more, got {damp}")
    if as_integer(block_size, "gptq", "block_size") < 1:
        raise ValueError(f"gptq: block_size must be 1 or more, got {block_size}")
    if act_order and not static_groups:
        raise ValueError("gptq: act_order needs static_groups: a group's columns do not come one after the other")
    hessian = x.T @ x * (2 / len(x))
    diagonal = np.diagonal(hessian)
    dead = diagonal == 0
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(k)
    hessian[dead, dead] = 1
    factor, damp = _inverse_factor(hessian[np.ix_(order, order)], damp)
    start = w.astype(np.float64)
    start[:, dead] = 0
    quantized = _round_columns(start, factor, order, spec, block_size, static_groups)
    return quantized, report_on("gptq", w, quantized, test, "calibration" if held_out is None else "held-out",
                                damp=damp, dead_columns=int(dead.sum()))


def _inverse_factor(hessian, damp):
    """The upper Cholesky factor of (H + damp mean(diag H))^-1, and the damp it took."""
    mean = np.mean(np.diagonal(hessian))
    identity = np.eye(len(hessian))
    for _ in range(40):
        try:
            lower = np.linalg.cholesky(hessian + damp * mean * identity)
            half = np.linalg.solve(lower, identity)
            return np.linalg.cholesky(half.T @ half).T, damp
        except np.linalg.LinAlgError:
            damp = 10 * damp if damp > 0 else 1e-10
    raise ValueError("gptq: the activations' second moments have no Cholesky factor; are they very large?")


def _round_columns(w, factor, order, spec, block_size, static_groups):
    """`w` (N, K) in its own order of columns, `factor` in `order`; `w` is used up."""
    n, k = w.shape
    size = min(spec.group_size or k, k)
    groups = groups_of(k, spec.group_size)
    scales = np.empty((n, groups), spec.scale_dtype)
    zeros = None if spec.symmetric else np.empty((n, groups), np.uint8)
    integers = np.empty((n, k), np.int16)

    def fix(group, columns):
        grid = Grid(columns[:, None], spec)
        scales[:, group] = grid.scales[:, 0]
        if zeros is not None:
            zeros[:, group] = grid.zeros[:, 0]
        return grid

    grids = [fix(g, w[:, g * size:(g + 1) * size]) for g in range(groups)] if static_groups else [None] * groups
    w = w[:, order]
    for begin in range(0, k, block_size):
        end = min(begin + block_size, k)
        errors = np.empty((n, end - begin))
        for i in range(begin, end):
            group = order[i] // size
            if grids[group] is None:        # its first column: what the earlier blocks owe it, it has by now
                last = min((group + 1) * size, k)
                columns = w[:, i:last].copy()
                columns[:, max(end - i, 0):] -= errors[:, :i - begin] @ factor[begin:i, end:last]
                grids[group] = fix(group, columns)
            column = w[:, i:i + 1]
            integer = grids[group].integers(column, 0)
            integers[:, order[i]] = integer[:, 0]
            errors[:, i - begin] = ((column - grids[group].values(integer, 0)) / factor[i, i])[:, 0]
            w[:, i + 1:end] -= errors[:, i - begin, None] * factor[i, i + 1:end]
        w[:, end:] -= errors @ factor[begin:end, end:]
    return QuantizedWeight.from_integers(spec, integers, scales, zeros)
