"""A multimodal language model of transformers as both towers.

    pixels [n, 3, H, W] → the model, picture in its prompt → h at the last token [n, width] → [n, D]
    ids [n, L]          → its language model, caption in its prompt → h at the last token → [n, D]

A picture may also stand in a text, as a query of both does: `Prompts` are then the tokens of each.

All pictures have one size, so that the prompt is one row of tokens for all of them, which the
model's own processor made; it stands in the description of the tower. The image tower holds the
weights, and the text tower reads the language model among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlp.models import language
from vlp.pretrained.configurations import reason
from vlp.towers import mllm
from vlp.towers.huggingface import language_config
from vlp.towers.mllm import DONE_BY_DATA, SECTION, processor

# What open_clip builds, for us to replace: the smallest tower that it knows.
STAND_IN = {"image_size": 8, "patch_size": 8, "width": 64, "layers": 1, "head_width": 64}


def is_described(model_cfg: dict[str, Any]) -> bool:
    """Whether a model's towers are one of these."""
    return SECTION in model_cfg["vision_cfg"]


class Prompts(NamedTuple):
    """The tokens in which pictures stand, a row each, padded at the end."""

    ids: Tensor  # [n, L]
    mask: Tensor  # [n, L] 1 where there is a token
    kinds: Tensor | None  # [n, L] what stands at each place, where the model asks for it


class ImageTower(nn.Module):
    """The model, with its picture side: pixels [n, 3, H, W], normalised → features [n, D]."""

    ids: Tensor  # [L] of the prompt, the picture's places among them
    kinds: Tensor | None  # [L] what stands at each place, where the model asks for it

    def __init__(self, model_cfg: dict[str, Any]) -> None:
        super().__init__()
        section, text = model_cfg["vision_cfg"][SECTION], model_cfg["text_cfg"]
        self.image_size: int = model_cfg["vision_cfg"]["image_size"]
        self.name: str = text["hf_model_name"]
        self.prompt_text: str = text["tokenizer_kwargs"]["prompt"]
        self.context_length: int = text["context_length"]
        self.model = _model(text["hf_model_name"], text["hf_model_pretrained"])
        self.projection = _projection(section, text[language.SECTION], model_cfg["embed_dim"])

        self.lays_out = processor(text["hf_model_name"]).image_processor
        self.settings = {key: False for key in DONE_BY_DATA if hasattr(self.lays_out, key)}
        self.register_buffer("ids", torch.tensor(section["ids"]), persistent=False)
        kinds = section["kinds"]
        self.register_buffer("kinds", kinds and torch.tensor(kinds), persistent=False)
        # Linear layers of the model, by name, that no picture's feature depends on.
        self.unread = self._freeze_unread()

    def forward(self, pixels: Tensor, prompts: Prompts | None = None) -> Tensor:
        """`prompts`: of each picture, in the place of the tower's own."""
        ids, mask, kinds = self._own_prompts(len(pixels)) if prompts is None else prompts
        read: dict[str, Any] = self._laid_out(pixels)
        if kinds is not None:
            read["mm_token_type_ids"] = kinds

        output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **read)
        rows = torch.arange(len(ids), device=ids.device)
        last = output.last_hidden_state[rows, mask.sum(dim=1) - 1]
        return self.projection(last.to(_dtype(self.projection, last)))

    def _own_prompts(self, n: int) -> Prompts:
        ids = self.ids.expand(n, -1)
        kinds = None if self.kinds is None else self.kinds.expand(n, -1)
        return Prompts(ids, torch.ones_like(ids), kinds)

    def prompts(self, texts: Sequence[tuple[str, str]]) -> Prompts:
        """The tokens of a picture between two texts each, in the prompt of texts; tokens that mean
        more than words are left out of them, and what is beyond the context that a caption has.
        ValueError for what the model cannot read.
        """
        opening, closing = self.prompt_text.split("{}")
        of_prompt = processor(self.name).tokenizer(opening + closing, verbose=False)["input_ids"]
        n_tokens = max(0, self.context_length - len(of_prompt))
        rows = []
        for before, after in texts:
            first = mllm.without_special_tokens(self.name, before)
            last = mllm.without_special_tokens(self.name, after)
            first, last = mllm.fitting(self.name, first, last, n_tokens)
            rows.append(mllm.laid_out(self.name, opening + first, last + closing, self.image_size))

        # Padding stands behind a row, where no token of it sees it.
        ids = _padded([row["ids"] for row in rows])
        mask = _padded([[1] * len(row["ids"]) for row in rows])
        has_kinds = rows[0]["kinds"] is not None
        kinds = _padded([row["kinds"] for row in rows]) if has_kinds else None
        device = self.ids.device
        return Prompts(ids.to(device), mask.to(device), None if kinds is None else kinds.to(device))

    @torch.no_grad()
    def _laid_out(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels as the model reads them: whole, or as rows of patches with their grid."""
        made = self.lays_out(images=list(pixels), return_tensors="pt", **self.settings)
        return {
            name: value.to(pixels.device, pixels.dtype if value.is_floating_point() else None)
            for name, value in made.items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As open_clip's towers; the text tower's language model is part of the model."""
        language.recompute_activations(self.model, enable)

    def _freeze_unread(self) -> frozenset[str]:
        """Lock parameters that no picture's feature depends on, such as the last norm of LLaVA's
        vision tower, which reads the layer before: DDP would wait for their gradients. Returns the
        names of the linear layers among them, which adapters leave out.

        ValueError for a size of pictures that the model does not read.
        """
        black = torch.zeros(1, 3, self.image_size, self.image_size)
        try:
            with torch.enable_grad():
                read = _leaves(self(black))
        except (IndexError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the model cannot read a picture of {self.image_size} pixels: {reason(error)}; "
                "set image_tower.image_size to what its vision tower was made for"
            ) from None

        for parameter in self.parameters():
            parameter.requires_grad_(parameter in read)
        return frozenset(
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.weight not in read
        )


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of different lengths as int64 [n, L], 0 behind the shorter ones."""
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for place, row in zip(padded, rows):
        place[: len(row)] = torch.tensor(row)
    return padded


def leave_pictures_out(tower: nn.Module) -> None:
    """Let adapters leave out what only pictures pass of the image tower, where it is a model that
    reads texts too.
    """
    if isinstance(tower, ImageTower):
        of_texts = set(tower.model.get_decoder().modules())
        of_pictures = [
            name
            for name, module in tower.model.named_modules()
            if isinstance(module, nn.Linear) and module not in of_texts
        ]
        tower.unread = tower.unread.union(of_pictures)


def _leaves(output: Tensor) -> set[Tensor]:
    """The parameters that an output was computed from, by its graph."""
    leaves, seen, left = set(), set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        left += [following for following, _ in node.next_functions]
    return leaves


class TextTower(language.LanguageTower):
    """The language model of an image tower as the text tower: ids [n, L] → features [n, D]."""

    projection: Any  # a linear layer, or nothing

    def __init__(self, model_cfg: dict[str, Any], image: ImageTower) -> None:
        nn.Module.__init__(self)
        options = model_cfg["text_cfg"][language.SECTION]
        self.pool, self.width = options["pool"], options["width"]
        self.vocab_size: int = options["vocab_size"]
        self.is_stored, self.latent = False, None

        self._config = image.model.config

        # Not registered: its weights are the image tower's, once in a checkpoint and an optimiser.
        object.__setattr__(self, "transformer", image.model.get_decoder())
        self.accepts = language.parameters_of(self.transformer)
        self.adaptor = nn.Sequential()
        section = model_cfg["vision_cfg"][SECTION]
        self.projection = _projection(section, options, model_cfg["embed_dim"])

    @property
    def config(self) -> Any:
        """transformers' configuration of the whole model, pictures included."""
        return self._config

    def projected(self, rows: Tensor) -> Tensor:
        """As the language tower's, without an adaptor."""
        return self.projection(rows.to(_dtype(self.projection, rows)))


def _projection(
    section: dict[str, Any], text: dict[str, Any], embed_dim: int
) -> nn.Linear | nn.Identity:
    if section["projected"]:
        return nn.Linear(text["width"], embed_dim, bias=False)
    if embed_dim != text["width"]:
        raise ValueError(
            f"the model gives {text['width']} features, unprojected, and embed_dim is {embed_dim}; "
            "make them equal, or set proj: linear"
        )
    return nn.Identity()


def _dtype(projection: nn.Module, rows: Tensor) -> torch.dtype:
    weight = getattr(projection, "weight", rows)
    return weight.dtype


def _model(name: str, pretrained: bool) -> Any:
    """transformers' model in float32; ValueError where there is none, or where its files do not
    fill it.
    """
    model = language.of_transformers(name, language_config(name), pretrained)
    if not hasattr(model, "get_decoder") or not hasattr(model, "get_image_features"):
        raise ValueError(
            f"{name!r} is a {type(model).__name__}, which takes no pictures among its tokens; "
            "expected a model like LLaVA or Qwen2-VL"
        )
    return model
