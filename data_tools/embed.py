"""`vlp data embed`: shards → the embeddings of their pictures and first captions, one file a shard.

DIR/SHARD.safetensors holds
    image, text    [n, D] float16 unit rows in the order of the shard's n usable samples; zeros
                   where a picture does not open or a sample has no caption (both are counted)
    metadata       model (its reference), weights (a hash of them), scale (its learned inverse
                   temperature), keys (SHA-256 in hex of the samples' keys, one a line), so that a
                   reader can tell whether the shard is still the same
With --text-model the files hold the embeddings of captions by a language model instead, a row for
each different caption (vlp.text_store), which `text_tower: {name: stored, embeddings: DIR}` reads.
The source option `embeddings: DIR` gives a teacher's to training; `vlp data dedup --embeddings DIR`
reads them.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools import _encoder, _texts
from vlp.data_tools._run import work

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.data.members import Content
    from vlp.data_tools._encoder import Model

HELP = "embed pictures and captions with a model, or captions with a language model"
EXAMPLE = """vlp data embed data/train --model runs/teacher --to data/train_embedded
  vlp data embed "data/{00000..00041}.tar" --model ViT-B-32:laion2b_s34b_b79k --to data/embedded
  vlp data embed data/train --text-model Qwen/Qwen3-0.6B --pool mean --to data/train_texts
  srun --ntasks=16 vlp data embed data/train --model hf-hub:you/teacher --to data/embedded
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
    _encoder.arguments(parser)
    _texts.arguments(parser)
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Write the files and print what was embedded."""
    from vlp.data.paths import expand
    from vlp.data_tools._run.shards import claim, jobs

    sources, pool, folder = expand(args.source), work.pool(args), Path(args.to)

    # A file is named after its shard, so two shards of one name would overwrite each other's.
    names = Counter(path.stem for path in sources)
    repeated = [name for name, n in names.items() if n > 1]
    if repeated:
        raise ValueError(
            f"several shards are called {repeated[0]}; "
            "embed each folder of shards into a folder of its own"
        )

    if bool(args.model) == bool(args.text_model):
        raise ValueError(
            "name either --model, which embeds pictures and first captions, or --text-model, which "
            "embeds captions; two calls make two folders"
        )
    settings, embed = _of_texts(args, folder) if args.text_model else _of_pairs(args, folder)

    # Each file by itself: a reader asks for the shard that it reads.
    claim(folder, "embed", sources, settings)
    results = work.carry_out("embed", jobs(sources, folder, "embed"), embed, pool)
    print(work.report(work.total(results), f"{folder}:"))
    return 0


def _of_pairs(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], Embed]:
    """What decides the embeddings of pictures and first captions, and the work on a shard."""
    model = _encoder.Model.of(args)
    assert model is not None
    return model.settings(), Embed(model, folder)


def _of_texts(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], _texts.EmbedTexts]:
    """The same for the captions alone."""
    model = _texts.TextModel.of(args)
    names = tuple(name.strip() for name in args.captions.split(",") if name.strip())
    chosen = {"lines": args.lines, "sentences": args.sentences, "negatives": args.negatives}
    settings = model.settings() | {"captions": names} | chosen
    return settings, _texts.EmbedTexts(model, folder, names, **chosen)


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

        _, path = job
        keys: list[str] = []
        counts: Counter[str] = Counter()
        nothing = torch.zeros(0, self.model.width())  # a shard may hold no sample
        image_rows, text_rows = [nothing], [nothing]
        # In batches, in the order of the shard, so that a row's number is its sample's.
        for batch, images in self.model.batches(samples(path, counts), counts):
            keys += [sample.key for sample in batch]
            image_rows.append(images)
            text_rows.append(self._texts(batch, counts))

        metadata = {
            "model": self.model.ref,
            "weights": self.model.encoder().fingerprint[:16],
            "scale": str(self.model.encoder().scale),
            "keys": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
        }
        tensors = {"image": torch.cat(image_rows).half(), "text": torch.cat(text_rows).half()}
        write_atomically(self.folder / f"{path.stem}.safetensors", save(tensors, metadata))
        return {"counts": counts}

    def _texts(self, batch: list[Content], counts: Counter[str]) -> Tensor:
        import torch

        rows = torch.zeros(len(batch), self.model.width())

        # Only those that have one: an empty text would get a direction of its own.
        captions = {i: sample.captions[0] for i, sample in enumerate(batch) if sample.captions}
        if captions:
            embedded = self.model.encoder().encode_texts(list(captions.values()))
            rows[list(captions)] = embedded.cpu()

        n_without = len(batch) - len(captions)
        if n_without:
            counts["samples without a caption"] += n_without
        return rows
