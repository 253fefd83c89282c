"""Functions of the user's own by `package.module:function`."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlp.judges import Judge
from vlp.optim.schedules import own_schedule
from vlp.plugin import own_function

BROKEN = {
    "syntax": ("def score(:", "importing broken_syntax failed: SyntaxError: "),
    "name": ("no_such_name", "failed: NameError: name 'no_such_name' is not defined; mend it"),
    "leaves": ("raise SystemExit(3)", "importing broken_leaves failed: SystemExit: 3"),
    "imports": ("import no_such_package", "No module named 'no_such_package'; expected"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_module_that_fails_is_told_by_what_names_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, message = BROKEN[case]
    (tmp_path / f"broken_{case}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    reference = f"broken_{case}:score"
    for place, load in (
        ("pipeline", lambda: own_function(reference, "pipeline")),
        ("train.optimizer.schedule", lambda: own_schedule(reference)),
        ("judge", lambda: Judge.of(reference, "cpu", 1).check()),
    ):
        with pytest.raises(ValueError, match=f"^{place} '{reference}': .*{message}"):
            load()


@pytest.mark.parametrize(
    "reference", ["", ":", "module", "module:", ":name", ".module:name", "a b:c", "a:b.c"]
)
def test_what_is_written_otherwise_is_refused_before_an_import(reference: str) -> None:
    with pytest.raises(ValueError, match=r"expected package\.module:function$"):
        own_function(reference, "pipeline")
