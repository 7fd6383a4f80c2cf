"""The program that judges a completion, from 0 to 1: no person was asked.

    a function      ends by itself and parses  x  share of its arguments that it uses  x  share that is not repeated
    a paragraph     ends by itself  x  share of its brackets and quotes that close  x  share that is not repeated

A product, so that no part makes up for another: an empty body uses no argument, a long one repeats itself.
"""
import ast
import re

from numformer.demo.examples import FUNCTIONS, named_arguments

__all__ = ["closed", "distinct", "score", "used_arguments"]

_CLOSES = {")": "(", "]": "[", "}": "{"}


def score(kind, prompt, completion, ended):
    """The score of a completion of `kind` FUNCTIONS or PARAGRAPHS; `ended` tells whether it ended by itself."""
    if not ended or not completion.strip():
        return 0.0
    if kind == FUNCTIONS:
        return used_arguments(prompt + completion) * distinct(completion)
    return closed(completion) * distinct(completion)


def used_arguments(source):
    """The share of a function's arguments that its body reads; 0 unless `source` parses as that function alone."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        return 0.0
    names = named_arguments(body[0])
    read = {node.id for statement in body[0].body for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return sum(name in read for name in names) / len(names) if names else 0.0


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
