"""Read by libgomp when it is loaded, so before numformer._core: a thread that has nothing to do spins for some 0.1 ms,
and not the 5 ms of libgomp's default, in which it takes a core from whatever else the machine or the script has to do.
What the user has asked for stays."""
import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
