"""A decoder-only language model as the text tower: Llama, Qwen, Gemma, Mistral, GPT-2 and others of
transformers' AutoModel, with a prompt around each caption.

The caption is read at one place or as a mean (`pool`), passes the adaptor, where there is one, and
is projected into the shared space. LLM2CLIP (Huang et al. 2024, arXiv 2411.04997) reads a tuned
model so; LLM2Vec (BehnamGhader et al. 2024, arXiv 2404.05961) lets its tokens see what follows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlp.towers.huggingface import language_config

Pool = Literal["last", "mean", "eos", "latent"]


@dataclass(frozen=True)
class Adaptor:
    """Residual blocks of layer norm, linear, GELU, linear between language model and projection."""

    layers: int = 4  # blocks
    width: int = 2048  # of the hidden layer
    residual: bool = True  # a block adds to its input; false: it takes its place

    def __post_init__(self) -> None:
        if min(self.layers, self.width) < 1:
            raise ValueError(
                f"the adaptor has layers {self.layers} and width {self.width}; expected at least 1"
            )


@dataclass(frozen=True)
class Options:
    # local folder, Hub name, or package:NAME/FOLDER of an installed package: a decoder-only model
    # with its tokenizer
    model: str
    # where a caption is read: at its last token; as the mean of its tokens, without the prompt's;
    # at the end token, which is added; or as that mean after attention to learned latents
    pool: Pool = "last"
    # what a token sees: those before it, or all
    attention: Literal["causal", "bidirectional"] = "causal"
    prompt: str = "{}"  # the caption stands for {}: "{}\nSummarize the above text in one word:"
    context_length: int = 77  # L, the prompt included
    pretrained: bool = True  # the language model's weights; false: random
    latents: int = 512  # of pool: latent (NV-Embed)
    heads: int = 8  # of pool: latent; must divide the language model's width
    adaptor: Adaptor | None = None  # None: the projection alone
    # how captions are cleaned before they become tokens
    clean: Literal["lower", "whitespace", "canonicalize"] = "whitespace"

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1:
            raise ValueError(
                f"prompt is {self.prompt!r}; expected one {{}} where the caption stands"
            )
        if self.context_length < 3:
            raise ValueError(
                f"context_length is {self.context_length}; prompt and one word need at least 3"
            )
        if min(self.latents, self.heads) < 1:
            raise ValueError(f"latents {self.latents} and heads {self.heads} must be positive")


def text_cfg(options: Options) -> dict[str, Any]:
    config = language_config(options.model)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{options.model!r} is a {config.model_type!r} model with encoder and decoder; "
            "expected a decoder-only model such as Llama, Qwen, Gemma, Mistral or GPT-2. The tower "
            "huggingface takes mt5 and m2m_100"
        )

    width = config.get_text_config().hidden_size
    if options.pool == "latent" and width % options.heads:
        raise ValueError(f"heads {options.heads} does not divide {options.model}'s width {width}")

    return {
        "hf_model_name": options.model,
        "hf_model_pretrained": options.pretrained,
        "hf_tokenizer_name": options.model,
        "context_length": options.context_length,
        "tokenizer_kwargs": {
            "clean": options.clean,
            "prompt": options.prompt,
            "end": options.pool == "eos",
            "mark": options.pool in ("mean", "latent"),
        },
        # Read by vlp.models.language; open_clip has no such tower.
        "vlp_text": {
            "width": width,
            "vocab_size": config.get_text_config().vocab_size,
            "pool": options.pool,
            "attention": options.attention,
            "latents": options.latents,
            "heads": options.heads,
            "adaptor": None if options.adaptor is None else asdict(options.adaptor),
        },
    }
