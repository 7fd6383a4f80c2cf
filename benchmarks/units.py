"""How rates are written: 54.3 GFLOP/s, 1.69 G elements/s, 2,232 tokens/s; and kinds of machines: avx2-amd-25."""
import re

SYMBOLS = ("FLOP", "OP", "B")       # operations on floats and on integers, bytes: their prefix has no space behind


def amount(rate, unit):
    """`rate` of `unit` (one of SYMBOLS, or a plural) a second, as text."""
    for size, prefix in (1e9, "G"), (1e6, "M"):
        if rate >= size:
            return f"{rate / size:.3g} {prefix}{'' if unit in SYMBOLS else ' '}{unit}/s"
    return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.2g} {unit}/s"


def kind_of(machine):
    """The kind of a machine as results describe it: level of instructions, its processor's maker and family."""
    maker = re.match("[A-Za-z0-9]+", machine["processor"])[0].lower()
    return "-".join(str(part) for part in (machine["isa"], maker, machine["family"]) if part is not None)
