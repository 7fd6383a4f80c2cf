"""Mixture of experts: routing, the sort by expert and its inverse, and the auxiliary losses.

Sources: Shazeer et al. 2017 (arXiv:1701.06538), GShard (2006.16668), Switch (2101.03961), ST-MoE (2202.08906),
expert choice (2202.09368), DeepSeek-V3 (2412.19437).

A token t has top_k slots. The slots that are not dropped, sorted by expert and then by (t, slot), are the rows of
:func:`dispatch`. A slot is dropped where its token is padding or its expert is full.
"""
import numpy as np

from numformer import _core
from numformer.ops.arguments import as_array, as_bool, as_floats, as_gradient, as_integer, as_number, choose, same_dtype
from numformer.tensor import Tensor, apply

__all__ = ["Routing", "combine", "combine_backward", "combine_forward", "dispatch", "dispatch_backward",
           "dispatch_forward", "load_balancing_loss", "load_balancing_loss_backward", "load_balancing_loss_forward",
           "mlp", "mlp_backward", "mlp_forward", "route", "route_backward", "route_expert_choice",
           "route_expert_choice_backward", "route_expert_choice_forward", "route_forward", "router_z_loss",
           "router_z_loss_backward", "router_z_loss_forward"]


class Routing:
    """Which token goes to which expert, in what order, and with what weight.

    T tokens, E experts, k slots a token. ``weight`` and ``probabilities`` are Tensors where the logits were;
    everything else is an int64 ndarray, not to be changed.

    Attributes
    ----------
    expert_index : (T, k)
        Expert of each slot, best first; -1 for a padding token.
    weight : (T, k)
        What the expert's output is multiplied by; 0 for a padding token.
    probabilities : (T, E)
        Softmax or sigmoid of the logits; 0 for a padding token.
    counts : (E,)
        Rows of each expert.
    offsets : (E + 1,)
        Rows of expert e are ``offsets[e]:offsets[e + 1]``.
    source : (rows,)
        Token of each row.
    row : (T, k)
        Row of each slot, -1 where it was dropped.
    chosen : (E,)
        How often each expert was chosen, before capacity: the auxiliary loss counts these.
    tokens : int
        Tokens that are not padding.
    score : str
        As given to :func:`route`.
    """

    __slots__ = ("expert_index", "weight", "probabilities", "counts", "offsets", "source", "row", "chosen", "tokens",
                 "score", "order")

    def __init__(self, weight, probabilities, expert_index, order, tokens, score):
        self.weight = weight
        self.probabilities = probabilities
        self.expert_index = expert_index
        self.chosen, self.counts, self.offsets, self.source, self.row = order
        self.order = order[2:]          # what the kernels take
        self.tokens = tokens
        self.score = score

    def __repr__(self):
        tokens, k = self.row.shape
        return f"Routing({tokens} tokens, top {k} of {len(self.counts)} experts, {len(self.source)} rows)"


def check_routing(routing, op):
    if type(routing) is not Routing:
        raise TypeError(f"{op}: routing must be a Routing, as route gives it, got {type(routing).__name__}")


def _values(x):
    """Those of an array or a Tensor."""
    return x.data if type(x) is Tensor else x


def _token_mask(token_mask, op):
    if token_mask is None:
        return None
    mask = as_array(token_mask, op, "token_mask")
    if mask.dtype != np.bool_:
        raise TypeError(f"{op}: token_mask must be bool, True for a token and False for padding, got {mask.dtype}")
    return mask


def _check_mask(mask, tokens, op):
    if mask is not None and mask.shape != (tokens,):
        raise ValueError(f"{op}: token_mask must have shape ({tokens},), got {mask.shape}")


def route_forward(logits, top_k, *, score="softmax", normalize=True, bias=None, num_groups=1, top_groups=1, scale=1.0,
                  capacity=None, token_mask=None, parts=None):
    """Return ``((weight, probabilities), saved)``. `parts`, a list, is given expert_index and the sorted order."""
    sigmoid = choose({"softmax": False, "sigmoid": True}, score, "route", "score")
    logits = as_floats(logits, "route", "logits")
    token_mask = _token_mask(token_mask, "route")
    options = (as_integer(top_k, "route", "top_k"), as_integer(num_groups, "route", "num_groups"),
               as_integer(top_groups, "route", "top_groups"), sigmoid,
               as_bool(normalize, "route", "normalize"),
               as_number(scale, "route", "scale"))
    if capacity is not None:
        capacity = as_integer(capacity, "route", "capacity")
    if bias is not None:
        bias = as_floats(bias, "route", "bias")
    weight, probabilities, expert_index, order = _core.moe_route(logits, *options, bias, token_mask, capacity)
    if parts is not None:
        parts += expert_index, order
    return (weight, probabilities), (probabilities, expert_index, options)


def route_backward(dy, saved):
    """Return the gradient with respect to the logits, in a tuple; `dy` is (dweight, dprobabilities) or Nones."""
    probabilities, expert_index, options = saved
    return (_core.moe_route_backward(probabilities, *options, expert_index, *dy),)


def route(logits, top_k, *, score="softmax", normalize=True, bias=None, num_groups=1, top_groups=1, scale=1.0,
          capacity=None, token_mask=None):
    """Choose `top_k` experts for every token and sort the tokens by expert.

    Parameters
    ----------
    logits : (T, E) array_like or Tensor, float32 or float64
        Router logits. Keep them in float32 whatever the model's dtype. With softmax a NaN or +inf makes the weights
        of its own token NaN, and nothing else. With sigmoid +inf is a score of 1, and an expert of NaN is chosen last,
        where it makes them NaN too. -inf takes an expert out, whatever its bias, and a token without experts has the
        weights 0.
    top_k : int
    score : {"softmax", "sigmoid"}
        Softmax over the experts, or a sigmoid of each logit (DeepSeek-V3).
    normalize : bool
        Divide the weights of a token by their sum (Mixtral; off in Switch and OLMoE).
    bias : (E,) array_like, optional
        Added to the scores for the choice, not for the weights: balance without a loss. No gradient.
    num_groups, top_groups : int
        Experts are cut into `num_groups` equal groups, of which the `top_groups` best are considered. A group is as
        good as its best expert (softmax, DeepSeek-V2) or its best two together (sigmoid, V3).
    scale : float
        The weights are multiplied by it.
    capacity : int, optional
        Rows that an expert takes at most, e.g. GShard's ``ceil(T * k / E * factor)``. First choices of all tokens
        come before second choices, earlier tokens before later; what is left is dropped: it adds nothing to the
        output, and the other weights stay. None drops nothing.
    token_mask : (T,) array_like of bool, optional
        False marks padding, which is dropped before capacity and counts in no loss.

    Returns
    -------
    Routing
        Ties go to the expert of the lowest number. Gradients reach the logits through ``weight`` and
        ``probabilities``.

    Raises
    ------
    ValueError
        For a shape that does not fit or a number out of range.
    TypeError
        If `logits` is not float32 or float64, or `token_mask` not bool.
    """
    parts = []
    mask = _token_mask(token_mask, "route")
    weight, probabilities = apply(route_forward, route_backward, logits, top_k=top_k, score=score, normalize=normalize,
                                  bias=bias, num_groups=num_groups, top_groups=top_groups, scale=scale,
                                  capacity=capacity, token_mask=mask, parts=parts)
    tokens = len(weight) if mask is None else int(np.count_nonzero(mask))
    return Routing(weight, probabilities, *parts, tokens, score)


def route_expert_choice_forward(logits, capacity, *, token_mask=None, parts=None):
    """Return ``((weight, probabilities), saved)``."""
    op = "route_expert_choice"
    logits = as_floats(logits, op, "logits")
    if logits.ndim != 2:
        raise ValueError(f"{op}: logits must have 2 dimensions, got shape {logits.shape}")
    capacity = as_integer(capacity, op, "capacity")
    if capacity < 0:
        raise ValueError(f"{op}: capacity must be 0 or more, got {capacity}")
    tokens, experts = logits.shape
    options = (experts, 1, 1, False, False, 1.0)
    if experts == 0:
        raise ValueError(f"{op}: logits must have at least one expert, got shape {logits.shape}")
    token_mask = _token_mask(token_mask, op)
    _check_mask(token_mask, tokens, op)
    _, probabilities, _, _ = _core.moe_route(logits, *options, None, token_mask, None)
    wish = np.nan_to_num(probabilities, nan=-1)
    if token_mask is not None:
        wish[~token_mask] = -2
        capacity = min(capacity, int(np.count_nonzero(token_mask)))
    taken = np.argsort(-wish, axis=0, kind="stable")[:capacity]
    expert_index = np.full((tokens, experts), -1, np.int64)
    np.put_along_axis(expert_index, taken, np.broadcast_to(np.arange(experts), taken.shape), axis=0)
    weight = np.where(expert_index >= 0, probabilities, probabilities.dtype.type(0))
    if parts is not None:
        parts += expert_index, _core.moe_sort(expert_index, experts, -1)
    return (weight, probabilities), (probabilities, expert_index, options)


def route_expert_choice_backward(dy, saved):
    """Return the gradient with respect to the logits, in a tuple."""
    probabilities, expert_index, options = saved
    dweight, dprobabilities = dy
    total = np.zeros_like(probabilities) if dprobabilities is None else dprobabilities
    if dweight is not None:
        total = total + np.where(expert_index >= 0, dweight, 0)
    total = np.asarray(total, probabilities.dtype)
    return (_core.moe_route_backward(probabilities, *options, expert_index, None, total),)


def route_expert_choice(logits, capacity, *, token_mask=None):
    """Let every expert choose its `capacity` best tokens (Zhou et al. 2022, arXiv:2202.09368).

    A token may get no expert, or all: k is E, and slot e of a token is expert e, or -1.

    Parameters
    ----------
    logits : (T, E) array_like or Tensor, float32 or float64
    capacity : int
        Tokens an expert takes, e.g. ``T * factor // E``; at most all are taken.
    token_mask : (T,) array_like of bool, optional
        False marks padding, which is never taken.

    Returns
    -------
    Routing
        Ties go to the earliest token, and a token with a logit of NaN or +inf comes last. The weights are the
        probabilities, not normalized.

    Raises
    ------
    ValueError
        If `logits` has not two axes and an expert, or `capacity` is below 0.
    TypeError
        If `logits` is not float32 or float64, or `token_mask` not bool.
    """
    parts = []
    mask = _token_mask(token_mask, "route_expert_choice")
    weight, probabilities = apply(route_expert_choice_forward, route_expert_choice_backward, logits, capacity=capacity,
                                  token_mask=mask, parts=parts)
    tokens = len(weight) if mask is None else int(np.count_nonzero(mask))
    return Routing(weight, probabilities, *parts, tokens, "softmax")


def dispatch_forward(x, routing):
    """Return ``(rows, saved)``."""
    return _core.moe_dispatch(as_floats(x, "dispatch", "x"), routing.order), routing.order


def dispatch_backward(dy, saved):
    """Return the gradient with respect to `x`, in a tuple."""
    return (_core.moe_dispatch_backward(dy, saved),)


def dispatch(x, routing):
    """Copy every token's row once for each of its slots, sorted by expert.

    Parameters
    ----------
    x : (T, d) array_like or Tensor, float32 or float64
    routing : Routing

    Returns
    -------
    (rows, d) ndarray, or Tensor where `x` is one
        Rows ``routing.offsets[e]:routing.offsets[e + 1]`` are for expert e.

    Raises
    ------
    TypeError
        If `x` is not float32 or float64, or `routing` no Routing.
    ValueError
        If `x` has not the tokens of `routing`.
    """
    check_routing(routing, "dispatch")
    return apply(dispatch_forward, dispatch_backward, x, routing=routing)


def combine_forward(y, routing, weight=None):
    """Return ``(sums, saved)``; `weight` stands for ``routing.weight``."""
    check_routing(routing, "combine")
    y = as_floats(y, "combine", "y")
    weight = _values(routing.weight) if weight is None else weight
    same_dtype("combine", y=y, weight=weight)
    return _core.moe_combine(y, weight, routing.order), (y, weight, routing.order)


def combine_backward(dy, saved):
    """Return the gradients with respect to `y`, None, and that with respect to the weights."""
    dy, dweight = _core.moe_combine_backward(dy, *saved)
    return dy, None, dweight


def combine(y, routing):
    """Sum each token's rows, multiplied by their weights, in the order of the slots.

    A sum of its own for every token: no order of threads can change its bits. A token whose slots were all
    dropped gets zeros.

    Parameters
    ----------
    y : (rows, d) array_like or Tensor, float32 or float64
        Sorted by expert, as :func:`dispatch` gives them.
    routing : Routing

    Returns
    -------
    (T, d) ndarray, or Tensor where `y` or ``routing.weight`` is one

    Raises
    ------
    TypeError
        If `y` is not float32 or float64, or of another dtype than ``routing.weight``, or `routing` no Routing.
    ValueError
        If `y` has not the rows of `routing`.
    """
    check_routing(routing, "combine")
    return apply(combine_forward, combine_backward, y, routing, routing.weight)


def mlp_forward(x, routing, gate_up, down, weight=None, *, activation="swiglu"):
    """Return ``(y, saved)``; `weight` stands for ``routing.weight``."""
    check_routing(routing, "mlp")
    if activation != "swiglu":
        raise ValueError(f'mlp: activation must be "swiglu", got {activation!r}')
    x, gate_up, down = as_floats(x, "mlp", "x"), as_floats(gate_up, "mlp", "gate_up"), as_floats(down, "mlp", "down")
    weight = _values(routing.weight) if weight is None else weight
    same_dtype("mlp", x=x, weight=weight, gate_up=gate_up, down=down)
    experts = len(routing.counts)
    if x.ndim != 2 or len(x) != len(routing.row):
        raise ValueError(f"mlp: x must have shape ({len(routing.row)}, d), as the routing has so many tokens, "
                         f"got {x.shape}")
    if gate_up.ndim != 3 or len(gate_up) != experts or gate_up.shape[1] % 2 or gate_up.shape[2:] != x.shape[1:]:
        raise ValueError(f"mlp: gate_up must have shape ({experts}, 2 * I, {x.shape[-1]}), got {gate_up.shape}")
    inner = gate_up.shape[1] // 2
    if down.shape[::2] != (experts, inner):
        raise ValueError(f"mlp: down must have shape ({experts}, d, {inner}), got {down.shape}")
    rows = _core.moe_dispatch(x, routing.order)
    hidden = _core.grouped_linear(rows, gate_up, routing.offsets, None, False)
    y = _core.grouped_linear(_core.gated_halves(0, hidden), down, routing.offsets, None, False)
    return _core.moe_combine(y, weight, routing.order), (x, weight, gate_up, down, hidden, routing)


def mlp_backward(dy, saved):
    """Return the gradients with respect to x, None, those to gate_up, down and the weights.

    With a = silu(gate) * up, y = sum_j w_j down a_j and da = down^T dy of each row: dw = da . a, ddown = dy (w a)^T,
    and w da goes on through the gate. So of the inside only the pre-activation is needed (SonicMoE, arXiv:2512.14080).
    """
    x, weight, gate_up, down, hidden, routing = saved
    order, offsets = routing.order, routing.offsets
    dy = _core.moe_dispatch(as_gradient(dy, x.shape, x.dtype, "mlp_backward"), order)
    dacted = _core.grouped_linear(dy, down, offsets, None, True)
    acted, dhidden, dweight = _core.moe_swiglu_backward(hidden, dacted, weight, order)
    ddown = _core.grouped_outer(dy, acted, offsets)
    dgate_up = _core.grouped_outer(dhidden, _core.moe_dispatch(x, order), offsets)
    drows = _core.grouped_linear(dhidden, gate_up, offsets, None, True)
    return _core.moe_dispatch_backward(drows, order), None, dgate_up, ddown, dweight


def mlp(x, routing, gate_up, down, *, activation="swiglu"):
    """Every token through its experts: y_t = sum_j w_tj down_e (silu(gate_e x_t) * (up_e x_t)), e of slot j.

    Parameters
    ----------
    x : (T, d) array_like or Tensor, float32 or float64
    routing : Routing
        Of the same dtype.
    gate_up : (E, 2 * I, d) array_like or Tensor
        Both first matrices of each expert, gate first, as Hugging Face keeps them (``experts.gate_up_proj``).
    down : (E, d, I) array_like or Tensor
    activation : {"swiglu"}

    Returns
    -------
    (T, d) ndarray, or Tensor where an operand is one
        A token's bits do not depend on the other tokens. Dropped slots add nothing.

    Raises
    ------
    TypeError
        If an array is not float32 or float64, or the dtypes differ, or `routing` is no Routing.
    ValueError
        If a shape does not fit, or the activation is another.
    """
    check_routing(routing, "mlp")
    return apply(mlp_forward, mlp_backward, x, routing, gate_up, down, routing.weight, activation=activation)


def load_balancing_loss_forward(routing, probabilities=None, *, form="switch", token_mask=None):
    """Return ``(loss, saved)``; `probabilities` stand for ``routing.probabilities``."""
    check_routing(routing, "load_balancing_loss")
    probabilities = _values(routing.probabilities) if probabilities is None else probabilities
    experts, top_k, tokens, chosen = probabilities.shape[1], routing.row.shape[1], routing.tokens, routing.chosen
    mask = _token_mask(token_mask, "load_balancing_loss")
    if mask is not None:
        _check_mask(mask, len(probabilities), "load_balancing_loss")
        index = routing.expert_index[mask]
        probabilities, mask = np.where(mask[:, None], probabilities, probabilities.dtype.type(0)), mask[:, None]
        tokens = np.count_nonzero(probabilities.any(1))
        chosen = np.bincount(index[index >= 0], minlength=experts)
    divide = choose({"switch": tokens * top_k, "mixtral": tokens}, form, "load_balancing_loss", "form")
    if tokens == 0:
        return np.zeros((), probabilities.dtype), (probabilities, np.zeros(experts, probabilities.dtype), None, mask)
    # E f_i / T: the loss is the sum over tokens of coefficient . probabilities.
    coefficient = (chosen * (experts / (divide * tokens))).astype(probabilities.dtype)
    sums = None
    if routing.score == "sigmoid":
        sums = probabilities.sum(1, keepdims=True)
        sums[sums == 0] = 1             # padding
        mean = (probabilities / sums).sum(0)
    else:
        mean = probabilities.sum(0)
    return np.asarray(mean @ coefficient), (probabilities, coefficient, sums, mask)


def load_balancing_loss_backward(dy, saved):
    """Return None and the gradient with respect to the probabilities."""
    probabilities, coefficient, sums, mask = saved
    coefficient = coefficient * dy
    if sums is None:
        gradient = np.broadcast_to(coefficient, probabilities.shape)
    else:
        weighted = (probabilities * coefficient).sum(1, keepdims=True)
        gradient = (coefficient - weighted / sums) / sums
    return None, gradient if mask is None else np.where(mask, gradient, gradient.dtype.type(0))


def load_balancing_loss(routing, *, form="switch", token_mask=None):
    """The auxiliary loss that is least where every expert gets an equal share.

        E * sum_i f_i P_i        P_i: mean probability of expert i over the tokens that are not padding

    Parameters
    ----------
    routing : Routing
        What was chosen, before capacity. With sigmoid scores a token's are divided by their sum first (DeepSeek-V3).
    form : {"switch", "mixtral"}
        "switch": f_i is expert i's share of all choices (Switch, GShard), and the loss 1 at balance. "mixtral":
        choices of expert i per token, as in Hugging Face's Mixtral: top_k times that. (There all layers count as one
        batch: the mean of the layers' losses is the same where their loads are.)
    token_mask : (T,) array_like of bool, optional
        False marks padding, which does not count: more of it than the routing knows of.

    Returns
    -------
    0-d ndarray, or Tensor where the routing's probabilities are one
        The gradient goes through the probabilities, f is constant.

    Raises
    ------
    TypeError
        If `routing` is no Routing: it wants more than the router's logits; or `token_mask` not bool.
    ValueError
        If `form` is another, or `token_mask` not the shape (T,).
    """
    check_routing(routing, "load_balancing_loss")
    return apply(load_balancing_loss_forward, load_balancing_loss_backward, routing, routing.probabilities, form=form,
                 token_mask=token_mask)


def router_z_loss_forward(logits, *, token_mask=None):
    """Return ``(loss, saved)``."""
    logits = as_floats(logits, "router_z_loss", "logits")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"router_z_loss: logits must have shape (T, E) with E > 0, got {logits.shape}")
    tokens = len(logits)
    token_mask = _token_mask(token_mask, "router_z_loss")
    _check_mask(token_mask, tokens, "router_z_loss")
    with np.errstate(all="ignore"):
        most = logits.max(1, keepdims=True)
        most[~np.isfinite(most)] = 0
        powers = np.exp(logits - most)
        sums = powers.sum(1, keepdims=True)
        lse = most + np.log(sums)
        if token_mask is not None:
            tokens = int(np.count_nonzero(token_mask))
            lse = np.where(token_mask[:, None], lse, logits.dtype.type(0))
        loss = np.asarray(np.square(lse).sum() / logits.dtype.type(max(tokens, 1)))
    return loss, (powers, sums, lse, max(tokens, 1))


def router_z_loss_backward(dy, saved):
    """Return the gradient with respect to the logits, in a tuple."""
    powers, sums, lse, tokens = saved
    with np.errstate(all="ignore"):
        gradient = powers * (lse / sums * (2 / tokens * dy))
    return (np.where(lse == 0, gradient.dtype.type(0), gradient),)


def router_z_loss(logits, *, token_mask=None):
    """The mean of ``logsumexp(logits)**2`` over the tokens (ST-MoE, Zoph et al. 2022): keeps logits small.

    Infinite for a token with a logit of inf, or with none above -inf.

    Parameters
    ----------
    logits : (T, E) array_like or Tensor, float32 or float64
    token_mask : (T,) array_like of bool, optional
        False marks padding, which does not count.

    Returns
    -------
    0-d ndarray, or Tensor where `logits` is one

    Raises
    ------
    TypeError
        If `logits` is not float32 or float64, or `token_mask` not bool.
    ValueError
        If `logits` has not two axes and an expert, or `token_mask` not the shape (T,).
    """
    return apply(router_z_loss_forward, router_z_loss_backward, logits, token_mask=token_mask)
