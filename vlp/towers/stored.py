"""Text embeddings of a language model that were stored before training, with an adaptor that learns
(LLM2CLIP, Huang et al. 2024, arXiv 2411.04997).

`vlp data embed --text-model MODEL` writes them. The store says which model made them, with which
prompt and pooling; training does not load it, evaluation and what is exported do, by its name.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vlp.text_store import writer_of
from vlp.towers.llm import Adaptor


@dataclass(frozen=True)
class Options:
    # folders that `vlp data embed --text-model` made of the run's captions, joined by ::
    embeddings: str
    adaptor: Adaptor | None = field(default_factory=Adaptor)  # null: a projection alone


def text_cfg(options: Options) -> dict[str, Any]:
    writer = writer_of(options.embeddings)
    section = writer.section
    section["vlp_text"] |= {
        "adaptor": None if options.adaptor is None else asdict(options.adaptor),
        # The language model stays where it is; its hash says whether it is still the same.
        "reference": writer.weights,
    }
    return section
