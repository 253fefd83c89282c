"""A Hugging Face language model as the text tower, with its own tokenizer (open_clip's
HFTextEncoder).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlp.pretrained import places
from vlp.pretrained.configurations import FILE, configuration
from vlp.schema import did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Options:
    # local folder, Hub name, or package:NAME/FOLDER of an installed package: a roberta,
    # xlm-roberta, bert, mt5 or m2m_100 model
    model: str
    context_length: int = 77  # L
    pretrained: bool = True  # the language model's weights; false: random
    tokenizer: str | None = None  # Hub name or local folder; None: the model's
    # where the text's features are read; None: as the model's own sentence-transformers files say
    # (mean for MiniLM), else as is usual for its kind
    pooler: Literal["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"] | None = None
    # projection into the shared space: one layer, or two with GELU between; none: the pooled
    # features are the embedding
    proj: Literal["linear", "mlp", "none"] = "linear"
    # how captions are cleaned before they become tokens
    clean: Literal["lower", "whitespace", "canonicalize"] = "whitespace"

    def __post_init__(self) -> None:
        if self.context_length < 3:
            raise ValueError(
                f"context_length is {self.context_length}; begin, end and one word need at least 3"
            )


def text_cfg(options: Options) -> dict[str, Any]:
    tokenizer = options.tokenizer or options.model
    # What is not there shows here, before anything is built.
    pooler = options.pooler or _usual_pooler(options.model)
    if options.pooler:
        language_config(options.model)
    if options.tokenizer:
        _check_tokenizer(options.tokenizer)

    return {
        "hf_model_name": options.model,
        "hf_model_pretrained": options.pretrained,
        "hf_tokenizer_name": tokenizer,
        "hf_proj_type": None if options.proj == "none" else options.proj,
        "hf_pooler_type": pooler,
        "context_length": options.context_length,
        "tokenizer_kwargs": {"clean": options.clean},
    }


def _check_tokenizer(tokenizer: str) -> None:
    """Raise ValueError where no tokenizer can lie."""
    try:
        places.locate(tokenizer, "a folder with tokenizer.json or the like")
    except ValueError as error:
        raise ValueError(f"text_tower.tokenizer: {error}") from None


def language_config(model: str) -> PretrainedConfig:
    """transformers' configuration of a language model by name, folder or package; ValueError for
    none, and for one with code.
    """
    try:
        return configuration(places.locate(model, file=FILE))
    except ValueError as error:
        raise ValueError(f"no Hugging Face model configuration at {model!r}: {error}") from None


def _usual_pooler(model: str) -> str:
    from open_clip.hf_configs import arch_dict

    kind = language_config(model).model_type
    if kind not in arch_dict:
        close = did_you_mean(kind, arch_dict)
        raise ValueError(
            f"{model!r} is a {kind!r} model, which open_clip cannot make a text tower{close}"
        )
    return _stated_pooler(model) or arch_dict[kind]["pooler"]


# sentence-transformers' name of a pooling → open_clip's
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
# Before its version 5.4 it wrote a flag a pooling.
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _stated_pooler(model: str) -> str | None:
    """open_clip's name of the pooling that a model's sentence-transformers files state; None where
    it has no such files.
    """
    modules = _json_of(model, "modules.json") or []
    try:
        folders = [module["path"] for module in modules if module["type"].endswith(".Pooling")]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"modules.json of {model!r} does not list modules with type and path; download the "
            "model again, or write pooler: to choose one"
        ) from None
    if len(folders) != 1:
        return None

    stated = _json_of(model, f"{folders[0]}/config.json") or {}
    if not isinstance(stated, dict):
        raise ValueError(
            f"{folders[0]}/config.json of {model!r} is no object; download the model again, or "
            "write pooler: to choose one"
        )
    poolings = stated.get("pooling_mode", [])
    if isinstance(poolings, str):
        poolings = [poolings]
    poolings = [*poolings, *(name for flag, name in _FLAGS.items() if stated.get(flag))]

    # Two poolings are two embeddings side by side there.
    if len(poolings) != 1 or poolings[0] not in _POOLERS:
        raise ValueError(
            f"{model!r} pools by {' and '.join(poolings) or 'nothing'}, which open_clip's text "
            f"tower cannot; it can by {' or '.join(_POOLERS)}. Write pooler: to choose one "
            "nevertheless"
        )
    return _POOLERS[poolings[0]]


def _json_of(model: str, name: str) -> Any:
    """A JSON file of a model's folder or repository; None where it has none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        places.locate(model),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download the model again") from None
