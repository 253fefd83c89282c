"""Any dual encoder behind one small interface: pictures and sentences in, unit rows out, its own
preprocessing inside.

    load("runs/demo")      every reference of vlp.pretrained.references: runs, exports, folders and
                           tags of open_clip, ARCHITECTURE:FILE, transformers folders,
                           hf-hub:user/name
    from_model(model)      a vlp.models.dual_encoder.DualEncoder in memory, inside training

vlp's own models are run by vlp. Foreign ones are run by the library they come from, with its own
pixels; their tokenizers are built here, so that no code of a folder runs and truncated texts are
counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor

from vlp.config import Members
from vlp.eval import describers
from vlp.eval.describers import Describer
from vlp.eval.legible import Vocabulary, vocabulary_of
from vlp.pretrained import references, weight_files
from vlp.pretrained.configurations import reason
from vlp.pretrained.fingerprints import fingerprint
from vlp.pretrained.references import Reference
from vlp.pretrained.runs import CheckpointError
from vlp.schema import parse
from vlp.towers.huggingface import language_config
from vlp.types import ON_WHITE, Decoding

if TYPE_CHECKING:
    from vlp.models.concatenated import Concatenated
    from vlp.models.dual_encoder import DualEncoder


class ModelError(ValueError):
    """A model reference that cannot be evaluated; the message says what is missing."""


def _none_truncated(texts: list[str]) -> int:
    return 0


@dataclass(frozen=True)
class Encoder:
    """A dual encoder as evaluation sees it. The two functions return rows of any length; the
    methods normalise them.
    """

    name: str  # the architecture, folder or run
    pretrained: str  # which weights, in open_clip's sense; "" where the name says it all
    prepare: Callable[[Image.Image], Tensor]  # one RGB picture -> pixels [3, H, W]; runs in threads
    image: Callable[[Tensor], Tensor]  # pixels [n, 3, H, W] on `device` -> [n, D]
    text: Callable[[list[str]], Tensor]  # n sentences -> [n, D]; tokenizes
    scale: float = 1.0  # the learned inverse temperature, for the record
    device: str | torch.device = "cpu"
    # how many sentences are longer than the context
    n_truncated: Callable[[list[str]], int] = _none_truncated
    vocabulary: Vocabulary | None = None  # None: the tokenizer knows everything
    # content hash of weights and preprocessing; "": embeddings are not kept
    fingerprint: str = ""
    autocast: torch.dtype | None = None  # None: the model's own precision
    decoding: Decoding = ON_WHITE  # how stored pictures become the RGB that `prepare` gets
    tower: torch.nn.Module | None = None  # what holds the images' projection; None: not one module
    # `image` without what follows the tower; None: nothing does
    features: Callable[[Tensor], Tensor] | None = None
    # `image` and `text` with log κ [n] in place of rows; None: the model does not say how certain
    # its embeddings are
    certainty: tuple[Callable[[Tensor], Tensor], Callable[[list[str]], Tensor]] | None = None
    width: int | None = None  # how many numbers of a row count, the first ones; None: all
    # rows of further modalities side by side [n, S] and their lengths [n, O], and where the model
    # reads frames those of videos [n, F, 3, H, W] -> [n, O, D]
    others: Callable[..., Tensor] | None = None
    # (T, F) of each, by name (vlp.data.modalities)
    modality_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    # pixels [n, 3, H, W] and the texts before and after each picture -> [n, D]; None: the model
    # reads a picture or a text, not both as one
    joint: Callable[[Tensor, list[tuple[str, str]]], Tensor] | None = None
    # those of them that are made of members of the samples (vlp.data.sounds)
    decoded_modalities: Mapping[str, Members] = field(default_factory=dict)
    # an encoded frame of a video as pixels [3, H, W]; of a model that reads frames
    prepare_frame: Callable[[bytes], Tensor] | None = None
    frame_shape: tuple[int, ...] = ()
    describer: Describer | None = None  # what writes captions; None: there is no text decoder

    def encode_images(self, images: Tensor | list[Image.Image]) -> Tensor:
        """Pictures, or pixels [n, 3, H, W] as `prepare` makes them, to [n, D] float32 unit rows."""
        if isinstance(images, list):
            images = torch.stack([self.prepare(picture) for picture in images])
        return self._unit(lambda: self.image(images.to(self.device, non_blocking=True)))

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Sentences to [n, D] float32 unit rows."""
        return self._unit(lambda: self.text(texts))

    def encode_joint(self, images: Tensor, texts: list[tuple[str, str]]) -> Tensor:
        """Pixels and the texts before and after each picture to [n, D] float32 unit rows."""
        assert self.joint is not None, "asked of a model that reads both as one"
        joint = self.joint
        return self._unit(lambda: joint(images.to(self.device, non_blocking=True), texts))

    def encode_others(self, rows: Tensor, lengths: Tensor, frames: Tensor | None = None) -> Tensor:
        """Rows of further modalities side by side, and frames of videos where the model reads them,
        to [n, O, D] float32 unit rows.
        """
        assert self.others is not None, "asked of a model with towers for them"
        others = self.others
        values = [rows, lengths] if frames is None else [rows, lengths, frames]
        return self._unit(lambda: others(*(value.to(self.device) for value in values)))

    def precision(self) -> torch.autocast:
        """What towers and text decoder compute in, as a context."""
        device_type = torch.device(self.device).type
        return torch.autocast(device_type, self.autocast, enabled=self.autocast is not None)

    def _unit(self, rows: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad(), self.precision():
            return torch.nn.functional.normalize(rows().float()[..., : self.width], dim=-1)


def load(
    ref: str, device: str | torch.device = "cpu", autocast: torch.dtype | None = None
) -> Encoder:
    """The encoder that `ref` names (vlp.pretrained.references); a ModelError says what was found
    and what would work.
    """
    usable = _usable(device)
    try:
        return _load(ref, usable, autocast)
    except ModelError:
        raise
    except (ValueError, CheckpointError) as error:
        raise ModelError(str(error)) from error


def _usable(device: str | torch.device) -> torch.device:
    """The device by name; a ModelError for one that there is not here."""
    # One number is put there and read back: `meta` takes whatever it is given and has nothing.
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
    except Exception as error:  # each backend's own kinds
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(
            f"device is {str(device)!r}, which cannot be used here ({reason}); "
            f"expected cpu, or one of the {torch.cuda.device_count()} GPUs: cuda, cuda:1, …"
        ) from None
    return usable


def _load(ref: str, device: torch.device, autocast: torch.dtype | None) -> Encoder:
    """The encoder of a reference, by whichever library its weights belong to."""
    reference = references.resolve(ref)

    # Weights of others are run by the library that they were made with.
    if reference.kind == "tag":
        return _of_tag(reference, device, autocast)
    if reference.kind == "transformers":
        return _transformers(reference, device, autocast)
    if reference.kind == "open_clip" and "vlp" not in references.read_config(reference.path):
        return _of_folder(reference, device, autocast)

    from vlp.checkpoint import load_any

    return from_model(
        load_any(reference),
        name=ref,
        device=device,
        autocast=autocast,
        keep=True,
    )


# --- models of ours -------------------------------------------------------------------------------


def from_model(
    model: DualEncoder | Concatenated,
    name: str = "vlp",
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    keep: bool = False,
) -> Encoder:
    """A model of ours; `keep` hashes its weights so that embeddings may be kept on disk (not while
    it is training).

    The caller decides about `model.eval()`; `vlp.eval.run.in_training` does so and puts the mode
    back.
    """
    from vlp.data import text as tokenizers
    from vlp.data.decode import eval_transform

    device = torch.device(device) if device is not None else next(model.parameters()).device
    if keep:
        model = model.to(device).eval()

    # Only fixed weights get a fingerprint: embeddings of a model in training must not be kept.
    tokenizer = _tokenizer(lambda: tokenizers.build(model.text_spec), name)
    preprocessing = repr((model.image_spec, model.text_spec))
    with torch.no_grad():
        scale = float(model().scale)

    def tokens(texts: list[str]) -> dict[str, Any]:
        ids = tokenizer(texts)
        return {"text": ids.to(device), "cut": model.cut(ids.numpy(), device, len(ids))}

    # Of several models as one nobody says how certain the whole is.
    certainty = None
    heads: Any = getattr(model, "heads", None)
    if heads is not None and heads.concentration is not None:
        whole: Any = model
        certainty = whole.image_certainty, lambda texts: whole.text_certainty(**tokens(texts))
    return Encoder(
        name=name,
        pretrained="",
        prepare=lambda picture: eval_transform(picture, model.image_spec),
        image=lambda pixels: model(image=pixels).image,
        tower=getattr(model, "visual", None),
        features=getattr(model, "image_features", None),
        text=lambda texts: model(**tokens(texts)).text,
        joint=_joint(model),
        certainty=certainty,
        scale=scale,
        device=device,
        n_truncated=lambda texts: tokenizer.tokenize(texts)[1],
        vocabulary=_vocabulary(tokenizer),
        fingerprint=fingerprint(model.state_dict(), preprocessing) if keep else "",
        autocast=autocast,
        decoding=model.image_spec.decoding,
        others=lambda rows, lengths, frames=None: (
            model(
                modalities=rows,
                modality_lengths=lengths,
                frames=None if frames is None else frames.flatten(0, 1),
            ).others
        ),
        prepare_frame=lambda data: eval_transform(data, model.image_spec),
        frame_shape=(3, *model.image_spec.size),
        modality_shapes=getattr(model, "modality_shapes", {}),
        decoded_modalities=getattr(model, "decoded_modalities", {}),
        describer=describers.of_model(model, tokenizer),
    )


def _joint(
    model: DualEncoder | Concatenated,
) -> Callable[[Tensor, list[tuple[str, str]]], Tensor] | None:
    """What embeds pictures between texts, where the model reads pictures among its tokens."""
    from vlp.models.multimodal import ImageTower

    tower, whole = getattr(model, "visual", None), cast(Any, model)
    if not isinstance(tower, ImageTower):
        return None
    return lambda pixels, texts: whole(image=pixels, prompts=tower.prompts(texts)).image


# --- open_clip's ----------------------------------------------------------------------------------


def _of_tag(reference: Reference, device: torch.device, autocast: torch.dtype | None) -> Encoder:
    """open_clip's own weights for one of its architectures."""
    import open_clip

    architecture, tag = reference.architecture, reference.tag
    # Weights of the other activation load without an error, and every score would be wrong.
    weight_files.check_tag(architecture, tag)
    text_cfg = open_clip.get_model_config(architecture)["text_cfg"]
    return _open_clip(architecture, tag, architecture, text_cfg, device, autocast)


def _of_folder(reference: Reference, device: torch.device, autocast: torch.dtype | None) -> Encoder:
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

    tokenizer = _tokenizer(lambda: tokenizers.build(spec), shown)
    model.eval()
    settings = open_clip.get_model_preprocess_cfg(model)
    preprocessing = repr((sorted(settings.items()), _describe(tokenizer)))
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
        vocabulary=_vocabulary(tokenizer),
        fingerprint=fingerprint(model.state_dict(), preprocessing),
        autocast=autocast,
        describer=describers.of_open_clip(model, tokenizer, spec),
    )


def _cut_first(transform: Callable[[Image.Image], Tensor]) -> Callable[[Image.Image], Tensor]:
    """A transform that resizes the shorter side and cuts the centre, but without gigabytes."""
    from vlp.data.decode import middle

    return lambda picture: transform(middle(picture))


# --- transformers' --------------------------------------------------------------------------------


def _transformers(
    reference: Reference, device: torch.device, autocast: torch.dtype | None
) -> Encoder:
    """A CLIPModel, SiglipModel or the like, run as it is."""
    from transformers import AutoTokenizer

    name, folder = reference.text, str(reference.path)
    model, processor = _load_transformers(name, folder, device)
    tokenizer = _tokenizer(
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
    preprocessing = processor.to_json_string() + _describe(tokenizer)
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


# --- tokenizers and hashes ------------------------------------------------------------------------


def _tokenizer(build: Callable[[], Any], name: str) -> Any:
    """What `build` returns; a ModelError if its files are missing or broken."""
    try:
        tokenizer = build()
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {name} is missing or broken ({reason(error)}); put its files beside "
            "the weights (tokenizer.json, tokenizer_config.json), or export the model again"
        ) from error

    # Where the files are absent, transformers answers every sentence alike.
    if _ids(tokenizer, "a cat") == _ids(tokenizer, "a dog"):
        raise ModelError(
            f"the tokenizer of {name} has no vocabulary; put its files (tokenizer.json) beside "
            "the weights"
        )
    return tokenizer


def _ids(tokenizer: Any, sentence: str) -> list[int]:
    """The token ids of one sentence."""
    ids = tokenizer([sentence])
    return ids[0].tolist() if isinstance(ids, Tensor) else ids["input_ids"][0]


def _vocabulary(tokenizer: Any) -> Vocabulary | None:
    """Of a tokenizer of ours; only those of Hugging Face may not know something."""
    hub = getattr(tokenizer, "hub", None)
    return None if hub is None else vocabulary_of(hub, tokenizer)


def _describe(tokenizer: Any) -> str:
    """What a tokenizer does to a sentence, as far as a hash must know: its ids for two probes."""
    # Cases, accents and punctuation are where tokenizers differ; "" shows what frames a sentence.
    probes = ("A photo of 2 Cats, naïve & café!", "")
    return json.dumps([type(tokenizer).__name__, *(_ids(tokenizer, probe) for probe in probes)])
