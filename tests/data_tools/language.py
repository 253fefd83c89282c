"""Language models with few words and random weights."""

from __future__ import annotations

from pathlib import Path

WORDS = """[UNK] [PAD] [CLS] [SEP] [MASK] a red blue car truck two dogs cats under table the in on
man woman holds small large green old road""".split()


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


def tokenizer():
    """A word is a token; others are unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
        "eos_token": "[SEP]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)
