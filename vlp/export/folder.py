"""One model → one folder that other libraries load: open_clip always, transformers where its models
can say the same.

    open_clip               open_clip_config.json,          every model
                            open_clip_model.safetensors
    transformers            config.json, model.safetensors, CLIPModel or SiglipModel, checked by
                            processor, tokenizer            running it
    sentence-transformers   modules.json                    whatever transformers loads
    ONNX                    onnx/{image,text}.onnx          on request
    README.md               the model card

Several runs make one model of their embeddings one after another, which only vlp loads
(vlp.models.concatenated).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlp import averaging, checkpoint
from vlp.export import int8_form, licenses, onnx_form, variants
from vlp.export.card import own_scale, render, render_concatenated
from vlp.export.forms import TOLERANCE, write_open_clip, write_transformers
from vlp.export.int8_form import Int8
from vlp.export.place import ExportError, appearing, check_free, write_json
from vlp.files import naming
from vlp.locks import held
from vlp.models import language
from vlp.models.build import from_description
from vlp.models.dual_encoder import DualEncoder
from vlp.models.load import load_concatenated
from vlp.pretrained import references, weight_files
from vlp.pretrained.folders import read_json
from vlp.pretrained.runs import AVERAGED

_OF_AVERAGE = "The weights are the moving average of those in training (`teacher.ema` below)."
_BUSY = "Wait until it is done, or name another folder"


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
    dtype: str = "float32",
    image_size: int | None = None,
    width: int | None = None,
    int8: Int8 | None = None,
    home: Path | None = None,
    provenance: str = "",
    origin: str | None = None,
) -> list[str]:
    """Write `model` to the folder `to`, and say in one line a form what was written, or why it was
    not.

    results: evaluation records ({"task", "metrics", …}) and training: the resolved configuration,
    both for the card. license: an identifier of the Hub, such as apache-2.0, or the name of
    another. onnx: also write both towers as ONNX (needs onnx and onnxscript). dtype: of the stored
    weights, float32, float16 or bf16 (ONNX computes in float32, with their values). image_size:
    pixels, square, other than the model's. width: the first so many numbers of its embeddings, as a
    model of its own. int8: also write both ONNX files in 8 bits. home: where the folder will lie
    in the end, if not at `to`. provenance: how the model came about, in the card's words, if not by
    training; origin: a sentence on weights that are an average. The folder appears complete or not
    at all; ExportError if it exists and is not empty, unless `overwrite`, which keeps every file
    that no export wrote.
    """
    check(
        to,
        license=license,
        onnx=onnx,
        overwrite=overwrite,
        dtype=dtype,
        image_size=image_size,
        width=width,
        int8=int8,
    )
    to, stored = Path(to), variants.known(dtype)
    if onnx and language.is_described(model.open_clip_config):
        raise ExportError(
            "ONNX has no form for a language model as text tower; leave out --onnx. vlp loads the "
            "folder, and vlp eval and the data tools run it"
        )
    trained_at = model.image_spec.size
    if image_size is not None:
        model = variants.resized(model, image_size)
    trained_width = model.embed_dim
    if width is not None:
        model = variants.narrowed(model, width)
    if model.image_spec.size != trained_at or model.embed_dim != trained_width:
        results = ()  # they are the scores of another size
    if not provenance:
        provenance = "exported by vlp" if training is None else "trained with vlp"

    # Two exports to one place would mix their files.
    with held(to, beside=True, advice=_BUSY), naming(to), appearing(to, overwrite) as folder:
        weights = {
            name: value.detach().float().cpu().contiguous()
            if value.is_floating_point()
            else value.cpu()
            for name, value in model.open_clip_state_dict().items()
        }
        weights = variants.rounded(weights, stored)
        own = None if training is None else own_scale(training)
        notes = write_open_clip(model, weights, folder, (home or to).resolve(), own)

        # The other forms are compared with what was just written, not with the model in memory: a
        # fault of the first form would otherwise hide.
        description, file = references.read_config(folder), weight_files.weights_in(folder)
        reference = from_description(description, file).eval()
        form, transformers_notes = write_transformers(reference, weights, folder)
        notes += transformers_notes
        # Samples before the towers are traced, which takes longer than to find a damaged one.
        given = None if int8 is None else int8_form.read(reference, int8)
        if onnx:
            notes += onnx_form.write_onnx(reference, folder / "onnx", TOLERANCE)
        if given is not None:
            notes += int8_form.write_int8(folder / "onnx", given)
        notes += variants.note(model, reference, stored)
        if model.image_spec.size != trained_at:
            height, width = trained_at
            notes.append(
                f"weights: trained on pictures of {height}×{width} pixels, positions interpolated; "
                "not evaluated at this size"
            )
        if model.embed_dim != trained_width:
            notes.append(
                f"weights: embeddings are the first {model.embed_dim} of {trained_width} numbers; "
                "not evaluated at this width"
            )
        variants.narrow(folder, stored)

        card = render(
            reference,
            to.name,
            form=form,
            notes=notes,
            results=results,
            training=training,
            step=step,
            license=license,
            provenance=provenance,
            origin=origin,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return notes


def check(
    to: Path | str,
    *,
    license: str | None = None,
    onnx: bool = False,
    overwrite: bool = False,
    dtype: str = "float32",
    image_size: int | None = None,
    width: int | None = None,
    int8: Int8 | None = None,
) -> None:
    """Raise ValueError for settings of `export` that no model can be written by, before one is
    read.
    """
    variants.known(dtype)
    licenses.metadata(license)
    if image_size is not None and image_size < 1:
        raise ExportError(f"image_size is {image_size}; expected pixels, at least 1")
    if width is not None and width < 1:
        raise ExportError(f"width is {width}; expected numbers of an embedding, at least 1")
    if onnx:
        onnx_form.check_installed()
    if int8 is not None:
        int8_form.check(int8, onnx)
    check_free(Path(to), overwrite)


def export_run(
    run: Path | str,
    to: Path | str,
    *,
    license: str | None = None,
    onnx: bool = False,
    overwrite: bool = False,
    dtype: str = "float32",
    image_size: int | None = None,
    width: int | None = None,
    int8: Int8 | None = None,
    home: Path | None = None,
) -> list[str]:
    """`export` of a run's newest checkpoint, or of one checkpoint's folder, with the run's results
    and configuration.

    results.json describes a run's last step; an earlier checkpoint is exported without results. Any
    other reference to a model (vlp.pretrained.references) is exported as it is.
    """
    settings: dict[str, Any] = {
        "license": license,
        "onnx": onnx,
        "overwrite": overwrite,
        "dtype": dtype,
        "image_size": image_size,
        "width": width,
        "int8": int8,
    }
    check(to, **settings)
    reference = references.resolve(run)
    about: dict[str, Any]
    if reference.kind != "run":
        loaded = checkpoint.load_any(reference)
        if not isinstance(loaded, DualEncoder):
            raise ExportError(f"{run} holds several models as one already; copy the folder")
        name = averaging.card_name(reference.text)
        model, about = loaded, {"provenance": f"imported by vlp from `{name}`"}
    else:
        path = checkpoint.resolve(reference.path)
        model = checkpoint.load_model(path, reference.averaged)
        about = _record(path, reference.averaged)

    return export(model, to, home=home, **about, **settings)


def export_average(members: averaging.Members, to: Path | str, **settings: Any) -> list[str]:
    """`export` of an average of several models' weights (vlp.averaging), with the settings of
    `check`.
    """
    check(to, **settings)
    model = averaging.average(members.references, members.weights)
    about: dict[str, Any] = {"provenance": "averaged by vlp", "origin": members.sentence()}
    return export(model, to, **about, **settings)


_SCORES_ADVICE = "evaluate the run again, or delete the file to export it without scores"


def _read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a run's results.json; ValueError where a card cannot be made of them."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_SCORES_ADVICE}") from None
    # As `vlp eval --out` writes them; training writes the list alone.
    if isinstance(records, dict):
        records = records.get("results")
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise ValueError(
            f"{path} is damaged: expected a list of records with task and metrics; {_SCORES_ADVICE}"
        )
    return records


def _is_record(record: Any) -> bool:
    """Whether a value has what a model card reads of a record."""
    if not isinstance(record, dict) or not isinstance(record.get("task"), str):
        return False
    sections = [record.get(name, {}) for name in ("protocol", "intervals_95", "chance")]
    return all(isinstance(section, dict) for section in (record.get("metrics"), *sections))


def _record(path: Path, averaged: bool) -> dict[str, Any]:
    """What a checkpoint's run says of its weights, or of their moving average: results,
    configuration, step, as `export` takes them.
    """
    run = path.parent.parent
    # Results are those of the last step: an older checkpoint must not bear them.
    scores = run / "results.json"
    newest = checkpoint.newest(run)
    latest = newest is not None and newest.resolve() == path.resolve()
    if latest and scores.exists():
        # Those of the other weights are another model's.
        results = [
            record
            for record in _read_results(scores)
            if str(record.get("label", "")).startswith(AVERAGED) == averaged
        ]
    else:
        results = []

    return {
        "results": results,
        "training": yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")),
        "step": _step_of(path),
        "origin": _OF_AVERAGE if averaged else None,
    }


def _step_of(path: Path) -> int | None:
    """How many steps a checkpoint has behind it; None where it does not say."""
    number = path.name.removeprefix("step_")
    # One in a piece (`--form checkpoint`) is called as its owner likes.
    return int(number) if number.isdecimal() else read_json(path / "state.json").get("step")


def export_concatenated(
    runs: Sequence[Path | str],
    to: Path | str,
    *,
    license: str | None = None,
    onnx: bool = False,
    overwrite: bool = False,
    dtype: str = "float32",
    image_size: int | None = None,
    width: int | None = None,
    int8: Int8 | None = None,
) -> list[str]:
    """Several models as one, the concatenation of their embeddings (vlp.models.concatenated), each
    written as `export` does.

    A run may also be an export or hf-hub:user/name (the pretrained model that stages start from).
    Only vlp loads the whole. ValueError where one reads other pixels or tokens than the first.
    """
    settings: dict[str, Any] = {
        "license": license,
        "onnx": onnx,
        "dtype": dtype,
        "image_size": image_size,
        "int8": int8,
    }
    if width is not None:
        raise ExportError(
            f"--width {width} is of one model's embeddings, and these are {len(runs)} models'; "
            "leave it out, or export each by itself"
        )
    check(to, overwrite=overwrite, **settings)
    to, names = Path(to), [f"stage_{i}" for i in range(1, len(runs) + 1)]
    with held(to, beside=True, advice=_BUSY), naming(to), appearing(to, overwrite) as folder:
        for run, name in zip(runs, names):
            export_run(run, folder / name, home=to / name, **settings)
        write_json(folder / references.CONCATENATED, {"members": names})
        card = render_concatenated(load_concatenated(folder), to.name, names, license)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return [
        f"vlp: {references.CONCATENATED}; the embeddings of {len(names)} models one after another",
        "open_clip, transformers: no model of theirs joins several pairs of towers; each of "
        f"{', '.join(names)} loads by itself",
    ]
