"""The kinds of rewriting and what a language model is asked for each: a table in YAML."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlp.data_tools._writer.generate import Question

SHIPPED = Path(__file__).with_name("prompts.yaml")
_LARGEST_LENGTH = 20.0
# Fields of a sample's JSON that mean something else.
_TAKEN = {"captions", "caption", "txt", "key", "class", "cls", "origin", "negatives", "score"}


@dataclass(frozen=True)
class Prompt:
    """What is asked for one kind."""

    kind: str
    text: str  # with {} for the caption
    wrong: bool = False  # the answer is false of the picture
    length: float = 2.0  # most tokens of an answer, as a multiple of the caption's

    def question(self, caption: str) -> Question:
        """The prompt for a caption."""
        return Question(self.text.replace("{}", caption), caption, self.length)

    def digest(self) -> str:
        """A hash that changes with anything that is asked."""
        text = repr((self.text, self.wrong, self.length))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_prompts(path: Path = SHIPPED) -> dict[str, Prompt]:
    """Kind → prompt of a table; raises ValueError that names the kind of the first mistake."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no readable table of prompts: {error}") from None

    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} holds no kinds; expected a mapping such as {SHIPPED}")
    return {str(kind): _prompt(str(kind), row, path) for kind, row in table.items()}


def _prompt(kind: str, row: Any, path: Path) -> Prompt:
    """One kind of the table."""
    expected = (
        "expected {prompt: text with {}, wrong: true or false, length: a number} "
        "(wrong and length may be left out)"
    )
    if not isinstance(row, dict) or row.keys() - {"prompt", "wrong", "length"}:
        raise ValueError(f"{path}: the kind {kind!r} is {str(row)[:100]}; {expected}")

    text, wrong, length = row.get("prompt", ""), row.get("wrong", False), row.get("length", 2.0)
    is_number = isinstance(length, int | float) and not isinstance(length, bool)
    is_text = isinstance(text, str) and "{}" in text
    if not is_text or not isinstance(wrong, bool) or not is_number:
        raise ValueError(f"{path}: the kind {kind!r} is {str(row)[:100]}; {expected}")

    if not 0 < length <= _LARGEST_LENGTH:
        raise ValueError(
            f"{path}: length {length} of the kind {kind!r} must lie above 0 and at most "
            f"{_LARGEST_LENGTH:g}"
        )
    if kind in _TAKEN and not wrong:
        raise ValueError(
            f"{path}: a kind {kind!r} would overwrite that field of the JSON; name it otherwise"
        )
    return Prompt(kind, text, wrong, float(length))
