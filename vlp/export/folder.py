"""One model → one folder that other libraries load: open_clip always, transformers where its models
can say the same.

    open_clip      open_clip_config.json, open_clip_model.safetensors          every model
    transformers   config.json, model.safetensors, processor, tokenizer        CLIPModel or SiglipModel, checked by running it
    sentence-transformers   modules.json                                       whatever transformers loads as CLIPModel
    ONNX           onnx/{image,text}.onnx                                      on request
    README.md      the model card

Several runs make one model of their embeddings one after another, which only vlp loads
(vlp.models.stages).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL.Image import Image
from torch import Tensor, nn

from vlp import checkpoint
from vlp.export import card as _card
from vlp.export import clip_form, siglip_form
from vlp.export import pixels as _pixels
from vlp.files import naming, save_tensors, sync
from vlp.locks import held
from vlp.models import stages
from vlp.models.dual_encoder import DualEncoder, from_description
from vlp.pretrained import references, weight_files
from vlp.types import ON_WHITE

TOLERANCE = (
    1e-5  # largest difference of an embedding's coordinate between a written form and the model
)
LEVELS = (
    1.01  # of 255: largest difference of a pixel between a processor and training, from rounding
)

_BUSY = "Wait until it is done, or name another folder"


class ExportError(ValueError):
    """A model that cannot be written where or as it was asked to be."""


def export(
    model: DualEncoder,
    to: Path | str,
    *,
    results: Sequence[Mapping[str, Any]] = (),
    training: Mapping[str, Any] | None = None,
    step: int | None = None,
    license: str | None = None,
    onnx: bool = False,
    overwrite: bool = False,
    home: Path | None = None,
) -> list[str]:
    """Write `model` to the folder `to`, and say in one line a form what was written, or why it was
    not.

    results: evaluation records ({"task", "metrics", …}) and training: the resolved configuration,
    both for the card. license: an identifier of the Hub, such as apache-2.0. onnx: also write both
    towers as ONNX (needs onnx and onnxscript). home: where the folder will lie in the end, if not
    at `to`. The folder appears complete or not at all; ExportError if it exists and is not empty,
    unless `overwrite`, which keeps every file that no export wrote.
    """
    to = Path(to)
    with held(to, beside=True, advice=_BUSY), naming(to), _appearing(to, overwrite) as folder:
        weights = {
            k: v.detach().float().cpu().contiguous() if v.is_floating_point() else v.cpu()
            for k, v in model.open_clip_state_dict().items()
        }
        notes = _write_open_clip(model, weights, folder, (home or to).resolve())
        reference = from_description(
            references.read_config(folder), weight_files.weights_in(folder)
        ).eval()
        form, found = _write_transformers(reference, weights, folder)
        notes += found
        if onnx:
            from vlp.export.onnx_form import write_onnx

            notes += write_onnx(reference, folder / "onnx", TOLERANCE)
        card = _card.render(
            reference,
            to.name,
            form=form,
            notes=notes,
            results=results,
            training=training,
            step=step,
            license=license,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return notes


def export_run(
    run: Path | str,
    to: Path | str,
    *,
    license: str | None = None,
    onnx: bool = False,
    overwrite: bool = False,
    home: Path | None = None,
) -> list[str]:
    """`export` of a run's newest checkpoint, or of one checkpoint's folder, with the run's results
    and configuration.

    results.json describes a run's last step; an earlier checkpoint is exported without results. Any
    other reference to a model (vlp.pretrained.references) is exported as it is.
    """
    found = references.resolve(run)
    if found.kind != "run":
        return export(
            checkpoint.load_any(found),
            to,
            license=license,
            onnx=onnx,
            overwrite=overwrite,
            home=home,
        )
    path = checkpoint.resolve(found.path)
    model = checkpoint.load_model(path)
    whole = path.parent.parent
    recorded = whole / "results.json"
    newest = checkpoint.newest(whole)
    latest = newest is not None and newest.resolve() == path.resolve()
    results = (
        json.loads(recorded.read_text(encoding="utf-8")) if latest and recorded.exists() else ()
    )
    training = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    step = int(path.name.removeprefix("step_"))
    return export(
        model,
        to,
        results=results,
        training=training,
        step=step,
        license=license,
        onnx=onnx,
        overwrite=overwrite,
        home=home,
    )


def export_stages(
    runs: Sequence[Path | str],
    to: Path | str,
    *,
    license: str | None = None,
    onnx: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Several models as one, the concatenation of their embeddings (vlp.models.stages), each
    written as `export` does.

    A run may also be an export or hf-hub:user/name (the pretrained model that stages start from).
    Only vlp loads the whole. ValueError where one reads other pixels or tokens than the first.
    """
    to, names = Path(to), [f"stage_{i}" for i in range(1, len(runs) + 1)]
    with held(to, beside=True, advice=_BUSY), naming(to), _appearing(to, overwrite) as folder:
        for run, name in zip(runs, names):
            export_run(run, folder / name, license=license, onnx=onnx, home=to / name)
        _write_json(folder / references.STAGES, {"members": names})
        card = _card.render_stages(stages.load(folder), to.name, names, license)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return [
        f"vlp: {references.STAGES}; the embeddings of {len(names)} stages one after another",
        f"open_clip, transformers: no model of theirs joins several pairs of towers; each of {', '.join(names)} loads by itself",
    ]


def _write_open_clip(
    model: DualEncoder, weights: dict[str, Tensor], folder: Path, home: Path
) -> list[str]:
    notes = [f"open_clip: {references.CONFIG}, {weight_files.WEIGHTS}"]
    described = json.loads(
        json.dumps(model.description())
    )  # a copy: what points into this machine is renamed below
    del described["vlp"]["heads"]  # exports embed, and heads do not
    text = described["model_cfg"]["text_cfg"]
    if model.text_spec.tokenizer != "clip":
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(
            model.text_spec.tokenizer, trust_remote_code=False
        ).save_pretrained(folder)
        if Path(text["hf_tokenizer_name"]).is_dir():
            text["hf_tokenizer_name"] = "."  # open_clip takes the folder it loads from
    if "hf_model_name" in text:
        model.text.config.save_pretrained(folder / references.TEXT_TOWER)
        if Path(text["hf_model_name"]).is_dir():
            # transformers, which open_clip asks, takes a path or a repository; `vlp push` writes
            # the latter
            text["hf_model_name"] = str(home / references.TEXT_TOWER)
            notes.append(
                "open_clip: finds the text tower by this folder's path; vlp reads it wherever the folder is moved"
            )
    vision = described["model_cfg"]["vision_cfg"]
    if vision.get("timm_model_name") and vision.get("act_kwargs"):
        notes.append(
            "open_clip: has exact GELU in timm's towers, and this one the tanh form: its images differ slightly there"
        )
    _write_json(folder / references.CONFIG, described)
    _save_weights(weights, folder / weight_files.WEIGHTS)
    return notes


def _write_transformers(
    model: DualEncoder, weights: dict[str, Tensor], folder: Path
) -> tuple[str | None, list[str]]:
    """Write the form that fits; returns the class's name, or None, and notes."""
    refusals = []
    for name, form in (("CLIPModel", clip_form), ("SiglipModel", siglip_form)):
        reasons = form.obstacles(model)
        if reasons:
            refusals.append(f"no {name}, because " + "; ".join(reasons))
            continue
        network = form.network(model, weights)
        difference = _difference(model, network)
        if difference > TOLERANCE:
            refusals.append(
                f"no {name}, because its embeddings differ by {difference:.1e}, more than {TOLERANCE:g}"
            )
            continue
        network.config.architectures = [name]
        network.config.save_pretrained(folder)
        _save_weights(network.state_dict(), folder / "model.safetensors")
        processor = form.processor(model)
        processor.save_pretrained(folder)
        processor.image_processor.save_pretrained(
            folder
        )  # preprocessor_config.json, for transformers 4 and JavaScript
        notes = [f"transformers: {name}, embeddings within {difference:.1e} of the model's"]
        notes += _unlike_training(model, processor.image_processor)
        return name, [*notes, *_companions(model, name, folder)]
    return None, [f"transformers: {refusal}" for refusal in refusals]


def _companions(model: DualEncoder, name: str, folder: Path) -> Iterator[str]:
    """What other libraries need beside transformers' files, and what these cannot say."""
    kind = {"CLIPModel": "CLIPModel", "SiglipModel": "Transformer"}[name]
    modules = [("", kind), ("1_Normalize", "Normalize")]
    listing = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write_json(folder / "modules.json", listing)
    if name == "SiglipModel":
        ways = {"text": "get_text_features", "image": "get_image_features"}
        _write_json(
            folder / "sentence_bert_config.json",
            {
                "transformer_task": "feature-extraction",
                "modality_config": {
                    side: {"method": way, "method_output_name": "pooler_output"}
                    for side, way in ways.items()
                },
                "module_output_name": "sentence_embedding",
                "processing_kwargs": {
                    "text": {"padding": "max_length"}
                },  # the last token is pooled, so there must be as many
            },
        )
    yield "sentence-transformers: modules.json" + (
        " (5.4 or newer)" if name == "SiglipModel" else ""
    )
    if name == "CLIPModel" and model.logit_bias is not None:
        yield "transformers: CLIPModel has no logit bias; cosines, rankings and softmax are the model's, but no sigmoid is"


@torch.no_grad()
def _difference(model: DualEncoder, network: nn.Module) -> float:
    """The largest difference of a coordinate between a transformers model's embeddings and ours."""
    pixels, ids = model.example(4)
    ours, theirs = model(pixels, ids), network(input_ids=ids, pixel_values=pixels)
    return max(
        (ours.image - theirs.image_embeds).abs().max().item(),
        (ours.text - theirs.text_embeds).abs().max().item(),
    )


def _unlike_training(model: DualEncoder, processor: Any) -> Iterator[str]:
    """A note where a processor gives other pixels than training, on a picture with transparency."""

    def prepare(image: Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    levels = _pixels.difference(model.image_spec, prepare)
    if levels <= LEVELS:
        return
    note = (
        f"transformers: its processor's pixels of a transparent picture are {levels:.0f} levels off"
    )
    background = model.image_spec.decoding.background
    if background != ON_WHITE.background:
        note += f"; it puts transparent pixels on white, and training on {background}"
    yield note


@contextmanager
def _appearing(to: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `to` that takes its name once everything in it is on the disk.

    It ends with the list of its files (MANIFEST). Of a folder that it replaces, files that no
    export wrote are carried over.
    """
    if to.is_file() or (to.is_dir() and any(to.iterdir()) and not overwrite):
        kind = "a file" if to.is_file() else "a folder that is not empty"
        raise ExportError(
            f"{to} is {kind}; choose another place"
            + ("" if to.is_file() else " or add --overwrite")
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.parent / f".{to.name}.partial-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted([*references.files_of(temporary), references.MANIFEST])
        _write_json(temporary / references.MANIFEST, {"name": to.name, "files": files})
        _carry_over(to, temporary)
        for path in [*temporary.rglob("*"), temporary]:
            if not path.is_symlink():
                sync(path)

        replaced = to.parent / f".{to.name}.replaced-{os.getpid()}"
        if to.exists():
            os.replace(to, replaced)
        os.replace(temporary, to)
        sync(to.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    """Copy what no export wrote from the folder `old` into `new`; ExportError where this export has
    a file of that name.
    """
    if not old.is_dir():
        return
    foreign = sorted(set(references.files_of(old)) - set(references.exported_files(old)))
    taken = [name for name in foreign if (new / name).exists()]
    if taken:
        raise ExportError(
            f"{old} holds {', '.join(taken[:3])}, which no export wrote and this one would replace; move it away"
        )
    for name in foreign:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(old / name, new / name, follow_symlinks=False)


def _save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    contiguous = {key: value.contiguous() for key, value in weights.items()}
    save_tensors(contiguous, path, {"format": "pt"})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
