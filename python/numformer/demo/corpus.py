"""The text of a run: files, the held-out split, a byte-level BPE, and what gzip and xz make of the same files."""
import codecs
import gzip
import hashlib
import lzma
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from numformer.demo.errors import DemoError

__all__ = ["END", "Document", "bits_per_byte_of_compressors", "described", "read_documents", "split",
           "train_tokenizer"]

END = "<|end|>"                 # follows every document and every completion
HELD_OUT = 50                   # of 1000 files
LEAST_HELD_OUT = 0.03
LARGEST = 4_000_000             # bytes of one file
LEAST = 20_000                  # bytes in all
_NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """One file: its path below the folder, its text, its bytes, and a number from 0 to 999 that its path decides."""

    path: str
    text: str
    size: int
    number: int


def read_documents(folder, most, without=None):
    """The text files of `folder`, or, where it is None, the interpreter's standard library without its tests.

    Hidden files and folders, links, files that are not UTF-8 or hold a zero byte, and files above 4 MB are left out, as
    is the byte order mark that a file may begin with.
    Where the rest is more than `most` bytes, files are taken in the order of a hash of their paths. Nor is the folder
    `without` read, where a run writes.

    Returns
    -------
    list of Document, sorted by path

    Raises
    ------
    DemoError
        If there is no such folder, or it holds less than 20 KB of text or a single file.
    """
    library = folder is None
    root = Path(sysconfig.get_path("stdlib") if library else folder)
    if not root.is_dir():
        raise DemoError(f"--data {root}: {'not a folder' if root.exists() else 'no such folder'}")
    found, without = [], without and os.path.realpath(without)
    for here, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__"
                            and not (library and f in _NOT_LIBRARY)
                            and os.path.realpath(os.path.join(here, f)) != without)
        found += [Path(here, name) for name in names
                  if not name.startswith(".") and (not library or name.endswith(".py"))]
    # a name may be no UTF-8
    keyed = sorted((hashlib.sha256(path.relative_to(root).as_posix().encode(errors="surrogateescape")).digest(), path)
                   for path in found)
    documents, size = [], 0
    for key, path in keyed:
        data = _read(path)
        if data and size + len(data) <= most:
            size += len(data)
            documents.append(Document(path.relative_to(root).as_posix(), data.decode(), len(data),
                                      int.from_bytes(key, "big") % 1000))
    if size < LEAST or len(documents) < 2:
        raise DemoError(f"--data {root}: {len(documents)} text files of {size:,} bytes; at least 2 files and "
                        f"{LEAST:,} bytes are needed, and links, hidden files, files above "
                        f"{min(LARGEST, most) / 1e6:g} MB and what is not UTF-8 do not count")
    return sorted(documents, key=lambda document: document.path)


def _read(path):
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
            return None
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError:             # not ours to read
        return None
    try:
        data.decode()
    except UnicodeDecodeError:
        return None
    return None if b"\0" in data else data


def split(documents):
    """(train, held-out), by file: held out are those numbered below 50, and more if that is below 3 % of the text."""
    ordered = sorted(documents, key=lambda document: (document.number, document.path))
    total, held, count = sum(d.size for d in documents), 0, 0
    while count < len(ordered) - 1 and (ordered[count].number < HELD_OUT or held < total * LEAST_HELD_OUT):
        held += ordered[count].size
        count += 1
    chosen = {document.path for document in ordered[:count]}
    return [d for d in documents if d.path not in chosen], [d for d in documents if d.path in chosen]


def train_tokenizer(documents, vocab_size):
    """A byte-level BPE: every text has tokens, and they give it back. Token 0 is the end of a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.encode_special_tokens = True         # a text that says <|end|> does not end there
    return tokenizer


def bits_per_byte_of_compressors(documents):
    """Bits a byte of ``gzip -9`` and ``xz -9``: each file by itself, and all of them in one stream."""
    texts = [document.text.encode() for document in documents]
    whole = b"".join(texts)
    bits = 8 / len(whole)
    compressors = {"gzip": lambda data: gzip.compress(data, 9), "xz": lambda data: lzma.compress(data, preset=9)}
    result = {}
    for name, compress in compressors.items():
        result[name] = bits * len(compress(whole))
        result[f"{name}_by_file"] = bits * sum(len(compress(text)) for text in texts)
    return result


def described(folder):
    """What the corpus is, in words."""
    return f"the standard library of Python {sys.version.split()[0]}" if folder is None else str(folder)
