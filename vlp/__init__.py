"""vlp: pretraining of image-text dual encoders over an exact, memory-bounded, group-aware pairwise
engine.

Importing this package imports nothing heavy; `vlp.losses`, `vlp.eval` and the other rooms are
imported when they are first asked for. Start reading at README.md, then configs/demo.yaml.
"""

import importlib
from types import ModuleType
from typing import Any, Literal

__version__ = "0.1.0"


def load(
    ref: str, *, device: str = "auto", precision: Literal["float32", "bf16"] = "float32"
) -> Any:
    """A dual encoder to embed images and texts with: a `vlp.eval.inference.Model`.

    ref: a run, a checkpoint, an export, a folder or name on the Hub, `ARCHITECTURE:TAG`; the list
    is in docs/models.md. `.images([…])` and `.texts([…])` return unit rows [n, D].
    """
    # By name, as below: the rooms import this package, so it must not import them.
    inference = importlib.import_module("vlp.eval.inference")
    return inference.load(ref, device=device, precision=precision)


def __getattr__(name: str) -> ModuleType:
    """The public module `vlp.NAME`."""
    module = f"{__name__}.{name}"
    try:
        if not name.startswith("_"):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # a package that the module needs
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
