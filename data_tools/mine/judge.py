"""Models of transformers that judge whether a caption is true of a picture: a cross-encoder with a
head for it, or a multimodal language model that is asked.

A score lies in [0, 1]: the probability of a match, or of "yes" against "no". None: the model
answers neither yes nor no, or the picture does not open.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from vlp.data_tools._writer.model import fingerprint
from vlp.joining import local_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

KINDS = ("cross-encoder", "mllm")
QUESTION = "Does this caption describe the picture? Answer with yes or no.\nCaption: {}"
YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")


class Pair(NamedTuple):
    """What is judged."""

    image: bytes
    caption: str


@dataclass(frozen=True)
class Judge:
    """A judge by kind and name; each process loads it when it first needs it."""

    kind: str
    ref: str
    device: str = "auto"
    batch: int = 16
    bf16: bool = False

    @classmethod
    def of(cls, text: str, device: str, batch: int, bf16: bool) -> Judge:
        """The judge that an option names, as KIND:MODEL; raises ValueError."""
        kind, _, ref = text.partition(":")
        if kind not in KINDS or not ref:
            raise ValueError(
                f"--judge {text!r}: expected cross-encoder:MODEL or mllm:MODEL, with a folder or "
                "a model of the Hub"
            )
        return cls(kind, ref, device, batch, bf16)

    def settings(self) -> dict[str, Any]:
        """What its scores depend on."""
        weights = _load(self).fingerprint[:16]
        return {"judge": f"{self.kind}:{self.ref}", "weights": weights, "bf16": self.bf16}

    def scores(self, pairs: list[Pair]) -> list[float | None]:
        """The score of each pair of one batch."""
        from vlp.data.picture import BadImage, rgb

        opened: dict[int, Image] = {}
        for place, pair in enumerate(pairs):
            try:
                opened[place] = rgb(pair.image)
            except BadImage:
                continue

        scores: list[float | None] = [None] * len(pairs)
        if opened:
            captions = [pairs[place].caption for place in opened]
            judged = _load(self).scores(list(opened.values()), captions)
            for place, score in zip(opened, judged):
                scores[place] = score
        return scores


class CrossEncoder:
    """A model whose head says whether a text matches a picture, such as BLIP's."""

    def __init__(self, judge: Judge, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.device = local_device(judge.device, shared=True)
        self.fingerprint = fingerprint(model)

    def scores(self, images: list[Image], captions: list[str]) -> list[float | None]:
        """The probability of a match for each picture and caption."""
        import torch

        inputs = self.processor(
            images=images, text=captions, return_tensors="pt", padding=True, truncation=True
        )
        inputs = inputs.to(self.device, self.model.dtype)
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
        self.fingerprint = fingerprint(model)
        processor.tokenizer.padding_side = "left"  # the answer follows the last token

        self.yes, self.no = (_first_tokens(processor.tokenizer, words) for words in (YES, NO))
        if not self.yes or not self.no or self.yes & self.no:
            raise ValueError(
                f"judge {judge.ref!r}: its tokenizer has no tokens of their own for yes and no"
            )

    def scores(self, images: list[Image], captions: list[str]) -> list[float | None]:
        """The probability of yes against no; None where the likeliest answer is neither."""
        import torch

        texts = [self._prompt(caption) for caption in captions]
        inputs = self.processor(
            images=[[image] for image in images], text=texts, return_tensors="pt", padding=True
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


def yes_or_no(logits: Tensor, yes: list[int], no: list[int]) -> list[float | None]:
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


def _first_tokens(tokenizer: Any, words: tuple[str, ...]) -> set[int]:
    """The tokens with which an answer of one of these words begins."""
    tokens = set()
    for text in (*words, *(f" {word}" for word in words)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if ids and ids[0] != tokenizer.unk_token_id and tokenizer.decode(ids[:1]).strip() in words:
            tokens.add(ids[0])
    return tokens


@cache
def _load(judge: Judge) -> CrossEncoder | MultimodalModel:
    """The judge's model; raises ValueError where it cannot be loaded or has no such head."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(judge.ref)
        processor = transformers.AutoProcessor.from_pretrained(judge.ref)
        kind = _class_of(judge, config)
        model = kind.from_pretrained(
            judge.ref, dtype=torch.bfloat16 if judge.bf16 else torch.float32
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"judge {judge.ref!r} cannot be loaded as a {judge.kind}: {str(error)[:300]}"
        ) from None

    model = model.eval().to(local_device(judge.device, shared=True))
    if judge.kind == "mllm":
        return MultimodalModel(judge, model, processor)
    return CrossEncoder(judge, model, processor)


def _class_of(judge: Judge, config: Any) -> Any:
    """The class of transformers by that of the weights; ValueError for one without such a head."""
    import transformers

    if judge.kind == "mllm":
        return transformers.AutoModelForImageTextToText

    names = [name for name in config.architectures or [] if name.endswith("TextRetrieval")]
    if not names or not hasattr(transformers, names[0]):
        architecture = ", ".join(config.architectures or []) or "a model of no named kind"
        raise ValueError(
            f"found {architecture}, expected a model with a head for matching, such as "
            "BlipForImageTextRetrieval"
        )
    return getattr(transformers, names[0])
