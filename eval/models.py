"""Any dual encoder behind one small interface: pictures and sentences in, unit rows out, its own preprocessing inside.

    load("runs/demo")                          our run (newest checkpoint), checkpoint, or exported folder
    load("ViT-B-32:laion2b_s34b_b79k")         open_clip architecture and weights (a tag or a file)
    load("hf-hub:user/name"), load("local-dir:folder")     as open_clip writes them
    load("openai/clip-vit-base-patch32"), load("folder")   transformers CLIP and SigLIP
    from_model(model)                          a vlp.model.DualEncoder in memory, inside training
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from vlp.towers._weights import STAGES

if TYPE_CHECKING:
    from vlp.model import DualEncoder


class ModelError(ValueError):
    """A model reference that cannot be evaluated; the message says what is missing."""


@dataclass(frozen=True)
class Encoder:
    """A dual encoder as evaluation sees it. The two functions return rows of any length; the methods normalise them."""

    name: str  # the architecture, folder or run
    pretrained: str  # which weights, in open_clip's sense; "" where the name says it all
    prepare: Callable[[Image.Image], Tensor]  # one RGB picture -> pixels [3, H, W]; runs in threads
    image: Callable[[Tensor], Tensor]  # pixels [n, 3, H, W] on `device` -> [n, D]
    text: Callable[[list[str]], Tensor]  # n sentences -> [n, D]; tokenizes
    scale: float = 1.0  # the learned inverse temperature, for the record
    device: str | torch.device = "cpu"
    n_truncated: Callable[[list[str]], int] = lambda texts: 0  # how many sentences are longer than the context
    fingerprint: str = ""  # content hash of weights and preprocessing; "": embeddings are not kept
    autocast: torch.dtype | None = None  # None: the model's own precision

    def encode_images(self, images: Tensor | list[Image.Image]) -> Tensor:
        """Pictures, or pixels [n, 3, H, W] as `prepare` makes them, to [n, D] float32 unit rows."""
        if isinstance(images, list):
            images = torch.stack([self.prepare(picture) for picture in images])
        return self._unit(lambda: self.image(images.to(self.device, non_blocking=True)))

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Sentences to [n, D] float32 unit rows."""
        return self._unit(lambda: self.text(texts))

    def _unit(self, rows: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, self.autocast, enabled=self.autocast is not None):
            return torch.nn.functional.normalize(rows().float(), dim=-1)


def load(ref: str, device: str | torch.device = "cpu", autocast: torch.dtype | None = None) -> Encoder:
    """The encoder that `ref` names (see the top of this file); a ModelError says what is wrong with it."""
    device = torch.device(device)
    path = Path(ref)
    if path.exists():
        if (path / "checkpoints").is_dir() or (path / "manifest.json").exists():
            from vlp.checkpoint import load_model

            return from_model(load_model(path), name=ref, device=device, autocast=autocast, keep=True)
        if (path / STAGES).exists():
            from vlp.model import load as load_export

            return from_model(load_export(path), name=ref, device=device, autocast=autocast, keep=True)
        if (path / "open_clip_config.json").exists():
            return _open_clip(f"local-dir:{ref}", "", device, autocast, shown=ref)
        if (path / "config.json").exists():
            return _transformers(ref, device, autocast)
        raise ModelError(
            f"{ref} is no model: expected a run or checkpoint of vlp (checkpoints/ or manifest.json), an export "
            "(open_clip_config.json) or a transformers folder (config.json)"
        )
    if ref.startswith(("hf-hub:", "local-dir:")):
        return _open_clip(ref, "", device, autocast)
    name, _, tag = ref.partition(":")
    import open_clip

    if name in open_clip.list_models():
        if not tag:
            known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise ModelError(f"{name} is an architecture without weights; write {name}:TAG (known: {known}) or {name}:FILE")
        return _open_clip(name, tag, device, autocast)
    if ref.count("/") == 1 and ":" not in ref and not ref.startswith(("/", ".")):
        return _transformers(ref, device, autocast)
    raise ModelError(
        f"no model {ref!r}: no such file or folder, no open_clip architecture (NAME:TAG; `open_clip.list_models()`), "
        "no hf-hub:USER/NAME, no USER/NAME of transformers"
    )


def from_model(
    model: DualEncoder,
    name: str = "vlp",
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    keep: bool = False,
) -> Encoder:
    """A model of ours; `keep` hashes its weights so that embeddings may be kept on disk (not while it is training).

    The caller decides about `model.eval()`; `vlp.eval.run.in_training` does so and puts the mode back.
    """
    from vlp.data import text as tokenizers
    from vlp.data.decode import evaluate

    device = torch.device(device) if device is not None else next(model.parameters()).device
    if keep:
        model = model.to(device).eval()
    tokenizer = _tokenizer(lambda: tokenizers.build(model.text_spec), name)
    preprocessing = repr((model.image_spec, model.text_spec))
    with torch.no_grad():
        scale = float(model().scale)
    return Encoder(
        name=name,
        pretrained="",
        prepare=lambda picture: evaluate(picture, model.image_spec),
        image=lambda pixels: model(image=pixels).image,
        text=lambda texts: model(text=tokenizer(texts).to(device)).text,
        scale=scale,
        device=device,
        n_truncated=lambda texts: tokenizer.tokenize(texts)[1],
        fingerprint=fingerprint(model.state_dict(), preprocessing) if keep else "",
        autocast=autocast,
    )


def _open_clip(name: str, tag: str, device: torch.device, autocast: torch.dtype | None, shown: str = "") -> Encoder:
    import open_clip

    try:
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag or None, device=device)
    except (RuntimeError, FileNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"open_clip cannot load {name}{':' + tag if tag else ''}: {error}") from error
    tokenizer = _tokenizer(lambda: open_clip.get_tokenizer(name), shown or name)
    model.eval()
    preprocessing = repr((sorted(open_clip.get_model_preprocess_cfg(model).items()), _describe(tokenizer)))
    return Encoder(
        name=shown or name,
        pretrained=tag,
        prepare=transform,
        image=model.encode_image,
        text=lambda texts: model.encode_text(tokenizer(texts).to(device)),
        scale=float(model.logit_scale.detach().float().exp()),
        device=device,
        fingerprint=fingerprint(model.state_dict(), preprocessing),
        autocast=autocast,
    )


def _transformers(name: str, device: torch.device, autocast: torch.dtype | None) -> Encoder:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(name).to(device).eval()
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"transformers cannot load {name}: {error}") from error
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ModelError(f"{name} is a {type(model).__name__}; evaluation needs a dual encoder such as CLIPModel or SiglipModel")
    tokenizer = _tokenizer(lambda: AutoTokenizer.from_pretrained(name), name)
    length = min(model.config.text_config.max_position_embeddings, tokenizer.model_max_length)

    def text(texts: list[str]) -> Tensor:
        # All sentences to the full length: SigLIP was trained without a mask, so its padding is part of the input.
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(device)
        return _pooled(model.get_text_features(**{k: tokens[k] for k in tokens if k in ("input_ids", "attention_mask")}))

    return Encoder(
        name=name,
        pretrained="",
        prepare=lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0],
        image=lambda pixels: _pooled(model.get_image_features(pixel_values=pixels)),
        text=text,
        scale=float(model.logit_scale.detach().float().exp()),
        device=device,
        fingerprint=fingerprint(model.state_dict(), processor.to_json_string() + _describe(tokenizer)),
        autocast=autocast,
    )


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # a tensor before transformers 5


def _tokenizer(build: Callable[[], Any], name: str) -> Any:
    try:
        tokenizer = build()
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {name} is missing or broken ({error}); put its files beside the weights "
            "(tokenizer.json, tokenizer_config.json), or export the model again"
        ) from error
    if _ids(tokenizer, "a cat") == _ids(tokenizer, "a dog"):  # what transformers answers where the files are absent
        raise ModelError(f"the tokenizer of {name} has no vocabulary; put its files (tokenizer.json) beside the weights")
    return tokenizer


def _ids(tokenizer: Any, sentence: str) -> list[int]:
    ids = tokenizer([sentence])
    return ids[0].tolist() if isinstance(ids, Tensor) else ids["input_ids"][0]


def _describe(tokenizer: Any) -> str:
    """What a tokenizer does to a sentence, as far as a hash must know: its ids for two probes."""
    probes = ("A photo of 2 Cats, naïve & café!", "")
    return json.dumps([type(tokenizer).__name__, *(_ids(tokenizer, probe) for probe in probes)])


def fingerprint(weights: Mapping[str, Tensor], preprocessing: str) -> str:
    """Content hash of all weights, by name, and of what happens before them."""
    total = hashlib.sha256(preprocessing.encode())
    for key in sorted(weights):
        value = weights[key].detach().cpu().contiguous()
        total.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
