"""A text tower around a language model of transformers: ids in, features out.

    ids [n, L] → language model → h [n, L, width] → pool → adaptor → projection → [n, D]

    last, eos   h at the last place that holds a token, whichever side padding is on
    mean        mean of h over the caption's tokens, those of the prompt left out
    latent      the same mean of h', h attending to learned latents (NV-Embed, Lee et al. 2024,
                arXiv 2405.17428, section 3.1): queries h, keys and values the latents, then an MLP

What pooling gives may be stored beside the data: rows [n, width] in place of ids go the rest of the
way, scaled to the length √width. Of such a tower the language model is no part: its name and a hash
of its weights are (`Referenced`).

open_clip knows no such tower, so that this section of `text_cfg`, under `SECTION`, is ours.
"""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.data.prompted import unmarked
from vlp.pretrained import places
from vlp.pretrained.configurations import reason
from vlp.pretrained.fingerprints import fingerprint
from vlp.towers.huggingface import language_config

SECTION = "vlp_text"
# What open_clip builds, for us to replace: the smallest tower that it knows.
STAND_IN = {"context_length": 4, "vocab_size": 4, "width": 4, "heads": 1, "layers": 1}
# By which a token's features change where it sees another one; rounding is less.
_SEEN = 1e-5


def is_described(model_cfg: dict[str, Any]) -> bool:
    """Whether a model's text tower is one of these."""
    return SECTION in model_cfg["text_cfg"]


def reference_of(text_cfg: dict[str, Any]) -> str:
    """The language model that a tower runs and does not hold, in words; empty where there is
    none.
    """
    weights = text_cfg.get(SECTION, {}).get("reference")
    return f"{text_cfg['hf_model_name']} (weights {weights})" if weights else ""


class OtherWeightsError(ValueError):
    """Under a language model's name lies another one than before."""


class LanguageTower(nn.Module):
    """The tower that `text_cfg` describes, with random weights beside the language model's.

    `transformer` is the language model, under its own names; a lock freezes it and nothing else.
    """

    def __init__(self, text_cfg: dict[str, Any], embed_dim: int) -> None:
        super().__init__()
        options = text_cfg[SECTION]
        width: int = options["width"]
        self.pool: str = options["pool"]
        self.vocab_size: int = options["vocab_size"]

        self.is_stored = "reference" in options
        self.transformer = Referenced(text_cfg) if self.is_stored else _language_model(text_cfg)
        self.width = width
        self.accepts = parameters_of(self.transformer)

        self.latent = None
        if self.pool == "latent":
            self.latent = LatentAttention(width, options["latents"], options["heads"])
        self.adaptor = _adaptor(width, options["adaptor"])
        self.projection = nn.Linear(width, embed_dim, bias=False)

    @property
    def config(self) -> Any:
        """transformers' configuration of the language model."""
        return self.transformer.config

    def forward(self, text: Tensor) -> Tensor:
        """Ids [n, L] of `vlp.data.prompted`, or what pooling gave of them, [n, width] → [n, D]."""
        pooled = text if text.is_floating_point() else self.pooled(text)
        # Whether the rows that were stored are unit rows or not makes no difference.
        if self.is_stored:
            pooled = F.normalize(pooled.float(), dim=-1) * self.width**0.5
        return self.projected(pooled)

    def projected(self, rows: Tensor) -> Tensor:
        """What pooling gave, or each token's part of it, [..., width] → [..., D]."""
        return self.projection(self.adaptor(rows.to(self.projection.weight.dtype)))

    def pooled(self, ids: Tensor) -> Tensor:
        """[n, L] → [n, width]."""
        return self.pool_of(self.hidden(ids), ids)

    def hidden(self, ids: Tensor) -> Tensor:
        """What pooling reads of each token of ids [n, L], [n, L, width]."""
        tokens, is_token, _ = unmarked(ids)
        hidden = self._hidden(tokens, is_token)
        return hidden if self.latent is None else self.latent(hidden)

    def pool_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The pool over `hidden` of the same ids, [n, width]."""
        _, is_token, is_read = unmarked(ids)
        if self.pool in ("last", "eos"):
            # Not −1: that would read padding at the end of every shorter text.
            places = torch.arange(ids.shape[1], device=ids.device)
            last = torch.where(is_token, places, 0).argmax(dim=1)
            return hidden[torch.arange(len(ids), device=ids.device), last]

        # Left out rather than multiplied by 0: what stands at padding may be NaN.
        read = hidden.float().masked_fill(~is_read.unsqueeze(-1), 0)
        return read.sum(dim=1) / is_read.sum(dim=1, keepdim=True)

    def _hidden(self, tokens: Tensor, is_token: Tensor) -> Tensor:
        """The language model's last hidden states, [n, L, width]."""
        keywords: dict[str, Any] = {"use_cache": False}
        # Counted from the first token, so that padding before it moves none.
        if "position_ids" in self.accepts:
            keywords["position_ids"] = (is_token.cumsum(dim=1) - 1).clamp(min=0)
        mask = is_token.long()
        return self.transformer(tokens, attention_mask=mask, **keywords).last_hidden_state


def parameters_of(model: nn.Module) -> frozenset[str]:
    """The keywords that a model's forward pass takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def recompute_activations(trunk: nn.Module, enable: bool) -> None:
    """Let a model of transformers keep the inputs of its blocks alone, or all activations again."""
    # transformers renamed the methods on its way from 5.17 to 5.23.
    word = "activation" if hasattr(trunk, "activation_checkpointing_enable") else "gradient"

    if enable:
        getattr(trunk, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(trunk, f"{word}_checkpointing_disable")()


class Referenced(nn.Module):
    """A language model by name, loaded when it is first called; no weight of it is the tower's."""

    def __init__(self, text_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.text_cfg = text_cfg | {"hf_model_pretrained": True}

    def forward(
        self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool
    ) -> Any:
        """As the language model; ValueError where it is not here, or not the one that it was."""
        model = _loaded(json.dumps(self.text_cfg), str(tokens.device))
        keywords: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache}
        if "position_ids" in inspect.signature(model.forward).parameters:
            keywords["position_ids"] = position_ids
        with torch.no_grad():
            return model(tokens, **keywords)

    def gradient_checkpointing_enable(self, options: Any = None) -> None:
        """Nothing: it keeps no activations."""

    def gradient_checkpointing_disable(self) -> None:
        """Nothing, as well."""


# Copies of a tower, which engines make for each evaluation, share one language model.
@lru_cache(maxsize=1)
def _loaded(text_cfg: str, device: str) -> nn.Module:
    described = json.loads(text_cfg)
    model = _language_model(described).requires_grad_(False).eval()

    expected = described[SECTION]["reference"]
    if weights_of(model) != expected:
        raise OtherWeightsError(
            f"{described['hf_model_name']} has other weights ({weights_of(model)}) than the "
            f"language model that this text tower was trained on ({expected}); put that one there"
        )
    return model.to(device)


def forget() -> None:
    """Let go of the language model that a reference loaded."""
    _loaded.cache_clear()


def weights_of(model: nn.Module) -> str:
    """A hash of a language model's weights, as stores of its embeddings and exports name it."""
    return fingerprint(model.state_dict(), "")[:16]


class LatentAttention(nn.Module):
    """Hidden states attend to learned latents, which are keys and values: [n, L, width] → the same
    shape.
    """

    def __init__(self, width: int, n_latents: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(n_latents, width) * width**-0.5)
        self.norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = _feed_forward(width, 4 * width)

    def forward(self, hidden: Tensor) -> Tensor:
        query = self._heads(self.query(self.norm(hidden)))
        keys, values = self.key_value(self.latent_norm(self.latents)).chunk(2, dim=-1)
        keys, values = self._heads(keys.unsqueeze(0)), self._heads(values.unsqueeze(0))

        rows = len(hidden)
        attended = F.scaled_dot_product_attention(
            query, keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
        )
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(hidden)

    def _heads(self, rows: Tensor) -> Tensor:
        """[n, places, width] → [n, heads, places, width / heads]."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AdaptorBlock(nn.Module):
    """[n, width] → [n, width]."""

    def __init__(self, width: int, hidden: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.layers = _feed_forward(width, hidden)

    def forward(self, rows: Tensor) -> Tensor:
        changed = self.layers(rows)
        return rows + changed if self.residual else changed


def _feed_forward(width: int, hidden: int) -> nn.Sequential:
    layers = (nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    return nn.Sequential(*layers)


def _adaptor(width: int, options: dict[str, Any] | None) -> nn.Sequential:
    """The blocks between pooling and projection; none without options."""
    if options is None:
        return nn.Sequential()
    n_blocks, hidden, residual = options["layers"], options["width"], options["residual"]
    return nn.Sequential(*(AdaptorBlock(width, hidden, residual) for _ in range(n_blocks)))


def _language_model(text_cfg: dict[str, Any]) -> nn.Module:
    """transformers' model in float32, without what no pooling reads; ValueError where there is
    none, or where its files do not fill it.
    """
    name: str = text_cfg["hf_model_name"]
    config = language_config(name)
    # transformers' own switch: masks then leave out padding alone, or what a window leaves out. An
    # encoder is left as it is, for `_check_attention` to refuse where it is called causal.
    if text_cfg[SECTION]["attention"] == "bidirectional":
        for part in (config, config.get_text_config()):
            part.is_causal = False

    model = of_transformers(name, config, text_cfg["hf_model_pretrained"])
    # An encoder's; nothing reads it, and DDP would wait for its gradients.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    _check_attention(model, text_cfg[SECTION]["attention"])
    return model


def of_transformers(name: str, config: Any, pretrained: bool) -> Any:
    """transformers' base model of a configuration in float32, with its weights or random ones;
    ValueError where there is none, or where its files do not fill it.
    """
    from transformers import AutoModel

    options: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
    unfilled: list[str] = []
    try:
        if pretrained:
            model, report = AutoModel.from_pretrained(
                places.locate(name), config=config, output_loading_info=True, **options
            )
            unfilled = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
        else:
            model = AutoModel.from_config(config, **options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"no language model at {name!r}: {reason(error)}") from None

    # transformers would go on with random weights in their place.
    if unfilled:
        raise ValueError(
            f"the weights of {name!r} lack {', '.join(sorted(unfilled)[:3])}; download it again"
        )
    return model


@torch.no_grad()
def _check_attention(model: nn.Module, attention: str) -> None:
    """Refuse a model whose tokens see other places than `attention` says: not every family has the
    switch.
    """
    was_training = model.training
    model.eval()
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]])
    first, other = model(tokens, use_cache=False).last_hidden_state[:, 0].float()
    model.train(was_training)

    sees_what_follows = bool((first - other).norm() > _SEEN * first.norm())
    if sees_what_follows != (attention == "bidirectional"):
        does = "bidirectional" if sees_what_follows else "causal"
        kind = type(model).__name__
        raise ValueError(f"transformers' {kind} can only be {does}: set attention: {does}")
