"""What is installed: every folder with code and every data file, nothing generic at the top level,
a light import.
"""

import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "vlp": "vlp",
    "eval": "vlp.eval",
    "data_tools": "vlp.data_tools",
    "launch": "vlp.launch",
    "configs": "vlp.configs",
}


def test_every_folder_with_code_is_packaged():
    from setuptools import find_packages

    packages = set(find_packages(ROOT, include=["vlp", "vlp.*"]))
    folders = set()
    for folder, package in ROOMS.items():
        for file in (ROOT / folder).rglob("*.py"):
            below = file.parent.relative_to(ROOT / folder).parts
            folders.add(".".join((package, *below)))
    assert folders == packages
    assert len(folders) >= 12


def test_the_outer_rooms_lie_where_tools_look_for_them():
    for folder in ("eval", "data_tools", "launch", "configs"):
        assert (ROOT / "vlp" / folder).resolve() == ROOT / folder


def test_every_promised_extra_is_installed_where_the_tests_run():
    """What is absent is skipped by its tests, and a promise nobody tries is none."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name: [Requirement(line) for line in lines]
        for name, lines in project["optional-dependencies"].items()
    }
    (all_others,) = [each for each in extras["dev"] if each.name == project["name"]]
    assert all_others.extras == extras.keys() - {"dev"}

    # By the modules that a distribution brings: their names often differ.
    modules = defaultdict(set)
    for module, distributions in metadata.packages_distributions().items():
        for distribution in distributions:
            modules[canonicalize_name(distribution)].add(module)
    wanted = [each for lines in extras.values() for each in lines if each is not all_others]
    for requirement in wanted:
        installed = metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), requirement
        provided = modules[canonicalize_name(requirement.name)]
        is_program = metadata.distribution(requirement.name).entry_points.select(
            group="console_scripts"
        )
        has_module = any(importlib.util.find_spec(module) is not None for module in provided)
        assert has_module or is_program or requirement.name.startswith("types-"), requirement
    assert len(wanted) >= 25


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_works_outside_the_clone(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "venv"], check=True
    )
    python = tmp_path / "venv" / "bin" / "python"
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    subprocess.run(
        [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, source], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == {"vlp"}
    shipped = [n for n in names if n.endswith((".yaml", ".json", ".txt"))]
    for needed in (
        "vlp/configs/demo.yaml",
        "vlp/launch/deepspeed/zero2.json",
        "vlp/launch/accelerate/cpu2.yaml",
    ):
        assert needed in shipped
    assert "vlp/py.typed" in names  # without it, type checkers of users see no types
    tracked = subprocess.run(
        ["git", "ls-files", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    code = [f for f in tracked if f.endswith(".py")]
    assert len([n for n in names if n.endswith(".py")]) == len(code)


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from vlp.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "usage: vlp" in output
    for heavy in ("torch", "numpy", "PIL", "yaml", "open_clip"):
        assert f"'{heavy}'" not in output


def test_rooms_are_there_once_they_are_asked_for():
    """`import vlp; vlp.losses.build(…)`, without an import of torch before."""
    program = (
        "import sys, vlp\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy'\n"
        "objective = vlp.losses.build({'infonce': {}})\n"
        "print(objective.candidates(7), vlp.eval.__name__, vlp.data_tools.__name__)\n"
        "print(vlp.types.Batch.__name__)\n"
        "print(hasattr(vlp, 'loses'), hasattr(vlp, '_card'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["7", "vlp.eval", "vlp.data_tools", "Batch", "False", "False"], (
        done.stderr
    )


@pytest.mark.parametrize(
    "command",
    ["train", "eval", "export", "push", "report", "demo", "data", "data pack", "data scenes"],
)
def test_every_command_has_help(command):
    done = subprocess.run(
        [sys.executable, "-m", "vlp.cli", *command.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"vlp {command}" in done.stdout
    assert (
        command == "data"
        or "example" in done.stdout
        or f"  vlp {command}" in done.stdout
        or f"\nvlp {command}" in done.stdout
    )


def test_wrong_use_is_a_message_and_not_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "vlp.cli", "train", "nowhere.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no configuration file nowhere.yaml; known: align, align_towers, basic, " in done.stderr
    assert "Traceback" not in done.stderr
