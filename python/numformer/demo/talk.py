"""Stage 6: the same prompt and seed through every model; and what their heads look at."""
import re

import numpy as np

from numformer.demo.data import Corpus
from numformer.demo.examples import FUNCTIONS
from numformer.demo.pretrain import load
from numformer.demo.scorer import score
from numformer.demo.shrink import decode_speed, measure, size_of

__all__ = ["MODELS", "attention_maps", "say", "shown", "work"]

MODELS = {"pretrained-dense": "dense twin", "pretrained-experts": "pretrained", "sft": "fine-tuned", "ppo": "after PPO",
          "pruned": "pruned", "int8": "INT8", "int4-rtn": "4 bits, rounded", "int4-gptq": "4 bits, GPTQ"}
PROMPTS = ["def read_lines(path, encoding):\n", "def add(self, key, value):\n", "def is_valid(name):\n"]


def work(run):
    from tqdm.auto import tqdm
    plan, corpus = run.plan, Corpus(run)
    if corpus.kind == FUNCTIONS:
        prompts = PROMPTS
    else:
        prompts = [corpus.decode(ids) for ids, _ in corpus.examples["held_out"][:3]]
    known = {"ppo": run.results["prune"]["before"], "pruned": run.results["prune"]["after"],
             **{m["name"]: m for m in run.results["quantize"]["models"]}}
    models, tokens_per_second = [], {}
    with tqdm(total=len(MODELS), desc="6 generate", unit="model", dynamic_ncols=True, leave=False) as bar:
        for name in MODELS:
            model = load(run, name)
            samples = []
            for i, prompt in enumerate(prompts):
                ids = corpus.tokenizer.encode(prompt).ids
                row = model.generate(ids, min(plan.body_tokens, plan.block_size - len(ids)), temperature=0.7, top_p=0.9,
                                     eos_id=corpus.end, rng=run.rng("talk", str(i)))
                text = corpus.decode(row[len(ids):])
                samples.append({"prompt": prompt, "text": text,
                                "score": score(corpus.kind, prompt, text, row[-1] == corpus.end)})
            found = known.get(name) or measure(run, corpus, model)
            models.append({"name": name, "bytes": size_of(run, name), "samples": samples,
                           **{key: found[key] for key in ("loss", "accuracy", "bits_per_byte")}})
            tokens_per_second[name] = run.speeds["quantize"]["tokens_per_second"].get(name) or decode_speed(run, model)
            bar.update()
    return {"prompts": prompts, "models": models}, {"tokens_per_second": tokens_per_second}


def say(result, speeds):
    sample = next(m for m in result["models"] if m["name"] == "int4-gptq")["samples"][0]
    text = (sample["prompt"] + sample["text"]).rstrip().replace("\n", "\n" + " " * 23)
    return f"the model of 4 bits says\n\n{' ' * 23}{text}\n"


def shown(text):
    """`text` without the control signs that a model may say, which a terminal obeys and HTML forbids."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)", "\N{REPLACEMENT CHARACTER}", text)


def attention_maps(model, tokens):
    """Where each head looks: a list over layers of (heads, S, S), for `tokens` of length S."""
    model = model.as_arrays()
    x, rotary = model.enter(np.asarray(tokens)[None])
    maps = []
    for layer, block in enumerate(model.blocks):
        maps.append(block.attention.maps(block.norm_1(x), rotary)[0])
        x = block(x, rotary, None, layer)
    return maps
