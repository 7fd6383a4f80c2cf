"""Prompts with completions cut from the corpus: functions of Python, or paragraphs where there are too few of them."""
import ast
import io
import re
import textwrap
import warnings

__all__ = ["FUNCTIONS", "PARAGRAPHS", "cut_functions", "cut_paragraphs", "named_arguments", "parse"]

FUNCTIONS, PARAGRAPHS = "functions", "paragraphs"


def parse(text):
    """The tree of a Python source, without the compiler's advice on it: a model's samples need much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def named_arguments(function):
    """The names of the arguments of an ast function, without self and cls."""
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [x.arg for x in every if x.arg not in ("self", "cls")]


def cut_functions(text):
    """(header, body) of the functions in a Python source that have an argument other than self.

    The header ends with the line break before the body; both are moved to the left margin. A docstring is no part of
    the body. Functions on one line, and sources that do not parse, give nothing.
    """
    try:
        tree = parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines = list(io.StringIO(text, newline=""))        # as the tree counts them: a form feed ends none
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not named_arguments(node):
            continue
        documented = ast.get_docstring(node, clean=False) is not None
        body = node.body[1:] if documented else node.body
        if not body:
            continue
        head_end = node.body[0].lineno - 1
        body_start = body[0].lineno - 1 if documented else head_end
        if head_end < node.lineno or body_start >= node.end_lineno:
            continue
        header = "".join(lines[node.lineno - 1:head_end])
        inner = "".join(lines[body_start:node.end_lineno])
        margin = " " * node.col_offset
        header, inner = textwrap.dedent(header), textwrap.dedent(inner)
        # only "def", its arguments and a colon: no comments between header and body
        if not header.startswith("def ") or not header.rstrip().endswith(":") or margin.strip():
            continue
        body_text = re.sub(r"^(?=.*\S)", "    ", inner, flags=re.MULTILINE).rstrip() + "\n"
        try:
            parse(header + body_text)
        except (SyntaxError, ValueError):
            continue
        found.append((header, body_text))
    return found


def cut_paragraphs(text):
    """(beginning, rest) of the paragraphs of a text: the first third of its words, at least two, and the others."""
    found = []
    for paragraph in re.split(r"\n\r?\n", text):       # lines may end as those of Windows do
        paragraph = paragraph.strip("\r\n")
        words = paragraph.split(" ")
        count = max(len(words) // 3, 2)
        if len(words) >= 6:
            found.append((" ".join(words[:count]), " " + " ".join(words[count:])))
    return found
