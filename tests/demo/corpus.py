"""A small folder of Python source for the demo's tests, and the demo as a process."""
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = ("asyncio", "concurrent", "email", "http", "json", "logging", "unittest", "urllib")


def make(folder):
    """Copy some packages of the standard library to `folder`."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in PACKAGES:
        shutil.copytree(library / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def demo(*arguments, **options):
    """The demo in a process of its own: a Popen with the texts of both streams."""
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-m", "numformer.demo", *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(*arguments, **options):
    """Run the demo to its end: (exit code, stdout, stderr)."""
    process = demo(*arguments, **options)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error
