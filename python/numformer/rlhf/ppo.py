"""PPO for language models as one loop, every detail visible.

    rollout   sample a completion of each prompt; log-probabilities under policy and reference, values, scores
              r_t = -beta KL_t, plus the score at the last token;   advantages and returns by GAE
    step      for each epoch, for each minibatch: policy loss, value loss, one step of each optimizer
              beta follows the KL

Details follow Ziegler et al. 2019 (arXiv:1909.08593) as taken apart in Huang et al. 2024, "The N+ implementation
details of RLHF with PPO" (arXiv:2403.17031). Log-probabilities of a rollout come from the forward pass that training
uses, at the temperature of sampling, with dropout off: an iteration's first ratio is exactly 1, and the KL of a policy
to an equal reference exactly 0. Both are checked, and a run in which they fail ends with an error.
"""
import json
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import numformer as nf
from numformer.files import state_bytes
from numformer.models.pretrained import read_safetensors, write_safetensors
from numformer.nn import Module
from numformer.ops.arguments import as_ids, need_generator, need_sizes
from numformer.rlhf.advantages import AdaptiveKL, gae, kl_penalty
from numformer.rlhf.best_of_n import check_reward_fn, read_scores
from numformer.rlhf.config import PPOConfig
from numformer.rlhf.losses import ppo_policy_loss, ppo_value_loss
from numformer.rlhf.masked import explained_variance, masked_mean, masked_whiten
from numformer.rlhf.scorers import refuse_quantized
from numformer.rlhf.sequences import Sequences, completion_log_probs, completion_values
from numformer.train import AdamW, as_callbacks, check_resumable, whole_state

__all__ = ["PPO", "Rollout"]


@dataclass
class Rollout:
    """A batch of completions and all that training reads of them: arrays (B, T), 0 behind the completions.

    Attributes
    ----------
    iteration : int
        Of the policy that sampled it.
    prompts, completions : lists of lists of token ids
    sequences : Sequences
    ended : (B,) bool
        Whether a completion ends with eos_id.
    scores : (B,)
        As the reward function gave them.
    logp, ref_logp, entropy, values
    rewards, advantages, returns
    order : list of (B,) arrays
        The rows' order in each epoch.
    metrics : dict of float
    """

    iteration: int
    prompts: list
    completions: list
    sequences: Sequences
    ended: np.ndarray
    scores: np.ndarray
    logp: np.ndarray
    ref_logp: np.ndarray
    entropy: np.ndarray
    values: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    order: list
    metrics: dict


class PPO:
    """Proximal policy optimization of a language model against any reward, with a KL penalty to a frozen reference.

    Parameters
    ----------
    policy : GPT
        Changed in place. Dense or with experts. Each rollout sets evaluation mode, so dropout stays off.
    reference : GPT or None
        What the KL is measured to; None takes a copy of the policy as it is now.
    value : ValueModel
        Changed in place; shares no parameter with the policy.
    reward_fn : callable
        ``reward_fn(prompts, completions)``, two lists of lists of token ids (eos_id included), gives a score for each:
        a program, or ``reward_model.reward``.
    prompts : sequence of lists of token ids
        Every epoch takes each once, in an order drawn from `rng`.
    config : PPOConfig
    rng : numpy.random.Generator
        All that is random here: the prompts' order, sampling, minibatches.
    pretrain : iterator, optional
        Batches for ``policy.loss``, where config.ptx_coef is above 0; with ``state()`` and ``restore(state)`` where
        there is a checkpoint.

    Attributes
    ----------
    iteration : int
        Iterations done; each takes config.batch prompts.
    kl : AdaptiveKL
    """

    def __init__(self, policy, reference, value, reward_fn, prompts, config, *, rng, pretrain=None):
        if not isinstance(config, PPOConfig):
            raise TypeError(f"PPO: config must be a PPOConfig, got {type(config).__name__}")
        check_reward_fn("PPO", reward_fn)
        need_generator(rng, "PPO")
        if reference is policy:
            raise ValueError("PPO: reference is the policy itself, which changes; give another copy, or None")
        for name, model in (("policy", policy), ("value", value)):
            if not isinstance(model, Module):
                raise TypeError(f"PPO: {name} must be a {'GPT' if model is policy else 'ValueModel'}, got "
                                f"{type(model).__name__}")
            refuse_quantized(model, f"PPO: {name}")
        self.policy, self.value, self.config = policy, value, config
        self.reference = _copy(policy) if reference is None else reference
        self.reward_fn, self.rng, self.pretrain = reward_fn, rng, pretrain
        self.prompts = [as_ids(prompt, "PPO", "prompts") for prompt in prompts]
        _check(self)
        options = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        self.policy_optimizer = AdamW(policy.parameters(), config.lr, **options)
        self.value_optimizer = AdamW(value.parameters(), config.lr, **options)
        self.kl = AdaptiveKL(config.kl_init, config.kl_target, config.kl_horizon)
        self.ema = None if config.ema_decay is None else {n: x.copy() for n, x in policy.state_dict().items()}
        self.iteration = 0
        self.order, self.drawn = np.empty(0, np.int64), 0       # of the prompts in this epoch; those taken from it

    def rollout(self):
        """Sample a completion for each of the next prompts and weigh it.

        Returns
        -------
        Rollout
            Its metrics: objective/kl (the sum over a completion, averaged over them; k1), objective/entropy (the
            same of -logp), objective/non_score_reward (of -beta KL), objective/scores, objective/rlhf_reward (the
            sum of the two), policy/entropy_avg (of the distributions, a token), val/num_eos_tokens,
            explained_variance, kl_coef, length (tokens a completion).

        Raises
        ------
        RuntimeError
            If the policy is still equal to the reference and a KL is not exactly 0.
        ValueError
            If reward_fn does not give a finite score for each completion.
        """
        c = self.config
        self.policy.eval()
        self.value.eval()
        prompts = self._next_prompts()
        whole = self.policy.generate(prompts, c.max_new_tokens, temperature=c.temperature, eos_id=c.eos_id,
                                     rng=self.rng)
        completions = [row[len(prompt):] for row, prompt in zip(whole, prompts)]
        ended = np.array([row[-1] == c.eos_id for row in completions])
        sequences = Sequences.of(prompts, completions)
        mask = sequences.mask
        order = [self.rng.permutation(c.batch) for _ in range(c.epochs)]

        # by the minibatches of the first epoch: the same rows together as in the first update
        dtype = np.dtype(self.policy.config.dtype)
        logp, entropy, ref_logp, values = (np.zeros(mask.shape, dtype) for _ in range(4))
        policy, reference, value = self.policy.as_arrays(), self.reference.as_arrays(), self.value.as_arrays()
        for rows in self._minibatches(order[0]):
            some = sequences.rows(rows)
            logp[rows], entropy[rows] = completion_log_probs(policy, some, temperature=c.temperature, entropy=True)
            ref_logp[rows] = completion_log_probs(reference, some, temperature=c.temperature)
            values[rows] = completion_values(value, some)
        self._check_first_kl(logp, ref_logp)

        scores = read_scores("PPO", self.reward_fn(prompts, completions), c.batch)
        rewards = -self.kl.value * kl_penalty(logp, ref_logp, c.kl_form, mask)
        non_score_reward = rewards.sum(1)
        last = mask.sum(1) - 1
        rewards[np.arange(c.batch), last] += self._shaped(scores, ended).astype(dtype)
        if c.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, gamma=c.gamma, lam=c.lam)
        if c.whiten_advantages:
            advantages = masked_whiten(advantages, mask)

        kl = (logp - ref_logp).sum(1)
        _warn_of_negative_kl(kl)
        metrics = {"objective/kl": kl.mean(), "objective/entropy": -logp.sum(1).mean(),
                   "objective/non_score_reward": non_score_reward.mean(), "objective/scores": scores.mean(),
                   "objective/rlhf_reward": non_score_reward.mean() + scores.mean(),
                   "policy/entropy_avg": masked_mean(entropy, mask), "val/num_eos_tokens": ended.sum(),
                   "explained_variance": explained_variance(values, returns, mask), "kl_coef": self.kl.value,
                   "length": mask.sum(1).mean()}
        return Rollout(self.iteration, prompts, completions, sequences, ended, scores, logp, ref_logp, entropy, values,
                       rewards, advantages, returns, order, {name: float(x) for name, x in metrics.items()})

    def step(self, rollout=None):
        """One iteration: a rollout (where none is given) and the updates from it.

        Returns
        -------
        dict of float
            The rollout's metrics, and means over all updates: loss/policy_avg, loss/value_avg, policy/approxkl_avg,
            policy/clipfrac_avg, val/ratio, val/ratio_var, val/clipfrac_avg, norm/policy and norm/value (of the
            gradients before clipping; where max_norm is set), loss/ptx_avg (where ptx_coef is); lr, episode.

        Raises
        ------
        RuntimeError
            If a ratio in the first minibatch is not exactly 1, or a loss is not finite.
        ValueError
            If `rollout` belongs to another iteration.
        """
        c = self.config
        rollout = self.rollout() if rollout is None else rollout
        if rollout.iteration != self.iteration:
            raise ValueError(f"PPO: this rollout was sampled in iteration {rollout.iteration}, the policy is in "
                             f"{self.iteration}; roll out again")
        for optimizer, peak in ((self.policy_optimizer, c.lr), (self.value_optimizer, c.value_lr)):
            optimizer.lr = c.learning_rate(self.iteration, peak)
        updates = []
        for epoch, order in enumerate(rollout.order):
            for number, rows in enumerate(self._minibatches(order)):
                updates.append(self._update(rollout, rows, first=epoch == number == 0))
        if self.ema is not None:
            for name, x in self.policy.state_dict().items():
                self.ema[name] = (c.ema_decay * self.ema[name] + (1 - c.ema_decay) * x).astype(x.dtype)
        kl = rollout.logp - rollout.ref_logp
        self.kl.update(masked_mean(kl, rollout.sequences.mask, axis=1).mean() if c.kl_measure == "token"
                       else kl.sum(1).mean(), c.batch)
        self.iteration += 1
        means = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
        return {**rollout.metrics, **means, "lr": self.policy_optimizer.lr,
                "episode": float(self.iteration * c.batch)}

    def run(self, iterations, *, checkpoint=None, every=1, callbacks=()):
        """Iterate until :attr:`iteration` is `iterations`; return the metrics of the last one (none: an empty dict).

        Parameters
        ----------
        iterations : int
        checkpoint : path, optional
            Where it exists, the run goes on from there, with the same bits as one that was not interrupted.
        every : int
            Iterations between checkpoints.
        callbacks : iterable of callables
            Each is called as ``callback(iteration, metrics)`` after every iteration, counted from 0.
        """
        need_sizes("PPO.run", every=every)
        callbacks = as_callbacks(callbacks, "PPO.run")
        if checkpoint is not None:          # said now, and not when the first one is due
            check_resumable(self.pretrain, "PPO: pretrain", "CompletionBatches")
            if Path(checkpoint).exists():
                self.resume(checkpoint)
        metrics = {}
        while self.iteration < iterations:
            metrics = self.step()
            for callback in callbacks:
                callback(self.iteration - 1, metrics)
            if checkpoint is not None and (self.iteration % every == 0 or self.iteration == iterations):
                self.save(checkpoint)
        return metrics

    def _update(self, rollout, rows, first):
        """One minibatch: gradients of both losses, one step of both optimizers; returns the metrics."""
        c, sequences = self.config, rollout.sequences.rows(rows)
        mask = sequences.mask
        logp = completion_log_probs(self.policy, sequences, temperature=c.temperature, entropy=c.entropy_coef != 0)
        if c.entropy_coef:
            logp, entropy = logp
        routings = self.policy.routings() if c.load_balancing else []
        if first:
            self._check_first_ratio(logp.data, rollout.logp[rows])
        loss, metrics = ppo_policy_loss(logp, rollout.logp[rows], rollout.advantages[rows], mask, clip=c.clip,
                                        dual_clip=c.dual_clip)
        if c.entropy_coef:
            loss = loss - masked_mean(entropy, mask) * c.entropy_coef
        real = (np.arange(sequences.tokens.shape[1]) < sequences.lengths[:, None]).reshape(-1)
        for routing in routings:
            balance = nf.moe.load_balancing_loss(routing, token_mask=real)
            loss = loss + balance * (c.load_balancing / len(routings))
        if c.ptx_coef:
            batch = next(self.pretrain, None)
            if batch is None:
                raise ValueError(f"PPO: the batches of pretrain ended in iteration {self.iteration}, counted from 0")
            ptx = self.policy.loss(*batch)
            metrics["loss/ptx_avg"] = ptx.item()
            loss = loss + ptx * c.ptx_coef
        value_loss, value_metrics = ppo_value_loss(completion_values(self.value, sequences), rollout.values[rows],
                                                   rollout.returns[rows], mask, clip=c.value_clip)
        metrics |= value_metrics
        if not np.isfinite([loss.item(), value_loss.item()]).all():
            raise RuntimeError(f"PPO: in iteration {self.iteration} the policy's loss is {loss.item()} and the value's "
                               f"{value_loss.item()}; nothing was updated by this minibatch")
        for optimizer in (self.policy_optimizer, self.value_optimizer):
            optimizer.zero_grad()           # what an update that was interrupted left
        loss.backward()
        (value_loss * c.value_coef).backward()
        for name, optimizer in (("policy", self.policy_optimizer), ("value", self.value_optimizer)):
            if c.adam == "tensorflow":          # there eps stands beside the root that is not bias-corrected
                optimizer.eps = c.eps / (1 - c.betas[1] ** (optimizer.steps + 1)) ** 0.5
            norm = optimizer.step(c.max_norm)
            optimizer.zero_grad()
            if norm is not None:
                metrics[f"norm/{name}"] = norm
        return metrics

    def _shaped(self, scores, ended):
        """The scores after the penalty for completions that do not end by themselves."""
        c = self.config
        if c.missing_eos_penalty is None:
            return scores
        punished = scores - c.missing_eos_penalty if c.missing_eos == "subtract" else -c.missing_eos_penalty
        return np.where(ended, scores, punished)

    def _next_prompts(self):
        chosen = []
        while len(chosen) < self.config.batch:
            if self.drawn == len(self.order):
                self.order, self.drawn = self.rng.permutation(len(self.prompts)), 0
            chosen.append(list(self.prompts[self.order[self.drawn]]))
            self.drawn += 1
        return chosen

    def _minibatches(self, order):
        return order.reshape(-1, self.config.minibatch)

    def _check_first_ratio(self, logp, old_logp):
        if not np.array_equal(logp, old_logp):
            raise RuntimeError(f"PPO: in iteration {self.iteration} a first ratio is not exactly 1: log-probabilities "
                               f"differ by up to {np.abs(logp - old_logp).max():.3g} from those of the rollout. The "
                               "policy's weights changed in between, or its forward pass is not the same twice")

    def _check_first_kl(self, logp, ref_logp):
        if self.iteration or np.array_equal(logp, ref_logp):
            return
        ours, theirs = self.policy.state_dict(), self.reference.state_dict()
        if ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours):
            raise RuntimeError("PPO: the policy has the weights of the reference, but a first KL is not exactly 0: "
                               f"log-probabilities differ by up to {np.abs(logp - ref_logp).max():.3g}. Their "
                               "configurations differ, or the forward pass is not the same twice")

    # Checkpoints

    def state_dict(self):
        """All that the next iteration depends on, as arrays by name.

        The reference, reward_fn and the prompts are not in it; of the first and the last it has a checksum.
        """
        state = {"iteration": self.iteration, "drawn": self.drawn, "kl_coef": self.kl.value,
                 "rng": self.rng.bit_generator.state, "given": self._given(),
                 "pretrain": None if self.pretrain is None else self.pretrain.state()}
        arrays = {"order": self.order, "state": state_bytes(state)}
        for part, owner in self._parts():
            arrays |= {f"{part}.{name}": array for name, array in owner.items()}
        return arrays

    def load_state_dict(self, arrays):
        """Take over what :meth:`state_dict` gave. ValueError where it is not of this run."""
        try:
            state = json.loads(np.asarray(arrays["state"]).tobytes())
            if state["given"] != self._given():
                raise ValueError("it was made with another reference or other prompts")
            parts = {part: {n.removeprefix(f"{part}."): x for n, x in arrays.items() if n.startswith(f"{part}.")}
                     for part, _ in self._parts()}
            for part in ("policy_optimizer", "value_optimizer"):
                parts[part] = whole_state(parts[part])
            for part, own in self._parts():
                if own.keys() != parts[part].keys() or any(own[n].shape != parts[part][n].shape for n in own):
                    raise ValueError(f"its {part} has other parameters")
            if self.pretrain is not None:
                self.pretrain.restore(state["pretrain"])
            self.rng.bit_generator.state = state["rng"]
            order = np.array(arrays["order"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"PPO: not a checkpoint of this run: {error}") from None
        self.policy.load_state_dict(parts["policy"])
        self.value.load_state_dict(parts["value"])
        self.policy_optimizer.load_state_dict(parts["policy_optimizer"])
        self.value_optimizer.load_state_dict(parts["value_optimizer"])
        if self.ema is not None:
            self.ema = {name: np.array(x) for name, x in parts["ema"].items()}
        self.order, self.drawn, self.iteration = order, state["drawn"], state["iteration"]
        self.kl.value = state["kl_coef"]

    def save(self, path):
        """Write :meth:`state_dict` as one safetensors file; after a kill it holds the old state or the new."""
        write_safetensors(path, self.state_dict())

    def resume(self, path):
        """Go on from what :meth:`save` wrote. ValueError, in one line, where it is broken or of another run."""
        arrays = read_safetensors(path)
        try:
            self.load_state_dict(arrays)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _parts(self):
        yield "policy", self.policy.state_dict()
        yield "value", self.value.state_dict()
        yield "policy_optimizer", self.policy_optimizer.state_dict()
        yield "value_optimizer", self.value_optimizer.state_dict()
        if self.ema is not None:
            yield "ema", self.ema

    def _given(self):
        checksum = zlib.crc32(json.dumps(self.prompts).encode())
        for array in self.reference.state_dict().values():
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
        return checksum


def _copy(model):
    twin = type(model)(model.config, rng=np.random.default_rng(0))
    twin.load_state_dict(model.state_dict())
    return twin


def _check(ppo):
    """ValueError for parts that do not fit each other, TypeError for two dtypes."""
    c, shared = ppo.config, {id(p.data) for p in ppo.policy.parameters()}
    for name, model in (("reference", ppo.reference), ("value", ppo.value)):
        if any(id(p.data) in shared for p in model.parameters()):
            raise ValueError(f"PPO: {name} shares parameters with the policy; give it a copy of its own")
    own = ppo.policy.config
    if ppo.reference.config.vocab_size != own.vocab_size:       # of other logits there is no KL
        raise ValueError(f"PPO: reference must have the policy's vocabulary of {own.vocab_size}, got "
                         f"{ppo.reference.config.vocab_size}")
    if ppo.value.config.dtype != own.dtype:
        raise TypeError(f"PPO: value must be of the policy's {own.dtype}, got {ppo.value.config.dtype}")
    if c.ptx_coef and ppo.pretrain is None:
        raise ValueError(f"PPO: ptx_coef is {c.ptx_coef}, which needs pretrain: batches for policy.loss")
    if not ppo.prompts or not all(ppo.prompts):
        raise ValueError("PPO: prompts must be lists of at least one token id" if ppo.prompts else
                         "PPO: there are no prompts")
    longest = max(map(len, ppo.prompts)) + c.max_new_tokens
    for name, model in (("policy", ppo.policy), ("reference", ppo.reference), ("value", ppo.value)):
        if longest > model.config.block_size:
            raise ValueError(f"PPO: prompt and new tokens are up to {longest} positions, block_size of {name} is "
                             f"{model.config.block_size}")


def _warn_of_negative_kl(kl):
    """`kl`: the sum of logp - ref_logp over each completion. Its expectation under the policy is never negative."""
    mean, error = kl.mean(), kl.std() / max(len(kl) - 1, 1) ** 0.5
    if len(kl) > 1 and mean < -0.01 and mean < -4 * error:
        warnings.warn(
            f"PPO: the mean KL to the reference is {mean:.3g} +- {error:.1g} nats, clearly below 0. Samples of the "
            "policy have no such mean: these come from another distribution than the one whose log-probabilities are "
            "taken. Look for another temperature, top-k or top-p in generate, dropout, or weights that changed after "
            "sampling. Until then the penalty rewards what the policy itself finds unlikely", stacklevel=3)
