"""The configuration: one typed tree, read strictly from YAML with dotted overrides.

`load("configs/demo.yaml", ["train.batch=512"])` reports every problem at once, each with file and
line. Plug-ins (sources, towers, terms, tasks) validate their own options by name through
`vlp.plugin`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from vlp import privacy, schema
from vlp.plugin import Keyed, KeyedPlugins, Named, Plugin
from vlp.schema import ConfigError, Problem, did_you_mean
from vlp.types import Decoding


@dataclass(frozen=True)
class Duration:
    """A span of training in any unit: `1000` (steps), `5%` (of the run), `3ep` (epochs),
    `200ksamples`, `2Msamples`.
    """

    value: float
    unit: Literal["steps", "%", "ep", "samples"]

    @classmethod
    def from_config(cls, value: Any) -> Duration:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|ep|samples|ksamples|Msamples)?", str(value))
        if not match or isinstance(value, bool):
            raise ValueError(
                f"found {value!r}, expected a duration: 1000 (steps), 5%, 3ep, 200ksamples or 2Msamples"
            )
        number, unit = float(match[1]), match[2] or "steps"
        if unit == "steps" and number != int(number):
            raise ValueError(f"found {value!r}, expected a whole number of steps")
        factor = {"ksamples": 1e3, "Msamples": 1e6}.get(unit, 1)
        return cls(number * factor, "samples" if unit.endswith("samples") else unit)  # type: ignore[arg-type]

    def to_config(self) -> str | int:
        return (
            int(self.value)
            if self.unit == "steps"
            else f"{self.value:g}{self.unit}"
            if self.unit != "samples"
            else (f"{self.value / 1e3:.12g}ksamples")
        )

    def steps(self, *, batch: int, steps_per_epoch: int, total: int | None = None) -> int:
        """The span in optimiser steps of `batch` samples, at least 1 unless the value is 0; `%`
        needs `total` steps.
        """
        span = self.span(batch=batch, steps_per_epoch=steps_per_epoch, total=total)
        return max(1, round(span)) if span else 0

    def span(self, *, batch: int, steps_per_epoch: int, total: int | None = None) -> Fraction:
        """The span in steps before rounding; its multiples are rounded one by one, so that they do
        not drift.
        """
        if self.unit == "%" and total is None:
            raise ValueError(
                "a percentage has no meaning here; give steps, epochs (3ep) or samples (2Msamples)"
            )
        per_unit = {
            "steps": Fraction(1),
            "ep": Fraction(steps_per_epoch),
            "samples": Fraction(1, batch),
            "%": Fraction(total or 0, 100),
        }
        return Fraction(str(self.value)) * per_unit[self.unit]


@dataclass(frozen=True)
class Plan:
    """The extent of a run in steps, by which durations become step counts."""

    batch: int  # global
    steps_per_epoch: int
    total: int  # steps of the whole run

    @classmethod
    def of(cls, train: Train, steps_per_epoch: int) -> Plan:
        total = train.duration.steps(batch=train.batch, steps_per_epoch=steps_per_epoch)
        return cls(train.batch, steps_per_epoch, total)

    def steps(self, duration: Duration) -> int:
        return duration.steps(
            batch=self.batch, steps_per_epoch=self.steps_per_epoch, total=self.total
        )

    def due(self, every: Duration | None, step: int) -> bool:
        """Whether something done `every` so often is due after `step` updates: see `due_steps`."""
        if step == self.total or every is None:
            return step == self.total
        span, n_multiples = self._multiples(every)
        nearest = round(step / span)
        near = range(max(1, nearest - 1), min(nearest + 1, n_multiples) + 1)
        return span <= 1 or any(round(k * span) == step for k in near)

    def due_steps(self, every: Duration | None) -> list[int]:
        """The steps after which something done `every` so often is due: the rounded multiples of
        the span, and the end.

        A multiple in per cent that falls short of the end by less than a tenth of the span (33%
        three times) is the end itself, so that nothing is done twice within a few steps.
        """
        if every is None:
            return [self.total]
        span, n_multiples = self._multiples(every)
        if span <= 1:
            return list(range(1, self.total + 1))
        return sorted({*(round(k * span) for k in range(1, n_multiples + 1)), self.total})

    def _multiples(self, every: Duration) -> tuple[Fraction, int]:
        """The span of `every` in steps, and how many of its multiples lie within the run."""
        span = every.span(batch=self.batch, steps_per_epoch=self.steps_per_epoch, total=self.total)
        room = self.total - span / 10 if every.unit == "%" else Fraction(self.total)
        return span or Fraction(1), int(room / (span or 1))


@dataclass(frozen=True)
class Augment:
    """Training augmentation, in the terms of torchvision's RandomResizedCrop."""

    scale: tuple[float, float] = (0.9, 1.0)  # share of the image's area that a crop covers
    ratio: tuple[float, float] = (0.75, 1.3333333)  # width / height of a crop
    flip: float = 0.0  # probability of a horizontal flip; harmful where captions say left and right
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
        if (
            not all(0 <= p <= 1 for p in (self.flip, self.grayscale, self.blur))
            or not 0 <= self.color < 1
        ):
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
    synonyms: float = (
        0.2  # a word of the list in vlp.data.wording becomes another of the same meaning
    )
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

    n: int = 1  # A
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


_CaptionChoice = Literal["random", "first", "all", "weights"]


@dataclass(frozen=True)
class Captions:
    """Where a sample's text comes from.

    random: one of its captions, drawn anew at every visit by (seed, step, row). first: always the
    first. all: every pair (image, caption) stands in the epoch by itself (the first 255 captions of
    a sample). weights: as `random`, by the weights of the positions.
    """

    choose: Annotated[_CaptionChoice, Renamed(_CaptionChoice, old="seed", new="random")] = "random"
    weights: list[float] = field(
        default_factory=list
    )  # of the first, second, … caption; further ones are not taken
    class_templates: list[str] = field(
        default_factory=list
    )  # e.g. "a photo of a {}.": filled with the JSON's "class"
    missing: Literal["error", "drop"] = (
        "error"  # a sample without any text: refuse to start, or drop it and count it
    )
    lines: Literal["one", "each"] = (
        "one"  # a text file of several lines is one caption, or each of its lines is one
    )

    def __post_init__(self) -> None:
        bad = [t for t in self.class_templates if t.count("{}") != 1]
        if bad:
            raise ValueError(f"templates need exactly one {{}} for the class name: {bad}")
        if (self.choose == "weights") != bool(self.weights) or min(self.weights, default=1) <= 0:
            raise ValueError(
                f"choose is {self.choose} and weights are {self.weights}; positive weights belong to choose: weights"
            )


@dataclass(frozen=True)
class Data:
    """What is trained on and how it becomes batches."""

    sources: list[Annotated[Plugin, Named("vlp.data.sources")]]
    augment: Augment = Augment()
    captions: Captions = field(default_factory=Captions)
    views: Views | None = None  # further views for terms that compare them; None: none
    # G: batches are made of whole groups of G samples of one "origin" (a field of their JSON)
    together: int = 1
    replacement: bool = (
        False  # independent uniform draws (within a source's share) instead of whole epochs
    )
    shuffle: bool = True
    bad_share: float = 0.01  # more unusable samples than 16 + this share of the rows end the run
    workers: int = 1  # decoding processes a rank; 0 decodes in the training process

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(
                "sources is empty; name at least one, e.g. [{name: shards, path: data/train}]"
            )
        if self.workers < 0 or self.together < 1 or not 0 <= self.bad_share <= 1:
            raise ValueError(
                f"workers is {self.workers}, together {self.together}, bad_share {self.bad_share}; expected workers >= 0, "
                "together >= 1 and bad_share in [0, 1]"
            )
        if self.replacement and not self.shuffle:
            raise ValueError("replacement draws at random; it does not go with shuffle: false")
        if self.together > 1 and self.captions.choose == "all":
            raise ValueError(
                "together makes batches of samples, captions.choose: all of captions; take one of the two"
            )
        if self.views and (self.augment.scaled_decoding or self.views.augment.scaled_decoding):
            raise ValueError(
                "scaled_decoding does not go with views: all crops of an image come from one decoding at full size"
            )


@dataclass(frozen=True)
class Scale:
    """The logit scale (inverse temperature): learned as its logarithm, clamped in the forward pass."""

    init: float = 14.285714285714286  # 1 / 0.07
    max: float = 100.0
    learned: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.init <= self.max:
            raise ValueError(f"scale init {self.init} must lie in (0, max = {self.max}]")


@dataclass(frozen=True)
class ViewHead:
    """Projection of further views, D → width → D, with a scale of its own."""

    width: int = 2048
    text: bool = True  # captions have views too; false for slip alone
    scale: Scale = Scale()


@dataclass(frozen=True)
class Captioner:
    """A multimodal decoder of the text tower's width."""

    layers: int = 3
    heads: int | None = None  # None: as many as the text tower has


@dataclass(frozen=True)
class Heads:
    """Trained parts that only the objective reads; exports leave them out (vlp.models.heads)."""

    views: ViewHead | None = None  # image_views, text_views (with data.views)
    concepts: int = 0  # classes C of a linear layer on the image tower: concept_logits
    captions: Captioner | None = None  # caption_logits

    def __post_init__(self) -> None:
        if self.concepts < 0:
            raise ValueError(
                f"concepts is {self.concepts}; expected the number of concepts, or 0 for none"
            )


@dataclass(frozen=True)
class Model:
    """Two towers into one space. An open_clip architecture gives both; otherwise name one tower
    each.
    """

    image_tower: Annotated[Plugin, Named("vlp.towers")]
    text_tower: Annotated[Plugin, Named("vlp.towers")] | None = (
        None  # may be absent where the image tower names both
    )
    embed_dim: int | None = None  # None: the architecture's
    scale: Scale = Scale()
    bias: float | None = None  # initial logit bias (SigLIP: -10); None: the model has none
    heads: Heads = Heads()
    pretrained: str | None = (
        None  # open_clip tag, or any reference (vlp.pretrained.references); None: random
    )
    decoding: Decoding | None = None  # None: as `pretrained` says, or on white and upright

    @property
    def precomputed(self) -> bool:
        """Whether training reads the image tower's embeddings from the data instead of running it."""
        return self.image_tower.common is not None and self.image_tower.common.precomputed


@dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up and cosine decay. Decay leaves gains, biases, embeddings, scale and bias
    alone.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup: Duration = Duration(5, "%")
    final_lr: float = 0.0  # share of lr at the end of the cosine
    clip_norm: float | None = 1.0  # of the global gradient; None: no clipping

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.eps <= 0 or self.weight_decay < 0 or not 0 <= self.final_lr <= 1:
            raise ValueError("lr and eps must be positive, weight_decay >= 0, final_lr in [0, 1]")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; expected a positive number or null")


@dataclass(frozen=True)
class Train:
    """How long, how large and on what."""

    duration: Duration
    batch: int  # global: rows of one step over all ranks
    # a rank's rows of a step are embedded in this many parts; the loss still sees all of them
    micro_batches: int = 1
    optimizer: Optimizer = Optimizer()
    precision: Literal["auto", "float32", "bf16"] = (
        "auto"  # auto: the faster one, as a short measurement finds
    )
    engine: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = (
        "auto"  # auto: what the launcher set up
    )
    compile: bool = False
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    non_finite: Literal["stop", "skip"] = (
        "stop"  # a step with NaN or infinity: end the run, or leave the step out
    )
    max_skipped: int = 10  # steps that `skip` leaves out in the whole run; one more ends it

    def __post_init__(self) -> None:
        if self.duration.unit == "%" or not self.duration.value:
            found = self.duration.to_config()
            raise ValueError(
                f"duration is {found}; expected steps (1000), epochs (3ep) or samples (2Msamples), more than none"
            )
        if self.batch < 1 or self.micro_batches < 1:
            raise ValueError("batch and micro_batches must be at least 1")
        if self.max_skipped < 1:
            raise ValueError(
                f"max_skipped is {self.max_skipped}; expected at least 1, or non_finite: stop"
            )


@dataclass(frozen=True)
class Teacher:
    """What gives terms embeddings without gradient, beside the trained model (vlp.teacher)."""

    ema: float | None = (
        None  # decay of the model's moving average (DeGLA .9996, BriVL .99); None: there is none
    )
    queue: int = 0  # latest pairs of all ranks whose embeddings by the moving average are kept
    model: str | None = None  # another, frozen model: any reference (vlp.pretrained.references)

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; expected a decay in [0, 1), such as 0.9996")
        if self.queue < 0 or (self.queue and self.ema is None):
            raise ValueError(
                f"queue is {self.queue} with ema {self.ema}: expected a size >= 0, and ema where it is not 0"
            )


@dataclass(frozen=True)
class Pairwise:
    """How the pairs of a step are formed and computed (vlp.pairwise)."""

    # auto | local | global | ring | {group: 8, layout: contiguous | strided | alternating}
    topology: Any = "auto"
    impl: Literal["auto", "dense", "tiled", "triton"] = "auto"
    memory_budget: int | None = (
        None  # bytes of score tiles to keep for backward; None: twice the candidates' embeddings
    )


@dataclass(frozen=True)
class Checkpoint:
    """When a run is saved and how many saves stay."""

    every: Duration = Duration(25, "%")
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep is {self.keep}; expected at least 1")


@dataclass(frozen=True)
class Log:
    """What is reported while training. Everything also goes to metrics.jsonl in the run's folder."""

    every: Duration = Duration(10, "steps")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)


@dataclass(frozen=True)
class Config:
    """One run."""

    out: str  # the run's folder
    data: Data
    model: Model
    train: Train
    objective: Annotated[KeyedPlugins, Keyed("vlp.losses")]
    pairwise: Pairwise = Pairwise()
    teacher: Teacher = Teacher()
    selection: Annotated[KeyedPlugins, Keyed("vlp.selection")] = field(default_factory=KeyedPlugins)
    eval: Annotated[KeyedPlugins, Keyed("vlp.eval.tasks")] = field(default_factory=KeyedPlugins)
    checkpoint: Checkpoint = Checkpoint()
    log: Log = field(default_factory=Log)
    seed: int = 0
    init_from: str | None = None  # weights to start from: any reference (vlp.pretrained.references)
    # never | auto (newest complete checkpoint of `out`, if any) | a checkpoint's folder
    resume: str = "never"

    def __post_init__(self) -> None:
        if not self.objective:
            raise ValueError("objective is empty; name at least one term, e.g. {infonce: {}}")
        if len(self.selection) > 1:
            raise ValueError(
                f"selection names {[plugin.name for plugin in self.selection]}; one at a time"
            )
        if 0 < self.teacher.queue < self.train.batch:
            raise ValueError(
                f"teacher.queue is {self.teacher.queue}, smaller than train.batch {self.train.batch}; enlarge it"
            )


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML) and validate; raises
    ConfigError.

    Secrets that a run's config.yaml leaves out must be given again by the overrides.
    """
    tree, lines = _read(Path(path), overrides or [])
    hidden = list(privacy.hidden_keys(tree))
    if hidden:
        again = " ".join(f"{key}=…" for key in hidden)
        message = (
            f"{path} leaves out secrets, which no run writes down; give them again ({again}), or use "
            "the configuration that the run was started with"
        )
        raise ConfigError([Problem((), message)])
    return parse(tree, lines)


def recorded(path: str | Path) -> Config:
    """The configuration that `dump` wrote, for what it says besides its secrets."""
    return parse(*_read(Path(path), []))


def _read(path: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[schema.Path, str]]:
    """A YAML file with overrides applied, and where each of its values stands."""
    try:
        tree, lines = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        known = [*shipped(), *map(str, path.parent.glob("*.y*ml"))]
        raise ConfigError(
            [Problem((), f"no configuration file {path}{did_you_mean(str(path), known)}")]
        ) from None
    except IsADirectoryError:
        files = ", ".join(sorted(file.name for file in path.glob("*.y*ml"))) or "none"
        raise ConfigError(
            [Problem((), f"{path} is a folder; name a YAML file (in it: {files})")]
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            [Problem((), f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})")]
        ) from None
    for override in overrides:
        _override(tree, override, lines)
    privacy.learn(tree)
    return tree, lines


def parse(tree: dict[str, Any], lines: dict[schema.Path, str] | None = None) -> Config:
    """Validate a plain mapping; raises ConfigError naming every problem, at its line where `lines`
    knows it.
    """
    try:
        return schema.parse(Config, tree)
    except ConfigError as error:
        raise ConfigError(error.problems, lines) from None


def shown(config: Any) -> Any:
    """A configuration as plain values, with its secrets hidden: the form in which it leaves this
    process.
    """
    return privacy.without_secrets(schema.plain(config))


def dump(config: Any) -> str:
    """The resolved configuration as YAML that `load` reads back, without secrets (vlp.privacy)."""
    return yaml.safe_dump(shown(config), sort_keys=False, allow_unicode=True)


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {p.stem: p for p in sorted(Path(str(resources.files("vlp.configs"))).glob("*.yaml"))}


def find(name: str) -> Path:
    """A configuration's file by path, or by the name of a shipped one."""
    return (
        Path(name)
        if Path(name).is_file()
        else shipped().get(name.removesuffix(".yaml"), Path(name))
    )


def read_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[schema.Path, str]]:
    """Parse YAML into plain values and a map from each value's path to "file:line"; duplicate keys
    are an error.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([Problem((), f"{name}: not valid YAML: {error}")]) from None
    if not isinstance(values, dict):
        raise ConfigError(
            [
                Problem(
                    (),
                    f"{name}: found {type(values).__name__}, expected a mapping of keys to values",
                )
            ]
        )
    lines: dict[schema.Path, str] = {(): name}
    problems: list[Problem] = []
    _mark(root, (), name, lines, problems)
    if problems:
        raise ConfigError(problems, lines)
    return values, lines


def _mark(
    node: yaml.Node,
    path: schema.Path,
    name: str,
    lines: dict[schema.Path, str],
    problems: list[Problem],
) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            where = (*path, key.value)
            if key.value in seen:
                problems.append(Problem(where, "this key appears twice"))
            seen.add(key.value)
            lines[where] = f"{name}:{key.start_mark.line + 1}"
            _mark(value, where, name, lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, i)] = f"{name}:{value.start_mark.line + 1}"
            _mark(value, (*path, i), name, lines, problems)


def _override(tree: dict[str, Any], override: str, lines: dict[schema.Path, str]) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            [Problem((), f"override {override!r} is not of the form section.key=value")]
        )
    node: Any = tree
    *parents, last = keys = [int(k) if k.isdigit() else k for k in name.split(".")]
    try:
        for key in parents:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        node[last] = _value(override, value)
    except (TypeError, IndexError, KeyError):
        raise ConfigError(
            [
                Problem(
                    tuple(keys),
                    f"override {override!r} leads through something that is not a mapping",
                )
            ]
        ) from None
    lines[tuple(keys)] = f"override {override!r}"


def _value(override: str, text: str) -> Any:
    """The YAML value that an override gives."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error)
        advice = "quote text that holds signs of YAML: key='\"[1\"'"
        raise ConfigError(
            [
                Problem(
                    (), f"override {override!r}: {text!r} is not a YAML value ({reason}); {advice}"
                )
            ]
        ) from None
