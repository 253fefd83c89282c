"""The pages that the code writes: objectives, systems, configuration, API.

    write(folder)      all of them, as Markdown; conf.py calls it before Sphinx reads its sources

Nothing here is remembered: a formula stands in its docstring, a default in its dataclass, a
measured cost in docs/results/terms.json.
"""

from __future__ import annotations

from pathlib import Path

from _generator import api, configuration, objectives, systems
from vlp.config import reference


def write(folder: Path) -> None:
    """Write every generated page below `folder`, which nothing else writes to."""
    sections = reference.sections()
    pages = {
        "configuration.md": configuration.page(sections),
        "api.md": api.page(),
        "systems.md": systems.page(objectives.everything()),
        **objectives.pages(sections),
    }

    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)

        # Sphinx reads again what is newer than its last build: an equal page keeps its time.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
