"""The forms of an exported folder: open_clip's always, transformers' where its models can say the
same, checked by running them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from vlp.export import clip_form, dual_form, parts, sentence_form, siglip_form, usage
from vlp.export.card import of_open_clip
from vlp.export.pixels import levels_apart
from vlp.export.place import save_weights, write_json
from vlp.models import language, multimodal
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import image_size, packages, places, references, weight_files
from vlp.towers import mllm
from vlp.types import ON_WHITE

TOLERANCE = 1e-5  # largest difference of an embedding's coordinate between a form and the model
# Of 255: largest difference of a pixel between a processor and training, from rounding.
LEVELS = 1.01


def write_open_clip(
    model: DualEncoder,
    weights: dict[str, Tensor],
    folder: Path,
    home: Path,
    own_scale: tuple[str, float] | None,
) -> list[str]:
    """Write the form that every model has; returns notes. `home` is where the folder will lie.
    `own_scale`: the term whose temperature the scale is, and that scale; None: it is learned.

    A language model's text tower is in it under keys of ours, so that only vlp reads the whole.
    """
    is_ours = language.is_described(model.open_clip_config)
    reader = "open_clip" if of_open_clip(model) else "vlp"
    notes = [f"{reader}: {references.CONFIG}, {weight_files.WEIGHTS}"]

    if model.text_decoder is not None:
        notes.append(
            "open_clip: a CoCa, whose text decoder is in this form alone; no model of transformers "
            "has one. vlp writes captions with it; open_clip 3.3's own `generate` does not run "
            "beside transformers 5"
        )

    # A copy, because what points into this machine is renamed; without the heads, which embed
    # nothing, but for the last step of embeddings, which open_clip does not know.
    described = json.loads(json.dumps(model.description()))
    del described["vlp"]["heads"]
    if model.heads_config.nonnegative:
        described["vlp"]["heads"] = {"nonnegative": True}
        notes.append(
            "open_clip: gives rows with negative numbers; max(0, ·), divided by the norm, are the "
            "embeddings of training, which vlp gives"
        )
    described["vlp"].pop("lora", None)  # the weights have them merged
    if own_scale is not None:
        term, scale = own_scale
        described["vlp"]["own_scale"] = {"term": term, "scale": scale}
    text, vision = described["model_cfg"]["text_cfg"], described["model_cfg"]["vision_cfg"]

    reference = language.reference_of(text)
    if reference:
        # Notes are published in the card: of a folder they show the last name alone.
        place = Path(text["hf_model_name"])
        if place.is_dir():
            reference = language.reference_of(text | {"hf_model_name": place.name})
        notes.append(f"vlp: runs the language model {reference}, which is not in this folder")
    if model.text_spec.tokenizer != "clip" and not reference:
        from transformers import AutoTokenizer

        source = places.locate(model.text_spec.tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
        if Path(source).is_dir():
            text["hf_tokenizer_name"] = "."  # open_clip takes the folder it loads from
        else:
            text["hf_tokenizer_name"] = source

    # transformers, which open_clip asks for the text tower, takes a path or a repository. A path
    # must be whole; `vlp push` writes the repository.
    if "hf_model_name" in text and not reference:
        model.text.config.save_pretrained(folder / references.TEXT_TOWER)
        if multimodal.is_described(model.open_clip_config):
            processor = mllm.processor(text["hf_model_name"])
            processor.save_pretrained(folder / references.TEXT_TOWER)
        if Path(packages.local(text["hf_model_name"])).is_dir():
            text["hf_model_name"] = f"./{references.TEXT_TOWER}"
            if not is_ours:
                text["hf_model_name"] = str(home / references.TEXT_TOWER)
                notes.append(usage.BY_PATH)
        else:
            text["hf_model_name"] = places.bare(text["hf_model_name"])
    if not image_size.is_default(model.visual):
        notes.append(
            "open_clip: builds this timm tower for the size that timm states, and cannot load its "
            "positions of another size; vlp can"
        )
    if vision.get("timm_model_name") and vision.get("act_kwargs"):
        notes.append(
            "open_clip: has exact GELU in timm's towers, and this one the tanh form: its images "
            "differ slightly there"
        )

    write_json(folder / references.CONFIG, described)
    save_weights(weights, folder / weight_files.WEIGHTS)
    return notes


def write_transformers(
    model: DualEncoder, weights: dict[str, Tensor], folder: Path
) -> tuple[str | None, list[str]]:
    """Write the forms that fit; returns the class of transformers' form, or None, and notes."""
    if language.is_described(model.open_clip_config):
        return None, [
            "open_clip, transformers, sentence-transformers: no model of theirs has a language "
            "model as text tower; vlp eval, vlp.models.load and the data tools read this folder"
        ]

    if model.heads_config.nonnegative:
        return None, [
            "transformers, sentence-transformers: no model of theirs has max(0, ·) as its last "
            "step (model.heads.nonnegative); vlp and the ONNX files (--onnx) give these embeddings"
        ]

    refusals = []
    for name, form in (("CLIPModel", clip_form), ("SiglipModel", siglip_form)):
        reasons = form.obstacles(model)
        if reasons:
            refusals.append(f"transformers: no {name}, because " + "; ".join(reasons))
            continue

        # Nothing is written that does not give the model's embeddings when it runs.
        network = form.network(model, weights)
        difference = _difference(model, network)
        if difference > TOLERANCE:
            refusals.append(_apart(name, difference))
            continue
        notes = _write_whole(model, network, form.processor(model), folder)
        return name, [*notes, *_companions(model, name, folder)]

    joined, notes = _write_parts(model, weights, folder)
    return joined, [*refusals, *notes]


def _write_parts(
    model: DualEncoder, weights: dict[str, Tensor], folder: Path
) -> tuple[str | None, list[str]]:
    """Write each tower as a model of its own, joined by transformers or sentence-transformers."""
    name = "VisionTextDualEncoderModel"
    try:
        towers = {"image": parts.image(model, weights), "text": parts.text(model, weights)}
        dual_form.tokenizer(model)
    except parts.NoPart as reason:
        return None, [f"transformers: no {name}, because {reason}"]

    difference = _difference_of_parts(model, towers)
    if difference > TOLERANCE:
        return None, [_apart(name, difference)]
    try:
        network = dual_form.network(model, towers["image"], towers["text"], weights)
    except parts.NoPart as reason:
        sentence_form.write_router(folder, model, towers)
        return None, [
            f"transformers: no {name}, because {reason}",
            "sentence-transformers: modules.json, with each tower as a transformers model in "
            f"{sentence_form.ROUTER}/, embeddings within {difference:.1e} of the model's (5.4 or "
            "newer)",
        ]

    # The parts agree; joined, their projections have to lie in the right places as well.
    joined_difference = _difference(model, network)
    if joined_difference > TOLERANCE:
        return None, [_apart(name, joined_difference)]

    place = folder / dual_form.FOLDER
    place.mkdir()
    notes = _write_whole(model, network, dual_form.processor(model), place)
    sentence_form.write_both(place)
    sentence_form.write_modules(folder, dual_form.FOLDER, "Transformer")
    notes += [f"transformers: it lies in the subfolder {dual_form.FOLDER}"]
    return name, [*notes, "sentence-transformers: modules.json (5.4 or newer)"]


def _write_whole(model: DualEncoder, network: Any, processor: Any, folder: Path) -> list[str]:
    """Write a transformers model with its processor; notes on how close both are."""
    name = type(network).__name__
    network.config.architectures = [name]
    network.config.save_pretrained(folder)
    save_weights(network.state_dict(), folder / "model.safetensors")

    # Once more alone, as preprocessor_config.json: transformers 4 and JavaScript look there.
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)

    difference = _difference(model, network)
    return [
        f"transformers: {name}, embeddings within {difference:.1e} of the model's",
        *_unlike_training(model, processor.image_processor),
    ]


def _apart(name: str, difference: float) -> str:
    return (
        f"transformers: no {name}, because its embeddings differ by {difference:.1e}, more than "
        f"{TOLERANCE:g}"
    )


def _companions(model: DualEncoder, name: str, folder: Path) -> Iterator[str]:
    """What other libraries need beside transformers' files, and what these cannot say."""
    siglip = name == "SiglipModel"
    sentence_form.write_modules(folder, "", "Transformer" if siglip else "CLIPModel")
    sentence_form.write_both(folder, padded=siglip)
    if siglip:
        yield "sentence-transformers: modules.json (5.4 or newer)"
        return

    yield "sentence-transformers: modules.json"
    if model.logit_bias is not None:
        yield (
            "transformers: CLIPModel has no logit bias; cosines, rankings and softmax are the "
            "model's, but no sigmoid is"
        )


@torch.no_grad()
def _difference(model: DualEncoder, network: nn.Module) -> float:
    """The largest difference of a coordinate between a transformers model's embeddings and ours."""
    pixels, ids = parts.example(model)
    ours = model(pixels, ids)
    theirs = network(pixel_values=pixels, **parts.text_inputs(model, ids))
    return _largest_apart((ours.image, theirs.image_embeds), (ours.text, theirs.text_embeds))


@torch.no_grad()
def _difference_of_parts(model: DualEncoder, towers: Mapping[str, parts.Part]) -> float:
    """The same for towers that are models of their own."""
    pixels, ids = parts.example(model)
    ours = model(pixels, ids)
    images = parts.embed(towers["image"], pixel_values=pixels)
    texts = parts.embed(towers["text"], **parts.text_inputs(model, ids))
    return _largest_apart((ours.image, images), (ours.text, texts))


def _largest_apart(*pairs: tuple[Tensor, Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in pairs)


def _unlike_training(model: DualEncoder, processor: Any) -> Iterator[str]:
    """A note where a processor gives other pixels than training, on a picture with transparency."""

    def prepare(image: Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    # Rounding makes one level; more is another way of opening or resizing.
    levels = levels_apart(model.image_spec, prepare)
    if levels <= LEVELS:
        return
    note = (
        f"transformers: its processor's pixels of a transparent picture are {levels:.0f} levels off"
    )
    background = model.image_spec.decoding.background
    if background != ON_WHITE.background:
        note += f"; it puts transparent pixels on white, and training on {background}"
    yield note
