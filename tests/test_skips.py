"""A skip for want of a package is a failure; so is any other reason that is not listed."""

from pathlib import Path

pytest_plugins = ["pytester"]

MODULE = """
import pytest
{at_import}

def test_it():
    {inside}

@pytest.mark.xfail
def test_that_is_expected_to_fail():
    assert False

@pytest.mark.skipif(True, reason="needs a CUDA device")
def test_of_hardware():
    assert False
"""
ABSENT = 'pytest.importorskip("a_package_that_is_absent")'
MARKED = 'pytestmark = pytest.mark.skipif(True, reason="peft is not installed")'
# what a module does at its import and in a test, and what becomes of its three tests
CASES = [
    ("", "pass", {"passed": 1, "xfailed": 1, "skipped": 1}),
    ("", ABSENT, {"failed": 1, "xfailed": 1, "skipped": 1}),
    ("", 'pytest.skip("no time")', {"failed": 1, "xfailed": 1, "skipped": 1}),
    (ABSENT, "pass", {"errors": 1}),
    (MARKED, "pass", {"errors": 2, "skipped": 1}),
]


def test_a_skip_for_want_of_a_package_fails(pytester):
    for at_import, inside, expected in CASES:
        pytester.makepyfile(MODULE.format(at_import=at_import, inside=inside))
        result = pytester.runpytest_inprocess("-p", "tests.skips", "-p", "no:cacheprovider")
        outcomes = result.parseoutcomes()
        outcomes.pop("warnings", None)
        assert outcomes == expected, (at_import, inside)
    assert len(CASES) == 5


def test_no_test_skips_what_it_could_not_import():
    files = [path for path in Path(__file__).parent.rglob("*.py") if path != Path(__file__)]
    forbidden = [str(path) for path in files if "importorskip" in path.read_text(encoding="utf-8")]
    assert not forbidden and len(files) > 200
