"""Embeddings of samples by any model that `vlp eval` loads, batch by batch while a shard is read."""

from __future__ import annotations

import argparse
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.data.members import Content
    from vlp.eval.models import Encoder


def arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The options of a tool that uses a model."""
    add = parser.add_argument
    add(
        "--model",
        required=required,
        metavar="REF",
        help="a run, checkpoint or export; a folder or hf-hub:USER/NAME of open_clip "
        "or transformers; ARCHITECTURE:TAG or ARCHITECTURE:FILE",
    )
    add(
        "--device",
        default="auto",
        help="auto: the GPU of the launcher's local rank, or the CPU (default: %(default)s)",
    )
    add(
        "--batch",
        type=int,
        default=64,
        metavar="N",
        help="samples a forward pass (default: %(default)s)",
    )
    add(
        "--bf16",
        action="store_true",
        help="compute in bfloat16: faster, cosines differ by about 0.001",
    )


@dataclass(frozen=True)
class Model:
    """A model by name; each process loads it when it first needs it."""

    ref: str
    device: str = "auto"
    batch: int = 64
    bf16: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Model | None:
        """The model that the options name, if any; raises ValueError for one that cannot be loaded."""
        if not args.model:
            return None
        if args.batch < 1:
            raise ValueError(f"--batch {args.batch} must be at least 1")
        model = cls(args.model, args.device, args.batch, args.bf16)
        model.encoder()  # what is wrong with it shows now, not in the first shard
        return model

    def settings(self) -> dict[str, str | bool]:
        """What embeddings depend on."""
        return {"model": self.ref, "weights": self.encoder().fingerprint[:16], "bf16": self.bf16}

    def encoder(self) -> Encoder:
        """The model, loaded once a process; raises ValueError."""
        return _load(self.ref, self.device, self.bf16)

    def batches(
        self, samples: Iterable[Content], counts: Counter[str]
    ) -> Iterator[tuple[list[Content], Tensor]]:
        """Batches of samples with their pictures' unit rows [n, D] float32; a picture that does not
        open is counted: zeros.

        Threads decode the next batch while the model computes; no more than two batches are held.
        """
        samples, waiting = iter(samples), deque()
        # before the threads ask for it: functools.cache does not lock, so that each would load its
        # own
        self.encoder()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            while batch := list(islice(samples, self.batch)):
                waiting.append((batch, [pool.submit(self._pixels, sample) for sample in batch]))
                if len(waiting) == 2:
                    yield self._rows(*waiting.popleft(), counts)
            while waiting:
                yield self._rows(*waiting.popleft(), counts)

    def width(self) -> int:
        """D, the length of an embedding."""
        return _width(self)

    def _pixels(self, sample: Content) -> Tensor | None:
        from vlp.data.picture import rgb

        encoder = self.encoder()
        try:
            return encoder.prepare(rgb(sample.image, encoder.decoding))
        except ValueError:
            return None

    def _rows(
        self, batch: list[Content], pixels: list, counts: Counter[str]
    ) -> tuple[list[Content], Tensor]:
        import torch

        found = [future.result() for future in pixels]
        good = [i for i, image in enumerate(found) if image is not None]
        rows = torch.zeros(len(batch), self.width())
        if good:
            rows[good] = self.encoder().encode_images(torch.stack([found[i] for i in good])).cpu()
        if len(good) < len(batch):
            counts["unreadable: pictures"] += len(batch) - len(good)
        return batch, rows


@cache
def _load(ref: str, device: str, bf16: bool) -> Encoder:
    import torch

    from vlp.eval.models import load

    if device == "auto":
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return load(ref, device, torch.bfloat16 if bf16 else None)


@cache
def _width(model: Model) -> int:
    return model.encoder().encode_texts(["a"]).shape[1]
