"""``python -m numformer.demo``"""
import sys

from numformer.demo.cli import main

if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")        # a model's samples hold signs that a terminal may lack
    sys.exit(main())
