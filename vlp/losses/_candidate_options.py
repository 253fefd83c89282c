"""Keys of the losses whose candidates may be positives, be left out, or be the hardest only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Similar:
    """Pairs that a teacher finds alike: u_i·u_j >= above, of its stored unit rows."""

    above: float = 0.9  # φ in DCLR, which takes .9 or .85; above 1 ignores nothing
    # rows i and columns j of its texts, of its images, or images against texts
    of: Literal["text", "image", "cross"] = "text"

    def needs(self) -> frozenset[str]:
        """The keywords that hold the rows."""
        rows = {"text": {"teacher_text"}, "image": {"teacher_image"}}
        return frozenset(rows.get(self.of, {"teacher_image", "teacher_text"}))


@dataclass(frozen=True)
class Ignore:
    """Candidates j ≠ i that leave the denominator of row i; of several rules any one suffices.

    Positives are never ignored, and no rule has a gradient.
    """

    same_label: bool = False  # label_j = label_i
    margin: float | None = None  # δ: s_ij > s_ii + δ in cosines (UniME: .1)
    teacher: Similar | None = None  # alike to a teacher: {above: .9, of: text}
    # cluster_j = cluster_i, as of k-means (ClusterNS). `vlp train` makes no `cluster`: there, name
    # the cell as the label and use same_label
    cluster: bool = False
    # ρ, of a queue: keys whose cosine with the row's own key is ρ or more
    queue: float | None = None

    def needs(self) -> frozenset[str]:
        """The keywords that the rules read."""
        names = {"label": self.same_label, "cluster": self.cluster}
        read = frozenset(name for name, is_read in names.items() if is_read)
        return read if self.teacher is None else read | self.teacher.needs()

    @property
    def active(self) -> bool:
        """Whether any rule is set."""
        return self != Ignore()


@dataclass(frozen=True)
class Candidates:
    """Keys that say what each candidate of a row is."""

    has_queue = False  # whether candidates come from a queue of keys; no key itself

    # who else is a positive of row i: all j of its label, where `label` holds a number of the
    # caption, of the sample's origin, or any class (the data fill it); none: its own pair alone
    positives: Literal["none", "caption", "label", "origin"] = "none"
    # candidates that are no negatives of the row
    ignore: Ignore = Ignore()
    # only the k negatives with the highest scores are compared with (UniME: 8); null: all
    hardest: int | None = None
    # whose own modality's rows are negatives too (UNPG): images of an image, texts of a text
    within: Literal["none", "image", "text", "both"] = "none"

    def __post_init__(self) -> None:
        if self.hardest is not None and self.hardest < 1:
            raise ValueError(f"hardest: found {self.hardest}, expected at least 1, or null")
        if self.ignore.queue is not None and not self.has_queue:
            raise ValueError(
                "ignore.queue: this term has no queue; use ignore.margin or ignore.teacher, or "
                "the term momentum_queue"
            )
        if self.ignore.same_label and self.positives != "none":
            raise ValueError(
                f"ignore.same_label: beside positives: {self.positives} pairs of one label are "
                "positives, which are never ignored; drop one of the two"
            )
        if self.hardest is not None and self.within != "none":
            raise ValueError(
                "hardest and within: the hardest are chosen among candidates of the other "
                "modality; drop one of the two"
            )

    def check_candidates(self, n_candidates: int) -> None:
        """ValueError where a row has fewer other candidates than are to be the hardest."""
        # A queue brings candidates of its own, and its term counts them.
        if self.hardest is None or self.has_queue:
            return
        n_others = n_candidates - 1
        if self.hardest > n_others:
            raise ValueError(
                f"hardest: found {self.hardest} of {n_others} other candidates; use at most "
                f"{n_others}, or a larger batch"
            )

    @property
    def plain(self) -> bool:
        """Whether every other candidate is a negative, as in the loss without these keys."""
        chosen = self.positives != "none" or self.within != "none" or self.hardest is not None
        return not (chosen or self.ignore.active)

    def needs(self) -> frozenset[str]:
        """The keywords that these keys make a term read."""
        by_positives = frozenset({"label"} if self.positives != "none" else set())
        return by_positives | self.ignore.needs()


@dataclass(frozen=True)
class Formed(Candidates):
    """The same, with the form that a softmax takes over several positives."""

    # of several positives: out −mean_p log p_p; in −log Σ_p p_p; decoupled: out, each positive
    # against the negatives alone
    form: Literal["out", "in", "decoupled"] = "out"


@dataclass(frozen=True)
class Ignoring:
    """The key of losses that leave candidates out, and ask nothing else of them."""

    # other candidates that are no negatives of the row
    ignore: Ignore = Ignore()

    def __post_init__(self) -> None:
        self.candidates()

    def candidates(self) -> Candidates:
        """Who is compared with whom; ValueError for a rule that needs a queue."""
        return Candidates(ignore=self.ignore)
