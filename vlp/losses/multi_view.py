"""Contrast between augmented views: InfoNCE of the plain pair and of all pairs of strong views.

    L = 1/(1+V)·L_CLIP(x, t) + V/(1+V)·mean over all V² pairs of views (a, c) of L_CLIP^ε(x_a, t_c)

x, t: [b, D] the plain views at the model's scale; x_a, t_c of image_views, text_views [V, b, D],
strongly augmented, from projections of their own, at `view_scale` (default: the same scale), with
label smoothing ε.

Relations:
- V² + 1 times `infonce`

Papers:
- CLIP-rocket (arXiv 2305.08675): `objective: {multi_view: {label_smoothing: 0.1}}`

Needs: image, text, scale, image_views, text_views

Cost: 1 + V² passes over the pairs; O(V·b·D) memory, and both towers on V·b views more

Use: on small data sets, seen for many epochs: the paper finds augmentation of both modalities to
make up for most of what other self-supervised terms gain
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
    """This rank's share of L."""
    n_views = len(inputs.image_views)
    scale = inputs.scale if inputs.view_scale is None else inputs.view_scale
    smoothed = infonce.Options(label_smoothing=options.label_smoothing)

    # Every image view meets every text view.
    view_losses: Tensor | int = 0
    for image in inputs.image_views:
        for text in inputs.text_views:
            views = replace(inputs, image=image, text=text, scale=scale)
            view_losses = view_losses + infonce.term(views, pairs, smoothed)

    # The views weigh V/(1+V), and their mean divides by V².
    plain = infonce.term(inputs, pairs, infonce.Options())
    return (plain + view_losses / n_views) / (1 + n_views)
