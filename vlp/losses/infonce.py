"""InfoNCE: cross-entropy of every pair against the other texts, and against the other images.

    L = (1/B) Σ_i [ λ·CE(z_i·, i) + (1−λ)·CE(z_·i, i) ],      z_ij = scale·x_i·t_j

x, t: [b, D] images and texts; the first cross-entropy is over the n texts of a row, the second over
the n images of a column. With label smoothing ε the target is (1−ε)·δ_ij + ε/n. Uninformative
scores give log n.

With `positives` the row has several, P_i = {j : label_j = label_i}; `ignore`, `hardest` and
`within` say which others are its negatives N_i. With z_ij of either direction, and `form`

    out         (1/|P_i|) Σ_{p∈P_i} −log [ e^{z_ip} / Σ_{j∈P_i∪N_i} e^{z_ij} ]
    in          −log [ Σ_{p∈P_i} e^{z_ip} / Σ_{j∈P_i∪N_i} e^{z_ij} ]
    decoupled   (1/|P_i|) Σ_{p∈P_i} −log [ e^{z_ip} / (e^{z_ip} + Σ_{j∈N_i} e^{z_ij}) ]

With `targets` and a teacher's unit rows u, v: [b, D'], a_ij = u_i·u_j within a modality or u_i·v_j
across, the row's loss is −Σ_j q_ij log softmax_j(z_ij) where `by` is

    softmax     q_ij = (1−α)·δ_ij + α·softmax_j(a_ij/τ)
    distance    q_ij ∝ w_ij, w_ii = 1, w_ij = 2β·σ(−γ·(1 − a_ij))

or, by `kernel`, log [ 1 + (n−1) Σ_{j≠i} w_ij e^{z_ij − z_ii} ] with w = (K + λI)⁻¹K, K_ij = a_ij,
and weights under 10⁻⁶ left out.

Relations:
- `decoupled` leaves the positive out of the denominator
- `hn_nce` with alpha 1 and beta 0, and `ranked` with power 0, equal this one
- the three forms are one where every pair has a label of its own; where all have one label, `in`
  and `decoupled` are 0
- `ignore.margin` of 2 or more, `ignore.teacher.above` over 1 and `hardest` n − 1 leave the loss as
  it is
- `targets` by softmax with α = 0, or by distance with β = 0, leave the loss as it is; with α = 1
  and `of: cross` it is `distill` at teacher_scale 1/τ
- with a topology of groups, candidates come from the group of ranks instead of all (M2-Encoder,
  arXiv 2401.15896)

Papers:
- CLIP (arXiv 2103.00020): `objective: {infonce: {}}`
- ALIGN (arXiv 2102.05918): `objective: {infonce: {label_smoothing: 0.1}}`
- ConVIRT (arXiv 2010.00747): `objective: {infonce: {image_weight: 0.75}}`
- UniCL (arXiv 2204.03610): `objective: {infonce: {positives: label}}`
- SupCon (arXiv 2004.11362) of two modalities is the same
- DEXML (arXiv 2310.10636): `objective: {infonce: {positives: label, form: decoupled}}`
- MIL-NCE (arXiv 1912.06430): `objective: {infonce: {positives: label, form: in}}`
- DCLR (arXiv 2205.00656), its mask: `objective: {infonce: {ignore: {teacher: {above: 0.9}}}}`
- UniME (arXiv 2504.17432), its second stage:
  `objective: {infonce: {ignore: {margin: 0.1}, hardest: 8, image_weight: 1}}`
- UNPG (arXiv 2203.11593): `objective: {infonce: {within: both}}`
- SoftCLIP (arXiv 2303.17561), softened targets: `objective: {infonce: {targets: {by: softmax}}}`
- SoftCLT (arXiv 2312.16424), of whole samples; the form of its weights could not be confirmed:
  `objective: {infonce: {targets: {by: distance}}}`
- CCL-K (arXiv 2202.05458), hard negatives: `objective: {infonce: {targets: {by: kernel}}}`

Needs: image, text, scale; with positives and ignore.same_label label, with ignore.cluster cluster,
with ignore.teacher and targets teacher_text, teacher_image or both

Cost: one pass over the pairs for both directions, 8·b·n·D FLOPs forward and backward; O(b·D)
memory. With positives or masks the general path; `decoupled`, `within` (a modality) and `hardest`
(both directions) take a pass more, and `hardest` O(n·D) memory; targets take two passes with up to
three score matrices

Use: the default. It wants many candidates a row: a large batch, or several ranks. Where captions
repeat within a batch, `positives: caption` keeps copies from being negatives of one another
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses import _masked, _soft_targets
from vlp.losses._candidate_options import Formed
from vlp.losses._inputs import Inputs
from vlp.losses._soft_targets import Targets
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text", "scale"})


@dataclass(frozen=True)
class Options(Formed):
    label_smoothing: float = 0.0  # ε in [0, 1)
    image_weight: float = 0.5  # λ, the weight of the direction anchored at images; texts get 1 − λ
    # soft targets from a teacher's stored rows, in place of the pair alone; null: none
    targets: Targets | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: found {self.label_smoothing}, expected 0 <= ε < 1")
        if not 0 <= self.image_weight <= 1:
            raise ValueError(f"image_weight: found {self.image_weight}, expected 0 <= λ <= 1")
        if self.label_smoothing and not self.plain:
            raise ValueError(
                "label_smoothing: a smoothed target gives a share to every candidate, but "
                "positives, ignore, hardest and within change what they are; drop one of the two"
            )
        if self.targets is not None and (self.label_smoothing or not self.plain):
            raise ValueError(
                "targets: a soft target is over all candidates; drop label_smoothing, positives, "
                "ignore, hardest and within, or targets"
            )


def needs(options: Options) -> frozenset[str]:
    of_targets = frozenset() if options.targets is None else options.targets.needs()
    return NEEDS | options.needs() | of_targets


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    if options.targets is not None:
        by_image, by_text = _soft_targets.of_pairs(inputs, pairs, options.targets)
    else:
        losses = _plain if options.plain else _masked.of_pairs
        by_image, by_text = losses(inputs, pairs, options)

    # Means over rows: each rank returns that of its own.
    λ = options.image_weight
    return pairs.mean(λ * by_image + (1 - λ) * by_text)


def _plain(inputs: Inputs, pairs: Pairs, options: Options) -> tuple[Tensor, Tensor]:
    """Cross-entropies of images [b] and of texts [b] over all candidates: the fused reduction."""
    row_others, column_others, positive = pairs.logsumexp(inputs.image, inputs.text, inputs.scale)

    # CE = softplus(LSE_{j≠i} z_ij − z_ii), exact also where the pair is well aligned.
    rows, columns = softplus(row_others - positive), softplus(column_others - positive)
    if not options.label_smoothing:
        return rows, columns

    # CE with a smoothed target is CE + ε·(z_ii − mean_j z_ij).
    n, ε = pairs.candidates(len(rows)), options.label_smoothing
    row_sums, column_sums = pairs.linear_sums(inputs.image, inputs.text, inputs.scale)
    return rows + ε * (positive - row_sums / n), columns + ε * (positive - column_sums / n)
