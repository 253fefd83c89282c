"""Our numbers beside those of the libraries of the field, on the same models and the same data.

    python -m tests.eval.parity            run every library that is installed, and compare
    python -m tests.eval.parity --write    also keep its numbers, for the tests and the guide

A part is a module with

    PEER                 the distribution whose own code is run
    theirs(root)         what it says: {figure: number or array}
    ours(root)           the same figures by this project
    declared(root)       [Declared], where the two differ on purpose (may be absent)
    obstacle()           why its peer cannot run here, or None (may be absent)

`root` is a folder that `inputs.build` has filled. A figure agrees where no number of the two is
further apart than `compare.BOUND`. The tests compare ours with the numbers that are kept in
tests/eval/parity.json, so that they need none of the libraries.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from tests.eval.parity import (
    clip_benchmark,
    mteb,
    open_clip,
    open_clip_inputs,
    open_clip_losses,
    open_clip_towers,
    sentence_transformers,
    timm,
)

PARTS: dict[str, ModuleType] = {
    "clip_benchmark": clip_benchmark,
    "open_clip: scores": open_clip,
    "open_clip: towers": open_clip_towers,
    "open_clip: pixels and tokens": open_clip_inputs,
    "open_clip: losses": open_clip_losses,
    "mteb": mteb,
    "sentence-transformers": sentence_transformers,
    "timm": timm,
}
KEPT = Path(__file__).parent.parent / "parity.json"
