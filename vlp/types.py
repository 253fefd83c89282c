"""The objects that travel between packages, and the letters their shapes are written in.

Shape legend, used in every docstring of this project:
    b   rows of this rank in one step (m micro-batches split b)
    W   ranks                           B   rows of a step, B = W·b
    g   ranks in a group                n   candidates of a row, n = g·b
    D   embedding                       D'  embedding of another model
    T   teachers                        R   candidates that a cross-encoder judges
    L   tokens                          H W height and width of a picture in pixels
    L'  tokens that a tower gives       P   patches of a picture
    K   hard negatives of a caption     J   images of hard negatives
    C   counterfactuals of a caption
    K'  captions of a sample            V   further views
    M   concepts in all                 N   concepts that a sample names, at most
    Q   keys of a queue
    O   modalities beside image and text
    S   numbers of all of them together     F   frames of a video
    X   translations of one modality into another
    Z   tokens of the vocabulary        U   bytes of a caption

A `Batch` says what it carries: an optional field that is None is absent, and a term that needs it
is refused at start-up by name. What there is to carry stands in one table, `vlp.fields`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from vlp.fields import CARRIED, Carried, numbers

if TYPE_CHECKING:  # torch is imported by whoever builds a Batch; `vlp --help` must not wait for it
    from torch import Tensor

    from vlp.data.embedded import Stored
    from vlp.data.further_members import Files
    from vlp.data.modalities import Stored as StoredModalities


QUERY_TYPE = "txt"  # the image_type of a text that stands in a picture's place


@dataclass(frozen=True)
class Sample:
    """One undecoded pair as a source delivers it."""

    sample_id: int  # dense in the run's index: 0 ≤ sample_id < number of samples of all sources
    key: str  # the webdataset key, unique in its shard
    # the encoded file, exactly as stored; of pairs of texts the query, in UTF-8
    image: bytes
    # extension without dot, lower case, from the allow-list of vlp.data.format; or QUERY_TYPE
    image_type: str
    captions: tuple[str, ...]  # never empty
    meta: dict[str, Any] = field(default_factory=dict)  # the sample's JSON
    # encoded images of the meta's "negatives", by their places in that list
    negative_images: dict[int, bytes] = field(default_factory=dict)
    embeddings: Stored | None = None  # of teachers, on disk
    weights: tuple[float, ...] = ()  # by which one of the captions is drawn; empty: all alike
    roles: tuple[str, ...] = ()  # of the captions, as the source names them; empty: it does not
    modalities: StoredModalities | None = None  # further ones, on disk
    # members that make further modalities, by their names, as far as these are looked for
    members: Mapping[str, Files] = field(default_factory=dict)


_READ_ON_HOST = {
    name for name, row in CARRIED.items() if row.tower == "text" or row.dtype == "bool"
} | {"modality_lengths"}


@dataclass(frozen=True)
class Batch(Carried):
    """The rows of one rank in one step (or one micro-batch of them): the pair, what names it, and
    the optional fields of `vlp.fields`, each None where the batch does not carry it.
    """

    sample_id: Tensor = numbers("b", "int64", required=True)  # noqa: RUF009
    # [b], the webdataset keys; the optional fields before it are keyword-only
    key: list[str]  # type: ignore[misc]
    # Of a batch that `to` made. No field: one that `replace` changes must not keep the old values.
    _on_host: ClassVar[Mapping[str, Tensor]] = MappingProxyType({})

    def __len__(self) -> int:
        return len(self.key)

    @property
    def is_of_texts(self) -> bool:
        """Whether `image` holds queries in the pictures' place, texts: token ids [b, L]."""
        return self.image.ndim == 2 and not self.image.is_floating_point()

    def carries(self) -> frozenset[str]:
        """Names of the fields present in this batch."""
        names = (field.name for field in fields(self))
        return frozenset(name for name in names if getattr(self, name) is not None)

    def to(self, device: Any) -> Batch:
        """The same batch with every tensor on `device` (copied without blocking the host)."""
        moved = self._map(lambda value: value.to(device, non_blocking=True))

        # What decides how texts pass their tower stays readable without waiting for the device.
        on_host = _READ_ON_HOST | ({"image"} if self.is_of_texts else set())
        kept = {name: self.host(name) for name in self.carries() & on_host}
        object.__setattr__(moved, "_on_host", kept)
        return moved

    def host(self, name: str) -> Tensor:
        """A field of token ids or a mask on the host: as it was before `to`, else copied there."""
        value = self._on_host.get(name, getattr(self, name))
        return value.cpu() if value.device.type != "cpu" else value

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

        # Views, no copies: a micro-batch shares its memory with the batch.
        size = len(self) // parts
        return [self._rows(slice(first, first + size)) for first in range(0, len(self), size)]

    def _rows(self, rows: slice) -> Batch:
        # Names are no tensors: they are cut by themselves.
        part = replace(self._map(lambda value: value[rows]), key=self.key[rows])
        kept = {name: value[rows] for name, value in self._on_host.items()}
        object.__setattr__(part, "_on_host", kept)
        return part

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same names with every tensor changed."""
        names = self.carries() - {"key"}
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)


@dataclass(frozen=True)
class Decoding:
    """How a stored picture becomes RGB, in training and evaluation; travels with the model."""

    background: tuple[int, int, int] = (255, 255, 255)  # RGB behind transparent pixels
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
    # shortest side to size, then centre crop; or both sides to size
    resize: Literal["shortest", "squash"] = "shortest"
    decoding: Decoding = ON_WHITE


@dataclass(frozen=True)
class TextSpec:
    """How a caption becomes token ids; travels with the model."""

    # "clip" (open_clip's SimpleTokenizer) or the name or folder of a Hugging Face tokenizer
    tokenizer: str
    context_length: int  # L
    # open_clip's names for its text cleaning
    clean: Literal["lower", "whitespace", "canonicalize"] = "lower"
    options: dict[str, Any] = field(default_factory=dict)  # open_clip's tokenizer_kwargs


class Features(NamedTuple):
    """The outputs of a model for a batch. A tuple, because DDP, FSDP2 and DeepSpeed look into
    tuples for tensors.
    """

    image: Tensor | None  # [b, D] unit rows
    text: Tensor | None  # [rows, D] unit rows
    scale: Tensor  # [] float32, already exponentiated and clamped
    bias: Tensor | None = None  # [] float32
    image_views: Tensor | None = None  # [b·V, D] unit rows, by the head for views
    text_views: Tensor | None = None  # [b·V, D]
    view_scale: Tensor | None = None  # [] float32
    concept_logits: Tensor | None = None  # [b, M]
    # [b, D'] or [b, T, D'], by the head for teachers
    projected_image: Tensor | None = None
    projected_text: Tensor | None = None
    interactive_scale: Tensor | None = None  # [] float32
    predicted_text: Tensor | None = None  # [b, D] unit rows, of images by the predictor
    predicted_image: Tensor | None = None  # [b, D] unit rows, of texts
    # [rows, P, D] and [rows, L', D] unit rows, of the rows that were asked for
    image_tokens: Tensor | None = None
    text_tokens: Tensor | None = None
    negative_tokens: Tensor | None = None
    # by the head for regions: [b, K', D] unit rows, [b], and [] float32
    attended_captions: Tensor | None = None
    patch_distances: Tensor | None = None
    region_scale: Tensor | None = None
    image_concentration: Tensor | None = None  # [b] > 0
    text_concentration: Tensor | None = None  # [b]
    caption_nll: Tensor | None = None  # [b, L − 1] −log p of every token after the first
    others: Tensor | None = None  # [b, O, D] unit rows of further modalities, by their towers
    translated: Tensor | None = None  # [b, X, D] unit rows by the translators, and back again
    cycled: Tensor | None = None  # [b, X, D] unit rows
