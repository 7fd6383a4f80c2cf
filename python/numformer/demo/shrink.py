"""Stages 4 and 5: fewer heads, fewer bits."""
import time

import numpy as np

import numformer as nf
from numformer import compress
from numformer.data import Batches
from numformer.demo.data import Corpus
from numformer.demo.pretrain import Held, evaluate, load, save

__all__ = ["decode_speed", "measure", "say_prune", "say_quantize", "work_prune", "work_quantize"]

FRACTION = 0.2          # of the heads
DRAWS = 3               # of random heads to compare with


def measure(run, corpus, model):
    """Held-out loss (nats a token), bits a byte and accuracy of a model, on the windows of all comparisons."""
    held = Held(run, corpus, run.plan.probe_windows)
    found = evaluate(model, held.windows)
    return {"loss": found["loss"], "accuracy": found["accuracy"], "bits_per_byte": held.bits_per_byte(found["loss"])}


def decode_speed(run, model, tries=3):
    """Tokens a second of one sequence with its cache, the best of some tries."""
    count, best = run.plan.decode_tokens, 0.0
    for _ in range(tries):
        begin = time.perf_counter()
        model.generate([0], count, temperature=0)
        best = max(best, count / (time.perf_counter() - begin))
    return best


def size_of(run, name):
    """Bytes of a model's weights on disk."""
    return (run.model(name) / "model.safetensors").stat().st_size


def calibration(run, corpus):
    """Batches of training text that importance and GPTQ look at."""
    batches = Batches(corpus.train, 8, run.plan.block_size, seed=run.seed + 1)
    return [next(batches) for _ in range(-(-run.plan.calibration // 8))]


# Heads


def work_prune(run):
    from tqdm.auto import tqdm
    corpus = Corpus(run)
    model = load(run, "ppo")
    with tqdm(total=DRAWS + 3, desc="4 prune", unit="model", dynamic_ncols=True, leave=False) as bar:
        before = measure(run, corpus, model)
        bar.update()
        importance = compress.head_importance(model, calibration(run, corpus))
        bar.update()
        small = compress.prune_heads(model, fraction=FRACTION, importance=importance)
        save(run, small, "pruned")
        after = measure(run, corpus, small)
        bar.update()
        random = []
        for draw in range(DRAWS):
            other = compress.prune_heads(model, fraction=FRACTION, rng=run.rng("random heads", str(draw)))
            random.append(measure(run, corpus, other))
            bar.update()
    heads = [sum(block.attention.n_head for block in m.blocks) for m in (model, small)]
    count = [sum(p.size for p in m.parameters()) for m in (model, small)]
    return {"heads_before": heads[0], "heads": heads[1], "layer_heads": small.config.layer_heads,
            "importance": importance, "parameters_before": count[0], "parameters": count[1],
            "bytes": size_of(run, "pruned"), "before": before, "after": after, "random": random}, {}


def say_prune(result, speeds):
    gone = result["heads_before"] - result["heads"]
    before, after = result["before"], result["after"]
    random = {name: np.mean([draw[name] for draw in result["random"]]) for name in ("loss", "accuracy")}
    return (f"{gone} of {result['heads_before']} heads by gradient: held-out loss {before['loss']:.3f} -> "
            f"{after['loss']:.3f}, accuracy {100 * before['accuracy']:.1f} -> {100 * after['accuracy']:.1f} %; as many "
            f"at random: {random['loss']:.3f}, {100 * random['accuracy']:.1f} %; "
            f"{result['parameters_before']:,} -> {result['parameters']:,} parameters")


# Bits

KINDS = {"int8": ("INT8", 8, None, "rtn"), "int4-rtn": ("4 bits, round to nearest", 4, 64, "rtn"),
         "int4-gptq": ("4 bits, GPTQ", 4, 64, "gptq")}


def work_quantize(run):
    from tqdm.auto import tqdm
    corpus = Corpus(run)
    small = load(run, "pruned")
    held = Held(run, corpus, run.plan.probe_windows).windows[:run.plan.calibration]
    batches, held_out = calibration(run, corpus), [(held[:, :-1],)]
    models, speeds = [], {}
    with tqdm(total=2 * len(KINDS) + 1, desc="5 quantize", unit="part", dynamic_ncols=True, leave=False) as bar:
        speeds["pruned"] = decode_speed(run, small)
        bar.update()
        for name, (label, bits, group, method) in KINDS.items():
            spec = nf.quant.QuantSpec(bits=bits, group_size=group)
            model, report = compress.quantize_model(small, spec, method, batches, held_out=held_out)
            save(run, model, name)
            bar.update()
            model = load(run, name)             # what is measured is what was saved
            speeds[name] = decode_speed(run, model)
            outputs = [layer.output_error for layer in report.layers if layer.output_error is not None]
            models.append({"name": name, "label": label, "bits_per_weight": report.bits_per_weight,
                           "bytes": size_of(run, name), "weight_bytes": sum(r.nbytes for r in report.layers),
                           "weight_error": np.mean([layer.weight_error for layer in report.layers]),
                           "output_error": np.mean(outputs), **measure(run, corpus, model)})
            bar.update()
    return ({"bytes_before": size_of(run, "pruned"), "before": run.results["prune"]["after"], "models": models},
            {"tokens_per_second": speeds})


def say_quantize(result, speeds):
    speed = speeds["tokens_per_second"]
    parts = [f"32 bits: loss {result['before']['loss']:.3f}, {result['bytes_before'] / 1e6:.1f} MB, "
             f"{speed['pruned']:,.0f} tokens/s"]
    parts += [f"{m['label']}: {m['loss']:.3f}, {m['bytes'] / 1e6:.1f} MB, error of weights "
              f"{100 * m['weight_error']:.1f} %, of outputs {100 * m['output_error']:.1f} %, {speed[m['name']]:,.0f} "
              "tokens/s" for m in result["models"]]
    return ("\n" + " " * 21).join(parts)


def pruned_heads(model, small):
    """The heads of each layer of `model` that `small` lacks."""
    gone = []
    for whole, left in zip(model.blocks, small.blocks):
        a, b = whole.attention, left.attention
        parts = a.qkv.data[:a.n_head * a.head_dim].reshape(a.n_head, a.head_dim, -1)
        kept = b.qkv.data[:b.n_head * b.head_dim].reshape(b.n_head, b.head_dim, -1)
        gone.append([head for head in range(a.n_head) if not any(np.array_equal(parts[head], k) for k in kept)])
    return gone
