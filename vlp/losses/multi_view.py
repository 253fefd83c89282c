"""Contrast between augmented views (CLIP-rocket, arXiv 2305.08675).

    L = 1/(1+A)·L_CLIP(x, t) + A/(1+A)·mean over all A² pairs of views (a, c) of L_CLIP^ε(x_a, t_c)

x, t: [b, D] the plain views at the model's scale; x_a, t_c of image_views, text_views [A, b, D],
strongly augmented, from projections of their own, at `view_scale` (default: the same scale), with
label smoothing ε.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vlp.losses import infonce
from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text", "scale", "image_views", "text_views"})
OPTIONAL = frozenset({"view_scale"})


@dataclass(frozen=True)
class Options:
    label_smoothing: float = 0.1  # ε of the pairs of views

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: found {self.label_smoothing}, expected 0 <= ε < 1")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    n_views = len(inputs.image_views)
    scale = inputs.scale if inputs.view_scale is None else inputs.view_scale
    smoothed = infonce.Options(label_smoothing=options.label_smoothing)
    local = sum(
        infonce.term(replace(inputs, image=image, text=text, scale=scale), pairs, smoothed)
        for image in inputs.image_views
        for text in inputs.text_views
    )
    return (infonce.term(inputs, pairs, infonce.Options()) + local / n_views) / (1 + n_views)
