"""The section `model`: two towers, the logit scale and the heads that only the objective reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from vlp.config.modality import Modality
from vlp.plugin import Named, Plugin
from vlp.types import Decoding


@dataclass(frozen=True)
class Scale:
    """The logit scale (inverse temperature): learned as its logarithm, clamped in the forward
    pass.
    """

    init: float = 14.285714285714286  # at the start of training; 1 / 0.07, as CLIP
    max: float = 100.0  # upper bound of the scale, in the forward pass
    learned: bool = True  # false: the scale stays at init

    def __post_init__(self) -> None:
        if not 0 < self.init <= self.max:
            raise ValueError(f"scale init {self.init} must lie in (0, max = {self.max}]")


@dataclass(frozen=True)
class ViewHead:
    """Projection of further views, D → width → D, with a scale of its own."""

    width: int = 2048  # of the hidden layer
    image: bool = True  # pictures have views; false where terms read those of captions alone
    text: bool = True  # captions have views too; false for slip alone
    scale: Scale = Scale()

    def __post_init__(self) -> None:
        if not (self.image or self.text):
            raise ValueError("image and text are both false; expected one of them, or views: null")


@dataclass(frozen=True)
class PredictorHead:
    """What an embedding says of the other side's, D → width → D, for images and for texts."""

    width: int = 2048  # of the hidden layer


@dataclass(frozen=True)
class TranslatorHead:
    """What an embedding of one modality is in another's space, D → width → D, for both ways of each
    pair.
    """

    # names two by two, of image, text and `modalities`: [[text, video], [text, audio]]
    pairs: list[tuple[str, str]] = field(default_factory=lambda: [("text", "image")])
    width: int | None = 2048  # of the hidden layer; None: a linear map without one

    def __post_init__(self) -> None:
        different = {frozenset(pair) for pair in self.pairs}
        if not self.pairs or len(different) < len(self.pairs) or min(map(len, different)) < 2:
            raise ValueError(
                f"pairs: found {self.pairs}, expected pairs of two different modalities, each once"
            )
        if self.width is not None and self.width < 1:
            raise ValueError(
                f"width is {self.width}; expected at least 1, or null for a linear map"
            )

    @property
    def names(self) -> set[str]:
        """The modalities that are translated."""
        return {source for source, _ in self.directions}

    @property
    def directions(self) -> list[tuple[str, str]]:
        """From which modality to which each translator leads; the way back stands beside it."""
        both_ways = []
        for first, second in self.pairs:
            both_ways += [(first, second), (second, first)]
        return both_ways


@dataclass(frozen=True)
class RegionHead:
    """Patches and sentences of one sample look at each other, with a predictor of patches and a
    scale of its own for sentences.
    """

    width: int | None = None  # of the predictor's hidden layer; None: D / 2
    scale: Scale = Scale(init=10.0)  # between sentences and what they see of the picture

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise ValueError(f"width is {self.width}; expected at least 1, or null for D / 2")


@dataclass(frozen=True)
class TeacherHead:
    """Linear maps of images and of texts to a teacher's width, with a scale of its own."""

    # D', the width of the teacher's embeddings; of several teachers one each, in their order
    width: int | list[int]
    scale: Scale = Scale()  # between the student's rows and the teacher's (distill: interactive)

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"width is {self.width}; expected the width of the teacher's rows")

    @property
    def widths(self) -> list[int]:
        """Of every teacher."""
        return [self.width] if isinstance(self.width, int) else self.width


@dataclass(frozen=True)
class Decoder:
    """A text decoder over the tokens of both towers, of their width, as CoCa's: part of the model,
    with which it describes pictures, and of its exports.
    """

    layers: int = 12  # transformer layers, each with cross-attention to the image
    heads: int | None = None  # None: as many as the text tower has

    def __post_init__(self) -> None:
        if self.layers < 1 or (self.heads is not None and self.heads < 1):
            raise ValueError(
                f"layers is {self.layers} and heads {self.heads}; expected at least 1 of each"
            )


@dataclass(frozen=True)
class Captioner:
    """A multimodal decoder of the text tower's width."""

    layers: int = 3  # transformer layers, each with cross-attention to the image
    heads: int | None = None  # None: as many as the text tower has


@dataclass(frozen=True)
class ConcentrationHead:
    """How certain an embedding is: κ = init·e^h, h of the tower's features, D → width → 1."""

    width: int = 512  # of the hidden layer
    init: float = 1000.0  # κ of all samples at the start; of D numbers, cosines of draws are ~κ/D

    def __post_init__(self) -> None:
        if self.width < 1 or self.init <= 0:
            raise ValueError(
                f"width is {self.width} and init {self.init}; expected positive numbers"
            )


@dataclass(frozen=True)
class Heads:
    """Trained parts that only the objective reads (vlp.models.heads); exports leave them out, all
    but `nonnegative`, which embeddings pass everywhere.
    """

    # projection of further views (data.views): image_views, text_views
    views: ViewHead | None = None
    concepts: int = 0  # M, concepts of a linear layer on the image tower: concept_logits
    # what that layer reads: the tower's features in the shared space, or those before its
    # projection (CatLIP)
    concepts_of: Literal["embedding", "trunk"] = "embedding"
    # maps to the teachers' widths: projected_image, projected_text, interactive_scale
    teacher: TeacherHead | None = None
    # certainty of each embedding: image_concentration, text_concentration
    concentration: ConcentrationHead | None = None
    # a text decoder for training alone: caption_nll; one that exports keep is `decoder` of `model`
    captions: Captioner | None = None
    # predictors of the text by the image and of the image by the text: predicted_text,
    # predicted_image
    predictor: PredictorHead | None = None
    # cross-attention of patches and sentences: attended_captions, patch_distances, region_scale
    regions: RegionHead | None = None
    # embeddings are max(0, h), divided by the norm, of a tower's features h: no number is negative,
    # many are 0 (arXiv 2403.12459)
    nonnegative: bool = False
    # towers of further modalities by name, of the rows that sources name by `modalities` or of
    # members of the samples: others
    modalities: dict[str, Modality] = field(default_factory=dict)
    # translators of each modality into another's space and back: translated, cycled
    translators: TranslatorHead | None = None

    def __post_init__(self) -> None:
        unusable = [
            name for name in self.modalities if not name.isidentifier() or name in ("image", "text")
        ]
        if unusable:
            raise ValueError(
                f"modalities names {', '.join(unusable)}; expected words other than image and text"
            )
        if self.translators is not None:
            self._check_translators(self.translators)
        videos = [name for name, tower in self.modalities.items() if tower.frames is not None]
        if len(videos) > 1:
            raise ValueError(
                f"modalities {', '.join(videos)} read the frames of a sample, which has one video; "
                "leave one of them"
            )
        if self.concepts < 0:
            raise ValueError(
                f"concepts is {self.concepts}; expected the number of concepts, or 0 for none"
            )
        if self.concepts_of == "trunk" and not self.concepts:
            raise ValueError(
                "concepts_of says what the head for concepts reads, and there is none; write "
                "concepts: M, or leave concepts_of out"
            )

    def _check_translators(self, translators: TranslatorHead) -> None:
        names = ["image", "text", *self.modalities]
        unknown = sorted(translators.names - set(names))
        if unknown:
            raise ValueError(
                f"translators.pairs names {', '.join(unknown)}; expected modalities of the model: "
                f"{', '.join(names)} (heads.modalities adds further ones)"
            )


@dataclass(frozen=True)
class Model:
    """Two towers into one space. An open_clip architecture gives both; otherwise name one tower
    each.
    """

    image_tower: Annotated[Plugin, Named("vlp.towers")]  # image encoder by name, with its options
    # text encoder by name, with its options; may be absent where the image tower names both
    text_tower: Annotated[Plugin, Named("vlp.towers")] | None = None
    embed_dim: int | None = None  # D, width of the shared space; None: the architecture's
    scale: Scale = Scale()
    bias: float | None = None  # initial logit bias (SigLIP: -10); None: the model has none
    heads: Heads = Heads()
    # a text decoder that stays in the model: caption_nll (vlp.models.decoder); None: the
    # architecture's, which coca_* have
    decoder: Decoder | None = None
    # weights to start from: open_clip's tag, or any reference (vlp.pretrained.references);
    # None: random
    pretrained: str | None = None
    # of weights that `pretrained` or `init_from` brings: both projections start at random, so that
    # embed_dim may be another; all else is as published
    new_projection: bool = False
    # texts pass the tower cut to their length in steps of 8 tokens, where that changes no embedding
    # (not SigLIP's, which attends to padding); false: all are as long as the context
    cut_captions: bool = True
    # how pictures become RGB; None: as `pretrained` says, or on white and upright
    decoding: Decoding | None = None

    def __post_init__(self) -> None:
        if self.text_tower is not None and _context_of(self.image_tower) is not None:
            raise ValueError(
                "image_tower.context stretches the text tower that an image tower brings, and here "
                "text_tower is another; write text_tower.context"
            )

        if self.text_tower is not None and _text_dropout_of(self.image_tower):
            raise ValueError(
                "image_tower.dropout is of the text tower that an image tower brings, and here "
                "text_tower is another; write text_tower.dropout"
            )

        if _is_int8_aware(self.text_tower):
            raise ValueError(
                "text_tower.int8_aware: only image towers are trained for 8 bits; leave it out "
                "(vlp export --onnx --int8 quantises text towers as they are)"
            )

        if self.heads.nonnegative and self.precomputed:
            raise ValueError(
                "heads.nonnegative is the model's last step, which the stored embeddings of a "
                "precomputed image tower do not pass; set image_tower.precomputed: false"
            )

        translators = self.heads.translators
        if self.precomputed and translators is not None and "image" in translators.names:
            raise ValueError(
                "heads.translators reads the embeddings of pictures as the image tower gives them, "
                "and a precomputed one does not run; set image_tower.precomputed: false, or "
                "translate other modalities"
            )

        reads_frames = any(tower.frames for tower in self.heads.modalities.values())
        if reads_frames and self.precomputed:
            raise ValueError(
                "heads.modalities reads frames, which the image tower embeds, and a precomputed "
                "image tower is not run; set image_tower.precomputed: false"
            )

        text = self.text_tower
        if self.stored_texts is not None and text is not None:
            unusable = getattr(text.common, "locked", False), getattr(text.common, "lora", None)
            if any(unusable):
                raise ValueError(
                    "text_tower: stored holds no language model that could learn or be locked; "
                    "leave locked and lora out"
                )
        if text is not None and getattr(text.common, "precomputed", False):
            raise ValueError(
                "precomputed is of image towers; stored text embeddings are a tower of their own: "
                "text_tower: {name: stored, embeddings: DIR}"
            )

    @property
    def stored_texts(self) -> str | None:
        """The folders with text embeddings that training reads in place of captions' tokens."""
        text = self.text_tower
        return text.options.embeddings if text is not None and text.name == "stored" else None

    @property
    def context(self) -> Any:
        """How the text tower's context is stretched (vlp.towers.Context); None: it is not."""
        return _context_of(self.text_tower or self.image_tower)

    @property
    def text_dropout(self) -> float:
        """The share of what enters each block of the text tower that training drops."""
        return _text_dropout_of(self.text_tower or self.image_tower)

    @property
    def int8_aware(self) -> bool:
        """Whether the image tower is trained with values of 8 bits."""
        return _is_int8_aware(self.image_tower)

    @property
    def precomputed(self) -> bool:
        """Whether the data hold the image tower's embeddings, and training does not run it."""
        common = self.image_tower.common
        return common is not None and common.precomputed


def _context_of(tower: Plugin) -> Any:
    # A plug-in of a caller's own may come without the keys of all towers.
    return getattr(tower.common, "context", None)


def _text_dropout_of(tower: Plugin) -> float:
    return getattr(tower.common, "dropout", 0.0)


def _is_int8_aware(tower: Plugin | None) -> bool:
    return tower is not None and getattr(tower.common, "int8_aware", False)
