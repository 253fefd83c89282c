"""Files that an installed Python package brings along: `package:NAME/FILE` in a configuration.

Checkpoints keep the reference as it was written, and every use looks the place up: it is another on
each machine.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path, PurePath

PREFIX = "package:"
_INSTALLED = ("site-packages", "dist-packages")  # folders that hold a machine's packages


def local(reference: str) -> str:
    """The path of `package:NAME/FILE` on this machine; any other reference as it is.

    Nothing of the package is imported. ValueError where it is not installed or holds no such file.
    """
    # Older checkpoints hold the path of the machine that wrote them.
    reference = _of_other_machine(reference) or reference
    if not reference.startswith(PREFIX):
        return reference
    name, _, inside = reference.removeprefix(PREFIX).partition("/")

    # A dotted name would import its parents, and their code is not asked for.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise ValueError(
            f"{reference}: no package {name!r} is installed; run: "
            f"pip install {name.replace('_', '-')}, or write the path of a file"
        )

    root = Path(folders[0]).resolve()
    place = (root / inside).resolve()
    if not place.is_relative_to(root) or not place.exists():
        held = sorted(path.name for path in root.iterdir())
        raise ValueError(
            f"{reference}: the package holds no {inside!r}; it holds {', '.join(held[:8])}"
        )
    return str(place)


def _of_other_machine(reference: str) -> str | None:
    """The package that an absolute path which is absent here lay in; None for other references."""
    place = PurePath(reference)
    folders = [folder for folder in _INSTALLED if folder in place.parts[:-1]]
    if not place.is_absolute() or not folders or Path(place).exists():
        return None
    inside = place.parts[place.parts.index(folders[0]) + 1 :]
    return PREFIX + "/".join(inside)
