"""The documentation is true: its commands parse, its configurations load, its code runs, its links
lead somewhere, and what is generated covers the code.

A comment above a fenced block of Python says what happens to it: `<!-- run -->` executes it,
`<!-- file: vlp/losses/x.py -->` makes it a plug-in of that folder; without one it is compiled.
"""

import ast
import contextlib
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import SETTINGS
from vlp import cli, config, plugin
from vlp.schema import ConfigError

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(path for path in DOCS.rglob("*.md") if "generated" not in path.parts),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)
BLOCK = re.compile(r"(?:<!-- (.+?) -->\n)?^( *)```(\w+|\{\w+\})\n(.*?)^ *```$", re.M | re.S)
KEYED = ("objective", "eval", "selection")  # sections whose keys are names of plug-ins
PLACEHOLDERS = ("photos",)  # configurations that need not exist
EXAMPLES = ("longest", "mine")  # tools that only pages make
SHELL = ("cd", "rm", "for", "source", "export", "make", "python", "pytest", "git", "ruff")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the comment that stands above it."""

    page: Path
    comment: str
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0]}"


def blocks(language, pages=PAGES):
    found = []
    for page in pages:
        for comment, indent, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == language:
                lines = [line.removeprefix(indent) for line in text.splitlines()]
                found.append(Block(page, comment, kind, "\n".join(lines) + "\n"))
    return found


# Commands


def commands():
    """(page, words) of every command line in a fenced block; lines that end with \\ go on."""
    found = []
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            found += [(block.page, words) for words in [shlex.split(line, comments=True)] if words]
    return found


def check_vlp(words):
    """Raise for what the real parser, task or configuration refuses."""
    parser = cli.build_parser(words)
    options, unknown = parser.parse_known_args(words)
    assert not unknown, unknown
    if words[0] == "train":
        check_run(options.config, options.overrides)
    if words[0] == "eval" and options.task:
        from vlp.eval.run import _tasks

        plugin.keyed("vlp.eval.tasks", _tasks(options))


def check_run(name, overrides):
    if name not in PLACEHOLDERS:
        config.load(config.find(name), overrides)


def check_command(words):
    if "vlp" in words:
        return check_vlp(words[words.index("vlp") + 1 :])
    if words[0] in ("accelerate", "sbatch"):
        files = [word for word in words if word.startswith("launch/")]
        assert files and all((ROOT / file).is_file() for file in files), files
        name, *overrides = words[words.index(files[-1]) + 1 :]
        return check_run(name, overrides)
    assert words[0] in SHELL, words
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    for word in words[1:]:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists(), word


def test_every_command_is_one_that_the_programs_take(capsys):
    wrong = []
    lines = commands()
    for page, words in lines:
        try:
            check_command(words)
        except (SystemExit, AssertionError, ValueError) as error:
            said = capsys.readouterr().err.strip().splitlines()[-1:] or [str(error)]
            wrong.append(f"{page.name}: {' '.join(words)}\n    {said[0]}")
    assert not wrong, "\n".join(wrong)
    assert len(lines) > 60


def test_every_command_named_in_a_sentence_exists():
    tools = {path.stem for path in (ROOT / "data_tools").iterdir() if path.stem[0] != "_"}
    n = 0
    for page in PAGES:
        for command, tool in re.findall(r"`vlp (\w+) ?([a-z]*)", page.read_text(encoding="utf-8")):
            n += 1
            known = command in ("train", "eval", "export", "push", "report", "demo", "config")
            is_tool = command == "data" and tool in {*tools, *EXAMPLES, ""}
            assert known or is_tool, f"{page.name}: vlp {command} {tool}"
    assert n > 20


# Configurations


def merged(base, block, path=()):
    """`block` over `base`, section by section; a plug-in and its options are taken as a whole."""
    if not isinstance(base, dict) or not isinstance(block, dict):
        return block
    if "name" in base or "name" in block or (path and path[0] in KEYED):
        return block
    both = {key: merged(base.get(key), value, (*path, key)) for key, value in block.items()}
    return base | both


def test_every_configuration_is_read():
    demo = yaml.safe_load(config.find("demo").read_text(encoding="utf-8"))
    wrong, n = [], 0
    for block in blocks("yaml"):
        if block.comment:  # it uses the plug-in of its page, with which the page's test runs it
            continue
        n += 1
        try:
            config.parse(merged(demo, yaml.safe_load(block.text)))
        except ConfigError as error:
            wrong.append(f"{block.name}\n    {error}")
    assert not wrong, "\n".join(wrong)
    assert n >= 11


def test_every_override_named_in_a_sentence_is_a_key():
    n = 0
    for page in PAGES:
        if page.name.startswith("extend-"):
            continue
        for override in re.findall(r"`([a-z_]+\.[\w.]+=[^`…]+)`", page.read_text(encoding="utf-8")):
            n += 1
            config.load(config.find("demo"), [override])
    assert n >= 10


# Python


def test_python_compiles():
    found = blocks("python")
    for block in found:
        compile(block.text, block.name, "exec")
    assert len(found) >= 8


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


# Examples of extension


@contextlib.contextmanager
def installed(page, folder):
    """The plug-ins of a page, as if their files lay in the folders that the page names."""
    names, paths = [], []
    for block in blocks("python", [page]):
        if not block.comment.startswith("file: "):
            continue
        path = Path(block.comment.removeprefix("file: "))
        parts = path.with_suffix("").parts
        name = ".".join(parts if parts[0] == "vlp" else ("vlp", *parts))
        package = importlib.import_module(name.rpartition(".")[0])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(block.text, encoding="utf-8")
        paths.append((package, str((folder / path).parent)))
        names.append(name)

    for package, path in paths:
        package.__path__.append(path)
    importlib.invalidate_caches()
    try:
        yield names
    finally:
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


# Pages


def test_links_between_files_lead_somewhere():
    n = 0
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            n += 1
            name = target.rpartition("generated/objectives/")[2].removesuffix(".md")
            is_generated = name in plugin.names("vlp.losses") or "generated/" in target
            assert is_generated or (page.parent / target).exists(), f"{page.name}: {target}"
    assert n > 60


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
    names = plugin.names("vlp.losses")
    index = (tmp_path / "objectives" / "index.md").read_text(encoding="utf-8")
    chosen = (DOCS / "objectives.md").read_text(encoding="utf-8")
    for name in names:
        page = (tmp_path / "objectives" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {name}\n") and f"objective: {{{name}: {{}}}}" in page
        assert f"[{name}]({name}.md)" in index
        assert f"generated/objectives/{name}.md" in chosen, f"objectives.md: no word of {name}"
    assert len(names) >= 24

    settings = (tmp_path / "configuration.md").read_text(encoding="utf-8")
    for key in ("flip", "warmup", "precision", "trackers", "pretrained", "micro_batches"):
        assert f"`{key}`" in settings or f".{key}`" in settings, key
    for plugins in ("objective.siglip", "eval.retrieval"):
        assert plugins in settings
    api = (tmp_path / "api.md").read_text(encoding="utf-8")
    assert "### Pairs.row_logsumexp" in api and "### Model.images" in api


def test_what_was_measured_on_uncommitted_files_is_listed():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    said = re.search(r"not rerun since:\n(.*?)\. The models", text, re.S)[1]
    listed = set(re.findall(r"[a-z]+[a-z_0-9]+", said)) - {"and", "of", "the"}
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /", text, re.S))
    commits = {name: re.search(r"commit (\w+\+?)", part)[1] for name, part in sections.items()}
    unclean = {name.removeprefix("evidence_") for name, at in commits.items() if at.endswith("+")}
    assert listed - {"evidence"} == unclean
    assert len(commits) >= 16


# The notebook


NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


def test_the_notebook_is_small_and_compiles():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
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
    assert len(overrides) >= 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="pip install vlp[docs]")
    nbclient = pytest.importorskip("nbclient", reason="pip install vlp[docs]")
    pytest.importorskip("ipykernel", reason="pip install vlp[docs]")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert re.search(r"R@1 \d", printed)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinxcontrib.mermaid"):
        pytest.importorskip(name, reason="pip install vlp[docs]")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "generated" / "objectives" / "siglip.html").is_file()
