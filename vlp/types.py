"""The objects that travel between rooms, and the letters their shapes are written in.

Shape legend, used in every docstring of this project:
    b  rows of this rank in one step (m micro-batches split b)
    W  ranks        g  ranks in a group        B = W·b  rows of a step        n = g·b  candidates of a row
    D  embedding    K  hard negatives of a caption        C  counterfactuals of a caption        L  tokens
    D' embedding of another model        V  further views     M  concepts of a teacher
    Q  keys of a queue                   Z  tokens of the vocabulary

A `Batch` says what it carries: an optional field that is None is absent, and a term that needs it
is refused at start-up by name (see `vlp.losses`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # torch is imported by whoever builds a Batch; `vlp --help` must not wait for it
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One undecoded pair as a source delivers it. `captions` is never empty; `meta` is the sample's
    JSON.
    """

    sample_id: int  # dense in the run's index: 0 ≤ sample_id < number of samples of all sources
    key: str  # the webdataset key, unique in its shard
    image: bytes  # the encoded file, exactly as stored
    image_type: str  # extension without dot, lower case, from the allow-list of vlp.data.format
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    negative_image: bytes = (
        b""  # the encoded image of the first of the meta's "negatives"; empty: none
    )
    embeddings: tuple[Any, Any] | None = (
        None  # a teacher's, of image and first caption: arrays [D'] each
    )
    weights: tuple[float, ...] = ()  # by which one of the captions is drawn; empty: all alike


@dataclass
class Batch:
    """The rows of one rank in one step (or one micro-batch of them)."""

    image: Tensor  # [b, 3, H, W] uint8, RGB
    text: Tensor  # [b, L] int64 token ids
    sample_id: Tensor  # [b] int64
    key: list[str]  # [b]
    negatives: Tensor | None = None  # [b, K, L] token ids of hard-negative captions
    negatives_valid: Tensor | None = None  # [b, K] bool
    negative_image: Tensor | None = (
        None  # [b, 3, H, W] uint8, of negatives[:, 0], which is valid only beside one; else black
    )
    counterfactual: Tensor | None = (
        None  # [b, C, L] token ids: the caption with another number word
    )
    counterfactual_valid: Tensor | None = None  # [b] bool: the counting samples
    score: Tensor | None = None  # [b] float32 relevance of a pair
    teacher_scores: Tensor | None = None  # [b, K] float32, a teacher's score of each of `negatives`
    concept_targets: Tensor | None = (
        None  # [b, M] float32 >= 0, a teacher's weights of the concepts in the image
    )
    image_views: Tensor | None = None  # [b, V, 3, H, W] uint8, further augmented views of `image`
    text_views: Tensor | None = None  # [b, V, L] token ids of the caption in other words
    teacher_image: Tensor | None = (
        None  # [b, D'] float32 unit rows that another model gave the whole image
    )
    teacher_text: Tensor | None = None  # [b, D'] float32 unit rows that it gave the first caption

    def __len__(self) -> int:
        return len(self.key)

    def carries(self) -> frozenset[str]:
        """Names of the fields present in this batch."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def to(self, device: Any) -> Batch:
        """The same batch with every tensor on `device` (copied without blocking the host)."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (torch's DataLoader calls this), from which a GPU
        copies by itself.
        """
        return self._map(lambda value: value.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """`parts` micro-batches of equal size, in order. `parts` must divide b."""
        if len(self) % parts:
            raise ValueError(
                f"{parts} micro-batches do not divide a rank's {len(self)} rows; choose a divisor"
            )
        size = len(self) // parts
        return [
            self._map(lambda value, s=slice(i, i + size): value[s])
            for i in range(0, len(self), size)
        ]

    def _map(self, change: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {
            name: change(value)
            for name, value in values.items()
            if name != "key" and value is not None
        }
        key = self.key
        if len(tensors["sample_id"]) != len(key):  # a slice: cut the names alike
            key = change(key)
        return replace(self, key=key, **tensors)


@dataclass(frozen=True)
class Decoding:
    """How a stored picture becomes RGB, in training and evaluation; travels with the model."""

    background: tuple[int, int, int] = (
        255,
        255,
        255,
    )  # RGB behind transparent pixels; white, as transformers
    exif: bool = True  # turn the picture upright, as its Exif orientation says

    def __post_init__(self) -> None:
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ValueError(
                f"background is {self.background}; expected red, green and blue of 0 to 255"
            )


ON_WHITE = Decoding()  # upright, transparent pixels on white: where no model says otherwise


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the pixels a tower was made for; travels with the model."""

    size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = (
        "shortest"  # shortest side to size, then centre crop; or both sides to size
    )
    decoding: Decoding = ON_WHITE


@dataclass(frozen=True)
class TextSpec:
    """How a caption becomes token ids; travels with the model."""

    # "clip" (open_clip's SimpleTokenizer) or the name or folder of a Hugging Face tokenizer
    tokenizer: str
    context_length: int  # L
    clean: Literal["lower", "whitespace", "canonicalize"] = (
        "lower"  # open_clip's names for its text cleaning
    )
    options: dict[str, Any] = field(default_factory=dict)  # open_clip's tokenizer_kwargs


class Features(NamedTuple):
    """What a model returns for a batch. A tuple, because DDP, FSDP2 and DeepSpeed look into tuples
    for tensors.
    """

    image: Tensor | None  # [b, D] unit rows
    text: Tensor | None  # [rows, D] unit rows
    scale: Tensor  # [] float32, already exponentiated and clamped
    bias: Tensor | None = None  # [] float32
    image_views: Tensor | None = None  # [b·V, D] unit rows, by the head for views
    text_views: Tensor | None = None  # [b·V, D]
    view_scale: Tensor | None = None  # [] float32
    concept_logits: Tensor | None = None  # [b, M]
    caption_nll: Tensor | None = None  # [b, L − 1] −log p of every token after the first
