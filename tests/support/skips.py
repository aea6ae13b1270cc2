"""What a test may be left out for, and that nothing else leaves one out where CI is set, as in `.ci/run`."""

from __future__ import annotations

import os
from importlib.metadata import requires

import pytest
import torch

NO_GPU = "needs a GPU that torch can use"
NO_CUDA_BUILD = "needs CUDA's Python bindings, which torch's CUDA build brings, but not that of torch 2.9"
NO_DATA = "the data folder is not there"
MAY_NOT_MOUNT = "this user may not mount a small file system"
MAY_NOT_ACT_AS_ANOTHER = "this user may not act as another user of this machine"
ALLOWED = (NO_GPU, NO_CUDA_BUILD, NO_DATA, MAY_NOT_MOUNT, MAY_NOT_ACT_AS_ANOTHER)
"""How the reasons begin that hold on a machine where everything is installed that the tests need."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
needs_cuda_build = pytest.mark.skipif(not any(name.startswith("cuda-bindings") for name in requires("torch") or ()),
                                      reason=NO_CUDA_BUILD)


def fail_unexpected_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a report that something was skipped into a failure, where CI is set and the reason is not allowed."""
    if not os.environ.get("CI") or not report.skipped or hasattr(report, "wasxfail"):
        return
    assert isinstance(report.longrepr, tuple)  # file, line, reason
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED):
        report.outcome = "failed"
        report.longrepr = (f"{report.nodeid} was skipped: {reason}. Where CI is set, only what ALLOWED in "
                           "tests/support/skips.py lists may skip a test: install what is missing, or add the reason.")
