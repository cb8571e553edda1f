"""`python -m esm_fast.cli`, for launchers such as torchrun that start modules."""

import sys

from . import main

sys.exit(main())
