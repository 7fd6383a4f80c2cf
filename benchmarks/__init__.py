"""The benchmarks: `python -m benchmarks`, one a module, all on benchmarks.harness.

OpenBLAS's and libgomp's threads would go on spinning after a call and take a core from whatever runs next. They are
asked here not to, before anything imports NumPy. And OpenBLAS chooses its kernels itself, whatever it may have been
told elsewhere: a peer is measured at its best.
"""
import os

THREADS = int(os.environ.get("NF_THREADS", "2"))
for _name in "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE":
    os.environ.pop(_name, None)
for _name, _value in {
    "OPENBLAS_THREAD_TIMEOUT": "4", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(THREADS),
    "OPENBLAS_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "GOMP_SPINCOUNT": "10000",
}.items():
    os.environ.setdefault(_name, _value)
