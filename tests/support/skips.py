"""The reasons for which a test may be skipped. If CI is set, as in `.ci/run`, a skip for any other reason is a failure.

This is a plugin, and not part of a conftest.py, so that it also sees the examples in docstrings outside of `tests`.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from importlib.metadata import requires

import pytest
import torch

NO_GPU = "needs a GPU that torch can use"
NO_CUDA_BUILD = "needs CUDA's Python bindings, which torch's CUDA build brings, but not that of torch 2.9"
NO_DATA = "the data folder is not there"
MAY_NOT_MOUNT = "this user may not mount a small file system"
MAY_NOT_ACT_AS_ANOTHER = "this user may not act as another user of this machine"
ALLOWED = (NO_GPU, NO_CUDA_BUILD, NO_DATA, MAY_NOT_MOUNT, MAY_NOT_ACT_AS_ANOTHER)
"""The beginnings of those reasons that can hold even if everything that the tests need is installed."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
needs_cuda_build = pytest.mark.skipif(not any(name.startswith("cuda-bindings") for name in requires("torch") or ()),
                                      reason=NO_CUDA_BUILD)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_unexpected_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_unexpected_skip(report)
    return report


def _fail_unexpected_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn the report of a skip into a failure if CI is set and the reason is not allowed.

    A test that is expected to fail hides as much as a skipped one, whether it fails or passes.
    """
    expected_to_fail = getattr(report, "wasxfail", None)
    if not os.environ.get("CI") or not (report.skipped or expected_to_fail is not None):
        return
    if expected_to_fail is None:
        assert isinstance(report.longrepr, tuple)  # file, line, reason
    reason = report.longrepr[2].removeprefix("Skipped: ") if expected_to_fail is None else "it is expected to fail"
    if not reason.startswith(ALLOWED):
        report.outcome = "failed"
        report.__dict__.pop("wasxfail", None)  # with it pytest would count the failure as an expected one
        report.longrepr = (f"{report.nodeid} was skipped: {reason}. Where CI is set, only what ALLOWED in "
                           "tests/support/skips.py lists may skip a test: install what is missing, or add the reason.")
