"""A module imports only from below: the contracts of pyproject.toml, and what they cannot say."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "pyproject.toml"
CONTRACTS = tomllib.loads(CONFIG.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]


def lint_imports(folder: Path) -> tuple[int, str]:
    """Exit status and output of import-linter over the package `vlp` in `folder`."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", program, str(CONFIG), "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout + run.stderr


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, the outer rooms among them, and its parsed file."""
    outer = {name: f"vlp.{name}" for name in ("eval", "data_tools", "launch", "configs")}
    trees = {}
    for folder, package in {"vlp": "vlp", **outer}.items():
        for path in (ROOT / folder).rglob("*.py"):
            below = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *below)).removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))

    return trees


def imported_names(tree):
    """Full names of what a file imports, inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_import_contracts_hold():
    status, output = lint_imports(ROOT)

    assert status == 0, output
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken" in output
    n_files, n_imports = map(int, re.search(r"Analyzed (\d+) files, (\d+) dep", output).groups())
    assert n_files == len(modules())  # it follows the links vlp/eval → eval, …
    assert n_imports > 700


def test_import_contracts_can_break(tmp_path):
    breaches = [  # file of the package, line that is added to it, what must be said of it
        ("types.py", "from vlp import train", "vlp.types is not allowed to import vlp.train"),
        # An import inside a function is an import as well.
        ("dist.py", "def late(): import vlp.cli", "vlp.dist is not allowed to import vlp.cli"),
        ("shelf.py", "", "vlp.shelf"),  # a room without a place among the layers
        ("pairwise/topology.py", "import vlp.pairwise.pairs", "cycles are allowed in vlp.pairwise"),
        ("train.py", "import vlp.losses._inputs", "vlp.train -> vlp.losses._inputs"),
    ]
    shutil.copytree(ROOT / "vlp", tmp_path / "vlp", ignore=shutil.ignore_patterns("__pycache__"))
    for file, line, _ in breaches:
        with (tmp_path / "vlp" / file).open("a", encoding="utf-8") as changed:
            changed.write(f"\n{line}\n")

    status, output = lint_imports(tmp_path)

    assert status == 1
    assert [complaint for _, _, complaint in breaches if complaint not in output] == []


def test_underscored_names_stay_in_their_folder():
    """A name that begins with _ belongs to the module or folder it stands in."""
    wrong, n_imports = [], 0
    for module, tree in modules().items():
        for name in imported_names(tree):
            if not name.startswith("vlp."):
                continue
            n_imports += 1
            parts = name.split(".")
            private = [i for i, part in enumerate(parts) if re.match("_[^_]", part)]
            owners = [".".join(parts[:i]) for i in private]
            if any(module != owner and not module.startswith(f"{owner}.") for owner in owners):
                wrong.append(f"{module} imports {name}")

    assert not wrong, "\n".join(wrong)
    assert n_imports > 1000


def test_losses_never_talk_to_other_ranks():
    """Terms leave that to `pairs` and vlp.dist. import-linter sees no parts of other packages."""
    n_files = 0
    for module, tree in modules().items():
        if module.startswith("vlp.losses"):
            n_files += 1
            attributes = (ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
            used = {*imported_names(tree), *attributes}
            assert not [name for name in used if name.startswith("torch.distributed")], module

    assert n_files >= 30
