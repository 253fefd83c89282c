"""`vlp export`: its options, and what they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vlp.export import averages

if TYPE_CHECKING:  # a parser is made without waiting for torch
    from vlp.export.int8_form import Int8

EXAMPLE = """examples:
  vlp export runs/demo --to exported/demo
  vlp export runs/demo/checkpoints/step_00000156 --to exported/half --license cc-by-4.0
  vlp export runs/demo --ema --to exported/average
  vlp export --average runs/a,runs/b,runs/c --to exported/soup
  vlp export --blend exported/published runs/tuned --alpha 0.5 --to exported/blend
  vlp export runs/mcl1 runs/mcl2 runs/mcl3 --to exported/mcl
  vlp export runs/demo --onnx --int8 --calibrate "data/pairs/*.tar" --to exported/small
  vlp export runs/matryoshka --width 128 --to exported/narrow
  vlp export runs/tuned --form adapters --to exported/adapters
  vlp export runs/large --form checkpoint --to checkpoints/large
  vlp export runs/catlip --form classifier --labels data/named/concepts.tsv --to exported/classifier

Several runs become one model: their embeddings stand one after another. An average is of
weights (vlp/averaging.py).
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a run, a checkpoint, or any model; several: one model of them",
    )
    averages.arguments(parser)
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="folder to write; must not exist or be empty"
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence for the model card: of the Hub's list, or other:NAME",
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="also write both towers as ONNX (needs pip install vlp[hub])",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="of --onnx: both towers in 8 bits as well, and how far they are from float32",
    )
    parser.add_argument(
        "--calibrate",
        metavar="SHARDS",
        help="of --int8: samples by which ranges of activations are fixed, and others that compare "
        "both (without: weights alone have 8 bits beforehand)",
    )
    parser.add_argument(
        "--calibrate-samples",
        type=int,
        metavar="N",
        help="how many fix the ranges, and how many others compare (default 128)",
    )
    parser.add_argument(
        "--width",
        type=int,
        metavar="N",
        help="the first N numbers of the embeddings as a model, as `matryoshka` trains them",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier export; files that no export wrote stay",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bf16"], default="float32", help="of the weights"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="other than trained: positions interpolated",
    )
    parser.add_argument(
        "--form",
        choices=["model", "adapters", "checkpoint", "classifier"],
        default="model",
        help="adapters: those of a run with lora alone, for peft (needs pip install vlp[lora]); "
        "checkpoint: what a run goes on from, in one piece; classifier: image tower and head for "
        "concepts, for timm",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="of --form classifier: concepts.tsv of `vlp data concepts`, which names the classes",
    )


def run(options: argparse.Namespace) -> int:
    """Write what is asked for, and say what was written."""
    if options.labels is not None and options.form != "classifier":
        raise ValueError("--labels belongs to --form classifier; add it, or leave --labels out")
    if options.form != "model":
        print("\n".join(_export_part(options)))
        return 0

    from vlp.export.folder import export_average, export_concatenated, export_run

    members = averages.asked_for(options)
    settings = {
        "license": options.license,
        "onnx": options.onnx,
        "overwrite": options.overwrite,
        "dtype": options.dtype,
        "image_size": options.image_size,
        "width": options.width,
        "int8": _int8(options),
    }
    runs = averages.runs(options.runs, options.ema)
    if members is not None:
        written = export_average(members, options.to, **settings)
    elif len(runs) > 1:
        written = export_concatenated(runs, options.to, **settings)
    else:
        written = export_run(runs[0], options.to, **settings)
    print("\n".join(written))
    return 0


def _int8(options: argparse.Namespace) -> Int8 | None:
    """What is asked for of 8 bits; None: nothing. ValueError for options that lack another one."""
    from vlp.export.int8_form import N_SAMPLES, Int8

    n_samples = options.calibrate_samples
    if not options.int8 and options.calibrate is not None:
        raise ValueError("--calibrate belongs to --onnx --int8; add them, or leave it out")
    if options.calibrate is None and n_samples is not None:
        raise ValueError("--calibrate-samples belongs to --calibrate SHARDS; add it")
    if not options.int8:
        return None
    return Int8(options.calibrate, N_SAMPLES if n_samples is None else n_samples)


def _export_part(options: argparse.Namespace) -> list[str]:
    """`vlp export RUN --form adapters | checkpoint | classifier`; ValueError for options of a whole
    model.
    """
    from vlp.export.adapters import write_adapters
    from vlp.export.checkpoints import write_checkpoint
    from vlp.export.classifier_form import write_classifier

    is_classifier = options.form == "classifier"
    of_models = {
        "--average": options.average,
        "--blend": options.blend,
        "--ema": options.ema and not is_classifier,
        "--onnx": options.onnx,
        "--image-size": options.image_size is not None,
        "--width": options.width is not None,
        "--int8": options.int8,
        "--calibrate": options.calibrate is not None,
        "--calibrate-samples": options.calibrate_samples is not None,
        "--dtype": options.dtype != "float32",
    }
    given = [option for option, value in of_models.items() if value]
    if given or len(options.runs) != 1:
        raise ValueError(
            f"--form {options.form} takes one RUN and no option of a whole model; found "
            f"{len(options.runs)} and {', '.join(given) or 'none'}"
        )
    if options.form != "adapters" and options.license is not None:
        raise ValueError(
            f"--license is of a model's card, and a {options.form} has none; leave it out"
        )
    if is_classifier:
        [run] = averages.runs(options.runs, options.ema)
        return write_classifier(run, options.to, labels=options.labels, overwrite=options.overwrite)
    if options.form == "checkpoint":
        return write_checkpoint(options.runs[0], options.to, overwrite=options.overwrite)
    return write_adapters(
        options.runs[0], options.to, license=options.license, overwrite=options.overwrite
    )
