"""Stage 1: the corpus, its tokens, and examples cut from it."""
import json

import numpy as np

from numformer.data import TokenShards, write_shard
from numformer.demo.corpus import END, bits_per_byte_of_compressors, described, read_documents, split, train_tokenizer
from numformer.demo.errors import DemoError
from numformer.demo.examples import FUNCTIONS, PARAGRAPHS, cut_functions, cut_paragraphs
from numformer.files import replace_file

__all__ = ["Corpus", "say", "work"]

_ENOUGH = {"train": 32, "held_out": 8}          # functions: with fewer, paragraphs are taken


class Corpus:
    """What stage 1 left on disk.

    Attributes
    ----------
    tokenizer : tokenizers.Tokenizer
    end : int
        The token after a document or completion.
    train, held_out : paths of shards
    kind : str
        FUNCTIONS or PARAGRAPHS.
    examples : dict of lists of (prompt ids, completion ids), "train" and "held_out"
    """

    def __init__(self, run):
        from tokenizers import Tokenizer
        folder = run.folder / "data"
        self.train, self.held_out = folder / "train.npy", folder / "held_out.npy"
        try:
            TokenShards([self.train, self.held_out])
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.tokenizer.encode_special_tokens = True     # which no file keeps
            self.examples = json.loads((folder / "examples.json").read_text())
            self.kind = self.examples.pop("kind")
        except Exception as error:      # tokenizers raises Exception itself
            raise DemoError(f"{folder} is broken ({error}); give another --out", code=1) from None
        self.end = self.tokenizer.token_to_id(END)

    def decode(self, ids):
        """Text of token ids, without the end."""
        return self.tokenizer.decode([i for i in ids if i != self.end])


def work(run):
    from tqdm.auto import tqdm
    folder, plan = run.folder / "data", run.plan
    with tqdm(total=5, desc="1 data: files", unit="part", dynamic_ncols=True, leave=False) as bar:
        documents = read_documents(run.data, plan.train_bytes, run.folder)
        train, held_out = split(documents)
        bar.update()
        bar.set_description_str("1 data: tokenizer")
        tokenizer = train_tokenizer(train, plan.vocab_size)
        bar.update()
        bar.set_description_str("1 data: tokens")
        end = tokenizer.token_to_id(END)
        tokens = {"train": _tokens(tokenizer, train, end), "held_out": _tokens(tokenizer, held_out, end)}
        for name, ids in tokens.items():
            if len(ids) < 4 * (plan.block_size + 1):
                raise DemoError(f"--data: the {name.replace('_', '-')} text has {len(ids)} tokens; at least "
                                f"{4 * (plan.block_size + 1)} are needed")
        bar.update()
        bar.set_description_str("1 data: examples")
        kind, examples = _examples(tokenizer, train, held_out, end, plan)
        bar.update()
        bar.set_description_str("1 data: gzip and xz")
        compressors = bits_per_byte_of_compressors(held_out)
        bar.update()
    # all is well with the data: only now is something written
    for name, ids in tokens.items():
        write_shard(folder / f"{name}.npy", ids)
    replace_file(folder / "tokenizer.json", tokenizer.to_str())
    replace_file(folder / "examples.json", json.dumps({"kind": kind, **examples}))
    size = sum(d.size for d in held_out)
    return {"minutes": plan.minutes, "seed": run.seed, "source": described(run.data),
            "files": len(documents), "train_files": len(train),
            "held_out_files": len(held_out), "train_bytes": sum(d.size for d in train), "held_out_bytes": size,
            "vocabulary": tokenizer.get_vocab_size(), "train_tokens": len(tokens["train"]),
            "held_out_tokens": len(tokens["held_out"]), "bytes_per_token": size / len(tokens["held_out"]),
            "kind": kind, "examples": {name: len(pairs) for name, pairs in examples.items()}, **compressors}, {}


def _tokens(tokenizer, documents, end):
    ids = []
    for encoding in tokenizer.encode_batch([document.text for document in documents]):
        ids += encoding.ids
        ids.append(end)
    return np.array(ids)


def _examples(tokenizer, train, held_out, end, plan):
    for kind, cut in ((FUNCTIONS, cut_functions), (PARAGRAPHS, cut_paragraphs)):
        examples = {}
        for name, documents in (("train", train), ("held_out", held_out)):
            pairs = list(dict.fromkeys(pair for d in documents for pair in cut(d.text)))     # no twins
            encoded = zip(*[tokenizer.encode_batch([pair[i] for pair in pairs]) for i in (0, 1)])
            examples[name] = [(p.ids, [*c.ids, end]) for p, c in encoded
                              if 0 < len(p.ids) <= plan.header_tokens and 0 < len(c.ids) < plan.body_tokens]
        known = {tuple(prompt) for prompt, _ in examples["train"]}
        examples["held_out"] = [pair for pair in examples["held_out"] if tuple(pair[0]) not in known]
        if all(len(examples[name]) >= least for name, least in _ENOUGH.items()):
            return kind, examples
    raise DemoError(f"--data: {len(examples['train'])} paragraphs (between blank lines, six words or more, at most "
                    f"{plan.header_tokens + plan.body_tokens} tokens) in the training text and "
                    f"{len(examples['held_out'])} in the held-out text; {_ENOUGH['train']} and {_ENOUGH['held_out']} "
                    "are needed to align a model")


def say(result, speeds):
    return (f"{result['source']}: {result['train_bytes'] / 1e6:.1f} MB in {result['train_files']} files, "
            f"{result['held_out_bytes'] / 1e3:.0f} KB in {result['held_out_files']} held out; "
            f"{result['vocabulary']} tokens, {result['bytes_per_token']:.2f} bytes each; "
            f"{result['examples']['train']} {result['kind']} to learn from")
