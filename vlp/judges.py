"""Judges of whether a caption is true of a picture, which read both together.

    cross-encoder:MODEL         transformers' model with a head for it, such as BLIP's: the
                                probability of a match
    mllm:MODEL                  a multimodal language model that is asked: the probability of "yes"
                                against "no"; None where it answers neither
    package.module:function     a function of one's own, (pictures, captions) -> a number or None
                                for each pair, pictures as PIL images

MODEL is a folder or a name on the Hub.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from vlp.joining import local_device
from vlp.plugin import is_function_reference, own_function
from vlp.pretrained import places
from vlp.pretrained.configurations import FILE, configuration, reason
from vlp.pretrained.fingerprints import glance

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CROSS_ENCODER, MLLM, FUNCTION = "cross-encoder", "mllm", "function"
GRAMMAR = (
    f"{CROSS_ENCODER}:MODEL or {MLLM}:MODEL, with a folder or a model of the Hub, or "
    "package.module:function of your own"
)
QUESTION = "Does this caption describe the picture? Answer with yes or no.\nCaption: {}"
YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")

# A picture is one object however many captions it is judged with, and is prepared once.
Picture = Any  # an Image, or a uint8 tensor [3, H, W]
Scores = list[float | None]


class Loaded(Protocol):
    """A judge that is ready to compute."""

    fingerprint: str  # of its weights, or of its source

    def scores(self, pictures: Sequence[Picture], captions: Sequence[str]) -> Scores: ...


@dataclass(frozen=True)
class Judge:
    """A judge by kind and name; each process loads it when it first needs it."""

    kind: str
    ref: str
    device: str = "auto"
    batch: int = 16
    bf16: bool = False

    @classmethod
    def of(
        cls, text: str, device: str, batch: int, bf16: bool = False, *, key: str = "--judge"
    ) -> Judge:
        """The judge that the option `key` names; raises ValueError."""
        kind, _, ref = text.partition(":")
        if kind in (CROSS_ENCODER, MLLM) and ref:
            return cls(kind, ref, device, batch, bf16)

        if kind not in (CROSS_ENCODER, MLLM) and is_function_reference(text):
            return cls(FUNCTION, text, device, batch, bf16)
        raise ValueError(f"{key} {text!r}: expected {GRAMMAR}")

    @property
    def name(self) -> str:
        """As an option names it."""
        return self.ref if self.kind == FUNCTION else f"{self.kind}:{self.ref}"

    def check(self) -> None:
        """Raise ValueError for what is no judge, without reading weights."""
        if self.kind == FUNCTION:
            own_function(self.ref, "judge", GRAMMAR)
        else:
            _transformers_class(self)

    def settings(self) -> dict[str, Any]:
        """What its scores depend on."""
        weights = self.load().fingerprint[:16]
        return {"judge": self.name, "weights": weights, "bf16": self.bf16}

    def load(self) -> Loaded:
        """The judge itself, loaded once a process; raises ValueError."""
        return _load(self)

    def scores(self, pictures: Sequence[Picture], captions: Sequence[str]) -> Scores:
        """The score of each pair of one batch; higher is truer."""
        return self.load().scores(pictures, captions)


class CrossEncoder:
    """A model whose head says whether a text matches a picture, such as BLIP's."""

    def __init__(self, judge: Judge, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.device = local_device(judge.device, shared=True)
        self.fingerprint = glance(model)

    def scores(self, pictures: Sequence[Picture], captions: Sequence[str]) -> Scores:
        """The probability of a match for each picture and caption."""
        import torch

        distinct, places = _distinct(pictures)
        inputs = self.processor(
            images=distinct,
            text=list(captions),
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        inputs = inputs.to(self.device, self.model.dtype)
        # Pixels, and masks of them, are of pictures; all else is of pairs.
        of_pictures = [name for name in inputs if name.startswith("pixel_")]
        for name in of_pictures:
            inputs[name] = inputs[name][places]
        with torch.inference_mode():
            output = self.model(**inputs)

        # BLIP has a name of its own for them; two columns are no match and match.
        logits = output.itm_score if hasattr(output, "itm_score") else output.logits
        logits = logits.float()
        probabilities = logits[:, 0].sigmoid()
        if logits.shape[1] == 2:
            probabilities = logits.softmax(1)[:, 1]
        return probabilities.tolist()


class MultimodalModel:
    """A multimodal language model that is asked for yes or no."""

    def __init__(self, judge: Judge, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.device = local_device(judge.device, shared=True)
        self.fingerprint = glance(model)
        processor.tokenizer.padding_side = "left"  # the answer follows the last token

        self.yes, self.no = (_first_tokens(processor.tokenizer, words) for words in (YES, NO))
        if not self.yes or not self.no or self.yes & self.no:
            raise ValueError(
                f"judge {judge.ref!r}: its tokenizer has no tokens of their own for yes and no"
            )

    def scores(self, pictures: Sequence[Picture], captions: Sequence[str]) -> Scores:
        """The probability of yes against no; None where the likeliest answer is neither."""
        import torch

        texts = [self._prompt(caption) for caption in captions]
        inputs = self.processor(
            images=[[picture] for picture in pictures],
            text=texts,
            return_tensors="pt",
            padding=True,
        )
        inputs = inputs.to(self.device, self.model.dtype)
        with torch.inference_mode():
            logits = self.model(**inputs).logits[:, -1]
        return yes_or_no(logits.float(), sorted(self.yes), sorted(self.no))

    def _prompt(self, caption: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(caption)}]
        turns = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        return str(text)


class OwnFunction:
    """A function of one's own, whose answers are checked."""

    def __init__(self, judge: Judge) -> None:
        self.ref = judge.ref
        self.function = own_function(judge.ref, "judge", GRAMMAR)
        self.fingerprint = hashlib.sha256(_source_of(self.function).encode()).hexdigest()

    def scores(self, pictures: Sequence[Picture], captions: Sequence[str]) -> Scores:
        """What the function says; ValueError where that is not a number or None for each pair."""
        distinct, places = _distinct(pictures)
        images = [_as_image(picture) for picture in distinct]
        try:
            answers = list(self.function([images[place] for place in places], list(captions)))
        except Exception as error:  # whatever its author let pass
            raise ValueError(
                f"judge {self.ref} failed for {len(captions)} pairs: {type(error).__name__}: "
                f"{str(error)[:300]}"
            ) from error
        if len(answers) != len(captions):
            raise ValueError(
                f"judge {self.ref} gave {len(answers)} scores for {len(captions)} pairs; return "
                "one for each, in their order"
            )
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Any) -> float | None:
        if answer is None:
            return None
        try:
            score = float(answer)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(
                f"judge {self.ref} gave {str(answer)[:60]!r}; return finite numbers, or None where "
                "a pair has no score"
            )
        return score


def yes_or_no(logits: Tensor, yes: list[int], no: list[int]) -> Scores:
    """The probability of yes against no by the logits [b, V] of the answer's first token; None
    where the likeliest token is neither.
    """
    says_yes, says_no = logits[:, yes].logsumexp(1), logits[:, no].logsumexp(1)
    probabilities = (says_yes - says_no).sigmoid().tolist()
    likeliest = logits.argmax(1).tolist()
    answers = {*yes, *no}
    return [
        probability if token in answers else None
        for probability, token in zip(probabilities, likeliest)
    ]


def _distinct(pictures: Sequence[Picture]) -> tuple[list[Picture], list[int]]:
    """The pictures, each once, and the place of every pair's among them."""
    by_id = {id(picture): picture for picture in pictures}
    place_of = {key: place for place, key in enumerate(by_id)}
    return list(by_id.values()), [place_of[id(picture)] for picture in pictures]


def _as_image(picture: Picture) -> Image:
    """A picture for a function: PIL's, whatever it was."""
    import torch

    if not isinstance(picture, torch.Tensor):
        return picture
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image(picture.cpu())


def _first_tokens(tokenizer: Any, words: tuple[str, ...]) -> set[int]:
    """The tokens with which an answer of one of these words begins."""
    tokens = set()
    for text in (*words, *(f" {word}" for word in words)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if ids and ids[0] != tokenizer.unk_token_id and tokenizer.decode(ids[:1]).strip() in words:
            tokens.add(ids[0])
    return tokens


@cache
def _load(judge: Judge) -> Loaded:
    """The judge; raises ValueError where it cannot be loaded or has no such head."""
    if judge.kind == FUNCTION:
        return OwnFunction(judge)

    import torch
    import transformers

    kind = _transformers_class(judge)
    dtype = torch.bfloat16 if judge.bf16 else torch.float32
    place = _place(judge)
    try:
        processor = transformers.AutoProcessor.from_pretrained(place, trust_remote_code=False)
        model = kind.from_pretrained(place, trust_remote_code=False, dtype=dtype)
    except Exception as error:  # transformers', safetensors' and torch's own kinds
        raise _not_loaded(judge, reason(error)) from None

    model = model.eval().requires_grad_(False).to(local_device(judge.device, shared=True))
    if judge.kind == MLLM:
        return MultimodalModel(judge, model, processor)
    return CrossEncoder(judge, model, processor)


def _transformers_class(judge: Judge) -> Any:
    """The class of transformers by that of the weights; ValueError for one without such a head."""
    import transformers

    place = _place(judge)
    try:
        config = configuration(place)
    except ValueError as error:
        raise _not_loaded(judge, error) from None
    if judge.kind == MLLM:
        return transformers.AutoModelForImageTextToText

    names = [name for name in config.architectures or [] if name.endswith("TextRetrieval")]
    if not names or not hasattr(transformers, names[0]):
        architecture = ", ".join(config.architectures or []) or "a model of no named kind"
        message = (
            f"found {architecture}, expected a model with a head for matching, such as "
            "BlipForImageTextRetrieval"
        )
        raise _not_loaded(judge, message)
    return getattr(transformers, names[0])


def _place(judge: Judge) -> str:
    """Where transformers looks for the model; ValueError where it is neither here nor on the
    Hub.
    """
    try:
        return places.locate(judge.ref, file=FILE)
    except ValueError as error:
        raise _not_loaded(judge, error) from None


def _not_loaded(judge: Judge, problem: object) -> ValueError:
    return ValueError(f"judge {judge.ref!r} cannot be loaded as a {judge.kind}: {problem}")


def _source_of(function: Callable[..., Any]) -> str:
    """By which a changed function is noticed; its name where its source cannot be read."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return repr(getattr(function, "__qualname__", function))
