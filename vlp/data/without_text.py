"""What to tell of samples in which no caption was found: where it may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlp.data.captions import listed
from vlp.data.rows import of_modalities, said, unread
from vlp.data.tables import fetched
from vlp.data.text_files import TEXT_FILES

_NO_IMAGE = ": no image member"  # behind the key in a shard's problem


def other_names(names: Mapping[str, int]) -> str:
    """Which texts the samples have, of which captions may be chosen."""
    if not names:
        return ""
    return f"There are texts under {listed(names)}: name those to take in the source's captions. "


def unread_texts(left_out: Mapping[str, int], problems: Iterable[str]) -> str:
    """The members that no reader looks at, and the texts that lie in other tars than their
    images.
    """
    told = ""
    # Sounds, frames and numbers are read by towers of their own, and hold no text.
    members = {kind: n for kind, n in unread(left_out).items() if not of_modalities({kind: n})}
    if members:
        extensions = ", ".join(f".{extension}" for extension in (*TEXT_FILES, "json"))
        told = (
            f". In the tars nobody reads {said(members)}: captions are read from {extensions} of "
            "the image's name"
        )

    alone = next((problem for problem in problems if _NO_IMAGE in problem), "")
    if alone:
        example = alone.partition(_NO_IMAGE)[0]
        told += (
            f". {left_out['no image member']:,} keys have no image in their tar ({example}): call "
            "each text as its image; where images and texts lie in different tars, join them: "
            "cat a/0.tar b/0.tar > c/0.tar"
        )
    return told


def columns_beside(paths: Sequence[str]) -> str:
    """How img2dataset's parquet files beside the shards come into the samples."""
    if not any(fetched.beside(Path(path)) for path in paths):
        return ""
    return (
        ". Parquet files lie beside the shards: vlp data filter SHARDS --to DIR writes their "
        "columns into the samples"
    )
