"""Which optional fields of `vlp.fields` the data offer, which of them are worth making, and whose
the stored embeddings among them are.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from vlp.config import Augment, Data
from vlp.data import labels, row_numbers
from vlp.data.embedded import Ensemble
from vlp.data.modalities import Shapes
from vlp.data.raw_texts import CAPTION_BYTES
from vlp.data.row_texts import TEXTS
from vlp.data.sources import Source
from vlp.fields import CARRIED, EMBEDDED, family


def optional_fields(
    sources: list[Source],
    data: Data,
    reads: frozenset[str] | None = None,
    modalities: Shapes = MappingProxyType({}),
) -> dict[str, int]:
    """The optional fields that the data offer, with their width: texts, views or numbers of a row.

    `modalities`: that the model reads. `reads`: by terms; None: all. A field whose width must be
    counted is offered only where it is read.
    """
    widths: dict[str, int] = {}

    # Texts bring their masks.
    for name, field in TEXTS.items():
        unread = reads is not None and not reads & family(name)
        if field.counted and unread:
            continue
        if width := field.width(sources, data):
            widths[name] = width
            if mask := EMBEDDED[name].valid:
                widths[mask] = width

    # Pictures, and the numbers beside a sample's texts.
    if "negatives" in widths and any(source.pictured for source in sources):
        width = min(data.negative_images, widths["negatives"])
        widths |= dict.fromkeys(("negative_images", "negative_images_valid"), width)
    if data.views:
        widths["image_views"] = data.views.n
    widths |= row_numbers.offered(sources, widths, data)
    # Rows of further modalities take reading: only for a term that compares them.
    if modalities and (reads is None or "others" in reads):
        widths["modalities"] = sum(length * features for length, features in modalities.values())
        widths["modality_lengths"] = len(modalities)
        # Of frames no row is carried, but pixels.
        n_frames = sum(length for length, features in modalities.values() if not features)
        if n_frames:
            widths["frames"] = n_frames
    # Looked for only where it is read, because that takes reading samples.
    if data.labels is not None and (reads is None or "label" in reads):
        labels.check(sources, data.labels)
        widths["label"] = 1

    # Captions as they are written, which every source has; most runs have no judge to read them.
    if reads is not None and "caption_bytes" in reads:
        widths["caption_bytes"] = CAPTION_BYTES
    if reads is not None and "negatives_bytes" in reads and "negatives" in widths:
        widths["negatives_bytes"] = widths["negatives"]

    # Teachers' embeddings, where every source has them: as many numbers a row as all have.
    stored = [source.embeddings for source in sources if source.embeddings is not None]
    if len(stored) == len(sources):
        width = math.prod(stored[0].shape)
        widths["teacher_image"] = width
        if all(embeddings.with_text for embeddings in stored):
            widths["teacher_text"] = width
    return widths


def read_fields(widths: dict[str, int], reads: frozenset[str]) -> dict[str, int]:
    """Those of `optional_fields` that are worth making where only `reads` are read.

    A bad score costs its sample only where a term reads scores; texts with a mask are tokenized
    only where they, or what lies beside them, are read.
    """

    def worth(name: str) -> bool:
        row = CARRIED[name]
        if name in ("modalities", "modality_lengths", "frames"):
            return True
        # Decoding costs: images of negatives are none of those who read their captions.
        if name in ("negative_images", "negative_images_valid"):
            return not reads.isdisjoint({"negative_images", "negative_images_valid"})
        if row.json:
            return name in reads
        if row.valid or row.beside:
            return bool(family(name) & reads)
        return True

    return {name: width for name, width in widths.items() if worth(name)}


def stored_teachers(sources: list[Source]) -> Ensemble | None:
    """The teachers whose embeddings all sources have; None where they have none."""
    ensembles = {}
    for source in sources:
        teachers = () if source.embeddings is None else source.embeddings.teachers
        ensembles[teachers] = source.embeddings
    if len(ensembles) > 1:
        names = "; ".join(sorted(", ".join(map(str, teachers)) or "None" for teachers in ensembles))
        raise ValueError(
            f"the sources' embeddings are of different models ({names}); "
            "give all the same teachers', or none"
        )

    [ensemble] = ensembles.values()
    return ensemble


def check_pairs(sources: list[Source], data: Data) -> None:
    """Refuse sources of pictures where both sides of a pair are texts, and the other way round."""
    for number, source in enumerate(sources):
        if source.of_texts and data.pairs == "image":
            raise ValueError(
                f"data.sources.{number} holds pairs of texts, and data.pairs is image; set "
                "data.pairs: text"
            )
        if not source.of_texts and data.pairs == "text":
            raise ValueError(
                f"data.pairs is text, and data.sources.{number} holds pictures; name tables of "
                "pairs of texts: {name: texts, path: TABLE, query: COLUMN, text: COLUMN}"
            )


def check_augment(sources: list[Source], augment: Augment) -> None:
    """Refuse an augmentation beside stored crops: what is cropped as it was stored cannot be
    cropped in another way too.
    """
    stored = [source.embeddings for source in sources if source.embeddings is not None]
    for views in [embeddings.views for embeddings in stored]:
        if views is not None and augment not in (Augment(), views.augment):
            raise ValueError(
                f"data.augment is {augment}, but training sees the crops whose embeddings are "
                f"stored, of {views.augment}; leave data.augment out"
            )
