"""``python -m numformer.demo``"""
import sys

from numformer.demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
