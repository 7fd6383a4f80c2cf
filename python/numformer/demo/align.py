"""Stage 3: fine-tuning, a reward model on pairs that a program judged, and PPO with a KL penalty."""
import json

import numpy as np

import numformer as nf
from numformer.demo.data import Corpus
from numformer.demo.errors import DemoError
from numformer.demo.pretrain import load, save, train
from numformer.demo.scorer import score
from numformer.files import replace_file
from numformer.rlhf import PPO, CompletionBatches, PairBatches, PPOConfig, RewardModel, ValueModel, best_of_n

__all__ = ["Judge", "say_ppo", "say_reward", "say_sft", "work_ppo", "work_reward", "work_sft"]

SFT_RATE = 1e-3
REWARD_RATE = 3e-4
PAIRS_A_STEP, LEAST_PAIRS = 16, 8
POLICY_RATE = 1e-4
VALUE_RATE = 3e-4
KL_INIT, KL_TARGET = 0.05, 4.0         # nats a completion
ROWS = 64                               # completions generated together


class Judge:
    """The program's scores of completions, as token ids."""

    def __init__(self, corpus):
        self.corpus = corpus

    def __call__(self, prompts, completions):
        """A score from 0 to 1 for each."""
        corpus = self.corpus
        return np.array([score(corpus.kind, corpus.decode(p), corpus.decode(c), c[-1] == corpus.end)
                         for p, c in zip(prompts, completions)])


def _generate(run, corpus, model, prompts, rng, progress=None):
    """A completion of each prompt, at temperature 1."""
    completions = []
    for begin in range(0, len(prompts), ROWS):
        some = prompts[begin:begin + ROWS]
        whole = model.generate(some, run.plan.body_tokens, eos_id=corpus.end, rng=rng)
        completions += [row[len(prompt):] for row, prompt in zip(whole, some)]
        if progress is not None:
            progress(len(some))
    return completions


def _test_prompts(run, corpus):
    return [prompt for prompt, _ in corpus.examples["held_out"][:run.plan.test_prompts]]


# Fine-tuning


def work_sft(run):
    from tqdm.auto import tqdm
    plan, corpus = run.plan, Corpus(run)
    model = load(run, "pretrained-experts")
    pairs = corpus.examples["train"]
    held_out = corpus.examples["held_out"][:256]

    def loss():
        plain, nats, tokens = model.eval(), 0.0, 0
        with nf.no_grad():
            for begin in range(0, len(held_out), 32):
                inputs, targets = CompletionBatches.collate(held_out[begin:begin + 32])
                plain.loss(inputs, targets)
                count = int((targets != -100).sum())
                nats, tokens = nats + plain.cross_entropy * count, tokens + count
        return nats / tokens

    looks = set(np.linspace(0, plan.sft_steps, min(plan.evaluations, plan.sft_steps) + 1).astype(int)[1:] - 1)
    before = loss()
    train(run, model, CompletionBatches(pairs, plan.sft_batch, seed=run.seed), lr=SFT_RATE, steps=plan.sft_steps,
          warmup=max(plan.sft_steps // 10, 2), progress="3 fine-tune",
          look=lambda step: {"held_out_loss": loss()} if step in looks else None)
    after = loss()
    save(run, model.eval(), "sft")
    prompts = _test_prompts(run, corpus)
    with tqdm(total=len(prompts), desc="3 samples", unit="sample", dynamic_ncols=True, leave=False) as bar:
        samples = _generate(run, corpus, model, prompts, run.rng("sft", "samples"), bar.update)
    judge = Judge(corpus)
    bodies = corpus.examples["held_out"][:len(prompts)]
    return {"kind": corpus.kind, "examples": len(pairs), "steps": plan.sft_steps, "loss_before": before,
            "loss": after, "ended": np.mean([row[-1] == corpus.end for row in samples]),
            "score": judge(prompts, samples).mean(),
            "score_of_corpus": judge(prompts, [body for _, body in bodies]).mean(),
            "score_of_shuffled": judge(prompts, [body for _, body in bodies[1:] + bodies[:1]]).mean()}, {}


def say_sft(result, speeds):
    return (f"{result['loss_before']:.2f} -> {result['loss']:.2f} nats a token on the bodies of held-out "
            f"{result['kind']}; of its samples {100 * result['ended']:.0f} % end by themselves, the program's score is "
            f"{result['score']:.2f} (the corpus itself {result['score_of_corpus']:.2f})")


# The reward model


def _pairs(run, corpus, model, examples, count, rng, bar):
    """Up to `count` (better, worse) whole sequences: samples of one prompt that the program scores differently.

    Where it gives both samples the same, one of them and the corpus's own completion, where those differ. Every prompt
    is tried up to four times.
    """
    judge, pairs = Judge(corpus), []
    order = np.concatenate([rng.permutation(len(examples)) for _ in range(4)])
    while len(pairs) < count and len(order):
        some, order = [examples[i] for i in order[:ROWS // 2]], order[ROWS // 2:]
        prompts = [prompt for prompt, _ in some for _ in range(2)]
        samples = _generate(run, corpus, model, prompts, rng)
        scores = judge(prompts, samples).reshape(-1, 2)
        own = judge([prompt for prompt, _ in some], [body for _, body in some])
        found = len(pairs)
        for i, (prompt, body) in enumerate(some):
            ranked = sorted(zip(scores[i], (samples[2 * i], samples[2 * i + 1])), key=lambda x: -x[0])
            if ranked[0][0] == ranked[1][0]:
                ranked = sorted([(own[i], body), ranked[0]], key=lambda x: -x[0])
            if ranked[0][0] > ranked[1][0]:
                pairs.append([[*prompt, *ranked[0][1]], [*prompt, *ranked[1][1]]])
        bar.update(min(len(pairs), count) - found)
    if len(pairs) < LEAST_PAIRS:
        raise DemoError(f"reward model: the program scores only {len(pairs)} pairs differently; try another --data or "
                        "--seed", code=1)
    return pairs[:count]


def work_reward(run):
    from tqdm.auto import tqdm
    plan, corpus = run.plan, Corpus(run)
    path = run.folder / "data" / "pairs.json"
    if not path.exists():
        model = load(run, "sft")
        with tqdm(total=plan.pairs + plan.test_pairs, desc="3 preference pairs", unit="pair", dynamic_ncols=True,
                  leave=False) as bar:
            pairs = {name: _pairs(run, corpus, model, corpus.examples[name], count, run.rng("pairs", name), bar)
                     for name, count in (("train", plan.pairs), ("held_out", plan.test_pairs))}
        replace_file(path, json.dumps(pairs))
    try:
        pairs = json.loads(path.read_text())
        pairs = {name: pairs[name] for name in ("train", "held_out")}
    except (ValueError, KeyError, TypeError):
        raise DemoError(f"{path} is broken; remove it and go on with --resume", code=1) from None
    model = RewardModel.from_gpt(load(run, "sft"), rng=run.rng("weights", "reward"))
    before = model.pair_accuracy(*zip(*pairs["held_out"]))
    train(run, model, PairBatches(pairs["train"], PAIRS_A_STEP, seed=run.seed), lr=REWARD_RATE, steps=plan.reward_steps,
          warmup=max(plan.reward_steps // 10, 2), progress="3 reward model",
          look=lambda step: {"accuracy": model.accuracy})
    model.normalize([row for pair in pairs["train"] for row in pair])
    save(run, model.eval(), "reward")
    return {"pairs": len(pairs["train"]), "steps": plan.reward_steps, "test_pairs": len(pairs["held_out"]),
            "accuracy_before": before,
            "accuracy": model.pair_accuracy(*zip(*pairs["held_out"])),
            "train_accuracy": model.pair_accuracy(*zip(*pairs["train"]))}, {}


def say_reward(result, speeds):
    return (f"{100 * result['accuracy']:.0f} % of {result['test_pairs']} held-out pairs in the right order "
            f"({100 * result['train_accuracy']:.0f} % of the {result['pairs']} it learned); all pairs were judged by a "
            "program, not by people")


# PPO


def work_ppo(run):
    plan, corpus = run.plan, Corpus(run)
    judge = Judge(corpus)
    sft, reward = load(run, "sft"), load(run, "reward")
    samples = {}

    def scored(rows, completions):          # the reward model decides, the program looks on
        samples["program"] = judge(rows, completions)
        samples["model"] = reward.reward(rows, completions)
        return samples["model"]

    config = PPOConfig(batch=plan.ppo_batch, minibatch=plan.ppo_minibatch, epochs=plan.ppo_epochs,
                       max_new_tokens=plan.body_tokens, eos_id=corpus.end, lr=POLICY_RATE, value_lr=VALUE_RATE,
                       kl_init=KL_INIT, kl_target=KL_TARGET, kl_horizon=plan.ppo_batch, load_balancing=0.01)
    policy = load(run, "sft")
    value = ValueModel.from_reward(reward, rng=run.rng("weights", "value"))
    ppo = PPO(policy, sft, value, scored, [prompt for prompt, _ in corpus.examples["train"]], config,
              rng=run.rng("ppo"))
    _iterate(run, ppo, samples)
    save(run, policy, "ppo")
    return _judged(run, corpus, policy, sft, scored, samples), {}


def _iterate(run, ppo, samples):
    """PPO from its checkpoint, if there is one, to the end of the plan; `samples` holds the scores of an iteration."""
    from tqdm.auto import tqdm
    checkpoint, iterations = run.checkpoint("ppo"), run.plan.ppo_iterations
    if checkpoint.exists():
        try:
            ppo.resume(checkpoint)
        except ValueError as error:
            raise DemoError(f"{error}; remove it and go on with --resume", code=1) from None
        run.begin_stage("ppo", ppo.iteration)
    begin = run.clock()
    with tqdm(total=iterations, initial=ppo.iteration, desc="3 PPO", unit="iteration", dynamic_ncols=True) as bar:
        while ppo.iteration < iterations:
            try:
                metrics = ppo.step()
            except RuntimeError as error:           # a first ratio that is not 1, a loss that is not finite
                raise DemoError(error, code=1) from None
            if ppo.iteration == 1 and metrics["objective/kl"] != 0:
                raise DemoError(f"PPO: the first KL is {metrics['objective/kl']}, not 0", code=1)
            line = metrics | {"program": samples["program"].mean(), "kl_coef_next": ppo.kl.value}
            run.write(ppo.iteration - 1, line, run.clock() - begin)
            begin = run.clock()
            bar.set_postfix_str(f"reward {metrics['objective/scores']:.2f}, KL {metrics['objective/kl']:.1f}",
                                refresh=False)
            bar.update()
            ppo.save(checkpoint)


def _judged(run, corpus, policy, sft, scored, samples):
    """The result of the stage: held-out prompts by the policy, and by the best of n of the model before."""
    from tqdm.auto import tqdm
    plan, prompts = run.plan, _test_prompts(run, corpus)
    with tqdm(total=len(prompts) * (plan.best_of + 4), desc="3 held-out reward", unit="sample", dynamic_ncols=True,
              leave=False) as bar:
        best_of_n(sft, prompts, plan.best_of, scored, rng=run.rng("best of n"), max_new_tokens=plan.body_tokens,
                  batch=ROWS, eos_id=corpus.end)
        before = {name: x.reshape(len(prompts), -1) for name, x in samples.items()}
        bar.update(len(prompts) * plan.best_of)
        rows = [prompt for prompt in prompts for _ in range(4)]
        completions = _generate(run, corpus, policy, rows, run.rng("after"), bar.update)
        scored(rows, completions)
    after, lengths = dict(samples), [len(row) for row in completions]
    sizes = [n for n in (1, 2, 4, 8, 16, 32) if n <= plan.best_of]
    chosen = {n: before["model"][:, :n].argmax(1) for n in sizes}
    lines = run.log["ppo"]
    return {"iterations": plan.ppo_iterations, "reward_before": before["model"].mean(),
            "reward": after["model"].mean(), "program_before": before["program"].mean(),
            "program": after["program"].mean(), "length": np.mean(lengths),
            "ended": np.mean([row[-1] == corpus.end for row in completions]),
            "kl": _kl(policy, sft, rows, completions), "first_kl": lines[0]["objective/kl"],
            "kl_coef": lines[-1]["kl_coef_next"],
            "best_of_n": [{"n": n, "kl": nf.rlhf.best_of_n_kl(n),
                           "reward": np.take_along_axis(before["model"], chosen[n][:, None], 1).mean(),
                           "program": np.take_along_axis(before["program"], chosen[n][:, None], 1).mean()}
                          for n in sizes]}


def _kl(policy, reference, prompts, completions):
    """The KL to the reference on those completions, nats a completion."""
    total = 0.0
    policy, reference = policy.as_arrays(), reference.as_arrays()
    for begin in range(0, len(prompts), 32):
        some = nf.rlhf.Sequences.of(prompts[begin:begin + 32], completions[begin:begin + 32])
        total += float((nf.rlhf.completion_log_probs(policy, some)
                        - nf.rlhf.completion_log_probs(reference, some)).sum())
    return total / len(prompts)


def say_ppo(result, speeds):
    best = result["best_of_n"][-1]
    return (f"held-out reward {result['reward_before']:+.2f} -> {result['reward']:+.2f} (best of {best['n']}: "
            f"{best['reward']:+.2f}), the program's score {result['program_before']:.2f} -> {result['program']:.2f} "
            f"({best['program']:.2f}), KL {result['kl']:.1f} nats, coefficient {result['kl_coef']:.3f}; the first "
            f"ratio was exactly 1, the first KL exactly {result['first_kl']:g}")
