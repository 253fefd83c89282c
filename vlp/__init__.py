"""vlp: pretraining of image-text dual encoders over an exact, memory-bounded, group-aware pairwise
engine.

Importing this package imports nothing heavy; `vlp.losses`, `vlp.eval` and the other rooms are
imported when they are first asked for. Start reading at README.md, then configs/demo.yaml.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"


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
