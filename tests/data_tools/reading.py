"""A tiny model of transformers that reads a picture and writes a text, with random weights."""

from __future__ import annotations

from pathlib import Path


def tiny_reader(folder: Path) -> Path:
    """A vision encoder and a text decoder, as TrOCR's, with their processor."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    encoder = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
    )
    decoder = transformers.TrOCRConfig(
        vocab_size=len(words),
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    transformers.VisionEncoderDecoderModel(config).save_pretrained(folder)
    images = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    transformers.TrOCRProcessor(images, fast).save_pretrained(folder)
    return folder
