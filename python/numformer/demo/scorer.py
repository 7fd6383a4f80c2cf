"""The program that judges a completion, from 0 to 1: no person was asked.

    a function      ends by itself  x  (1/2 parses + 1/2 share of its arguments that it reads)  x  share not repeated
    a paragraph     ends by itself  x  share of its brackets and quotes that close  x  share not repeated

Where a function does not parse, an argument counts as read if its name occurs. So there is a slope to climb from a
model whose samples hardly ever parse, and no single trick wins: an empty body reads no argument, a long one repeats
itself.
"""
import ast
import re

from numformer.demo.examples import FUNCTIONS, named_arguments, parse

__all__ = ["closed", "distinct", "score", "worth"]

_CLOSES = {")": "(", "]": "[", "}": "{"}


def score(kind, prompt, completion, ended):
    """The score of a completion of `kind` FUNCTIONS or PARAGRAPHS; `ended` tells whether it ended by itself."""
    if not ended or not completion.strip():
        return 0.0
    part = worth(prompt, completion) if kind == FUNCTIONS else closed(completion)
    return part * distinct(completion)


def worth(header, body):
    """Half for parsing as one function, half for the share of its arguments that it reads."""
    try:
        tree = parse(header + body).body
        parses = len(tree) == 1 and isinstance(tree[0], ast.FunctionDef)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        parses = False
    if parses:
        names = named_arguments(tree[0])
        read = {node.id for statement in tree[0].body for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    else:
        names, read = _names(header), set(re.findall(r"[^\W\d]\w*", body))
    used = sum(name in read for name in names) / len(names) if names else 0.0
    return (parses + used) / 2


def _names(header):
    """The arguments of a header that itself parses; none of one that does not."""
    try:
        return named_arguments(parse(header + "    pass\n").body[0])
    except (SyntaxError, ValueError, IndexError, AttributeError):
        return []


def distinct(text, span=4):
    """The share of its runs of `span` words and signs that come only once; 1 for a text of fewer."""
    pieces = re.findall(r"\w+|[^\w\s]", text)
    runs = [tuple(pieces[i:i + span]) for i in range(len(pieces) - span + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def closed(text):
    """The share of brackets and double quotes that have their counterpart."""
    stack, wrong, signs = [], 0, 0
    for sign in re.findall(r'[()\[\]{}"]', text):
        signs += 1
        opener = '"' if sign == '"' and '"' in stack else _CLOSES.get(sign)
        if opener is None:
            stack.append(sign)
        elif opener in stack:
            while stack[-1] != opener:
                stack.pop()
                wrong += 1
            stack.pop()
        else:
            wrong += 1
    return 1 - (wrong + len(stack)) / signs if signs else 1.0
