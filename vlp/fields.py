"""Everything that a batch can carry and a term can read, in one table: a row a field.

The loader (`vlp.data.steps`), the embedding (`vlp.models.embedding`), the keywords of the terms
(`vlp.losses.Inputs`), the checks before the first step and their messages derive from the rows:

    sample ──loader──> Batch ──towers──> Inputs ──> terms      pictures and texts become embeddings
                         └─────────────────┘                   numbers and masks pass as they are

Shapes are written in the letters of `vlp.types`. docs/extend-field.md shows how a row is added.
"""

# ruff: noqa: RUF009 (a row is made by a call: it returns a new dataclasses.field)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch is imported by whoever builds a Batch; `vlp --help` must not wait for it
    from torch import Tensor


@dataclass(frozen=True)
class Field:
    """One row of the table: how a field is shaped, masked and supplied."""

    # the tower it comes through; further: that of its modality; "": a label, it meets none
    tower: Literal["image", "text", "further", ""]
    batch_shape: str  # as the loader makes it; "" where the batch does not carry it
    dtype: Literal["uint8", "int64", "float32", "bool"]  # as the loader makes it
    # As terms read it, alternatives of different length. ("",) is a number.
    shapes: tuple[str, ...]
    unit: bool = False  # terms find unit rows in the last dimension
    zeros: bool = False  # rows of zeros are allowed among the unit rows
    # The mask that says which rows take part; the others have no influence, be they NaN.
    valid: str = ""
    beside: str = ""  # the field without which this one is not made
    head: str = ""  # the section of model.heads that computes it, or through which it passes
    tokens_of: str = ""  # the field of whose pictures or texts it holds each place
    json: str = ""  # the field of a sample's JSON that holds the label
    at_least: float = -float("inf")  # smallest value of a label
    supplier: str = ""  # what it comes from, in words; empty: every run has it

    @property
    def embedded(self) -> bool:
        """Whether a tower turns what the batch carries into rows of embeddings."""
        return bool(self.tower and self.batch_shape)

    @property
    def is_number(self) -> bool:
        """Whether terms read a single number, or one for each of several teachers."""
        return "" in self.shapes


def _row(field: Field, required: bool) -> Any:
    """A dataclass field that carries its row; absent (None) unless `required`.

    The table declares all of them as tensors: a term runs only where all that it needs is there.
    """
    if required:
        return dataclasses.field(metadata={"row": field})
    return dataclasses.field(default=None, kw_only=True, metadata={"row": field})


def pictures(batch_shape: str, shape: str, *, required: bool = False, **columns: Any) -> Any:
    """RGB in the batch; terms read unit rows by the image tower."""
    row = Field("image", batch_shape, "uint8", (shape,), unit=True, **columns)
    return _row(row, required)


def frames(batch_shape: str, **columns: Any) -> Any:
    """RGB in the batch that a further modality's tower reads embedded; no term does."""
    return _row(Field("further", batch_shape, "uint8", (batch_shape,), **columns), False)


def texts(batch_shape: str, *shapes: str, required: bool = False, **columns: Any) -> Any:
    """Token ids in the batch; terms read unit rows by the text tower."""
    row = Field("text", batch_shape, "int64", shapes, unit=True, **columns)
    return _row(row, required)


def numbers(shape: str, dtype: Any = "float32", *, required: bool = False, **columns: Any) -> Any:
    """Numbers that terms read as the batch carries them."""
    return _row(Field("", shape, dtype, (shape,), **columns), required)


def named_entries(*shapes: str, **columns: Any) -> Any:
    """Numbers of all entries of a long list, or of the few that are not zero, with their places."""
    return _row(Field("", shapes[0], "float32", shapes, **columns), False)


def of_teachers(tower: Any, *shapes: str, carried: bool = False, **columns: Any) -> Any:
    """Values of one teacher, or of several beside one another, the narrower ones filled up with
    zeros, which change neither a norm nor a product.
    """
    batch_shape = shapes[0] if carried else ""
    return _row(Field(tower, batch_shape, "float32", shapes, **columns), False)


def mask(shape: str, *, beside: str) -> Any:
    """A mask over the rows of `beside` that take part."""
    return numbers(shape, "bool", beside=beside)


def computed(
    tower: Any, shape: str, dtype: Any = "float32", *, required: bool = False, **columns: Any
) -> Any:
    """A value that no batch carries: the step computes it, from what `tower` reads."""
    return _row(Field(tower, "", dtype, (shape,), **columns), required)


def tokens(tower: Any, shape: str, *, of: str, **columns: Any) -> Any:
    """What `tower` makes of each place of the pictures or texts of the field `of`."""
    return computed(tower, shape, unit=True, tokens_of=of, **columns)


_STORED = (
    "a teacher model (teacher.model) or its stored embeddings "
    "(vlp data embed, and the source's `embeddings`)"
)
_EMA = "a moving average of the model (teacher.ema; DeGLA .9996, BriVL .99)"
_PROJECTION = "a map to the teacher's width (model.heads.teacher)"
_MODALITIES = (
    "rows of further modalities beside the shards (the source's `modalities`) and their towers "
    "(model.heads.modalities)"
)
_PREDICTOR = "a predictor of the other side (model.heads.predictor)"
_TRANSLATORS = (
    "translators between modalities (model.heads.translators); further modalities have towers "
    "(model.heads.modalities)"
)
_CONCENTRATION = "a certainty of each embedding (model.heads.concentration)"
_JUDGE = (
    "a cross-encoder (teacher.cross_encoder), or a caller's scores of the pairs that "
    "vlp.losses.distill.hardest names"
)
_QUEUE = "a queue of the moving average's embeddings (teacher.queue and teacher.ema)"
_TEACHER_QUEUE = "a queue of a teacher's embeddings (teacher.queue and a teacher)"
_DECODER = "a text decoder (model.decoder, or an architecture that has one: coca_ViT-B-32)"
_PATCHES = (
    "an image tower that gives its patches (vit, open_clip, timm without an attention pool) and "
    "that runs"
)
_TOKENS = (
    "a text tower that gives its tokens (transformer, open_clip, huggingface, llm) and that runs; "
    "those of hard captions with shards that have such (vlp data negatives)"
)
_REGIONS = "an attention between patches and sentences (model.heads.regions)"
_LABELS = "labels of the samples (data.labels: caption, origin, or a field of their JSON)"


@dataclass(frozen=True)
class Carried:
    """The fields that a batch can carry. The loader makes what its data offer and a term reads."""

    # The pair. Of pairs of texts (data.pairs: text) `image` is the query's tokens, [b, L] int64,
    # which pass the text tower; terms find its unit rows under the same name.
    image: Tensor = pictures("b 3 H W", "b D", required=True)
    text: Tensor = texts("b L", "b D", required=True)
    sample_id: Tensor = numbers("b", "int64", supplier="the loader: a stable number of each sample")

    # Several captions of the sample beside one another, `text` among them or not; a sample with
    # fewer is padded. With data.captions.roles column k holds the caption of role k.
    captions: Tensor = texts(
        "b K' L",
        "b K' D",
        valid="captions_valid",
        supplier="samples with several captions (data.captions: {choose: all, n: K})",
    )
    captions_valid: Tensor = mask("b K'", beside="captions")

    # Hard captions of `text`. negative_images[:, j] belongs to negatives[:, j], and is black where
    # that has none. teacher_scores: higher fits the image better.
    negatives: Tensor = texts(
        "b K L",
        "b K D",
        valid="negatives_valid",
        supplier="shards with hard captions (vlp data negatives)",
    )
    negatives_valid: Tensor = mask("b K", beside="negatives")
    negative_images: Tensor = pictures(
        "b J 3 H W",
        "b J D",
        valid="negative_images_valid",
        beside="negatives",
        supplier="shards with images of hard captions (vlp data mine --images, or vlp data "
        "negatives --from FILE.jsonl)",
    )
    negative_images_valid: Tensor = mask("b J", beside="negative_images")
    teacher_scores: Tensor = numbers(
        "b K",
        beside="negatives",
        json="negative_scores",
        supplier="a teacher's scores of the hard captions (the JSON's `negative_scores`), or a "
        "cross-encoder (teacher.cross_encoder)",
    )

    # The caption with another number word, of the samples that count.
    counterfactual: Tensor = texts(
        "b C L",
        "b D",
        "b C D",
        valid="counterfactual_valid",
        supplier="shards with counterfactual captions (vlp data counting)",
    )
    counterfactual_valid: Tensor = mask("b", beside="counterfactual")

    # Further augmented views of `image` and of the caption, through a projection of their own.
    image_views: Tensor = pictures(
        "b V 3 H W",
        "V b D",
        head="views",
        supplier="further augmentations of each image (data.views and model.heads.views)",
    )
    text_views: Tensor = texts(
        "b V L",
        "V b D",
        head="views",
        supplier="further augmentations of each caption (data.views and model.heads.views)",
    )

    # Labels of a pair: its relevance, and the concepts in the image, where a row of zeros has none.
    score: Tensor = numbers(
        "b",
        json="score",
        at_least=0,
        supplier="shards with a relevance of each pair (the JSON's `score`), or a cross-encoder "
        "(teacher.cross_encoder)",
    )
    # Weights of all concepts; or of those that a sample names (`vlp data concepts`): number and
    # weight of each, [..., 0] and [..., 1], the rows that it does not need with weight 0.
    concept_targets: Tensor = named_entries(
        "b M",
        "b N 2",
        json="concepts",
        supplier="the concepts of each image (the JSON's `concepts`; vlp data concepts)",
    )

    # Unit rows that other models gave the image, or the crop of it that stands here, and the
    # caption.
    teacher_image: Tensor = of_teachers(
        "", "b D'", "b T D'", carried=True, unit=True, supplier=_STORED
    )
    teacher_text: Tensor = of_teachers(
        "", "b D'", "b T D'", carried=True, unit=True, supplier=_STORED
    )

    # Rows in time of further modalities side by side, and how many rows each has, 0 where the
    # sample lacks it (vlp.data.modalities).
    modalities: Tensor = numbers("b S", supplier=_MODALITIES)
    modality_lengths: Tensor = numbers("b O", "int64", beside="modalities")

    # Frames of a video, zeros behind its last one (vlp.data.frames).
    frames: Tensor = frames("b F 3 H W", beside="modalities", supplier=_MODALITIES)

    # Pairs with one label are of one kind: the same caption, class or origin. Any whole numbers,
    # of which only equality counts; the loader's are below 2^48 (vlp.data.labels).
    label: Tensor = numbers("b", "int64", supplier=_LABELS)

    # `text` and `negatives` as they are written, for a judge (vlp.data.raw_texts).
    caption_bytes: Tensor = numbers("b U", "uint8", supplier="the loader: the caption as written")
    negatives_bytes: Tensor = numbers(
        "b K U", "uint8", beside="negatives", supplier="shards with hard captions"
    )


@dataclass(frozen=True)
class Readable(Carried):
    """The fields that a term can read: those of a batch, and those computed in the step."""

    # The model's numbers: 1/temperature, already exponentiated; a bias added to every score; and
    # 1/temperature between views (None: scale).
    scale: Tensor = computed("", "", required=True)
    bias: Tensor = computed("", "", supplier="a model with a logit bias (model.bias; SigLIP -10)")
    view_scale: Tensor = computed("", "", head="views")

    # An auxiliary head on the image tower.
    concept_logits: Tensor = computed(
        "image",
        "b M",
        head="concepts",
        supplier="an auxiliary head on the image tower (model.heads.concepts)",
    )
    # The student's embeddings, mapped to the teachers' widths, of any norm; and 1/temperature
    # between student and teacher (None: scale).
    projected_image: Tensor = of_teachers(
        "image", "b D'", "b T D'", head="teacher", supplier=_PROJECTION
    )
    projected_text: Tensor = of_teachers(
        "text", "b D'", "b T D'", head="teacher", supplier=_PROJECTION
    )
    interactive_scale: Tensor = computed("", "", head="teacher")

    # Further modalities of the sample, and which samples have them; rows that are not there are
    # left out, be they NaN.
    others: Tensor = computed(
        "further",
        "O b D",
        unit=True,
        valid="others_valid",
        head="modalities",
        supplier=_MODALITIES,
    )
    others_valid: Tensor = computed("", "O b", "bool", beside="others")

    # What a predictor makes of an image for its text to be, and of a text for its image.
    predicted_text: Tensor = computed(
        "image", "b D", unit=True, head="predictor", supplier=_PREDICTOR
    )
    predicted_image: Tensor = computed(
        "text", "b D", unit=True, head="predictor", supplier=_PREDICTOR
    )

    # What translators make of a modality in the space of another, and of that back in its own.
    translated: Tensor = computed(
        "further", "X b D", unit=True, head="translators", supplier=_TRANSLATORS
    )
    cycled: Tensor = computed(
        "further", "X b D", unit=True, head="translators", supplier=_TRANSLATORS
    )

    # Each patch of the image, and each token of the text and of its hard captions, through the
    # projection of the embeddings; the masks leave out padding. All patches take part where no
    # mask says otherwise.
    image_tokens: Tensor = tokens(
        "image", "b P D", of="image", valid="image_tokens_valid", supplier=_PATCHES
    )
    image_tokens_valid: Tensor = computed("", "b P", "bool", beside="image_tokens")
    text_tokens: Tensor = tokens(
        "text", "b L' D", of="text", valid="text_tokens_valid", supplier=_TOKENS
    )
    text_tokens_valid: Tensor = computed("", "b L'", "bool", beside="text_tokens")
    negative_tokens: Tensor = tokens(
        "text", "b K L' D", of="negatives", valid="negative_tokens_valid", supplier=_TOKENS
    )
    negative_tokens_valid: Tensor = computed("", "b K L'", "bool", beside="negative_tokens")

    # What each sentence sees of the image, how far patches are from what they see of the text, and
    # 1/temperature between a sentence and what it sees (None: scale).
    attended_captions: Tensor = computed(
        "image", "b K' D", unit=True, valid="captions_valid", head="regions", supplier=_REGIONS
    )
    patch_distances: Tensor = computed("image", "b", head="regions", supplier=_REGIONS)
    region_scale: Tensor = computed("", "", head="regions")

    # How certain an embedding is: the concentration of the distribution around it, > 0.
    image_concentration: Tensor = computed(
        "image", "b", head="concentration", supplier=_CONCENTRATION
    )
    text_concentration: Tensor = computed(
        "text", "b", head="concentration", supplier=_CONCENTRATION
    )

    # A decoder that looks at image and text, whose loss of each token is −log p. A caller with
    # logits of its own may give those instead: position l of caption_logits is for the token
    # caption_ids[:, l].
    caption_nll: Tensor = computed("image", "b L", head="captions", supplier=_DECODER)
    caption_logits: Tensor = computed("", "b L Z")
    caption_ids: Tensor = computed("", "b L", "int64", supplier=_DECODER)

    # This model's moving average, and its embeddings of earlier steps, equal on all ranks; rows of
    # zeros, or with NaN or infinity, hold no key.
    ema_image: Tensor = computed("image", "b D", unit=True, supplier=_EMA)
    ema_text: Tensor = computed("text", "b D", unit=True, supplier=_EMA)
    ema_negatives: Tensor = computed(
        "text", "b K D", unit=True, valid="negatives_valid", supplier=_EMA
    )
    queue_image: Tensor = computed("image", "Q D", unit=True, zeros=True, supplier=_QUEUE)
    queue_text: Tensor = computed("text", "Q D", unit=True, zeros=True, supplier=_QUEUE)
    queue_label: Tensor = computed(
        "", "Q", "int64", supplier="a label of each key (teacher.queue and data.labels)"
    )

    # Teachers' embeddings of earlier steps, as above.
    queue_teacher_image: Tensor = of_teachers(
        "", "Q D'", "Q T D'", unit=True, zeros=True, supplier=_TEACHER_QUEUE
    )
    queue_teacher_text: Tensor = of_teachers(
        "", "Q D'", "Q T D'", unit=True, zeros=True, supplier=_TEACHER_QUEUE
    )

    # Pictures and captions of those keys, for a judge.
    queue_pixels: Tensor = computed("", "Q 3 H W", "uint8", supplier=_QUEUE)
    queue_caption_bytes: Tensor = computed("", "Q U", "uint8", supplier=_QUEUE)

    # What a cross-encoder says of pairs of different samples: places in the group's texts (and
    # after them the queue's) of the candidates of each image, its scores of them, and the same of
    # the images for each text; and its score of the pair itself.
    candidate_texts: Tensor = computed("", "b R", "int64", supplier=_JUDGE)
    candidate_text_scores: Tensor = computed("", "b R", supplier=_JUDGE)
    candidate_images: Tensor = computed("", "b R", "int64", supplier=_JUDGE)
    candidate_image_scores: Tensor = computed("", "b R", supplier=_JUDGE)
    pair_score: Tensor = computed("", "b", supplier=_JUDGE)

    # Pairs of one cell, as of k-means over stored embeddings. Only equality counts.
    cluster: Tensor = computed("", "b", "int64", supplier="the caller: a cell of each pair")

    teacher_scale: Tensor = of_teachers("", "", "T", supplier=_STORED)


def table_of(kind: type) -> dict[str, Field]:
    """The rows of a dataclass of this table, by name in its order."""
    rows = {field.name: field.metadata.get("row") for field in dataclasses.fields(kind)}
    return {name: row for name, row in rows.items() if row is not None}


CARRIED = table_of(Carried)
FIELDS = table_of(Readable)
EMBEDDED = {name: field for name, field in CARRIED.items() if field.embedded}
LABELS = {name: field for name, field in CARRIED.items() if not field.embedded}
TOKENS = {name: field for name, field in FIELDS.items() if field.tokens_of}
TOKEN_MASKS = {field.valid: field.tokens_of for field in TOKENS.values() if field.tower == "text"}
JSON_LABELS = {field.json: field for field in LABELS.values() if field.json}


def family(name: str) -> set[str]:
    """The fields that a batch carries only together with `name`, its own among them, and what
    teachers embed of them.
    """
    first = _first(name)
    members = {other for other in CARRIED if _first(other) == first}
    return members | {f"ema_{member}" for member in members}


def _first(name: str) -> str:
    """The field beside which, or beside whose companion, this one is made."""
    while CARRIED[name].beside:
        name = CARRIED[name].beside
    return name


def supplier(name: str) -> str:
    """What a field comes from, in words; empty for those that every run has."""
    if name not in FIELDS:
        return ""
    field = FIELDS[name]
    # A mask comes with the field that it belongs to.
    return FIELDS[field.beside].supplier if field.dtype == "bool" else field.supplier
