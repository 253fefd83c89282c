"""The notebook is small, compiles, and runs."""

import ast
import json
import re

import pytest

from tests.docs.blocks import ROOT
from vlp import config

NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


def test_the_notebook_is_small_and_compiles():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))

    # Stored outputs would be pictures of one machine's run.
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        compile("".join(cell["source"]), cell["id"], "exec")
        assert not cell["outputs"] and cell["execution_count"] is None
    assert len(code) >= 7
    assert NOTEBOOK.stat().st_size < 8_000

    # Its commands are those of the terminal.
    calls = [node for cell in code for node in ast.walk(ast.parse("".join(cell["source"])))]
    words = [node.value for node in calls if isinstance(node, ast.Constant)]
    assert {"train", "demo"} < set(words)
    overrides = [word for word in words if isinstance(word, str) and re.match(r"[a-z.]+=.", word)]
    config.load(config.find("demo"), overrides)
    assert len(overrides) >= 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs(tmp_path):
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=place).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert re.search(r"R@1 \d", printed)
