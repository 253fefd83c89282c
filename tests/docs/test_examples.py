"""The code that the documentation shows runs, its plug-ins in a tiny run."""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import SETTINGS
from tests.docs.blocks import DOCS, PLAIN, blocks, merged
from vlp import cli, config, plugin
from vlp.schema import ConfigError


def test_python_compiles():
    found = blocks("python", PLAIN)
    for block in found:
        compile(block.text, block.name, "exec")
    assert len(found) >= 5


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder to run examples in, with two pictures and a model at runs/demo."""
    from PIL import Image

    from tests.eval.material import tiny_open_clip

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    tiny_open_clip(tmp_path / "runs" / "demo")
    for name, color in (("a.png", "red"), ("b.png", "green")):
        Image.new("RGB", (20, 20), color).save(tmp_path / name)
    return tmp_path


def test_python_marked_to_run_runs(desk):
    marked = [block for block in blocks("python") if block.comment.startswith("run")]
    for block in marked:
        exec(compile(block.text, block.name, "exec"), {})
    assert len(marked) >= 4


@contextlib.contextmanager
def installed(page, folder):
    """The plug-ins of a page, as if their files lay in the folders that the page names."""
    names, paths = [], []
    for block in blocks("python", [page]):
        if not block.comment.startswith("file: "):
            continue
        path = Path(block.comment.removeprefix("file: "))

        # The outer rooms, such as data_tools, are imported as vlp.data_tools.
        parts = path.with_suffix("").parts
        name = ".".join(parts if parts[0] == "vlp" else ("vlp", *parts))
        package = importlib.import_module(name.rpartition(".")[0])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(block.text, encoding="utf-8")
        paths.append((package, str((folder / path).parent)))
        names.append(name)

    # A package looks for its modules in every folder of its path.
    for package, path in paths:
        package.__path__.append(path)
    importlib.invalidate_caches()
    try:
        yield names
    finally:
        # Tests that walk the folders must not meet them.
        for package, path in paths:
            package.__path__.remove(path)
        for name in names:
            sys.modules.pop(name, None)
            parent, _, leaf = name.rpartition(".")
            vars(sys.modules[parent]).pop(leaf, None)


def tiny_run(page, scenes, folder):
    """Two steps of a run with the configuration that a page shows; its log."""
    from vlp.train import train

    tree = yaml.safe_load(SETTINGS.format(out=folder / "run", data=scenes / "train"))
    (block,) = [block for block in blocks("yaml", [page]) if block.comment.startswith("uses")]
    tree = merged(tree, yaml.safe_load(block.text))

    tree["train"] |= {"duration": 2, "batch": 8}
    tree["data"]["workers"] = 0  # plug-ins of a temporary folder are known to this process alone
    train(config.parse(tree))
    return (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")


def test_the_objective_example_trains_and_equals_infonce_at_gamma_0(scenes, tmp_path):
    import torch

    import vlp

    page = DOCS / "extend-objective.md"
    with installed(page, tmp_path) as names:
        assert '"focal": ' in tiny_run(page, scenes, tmp_path)

        x, t = torch.nn.functional.normalize(torch.randn(2, 6, 8, dtype=torch.float64), dim=-1)
        values = {}
        for term in ({"focal": {"gamma": 0.0}}, {"focal": {"gamma": 2.0}}, {"infonce": {}}):
            (name,) = term
            values[name, str(term[name])] = vlp.losses.build(term)(image=x, text=t, scale=10.0)[0]
        flat, focal, infonce = values.values()
        torch.testing.assert_close(flat, infonce)

        # The formula of the page, written down.
        z = 10 * x @ t.T
        p = torch.stack([z.softmax(1).diagonal(), z.softmax(0).diagonal()])
        torch.testing.assert_close(focal, (-((1 - p) ** 2) * p.log()).mean())
        with pytest.raises(ConfigError, match="expected γ >= 0"):
            vlp.losses.build({"focal": {"gamma": -1}})

    assert names == ["vlp.losses.focal"]
    assert "focal" not in plugin.names("vlp.losses")


def test_the_tower_example_trains(scenes, tmp_path):
    page = DOCS / "extend-tower.md"
    with installed(page, tmp_path) as names:
        assert '"infonce": ' in tiny_run(page, scenes, tmp_path)
    assert names == ["vlp.towers.convnext"]


def test_the_source_example_trains_and_refuses_other_files(scenes, tmp_path, monkeypatch):
    import sqlite3

    from PIL import Image

    monkeypatch.chdir(tmp_path)
    with contextlib.closing(sqlite3.connect("photos.db")) as database, database:
        database.execute("CREATE TABLE photos (image TEXT, caption TEXT)")
        for i in range(16):
            Image.new("RGB", (24, 20), (10 * i, 0, 90)).save(f"{i}.png")
            row = (f"{i}.png", f"shade number {i}")
            database.execute("INSERT INTO photos VALUES (?, ?)", row)
    Path("text.db").write_text("no database, but a text that is long enough to be looked at")

    page = DOCS / "extend-source.md"
    with installed(page, tmp_path) as names:
        assert '"step": 2' in tiny_run(page, scenes, tmp_path)
        source = importlib.import_module("vlp.data.sources.sqlite")
        for path, said in (("none.db", "no file none.db"), ("text.db", "expected a table photos")):
            with pytest.raises(ValueError, match=said):
                source.open(source.Options(path), config.Captions())
    assert names == ["vlp.data.sources.sqlite"]


def test_the_tool_example_runs_as_a_command(scenes, tmp_path, capsys):
    with installed(DOCS / "extend-tool.md", tmp_path) as names:
        assert cli.main(["data", "longest", str(scenes / "train"), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    lengths = [int(line.split()[0]) for line in lines[:3]]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 20
    assert names == ["vlp.data_tools.longest"]
