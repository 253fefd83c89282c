"""What is generated covers the code, and the site builds without a warning."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.blocks import DOCS, ROOT
from vlp import configs, plugin

RECIPES = Path(configs.__file__).parent


def generator():
    """docs/_generator, which is no part of the package."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("_generator")
    finally:
        sys.path.remove(str(DOCS))


def test_generated_pages_cover_the_code(tmp_path):
    generate = generator()
    generate.write(tmp_path)

    # A page, a line of the table and a line of advice for every objective.
    names = plugin.names("vlp.losses")
    index = (tmp_path / "objectives" / "index.md").read_text(encoding="utf-8")
    chosen = (DOCS / "objectives.md").read_text(encoding="utf-8")
    for name in names:
        page = (tmp_path / "objectives" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {name}\n") and f"objective: {{{name}: {{}}}}" in page
        assert f"[{name}]({name}.md)" in index
        assert f"generated/objectives/{name}.md" in chosen, f"objectives.md: no word of {name}"
    assert len(names) >= 24

    # What newcomers search for.
    settings = (tmp_path / "configuration.md").read_text(encoding="utf-8")
    for key in ("flip", "warmup", "precision", "trackers", "pretrained", "micro_batches"):
        assert f".{key}`" in settings, key
    for plugins in ("objective.siglip", "eval.retrieval"):
        assert plugins in settings

    api = (tmp_path / "api.md").read_text(encoding="utf-8")
    assert "### Pairs.row_logsumexp" in api and "### Model.images" in api


def test_systems_are_listed_with_what_differs(tmp_path):
    generator().write(tmp_path)
    page = (tmp_path / "systems.md").read_text(encoding="utf-8")
    objectives, recipes = page.split("## Recipes")

    # Every paper of an objective, once a configuration.
    rows = [line.split(" | ") for line in objectives.splitlines() if "arXiv" in line]
    states = [re.split(r"[:,]| \|", row[-1])[0] for row in rows]
    assert set(states) == {"as published", "differs", "not confirmed", "related"}
    assert len(rows) == len({tuple(row) for row in rows}) >= 60
    for name in plugin.names("vlp.losses"):
        papers = plugin.load("vlp.losses", name).__doc__.split("Papers:")[1].split("\n\n")[0]
        for number in re.findall(r"arXiv\s+(\d{4}\.\d{5})", papers):
            assert f"abs/{number}" in objectives, f"{name}: {number}"

    # Recipes that name a paper, with their own words on differences and results.
    headers = {path.stem: path.read_text() for path in RECIPES.glob("*.yaml")}
    papers = [name for name, text in headers.items() if "arXiv" in text.split("\n#\n")[0]]
    for name in papers:
        assert f"| `{name}` |" in recipes
    assert len(papers) >= 35
    assert "a ResNet and a CLIP text transformer (the paper: EfficientNet and BERT)" in recipes


def test_configurations_named_by_objectives_are_read():
    named = {}
    for name in plugin.names("vlp.losses"):
        text = plugin.load("vlp.losses", name).__doc__
        named[name] = re.findall(r"`objective: (\{.*?\})`", text, re.DOTALL)
        for written in named[name]:
            plugin.keyed("vlp.losses", yaml.safe_load(written))
        assert named[name] or "Papers:" not in text, f"{name} names no configuration"
    assert len(named) >= 24


def test_what_was_measured_on_uncommitted_files_is_listed():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    said = re.search(r"not rerun since:\n(.*?)\. The models", text, re.S)[1]
    listed = set(re.findall(r"[a-z]+[a-z_0-9]+", said)) - {"and", "of", "the"}

    # A section says + beside its commit where files were not committed.
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /", text, re.S))
    commits = {name: re.search(r"commit (\w+\+?)", part)[1] for name, part in sections.items()}
    unclean = {name.removeprefix("evidence_") for name, at in commits.items() if at.endswith("+")}
    assert listed - {"evidence"} == unclean
    assert len(commits) >= 16


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "generated" / "objectives" / "siglip.html").is_file()
