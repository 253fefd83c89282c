"""Tensors of a checkpoint that several ranks wrote, each its part, read as whole ones.

The files are those of torch.distributed.checkpoint in its safetensors form: one of each rank and
kind, `shard-00001-model-00002-of-00004.safetensors`, whose header says where in the whole tensors
its parts lie. Tensors are named "kind/name" there. Nothing of it is a pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load


class Reader(HuggingFaceStorageReader):
    """torch's reader that looks at the headers of all files once, however often it is used."""

    def __init__(self, folder: Path, metadata: Any = None) -> None:
        super().__init__(str(folder))
        self._metadata = metadata

    def read_metadata(self, *args: Any, **options: Any) -> Any:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **options)
        return self._metadata


class Joined(Mapping[str, Tensor]):
    """The tensors of one kind by name, each made whole when it is asked for and not kept.

    What a rank holds at a time is one tensor, however large the checkpoint is.
    """

    def __init__(self, reader: Reader, kind: str) -> None:
        self.reader, self.prefix = reader, f"{kind}/"
        self.described = {
            name.removeprefix(self.prefix): entry
            for name, entry in sorted(reader.read_metadata().state_dict_metadata.items())
            if name.startswith(self.prefix)
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self.described[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            # torch says that it reads in one process, which is meant.
            warnings.simplefilter("ignore", UserWarning)
            load({self.prefix + name: whole}, storage_reader=self.reader, no_dist=True)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)
