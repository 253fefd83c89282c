"""A Hugging Face language model as the text tower, with its own tokenizer (open_clip's
HFTextEncoder).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlp.schema import did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Options:
    # Hub name or local folder of a roberta, xlm-roberta, bert, mt5 or m2m_100 model
    model: str
    context_length: int = 77  # L
    pretrained: bool = True  # the language model's weights; false: random
    tokenizer: str | None = None  # Hub name or local folder; None: the model's
    # where the text's features are read; None: as is usual for the model
    pooler: Literal["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"] | None = None
    # projection into the shared space: one layer, or two with GELU between
    proj: Literal["linear", "mlp"] = "linear"
    # how captions are cleaned before they become tokens
    clean: Literal["lower", "whitespace", "canonicalize"] = "whitespace"

    def __post_init__(self) -> None:
        if self.context_length < 3:
            raise ValueError(
                f"context_length is {self.context_length}; begin, end and one word need at least 3"
            )


def text_cfg(options: Options) -> dict[str, Any]:
    return {
        "hf_model_name": options.model,
        "hf_model_pretrained": options.pretrained,
        "hf_tokenizer_name": options.tokenizer or options.model,
        "hf_proj_type": options.proj,
        "hf_pooler_type": options.pooler or _usual_pooler(options.model),
        "context_length": options.context_length,
        "tokenizer_kwargs": {"clean": options.clean},
    }


def language_config(model: str) -> PretrainedConfig:
    """transformers' configuration of a language model by name or folder; ValueError for none, and
    for one with code.

    Code that a folder or repository brings along is never run, nor asked about.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no Hugging Face model configuration at {model!r}: {reason(error)}"
        ) from None


def reason(error: Exception) -> str:
    """What transformers says in a line; where it would have code of the folder run, that vlp does
    not.
    """
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return (
            "it needs code that it brings along, which vlp never runs; convert it to a class of "
            "transformers"
        )
    return message[:300]


def _usual_pooler(model: str) -> str:
    from open_clip.hf_configs import arch_dict

    kind = language_config(model).model_type
    if kind not in arch_dict:
        close = did_you_mean(kind, arch_dict)
        raise ValueError(
            f"{model!r} is a {kind!r} model, which open_clip cannot make a text tower{close}"
        )
    return arch_dict[kind]["pooler"]
