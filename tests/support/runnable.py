"""Skips a case that a kernel says it cannot run."""

import pytest

from esm_fast.ops import verify


def require_runnable(op, kernel, case, dtype, device):
    arguments = verify.bound(op, case.build(dtype, device, 0))
    if reasons := kernel.why_not(op.request(arguments)):
        pytest.skip("; ".join(reasons))
