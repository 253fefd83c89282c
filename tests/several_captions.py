"""A term over several captions of a sample, for the tests of the field; no part of the system.

L = mean over valid captions (i, k) of e^{−s·x_i·t_ik}
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses import Common, Inputs
from vlp.pairwise import Pairs
from vlp.plugin import KeyedPlugins, Plugin

NEEDS = frozenset({"captions", "captions_valid"})


@dataclass(frozen=True)
class Options:
    sharpness: float = 0.7  # s


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    cosines = (inputs.image.unsqueeze(1) * inputs.captions).sum(-1)
    return pairs.mean((-options.sharpness * cosines).exp(), inputs.captions_valid)


def objective() -> KeyedPlugins:
    """As `objective:` of a configuration would name it, were it a file of vlp/losses."""
    plugin = Plugin("tests", "several_captions", Options(), Common(), "several_captions")
    return KeyedPlugins([plugin])
