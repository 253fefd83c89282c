"""The loss of the run's objective over held-out samples: the same rows in the same batches every
time, on any number of ranks.

Towers are in evaluation mode, and nothing moves: no statistic, queue, average or estimate. A term
reads the queues, averages and thresholds of the run as they are; estimates that are kept for each
sample are new, as at a sample's first visit, for held-out samples have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlp import dist, lifetime, losses, online_judge, passes
from vlp.checks import check_needs
from vlp.config import Augment, Config, Data, Plan, Validation
from vlp.copies import copied
from vlp.data import looks
from vlp.data.embedded import Teacher
from vlp.data.loader import Loader
from vlp.leaving import wait_for_rows
from vlp.lifetime import Interrupted
from vlp.log import warn
from vlp.measurements import means_over_ranks
from vlp.models.dual_encoder import DualEncoder
from vlp.plugin import KeyedPlugins
from vlp.seeds import derive
from vlp.text_store import TextStore
from vlp.training import Training
from vlp.types import Batch, TextSpec

# Of a square picture all, of another one its middle: what evaluation shows a model.
_MIDDLE = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))
_SEED = 0  # of rows and captions: the same ones in every run


class Validator:
    """Measures `config.validation`; built once, before the engine takes over the model."""

    def __init__(
        self,
        options: Validation,
        config: Config,
        data: Data,
        model: DualEncoder,
        text: TextSpec,
        training: Loader,
    ) -> None:
        """config, model, text: the stage's, where the run has stages; data: the run's, as its
        loader reads it; training: that loader.
        """
        self.options, self.scale = options, options.scale
        self.batch = options.batch or config.train.batch
        self.rows_at_once = config.train.batch // dist.world_size() // config.train.micro_batches
        try:
            self.loader = _loader(options, config, data, model, text, self.batch, training.store)
        except (ValueError, OSError) as error:
            raise ValueError(f"validation: {error}") from error

        check_teachers(self.loader.teachers, training.teachers)

        self.n_batches = self.batches_of(self.batch)
        if dist.is_main():
            _warn_of_overlap(training, self.loader)

    def batches_of(self, batch: int) -> int:
        """How many batches of this size are measured; ValueError where the samples fill none."""
        try:
            n_batches = self.loader.epoch_steps(batch)
        except ValueError as error:
            raise ValueError(f"validation: {error}") from error

        n_samples = self.options.samples
        if n_samples is not None:
            n_batches = min(n_batches, n_samples // batch)
        if not n_batches:
            raise ValueError(
                f"validation.samples is {n_samples}, less than a batch of {batch}; set "
                "validation.batch lower"
            )
        return n_batches

    def prepare(
        self, config: Config, plan: Plan, model: DualEncoder, supplied: frozenset[str]
    ) -> None:
        """Build the objective; ValueError where the samples lack what a term needs. supplied: what
        a teacher gives.
        """
        # Weights that move would move the loss, whatever becomes of the model.
        final = [replace(term, common=term.common.final()) for term in config.objective]
        self.objective = losses.build(
            KeyedPlugins(final),
            **vars(config.pairwise),
            seed=config.seed,
            samples=self.loader.n_samples,
            steps=plan.total,
        )
        try:
            stored = set() if self.loader.teacher_scale is None else {"teacher_scale"}
            check_needs(self.objective, self.loader.carries | stored | supplied, model)
            n_rows = self.batch // dist.world_size()
            online_judge.check_candidates(config, self.objective, n_rows)
        except ValueError as error:
            raise ValueError(f"validation: {error}") from error

    def measure(self, training: Training) -> dict[str, float]:
        """ "loss" and every term, means over the batches. Collective; raises Interrupted on every
        rank where one was asked to stop, or cannot have the samples.
        """
        model = training.engine.evaluation_model().eval()
        self._take_state(training.objective)
        self.loader.go_to(0)
        sums: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for number in range(self.n_batches):
                    batch = _next_together(self.loader)
                    values = self._values(training, model, batch, number)
                    sums = {name: value + sums.get(name, 0) for name, value in values.items()}
        finally:
            self.loader.close()
            training.engine.model.train()
        means = {name: value / self.n_batches for name, value in sums.items()}
        return means_over_ranks(means)

    def _take_state(self, objective: losses.Objective) -> None:
        """Read the run's thresholds and the like; its numbers of each sample are of others."""
        for label, state in objective.state.items():
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            self.objective.state[label].update(tensors)

    def _values(
        self, training: Training, model: DualEncoder, batch: Batch, number: int
    ) -> dict[str, Tensor]:
        """This rank's shares of a batch's loss and terms."""
        n_parts = _parts(len(batch), self.rows_at_once)
        on_device = copied(batch, training.engine.device)
        parts = on_device.split(n_parts)
        outputs = [passes.embed_by(training, model, part) for part in parts]
        leaves = {name: passes.leaf(name, outputs, training) for name in outputs[0]}
        if self.scale is not None:
            leaves["scale"] = torch.full_like(leaves["scale"], self.scale)

        constant = passes.labels(training, parts) | passes.teacher_forward(training, parts)
        rows = {**leaves, **constant}
        of_judge = passes.judged(training, self.objective, on_device, rows, None)
        torch.manual_seed(derive(_SEED, "validation", number, dist.rank()))
        # Without a step: no state moves, and it does not matter when the loss is measured.
        total, terms, _ = self.objective.evaluate(
            **passes.as_terms_read({**rows, **of_judge}), **training.constants
        )
        return {"loss": total, **terms}


def check_teachers(held_out: Sequence[Teacher], trained: Sequence[Teacher]) -> None:
    """Refuse held-out embeddings of other teachers than those of the training samples. ValueError.

    A teacher's name is no sign: the same model may lie in another folder.
    """
    for name, of_held_out, of_trained in (
        ("number of teachers", [len(held_out)], [len(trained)]),
        ("scale", [one.scale for one in held_out], [one.scale for one in trained]),
        ("width", [one.width for one in held_out], [one.width for one in trained]),
        ("hash of weights", *_known_weights(held_out, trained)),
    ):
        if of_held_out != of_trained:
            raise ValueError(
                f"validation: the embeddings of the held-out samples have the {name} "
                f"{', '.join(map(str, of_held_out))}, those of the training samples "
                f"{', '.join(map(str, of_trained))}; embed both with the same model (vlp data "
                "embed)"
            )


def _known_weights(
    held_out: Sequence[Teacher], trained: Sequence[Teacher]
) -> tuple[list[str], list[str]]:
    """The hashes of weights, teacher by teacher, where both files say them."""
    pairs = [(one.weights, other.weights) for one, other in zip(held_out, trained)]
    known = [pair for pair in pairs if all(pair)]
    return [one for one, _ in known], [other for _, other in known]


def _loader(
    options: Validation,
    config: Config,
    data: Data,
    model: DualEncoder,
    text: TextSpec,
    batch: int,
    store: TextStore | None,
) -> Loader:
    # In this process: loader processes of a second set would need their share of /dev/shm.
    held_out = replace(
        data,
        sources=options.data.sources,
        augment=_MIDDLE,
        together=1,
        one_source=False,
        replacement=False,
        lanes=1,  # the batches of before there were lanes, which a run's losses are compared over
        shuffle=True,
        workers=0,
    )
    with looks.once_a_machine(held_out.sources):
        return Loader(
            held_out,
            model.image_spec,
            text,
            batch=batch,
            batch_key="validation.batch",
            seed=_SEED,
            rank=dist.rank(),
            world=dist.world_size(),
            pixels=not config.model.precomputed,
            reads=losses.reads(config.objective) | online_judge.reads(config),
            store=store,
            stored_crops=False,
            modalities=model.modality_shapes,
            decoded=model.decoded_modalities,
            random_pieces=False,
        )


def _parts(n_rows: int, at_once: int) -> int:
    """Into how many equal parts rows are cut, so that no more are embedded at once than in a
    step.
    """
    divisors = (n for n in range(1, n_rows + 1) if n_rows % n == 0)
    return next(n for n in divisors if n_rows // n <= max(1, at_once))


def _next_together(loader: Loader) -> Batch:
    """The next batch; raises Interrupted on every rank if one was asked to stop, or cannot have the
    samples: all then save and leave. Collective.
    """
    stop = lifetime.pending()
    if stop is None:  # nobody would save
        return next(loader)

    is_ready = wait_for_rows(loader, stop, "validation: ")
    if any(dist.gather_objects(stop.asked or not is_ready)):
        raise Interrupted
    return next(loader)


def _warn_of_overlap(training: Loader, held_out: Loader) -> None:
    """Say which held-out shards are trained on."""
    trained: set[str] = set()
    for source in training.sources:
        trained |= {source.fingerprint(), *source.contents().digests}

    # Of shards without a digest nothing is known.
    trained = {digest for digest in trained if digest.strip("-")}
    for source in held_out.sources:
        contents = source.contents()
        names = [
            name for name, digest in zip(contents.names, contents.digests) if digest in trained
        ]
        if names or source.fingerprint() in trained:
            listed = ", ".join(names[:5]) or "a whole source"
            warn(
                f"validation: {listed} of the held-out samples are trained on, too, so that "
                "val.loss says little of others; name other shards in validation.data.sources"
            )
