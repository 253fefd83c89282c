"""`vlp data embed`: shards → the embeddings of their pictures and first captions, one file a shard.

DIR/SHARD.safetensors holds
    image, text    [n, D] float16 unit rows in the order of the shard's n usable samples; zeros where a picture does not
                   open or a sample has no caption (both are counted)
    metadata       model (its reference), scale (its learned inverse temperature), keys (SHA-256 in hex of the samples'
                   keys, one a line), so that a reader can tell whether the shard is still the same
The source option `embeddings: DIR` pool them to training as a teacher's; `vlp data dedup
--embeddings DIR` reads them.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data_tools import _encoder
from vlp.data_tools._run import work

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.data.members import Content
    from vlp.data_tools._encoder import Model

HELP = "embed pictures and captions with a model, one file a shard"
EXAMPLE = """vlp data embed data/train --model runs/teacher --to data/train_embedded
  vlp data embed "data/{00000..00041}.tar" --model ViT-B-32:laion2b_s34b_b79k --batch 256 --to data/embedded
  srun --ntasks=16 --gpus-per-task=1 vlp data embed data/train --model hf-hub:you/teacher --to data/embedded
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data embed`."""
    parser.add_argument(
        "source", help="shards: a folder, a tar, or a pattern with braces; several joined by ::"
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="DIR",
        help="folder for the files; the same call goes on where one stopped",
    )
    _encoder.arguments(parser, required=True)
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Write the files and print what was embedded."""
    from vlp.data.paths import expand
    from vlp.data_tools._run.shards import claim, jobs

    sources, pool = expand(args.source), work.pool(args)
    names = Counter(path.stem for path in sources)
    if twice := [name for name, n in names.items() if n > 1]:
        raise ValueError(
            f"several shards are called {twice[0]}; embed each folder of shards into a folder of its own"
        )
    model, folder = _encoder.Model.of(args), Path(args.to)
    assert model is not None  # --model is required
    claim(folder, "embed", sources, model.settings())
    results = work.carry_out("embed", jobs(sources, folder, "embed"), Embed(model, folder), pool)
    print(work.report(work.total(results), f"{folder}:"))
    return 0


@dataclass(frozen=True)
class Embed:
    """The work on one shard."""

    model: Model
    folder: Path

    def __call__(self, job: tuple[int, Path]) -> work.Result:
        import torch
        from safetensors.torch import save

        from vlp.data_tools._run.shards import samples
        from vlp.files import write_atomically

        keys: list[str] = []
        counts: Counter[str] = Counter()
        rows = {
            "image": [torch.zeros(0, self.model.width())],
            "text": [torch.zeros(0, self.model.width())],
        }
        for batch, images in self.model.batches(samples(job[1], counts), counts):
            keys += [sample.key for sample in batch]
            rows["image"].append(images)
            rows["text"].append(self._texts(batch, counts))
        about = {"model": self.model.ref, "scale": str(self.model.encoder().scale)}
        about["keys"] = hashlib.sha256("\n".join(keys).encode()).hexdigest()
        tensors = {name: torch.cat(parts).half() for name, parts in rows.items()}
        write_atomically(self.folder / f"{job[1].stem}.safetensors", save(tensors, about))
        return {"counts": counts}

    def _texts(self, batch: list[Content], counts: Counter[str]) -> Tensor:
        import torch

        rows = torch.zeros(len(batch), self.model.width())
        told = [i for i, sample in enumerate(batch) if sample.captions]
        if told:
            rows[told] = (
                self.model.encoder().encode_texts([batch[i].captions[0] for i in told]).cpu()
            )
        if len(told) < len(batch):
            counts["samples without a caption"] += len(batch) - len(told)
        return rows
