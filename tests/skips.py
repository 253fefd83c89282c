"""Which tests may be skipped: those of hardware, systems and data that not every machine has.

Whatever the project promises as an extra is installed where the tests run (`make setup`), so that a
skip for want of a package would be a promise that nobody checks: it fails.
"""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest

# Patterns of whole reasons; each is of something that no package of ours brings along.
ALLOWED = (
    r"needs a CUDA device",
    r"a CUDA device is here",
    r"Triton is made for Linux alone",
    r"the C library is not glibc",
    r"this user may not mount a file system of its own",
    r"chromium and chromedriver are not installed",
    r"open_clip's environment cannot be made here: .*",  # needs a registry
    r"set VLP_PARITY_PYTHON to .*",  # an environment of its own, which no extra makes
    r".*; see docs/parity\.md",
    r".*set VLP_DATA to the folder .*",  # real photos and captions
)

Report = pytest.TestReport | pytest.CollectReport


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse(report)
    return report


def _refuse(report: Report) -> None:
    """Turn a skip for a reason that is not listed into a failure."""
    # An expected failure is reported as skipped, too.
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    path, line, message = report.longrepr  # type: ignore[misc]
    reason = str(message).removeprefix("Skipped: ")
    if any(re.fullmatch(pattern, reason, re.DOTALL) for pattern in ALLOWED):
        return

    report.outcome = "failed"
    report.longrepr = (
        f"{path}:{line}: skipped because {reason!r}, which tests/skips.py does not list. Where a "
        "package is absent, install it: make setup"
    )
