"""Tokenizers of transformers by place, and whether they know any words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlp.pretrained.configurations import reason

_REMEDY = "put its files there (tokenizer.json, tokenizer_config.json), or name another tokenizer"


def tokenizer(place: str, name: str) -> Any:
    """transformers' tokenizer at a place that `vlp.pretrained.places.locate` gave; ValueError calls
    it `name` where there is none.
    """
    from transformers import AutoTokenizer

    return checked(lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False), name)


def checked(load: Callable[[], Any], name: str) -> Any:
    """What `load` returns, transformers' tokenizer or open_clip's around it; ValueError where it
    fails, or knows no words.
    """
    try:
        loaded = load()
    except Exception as error:  # transformers', tokenizers' and sentencepiece's own kinds
        raise ValueError(
            f"the tokenizer of {name} cannot be loaded ({reason(error)}); {_REMEDY}"
        ) from None

    # Beside config.json alone transformers makes one that reads every text alike.
    inner = getattr(loaded, "tokenizer", loaded)
    if len(inner) <= len(set(inner.all_special_tokens)):
        raise ValueError(f"the tokenizer of {name} has no vocabulary; {_REMEDY}")
    return loaded
