"""`vlp data embed`: shards → the embeddings of their pictures and first captions, one file a shard.

DIR/SHARD.safetensors holds
    image, text    [n, D] float16 unit rows in the order of the shard's n usable samples; zeros
                   where a picture does not open or a sample has no caption (both are counted)
    views          [n, N, D] with --views N: of N crops of each picture, which training then shows
                   the student (vlp.data.stored_views)
    captions       [m, D] with --captions, --lines each or --sentences: a row for each different
    digest         caption, found by its digest [m] int64, in the order of these (vlp.text_store)
    metadata       model (its reference), weights (a hash of them), scale (its learned inverse
                   temperature), keys (SHA-256 in hex of the samples' keys, one a line), so that a
                   reader can tell whether the shard is still the same; views (JSON)
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
from typing import TYPE_CHECKING, Any, NamedTuple

from vlp.data_tools import _encoder, _texts
from vlp.data_tools._run import work

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlp.config import Augment
    from vlp.data.members import Content
    from vlp.data.stored_views import StoredViews
    from vlp.data_tools._encoder import Model

HELP = "embed pictures and captions with a model, or captions with a language model"
EXAMPLE = """vlp data embed data/train --model runs/teacher --to data/train_embedded
  vlp data embed "data/{00000..00041}.tar" --model ViT-B-32:laion2b_s34b_b79k --to data/embedded
  vlp data embed data/train --model runs/teacher --views 5 --seed 1 \\
      --augment "{scale: [0.4, 1]}" --captions re_caption,txt --to data/reinforced
  vlp data embed data/train --text-model Qwen/Qwen3-0.6B --pool mean --to data/train_texts
  vlp data embed data/train --model hf-hub:you/teacher --to data/embedded --ray
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
    # Pictures and first captions, or captions alone: two calls make two folders.
    either = parser.add_mutually_exclusive_group(required=True)
    _encoder.arguments(parser, either=either)
    _texts.arguments(parser, either)
    _view_arguments(parser)
    work.arguments(parser)


def _view_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of crops."""
    add = parser.add_argument_group("crops, with --model").add_argument
    add("--views", type=int, default=0, metavar="N", help="embed N crops of each picture as well")
    add("--seed", type=int, default=0, metavar="S", help="of the crops (default: %(default)s)")
    add(
        "--augment",
        metavar="YAML",
        help='of the crops, as data.augment: "{scale: [0.4, 1], flip: 0.5}" (default: as there)',
    )


@work.alone
def run(args: argparse.Namespace) -> int:
    """Write the files and print what was embedded."""
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import check_names, claim, jobs

    if not (args.model or args.text_model):
        option = "--text-model" if args.model is None else "--model"
        raise ValueError(
            f"{option} is empty; expected a model, such as a folder or hf-hub:USER/NAME"
        )
    sources, pool, folder = expand(args.source), work.pool(args), destination(args.to)
    pool = pool.of_model(args.device)

    check_names(sources)
    settings, embed = _of_texts(args, folder) if args.text_model else _of_pairs(args, folder)

    # Each file by itself: a reader asks for the shard that it reads.
    claim(folder, "embed", sources, settings)
    results = work.carry_out("embed", jobs(sources, folder, "embed"), embed, pool)
    print(work.report(work.total(results), f"{folder}:"))
    return 0


def _of_pairs(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], Embed]:
    """What decides the embeddings of pictures and first captions, and the work on a shard."""
    if args.negatives:
        raise ValueError("--negatives is for --text-model: a teacher's rows are of captions")
    # Before the model is read.
    augment = _augment(args)
    model = _encoder.Model.of(args)
    assert model is not None
    settings: dict[str, Any] = model.settings()

    # Said only where there are any, so that folders from before there were some go on.
    views = None
    if augment is not None:
        from vlp.data.stored_views import StoredViews

        model.size()  # refuses a model that cannot be shown crops
        views = StoredViews(args.views, args.seed, augment, model.encoder().decoding)
        settings |= {"views": views.text}
    captions = None
    if args.captions or args.sentences or args.lines == "each":
        captions = _texts.Captions.of(args)
        settings |= captions.settings()
    return settings, Embed(model, folder, views, captions)


def _augment(args: argparse.Namespace) -> Augment | None:
    """How crops are made; None where none are asked for."""
    import yaml

    from vlp.config import Augment
    from vlp.schema import parse

    if args.views < 0:
        raise ValueError(f"--views {args.views}: expected a number of crops, at least 1")
    if not args.views:
        if args.augment is not None or args.seed:
            raise ValueError("--augment and --seed are of crops; say how many with --views N")
        return None

    try:
        written = yaml.safe_load(args.augment or "{}")
        augment: Augment = parse(Augment, written)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"--augment {args.augment!r}: {error}; expected keys of data.augment, such as "
            '"{scale: [0.4, 1], flip: 0.5}"'
        ) from None
    return augment


def _of_texts(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], _texts.EmbedTexts]:
    """The same for the captions alone."""
    if args.views or args.seed or args.augment is not None:
        raise ValueError("--views, --seed and --augment are of pictures; they go with --model")
    model = _texts.TextModel.of(args)
    captions = _texts.Captions.of(args)
    return model.settings() | captions.settings(), _texts.EmbedTexts(model, folder, captions)


class Crop(NamedTuple):
    """One of the crops of a sample's picture."""

    image: bytes
    key: str
    number: int


@dataclass(frozen=True)
class Embed:
    """The work on one shard."""

    model: Model
    folder: Path
    views: StoredViews | None = None
    captions: _texts.Captions | None = None  # None: the first alone

    def __call__(self, job: tuple[int, Path]) -> work.Result:
        import torch

        from vlp.data_tools._run.shards import samples
        from vlp.data_tools._run.tensors import as_bytes
        from vlp.files import write_atomically

        _, path = job
        keys: list[str] = []
        counts: Counter[str] = Counter()
        nothing = torch.zeros(0, self.model.width())  # a shard may hold no sample
        image_rows, text_rows, view_rows = [nothing], [nothing], [nothing]
        texts: dict[str, None] = {}
        # In batches, in the order of the shard, so that a row's number is its sample's.
        for batch, images in self.model.batches(samples(path, counts), counts):
            keys += [sample.key for sample in batch]
            image_rows.append(images)
            text_rows.append(self._texts(batch, counts))
            view_rows += self._of_views(batch)
            if self.captions is not None:
                for sample in batch:
                    texts |= self.captions.texts(sample)

        metadata = self._metadata(keys)
        tensors = {"image": torch.cat(image_rows).half(), "text": torch.cat(text_rows).half()}
        if self.views is not None:
            shape = (len(keys), self.views.n, self.model.width())
            tensors["views"] = torch.cat(view_rows).half().view(shape)
        if self.captions is not None:
            tensors |= self._of_captions(list(texts))
            counts["captions embedded"] += len(texts)
        write_atomically(self.folder / f"{path.stem}.safetensors", as_bytes(tensors, metadata))
        return {"counts": counts}

    def _metadata(self, keys: list[str]) -> dict[str, str]:
        """Whose rows they are, and of which samples and crops."""
        encoder = self.model.encoder()
        metadata = {
            "model": self.model.ref,
            "weights": encoder.fingerprint[:16],
            "scale": str(encoder.scale),
            "keys": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
        }
        return metadata if self.views is None else metadata | {"views": self.views.text}

    def _of_views(self, batch: list[Content]) -> list[Tensor]:
        """Unit rows of the crops of a batch, sample by sample."""
        if self.views is None:
            return []
        crops = []
        for sample in batch:
            crops += [Crop(sample.image, sample.key, view) for view in range(self.views.n)]
        unopened: Counter[str] = Counter()  # counted with the whole pictures already
        return [rows for _, rows in self.model.batches(crops, unopened, self._cut)]

    def _cut(self, crop: Crop) -> Image:
        """The crop at the size that the model reads, so that its transform leaves it as it is."""
        from PIL import Image as images

        from vlp.types import ImageSpec

        assert self.views is not None
        spec = ImageSpec(self.model.size())
        pixels = self.views.pixels(crop.image, crop.key, crop.number, spec)
        return images.fromarray(pixels.permute(1, 2, 0).numpy())

    def _of_captions(self, texts: list[str]) -> dict[str, Tensor]:
        """The rows of captions, and by what they are found."""
        import torch

        from vlp.text_store import digests

        rows = [torch.zeros(0, self.model.width())]
        for first in range(0, len(texts), self.model.batch):
            part = texts[first : first + self.model.batch]
            rows.append(self.model.encoder().encode_texts(part).cpu())

        # In the order of the digests, so that a reader finds one by halving.
        of_texts, order = torch.from_numpy(digests(texts)).sort()
        return {"captions": torch.cat(rows)[order].half(), "digest": of_texts}

    def _texts(self, batch: list[Content], counts: Counter[str]) -> Tensor:
        import torch

        rows = torch.zeros(len(batch), self.model.width())

        # Only those that have one: an empty text would get a direction of its own.
        captions = {i: sample.captions[0] for i, sample in enumerate(batch) if sample.captions}
        if captions:
            embedded = self.model.encoder().encode_texts(list(captions.values()))
            rows[list(captions)] = embedded.cpu()

        for i, sample in enumerate(batch):
            has_chosen = self.captions is not None and self.captions.texts(sample)
            if i not in captions and not has_chosen:
                counts["samples without a caption"] += 1
        return rows
