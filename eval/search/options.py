"""The options that `vlp search` and `vlp embed` share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlp.eval.embed import Context
    from vlp.eval.models import Encoder


def arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is run, and where its embeddings are kept."""
    from vlp.eval import narrow

    add = parser.add_argument
    add(
        "--index",
        metavar="DIR",
        help="where the embeddings are kept (default: a folder of ~/.cache/vlp/search)",
    )
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    add(
        "--precision",
        choices=("float32", "bf16"),
        default="float32",
        help="of the forward pass (default: %(default)s)",
    )
    narrow.arguments(parser)
    add("--batch", type=int, help="pictures a forward pass (default: 64, on a GPU 256)")
    add("--workers", type=int, help="threads that decode (default: cores, at most 8)")
    add("--quiet", action="store_true", help="no progress lines")


def encoder(options: argparse.Namespace) -> Encoder:
    """The model that the options name; raises ModelError."""
    import torch

    from vlp.eval import memory, models, narrow
    from vlp.joining import local_device

    memory.keep_freed()
    autocast = torch.bfloat16 if options.precision == "bf16" else None
    narrow.check(options.width)
    loaded = models.load(options.model, local_device(options.device, shared=True), autocast)
    return narrow.narrowed(loaded, options.width)


def context(options: argparse.Namespace, device: object) -> Context:
    """How pictures are embedded; raises ValueError."""
    import torch

    from vlp.eval.embed import Context, usual_batch

    batch = options.batch if options.batch is not None else usual_batch(torch.device(str(device)))
    if batch < 1 or (options.workers is not None and options.workers < 0):
        raise ValueError("--batch must be at least 1, --workers at least 0")
    more = {} if options.workers is None else {"workers": options.workers}
    return Context(batch=batch, progress=not options.quiet, **more)
