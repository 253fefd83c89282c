"""A file imports only from below: the data's way through the rooms has one direction."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# High to low. Rooms in one row may import one another.
LAYERS = [
    ("vlp.cli", "vlp.launch", "vlp.demo", "vlp.faults"),
    ("vlp.eval", "vlp.data_tools", "vlp.export"),
    ("vlp.train", "vlp.reporter", "vlp.checks"),
    ("vlp.selection",),
    (
        "vlp.step",
        "vlp.non_finite",
        "vlp.teacher",
        "vlp.checkpoint",
        "vlp.engines",
        "vlp.optim",
        "vlp.stored_embeddings",
    ),
    ("vlp.models", "vlp.losses", "vlp.data"),
    ("vlp.towers", "vlp.pairwise"),
    ("vlp.pretrained",),
    ("vlp.config", "vlp.dist", "vlp.log", "vlp.locks", "vlp.seeds"),
    ("vlp.plugin",),
    ("vlp.schema", "vlp.types", "vlp.files", "vlp.lifetime", "vlp.privacy"),
    ("vlp.fields", "vlp.geometry"),
    ("vlp",),
]
ROOMS = {"vlp": "vlp", "eval": "vlp.eval", "data_tools": "vlp.data_tools", "launch": "vlp.launch"}


def level(module):
    for i, row in enumerate(LAYERS):
        if any(module == name or (module.startswith(f"{name}.") and name != "vlp") for name in row):
            return i
    private = module.split(".")[1].startswith("_")
    assert private, f"{module} has no place in LAYERS"
    return None


def imports(path):
    """Modules of ours that a file imports when it is imported itself, and those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        n
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{a.name}" if node.module == "vlp" else node.module
                for a in node.names
            ]
        yield from ((name, node in inside) for name in names if name.split(".")[0] == "vlp")


def test_imports_go_downwards():
    wrong, n_files, n_imports = [], 0, 0
    for folder, package in ROOMS.items():
        for path in (ROOT / folder).rglob("*.py"):
            n_files += 1
            module = ".".join(
                (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            ).removesuffix(".__init__")
            for name, lazy in imports(path):
                name = "vlp" if name == "vlp.__version__" else name
                n_imports += 1
                own, other = level(module), level(name)
                if not lazy and None not in (own, other) and other < own:
                    wrong.append(f"{module} imports {name} from above")
    assert not wrong, "\n".join(wrong)
    assert n_files > 60
    assert n_imports > 150


def test_losses_never_talk_to_other_ranks():
    files = list((ROOT / "vlp" / "losses").glob("*.py"))
    assert len(files) >= 4
    for path in files:
        assert "torch.distributed" not in path.read_text(encoding="utf-8"), path
