"""The sections about the run itself: `train`, `pairwise`, `checkpoint` and `log`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vlp.config.durations import Duration
from vlp.config.optimizer import Optimizer
from vlp.config.running import Best


@dataclass(frozen=True)
class Train:
    """How long, how large and on what."""

    # how long to train: 1000 (steps), 3ep (epochs), 200ksamples or 2Msamples (samples seen)
    duration: Duration
    batch: int  # global: rows of one step over all ranks
    # a rank's rows of a step are embedded in this many parts; the loss still sees all of them
    micro_batches: int = 1
    # most texts that a micro-batch embeds: rows with several captions, or hard ones, are cut into
    # more micro-batches than micro_batches says; None: no bound
    max_texts: int | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    # of the towers' arithmetic; auto: the faster one, as a short measurement finds
    precision: Literal["auto", "float32", "bf16"] = "auto"
    # what keeps ranks in step; auto: what the launcher set up
    engine: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    # torch.compile of the towers' blocks: slower start, faster steps; auto: on GPUs where it works,
    # not with ZeRO
    compile: Literal["auto", True, False] = "auto"
    # fsdp2: gather the weights anew for every forward and backward, instead of once a step; auto:
    # with one micro-batch, and where the whole weights would take over a quarter of a GPU's memory
    reshard: Literal["auto", True, False] = "auto"
    # recompute activations in the backward pass: less memory, more time
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    # longest wait of a rank for another in a step's exchanges, before the run ends with an error;
    # for a save, a check of checkpoints or an evaluation of the first rank the others wait on
    timeout_minutes: float = 30.0
    # a step with NaN or infinity: end the run, or leave the step out
    non_finite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10  # steps that `skip` leaves out in the whole run; one more ends it

    def __post_init__(self) -> None:
        # A percentage of itself is no length.
        if self.duration.unit == "%" or not self.duration.value:
            raise ValueError(
                f"duration is {self.duration.to_config()}; expected steps (1000), epochs (3ep) "
                "or samples (2Msamples), more than none"
            )
        if self.batch < 1 or self.micro_batches < 1:
            raise ValueError("batch and micro_batches must be at least 1")
        if self.max_texts is not None and self.max_texts < 1:
            raise ValueError(f"max_texts is {self.max_texts}; expected at least 1, or null")
        if not 0 < self.timeout_minutes < float("inf"):
            raise ValueError(
                f"timeout_minutes is {self.timeout_minutes}; expected a positive number, such as 30"
            )
        if self.max_skipped < 1:
            raise ValueError(
                f"max_skipped is {self.max_skipped}; expected at least 1, or non_finite: stop"
            )


@dataclass(frozen=True)
class Pairwise:
    """How the pairs of a step are formed and computed (vlp.pairwise)."""

    # which ranks give candidates: auto, local, global, ring, or
    # {group: 8, layout: contiguous | strided | alternating}
    topology: Any = "auto"
    # dense: whole score matrices, the reference; tiled: any device; triton: CUDA kernels; auto:
    # the fastest that runs here
    impl: Literal["auto", "dense", "tiled", "triton"] = "auto"
    # bytes of score tiles to keep for backward; None: twice the candidates' embeddings
    memory_budget: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """When a run is saved and how many saves stay."""

    # how often a checkpoint is written; one is written at the end in any case
    every: Duration = Duration(25, "%")
    keep: int = 2  # how many checkpoints stay, the newest ones
    # how often one is written that stays for good; null: none does
    keep_every: Duration | None = None
    # the score by which the best one stays beside them: LABEL.METRIC or {metric, mode: min | max}
    best: str | Best | None = None

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep is {self.keep}; expected at least 1")


@dataclass(frozen=True)
class Log:
    """Reports while training; everything also goes to metrics.jsonl of the run."""

    every: Duration = Duration(10, "steps")  # how often the scalars of a step are reported
    # where metrics go besides metrics.jsonl
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
