"""What the page knows of a run's model: plain values, and notes on what could not be had."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vlp.eval.report import findings
from vlp.privacy import private

EXPECTED = (ValueError, OSError, RuntimeError, KeyError, TypeError, ImportError)


@dataclass
class Evidence:
    """What the model shows. A part that could not be made is None or empty, and `notes` say why, by
    section.
    """

    model: str = ""  # the checkpoint's name
    space: Space | None = None
    confusion: Confusion | None = None
    sheets: Sheets | None = None
    examples: list[ExampleSet] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def note(self, section: str, text: str) -> None:
        """Keep a note for the page, and say it at the console."""
        # The page is passed on, the console is not.
        self.notes.setdefault(section, []).append(private(text))
        print(f"vlp report: {text}", file=sys.stderr)

    @contextmanager
    def attempt(self, section: str, subject: str) -> Iterator[None]:
        """Let a part fail on its own: its error becomes a note."""
        try:
            yield
        except EXPECTED as error:
            self.note(section, f"{subject}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """An error in one sentence; ours say what to do, others are named."""
    if isinstance(error, OSError) and error.filename:
        return f"{Path(error.filename).name}: {error.strerror}"

    # Errors of ours are sentences; a bare KeyError needs its kind.
    is_ours = type(error).__module__.startswith("vlp.")
    if is_ours or isinstance(error, ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Space:
    """Pairs of a picture and its first caption in the plane, and measures of the whole sample."""

    dataset: str
    captions: list[str]
    plane: findings.Projection
    measures: dict[str, float]
    # of pairs and of all other combinations: the share of scores in bins from −1 to 1
    shares: tuple[list[float], list[float]]


@dataclass(frozen=True)
class Confusion:
    """The worst classes of a zero-shot set."""

    dataset: str
    n: int  # pictures
    accuracy: float
    names: list[str]  # of all classes
    worst: list[findings.ClassAnswers]
    thumbnails: dict[int, str]  # place -> data URI


@dataclass(frozen=True)
class Sheets:
    """Retrieval both ways among a sample."""

    dataset: str
    captions: list[str]
    n_images: int
    recall: dict[str, float]  # R@1 of "by_text" and "by_image"
    by_text: list[findings.Query]
    by_image: list[findings.Query]
    asked: list[findings.Query]  # by text as well, drawn whatever they come to
    thumbnails: dict[int, str]  # place -> data URI


@dataclass(frozen=True)
class Example:
    """A picture, its true caption and negatives with their cosines, the true one first."""

    thumbnail: str  # data URI
    captions: list[tuple[str, float]]
    hit: bool


@dataclass(frozen=True)
class ExampleSet:
    """Items of one set with negatives."""

    name: str
    n: int  # choices that were scored, of which `items` are shown
    accuracy: float
    chance: float
    items: list[Example]
