"""The stages of a run: phases with other batches, pictures, masks, texts or rates (FLIP, Li et al.,
arXiv 2212.00794; CLIPA, Li et al., arXiv 2305.07017).

A stage ends like a run that stops: it is saved. The next one starts like a run that is resumed,
from that checkpoint, with the model, loader and optimiser of its own form. So a run that is stopped
before, at or after a joint goes on bit for bit, and no engine needs to know of stages. What is of
another shape at a joint are the positions of the image tower:

    weights, moving average     interpolated (vlp.pretrained.image_size)
    moments of their shape      interpolated alike; those without a negative number stay so
    state of other shapes       starts anew, and with it all of theirs

The form at the end is that of the last segment: of the last stage, or as configured where something
follows it. It is what evaluation sees at any time, and what is exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_clip import CLIPVisionCfg
from open_clip.hf_model import HFTextEncoder
from torch import Tensor

from vlp import checkpoint, log, optim
from vlp.config import Config, Duration, Model, Plan, Stage
from vlp.config.durations import of_stages
from vlp.data.loader import Loader
from vlp.engines import Engine
from vlp.engines.zero import ZeRO
from vlp.models.build import from_description
from vlp.models.dual_encoder import DualEncoder
from vlp.pretrained import adapters, image_size
from vlp.pretrained.read_once import read_once
from vlp.schema import plain
from vlp.teacher import EMA
from vlp.types import TextSpec


@dataclass(frozen=True)
class Segment:
    """The part of a run that one stage is, or what follows the last one."""

    number: int  # from 1
    n_segments: int
    stage: Stage | None  # None: as configured
    config: Config  # with what the stage says in its place
    plan: Plan
    batches: list[tuple[int, int]]  # (first step, rows loaded of all ranks) up to this one

    @property
    def place(self) -> str:
        """How a message about it begins: with the key; nothing for a run without stages."""
        if self.stage is not None:
            return f"stages.{self.number - 1}: "
        return "after the stages: " if self.n_segments > 1 else ""

    def rate(self, whole_run: Callable[[int], float]) -> Callable[[int], float]:
        """The learning rate as a function of the step: the whole run's, or a schedule of its own
        for a stage with a warm-up of its own.
        """
        if self.stage is None:
            return whole_run
        factor, first = self.stage.lr, self.plan.first
        if self.stage.warmup is None:
            return lambda step: factor * whole_run(step)

        warmup = Duration(self.plan.steps(self.stage.warmup), "steps")
        options = replace(self.config.train.optimizer, warmup=warmup)
        own = optim.Schedule(options, replace(self.plan, total=self.plan.end - first))
        return lambda step: factor * own(step - first)

    def text_spec(self, model: DualEncoder) -> TextSpec:
        """How captions become tokens in this stage."""
        if self.stage is None or self.stage.context_length is None:
            return model.text_spec
        return replace(model.text_spec, context_length=self.stage.context_length)

    def say(self, model: DualEncoder) -> None:
        """A line on what begins."""
        height, width = model.image_spec.size
        tokens = self.text_spec(model).context_length
        log.say(
            f"stage {self.number} of {self.n_segments}: steps {self.plan.first + 1:,} to "
            f"{self.plan.end:,} of {self.plan.batch}, {height}×{width} pixels, {tokens} tokens"
        )


def of_run(config: Config, loader: Loader, times: int) -> list[Segment]:
    """The segments of a run, one for a run without stages. `times`: how many rows are loaded for
    one that is trained on.
    """
    plans = of_stages(config.train, config.stages, lambda batch: loader.epoch_steps(batch * times))
    segments: list[Segment] = []
    sizes: list[tuple[int, int]] = []
    for i, plan in enumerate(plans):
        stage = config.stages[i] if i < len(config.stages) else None
        # One size after itself is no other one.
        if not sizes or sizes[-1][1] != plan.batch * times:
            sizes = [*sizes, (plan.first, plan.batch * times)]
        segments.append(Segment(i + 1, len(plans), stage, configured(config, stage), plan, sizes))
    return segments


def left_of(segments: list[Segment], source: Path | None) -> list[Segment]:
    """The segments that are still to be trained behind a checkpoint; at least the last, whose end
    may still want its evaluation.
    """
    step = 0
    if source is not None:
        step = json.loads((source / "state.json").read_text(encoding="utf-8"))["step"]
    return [s for s in segments if s.plan.end > step] or segments[-1:]


def configured(config: Config, stage: Stage | None) -> Config:
    """The configuration with what a stage says in its place."""
    if stage is None:
        return config
    train = replace(
        config.train,
        batch=stage.batch or config.train.batch,
        micro_batches=stage.micro_batches or config.train.micro_batches,
    )
    return replace(config, train=train, model=_model(config.model, stage))


def _model(model: Model, stage: Stage) -> Model:
    wanted = {"image_size": stage.image_size, "patch_dropout": stage.patch_dropout}
    changed = {name: value for name, value in wanted.items() if value is not None}
    if not changed:
        return model

    tower = model.image_tower
    for name in changed:
        if not hasattr(tower.options, name):
            raise ValueError(
                f"stages sets {name}, which image_tower {tower.name!r} does not take; leave it out"
            )
    options = replace(tower.options, **changed)
    return replace(model, image_tower=replace(tower, options=options))


# --- before the first step ------------------------------------------------------------------------


def check(config: Config, segments: list[Segment], engine: Engine, final: DualEncoder) -> None:
    """Refuse what a later stage would fail by. ValueError.

    config: the run's; final: the model in which it ends.
    """
    stages = [segment.stage for segment in segments if segment.stage is not None]
    if not stages:
        return
    if isinstance(engine, ZeRO):
        raise ValueError(
            "DeepSpeed holds one model and optimiser for a whole process, and stages make new "
            "ones; set train.engine: fsdp2 or ddp, or leave stages out"
        )
    _check_batches(config, [segment.plan.batch for segment in segments])

    for i, segment in enumerate(segments):
        if segment.stage is not None:
            _check_warmup(f"stages.{i}.warmup", segment)
            segment.rate(lambda step: 0.0)  # a cooldown that the stage has no room for
            _check_texts(f"stages.{i}.context_length", segment.stage.context_length, final)
            _check_pictures(segment, final)


def _check_batches(config: Config, batches: list[int]) -> None:
    if config.teacher.queue and len(set(batches)) > 1:
        raise ValueError(
            "teacher.queue counts on one batch, by which its oldest keys are known; leave batch "
            "out of stages, or the queue"
        )
    # Its order of samples is made once, before the first stage.
    is_mcl = bool(config.selection) and config.selection[0].name == "mcl"
    if is_mcl and set(batches) != {config.train.batch}:
        raise ValueError("mcl makes batches of one size; leave batch out of stages")


def _check_warmup(key: str, segment: Segment) -> None:
    stage, plan = segment.stage, segment.plan
    if stage is None or stage.warmup is None:
        return
    steps, whole = plan.steps(stage.warmup), plan.end - plan.first
    if steps > whole:
        raise ValueError(
            f"{key} is {steps:,} steps, but the stage has {whole:,}: its rate would never be "
            "reached; give it fewer, or the stage more"
        )


def _check_texts(key: str, length: int | None, model: DualEncoder) -> None:
    if length is None:
        return
    whole = model.text_spec.context_length
    if length > whole:
        raise ValueError(
            f"{key} is {length}, and the text tower has {whole}; expected at most that"
        )

    # A tower that reads its padding, or a decoder of whole texts, would see other texts.
    takes_shorter = model.padding is not None or isinstance(model.text, HFTextEncoder)
    if length < whole and (not takes_shorter or "caption_nll" in model.supplies()):
        raise ValueError(
            f"{key} is {length}, but this text tower's embeddings depend on all its {whole} "
            "positions; leave it out"
        )


def _check_pictures(segment: Segment, final: DualEncoder) -> None:
    stage, config = segment.stage, segment.config
    assert stage is not None
    if config.model.precomputed and (stage.image_size or stage.patch_dropout is not None):
        raise ValueError(
            f"stages.{segment.number - 1} changes pictures, which image_tower.precomputed does not "
            "read"
        )
    if stage.image_size is None:
        return
    if config.teacher.model is not None or (
        config.selection and config.selection[0].name == "jest"
    ):
        raise ValueError(
            f"{_image_size(segment)}, but the frozen model of teacher.model or selection.jest "
            "reads one size; leave one of them out"
        )

    # Built once, without weights: what the tower refuses it refuses now.
    built = _resized(final, segment)
    weights = image_size.fitted(built.state_dict(), final.visual, built.image_spec.size)
    shapes = {name: tuple(value.shape) for name, value in final.state_dict().items()}
    for name, value in weights.items():
        # Under adapters a layer has another name, and no positions.
        if name in shapes and tuple(value.shape) != shapes[name]:
            raise ValueError(
                f"{_image_size(segment)}, at which {name} of the image tower is "
                f"{tuple(value.shape)}, which cannot be interpolated to {shapes[name]}; leave "
                "image_size out, or take the tower 'vit'"
            )


def _resized(model: DualEncoder, segment: Segment) -> DualEncoder:
    """A model of the form of `model`, with random weights, for the pictures of a stage; what
    refuses them names the stage.
    """
    assert segment.stage is not None, "called for a stage with image_size"
    described = model.description()
    model_cfg = described["model_cfg"]
    vision_cfg = model_cfg["vision_cfg"] | {"image_size": plain(segment.stage.image_size)}
    described["model_cfg"] = model_cfg | {"vision_cfg": vision_cfg}
    try:
        return from_description(described)
    except ValueError as error:
        raise ValueError(f"{_image_size(segment)}: {error}") from None


def _image_size(segment: Segment) -> str:
    """What a stage says of its pictures, for a message."""
    assert segment.stage is not None, "called for a stage with image_size"
    size = image_size.shown(image_size.pair(segment.stage.image_size))
    return f"stages.{segment.number - 1}.image_size is {size}"


# --- at a joint -----------------------------------------------------------------------------------


def joint(config: Config, step: int) -> Path:
    """The checkpoint with which a stage ended, and from which the next one starts."""
    return Path(config.out) / checkpoint.FOLDER / f"step_{step:08d}"


def in_form_of(model: DualEncoder, contents: checkpoint.Contents) -> checkpoint.Contents:
    """What a checkpoint holds, with the positions of `model`, and moments to them."""
    # An architecture may leave its size to open_clip.
    vision_cfg = contents.description["model_cfg"]["vision_cfg"]
    trained_on = image_size.pair(vision_cfg.get("image_size", CLIPVisionCfg.image_size))

    # Nothing is read here that the model would read again.
    if image_size.pair(model.visual.image_size) == trained_on:
        return contents

    def fit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return image_size.fitted(tensors, model.visual, trained_on)

    # Read once: of a checkpoint in parts every access makes the tensor anew.
    stored = dict(contents.model)
    weights = fit(stored)
    changed = [name for name, value in weights.items() if value is not stored[name]]
    if not changed:
        return replace(contents, model=stored)

    teacher = dict(contents.teacher)
    average = {
        name.removeprefix(EMA): value for name, value in teacher.items() if name.startswith(EMA)
    }
    teacher |= {EMA + name: value for name, value in fit(average).items()}
    optimizer = dict(read_once(contents.optimizer))
    for name in changed:
        optimizer = _moments_fitted(optimizer, name, stored[name], fit)
    return replace(contents, model=weights, teacher=teacher, optimizer=optimizer)


def _moments_fitted(
    optimizer: Mapping[str, Tensor],
    name: str,
    old: Tensor,
    fit: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The optimiser's tensors with those of parameter `name`, which was `old`, in its new shape."""
    moments = {key: value for key, value in optimizer.items() if key.endswith(f".{name}")}
    others = {key: value for key, value in optimizer.items() if key not in moments}

    # Factored or of matrices: nothing says what they are at another size.
    if any(value.ndim and value.shape != old.shape for value in moments.values()):
        return others

    for key, value in moments.items():
        if not value.ndim:  # a count of steps
            continue
        moment = fit({name: value})[name]
        # Bicubic weights are negative in places, and a mean of squares is not.
        moments[key] = moment.clamp(min=0) if value.min() >= 0 else moment
    return {**others, **moments}


def final_form(segments: list[Segment], model: DualEncoder) -> DualEncoder:
    """The model in which the run ends: `model`, which is as configured, or one of the same form,
    with random weights, for the pictures of the last segment.
    """
    stage = segments[-1].stage
    return model if stage is None or stage.image_size is None else _resized(model, segments[-1])


def in_final_form(model: DualEncoder, description: Mapping[str, Any]) -> DualEncoder:
    """A model of a stage in the form of the run's end, its positions interpolated."""
    final = from_description(dict(description)).to(next(model.parameters()).device)
    if final.image_spec == model.image_spec:
        return model
    # Adapters are of training alone, and the final form is described without them.
    weights = adapters.merged(model.state_dict(), model.lora_scalings)
    final.load_state_dict(image_size.fitted(weights, final.visual, model.image_spec.size))
    return final.eval()
