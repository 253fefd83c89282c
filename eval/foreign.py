"""Dual encoders of open_clip and transformers, run by these libraries with their own pixels.

Tokenizers are built here, so that no code of a folder runs and truncated texts are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlp.eval import describers, model_tokenizers
from vlp.eval.encoder import Encoder, ModelError
from vlp.eval.legible import vocabulary_of
from vlp.pretrained import references, weight_files
from vlp.pretrained.configurations import reason
from vlp.pretrained.fingerprints import fingerprint
from vlp.pretrained.references import Reference
from vlp.schema import parse
from vlp.towers.huggingface import language_config
from vlp.types import Decoding

# --- open_clip's ----------------------------------------------------------------------------------


def of_tag(reference: Reference, device: torch.device, autocast: torch.dtype | None) -> Encoder:
    """open_clip's own weights for one of its architectures."""
    import open_clip

    architecture, tag = reference.architecture, reference.tag
    # Weights of the other activation load without an error, and every score would be wrong.
    weight_files.check_tag(architecture, tag)
    text_cfg = open_clip.get_model_config(architecture)["text_cfg"]
    return _open_clip(architecture, tag, architecture, text_cfg, device, autocast)


def of_folder(reference: Reference, device: torch.device, autocast: torch.dtype | None) -> Encoder:
    """A folder in open_clip's form that somebody else wrote."""
    weight_files.weights_in(reference.path)  # without any, open_clip would go on with random ones
    described = references.read_config(reference.path)
    text_cfg = described["model_cfg"]["text_cfg"]
    name = f"local-dir:{reference.path}"
    encoder = _open_clip(name, "", reference.text, text_cfg, device, autocast)

    # Exports of ours say how pictures are decoded, others do not.
    stated = described.get("preprocess_cfg", {}).get("decoding", {})
    return replace(encoder, decoding=parse(Decoding, stated, ("preprocess_cfg", "decoding")))


def _open_clip(
    name: str,  # as open_clip calls it
    tag: str,
    shown: str,  # as messages and records call it
    text_cfg: dict[str, Any],
    device: torch.device,
    autocast: torch.dtype | None,
) -> Encoder:
    """A model that open_clip builds, with open_clip's own pixels and our tokenizer."""
    import open_clip

    from vlp.data import text as tokenizers
    from vlp.models.assemble import text_spec

    spec = text_spec(text_cfg, open_clip.CLIPTextCfg(**text_cfg).context_length)
    if text_cfg.get("hf_model_name"):
        # Refuses code of its own, which open_clip would ask the terminal about.
        language_config(text_cfg["hf_model_name"])

    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=tag or None, device=device
        )
    except Exception as error:  # torch's, safetensors', the Hub's and open_clip's own kinds
        raise ModelError(
            f"open_clip cannot load {shown}{':' + tag if tag else ''}: "
            f"{str(error)[:600] or type(error).__name__}"
        ) from error

    tokenizer = model_tokenizers.checked(lambda: tokenizers.build(spec), shown)
    model.eval()
    settings = open_clip.get_model_preprocess_cfg(model)
    preprocessing = repr((sorted(settings.items()), model_tokenizers.describe(tokenizer)))
    return Encoder(
        name=shown,
        pretrained=tag,
        prepare=_cut_first(transform) if settings["resize_mode"] == "shortest" else transform,
        image=model.encode_image,
        tower=model.visual,
        text=lambda texts: model.encode_text(tokenizer(texts).to(device)),
        scale=float(model.logit_scale.detach().float().exp()),
        device=device,
        n_truncated=lambda texts: tokenizer.tokenize(texts)[1],
        vocabulary=model_tokenizers.vocabulary(tokenizer),
        fingerprint=fingerprint(model.state_dict(), preprocessing),
        autocast=autocast,
        describer=describers.of_open_clip(model, tokenizer, spec),
    )


def _cut_first(transform: Callable[[Image.Image], Tensor]) -> Callable[[Image.Image], Tensor]:
    """A transform that resizes the shorter side and cuts the centre, but without gigabytes."""
    from vlp.data.decode import middle

    return lambda picture: transform(middle(picture))


# --- transformers' --------------------------------------------------------------------------------


def of_transformers(
    reference: Reference, device: torch.device, autocast: torch.dtype | None
) -> Encoder:
    """A CLIPModel, SiglipModel or the like, run as it is."""
    from transformers import AutoTokenizer

    name, folder = reference.text, str(reference.path)
    model, processor = _load_transformers(name, folder, device)
    tokenizer = model_tokenizers.checked(
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False), name
    )

    # Some tokenizers state no limit, some models one that is smaller.
    length = min(model.config.text_config.max_position_embeddings, tokenizer.model_max_length)

    def prepare(picture: Image.Image) -> Tensor:
        return processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def tokens_of(texts: list[str]) -> Any:
        # All sentences to the full length: SigLIP was trained without a mask, so its padding is
        # part of the input.
        return tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )

    def text(texts: list[str]) -> Tensor:
        tokens = tokens_of(texts).to(device)
        inputs = {key: tokens[key] for key in tokens if key in ("input_ids", "attention_mask")}
        return _pooled(model.get_text_features(**inputs))

    def n_truncated(texts: list[str]) -> int:
        return sum(len(ids) > length for ids in tokenizer(texts, verbose=False).input_ids)

    # What the processor will cut away anyway need not be resized with it.
    cuts = getattr(processor, "do_center_crop", False) and processor.size.get("shortest_edge")
    preprocessing = processor.to_json_string() + model_tokenizers.describe(tokenizer)
    return Encoder(
        name=name,
        pretrained="",
        prepare=_cut_first(prepare) if cuts else prepare,
        image=lambda pixels: _pooled(model.get_image_features(pixel_values=pixels)),
        tower=model,
        text=text,
        scale=float(model.logit_scale.detach().float().exp()),
        device=device,
        n_truncated=n_truncated,
        vocabulary=vocabulary_of(tokenizer, lambda texts: tokens_of(texts)["input_ids"]),
        fingerprint=fingerprint(model.state_dict(), preprocessing),
        autocast=autocast,
    )


def _load_transformers(name: str, folder: str, device: torch.device) -> tuple[Any, Any]:
    """(model, image processor); a ModelError unless it has both towers."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=False).to(device).eval()
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers', safetensors' and torch's own kinds
        raise ModelError(f"transformers cannot load {name}: {reason(error)}") from error

    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ModelError(
            f"{name} is a {type(model).__name__}; evaluation needs a dual encoder such as "
            "CLIPModel or SiglipModel"
        )
    return model, processor


def _pooled(output: Any) -> Tensor:
    """The embeddings in a tower's output."""
    # A tensor before transformers 5.
    return output if isinstance(output, Tensor) else output.pooler_output
