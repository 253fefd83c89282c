"""Embeddings of samples by any model that `vlp eval` loads, a batch at a time while a shard is
read.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlp.eval.models import Encoder


class HasImage(Protocol):
    """What is needed of a sample: `Content` of a shard and `Sample` of a source have it."""

    @property
    def image(self) -> bytes: ...


Pictured = TypeVar("Pictured", bound=HasImage)


def arguments(
    parser: argparse.ArgumentParser,
    required: bool = False,
    either: argparse._ActionsContainer | None = None,
) -> None:
    """The options of a tool that uses a model. `either`: a group of which one option is given."""
    add = parser.add_argument
    (either or parser).add_argument(
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
        """The model that the options name, if any; raises ValueError where it cannot be loaded."""
        if not args.model:
            return None
        model = cls.named(args)

        # What is wrong with it shows now, not in the first shard.
        model.encoder()
        return model

    @classmethod
    def named(cls, args: argparse.Namespace) -> Model:
        """The same before it is loaded; raises ValueError for its options."""
        if args.batch < 1:
            raise ValueError(f"--batch {args.batch} must be at least 1")
        return cls(args.model, args.device, args.batch, args.bf16)

    def settings(self) -> dict[str, str | bool]:
        """What embeddings depend on."""
        return {"model": self.ref, "weights": self.encoder().fingerprint[:16], "bf16": self.bf16}

    def encoder(self) -> Encoder:
        """The model, loaded once a process; raises ValueError."""
        return _load(self.ref, self.device, self.bf16)

    def batches(
        self,
        samples: Iterable[Pictured],
        counts: Counter[str],
        cut: Callable[[Pictured], Image] | None = None,
    ) -> Iterator[tuple[list[Pictured], Tensor]]:
        """Batches of samples with their pictures' unit rows [n, D] float32; a picture that does not
        open is counted: zeros. `cut`: what is shown of a picture; None: as evaluation shows it.

        Threads decode the next batch while the model computes; no more than two batches are held.
        """
        samples = iter(samples)
        waiting: deque[tuple[list[Pictured], list[Future[Tensor | None]]]] = deque()

        # Before the threads ask for it: functools.cache does not lock, so that each would load its
        # own.
        self.encoder()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            while True:
                batch = list(islice(samples, self.batch))
                if not batch:
                    break
                waiting.append((batch, [pool.submit(self._pixels, item, cut) for item in batch]))
                if len(waiting) == 2:
                    decoded, pixels = waiting.popleft()
                    yield self._rows(decoded, pixels, counts)

            while waiting:
                decoded, pixels = waiting.popleft()
                yield self._rows(decoded, pixels, counts)

    def width(self) -> int:
        """D, the length of an embedding."""
        return _width(self)

    def size(self) -> tuple[int, int]:
        """Height and width of the pixels that the model reads; ValueError for a transform that cuts
        or scales a picture of just that size.
        """
        return _size(self)

    def _pixels(self, sample: Pictured, cut: Callable[[Pictured], Image] | None) -> Tensor | None:
        from vlp.data.picture import rgb

        encoder = self.encoder()
        try:
            picture = rgb(sample.image, encoder.decoding) if cut is None else cut(sample)
            return encoder.prepare(picture)
        except ValueError:
            return None

    def _rows(
        self, batch: list[Pictured], pixels: list[Future[Tensor | None]], counts: Counter[str]
    ) -> tuple[list[Pictured], Tensor]:
        import torch

        decoded = [future.result() for future in pixels]
        opened = {i: image for i, image in enumerate(decoded) if image is not None}

        # A picture that does not open keeps its row, so that rows stay beside their samples.
        rows = torch.zeros(len(batch), self.width())
        if opened:
            embedded = self.encoder().encode_images(torch.stack(list(opened.values())))
            rows[list(opened)] = embedded.cpu()
        if len(opened) < len(batch):
            counts["unreadable: pictures"] += len(batch) - len(opened)
        return batch, rows


@cache
def _load(ref: str, device: str, bf16: bool) -> Encoder:
    import torch

    from vlp.eval.models import load
    from vlp.joining import local_device

    # A tool's processes work alone, so that several may share a GPU.
    autocast = torch.bfloat16 if bf16 else None
    return load(ref, local_device(device, shared=True), autocast)


@cache
def _width(model: Model) -> int:
    return model.encoder().encode_texts(["a"]).shape[1]


@cache
def _size(model: Model) -> tuple[int, int]:
    import torch
    from PIL import Image

    prepare = model.encoder().prepare
    _, height, width = prepare(Image.new("RGB", (512, 512))).shape

    # Up to the normalisation of each channel noise comes back as it went in, or it was resized.
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    seen = prepare(Image.fromarray(noise.byte().numpy())).float()
    for channel, shown in zip(noise.permute(2, 0, 1).float(), seen):
        similarity = torch.corrcoef(torch.stack([channel.flatten(), shown.flatten()]))[0, 1]
        if similarity < 0.999:
            raise ValueError(
                f"{model.ref} resizes or cuts pictures of the {height} x {width} pixels that it "
                "reads, so that it would not see the crops that a student sees; leave --views out"
            )
    return height, width
