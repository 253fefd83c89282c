"""The section `data`: what is trained on, and how it becomes batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from vlp import schema
from vlp.plugin import Named, Plugin
from vlp.schema import Problem


@dataclass(frozen=True)
class Augment:
    """Training augmentation, in the terms of torchvision's RandomResizedCrop."""

    scale: tuple[float, float] = (0.9, 1.0)  # share of the image's area that a crop covers
    ratio: tuple[float, float] = (0.75, 1.3333333)  # width / height of a crop
    # probability of a horizontal flip; harmful where captions say left and right
    flip: float = 0.0
    # strength of brightness, contrast and saturation jitter: factors in [1 − color, 1 + color]
    color: float = 0.0
    grayscale: float = 0.0  # probability of gray
    # probability of a Gaussian blur, σ of .1 to 2 px at 224 px and in proportion at other sizes
    blur: float = 0.0
    # decode a JPEG at 1/2, 1/4 or 1/8 where its crop stays large enough: faster, a few levels off
    scaled_decoding: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} must satisfy 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} must satisfy 0 < low <= high")

        probabilities = (self.flip, self.grayscale, self.blur)
        are_probabilities = all(0 <= p <= 1 for p in probabilities)
        if not are_probabilities or not 0 <= self.color < 1:
            raise ValueError("flip, grayscale and blur must lie in [0, 1] and color in [0, 1)")


@dataclass(frozen=True)
class StrongAugment(Augment):
    """Augmentation of further views, of SimCLR's kind; it still leaves left and right alone."""

    scale: tuple[float, float] = (0.4, 1.0)
    color: float = 0.4
    grayscale: float = 0.2
    blur: float = 0.5


@dataclass(frozen=True)
class TextAugment:
    """How a caption becomes a further view: the probability of each change, for each word that it
    can happen to.
    """

    stop_words: float = 0.3  # a stop word is left out
    # a word of the list in vlp.data.wording becomes another of the same meaning
    synonyms: float = 0.2
    swaps: float = 0.1  # a word changes places with the next one
    deletions: float = 0.1  # a word is left out, whatever it is

    def __post_init__(self) -> None:
        if not all(0 <= p <= 1 for p in vars(self).values()):
            raise ValueError(f"probabilities must lie in [0, 1], found {self}")


@dataclass(frozen=True)
class Views:
    """Further, strongly augmented views of every image and caption: Batch.image_views and
    Batch.text_views.
    """

    n: int = 1  # how many of each image and caption
    augment: StrongAugment = StrongAugment()
    text: TextAugment = TextAugment()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}; expected at least 1 (leave `views` out for none)")


@dataclass(frozen=True)
class Renamed:
    """Schema hook for one of several words of which one was renamed: the old word is refused with
    the new one.
    """

    choices: Any  # a Literal
    old: str
    new: str

    def parse(self, value: Any, path: schema.Path, problems: list[Problem]) -> Any:
        if value == self.old:
            problems.append(Problem(path, f"{self.old!r} is called {self.new!r} now; write that"))
            return value
        return schema.parse_into(self.choices, value, path, problems)


_CaptionChoice = Literal["random", "first", "weights", "all", "sentences", "first_sentence"]


@dataclass(frozen=True)
class Captions:
    """The texts of a sample, and which of them is trained on.

    A batch carries one of them as `text`, which all terms read, and with `n` or `roles` several
    beside one another as `captions`, for the term of that name.
    """

    RENAMED: ClassVar[dict[str, str]] = {"carried": "n"}

    # random: one of a sample's captions, drawn anew at every visit; first: always the first;
    # weights: by the weights of the positions; all: every caption is a pair of its own, or with n
    # or roles all stand in one row; sentences: their sentences, as random and all draw captions;
    # first_sentence: that of the first caption, with n: 1 beside the whole caption
    choose: Annotated[_CaptionChoice, Renamed(_CaptionChoice, old="seed", new="random")] = "random"
    # K': captions of a sample that stand beside one another in a row, with choose: all or
    # sentences; of a sample with more as many are drawn at every visit. None: one caption a row
    n: int | None = None
    # names of the captions that stand beside one another, in the order of their columns: [long,
    # short]. A source gives each its field (captions: {long: re_caption, short: caption}) or
    # column; else the first caption of a sample is of the first role, and so on
    roles: list[str] = field(default_factory=list)
    # of the first, second, … caption; further ones are not taken
    weights: list[float] = field(default_factory=list)
    # such as "a photo of a {}.": captions made by filling in the JSON's "class"
    class_templates: list[str] = field(default_factory=list)
    # a sample without any text: refuse to start, or drop it and count it
    missing: Literal["error", "drop"] = "error"
    # a text file of several lines is one caption, or each of its lines is one
    lines: Literal["one", "each"] = "one"

    def __post_init__(self) -> None:
        self._check_beside()

        bad = [t for t in self.class_templates if t.count("{}") != 1]
        if bad:
            raise ValueError(f"templates need exactly one {{}} for the class name: {bad}")

        by_weight = self.choose == "weights"
        if by_weight != bool(self.weights) or min(self.weights, default=1) <= 0:
            raise ValueError(
                f"choose is {self.choose} and weights are {self.weights}; "
                "positive weights belong to choose: weights"
            )

    def _check_beside(self) -> None:
        """Refuse `n` and `roles` that do not go with each other or with `choose`."""
        n, choose = self.n, self.choose
        several = choose in ("all", "sentences")
        if n is not None and not several and choose != "first_sentence":
            raise ValueError(
                f"n is {n}, but choose: {choose} takes one caption of a sample; "
                "write choose: all or choose: sentences for several, or leave n out"
            )
        if choose == "first_sentence" and n not in (None, 1):
            raise ValueError(f"n is {n}; expected 1 with choose: first_sentence, or none")
        if several and n is not None and n < 2:
            raise ValueError(f"n is {n}; expected at least 2 captions of a sample")

        if self.roles and choose != "all":
            raise ValueError(f"roles belong to choose: all, not {choose}; write that")
        if self.roles and n is not None:
            raise ValueError(f"n is {n} beside {len(self.roles)} roles, which say it; leave it out")
        if len(set(self.roles)) < len(self.roles):
            raise ValueError(f"roles are {self.roles}; expected different names")

    @property
    def n_beside(self) -> int:
        """K', the captions that stand beside one another in a row, at most; 0: none do."""
        return len(self.roles) or self.n or 0


@dataclass(frozen=True)
class Data:
    """What is trained on and how it becomes batches."""

    # where samples come from: shards, folders, tables, the Hub, several mixed by weight
    sources: list[Annotated[Plugin, Named("vlp.data.sources")]]
    # what stands opposite a text: a picture, or another text, the query of the source `texts`,
    # which the text tower embeds; what only pictures pass is then not trained (E5-V)
    pairs: Literal["image", "text"] = "image"
    augment: Augment = Augment()
    captions: Captions = field(default_factory=Captions)
    # J: images of a sample's negatives that a batch carries, where a term reads `negative_images`
    negative_images: int = 1
    views: Views | None = None  # further views for terms that compare them; None: none
    # G: batches are made of whole groups of G samples of one "origin" (a field of their JSON)
    together: int = 1
    # every batch is of one source, which the weights choose in turn: negatives are then of the
    # pair's own kind (VLM2Vec: one task a batch)
    one_source: bool = False
    # independent uniform draws (within a source's share) instead of whole epochs
    replacement: bool = False
    # V: parts of every batch that fetch shards of their own, where shards are remote. A multiple of
    # the nodes lets each node fetch its share only; auto: as many as the widest window has shards
    lanes: int | Literal["auto"] = "auto"
    shuffle: bool = True  # a new order every epoch; false: the order of the data
    # what pairs share that are of one kind: caption (but for case, blanks and the stop at its end),
    # origin, or a field of the JSON such as class; None: what the terms' `positives` say
    labels: str | None = None
    # M, which the numbers are below by which samples name concepts (vlp data concepts); None:
    # model.heads.concepts. Samples with weights of all concepts need none
    concepts: int | None = None
    bad_share: float = 0.01  # more unusable samples than 16 + this share of the rows end the run
    # decoding processes a rank, which change no batch; 0 decodes in the training process; auto:
    # cores / ranks of the machine − 1, from 1 to 32, and no more than the shared memory holds
    workers: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(
                "sources is empty; name at least one, e.g. [{name: shards, path: data/train}]"
            )
        if self.negative_images < 1:
            raise ValueError(f"negative_images is {self.negative_images}; expected at least 1")
        if self.concepts is not None and self.concepts < 0:
            raise ValueError(f"concepts is {self.concepts}; expected their number, or null")
        if self.lanes != "auto" and self.lanes < 1:
            raise ValueError(f"lanes is {self.lanes}; expected at least 1, or auto")
        negative = self.workers != "auto" and self.workers < 0
        if negative or self.together < 1 or not 0 <= self.bad_share <= 1:
            raise ValueError(
                f"workers is {self.workers}, together {self.together}, "
                f"bad_share {self.bad_share}; expected workers >= 0, "
                "together >= 1 and bad_share in [0, 1]"
            )

        # Settings that each make sense and do not go with one another.
        if self.replacement and not self.shuffle:
            raise ValueError("replacement draws at random; it does not go with shuffle: false")
        captions = self.captions
        if self.together > 1 and captions.choose == "all" and not captions.n_beside:
            raise ValueError(
                "together makes batches of samples, captions.choose: all of captions; "
                "take one of the two"
            )
        if self.views and (self.augment.scaled_decoding or self.views.augment.scaled_decoding):
            raise ValueError(
                "scaled_decoding does not go with views: "
                "all crops of an image come from one decoding at full size"
            )
