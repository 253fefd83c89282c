"""Language models of several families that build in milliseconds: a configuration, random weights
and a tokenizer each, in a folder that transformers reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.models.tiny import WORDS, tokenizer
from vlp.models.language import LanguageTower, weights_of
from vlp.text_store import digests
from vlp.towers import llm

# Windows are shorter than the texts, so that they hide something.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2},
    "mistral": {"sliding_window": 4},
    "gpt2": {},
}


def language_model(folder: Path, family: str = "llama", seed: int = 0, **keys: Any) -> Path:
    """A two-layer model of width 32 with its tokenizer, which closes each text with </s>."""
    from transformers import AutoConfig, AutoModel

    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    if family == "gpt2":  # its own names
        sizes = {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}
    config = AutoConfig.for_model(family, **sizes, **ends, **FAMILIES[family], **keys)

    torch.manual_seed(seed)
    model = AutoModel.from_config(config)
    # Tokens that hardly differ would let a wrong mask pass.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return tokenizer(folder)


def text_store(folder: Path) -> Path:
    """A store of one text, as `vlp data embed --text-model` writes it."""
    model = language_model(folder / "llm")
    section = llm.text_cfg(llm.Options(str(model), context_length=12))
    weights = weights_of(LanguageTower(section, 1).transformer)
    tensors = {"text": torch.ones(1, 32).half(), "digest": torch.from_numpy(digests(["a dog"]))}
    about = {"text_cfg": json.dumps(section), "weights": weights}
    save_file(tensors, folder / "00000.safetensors", about)
    return folder
