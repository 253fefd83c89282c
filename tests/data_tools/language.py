"""Language models with few words and random weights."""

from __future__ import annotations

from pathlib import Path

WORDS = """[UNK] [PAD] [CLS] [SEP] [MASK] a red blue car truck two dogs cats under table the in on
man woman holds small large green old road""".split()
WORDS.append("\n")  # as a model may write it
ANSWERS = [*WORDS, "yes", "no", "<image>", "caption", "also"]


def write_models(folder: Path, width: int = 16, layers: int = 1) -> Path:
    """A masked, a causal and an encoder-decoder model, and one that is none of them."""
    import torch
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=width,
    )
    ends = {"bos_token_id": 3, "eos_token_id": 3}
    gpt = GPT2Config(
        vocab_size=len(WORDS), n_embd=width, n_layer=layers, n_head=2, n_positions=160, **ends
    )
    t5 = T5Config(
        vocab_size=len(WORDS),
        d_model=width,
        d_kv=8,
        d_ff=width,
        num_layers=layers,
        num_heads=2,
        pad_token_id=1,
        eos_token_id=3,
        decoder_start_token_id=1,
    )

    models = {
        "masked": BertForMaskedLM(bert),
        "neither": BertModel(bert),
        "causal": GPT2LMHeadModel(gpt),
        "seq2seq": T5ForConditionalGeneration(t5),
    }
    words = tokenizer()
    for name, model in models.items():
        # Weights as they are drawn prefer one word to all others.
        for weight in model.parameters():
            weight.data.mul_(4)
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


def tokenizer(words: list[str] = WORDS):
    """A word is a token; others are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
        "eos_token": "[SEP]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_VISION = _TOWER | {"image_size": 16, "patch_size": 8}
_SIZE = {"height": 16, "width": 16}


def write_judges(folder: Path) -> Path:
    """A cross-encoder (BLIP) and a multimodal language model (LLaVA)."""
    write_cross_encoder(folder / "blip")
    write_multimodal(folder / "llava")
    return folder


def write_cross_encoder(folder: Path) -> Path:
    """BLIP with its head for matching, and random weights."""
    import torch
    from transformers import (
        BlipConfig,
        BlipForImageTextRetrieval,
        BlipImageProcessor,
        BlipProcessor,
    )

    torch.manual_seed(0)
    text = _TOWER | {"vocab_size": len(ANSWERS), "encoder_hidden_size": 16, "projection_dim": 8}
    text |= {"bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 3, "sep_token_id": 3}
    blip = BlipConfig(
        text_config=text, vision_config=_VISION, projection_dim=8, image_text_hidden_size=8
    )
    cross_encoder = BlipForImageTextRetrieval(blip)
    for weight in cross_encoder.parameters():
        # As they are drawn, they score all pairs alike.
        weight.data.mul_(10)
    cross_encoder.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size=_SIZE), tokenizer(ANSWERS)).save_pretrained(folder)
    return folder


def write_multimodal(folder: Path) -> Path:
    """LLaVA with random weights."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(1)
    llama = LlamaConfig(
        **_TOWER, vocab_size=len(ANSWERS), num_key_value_heads=2, bos_token_id=2, eos_token_id=3
    )
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=8),
        text_config=llama,
        image_token_index=ANSWERS.index("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(llava).save_pretrained(folder)
    words = tokenizer(ANSWERS)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    LlavaProcessor(
        CLIPImageProcessor(size=_SIZE, crop_size=_SIZE),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for turn in messages %}{% for part in turn.content %}"
        "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endfor %}",
    ).save_pretrained(folder)
    return folder
