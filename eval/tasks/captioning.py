"""Captions that a model writes of pictures, against those that people wrote: CIDEr-D (Vedantam et
al. 2015, arXiv 1411.5726) and BLEU, on COCO, Flickr30k and every other set that retrieval reads.

The model needs a text decoder (coca_* of open_clip, or model.decoder). Each picture gets one
caption, greedy or by beam search, and all its references count. Scores are those of COCO's caption
evaluation; published tables show them times 100. With `tokenizer: ptb` the words are COCO's too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from vlp import dist
from vlp.data.captions import Texts
from vlp.data.tables import TableOptions
from vlp.eval import caption_scores, embed
from vlp.eval.datasets.source import Source
from vlp.eval.embed import Context
from vlp.eval.models import Encoder, ModelError
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, retrieval, shared
from vlp.models.describe import Search

VERSION = 1
KNOWN_AS = "captioning"
MAIN = "cider"
SCORES = ("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "mean_words", "different")
NEEDS_DECODER = True  # of the model; asked before any task of a run starts
N_SHOWN = 3  # captions, in the lines of progress


@dataclass(frozen=True)
class Options(Texts, TableOptions):
    """Which images and references, and how captions are searched for."""

    data: str  # as for retrieval
    images: str | None = None  # as for retrieval
    split: str = "test"  # which split of the data is scored
    captions_per_image: int | None = None  # the first so many references; None: all
    # annotations without their image, images without a reference
    missing: Literal["error", "skip"] = "error"
    language: str = "en"  # recorded in the result
    beams: int = 1  # hypotheses that the search keeps; 1: greedy
    min_tokens: int = 5  # in front of the end token, begin token included
    max_tokens: int = 30  # of a caption, begin and end token included
    # of beams: a hypothesis of n tokens is worth log p / n^length_penalty
    length_penalty: float = 1.0
    # how texts become words: plain, or ptb, COCO's own, which needs Java
    tokenizer: Literal["plain", "ptb"] = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        shared(retrieval.Options, self)  # its checks
        shared(Search, self)

    @property
    def search(self) -> Search:
        return shared(Search, self)


def read(options: Options) -> Source:
    """Open the set; at least two images, each with a reference."""
    caption_scores.check_installed(options.tokenizer)
    source = retrieval.read(shared(retrieval.Options, options))
    if len(source.records) < 2:
        raise DataError(
            f"{options.data} has {len(source.records)} image with captions; CIDEr weighs words by "
            "how few images have them, and needs at least 2"
        )
    return source


def run(encoder: Encoder, data: Source, options: Options, context: Context) -> TaskResult:
    """A caption of every image, and its scores."""
    assert encoder.describer is not None, "vlp.eval.evaluation asks for it"
    try:
        encoder.describer.check(options.search)
    except ValueError as error:
        raise ModelError(f"{encoder.name}: {error}") from error

    pictures = [record.picture for record in data.records]
    references = [_references(record.captions, options) for record in data.records]
    ids = embed.captions(encoder, pictures, options.search, context).tolist()
    written = [encoder.describer.caption(row) for row in ids]
    if context.progress and dist.is_main():
        for picture, caption in list(zip(pictures, written))[:N_SHOWN]:
            print(f"  {picture.name}: {caption}", file=sys.stderr, flush=True)

    scores = caption_scores.score(written, references, options.tokenizer)
    n_words = [len(caption_scores.plain_words(caption)) for caption in written]
    result = TaskResult(
        data.name,
        counts={
            "images": len(written),
            "references": sum(map(len, references)),
            "cut_at_max_tokens": sum(map(encoder.describer.is_cut, ids)),
            "skipped": len(data.skipped),
        },
        digest=context.digest(pictures, references),
    )
    ones = torch.ones(len(written))
    result.items["cider"] = torch.stack([torch.tensor(scores.cider), ones], 1)
    result.items["mean_words"] = torch.stack([torch.tensor(n_words), ones], 1)
    result.values = {f"bleu_{n}": value for n, value in enumerate(scores.bleu, 1)}
    result.values["different"] = len(set(written)) / len(written)
    return result


def _references(captions: list[str] | tuple[str, ...], options: Options) -> list[str]:
    """The captions of one image that count; an empty one would be matched by nothing."""
    return [caption for caption in captions if caption.strip()][: options.captions_per_image]
