"""``python -m numformer.demo``"""
import os
import sys

from numformer.demo.cli import main

if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")        # a model's samples hold signs that a terminal may lack
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")                 # progress goes there
    sys.exit(main())
