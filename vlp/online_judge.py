"""The judge beside a run (`teacher.cross_encoder`): it reads pictures and captions of a step and
gives terms its scores, without gradient.

    candidate_texts, candidate_text_scores      the texts that the student finds hardest for each
                                                image of the batch (and of the queue), and their
                                                scores; the same of images for each text
    candidate_images, candidate_image_scores
    pair_score, score                           of each pair itself
    teacher_scores                              of its hard captions, where the data carry none

NaN: the judge does not say. It sees the pixels that the student sees, and captions as they are
written (vlp.data.raw_texts). Candidates may be of other ranks, whose pixels and captions are
gathered: n·(3·H·W + U) bytes on each rank of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from vlp import config, losses
from vlp.data.raw_texts import from_bytes
from vlp.judges import CROSS_ENCODER, Judge
from vlp.losses.distill import OF_CANDIDATES, Asked, hardest
from vlp.pairwise import Pairs
from vlp.pretrained.places import on_hub
from vlp.types import Batch

OF_BATCH = OF_CANDIDATES | {"pair_score"}
OF_CAPTIONS = frozenset({"teacher_scores", "score"})
OF_QUEUE = frozenset({"queue_pixels", "queue_caption_bytes"})
KEY = "teacher.cross_encoder"
_SIDES = (("image", "text"), ("text", "image"))


def named(options: config.Teacher, device: str = "cpu") -> Judge | None:
    """The judge that a configuration names; raises ValueError where it names none of the kinds."""
    text = options.cross_encoder
    if text is None:
        return None
    # A model alone is what the key is called after.
    if ":" not in text or on_hub(text):
        text = f"{CROSS_ENCODER}:{text}"
    return Judge.of(text, device, options.cross_encoder_batch, key=KEY)


def supplies(options: config.Teacher) -> frozenset[str]:
    """The keywords of `vlp.losses` that a run's judge can give."""
    return frozenset() if options.cross_encoder is None else OF_BATCH | OF_CAPTIONS


def reads(settings: config.Config) -> frozenset[str]:
    """What batches have to carry for the judge."""
    if settings.teacher.cross_encoder is None:
        return frozenset()
    ranks_captions = "teacher_scores" in losses.reads(settings.objective)
    return frozenset({"caption_bytes", "negatives_bytes"} if ranks_captions else {"caption_bytes"})


def asked(objective: losses.Objective) -> Asked | None:
    """Which candidates of a batch the terms ask for; None where none does. ValueError where two
    ask for different ones, which have one place.
    """
    by_term = {
        plugin.label: plugin.module.asks(plugin.options)
        for plugin in objective.plugins
        if hasattr(plugin.module, "asks")
    }
    different = {wish for wish in by_term.values() if wish is not None}
    if len(different) > 1:
        raise ValueError(
            f"terms ask the cross-encoder for different candidates, {by_term}; give all of them "
            "the same hardest and queue"
        )
    return next(iter(different), None)


def judged(objective: losses.Objective, carries: frozenset[str]) -> frozenset[str]:
    """The fields that the judge gives: what terms need and the data do not carry."""
    return (objective.needs & (OF_BATCH | OF_CAPTIONS)) - carries


def check(
    settings: config.Config, objective: losses.Objective, carries: frozenset[str], n_rows: int
) -> None:
    """Refuse a judge that no term asks, or that cannot judge what they ask. ValueError.

    carries: the fields of the data; n_rows: of this rank in a step.
    """
    check_candidates(settings, objective, n_rows)
    if settings.teacher.cross_encoder is None:
        return

    _check_use(objective, carries)
    if settings.model.precomputed:
        raise ValueError(
            f"{KEY} reads pictures, and image_tower.precomputed reads stored embeddings in their "
            "place; drop one of them"
        )
    wish = asked(objective)
    sizes = [stage.image_size for stage in settings.stages if stage.image_size is not None]
    if wish is not None and wish.queue and sizes:
        raise ValueError(
            f"{KEY} judges pictures of the queue, and stages have other image sizes, {sizes}; set "
            "distill.queue to false, or drop the stages' image_size"
        )


def check_candidates(settings: config.Config, objective: losses.Objective, n_rows: int) -> None:
    """Refuse terms that ask for more candidates than a row has others. n_rows: of this rank."""
    wish = asked(objective)
    if wish is None:
        return
    n_others = objective.candidates(n_rows) - 1
    n_queue = settings.teacher.queue if wish.queue else 0
    if wish.hardest > n_others + n_queue:
        raise ValueError(
            f"distill.hardest is {wish.hardest}, but a row has {n_others} other candidates and "
            f"{n_queue} of a queue; use at most {n_others + n_queue}, or a larger batch"
        )


def _check_use(objective: losses.Objective, carries: frozenset[str]) -> None:
    """Refuse a judge that nobody asks, and scores of one list by two judges."""
    if not judged(objective, carries):
        stored = sorted(objective.needs & OF_CAPTIONS & carries)
        if stored:
            raise ValueError(
                f"{KEY} is set, and the data carry {stored}, which terms read in its place; drop "
                f"{KEY}, or take data without stored scores"
            )
        raise ValueError(
            f"{KEY} is set, but no term asks it; add distill with form: ranking and candidates: "
            "batch, or of hard captions (ranking or margin), or drop it. The other forms, cross "
            "among them, compare a teacher's embeddings (teacher.model)"
        )

    for label, needs in objective.required.items():
        of_captions = needs & OF_CAPTIONS
        carried = of_captions & carries
        if carried and carried != of_captions:
            raise ValueError(
                f"the term {label!r} compares score and teacher_scores, of which the data carry "
                f"{sorted(carried)} and {KEY} would give the other: they would be of two judges; "
                "store both (vlp data mine --judge), or neither"
            )


@dataclass(frozen=True)
class Held:
    """Rows of the group's ranks and after them those of a queue, by place."""

    of_group: Tensor  # [n, …]
    of_queue: Tensor | None = None  # [Q, …]

    def at(self, places: Tensor) -> Tensor:
        """The rows at places [p]."""
        n = len(self.of_group)
        if self.of_queue is None:
            return self.of_group[places]

        # No copy of both in one tensor: a queue of pictures is large.
        rows = self.of_group[places.clamp(max=n - 1)]
        in_queue = places >= n
        rows[in_queue] = self.of_queue[places[in_queue] - n]
        return rows


class OnlineJudge:
    """The judge of a run, loaded."""

    def __init__(
        self,
        options: config.Teacher,
        objective: losses.Objective,
        carries: frozenset[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """carries: the fields of the data; dtype: of the towers' arithmetic, and of the judge's."""
        judge = named(options, str(device))
        assert judge is not None, "made only where one is named"
        judge.load()
        self.judge, self.device, self.dtype = judge, device, dtype
        self.asked, self.fields = asked(objective), judged(objective, carries)

    @property
    def queued(self) -> frozenset[str]:
        """What the queue has to hold for the judge, beside the keys."""
        with_queue = self.asked is not None and self.asked.queue
        return OF_QUEUE if with_queue else frozenset()

    def cost(self, n_captions: int, batch: int) -> str:
        """A line on what it adds to a step of `batch` rows with at most `n_captions` hard ones."""
        n_pairs = self.pairs_a_row(n_captions)
        return (
            f"{KEY} {self.judge.name} reads {n_pairs} pairs a row, {n_pairs * batch:,} a step, "
            f"{self.judge.batch} at once"
        )

    def pairs_a_row(self, n_captions: int) -> int:
        """How many pairs it reads for each row of a step, at most. n_captions: hard ones, K."""
        n_candidates = 0 if self.asked is None else 2 * self.asked.hardest
        n_own = 1 if self.fields & {"pair_score", "score"} else 0
        return n_candidates + n_own + (n_captions if "teacher_scores" in self.fields else 0)

    @torch.no_grad()
    def scores(self, batch: Batch, rows: Mapping[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
        """The fields that terms ask for, of this rank's rows of a step. Collective over the group.

        rows: embeddings of the batch, image and text, and what the queue holds.
        """
        result: dict[str, Tensor] = {}
        pictures, captions = Held(batch.image), Held(batch.caption_bytes)
        if self.fields & {"pair_score", "score"}:
            places = torch.arange(len(batch), device=self.device)
            own_scores = self._judged(pictures, places, captions, places)
            result |= dict.fromkeys(self.fields & {"pair_score", "score"}, own_scores)

        if self.asked is not None:
            result |= self._of_candidates(batch, rows, pairs, self.asked)
        if "teacher_scores" in self.fields:
            result["teacher_scores"] = self._of_captions(batch)
        return result

    def _of_candidates(
        self, batch: Batch, rows: Mapping[str, Tensor], pairs: Pairs, wish: Asked
    ) -> dict[str, Tensor]:
        """Places and scores of the hardest candidates of images and texts, [b, R]."""
        pixels, caption_bytes = pairs.gather(batch.image), pairs.gather(batch.caption_bytes)
        pictures, captions = Held(pixels), Held(caption_bytes)
        if wish.queue:
            pictures = Held(pixels, rows["queue_pixels"])
            captions = Held(caption_bytes, rows["queue_caption_bytes"])

        # This rank's own rows among those of the group.
        first = pairs.group.index * len(batch)
        own = torch.arange(first, first + len(batch), device=self.device)
        own = own.repeat_interleave(wish.hardest)

        result = {}
        for side, other in _SIDES:
            queue = rows[f"queue_{other}"] if wish.queue else None
            places = hardest(rows[side], rows[other], wish.hardest, pairs, queue)
            flat = places.flatten()
            of_pictures, of_captions = (own, flat) if side == "image" else (flat, own)
            scores = self._judged(pictures, of_pictures, captions, of_captions)
            if queue is not None:
                scores = _without_empty(scores, flat - len(pixels), queue)
            result[f"candidate_{other}s"] = places
            result[f"candidate_{other}_scores"] = scores.view_as(places)
        return result

    def _of_captions(self, batch: Batch) -> Tensor:
        """Scores of the hard captions, [b, K]; 0 where there is none, as in stored ones."""
        valid = batch.negatives_valid
        places = valid.nonzero()[:, 0]
        captions = Held(batch.negatives_bytes[valid])
        numbers = torch.arange(len(places), device=self.device)

        scores = torch.zeros(valid.shape, device=self.device)
        scores[valid] = self._judged(Held(batch.image), places, captions, numbers)
        return scores

    def _judged(
        self, pictures: Held, of_pictures: Tensor, captions: Held, of_captions: Tensor
    ) -> Tensor:
        """The scores [p] of pairs given by the places of their pictures and captions."""
        answers: list[float | None] = []
        for first in range(0, len(of_pictures), self.judge.batch):
            part = slice(first, first + self.judge.batch)
            # Each picture of a part is prepared once.
            distinct, numbers = of_pictures[part].unique(return_inverse=True)
            pixels = list(pictures.at(distinct))
            texts = from_bytes(captions.at(of_captions[part]))
            in_bf16 = self.dtype == torch.bfloat16
            with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16):
                answers += self.judge.scores([pixels[n] for n in numbers.tolist()], texts)

        scores = [nan if answer is None else answer for answer in answers]
        return torch.tensor(scores, dtype=torch.float32, device=self.device)


def _without_empty(scores: Tensor, places: Tensor, queue: Tensor) -> Tensor:
    """NaN for the places in a queue, from 0 on, that hold no key yet."""
    is_empty = ~queue.any(1)
    empty = (places >= 0) & is_empty[places.clamp(min=0)]
    return scores.masked_fill(empty, nan)
