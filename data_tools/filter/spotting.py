"""Text in pictures, and captions that only repeat it (text-spotting, the T of DiHT's CAT;
arXiv 2301.02280).

    rapidocr                    rapidocr-onnxruntime, with its own weights (extra `curate`)
    transformers:MODEL          an image-to-text model of transformers that reads text, such as
                                GOT-OCR 2; a folder or a name on the Hub
    package.module:function     a function of one's own, pictures (PIL) -> for each its text, or a
                                list of texts
    field:NAME                  nothing: the texts that an earlier call kept in this field of the
                                JSON (--ocr-field NAME)

A word of a caption stands in the picture where it is a word of the text; of four letters or more
also where the text holds it without its blanks, which readers of text often lose.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from vlp.data_tools._english.words import words
from vlp.data_tools.filter.conditions import check_new_field
from vlp.plugin import is_function_reference, own_function

if TYPE_CHECKING:
    from PIL.Image import Image

RAPIDOCR, TRANSFORMERS, FIELD = "rapidocr", "transformers", "field"
GRAMMAR = (
    f"{RAPIDOCR}, {TRANSFORMERS}:MODEL, package.module:function of your own, or {FIELD}:NAME of "
    "texts in the JSON"
)
_LEAST_INSIDE = 4  # letters: shorter words stand inside others by chance
_MAX_NEW_TOKENS = 256
# RapidOCR brings the longer side down to so many pixels, and the shorter one up to 736: a thin
# picture would take gigabytes, or fail.
_LARGEST = 2000
_LONGEST = 8  # shorter sides
_LEAST_LEGIBLE = 6  # pixels

Texts = list[str] | None  # of a picture; None where the reader fails at it
Read = Callable[[Sequence["Image"]], list[Texts]]


@dataclass(frozen=True)
class Spotter:
    """A reader of text in pictures, by name; each process loads it when it first needs it."""

    name: str
    device: str = "auto"
    # share of a caption's words from which on it goes; None: no caption does
    max_overlap: float | None = None
    # of the JSON, for the texts; "": they are not kept
    field: str = ""

    @classmethod
    def of(
        cls, name: str | None, device: str, max_overlap: float | None, field: str
    ) -> Spotter | None:
        """What the options name, loaded once; raises ValueError."""
        if not name:
            if max_overlap is not None or field:
                raise ValueError(
                    "--max-overlap and --ocr-field belong to --ocr READER, which is not given: "
                    f"{GRAMMAR}"
                )
            return None
        if max_overlap is None and not field:
            raise ValueError(
                "--ocr alone does nothing: say --max-overlap SHARE, --ocr-field NAME, or both"
            )
        if max_overlap is not None and not 0 <= max_overlap < 1:
            raise ValueError(
                f"--max-overlap {max_overlap:g} must lie in [0, 1): it is the share of a caption's "
                "words above which the caption goes"
            )
        check_new_field(field, f"--ocr-field {field}")
        spotter = cls(name, device, max_overlap, field)
        if spotter.kept_in and field:
            raise ValueError(f"--ocr {name} reads no picture; leave --ocr-field out")
        if not spotter.kept_in:
            _load(spotter.name, device)
        return spotter

    @property
    def kept_in(self) -> str:
        """The field of the JSON that has the texts already; "" where pictures are read."""
        kind, _, name = self.name.partition(":")
        return name if kind == FIELD else ""

    def settings(self) -> dict[str, Any]:
        """What the output depends on."""
        version = "" if self.kept_in else _load(self.name, self.device)[1]
        return {
            "ocr": [self.name, version],
            "max_overlap": self.max_overlap,
            "ocr_field": self.field,
        }

    def texts(self, pictures: Sequence[Image]) -> list[Texts]:
        """The texts in each picture."""
        return _load(self.name, self.device)[0](pictures)

    def kept(self, meta: dict[str, Any]) -> Texts:
        """The texts that an earlier call put into the JSON; None where there are none."""
        texts = meta.get(self.kept_in)
        texts = [texts] if isinstance(texts, str) else texts
        is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        return texts if is_list else None

    def refuse(self, caption: str, texts: list[str]) -> str:
        """Why a caption of a picture with these texts goes, or ""."""
        if self.max_overlap is None or overlap(caption, texts) <= self.max_overlap:
            return ""
        return f"more than {self.max_overlap:g} of its words stand in the picture"


def runs_model(name: str | None) -> bool:
    """Whether a reader may run on a GPU: a model does, and a function of one's own may."""
    if not name or name == RAPIDOCR:
        return False
    return not name.startswith(f"{FIELD}:")


def overlap(caption: str, texts: list[str]) -> float:
    """The share of a caption's words that stand among the texts of its picture, in [0, 1]."""
    written = [word.text for word in words(caption)]
    if not written:
        return 0.0
    text = " ".join(texts)
    spotted = {word.text for word in words(text)}
    joined = re.sub(r"[\W_]", "", text.lower())
    n_spotted = 0
    for word in written:
        letters = re.sub(r"[\W_]", "", word)
        is_inside = len(letters) >= _LEAST_INSIDE and letters in joined
        if word in spotted or is_inside:
            n_spotted += 1
    return n_spotted / len(written)


@cache
def _load(name: str, device: str) -> tuple[Read, str]:
    """(the reader, what tells its version); raises ValueError."""
    if name == RAPIDOCR:
        return _rapidocr()
    kind, _, ref = name.partition(":")
    if kind == TRANSFORMERS and ref:
        return _transformers(ref, device)
    if kind not in (TRANSFORMERS, FIELD) and is_function_reference(name):
        return _own(name)
    raise ValueError(f"--ocr {name!r}: expected {GRAMMAR}")


def _rapidocr() -> tuple[Read, str]:
    from importlib.metadata import version

    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError:
        raise ValueError(
            "--ocr rapidocr: rapidocr-onnxruntime is not installed; install it with "
            "pip install 'vlp[curate]'"
        ) from None
    n = n_threads()
    reader = RapidOCR(intra_op_num_threads=n, inter_op_num_threads=n)

    def read_one(picture: Image) -> Texts:
        import numpy as np

        shrunk = min(1, _LARGEST / max(picture.size))
        if min(picture.size) * shrunk < _LEAST_LEGIBLE:
            return []

        # As OpenCV orders colours.
        pixels = np.asarray(_widened(picture.convert("RGB")))[:, :, ::-1]
        try:
            lines, _ = reader(pixels)
        except Exception:  # its errors share no class; one picture must not end the call
            return None
        return [text for _, text, _ in lines or []]

    def read(pictures: Sequence[Image]) -> list[Texts]:
        return [read_one(picture) for picture in pictures]

    return read, version("rapidocr-onnxruntime")


def n_threads() -> int:
    """Threads of onnxruntime, which does not know that processes share the cores; -1: all.

    OpenMP's variable may be a list, for nested teams: the first is of the outer one.
    """
    written = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(written) if written.isdecimal() else -1


def _widened(picture: Image) -> Image:
    """A long thin picture with white beside it."""
    from PIL import Image as images

    longer = max(picture.size)
    width, height = (max(side, -(-longer // _LONGEST)) for side in picture.size)
    if (width, height) == picture.size:
        return picture
    widened = images.new("RGB", (width, height), "white")
    widened.paste(picture)
    return widened


def _transformers(ref: str, device: str) -> tuple[Read, str]:
    import torch
    import transformers

    from vlp.joining import local_device
    from vlp.pretrained import places
    from vlp.pretrained.configurations import FILE, reason
    from vlp.pretrained.fingerprints import glance

    try:
        place = places.locate(ref, file=FILE)
        processor = transformers.AutoProcessor.from_pretrained(place, trust_remote_code=False)
        model_class = transformers.AutoModelForImageTextToText
        model = model_class.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers', safetensors' and torch's own kinds
        raise ValueError(f"--ocr {TRANSFORMERS}:{ref} cannot be loaded: {reason(error)}") from None
    on_device = local_device(device, shared=True)
    model = model.eval().requires_grad_(False).to(on_device)

    def read(pictures: Sequence[Image]) -> list[Texts]:
        images = [picture.convert("RGB") for picture in pictures]
        inputs = processor(images=images, return_tensors="pt").to(on_device)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        # A model that goes on from a prompt gives it back.
        n_prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        texts = processor.batch_decode(ids[:, n_prompt:], skip_special_tokens=True)
        return [text.splitlines() for text in texts]

    return read, glance(model)[:16]


def _own(name: str) -> tuple[Read, str]:
    function = own_function(name, "--ocr", GRAMMAR)

    def read(pictures: Sequence[Image]) -> list[Texts]:
        try:
            answers = list(function(pictures))
        except Exception as error:  # whatever its author let pass
            raise ValueError(
                f"--ocr {name} failed for {len(pictures)} pictures: {type(error).__name__}: "
                f"{str(error)[:300]}"
            ) from error
        texts = [[answer] if isinstance(answer, str) else answer for answer in answers]
        are_texts = all(
            isinstance(of_picture, list) and all(isinstance(text, str) for text in of_picture)
            for of_picture in texts
        )
        if len(texts) != len(pictures) or not are_texts:
            raise ValueError(
                f"--ocr {name} gave {str(answers)[:100]} for {len(pictures)} pictures; return a "
                "text, or a list of texts, for each, in their order"
            )
        return texts

    # A changed function is another one.
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = name
    return read, hashlib.sha256(source.encode()).hexdigest()[:16]
