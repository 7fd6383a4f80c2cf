"""Training: AdamW, learning-rate schedules, gradient clipping, and a loop that survives a kill."""
import contextlib
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from numformer.files import state_bytes
from numformer.models.pretrained import need_safetensors, read_safetensors, write_safetensors
from numformer.nn.module import held
from numformer.ops.arguments import FLOATS, as_integer, as_number, need_sizes
from numformer.ops.optimizer import adamw_step, global_norm
from numformer.tensor import Tensor

__all__ = ["AdamW", "Trainer", "clip_grad_norm", "hf_warmup_cosine", "warmup_cosine"]


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
        p = p - lr (weight_decay p + m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps))

    Arrays of fewer than two axes (norms, biases) do not decay. A parameter without a gradient is left alone, and such
    a step does not count in its t.

    Parameters
    ----------
    params : iterable of Tensor, or one
    lr : float
        May be changed between steps.
    betas : (float, float)
    eps, weight_decay : float

    Raises
    ------
    TypeError
        If `params` are no Tensors of float32 or float64, or a number is none.
    ValueError
        If there are no parameters, one is given twice, was computed by an op or cannot be changed in place, or a number
        is out of its range.
    """

    def __init__(self, params, lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1):
        self.params = _tensors(params, "AdamW")
        if not self.params:
            raise ValueError("AdamW: no parameters")
        for p in self.params:
            if p.is_made:
                raise ValueError(f"AdamW: a Tensor of shape {p.shape} was computed by an op, and gets no gradient "
                                 "of its own: give the Tensors that it was computed from")
            if p.requires_grad and p.dtype not in FLOATS:
                raise TypeError(f"AdamW: parameters must be float32 or float64, got {p.dtype}; keep them in float32 "
                                "and convert what is computed from them")
            if p.requires_grad:
                _need_in_place(p)
        if len(set(map(id, self.params))) < len(self.params):
            raise ValueError("AdamW: a parameter is given twice and would be updated twice in a step")
        for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not as_number(number, "AdamW", name) >= 0:
                raise ValueError(f"AdamW: {name} must be 0 or more, got {number}")
        if np.ndim(betas) != 1 or len(betas) != 2 or not all(0 <= as_number(b, "AdamW", "each of betas") < 1
                                                             for b in betas):
            raise ValueError(f"AdamW: betas must be two numbers in [0, 1), got {betas}")
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.steps = 0
        self.counts = np.zeros(len(self.params), np.int64)      # steps of each parameter
        self.m = [np.zeros_like(p.data) for p in self.params]
        self.v = [np.zeros_like(p.data) for p in self.params]

    def step(self, max_norm=None):
        """Update the parameters from their gradients.

        Parameters
        ----------
        max_norm : float, optional
            Scale the gradients down to this global norm first, as :func:`clip_grad_norm`, but in the same pass.

        Returns
        -------
        float or None
            The norm before clipping, where `max_norm` is given.

        Raises
        ------
        TypeError
            If a gradient is no array, or ``lr`` or `max_norm` no number; nothing is changed then.
        ValueError
            If a gradient has not the shape and dtype of its parameter, a parameter's new ``data`` not those of the
            old or cannot be changed in place, or ``lr`` or `max_norm` is below 0 or NaN; nor then.
        """
        lr = as_number(self.lr, "AdamW", "lr")
        if not lr >= 0:
            raise ValueError(f"AdamW: lr must be 0 or more, got {self.lr}")
        chosen = [i for i, p in enumerate(self.params) if p.grad is not None]
        for i in chosen:
            p = self.params[i]
            if p.data.shape != self.m[i].shape or p.data.dtype != self.m[i].dtype:
                raise ValueError(f"AdamW: parameter {i} was {self.m[i].dtype} of shape {self.m[i].shape}, and is "
                                 f"{p.dtype} {p.shape} now; make a new AdamW")
            _need_in_place(p)
            if not isinstance(p.grad, np.ndarray):
                raise TypeError(f"AdamW: the gradient of parameter {i} must be an array, got {type(p.grad).__name__}")
            if p.grad.shape != p.data.shape or p.grad.dtype != p.data.dtype:
                raise ValueError(f"AdamW: the gradient of parameter {i} must be {p.dtype} of shape {p.shape}, as that "
                                 f"is, got {p.grad.dtype} {p.grad.shape}")
        grads = [self.params[i].grad for i in chosen]
        norm, scale = None, 1.0
        if max_norm is not None:
            check_max_norm(max_norm, "AdamW")
            norm = global_norm(grads)
            scale = _clip_factor(norm, max_norm)
        self.steps += 1
        self.counts[chosen] += 1
        for count in np.unique(self.counts[chosen]):        # of most models one
            some = [i for i in chosen if self.counts[i] == count]
            params = [self.params[i].data for i in some]
            adamw_step(params, [self.params[i].grad for i in some], [self.m[i] for i in some],
                       [self.v[i] for i in some], lr=lr, betas=self.betas, eps=self.eps, step=int(count),
                       grad_scale=scale, weight_decay=[self.weight_decay if p.ndim > 1 else 0.0 for p in params])
        return norm

    def zero_grad(self):
        """Drop the gradients."""
        for p in self.params:
            p.grad = None

    def state_dict(self):
        """The moments and the counts of steps, as arrays by name (no copies of the moments)."""
        state = {"steps": np.array([self.steps]), "counts": self.counts}
        for i, (m, v) in enumerate(zip(self.m, self.v)):
            state[f"m.{i}"], state[f"v.{i}"] = m, v
        return state

    def load_state_dict(self, state):
        """Take over what :meth:`state_dict` gave. ValueError where it does not fit."""
        own = self.state_dict()
        state = whole_state(state)
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise ValueError("AdamW: the state belongs to other parameters")
        for name, array in own.items():
            array[...] = state[name]
        self.steps = int(state["steps"][0])


def _need_in_place(p):
    if not (p.data.flags.c_contiguous and p.data.flags.writeable):
        raise ValueError(f"AdamW: a parameter of shape {p.shape} must be writeable and C-contiguous, as it is changed "
                         "in place; make it of numpy.array(data, order='C')")


def as_callbacks(callbacks, op):
    """The callbacks as a list. TypeError for a single one, and for what cannot be called."""
    listed = list(callbacks) if isinstance(callbacks, Iterable) else None
    if listed is None or not all(map(callable, listed)):
        raise TypeError(f"{op}: callbacks must be a list of functions of (step, metrics), got {callbacks!r}")
    return listed


def check_resumable(batches, name, like):
    """What a checkpoint needs: ImportError without safetensors, TypeError for batches (or None) without a state."""
    need_safetensors()
    if batches is not None and not hasattr(batches, "state"):
        raise TypeError(f"{name} must have state() and restore(state) for a checkpoint, as {like} have, got "
                        f"{type(batches).__name__}")


def whole_state(state):
    """The state of an AdamW with the counts that one of an older version lacks: all steps, for every parameter."""
    if "counts" in state or "steps" not in state:
        return state
    return {**state, "counts": np.repeat(state["steps"], sum(name.startswith("m.") for name in state))}


def _tensors(params, op):
    """One Tensor or some as a list."""
    params = list(params) if isinstance(params, Iterable) and type(params) is not Tensor else [params]
    for p in params:
        if type(p) is not Tensor:
            raise TypeError(f"{op}: params must be Tensors, got {type(p).__name__}; give model.parameters()")
    return params


def check_max_norm(max_norm, op):
    """TypeError or ValueError unless it is a number, 0 or more: below, it would turn the gradients round."""
    if not as_number(max_norm, op, "max_norm") >= 0:
        raise ValueError(f"{op}: max_norm must be 0 or more, got {max_norm}")


def _clip_factor(norm, max_norm):
    return max_norm / (norm + 1e-6) if norm > max_norm else 1.0


def clip_grad_norm(params, max_norm):
    """Scale the gradients of `params` so that their global norm is at most `max_norm`.

    ``AdamW.step(max_norm=...)`` does the same without a pass of its own.

    Parameters
    ----------
    params : iterable of Tensor, or one
        Those without a gradient are passed over; ``grad`` of the others is a new array where the norm is too large.
    max_norm : float

    Returns
    -------
    float
        The Euclidean norm of all gradients together, before.

    Raises
    ------
    TypeError
        If `params` are no Tensors, or `max_norm` is no number.
    ValueError
        If `max_norm` is below 0.
    """
    params = _tensors(params, "clip_grad_norm")
    check_max_norm(max_norm, "clip_grad_norm")
    norm = global_norm([p.grad for p in params if p.grad is not None])
    factor = _clip_factor(norm, max_norm)
    if factor < 1:
        for p in params:
            if p.grad is not None:
                p.grad = np.asarray(p.grad * p.grad.dtype.type(factor))     # of a 0-d array it is a scalar
    return norm


def warmup_cosine(step, *, lr, warmup, total, min_lr=0.0):
    """nanoGPT's schedule: lr (step + 1) / (warmup + 1) for `warmup` steps, half a cosine to `min_lr` at `total`.

    Parameters
    ----------
    step : int
        From 0; from `total` on the rate is `min_lr`.
    lr, min_lr : float
        The highest rate, and the last.
    warmup, total : int
        Steps.

    Returns
    -------
    float
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if step >= total:
        return min_lr
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def hf_warmup_cosine(step, *, lr, warmup, total):
    """Hugging Face's get_cosine_schedule_with_warmup: from 0 at step 0 up to lr at `warmup`, half a cosine to 0.

    Parameters and result as of :func:`warmup_cosine`, with 0 for its min_lr, from `total` on too, where Hugging Face's
    rises again.
    """
    if step < warmup:
        return lr * step / max(1, warmup)
    if step >= total:
        return 0.0
    return lr * max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


class Trainer:
    """Train ``model.loss(*next(batches))`` for a number of steps; a run that was killed goes on with the same bits.

    Parameters
    ----------
    model : Module with ``loss(*batch) -> Tensor``
    batches : iterator, as :class:`numformer.data.Batches`
        With ``state()`` and ``restore(state)`` where there is a checkpoint.
    optimizer : AdamW
    steps : int
    schedule : callable, optional
        step -> learning rate; the optimizer's own stays where None.
    accumulate : int
        Batches whose gradients are averaged for a step.
    max_norm : float or None
        Gradients are scaled down to this global norm.
    checkpoint : path, optional
        A file that holds everything: parameters, optimizer and its learning rate, position in the data, random
        generators of the model. Where it exists, the run goes on from there; at another rate only by a `schedule`.
    every : int
        Steps between checkpoints.
    callbacks : iterable of callables
        Each is called as ``callback(step, metrics)`` after every step, with loss, lr, grad_norm, tokens, seconds.
    progress : str or None
        What to write beside the progress bar (tqdm, where it is installed); None shows no bar.

    Raises
    ------
    TypeError
        If `batches` is no iterator, or has no state for the checkpoint, a number is none, or `callbacks` is no list of
        functions.
    ValueError
        If `steps` or `max_norm` is below 0, `accumulate` or `every` below 1, or `optimizer` is of another model.
    ImportError
        If there is a checkpoint and safetensors is not installed.
    """

    def __init__(self, model, batches, optimizer, steps, *, schedule=None, accumulate=1, max_norm=1.0, checkpoint=None,
                 every=100, callbacks=(), progress=None):
        need_sizes("Trainer", accumulate=accumulate, every=every)
        if as_integer(steps, "Trainer", "steps") < 0:
            raise ValueError(f"Trainer: steps must be 0 or more, got {steps}")
        if not hasattr(batches, "__next__"):
            raise TypeError("Trainer: batches must be an iterator, as numformer.data.Batches or iter(list), got "
                            f"{type(batches).__name__}")
        if max_norm is not None:
            check_max_norm(max_norm, "Trainer")
        params = getattr(optimizer, "params", None)
        if params is not None and {id(p) for p in params}.isdisjoint(map(id, model.parameters())):
            raise ValueError("Trainer: optimizer has none of the model's parameters: make it of model.parameters()")
        if checkpoint is not None:          # said now, and not when the first one is due
            check_resumable(batches, "Trainer: batches", "numformer.data.Batches")
        self.model, self.batches, self.optimizer, self.steps = model, batches, optimizer, steps
        self.schedule, self.accumulate, self.max_norm = schedule, accumulate, max_norm
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.every, self.callbacks, self.progress = every, as_callbacks(callbacks, "Trainer"), progress
        self.done = 0
        self.generators = list({id(item): item for module in model.modules() for _, item in held("", vars(module))
                                if isinstance(item, np.random.Generator)}.values())

    def run(self):
        """Train up to ``steps``; return the metrics of the last step (none: an empty dict)."""
        if self.checkpoint is not None and self.checkpoint.exists():
            self.resume()
        metrics = {}
        with _bar(self.progress, self.steps, self.done) as bar:
            for step in range(self.done, self.steps):
                metrics = self.step(step)
                self.done = step + 1
                for callback in self.callbacks:
                    callback(step, metrics)
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
                bar.update()
                if self.checkpoint is not None and (self.done % self.every == 0 or self.done == self.steps):
                    self.save()
        return metrics

    def step(self, step):
        """One update of the parameters, in training mode; returns its metrics."""
        begin, total, tokens = time.perf_counter(), 0.0, 0
        self.model.train()                  # a callback may have looked at it in evaluation mode
        if self.schedule is not None:
            self.optimizer.lr = self.schedule(step)
        self.optimizer.zero_grad()          # what a step that was interrupted left
        for _ in range(self.accumulate):
            batch = next(self.batches, None)
            if batch is None:
                raise ValueError(f"Trainer: the batches ended in step {step}, counted from 0, of {self.steps}")
            loss = self.model.loss(*batch)
            total += loss.item() / self.accumulate
            tokens += np.size(batch[0])
            (loss * (1 / self.accumulate) if self.accumulate > 1 else loss).backward()
        norm = self.optimizer.step(self.max_norm)
        self.optimizer.zero_grad()
        return {"loss": total, "lr": self.optimizer.lr, "grad_norm": norm, "tokens": tokens,
                "seconds": time.perf_counter() - begin}

    def save(self):
        """Write the checkpoint: one file, aside first, so that a kill leaves the old one or the new."""
        state = {"done": self.done, "lr": self.optimizer.lr, "data": self.batches.state(),
                 "rng": [g.bit_generator.state for g in self.generators]}
        arrays = {f"model.{name}": array for name, array in self.model.state_dict().items()}
        arrays |= {f"optimizer.{name}": array for name, array in self.optimizer.state_dict().items()}
        arrays["state"] = state_bytes(state)
        write_safetensors(self.checkpoint, arrays)

    def resume(self):
        """Take everything from the checkpoint. ValueError, in one line, where it is broken or of another run; nothing
        is changed then."""
        arrays = read_safetensors(self.checkpoint)
        before = (self.batches.state(), [g.bit_generator.state for g in self.generators],
                  {name: array.copy() for name, array in self.model.state_dict().items()})
        try:
            state = json.loads(arrays.pop("state").tobytes())
            model, optimizer = ({n.removeprefix(part): a for n, a in arrays.items() if n.startswith(part)}
                                for part in ("model.", "optimizer."))
            done, lr = state["done"], state.get("lr", self.optimizer.lr)        # older ones have none
            self._take(state["data"], state["rng"], model)
            self.optimizer.load_state_dict(optimizer)       # last, as this alone is not taken back
        except (KeyError, TypeError, ValueError) as error:
            self._take(*before)
            raise ValueError(f"{self.checkpoint} is not a checkpoint of this run: {error}") from None
        self.done, self.optimizer.lr = done, lr

    def _take(self, data, generators, model):
        """Set the position in the data, the states of the generators and the parameters."""
        self.model.load_state_dict(model)
        self.batches.restore(data)
        for generator, state in zip(self.generators, generators, strict=True):
            generator.bit_generator.state = state


def _bar(text, total, done):
    try:
        from tqdm.auto import tqdm
    except ImportError:
        tqdm = None
    if text is None or tqdm is None:
        return contextlib.nullcontext(_NoBar())
    return tqdm(total=total, initial=done, desc=text, unit="step", dynamic_ncols=True)


class _NoBar:
    def set_postfix_str(self, text, refresh=True):
        pass

    def update(self):
        pass
