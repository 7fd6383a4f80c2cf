"""Threads, levels, memory: what lies under every op."""
import os
import subprocess
import sys

import numpy as np
import pytest

import numformer as nf
from numformer import _core
from tests.conftest import LEVELS


def run(code, **environment):
    """stdout of a fresh interpreter."""
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_the_environment_caps_the_level():
    code = "from numformer import _core; print(_core.get_isa())"
    assert run(code, NUMFORMER_ISA="baseline") == "baseline"
    best = LEVELS.index(_core.cpu_isa)
    assert run(code, NUMFORMER_ISA="avx2") == LEVELS[min(best, 1)]


def test_an_unknown_level_is_an_error_that_names_the_choices():
    said = run("import numformer", NUMFORMER_ISA="sse9")
    assert "baseline, avx2, avx512, avx512vnni" in said and "sse9" in said


def test_the_number_of_threads_is_what_was_set_or_what_openmp_says(threads):
    threads(3)
    assert nf.get_num_threads() == 3
    assert run("import numformer as nf; print(nf.get_num_threads())", OMP_NUM_THREADS="5") == "5"
    nf.set_num_threads(n=2)
    assert nf.get_num_threads() == 2
    for wrong in (0, -1, 5000, 2**70):
        with pytest.raises(ValueError, match=f"1 to 4096 threads, got {wrong}"):
            nf.set_num_threads(wrong)
    for wrong in (1.5, "2", None):
        with pytest.raises(TypeError, match=f"set_num_threads: n must be an integer, got {wrong!r}"):
            nf.set_num_threads(wrong)
    assert nf.get_num_threads() == 2


def test_waiting_threads_spin_briefly_unless_the_user_decides():
    code = "import os, numformer; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run(code, GOMP_SPINCOUNT="77") == "77"
    unset = "import os; os.environ.pop('GOMP_SPINCOUNT', 0); os.environ.pop('OMP_WAIT_POLICY', 0); "
    assert run(unset + code) == "10000"
    assert run(unset + "os.environ['OMP_WAIT_POLICY'] = 'active'; " + code) == "None"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_helping_threads_keep_off_their_callers_cpu_and_leave_the_caller_alone():
    code = ("import os, numpy as np, numformer as nf\n"
            "all, x = os.sched_getaffinity(0), np.ones(1 << 20, np.float32)\n"
            "nf.gelu(x)\n"
            "helpers = [os.sched_getaffinity(int(t)) for t in os.listdir('/proc/self/task') if int(t) != os.getpid()]\n"
            "print(os.sched_getaffinity(0) == all, sum(len(all - cpus) == 1 for cpus in helpers))")
    alone = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    assert run(code, **alone, OMP_PROC_BIND="false") == "True 1"
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert run(one + code, **alone, OMP_PROC_BIND="false") == "True 0"          # nowhere to go


def test_threadpoolctl_sets_the_number_of_threads():
    pytest.importorskip("threadpoolctl")
    code = ("import numformer as nf, threadpoolctl\n"
            "with threadpoolctl.threadpool_limits(1, user_api='openmp'): print(nf.get_num_threads())")
    assert run(code, OMP_NUM_THREADS="2") == "1"


def test_a_forked_child_computes_the_same_bits():
    code = ("import os, warnings, numpy as np, numformer as nf\n"
            "warnings.simplefilter('ignore')\n"
            "x = np.linspace(-3, 3, 1 << 20, dtype=np.float32)\n"
            "y = nf.gelu(x)\n"
            "child = os.fork()\n"
            "if child == 0: os._exit(0 if nf.gelu(x).tobytes() == y.tobytes() else 1)\n"
            "print(os.waitpid(child, 0)[1])")
    assert run(code) == "0"


def test_a_freed_result_is_used_again_and_given_back_on_request():
    x = np.ones(1 << 20, np.float32)
    nf.gelu(x)
    before = nf.memory_stats()
    address = nf.gelu(x).__array_interface__["data"][0]
    again = nf.gelu(x)
    assert nf.memory_stats()["reused"] > before["reused"] or nf.memory_stats()["kept"] == 0
    assert again.__array_interface__["data"][0] == address or nf.memory_stats()["kept"] == 0
    assert address % 64 == 0
    del again
    nf.empty_cache()
    assert nf.memory_stats()["kept"] == 0


def test_what_is_in_use_counts_the_results_that_live():
    before = nf.memory_stats()["in_use"]
    y = nf.gelu(np.ones(1 << 20, np.float32))
    assert nf.memory_stats()["in_use"] >= before + y.nbytes
    del y
    assert nf.memory_stats()["in_use"] == before


def test_results_behave_as_any_array():
    y = nf.gelu(np.ones(1 << 18, np.float32))
    assert y.flags.owndata
    y.resize(1 << 19, refcheck=False)
    assert (y[: 1 << 18] == y[0]).all() and not y[1 << 18:].any()


def test_the_configuration_says_why_a_level_is_not_used():
    code = "import numformer as nf; print(nf.show_config('dict')['kernels'])"
    said = run(code, NUMFORMER_ISA="baseline")
    assert said.startswith("baseline") and (_core.cpu_isa == "baseline" or "NUMFORMER_ISA=baseline" in said)
    with pytest.raises(ValueError, match="mode"):
        nf.show_config("html")


def test_the_import_brings_nothing_but_numpy():
    code = ("import sys, numpy; before = set(sys.modules); import numformer\n"
            "heavy = {'torch', 'transformers', 'matplotlib', 'safetensors', 'tokenizers', 'tqdm', 'scipy', 'asyncio'}\n"
            "print(sorted(heavy & (set(sys.modules) - before)))")
    assert run(code) == "[]"


def test_a_roof_of_no_array_is_refused():
    for measure in (lambda: _core.roof_read(None, 0), lambda: _core.roof_copy(None, None)):
        with pytest.raises(TypeError, match="x must be an array, got None"):
            measure()
