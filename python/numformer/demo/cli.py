"""The command line of the demo, and what becomes of errors: one line on stderr, no traceback."""
import argparse
import errno
import importlib.util
import os
import shlex
import sys

from numformer.demo.errors import DemoError
from numformer.demo.plan import plan_for

__all__ = ["main"]

_DESCRIPTION = """\
From raw text to a small GPT with experts that is pretrained, aligned, pruned, quantized and talking, on two cores.

  1 data       the Python source of this interpreter's standard library (or --data); a byte-level BPE
  2 pretrain   a GPT whose feed-forward layers are mixtures of experts, and its dense twin of equal active parameters
  3 align      fine-tuning on functions, a reward model on pairs that a program judged, PPO with a KL penalty
  4 prune      a fifth of the attention heads, by gradient importance and at random
  5 quantize   to 8 bits, and to 4 bits by round-to-nearest and by GPTQ
  6 generate   the same prompt and seed through every model
"""

_EPILOG = """\
The out folder holds report.html (one page, open it in any browser), metrics.jsonl (every number), timings.jsonl (every
duration), and models/, folders that numformer.models.load opens again.

The same minutes, seed and data give the same bits: how many steps are done is looked up in a table and never depends
on the clock. A run that was stopped, by Ctrl-C or a kill at any moment, goes on with --resume and ends with the bits of
one that was not.

Exit codes: 0 all is well; 1 something went wrong on the way (a full disk, a broken checkpoint); 2 the command cannot be
carried out as given; 130 Ctrl-C.
"""


def _parser():
    parser = argparse.ArgumentParser("python -m numformer.demo", description=_DESCRIPTION, epilog=_EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, metavar="N",
                        help="how long the run is on two cores, 0 to 60; every stage is scaled (default: 6; 1 is a "
                             "smoke run; 0 does a few steps of everything with a toy, for tests)")
    parser.add_argument("--out", metavar="FOLDER", default="out", help="a folder that is new or empty (default: out)")
    parser.add_argument("--data", metavar="FOLDER", help="any folder of text or code, in place of the standard library")
    parser.add_argument("--seed", type=int, metavar="N", help="of all that is random (default: 0)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out after it was stopped, with the options it began with")
    return parser


def main(arguments=None):
    """Run the demo; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    missing = [name for name in ("tokenizers", "safetensors", "tqdm", "matplotlib")
               if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
                     "pip install 'numformer[demo]'", 2)
    try:
        # after the check: it imports them
        from numformer.demo.run import Run
        from numformer.demo.stages import go
        if options.seed is not None and options.seed < 0:
            raise DemoError(f"--seed must be 0 or more, got {options.seed}")
        for name, folder in (("out", options.out), ("data", options.data)):
            _check_name(name, folder)
        if options.minutes is not None:
            plan_for(options.minutes)
        data = None if options.data is None else os.path.abspath(options.data)
        if options.resume:
            run = Run.resume(options.out, plan_for, minutes=options.minutes, seed=options.seed, data=data)
        else:
            run = Run.begin(options.out, plan_for(6 if options.minutes is None else options.minutes),
                            options.seed or 0, data)
        go(run)
    except DemoError as error:
        return _fail(error, error.code)
    except KeyboardInterrupt:
        if not os.path.exists(os.path.join(options.out, "run.json")):
            return _fail("stopped before anything was begun", 130)
        return _fail(f"stopped; {_to_go_on(options.out)}", 130)
    except MemoryError:
        return _fail("out of memory", 1)
    except BrokenPipeError:
        return _fail(f"stopped, as nobody reads what it says; {_to_go_on(options.out)}", 1)
    except OSError as error:
        full = " (make room, then go on with --resume)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        where = f"{error.filename}: " if error.filename else f"writing to {options.out}: "
        return _fail(f"{where}{error.strerror or error}{full}", 1)
    return 0


def _check_name(name, folder):
    """DemoError for a folder that is no name, or none that can be written in the report."""
    if folder == "":
        raise DemoError(f"--{name} is empty; give a folder")
    try:
        (folder or "").encode()
    except UnicodeEncodeError:
        raise DemoError(f"--{name} {folder!r} is a name that is no UTF-8; give the folder another, or a link to it") \
            from None


def _to_go_on(folder):
    return f"to go on: python -m numformer.demo --resume --out {shlex.quote(folder)}"


def _fail(message, code):
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"\nnumformer.demo: {message}\n")):
        try:
            print(text, end="", file=stream, flush=True)
        except BrokenPipeError:         # what is left of it must not be tried again when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code
