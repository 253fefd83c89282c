"""Models that build in milliseconds, with all that is needed to train, export and load them without
a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models.small_siglip import register_small_siglip
from vlp import config, schema
from vlp.models.build import build
from vlp.models.dual_encoder import DualEncoder

VIT = {"name": "vit", "width": 64, "layers": 2, "head_width": 32, "patch_size": 8, "image_size": 32}
TEXT = {"name": "transformer", "width": 64, "layers": 2, "heads": 2, "context_length": 16}
WORDS = (
    "[PAD]",
    "</s>",
    "[UNK]",
    "a",
    "photo",
    "of",
    "red",
    "blue",
    "two",
    "circle",
    "circles",
    "square",
    "dog",
    "cat",
)


def settings(**keys: Any) -> config.Model:
    return schema.parse(
        config.Model, {"image_tower": VIT, "text_tower": TEXT, "embed_dim": 48} | keys
    )


def tiny(seed: int = 0, **keys: Any) -> DualEncoder:
    """A ViT beside a transformer, or what `keys` of the model section say; weights from `seed`, in
    evaluation mode.
    """
    torch.manual_seed(seed)
    return build(settings(**keys)).eval()


def inputs(model: DualEncoder, rows: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """uint8 pixels and token ids that end as the model's tokenizer ends them."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(
        0, 256, (rows, 3, *model.image_spec.size), generator=generator, dtype=torch.uint8
    )
    length = model.text_spec.context_length
    ids = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        used = length - 2 - row
        ids[row, :used] = torch.randint(3, len(WORDS), (used,), generator=generator)
        ids[row, used] = 49407 if model.text_spec.tokenizer == "clip" else 1
    return pixels, ids


def few_words(folder: Path, vocabulary: int, length: int, **text: Any) -> dict[str, Any]:
    """A text tower of open_clip's by a file in `folder`: few weights, which ranks send to one
    another in a moment.
    """
    text_cfg = {"context_length": length, "vocab_size": vocabulary, "width": 32, "heads": 2}
    unused = {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8}
    described = {
        "embed_dim": 32,
        "vision_cfg": unused,
        "text_cfg": text_cfg | {"layers": 1} | text,
    }
    path = folder / "text.json"
    path.write_text(json.dumps(described))
    return {"name": "open_clip", "architecture": str(path)}


def tokenizer(folder: Path, begin: str = "") -> Path:
    """A Hugging Face tokenizer of a dozen words, closing each text with </s>, and opening it with
    the token `begin`, if any.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words_known = (*WORDS, begin) if begin else WORDS
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words_known)}, unk_token="[UNK]")
    )
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A </s>".strip(),
        special_tokens=[(token, words_known.index(token)) for token in ("</s>", begin) if token],
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="</s>", unk_token="[UNK]"
    )
    made.save_pretrained(folder)
    return folder


def language_model(folder: Path) -> Path:
    """The configuration of a two-layer BERT, with its tokenizer, as a folder that transformers
    reads.
    """
    from transformers import BertConfig

    BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).save_pretrained(folder)
    return tokenizer(folder)


def siglip(folder: Path, **text: Any) -> dict[str, Any]:
    """A tower description whose parts are those of SigLIP at a fraction of the size; weights are
    random.
    """
    register_small_siglip()
    tokenizer(folder)
    described = {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {
                "timm_model_name": "vit_small_for_tests",
                "timm_pool": "map",
                "timm_proj": "none",
                "image_size": 32,
            },
            "text_cfg": {
                "context_length": 12,
                "vocab_size": len(WORDS),
                "hf_tokenizer_name": "local",
                "width": 32,
                "heads": 2,
                "layers": 2,
                "no_causal_mask": True,
                "proj_bias": True,
                "pool_type": "last",
                "norm_kwargs": {"eps": 1e-6},
            }
            | text,
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return {"name": "open_clip", "architecture": f"local-dir:{folder}"}
