"""Tokenizers of loaded models: whether they are whole, and what a hash tells of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlp.eval.encoder import ModelError
from vlp.eval.legible import Vocabulary, vocabulary_of
from vlp.pretrained.configurations import reason


def checked(build: Callable[[], Any], name: str) -> Any:
    """What `build` returns; a ModelError if its files are missing or broken."""
    try:
        tokenizer = build()
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {name} is missing or broken ({reason(error)}); put its files beside "
            "the weights (tokenizer.json, tokenizer_config.json), or export the model again"
        ) from error

    # Where the files are absent, transformers answers every sentence alike.
    if _ids(tokenizer, "a cat") == _ids(tokenizer, "a dog"):
        raise ModelError(
            f"the tokenizer of {name} has no vocabulary; put its files (tokenizer.json) beside "
            "the weights"
        )
    return tokenizer


def _ids(tokenizer: Any, sentence: str) -> list[int]:
    """The token ids of one sentence."""
    ids = tokenizer([sentence])
    return ids[0].tolist() if isinstance(ids, Tensor) else ids["input_ids"][0]


def vocabulary(tokenizer: Any) -> Vocabulary | None:
    """Of a tokenizer of ours; only those of Hugging Face may not know something."""
    hub = getattr(tokenizer, "hub", None)
    return None if hub is None else vocabulary_of(hub, tokenizer)


def describe(tokenizer: Any) -> str:
    """What a tokenizer does to a sentence, as far as a hash must know: its ids for two probes."""
    # Cases, accents and punctuation are where tokenizers differ; "" shows what frames a sentence.
    probes = ("A photo of 2 Cats, naïve & café!", "")
    return json.dumps([type(tokenizer).__name__, *(_ids(tokenizer, probe) for probe in probes)])
