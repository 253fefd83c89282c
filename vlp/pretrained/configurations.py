"""transformers' configuration of a model, and what transformers says where it cannot load one.

Code that a folder or repository brings along is never run, nor asked about.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlp.pretrained.folders import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "config.json"  # what a folder of transformers' form holds at least


def configuration(place: str) -> PretrainedConfig:
    """The configuration at a place that `vlp.pretrained.places.locate` gave; ValueError for none,
    and for one with code.
    """
    from transformers import AutoConfig

    # Here, because transformers takes a list for a model without a name.
    file = Path(place) / FILE
    if file.is_file():
        read_json(file)
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # each class of configurations fails at wrong values in its own way
        raise ValueError(reason(error)) from None


def reason(error: Exception) -> str:
    """What transformers says in a line; where it would have code of the folder run, that vlp does
    not.
    """
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return (
            "it needs code that it brings along, which vlp never runs; convert it to a class of "
            "transformers"
        )
    # A KeyError says a name alone.
    if not isinstance(error, (OSError, ValueError)):
        message = f"{type(error).__name__}: {message}"
    return message[:300]
