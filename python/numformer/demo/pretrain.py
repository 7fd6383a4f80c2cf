"""Stage 2: a GPT with experts, and its dense twin in which a token passes through as many parameters."""
import functools
import math

import numpy as np

import numformer as nf
from numformer.data import Batches, TokenShards
from numformer.demo.data import Corpus
from numformer.demo.errors import DemoError
from numformer.files import replace_file
from numformer.nn.layers import project
from numformer.train import AdamW, Trainer, warmup_cosine

__all__ = ["Held", "config_of", "evaluate", "load", "save", "say", "train", "work_dense", "work_experts"]


class Held:
    """Windows of held-out text, and what a loss on them is in bits a byte."""

    def __init__(self, run, corpus, count):
        shards = TokenShards(corpus.held_out)
        block = run.plan.block_size
        batches = Batches(shards, 1, block)
        count = min(count, batches.windows)
        chosen = np.linspace(0, batches.windows - 1, count).astype(int)         # evenly over all files
        self.windows = np.array([batches.window(i) for i in chosen], np.int64)
        self.bits = run.results["data"]["held_out_tokens"] / run.results["data"]["held_out_bytes"] / math.log(2)

    def bits_per_byte(self, loss):
        """Of a loss in nats a token."""
        return loss * self.bits


def evaluate(model, windows, batch=8, progress=None):
    """What a model makes of windows (count, block + 1): {"loss" (nats a token), "accuracy", "load" (layers, experts)}.

    `load` is missing for a dense model.
    """
    model = model.as_arrays()
    loss = right = 0
    load = None
    for begin in range(0, len(windows), batch):
        tokens, targets = windows[begin:begin + batch, :-1], windows[begin:begin + batch, 1:]
        hidden = model.hidden(tokens)
        logits = project(hidden.reshape(-1, hidden.shape[-1]), model.output_weight)
        loss += float(nf.cross_entropy(logits, targets.reshape(-1), reduction="sum"))
        right += int((logits.argmax(-1) == targets.reshape(-1)).sum())
        routings = model.routings()
        if routings:
            counts = np.array([routing.counts for routing in routings])
            load = counts if load is None else load + counts
        if progress is not None:
            progress(len(tokens))
    total = windows.shape[0] * (windows.shape[1] - 1)
    result = {"loss": loss / total, "accuracy": right / total}
    return result if load is None else result | {"load": load / load.sum(1, keepdims=True)}


def config_of(run, experts):
    """The configuration of the model with experts, or of its twin."""
    plan = run.plan
    return nf.models.GPTConfig(vocab_size=run.results["data"]["vocabulary"], block_size=plan.block_size,
                               n_layer=plan.n_layer, n_head=plan.n_head, n_embd=plan.n_embd, n_inner=plan.n_inner,
                               n_expert=plan.n_expert if experts else 0)


def save(run, model, name):
    """A model as a folder, with the tokenizer in it."""
    folder = run.model(name)
    model.save_pretrained(folder)
    replace_file(folder / "tokenizer.json", (run.folder / "data" / "tokenizer.json").read_bytes())


def load(run, name):
    """What :func:`save` wrote."""
    try:
        return nf.models.load(run.model(name))
    except (OSError, ValueError) as error:
        raise DemoError(f"{error}; give another --out", code=1) from None


def train(run, model, batches, *, lr, steps, warmup, progress, look=None, every=25):
    """Train in the stage under way, from its checkpoint where there is one; every step is a line of metrics.

    ``look(step)`` gives more for the line of a step, or None.
    """
    stage = run.stage
    trainer = Trainer(model, batches, AdamW(model.parameters(), lr), steps,
                      schedule=functools.partial(warmup_cosine, lr=lr, warmup=warmup, total=steps, min_lr=lr / 30),
                      checkpoint=run.checkpoint(stage), every=every, progress=progress)
    if trainer.checkpoint.exists():
        try:
            trainer.resume()
        except ValueError as error:
            raise DemoError(f"{error}; remove it and go on with --resume", code=1) from None
        run.begin_stage(stage, trainer.done)
    seconds = sum(line["seconds"] for line in run.times[stage])

    def note(step, metrics):
        nonlocal seconds
        seconds += metrics["seconds"]
        if not math.isfinite(metrics["loss"]):
            raise DemoError(f"{stage}: the loss of step {step} is {metrics['loss']}; try another --seed", code=1)
        line = {name: metrics[name] for name in ("loss", "lr", "grad_norm", "tokens")}
        run.write(step, line | ((look and look(step)) or {}), metrics["seconds"])

    trainer.callbacks.append(note)
    trainer.run()
    return seconds


def work_experts(run):
    return _work(run, "experts", experts=True)


def work_dense(run):
    return _work(run, "dense", experts=False)


def _work(run, name, experts):
    from tqdm.auto import tqdm
    plan, corpus = run.plan, Corpus(run)
    model = nf.models.GPT(config_of(run, experts), rng=run.rng("weights", name))
    held = Held(run, corpus, plan.probe_windows)
    looks = set(np.linspace(0, plan.steps, plan.evaluations + 1).astype(int)[1:] - 1)

    def look(step):
        if step not in looks:
            return None
        found = evaluate(model, held.windows)
        return {"held_out_" + key: value for key, value in found.items()} | {
            "bits_per_byte": held.bits_per_byte(found["loss"])}

    batches = Batches(corpus.train, plan.batch, plan.block_size, seed=run.seed)
    seconds = train(run, model, batches, lr=plan.lr, steps=plan.steps, warmup=plan.warmup, look=look,
                    progress=f"2 pretrain, {name}")
    save(run, model.eval(), f"pretrained-{name}")
    test = Held(run, corpus, plan.test_windows)
    with tqdm(total=len(test.windows), desc=f"2 held-out text, {name}", unit="window", dynamic_ncols=True,
              leave=False) as bar:
        found = evaluate(model, test.windows, progress=bar.update)
    active = sum(p.size for p in model.parameters())
    if experts:     # of the experts' weights a token meets top_k / n_expert
        of_experts = sum(b.mlp.up.size + b.mlp.down.size for b in model.blocks)
        active -= of_experts - of_experts * model.config.top_k // model.config.n_expert
    tokens = plan.steps * plan.batch * plan.block_size
    data = run.results["data"]
    return ({"model": name, "parameters": sum(p.size for p in model.parameters()), "active_parameters": active,
             "steps": plan.steps, "tokens": tokens, "bits_per_byte": test.bits_per_byte(found["loss"]),
             "windows": len(test.windows), **found, "gzip": data["gzip"], "xz": data["xz"]},
            {"tokens_per_second": tokens / seconds})


def say(result, speeds):
    largest = f", largest expert load {np.max(result['load']):.2f}" if "load" in result else ""
    return (f"{result['bits_per_byte']:.3f} bits a byte on held-out files (gzip -9 {result['gzip']:.2f}, xz -9 "
            f"{result['xz']:.2f}) after {result['steps']} steps; {result['active_parameters'] / 1e6:.2f} of "
            f"{result['parameters'] / 1e6:.2f} M parameters active{largest}; "
            f"{speeds['tokens_per_second']:,.0f} tokens/s")
