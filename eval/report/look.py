"""The newest checkpoint on the run's own evaluation sets, a bounded sample of each; what cannot be
had is a note.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp import checkpoint, plugin
from vlp.eval import choices, distributions, embed, metrics, models, prompts
from vlp.eval.pictures import Picture, thumbnail
from vlp.eval.report import findings
from vlp.eval.report.evidence import Confusion, Evidence, Example, ExampleSet, Sheets, Space
from vlp.eval.report.runs import Run
from vlp.eval.tasks import negatives, zeroshot
from vlp.joining import local_device

# sets that `vlp data scenes` and the demo lay beside the others
PROOFS = ("counting", "binding", "relations", "order")
MAX_PROMPTS = 2000  # classes × templates; more templates are left out
WORST, QUERIES, EXAMPLES, ASKED = 10, 6, 5, 10
THUMBNAIL_PX = 96

# measure -> its name for the eye, in the order of the page
MEASURES = {
    "modality_gap": "modality gap",
    "alignment": "alignment",
    "uniformity_image": "uniformity of images",
    "uniformity_text": "uniformity of texts",
    "effective_rank_image": "effective rank of images",
    "effective_rank_text": "effective rank of texts",
    "auc": "pairs above others (AUC)",
    "score_overlap": "overlap of their scores",
}


def beside(run: Run) -> list[str]:
    """The sets with negatives that lie in the run's own folder, as those of the demo do."""
    places = [run.folder / "data" / name for name in PROOFS]
    return [str(place) for place in places if place.is_dir()]


def look(run: Run, data: list[str], samples: int) -> Evidence:
    """What the page shows of the run's newest complete checkpoint: at most `samples` items of each
    set.

    `data`: sets with negatives besides those of the run's configuration.
    """
    evidence = Evidence()
    path = checkpoint.newest(run.folder)
    if path is None:
        state = "the run has no checkpoint"
        if run.checkpoints:
            state = f"all {len(run.checkpoints)} checkpoints are damaged"
        evidence.note("model", f"{state}; only what the run logged is shown")
        return evidence

    with evidence.attempt("model", f"the model of {path.name} cannot be loaded"):
        encoder = models.load(str(path), local_device("auto", shared=True))
        evidence.model = path.name
    if not evidence.model:
        return evidence

    context = embed.Context(workers=min(4, os.cpu_count() or 1))
    parts = _Parts(encoder, run, evidence, samples, context)
    parts.pairs()
    parts.classes()
    parts.proofs(data)
    return evidence


@dataclass
class _Parts:
    """Fills the evidence, a part a method."""

    encoder: models.Encoder
    run: Run
    evidence: Evidence
    samples: int
    context: embed.Context

    def pairs(self) -> None:
        """Embeddings in the plane and retrieval sheets, from the first set of pairs that opens."""
        source = self._opened("pairs", ("retrieval", "representation"))
        if source is None:
            return

        with self.evidence.attempt("pairs", source.name):
            records = _sample(source.records, self.samples)
            pictures = [record.picture for record in records]
            captions: list[str] = []
            first, owner = [], []
            for i, record in enumerate(records):
                first.append(len(captions))
                captions += record.captions
                owner += [i] * len(record.captions)

            # The plane shows each image with its first caption; retrieval is among all.
            image = embed.images(self.encoder, pictures, self.context)
            text = embed.texts(self.encoder, captions, self.context)
            first_captions = [captions[i] for i in first]
            self.evidence.space = _space(source.name, first_captions, image, text[first])
            self.evidence.sheets = _sheets(
                source.name, pictures, captions, torch.tensor(owner), image, text
            )

    def classes(self) -> None:
        """The classes that zero-shot classification confuses most."""
        data = self._opened("classes", ("zeroshot",))
        if data is None:
            return
        if data.labels.ndim == 2:
            self.evidence.note(
                "classes",
                f"{data.source.name} has several labels a picture: no confusion of classes",
            )
            return
        with self.evidence.attempt("classes", data.source.name):
            self.evidence.confusion = self._confusion(data)

    def _confusion(self, data: zeroshot.Data) -> Confusion:
        """The worst classes of a sample of the set, with a mistaken picture each."""
        places = _sample(range(len(data.labels)), self.samples)
        pictures = [data.source.records[i].picture for i in places]
        labels = data.labels[places]

        # A thousand classes in eighty templates take longer than the page is worth.
        n_templates = max(1, MAX_PROMPTS // len(data.classes))
        templates = prompts.first(data.templates, n_templates)
        classes = zeroshot.class_embeddings(self.encoder, templates, data.classes, self.context)
        image = embed.images(self.encoder, pictures, self.context)

        answers = (image @ classes.T).argmax(1)
        accuracy = float((answers == labels).double().mean())
        worst = findings.confusions(answers, labels, WORST)
        mistaken = [answers.wrong for answers in worst if answers.wrong is not None]
        thumbnails = {place: thumbnail(pictures[place], THUMBNAIL_PX) for place in mistaken}
        return Confusion(data.source.name, len(labels), accuracy, data.classes, worst, thumbnails)

    def proofs(self, more: list[str]) -> None:
        """Examples from every set with negatives: the configuration's, and `more`."""
        configured = _tasks(self.run, self.evidence, "examples", ("negatives",))
        options_of_sets = [negatives.Options(place) for place in more]
        options_of_sets += [task.options for task in configured]

        # A set that is named twice is shown once, as the configuration has it.
        by_place = {Path(options.data).resolve(): options for options in options_of_sets}
        if not by_place:
            self.evidence.note(
                "examples",
                "no set with negatives: name one under eval (task negatives) or with --data",
            )
        for options in by_place.values():
            with self.evidence.attempt("examples", Path(options.data).name):
                self.evidence.examples.append(self._examples(negatives.read(options)))

    def _examples(self, data: negatives.Data) -> ExampleSet:
        """A few choices of a set, and how often the true caption won on the whole sample."""
        sample = _sample(data.choices, self.samples)
        captions = [choice.captions for choice in sample]
        pictures = [choice.picture for choice in sample]
        scores = choices.cosines(self.encoder, pictures, captions, self.context)

        places, hits = findings.examples_to_show(scores, EXAMPLES)
        items = [
            Example(
                thumbnail(pictures[i], THUMBNAIL_PX),
                list(zip(captions[i], scores[i].tolist())),
                hits[i],
            )
            for i in places
        ]
        accuracy = sum(hits) / len(hits)
        return ExampleSet(data.name, len(hits), accuracy, choices.chance(captions), items)

    def _opened(self, section: str, names: tuple[str, ...]) -> Any:
        """The data of the first of these tasks that opens, or None with a note."""
        # A set that is gone costs only its note: the next one may open.
        tasks = _tasks(self.run, self.evidence, section, names)
        for task in tasks:
            with self.evidence.attempt(section, task.label):
                return task.module.read(task.options)
        if not tasks:
            self.evidence.note(
                section, f"the configuration's eval section names no {' or '.join(names)} task"
            )
        return None


# --- the run's tasks ------------------------------------------------------------------------------


def _tasks(
    run: Run, evidence: Evidence, section: str, names: tuple[str, ...]
) -> list[plugin.Plugin]:
    """The configured tasks of these names, in their order; a note on each that is malformed."""
    tasks = []
    for name in names:
        options = (run.config.get("eval") or {}).get(name, [])
        for item in options if isinstance(options, list) else [options]:
            with evidence.attempt(section, f"eval.{name}"):
                parsed = plugin.keyed("vlp.eval.tasks", {name: item})
                tasks += [_located(task, run) for task in parsed]
    return tasks


def _located(task: plugin.Plugin, run: Run) -> plugin.Plugin:
    """The task with paths that lay inside the run's folder found there, if the run was moved or
    another folder is current.
    """
    out = Path(str(run.config.get("out", "")))
    moved = {}
    for key in {"data", "images"} & {option.name for option in fields(task.options)}:
        # Only what is not where it was: data elsewhere stay where the configuration has them.
        value = getattr(task.options, key)
        if value and not Path(value).exists() and Path(value).is_relative_to(out):
            moved[key] = str(run.folder / Path(value).relative_to(out))
    return replace(task, options=replace(task.options, **moved))


def _sample(items: Sequence[Any], n: int) -> list:
    """At most `n` of the items, always the same ones, in their order; drawn, because sets often go
    round by class.
    """
    if len(items) <= n:
        return list(items)
    places = random.Random(0).sample(range(len(items)), n)
    return [items[place] for place in sorted(places)]


# --- values for the page --------------------------------------------------------------------------


def _space(name: str, captions: list[str], image: Tensor, text: Tensor) -> Space:
    scores = distributions.pair_scores(image, text)
    values = metrics.geometry(image, text) | scores.values
    measures = {shown_name: values[key] for key, shown_name in MEASURES.items()}
    own, other = (shares.tolist() for shares in scores.shares)
    return Space(name, captions, findings.projection(image, text), measures, (own, other))


def _sheets(
    name: str,
    pictures: list[Picture],
    captions: list[str],
    owner: Tensor,
    image: Tensor,
    text: Tensor,
) -> Sheets:
    """Retrieval both ways among the sample, with what the page shows of it."""
    # A caption seeks its one image; an image any of its captions.
    image_ranks, text_ranks = metrics.retrieval_ranks(image, text, owner)
    right = owner[:, None] == torch.arange(len(image))  # [captions, images]
    of_texts = findings.Ranking(text, image, right, text_ranks)
    of_images = findings.Ranking(image, text, right.T, image_ranks)
    by_text = findings.queries(of_texts, QUERIES)
    by_image = findings.queries(of_images, QUERIES)
    asked = findings.asked(of_texts, ASKED)

    # Only pictures that the page shows become thumbnails.
    shown = {query.place for query in by_image}
    for query in (*by_text, *asked):
        shown |= {candidate.place for candidate in query.best}
        shown.add(query.right[0])
    recall = {
        "by_text": float((text_ranks == 1).double().mean()),
        "by_image": float((image_ranks == 1).double().mean()),
    }
    thumbnails = {i: thumbnail(pictures[i], THUMBNAIL_PX) for i in sorted(shown)}
    return Sheets(name, captions, len(image), recall, by_text, by_image, asked, thumbnails)
