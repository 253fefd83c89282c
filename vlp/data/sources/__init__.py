"""Data sources, one a file. `Common` holds the keys that every source takes.

A source's file holds `Options` and `open(options: Options, captions: vlp.config.Captions) -> Source`, which raises
ValueError or OSError for data that cannot be trained on, saying what to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vlp.config import Captions
    from vlp.types import Sample


@dataclass(frozen=True)
class Common:
    """Keys of every source."""

    weight: float | None = None  # share of the samples drawn; None for all sources: every sample once an epoch

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"weight is {self.weight}; expected a positive number")


class Source(Protocol):
    """Samples by number. It is sent to every loader process, so it holds no open files and few Python objects."""

    n_left_out: int  # samples that exist but cannot be used (damaged, without text where those are dropped)
    n_negatives: int  # most hard-negative captions of any sample
    n_counterfactuals: int  # most counterfactual captions of any sample
    scored: bool  # every sample has a relevance
    window: int  # shards that are fetched and shuffled together; 0: any order costs the same
    # With a window also: runs, the samples of each shard, int64; prepare(ids), which begins to fetch their shards.

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample:
        """Sample i with sample_id = i; raises OSError or ValueError where it cannot be read."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever number, order or place of the samples do; a resumed run compares it."""
        ...

    def problems(self) -> list[str]:
        """What was left out or odd, in words, as far as it was kept."""
        ...


def text_list(meta: dict[str, Any], field: str) -> list[str]:
    """The texts of an optional list in a sample's JSON; nothing where it is absent or something else."""
    value = meta.get(field)
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def captions_of(captions: tuple[str, ...], meta: dict[str, Any], config: Captions) -> tuple[str, ...]:
    """A sample's texts: its captions, else its class name in the configured templates, else nothing."""
    if captions or not config.class_templates:
        return captions
    name = meta.get("class")
    return tuple(template.replace("{}", name) for template in config.class_templates) if isinstance(name, str) else ()
