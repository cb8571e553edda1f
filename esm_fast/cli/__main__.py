"""`python -m esm_fast.cli`, for launchers such as torchrun that start modules."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
