"""The families that read more than two embeddings of a sample: its patches and words, a third
modality, how certain they are.

As evidence_families.py has it: the model, data and schedule of evidence_arms.SMALL, weights of the
papers, nothing tuned.
"""

from __future__ import annotations

from tests.benchmarks.evidence_arms import GUARDS, PROOFS, SIX_EPOCHS, Column, Table
from tests.benchmarks.evidence_families import TABLES, add, of

# --- patches and words ----------------------------------------------------------------------------

COMPOSITION = {name: PROOFS[name] for name in ("binding, %", "relations, %", "order, %")}
BESIDE = "data.captions={choose: all, n: 3}"
LOCAL = of(
    "local",
    {
        "own": (
            "+ own-sample .5 (focal, smoothed)",
            "{infonce: {}, hard_negatives: {form: own, focal: 2, smoothing: 0.02, weight: 0.5}}",
        ),
        "fsc": (
            "+ own-sample .5 and local .2 (FSC-CLIP)",
            "{infonce: {}, hard_negatives: {form: own, focal: 2, smoothing: 0.02, weight: 0.5}, "
            "fsc: {weight: 0.2}}",
        ),
    },
    data="negatives",
)
LOCAL |= of(
    "local",
    {
        "filip": (
            "+ FILIP .5, a quarter of the places kept",
            "{infonce: {}, filip: {candidates: rank, scores: apart, keep: 0.25, weight: 0.5}}",
        ),
        "mil": ("+ MIL, three captions", "{infonce: {}, mil: {}}", BESIDE),
        "prior": (
            "+ PRIOR, three captions",
            "{infonce: {}, prior: {}}",
            BESIDE,
            "model.heads={regions: {}}",
        ),
    },
)
add(
    "local",
    "Local scores: patches and words beside whole embeddings",
    {"clean_plain": "InfoNCE"} | LOCAL,
    COMPOSITION | GUARDS,
    f"{SIX_EPOCHS} Two hard captions by rule for both arms of own-sample terms; three "
    "captions of a scene, which tell of the same groups, are the sentences of MIL and PRIOR; what "
    "more captions give alone stands in the table of several captions. FILIP "
    "compares the places of the 256 samples of a rank; its share is not confirmed from the paper.",
    paired=("binding, %", "text R@1, %", "image R@1, %"),
)

# --- a third modality -----------------------------------------------------------------------------

EDGES = (
    "data.sources=[{name: shards, path: 'data/edged/train', "
    "modalities: {edges: data/edged/train_edges}}]",
    "model.heads={modalities: {edges: {features: 64, length: 16, layers: 2, width: 128, "
    "heads: 4}}}",
)
# Of three rows of D = 128 equal numbers the product sums to 128^(−1/2), not to 1.
SCALE_OF_THREE = "model.scale={init: 162, max: 1131}"
THIRD = of(
    "third",
    {
        "pairs": ("every two modalities", "{modality_pairs: {}}", *EDGES),
        "gram": ("GRAM", "{gram: {label_smoothing: 0.1}}", *EDGES),
        "symile": ("Symile", "{symile: {}}", *EDGES, SCALE_OF_THREE),
    },
)
FOUND: dict[str, Column] = {
    f"{a} to {b} R@1, %": ("modalities", f"{a}_to_{b}_recall@1")
    for a, b in (("text", "edges"), ("edges", "text"), ("image", "edges"))
}
TABLES["evidence_third"] = Table(
    "A third modality beside picture and text",
    {"clean_plain": "InfoNCE of picture and text"} | THIRD,
    GUARDS | FOUND,
    f"{SIX_EPOCHS} The third modality is a second picture of each scene that has no color: how "
    "much lightness changes at each pixel, read by a transformer over 16 squares. The guards are "
    "of picture and text alone. Symile starts at a scale of 162, the product of three rows of "
    "128 equal numbers being 128^(−1/2) of that of two.",
    other_data=True,
    paired=tuple(GUARDS),
    evaluated={
        "modalities": (
            *("--task", "modality_retrieval", "--data", "data/edged/retrieval"),
            "modalities={edges: data/edged/retrieval_edges}",
        )
    },
    evaluated_arms=tuple(THIRD),
)

# --- embeddings that are certain ------------------------------------------------------------------

CERTAIN = of(
    "certain",
    {
        "monte_carlo": (
            "MCInfoNCE",
            "{mc_infonce: {}}",
            "model.heads={concentration: {width: 128}}",
        ),
    },
)
CERTAINTY: dict[str, Column] = {
    f"{way} R@1 of the surest half, %": ("certainty", f"{way}_retrieval_recall@1_of_50%")
    for way in ("text", "image")
}
TABLES["evidence_certainty"] = Table(
    "Embeddings that say how certain they are",
    {"clean_plain": "InfoNCE"} | CERTAIN,
    GUARDS | PROOFS | CERTAINTY,
    f"{SIX_EPOCHS} MCInfoNCE draws 16 of each row, from the scale of the others (its paper: 20). "
    "The surest half of the queries is that of the highest concentration.",
    evaluated={
        "certainty": (
            *("--task", "retrieval", "--data", "data/scenes/retrieval"),
            "certainty=model",
        )
    },
    evaluated_arms=tuple(CERTAIN),
    other_data=True,
    paired=tuple(GUARDS),
)

# --- the terms that no arm has --------------------------------------------------------------------

NOT_SHOWN = {
    "captioning": "a decoder over CLIP's 49,408 tokens takes 25 times as long here as two towers",
    "cwcl": "asks a strong tower that is locked: nothing here is pretrained on anything but scenes",
    "ranked": "asks a relevance of each pair, of which scenes have none",
    "self_distillation": "keeps what fine-tuning forgets; these arms begin from nothing",
    "translation": "keeps modalities in spaces of their own; the tables compare embeddings in one",
}
