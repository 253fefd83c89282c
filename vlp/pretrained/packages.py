"""Files that an installed Python package brings along: `package:NAME/FILE` in a configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PREFIX = "package:"


def local(reference: str) -> str:
    """The path of `package:NAME/FILE` on this machine; any other reference as it is.

    Nothing of the package is imported. ValueError where it is not installed or holds no such file.
    """
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
