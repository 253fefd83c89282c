"""`vlp eval`: a model, tasks, results.json; comparison of results.

The work itself is in vlp.eval.evaluation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.eval.embed import Context
    from vlp.eval.models import Encoder
    from vlp.models.dual_encoder import DualEncoder
    from vlp.plugin import Plugin

HELP = "evaluate a model with the field's protocols, or compare two results"
EXAMPLE = """examples:
  vlp eval runs/demo --task zeroshot --data data/test
  vlp eval ViT-B-32:laion2b_s34b_b79k --task zeroshot --data imagenet/val \\
      classes=imagenet templates=imagenet80
  vlp eval exported/demo --task retrieval --data dataset_coco.json \\
      images=coco/ split=test --out results.json
  vlp eval runs/a --suite suite.yaml --out a.json
      (suite.yaml: {zeroshot: {data: …}, retrieval: {data: …}})
  vlp eval runs/a --suite datacomp --data sets/ --missing skip --out a.json --html a.html
  vlp eval --compare a.json b.json
  vlp eval --blend exported/published runs/tuned --alphas 0,.25,.5,.75,1 --suite suite.yaml \
      --gain zeroshot.acc1 --guard retrieval.image_retrieval_recall@1
  accelerate launch --config_file launch/accelerate/cpu2.yaml -m vlp.cli \\
      eval runs/demo --task zeroshot --data data/test

MODEL: a run, checkpoint or export; RUN@ema, the moving average of a run's weights;
a folder or hf-hub:USER/NAME of open_clip or transformers;
ARCHITECTURE:TAG, or ARCHITECTURE:FILE (also FILE.json:FILE) for weights such as epoch_32.pt.
key=value options of the task follow --task or --data.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    from vlp.eval import narrow, sweep
    from vlp.eval.suites import command
    from vlp.plugin import names

    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="what to evaluate (see below)")
    add("--ema", action="store_true", help="the moving average of a run's weights, as RUN@ema")

    # What is measured.
    tasks = ", ".join(names("vlp.eval.tasks"))
    add("--task", nargs="+", metavar=("NAME", "key=value"), help=f"one of {tasks}")
    data_help = "the task's data; short for data=PATH"
    add("--data", nargs="+", metavar=("PATH", "key=value"), help=data_help)
    command.arguments(parser)
    sweep.arguments(parser)

    # What becomes of it.
    out_help = "write results.json, or with FOLDER/ one file a result; outcomes by unit beside them"
    add("--out", metavar="FILE", help=out_help)
    compare_help = "two results, or folders of them: a table with intervals"
    add("--compare", nargs=2, metavar=("A", "B"), help=compare_help)

    # How it is carried out; nothing here changes a score but --precision and --width.
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    precisions = ("float32", "bf16")
    add("--precision", choices=precisions, default="float32", help="of the forward pass")
    narrow.arguments(parser)
    add("--batch", type=int, default=64, help="images or texts a forward pass (default 64)")
    add("--workers", type=int, help="threads that decode (default: cores, at most 8)")
    cache_help = "where embeddings are kept (default ~/.cache/vlp/embeddings; none: nowhere)"
    add("--cache", metavar="DIR", help=cache_help)
    size_help = "of all that is kept there; what is unused for longest goes (default 20GB)"
    add("--cache-size", metavar="SIZE", help=size_help)
    add("--quiet", action="store_true", help="no progress lines")


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status. Wrong input is a ValueError that helps."""
    if options.compare:
        from vlp.eval.report.comparison import compare

        print(compare(*options.compare))
        return 0

    named = options.model or options.blend
    if not named or not (options.task or options.suite):
        raise ValueError(
            "give MODEL (or --blend A B) and --task NAME --data PATH (or --suite NAME --data ROOT, "
            "or --suite FILE), or --compare A B; see vlp eval --help"
        )
    return _evaluate_command(options)


def _evaluate_command(options: argparse.Namespace) -> int:
    """Evaluate a model or a row of blends on the tasks, print the table, write the results."""
    import torch

    from vlp import dist, joining, plugin
    from vlp.eval import describers, evaluation, memory, models, narrow, sweep
    from vlp.eval.report import records
    from vlp.eval.suites import command
    from vlp.pretrained import references

    # What is mistyped, or could not be written, is found before a model is loaded.
    suite = command.asked_for(options)
    tasks: list[Plugin] = (
        plugin.keyed("vlp.eval.tasks", _tasks(options)) if suite is None else suite.located.tasks
    )
    blends = sweep.asked_for(options, tasks, has_average=suite is not None)
    reference = references.of_average(options.model) if options.ema else options.model
    context = _context(options)
    narrow.check(options.width)
    for name in options.blend or [options.model]:
        references.check(name)
    if reference and any(evaluation.needs_decoder(task) for task in tasks):
        describers.check_reference(reference)
    data = evaluation.read_all(tasks)
    if options.out:
        _check_writable(options.out)

    # Each rank of a machine its own GPU, chosen before they join.
    device = joining.local_device(options.device)
    joining.join(device)
    memory.keep_freed()  # spares a CPU's forward passes nine page faults in ten
    autocast = torch.bfloat16 if options.precision == "bf16" else None

    def scores(encoder: Encoder) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        if dist.is_main() and not options.quiet:
            n_ranks = dist.world_size()
            print(f"{encoder.name} on {device}, {n_ranks} rank(s)", file=sys.stderr, flush=True)
        return evaluation.evaluate(encoder, tasks, context, data)

    def scores_of_blend(
        model: DualEncoder, name: str
    ) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        # Kept by a hash of the blend's own weights, so that no two are mixed up.
        encoder = models.from_model(model, name, device, autocast, keep=True)
        return scores(narrow.narrowed(encoder, options.width))

    if blends is not None:
        sweep.carry_out(blends, scores_of_blend, options.out, suite)
    else:
        encoder = narrow.narrowed(models.load(reference, device, autocast), options.width)
        results, items = scores(encoder)
        if dist.is_main() and suite is not None:
            command.tell(suite, results, items, options)
        elif dist.is_main():
            print(records.table(results))
            if options.out:
                records.put(options.out, results, items)

    # No rank leaves while the first still writes.
    dist.barrier()
    return 0


def _check_writable(out: str) -> None:
    """Raise ValueError unless results can be written there; make the folder."""
    path = Path(out)
    if out.endswith("/"):
        if path.is_file():
            raise ValueError(f"--out {out} asks for a folder, and {path} is a file")
        path.mkdir(parents=True, exist_ok=True)
        return

    if path.is_dir():
        raise ValueError(
            f"--out {out} is a folder; name a file, such as {path / 'results.json'}, or write "
            f"{out}/ for one file a result in it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)


def _tasks(options: argparse.Namespace) -> dict[str, Any]:
    """The tasks as a configuration's eval section has them."""
    from vlp.config import read_yaml

    if options.suite:
        if options.data:
            raise ValueError(f"--suite {options.suite} names the data itself; leave out --data")
        suite, _ = read_yaml(Path(options.suite).read_text(encoding="utf-8"), options.suite)
        return suite.get("eval", suite)

    name, *pairs = options.task
    task_options: dict[str, Any] = {}
    if options.data:
        # --data PATH key=value is --task NAME data=PATH key=value.
        task_options["data"], *more = options.data
        pairs += more
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not of the form key=value")
        task_options[key] = _option_value(value)
    return {name: task_options}


def _option_value(text: str) -> Any:
    """A value of the command line, with the type that YAML gives it."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text  # such as separator=, which YAML cannot read: a text


def _context(options: argparse.Namespace) -> Context:
    """How the command line wants the evaluation carried out."""
    from vlp.caches import bytes_of, cache_folder
    from vlp.eval.embed import Context
    from vlp.eval.pictures import Contents

    if options.batch < 1 or (options.workers is not None and options.workers < 0):
        raise ValueError(
            f"found --batch {options.batch} and --workers {options.workers}; expected a batch of "
            "at least 1 and workers of at least 0"
        )

    cache = None
    if options.cache != "none":
        cache = Path(options.cache) if options.cache else cache_folder() / "embeddings"
        if cache.is_file():
            raise ValueError(f"--cache {cache} is a file; name a folder, or none to keep nothing")

    # What is not given keeps the default of Context.
    more: dict[str, Any] = {} if options.workers is None else {"workers": options.workers}
    contents = Contents(cache / "contents.json" if cache else None)
    if options.cache_size is not None:
        more["cache_bytes"] = bytes_of(options.cache_size)
    return Context(
        batch=options.batch, cache=cache, contents=contents, progress=not options.quiet, **more
    )
