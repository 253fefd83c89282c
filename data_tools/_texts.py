"""The embeddings of a shard's captions by a language model (vlp.text_store)."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools._run import work

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.data.members import Content
    from vlp.models.language import LanguageTower

POOLS = ("last", "mean", "eos")  # latent attention learns, so that nothing of it can be stored


def arguments(parser: argparse.ArgumentParser, either: argparse._ActionsContainer) -> None:
    """The options of text embeddings; the model's is one of the group `either`."""
    either.add_argument(
        "--text-model", metavar="MODEL", help="Hub name or folder of a decoder-only model"
    )
    add = parser.add_argument_group("captions by a language model").add_argument
    add("--pool", choices=POOLS, default="last", help="where a caption is read (default: last)")
    add(
        "--attention",
        choices=("causal", "bidirectional"),
        default="causal",
        help="what a token sees (default: causal)",
    )
    add("--prompt", default="{}", help="what stands around the caption, {} (default: it alone)")
    add("--context-length", type=int, default=77, metavar="L", help="tokens (default: 77)")

    chosen = parser.add_argument_group("which captions (with --model: the first, unless said)")
    add = chosen.add_argument
    add("--captions", default="", metavar="NAMES", help="as the source's captions: long,txt")
    add("--lines", choices=("one", "each"), default="one", help="as the source's lines")
    add("--sentences", action="store_true", help="the sentences of captions too")
    add("--negatives", action="store_true", help="hard and counterfactual captions too")


@dataclass(frozen=True)
class Captions:
    """Which captions of a sample are embedded."""

    names: tuple[str, ...]
    lines: Any  # "one" or "each"
    sentences: bool
    negatives: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Captions:
        """Those that the options name."""
        names = tuple(name.strip() for name in args.captions.split(",") if name.strip())
        return cls(names, args.lines, args.sentences, args.negatives)

    def settings(self) -> dict[str, Any]:
        """What decides which captions are embedded."""
        further = {"sentences": self.sentences, "negatives": self.negatives}
        return {"captions": self.names, "lines": self.lines} | further

    def texts(self, sample: Content) -> dict[str, None]:
        """The different texts of a sample that training may draw, in its order."""
        return dict.fromkeys(self._each(sample))

    def _each(self, sample: Content) -> Iterator[str]:
        from vlp.data.captions import Choice
        from vlp.data.sentences import sentences
        from vlp.data.wrong_captions import LISTS, read

        captions = Choice(self.names, lines=self.lines).captions(sample.meta, sample.text)
        yield from captions
        if self.sentences:
            for caption in captions:
                yield from sentences(caption)
        if self.negatives:
            for field in LISTS:
                yield from filter(None, read(sample.meta, field, captions).texts)


@dataclass(frozen=True)
class TextModel:
    """A language model by name and how it reads; each process loads it when it first needs it."""

    text_cfg: str  # JSON
    device: str = "auto"
    batch: int = 64
    bf16: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> TextModel:
        """What the options name; ValueError where it cannot be."""
        from vlp.towers import llm

        if args.batch < 1:
            raise ValueError(f"--batch {args.batch} must be at least 1")
        # A folder by its whole path: the store is read from elsewhere.
        place = Path(args.text_model).expanduser()
        name = str(place.resolve()) if place.is_dir() else args.text_model
        options = llm.Options(
            name,
            pool=args.pool,
            attention=args.attention,
            prompt=args.prompt.replace("\\n", "\n"),
            context_length=args.context_length,
        )
        return cls(json.dumps(llm.text_cfg(options)), args.device, args.batch, args.bf16)

    def settings(self) -> dict[str, Any]:
        """What embeddings depend on."""
        return {"text_cfg": self.text_cfg, "weights": self.weights(), "bf16": self.bf16}

    def weights(self) -> str:
        """A hash of the language model's weights."""
        return _load(self)[1]

    def rows(self, texts: list[str]) -> Tensor:
        """Unit rows [n, width], float32."""
        import torch
        from torch.nn.functional import normalize

        from vlp.data import text as tokenizers
        from vlp.models.assemble import text_spec

        tower, _ = _load(self)
        section = json.loads(self.text_cfg)
        tokenizer = tokenizers.build(text_spec(section, section["context_length"]))

        # By length, so that a batch holds little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows = torch.zeros(len(texts), tower.width)
        for first in range(0, len(order), self.batch):
            places = order[first : first + self.batch]
            pooled = self._pooled(tower, tokenizer([texts[i] for i in places]))
            rows[places] = normalize(pooled.float(), dim=-1).cpu()
        return rows

    def _pooled(self, tower: LanguageTower, ids: Tensor) -> Tensor:
        """[n, L] → [n, width], the padding that all rows share cut away."""
        import torch

        from vlp.data.prompted import PADDING

        device = tower.projection.weight.device
        longest = int((ids != PADDING).sum(dim=1).max())
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)
        with torch.no_grad(), autocast:
            return tower.pooled(ids[:, :longest].to(device))


@cache
def _load(model: TextModel) -> tuple[LanguageTower, str]:
    """The tower, and the hash of its language model."""
    from vlp.joining import local_device
    from vlp.models.language import LanguageTower, weights_of

    tower = LanguageTower(json.loads(model.text_cfg), 1).eval()
    weights = weights_of(tower.transformer)
    return tower.to(local_device(model.device, shared=True)), weights


@dataclass(frozen=True)
class EmbedTexts:
    """The work on one shard."""

    model: TextModel
    folder: Path
    captions: Captions

    def __call__(self, job: tuple[int, Path]) -> work.Result:
        import torch

        from vlp.data_tools._run.shards import samples
        from vlp.data_tools._run.tensors import as_bytes
        from vlp.files import write_atomically
        from vlp.text_store import digests

        _, path = job
        counts: Counter[str] = Counter()
        texts: dict[str, None] = {}  # a set in the order of the shard
        for sample in samples(path, counts):
            of_sample = self.captions.texts(sample)
            if not of_sample:
                counts["samples without a caption"] += 1
            texts |= of_sample
        counts["texts embedded"] += len(texts)

        tensors = {
            "text": self.model.rows(list(texts)).half(),
            "digest": torch.from_numpy(digests(texts)),
        }
        metadata = {"text_cfg": self.model.text_cfg, "weights": self.model.weights()}
        write_atomically(self.folder / f"{path.stem}.safetensors", as_bytes(tensors, metadata))
        return {"counts": counts}
