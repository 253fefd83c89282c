"""What a language model gave texts, stored before training: written by `vlp data embed
--text-model`, looked up by the text itself.

DIR/SHARD.safetensors holds
    text        [m, width] float16, a row for each different caption of the shard
    digest      [m] int64, of the captions
    metadata    text_cfg (JSON: the language model, its prompt and pooling), weights (a hash of its
                weights)

Rows are found by what a caption says, so that data may be shuffled, packed anew or moved, and any
of a sample's captions may be drawn. Their length does not count: `vlp.models.language` scales them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_REMEDY = "make it with `vlp data embed SHARDS --text-model MODEL --to DIR`"


class Writer(NamedTuple):
    """Which language model wrote a store, and how it read the texts."""

    text_cfg: str  # JSON
    weights: str  # a hash of them

    @property
    def section(self) -> dict[str, Any]:
        """The `text_cfg` of a tower that reads texts so (vlp.towers.llm)."""
        return json.loads(self.text_cfg)

    @property
    def model(self) -> str:
        """The Hub name or folder of the language model."""
        return self.section["hf_model_name"]


def digest(text: str) -> int:
    """64 bits of a text, by which its row is found."""
    hashed = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(hashed, "little", signed=True)


def digests(texts: Iterable[str]) -> np.ndarray:
    """`digest` of each text, int64 [n]."""
    return np.fromiter(map(digest, texts), np.int64)


def files_of(folders: str) -> list[Path]:
    """The files of stores, several folders joined by ::; ValueError for a folder without any."""
    files: list[Path] = []
    for folder in folders.split("::"):
        of_folder = sorted(Path(folder).expanduser().glob("*.safetensors"))
        if not of_folder:
            raise ValueError(f"{folder} holds no stored text embeddings; {_REMEDY}")
        files += of_folder
    return files


def writer_of(folders: str) -> Writer:
    """Who wrote these stores; ValueError where they hold something else, or are of several
    models.
    """
    writers = {_read(path)[0]: path for path in files_of(folders)}
    if len(writers) > 1:
        listed = "; ".join(f"{path}: {writer.model}" for writer, path in writers.items())
        raise ValueError(
            f"{folders} is of several models or prompts ({listed}); make all of it anew with one"
        )
    [writer] = writers
    return writer


class TextStore:
    """Rows by text. It takes the place of a tokenizer where the loader makes a batch, and its rows
    that of ids. Loader processes receive a handle of its table.
    """

    def __init__(self, folders: str) -> None:
        self.folders = folders
        self.writer = writer_of(folders)
        self.width: int = self.writer.section["vlp_text"]["width"]
        self._files = files_of(folders)

        # All digests in order, and beside each its row, counted over all files.
        of_files = [_read(path)[1] for path in self._files]
        self._firsts = np.cumsum([0, *map(len, of_files)])
        joined = np.concatenate(of_files)
        order = np.argsort(joined, kind="stable")
        self._digests = torch.from_numpy(joined[order]).share_memory_()
        self._rows = torch.from_numpy(order).share_memory_()

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, texts: Iterable[str]) -> None:
        """Raise ValueError for a text that is not stored."""
        for text in texts:
            if self._row(text) is None:
                shown = text if len(text) <= 60 else f"{text[:60]}…"
                raise ValueError(
                    f"{self.folders} has no embedding of the caption {shown!r}; embed what the run "
                    "draws: `vlp data embed` with --captions, --lines or --negatives"
                )

    def tokenize(self, texts: list[str]) -> tuple[Tensor, int]:
        """The rows of texts, float32 [n, width], zeros for an empty text, of which none is cut;
        ValueError for one that is not stored.
        """
        result = torch.zeros(len(texts), self.width)
        for i, text in enumerate(texts):
            if not text:
                continue
            row = self._row(text)
            if row is None:
                self.check([text])
                continue
            file = int(np.searchsorted(self._firsts, row, side="right")) - 1
            stored = _opened(self._files[file])[row - int(self._firsts[file])]
            result[i] = torch.from_numpy(stored.astype(np.float32))
        return result, 0

    def _row(self, text: str) -> int | None:
        """The number of a text's row over all files; None where there is none."""
        digests, wanted = self._digests.numpy(), digest(text)
        place = int(np.searchsorted(digests, wanted))
        if place == len(digests) or digests[place] != wanted:
            return None
        return int(self._rows[place])


def _read(path: Path) -> tuple[Writer, np.ndarray]:
    """Who wrote a file, and the digests of its texts."""
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            rows = file.get_slice("text").get_shape()
            of_texts = file.get_tensor("digest")
        writer = Writer(about["text_cfg"], about["weights"])
        width = writer.section["vlp_text"]["width"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no stored text embeddings ({type(error).__name__}: {error}); {_REMEDY}"
        ) from None

    if rows != [len(of_texts), width]:
        raise ValueError(
            f"{path} holds {rows} numbers for {len(of_texts)} texts of width {width}; {_REMEDY}"
        )
    return writer, of_texts


@lru_cache(maxsize=128)  # a process keeps this many files open
def _opened(path: Path) -> Any:
    """The rows of a file, float16 [m, width]; only those that are asked for are read."""
    return safe_open(path, "numpy").get_slice("text")
