"""Distillation from a teacher: similarities, embeddings, the order of captions, or concepts.

`form` says what is taught. With images x and texts t: [b, D], a teacher's u and v: [b, D'] of any
width, z_ij = scale·x_i·t_j, z^T_ij = teacher_scale·u_i·v_j, and a linear map P to the teacher's
width for each modality (model.heads.teacher; without one P is the identity):

similarity   the teacher's similarities of a whole row and column
                 L = ½ Σ_directions mean_i −Σ_j softmax_j(z^T_ij) · log softmax_j(z_ij)
features     its embeddings
                 L = mean_i ( ‖P x_i − u_i‖² + ‖P' t_i − v_i‖² )
             with `norm: l1` sums of absolute differences; with `sides: image` the first part alone
interactive  its embeddings, as what a row is contrasted with, at a scale' of its own, learned by
             that head (without: scale); P x and P' t divided by their norm; `queue` adds its
             embeddings of earlier steps
                 L = ½ [ CE(scale'·P x_i·v_j, i) + CE(scale'·P' t_i·u_j, i) ]
cross        its similarities, in those rows
                 L = ½ mean_i [ KL(softmax_j(z^T_ij) ‖ softmax_j(scale'·P x_i·v_j)) + the same of
                 texts ]
ranking      the order in which it puts hard captions n: [b, K, D], by ListMLE over the valid ones
                 L = mean_i −Σ_r log [ e^{z(x_i, n_(r))} / Σ_{q≥r} e^{z(x_i, n_(q))} ]
             with n_(1), n_(2), … the captions by falling teacher_scores: [b, K], up to the first
             that scores below the pair's own less `delta`; with `candidates: batch` the captions
             are the `hardest` others of the batch (and the queue) for each image, and for each
             text the images, scored by a cross-encoder, ½ of either; or, with `divergence`, of the
             student's distribution Q from the teacher's P over the text and its captions,
             c_i0 = score_i, c_ik = teacher_scores_ik, at one temperature τ
                 L = mean_i KL(P_i‖Q_i), symmetric the mean with KL(Q_i‖P_i)
                 P_i = softmax_k(c_ik/τ), Q_i = softmax over {x_i·t_i/τ, x_i·n_ik/τ}
margin       by how much a text is truer than hard captions, over the valid (i, k)
                 L = mean ( (x_i·t_i − x_i·n_ik) − γ (score_i − teacher_scores_ik) )²
concepts     the concepts that it sees in an image, by an auxiliary head on the image tower
                 L = mean_i −Σ_c q_ic · log softmax(concept_logits_i)_c
             with q_i = concept_targets_i / Σ_c concept_targets_ic, both [b, M]; or, with
             `loss: bce`, each concept by itself, y_ic = min(1, concept_targets_ic)
                 L = mean_i Σ_c −y_ic log σ(z_ic) − (1 − y_ic) log(1 − σ(z_ic)), z concept_logits
             Targets may also be [b, N, 2], the number and weight of the concepts of a sample that
             are not zero

`focus` f weighs the rows of the first four by (1 − P_i)^f of the student, divided by the mean
weight: what it is sure of counts less. Several teachers, u and v: [b, T, D'], give the mean of
their losses. Ranking of captions, margin and concepts are sample terms: over samples with a valid
caption, and with a target that is not zero; invalid captions have no influence. Nothing of the
teacher has a gradient.

Relations:
- similarity is `infonce` where the teacher is sure of every pair
- interactive, where the teacher is the student and scale' is scale, has the value of `infonce`
- features, margin and cross are 0 where student and teacher are one
- `focus` 0 leaves the loss as it is; a ranking of fewer than two captions is 0
- `self_distillation` keeps embeddings near the model's own moving average

Papers:
- MobileCLIP (arXiv 2311.17049) and TinyCLIP (arXiv 2309.12314), similarity:
  `objective: {infonce: {}, distill: {form: similarity}}`
- UniME (arXiv 2504.17432), its first stage, of pairs of texts (data.pairs: text); its temperatures
  could not be confirmed: `objective: {distill: {}}`
- CLIP-KD (arXiv 2307.12732), whose weight of 2,000 on a mean over B·D is 3.9 here at D = 512:
  `objective: {infonce: {}, distill: [{form: features, weight: 3.9}, {form: interactive}, {}]}`
- EdgeVL (arXiv 2403.04908), its first stage, whose mean over B·D is 1/D of this:
  `objective: {distill: {form: features, norm: l1, sides: image}}`
- CPRD (arXiv 2407.07479), ranking of the batch, judged in every step (teacher.cross_encoder):
  `objective: {infonce: {}, distill: {form: ranking, candidates: batch, delta: 0.1}}`
- DCD (arXiv 2207.01426) weighs by difficulty; the form of its weights could not be confirmed:
  `objective: {infonce: {}, distill: {focus: 1}}`
- UniME-V2 (arXiv 2510.13515), scores of a judge:
  `objective: {distill: {form: ranking, divergence: symmetric, temperature: 0.01}}`
- U-MARVEL (arXiv 2507.14902), scores of a re-ranker, at a learned temperature:
  `objective: {distill: {form: ranking, divergence: forward}}`
- DiHT (arXiv 2301.02280), concepts: `objective: {hn_nce: {}, distill: {form: concepts}}`
- CatLIP (arXiv 2404.15653), concepts that captions name (`vlp data concepts`), no texts:
  `objective: {distill: {form: concepts, loss: bce}}`

Needs: image, text, scale, teacher_image, teacher_text, teacher_scale; with `queue`
queue_teacher_image and queue_teacher_text; ranking and margin instead image, scale, negatives,
negatives_valid and teacher_scores, with a divergence, a delta or margin also text and score;
`candidates: batch` instead of those the five fields of the cross-encoder; concepts instead
concept_logits and concept_targets

Cost: similarity three passes over pairs, student, teacher and both together, cross six and
interactive two over one direction, O(b·(D + D')) memory, `focus` one more; the others meet no other
rows, but for R·b pairs of a direction through a cross-encoder (R is `hardest`), and O(n·D) memory,
O(n·H·W) in `vlp train`, where a rank gathers the pictures of its group

Use: to train a small model from a large one; the order to try is features, interactive, similarity.
Stored embeddings (`vlp data embed`) save the teacher's forward pass
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlp.losses import (
    _distill_candidates,
    _distill_captions,
    _distill_concepts,
    _distill_pairs,
)
from vlp.losses._distill_candidates import Asked as Asked
from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

OF_PAIRS = frozenset({"image", "text", "scale", "teacher_image", "teacher_text", "teacher_scale"})
OF_CAPTIONS = frozenset({"image", "scale", "negatives", "negatives_valid", "teacher_scores"})
OF_CANDIDATES = frozenset(
    {"candidate_texts", "candidate_text_scores", "candidate_images", "candidate_image_scores"}
)
FORMS = {
    "similarity": OF_PAIRS,
    "features": OF_PAIRS,
    "interactive": OF_PAIRS,
    "cross": OF_PAIRS,
    "ranking": OF_CAPTIONS,
    "margin": OF_CAPTIONS | {"text", "score"},
    "concepts": frozenset({"concept_logits", "concept_targets"}),
}
MIN_HARDEST = 2  # a ranking of one candidate says nothing
hardest = _distill_candidates.hardest


@dataclass(frozen=True)
class Options:
    # what is taught: similarities of a row, embeddings, embeddings as candidates, similarities in
    # those, the order of captions, the margins over them, concepts
    form: Literal[
        "similarity", "features", "interactive", "cross", "ranking", "margin", "concepts"
    ] = "similarity"
    # f, how much rows of which the student is sure count less; 0: all alike
    focus: float = 0.0
    # interactive: the teacher's rows of earlier steps are candidates too; ranking of the batch:
    # the moving average's (teacher.queue)
    queue: bool = False
    # ranking: of the sample's hard captions, or of the others of the batch, which a cross-encoder
    # judges in every step (teacher.cross_encoder)
    candidates: Literal["captions", "batch"] = "captions"
    # R, how many others of the batch are judged for each image, and as many for each text: those
    # that the student finds hardest
    hardest: int = 8
    # δ, by how much a candidate may score below the pair and still be ranked; null: all are
    delta: float | None = None
    norm: Literal["squared", "l1"] = "squared"  # features: ‖·‖², or Σ of absolute differences
    sides: Literal["both", "image", "text"] = "both"  # features: whose embeddings are taught
    gamma: float = 1.0  # margin: γ, the student's cosine for a unit of the teacher's score
    # ranking: not the order, but the distribution over the text and its hard captions: forward
    # KL(P‖Q) of teacher P and student Q, or the mean of both directions
    divergence: Literal["none", "forward", "symmetric"] = "none"
    # of both distributions of a divergence (UniME-V2: .01); null: the model's own, 1/scale
    temperature: float | None = None
    # concepts: one distribution over all (ce), or each by itself (bce)
    loss: Literal["ce", "bce"] = "ce"

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_form()

    def _check_numbers(self) -> None:
        if self.focus < 0:
            raise ValueError(f"focus: found {self.focus}, expected a number >= 0")
        if self.delta is not None and self.delta < 0:
            raise ValueError(f"delta: found {self.delta}, expected a number >= 0, or null")
        if self.hardest < MIN_HARDEST:
            raise ValueError(
                f"hardest: found {self.hardest}, expected at least {MIN_HARDEST}: of fewer there "
                "is no order to learn"
            )
        if self.gamma <= 0:
            raise ValueError(f"gamma: found {self.gamma}, expected a number > 0")
        if self.temperature is not None and self.divergence == "none":
            raise ValueError("temperature: belongs to a divergence; name forward or symmetric")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number > 0")

    def _check_form(self) -> None:
        """Refuse options of another form, which would be ignored in silence."""
        of_captions = self.form == "ranking" and self.candidates == "captions"
        of_batch = self.form == "ranking" and self.candidates == "batch"
        belongs = {
            "divergence": (self.divergence != "none", of_captions, "form: ranking"),
            "candidates: batch": (self.candidates == "batch", of_batch, "form: ranking"),
            "hardest": (
                self.hardest != Options.hardest,
                of_batch,
                "a ranking of candidates: batch",
            ),
            "delta": (self.delta is not None, self.form == "ranking", "form: ranking"),
            "norm": (self.norm != "squared", self.form == "features", "form: features"),
            "sides": (self.sides != "both", self.form == "features", "form: features"),
            "gamma": (self.gamma != 1, self.form == "margin", "form: margin"),
            "loss": (self.loss != "ce", self.form == "concepts", "form: concepts"),
            "focus": (
                self.focus > 0,
                self.form in _distill_pairs.FORMS,
                f"form: {', '.join(_distill_pairs.FORMS)}",
            ),
            "queue": (
                self.queue,
                self.form == "interactive" or of_batch,
                "form: interactive, or a ranking of candidates: batch",
            ),
        }
        for key, (is_set, fits, where) in belongs.items():
            if is_set and not fits:
                raise ValueError(
                    f"{key}: belongs to {where}, found form: {self.form} of candidates: "
                    f"{self.candidates}; drop one of them"
                )
        if self.divergence != "none" and self.delta is not None:
            raise ValueError("delta: a divergence is over all captions; drop one of them")


def label(options: Options) -> str:
    return "distill" if options.form == "similarity" else f"distill.{options.form}"


def needs(options: Options) -> frozenset[str]:
    if options.form == "ranking" and options.candidates == "batch":
        of_queue = {"queue_image", "queue_text"} if options.queue else set()
        return OF_CANDIDATES | {"image", "text", "scale", "pair_score"} | of_queue

    needed = FORMS[options.form]
    # A distribution has a place for the text, whose score the data give.
    if options.divergence != "none":
        needed |= {"text", "score"}
    if options.delta is not None:
        needed |= {"score"}
    if options.queue:
        needed |= {"queue_teacher_image", "queue_teacher_text"}
    return needed


def asks(options: Options) -> Asked | None:
    """What a cross-encoder has to judge in a step; None: nothing of the batch."""
    of_batch = options.form == "ranking" and options.candidates == "batch"
    return Asked(options.hardest, options.queue) if of_batch else None


def optional(options: Options) -> frozenset[str]:
    projected = frozenset({"projected_image", "projected_text"})
    with_scale = projected | {"interactive_scale"}
    return {"features": projected, "interactive": with_scale, "cross": with_scale}.get(
        options.form, frozenset()
    )


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    if options.form in _distill_pairs.FORMS:
        return _distill_pairs.over_pairs(
            inputs, pairs, options.form, options.focus, options.norm, options.sides
        )

    if options.form == "concepts":
        return _distill_concepts.over_concepts(inputs, pairs, options.loss)
    inputs = inputs.wide()
    if options.form == "margin":
        return _distill_captions.margin(inputs, pairs, options.gamma)
    if options.candidates == "batch":
        delta = float("inf") if options.delta is None else options.delta
        return _distill_candidates.ranking(inputs, pairs, delta, options.queue)
    if options.divergence == "none":
        return _distill_captions.ranking(inputs, pairs, options.delta)
    return _distill_captions.divergence(inputs, pairs, options.divergence, options.temperature)
