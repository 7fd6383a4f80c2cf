"""Builds numformer._core: every family of kernels once per instruction set, and the rest around them.

Objects are compiled side by side and kept under build/: a file is compiled again only when it, or
something that it includes, is newer. Environment:

NUMFORMER_SANITIZE=1    AddressSanitizer and UndefinedBehaviorSanitizer, at -O1, and of the instruction sets
                        only those that this machine has and tests can run
NUMFORMER_EMULATE=1     for tests on a processor that has AVX2 but not AVX-512: the kernels of AVX-512
                        with SIMDe's bodies of its intrinsics (Debian: libsimde-dev)
NUMFORMER_WERROR=1      a warning is an error (CI)
"""
import glob
import os
import platform
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno",
         "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
LINK = ["-fopenmp"]
if os.environ.get("NUMFORMER_SANITIZE"):
    # -O1 would leave products and sums apart that are one rounding elsewhere.
    FLAGS += ["-O1", "-fexpensive-optimizations", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
              "-fno-omit-frame-pointer", "-g1"]
    LINK += ["-fsanitize=address,undefined"]

COMPILER = os.environ.get("CC", sysconfig.get_config_var("CC")).split()
TARGET = subprocess.run([*COMPILER, "-dumpmachine"], capture_output=True, text=True, check=True).stdout

# An instruction set: a probe in core/cpu.c, a vec_<isa>.h and an isa_<isa>.c in isa/, a line here.
ISA_FLAGS = {"baseline": []}
if TARGET.startswith("x86_64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    if os.environ.get("NUMFORMER_EMULATE"):
        FLAGS += ["-DNF_EMULATE"]
        ISA_FLAGS["avx512"] = ISA_FLAGS["avx512vnni"] = [*ISA_FLAGS.pop("avx2"), "-O1", "-Wno-psabi"]
    elif not os.environ.get("NUMFORMER_SANITIZE") or "avx512_vnni" in open("/proc/cpuinfo").read():
        ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
                               "-mprefer-vector-width=512"]
        ISA_FLAGS["avx512vnni"] = [*ISA_FLAGS["avx512"], "-mavx512vnni"]


def families(macro):
    """The families that kernels/kernels.h lists under `macro`."""
    with open("csrc/kernels/kernels.h") as file:
        text = file.read().replace("\\\n", " ")
    return re.findall(r"F\((\w+), isa\)", re.search(rf"#define {macro}\(F, isa\)(.*)", text).group(1))


def compilations():
    """(source, object, flags) of everything."""
    for source in glob.glob("csrc/core/*.c") + glob.glob("csrc/ops/*.c") + glob.glob("csrc/bind/*.c"):
        yield source, source[:-2] + ".o", [f"-DNF_HAVE_{isa.upper()}" for isa in ISA_FLAGS]
    for isa, flags in ISA_FLAGS.items():
        for family in families("NF_VNNI_FAMILIES" if isa == "avx512vnni" else "NF_FAMILIES"):
            source = f"csrc/isa/isa_{isa}.c"
            yield source, f"csrc/isa/{isa}_{family}.o", [
                *flags, f"-DNF_FAMILY={family}", f'-DNF_TEMPLATES="kernels/{family}.inc"']


def is_current(target, command):
    """Whether `target` is newer than all it was made from, and made by the same command."""
    try:
        with open(target + ".d") as file:
            needs = file.read().replace("\\\n", " ").split(":", 1)[1].split()
        with open(target + ".cmd") as file:
            made_by = file.read()
        if made_by not in (command, f"{command} -Werror"):      # what had no warnings serves those who bear them
            return False
        made = os.path.getmtime(target)
        return all(os.path.getmtime(need) <= made for need in needs)
    except (OSError, IndexError):
        return False


class Build(build_ext):
    def run(self):
        if self.editable_mode:      # setuptools' own folder is gone afterwards
            self.build_temp = "build/objects"
        super().run()

    def build_extension(self, extension):
        include = ["-Icsrc", f"-I{numpy.get_include()}", f"-I{sysconfig.get_path('include')}",
                   "-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION", "-DNPY_TARGET_VERSION=NPY_2_0_API_VERSION"]

        def compile_one(job):
            source, target, flags = job
            target = os.path.join(self.build_temp, target)
            command = [*COMPILER, *FLAGS, *include, *flags, "-MMD", "-MF", target + ".d", "-c", source, "-o", target]
            if os.environ.get("NUMFORMER_WERROR"):
                command += ["-Werror"]
            if self.force or not is_current(target, " ".join(command)):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                print(f"{source} -> {target}", flush=True)
                subprocess.run(command, check=True)
                with open(target + ".cmd", "w") as file:
                    file.write(" ".join(command))
            return target

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
            # Attention's kernels take longest, so they begin.
            objects = list(pool.map(compile_one, sorted(compilations(), key=lambda job: "attention" not in job[1])))
        output = self.get_ext_fullpath(extension.name)
        os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-shared"]
        subprocess.run([*COMPILER, *shared, *objects, *LINK, "-lm", "-lpthread", "-o", output + ".new"], check=True)
        os.replace(output + ".new", output)     # a process that has the old one mapped keeps it


setup(ext_modules=[Extension("numformer._core", sources=[])], package_dir={"": "python"}, cmdclass={"build_ext": Build})
