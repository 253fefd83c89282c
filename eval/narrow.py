"""The first numbers of a model's embeddings as embeddings: `--width` of the commands that evaluate
and search (Matryoshka representations, arXiv 2205.13147).

    x_m = x_[1:m] / ‖x_[1:m]‖

Any model can be asked for it; one trained with the objective `matryoshka` keeps its scores.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a parser is made without waiting for torch
    from vlp.eval.models import Encoder


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the option."""
    help_ = "use the first N numbers of each embedding, as `matryoshka` trains them (default: all)"
    parser.add_argument("--width", type=int, metavar="N", help=help_)


def check(width: int | None) -> None:
    """Refuse a width that no model has. ValueError."""
    if width is not None and width < 1:
        raise ValueError(f"--width is {width}; expected at least 1")


def narrowed(encoder: Encoder, width: int | None) -> Encoder:
    """The encoder of the first `width` numbers; None: of all. ModelError where it has fewer."""
    from vlp.eval.models import ModelError

    if width is None:
        return encoder
    check(width)

    embedding_width = encoder.encode_texts(["a"]).shape[1]
    if width > embedding_width:
        raise ModelError(
            f"--width is {width}, but the embeddings of {encoder.name} have {embedding_width} "
            f"numbers; name at most {embedding_width}"
        )
    if width == embedding_width:
        return encoder

    # Kept apart from the whole embeddings, on disk and in results.
    fingerprint = encoder.fingerprint
    if fingerprint:
        fingerprint = hashlib.sha256(f"{fingerprint} width {width}".encode()).hexdigest()
    name = f"{encoder.name}, width {width}"
    return replace(encoder, width=width, fingerprint=fingerprint, name=name)
