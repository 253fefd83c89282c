"""Multimodal language models of two families that build in milliseconds: a configuration, random
weights, a tokenizer and an image processor each, in a folder that transformers reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models.tiny import WORDS

LLAVA = ("<image>",)
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
FAMILIES = ("llava", "qwen2_vl")
SIZE = 32  # pixels of a picture
PROMPTS = {"prompt_image": "{} a photo of two", "prompt_text": "{} a photo of two"}


def multimodal_model(folder: Path, family: str) -> Path:
    """A two-layer model of width 32 that takes pictures of SIZE among its tokens."""
    torch.manual_seed(0)
    model, processor = {"llava": _llava, "qwen2_vl": _qwen}[family]()
    # Tokens that hardly differ would let a wrong place pass.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def options(folder: Path) -> dict[str, Any]:
    """The tower's options of such a model."""
    return {"model": str(folder), "image_size": SIZE, "context_length": 16, **PROMPTS}


def tower(folder: Path, **more: Any) -> dict[str, Any]:
    """The model section of such a model, which is both towers."""
    image = {"name": "mllm", **options(folder), **more}
    return {"image_tower": image, "text_tower": None, "embed_dim": None}


def _llava() -> tuple[Any, Any]:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaModel,
        LlavaProcessor,
    )

    words = _tokenizer(LLAVA)
    seeing = CLIPVisionConfig(
        **_sizes(16), image_size=SIZE, patch_size=16, projection_dim=16, hidden_act="gelu"
    )
    language = LlamaConfig(vocab_size=len(words), **_sizes(32))
    config = LlavaConfig(
        vision_config=seeing,
        text_config=language,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,  # leaves a layer and a norm behind it unread
    )
    pixels = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    processor = LlavaProcessor(
        image_processor=pixels,
        tokenizer=words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaModel(config), processor


def _qwen() -> tuple[Any, Any]:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLImageProcessor,
        Qwen2VLModel,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    words = _tokenizer(QWEN)
    ids = words.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    language = {"vocab_size": len(words), "rope_parameters": rope, **_sizes(32), **ends}
    language["num_key_value_heads"] = 2
    seeing = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=language,
        vision_config=seeing | {"patch_size": 8},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    options = {"patch_size": 8, "min_pixels": 256, "max_pixels": 4096}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**options),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**options),
    )
    return Qwen2VLModel(config), processor


def _sizes(width: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }


def _tokenizer(specials: tuple[str, ...]) -> Any:
    """The words of all tests, and the tokens of a picture."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*WORDS, *specials))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        eos_token="</s>",
        unk_token="[UNK]",
        additional_special_tokens=list(specials),
    )
