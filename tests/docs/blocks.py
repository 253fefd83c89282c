"""The fenced blocks of the documentation.

A comment above a block of Python says what happens to it: `<!-- run -->` executes it,
`<!-- file: vlp/losses/x.py -->` makes it a plug-in of that folder; without one it is compiled. A
comment above a block of YAML says which plug-in of its page it uses.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(path for path in DOCS.rglob("*.md") if "generated" not in path.parts),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)
# Pages of extension name plug-ins that only they make; their examples have tests of their own.
PLAIN = [page for page in PAGES if not page.name.startswith("extend")]
BLOCK = re.compile(r"(?:<!-- (.+?) -->\n)?^( *)```(\w+|\{\w+\})\n(.*?)^ *```$", re.M | re.S)
KEYED = ("objective", "eval", "selection")  # sections whose keys are names of plug-ins


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
    """All fenced blocks of a language, in the order of the pages."""
    found = []
    for page in pages:
        for comment, indent, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == language:
                # A block inside a list is indented with it.
                lines = [line.removeprefix(indent) for line in text.splitlines()]
                found.append(Block(page, comment, kind, "\n".join(lines) + "\n"))
    return found


def merged(base, block, path=()):
    """`block` over `base`, section by section; a plug-in and its options are taken as a whole."""
    if not isinstance(base, dict) or not isinstance(block, dict):
        return block

    # Options of one plug-in mean nothing to another.
    if "name" in base or "name" in block or (path and path[0] in KEYED):
        return block
    both = {key: merged(base.get(key), value, (*path, key)) for key, value in block.items()}
    return base | both
