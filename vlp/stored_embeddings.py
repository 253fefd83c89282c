"""Whether embeddings that a run reads from its data are those of the model that they stand for.

A file of embeddings says which samples it belongs to, and a width; both fit many models. So a few
samples are embedded again before the first step, by the run's own locked image tower, by the
teacher or by the language model that the files name, and compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vlp import checkpoint, dist, log
from vlp.config import Captions
from vlp.data import decode
from vlp.data import text as tokenizers
from vlp.data.embedded import Embeddings, Ensemble, Stored
from vlp.data.row import Row, choose_caption
from vlp.data.sources import Source
from vlp.models import language
from vlp.models.concatenated import Concatenated
from vlp.models.dual_encoder import DualEncoder
from vlp.text_store import TextStore
from vlp.types import ImageSpec, Sample

N_SAMPLES = 8  # of each source
MARGIN = 0.002  # by which another sample's row may lie nearer: equal pictures, rounding
# float16, bfloat16 and a library's own resizing stay above; other weights, pixels or rows do not
LEAST_COSINE = 0.99


def check(
    sources: list[Source], model: DualEncoder, captions: Captions, *, precomputed: bool
) -> None:
    """Raise ValueError where a source's `embeddings` are not those of `model`'s image tower, or of
    the teachers they name, or lack captions that training draws.

    What cannot be compared, because the teacher or the pixels are not here, is said. Collective:
    the first rank compares.
    """
    problem = None
    if dist.is_main():
        try:
            for source in sources:
                if source.embeddings is not None:
                    _check(source, source.embeddings, model, captions, precomputed)
        except ValueError as error:
            problem = str(error)

    # Every rank raises what the first one found.
    problem = dist.broadcast_object(problem)
    if problem:
        raise ValueError(problem)


def _check(
    source: Source,
    ensemble: Ensemble,
    model: DualEncoder,
    captions: Captions,
    precomputed: bool,
) -> None:
    for embeddings in ensemble.members:
        # Before a teacher is loaded.
        if embeddings.every_caption and not precomputed:
            for sample in _few(source):
                _text_row(embeddings, sample, _caption_of(sample, captions))

        judge = model if precomputed else _teacher(embeddings.teacher.model, embeddings.folder)
        if judge is not None:  # else said already
            compare(source, embeddings, judge, captions, precomputed=precomputed)


def check_with_teacher(source: Source) -> None:
    """Raise ValueError where a source's `embeddings`, of pictures and first captions, are not those
    of the teachers they name.
    """
    assert source.embeddings is not None
    for embeddings in source.embeddings.members:
        judge = _teacher(embeddings.teacher.model, embeddings.folder)
        if judge is not None:
            compare(source, embeddings, judge, None, precomputed=False)


def check_texts(
    sources: list[Source],
    store: TextStore | None,
    model: DualEncoder,
    captions: Captions,
    *,
    evaluates: bool,
) -> None:
    """Raise ValueError where a store of text embeddings lacks the captions of a few samples, or
    holds others than its language model gives them.

    A language model that is not here is said, and refused where the run evaluates. Collective: the
    first rank compares.
    """
    problem = None
    if store is not None and dist.is_main():
        try:
            for source in sources:
                texts = [_caption_of(sample, captions) for sample in _few(source)]
                _check_texts(store, texts, model, evaluates)
        except ValueError as error:
            problem = str(error)
        finally:
            language.forget()

    problem = dist.broadcast_object(problem)
    if problem:
        raise ValueError(problem)


def _check_texts(store: TextStore, texts: list[str], model: DualEncoder, evaluates: bool) -> None:
    store.check(texts)
    stored, _ = store.tokenize(texts)
    name = store.writer.model

    # An adaptor reads rows of any order and of any model of its width.
    tower = model.text
    assert isinstance(tower, language.LanguageTower)
    try:
        if Path(name).is_absolute() and not Path(name).exists():
            raise ValueError("no such folder")
        ids = tokenizers.build(model.text_spec)(texts)
        with torch.no_grad():
            again = tower.pooled(ids).float()
    except language.OtherWeightsError:
        raise
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        if evaluates:
            raise ValueError(
                f"eval needs the language model {name}, which cannot be run here ({reason}); put "
                "it there, or set eval: {}"
            ) from None
        log.warn(f"{store.folders}: not compared with {name}, which cannot be run here ({reason})")
        return
    _compare("text", again, stored, store.folders, name, " --text-model")


def _few(source: Source) -> list[Sample]:
    """Up to N_SAMPLES samples that can be read."""
    samples = []
    for number in _places(source):
        try:
            samples.append(source[number])
        except (OSError, ValueError):
            continue  # the loader counts and names it
        if len(samples) == N_SAMPLES:
            break
    return samples


def _caption_of(sample: Sample, captions: Captions) -> str:
    """A caption of the sample that training may draw."""
    return choose_caption(Row(sample, 0, 0, 0), captions)


def compare(
    source: Source,
    embeddings: Embeddings,
    judge: DualEncoder | Concatenated,
    captions: Captions | None,
    *,
    precomputed: bool,
) -> None:
    """Embed a few samples again with `judge`; ValueError where they are not what is stored.
    `precomputed`: images stand in for the run's own tower. Pictures are not compared where the
    source says that others were embedded.
    """
    folder, name = embeddings.folder, embeddings.teacher.model
    samples, pixels = _opened(source, judge.image_spec)
    if not samples:
        log.say(f"{folder}: not compared with {name}, because no picture could be opened")
        return

    whose = "this run's image tower" if precomputed else name
    compares_pictures = precomputed or not source.other_pictures
    if compares_pictures:
        stored = [_image_row(embeddings, sample) for sample in samples]
        _compare("image", _embedded(judge, image=pixels), _stacked(stored), folder, whose)

    # Crops say besides whether they are still cut as they were.
    if embeddings.views is not None and compares_pictures:
        cut, spec = embeddings.views, judge.image_spec
        crops = [cut.pixels(sample.image, sample.key, 0, spec) for sample in samples]
        again = _embedded(judge, image=torch.stack(crops))
        stored = [_image_row(embeddings, sample, 0) for sample in samples]
        _compare("image", again, _stacked(stored), folder, whose, " --views")

    if not precomputed and embeddings.with_text:
        texts = [sample.captions[0] for sample in samples]
        stored = [_text_row(embeddings, sample) for sample in samples]
        if embeddings.every_caption and captions is not None:
            texts = [_caption_of(sample, captions) for sample in samples]
            stored = [_text_row(embeddings, sample, text) for sample, text in zip(samples, texts)]
        tokens = tokenizers.build(judge.text_spec)(texts)
        _compare("text", _embedded(judge, text=tokens), _stacked(stored), folder, whose)


def _image_row(embeddings: Embeddings, sample: Sample, view: int | None = None) -> np.ndarray:
    """What one teacher's embeddings hold, [D], of the sample's picture, or of a stored view."""
    _, shard, place = _stored(sample)
    return embeddings.image(shard, place, view)


def _text_row(embeddings: Embeddings, sample: Sample, caption: str | None = None) -> np.ndarray:
    """The same of its first caption, or of another one."""
    _, shard, place = _stored(sample)
    return embeddings.text(shard, place, caption)


def _stored(sample: Sample) -> Stored:
    assert sample.embeddings is not None, "a source with embeddings gives them to each sample"
    return sample.embeddings


def _stacked(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows)).float()


def _teacher(name: str, folder: str) -> DualEncoder | Concatenated | None:
    """The model that made the embeddings, where it lies on this machine."""
    if not Path(name.removeprefix("local-dir:")).expanduser().exists():
        log.say(f"{folder}: not compared with {name}, which is not on this machine")
        return None

    try:
        return checkpoint.load_any(name).eval()
    except (ValueError, checkpoint.CheckpointError) as error:
        log.say(f"{folder}: not compared with {name}, which cannot be loaded here ({error})")
        return None


def _opened(source: Source, spec: ImageSpec) -> tuple[list[Sample], Tensor]:
    """Up to N_SAMPLES samples that open, with their pixels."""
    samples, pixels = [], []
    for number in _places(source):
        try:
            sample = source[number]
            picture = decode.eval_transform(sample.image, spec)
        except (OSError, ValueError):
            continue  # the loader counts and names it

        samples.append(sample)
        pixels.append(picture)
        if len(samples) == N_SAMPLES:
            break
    return samples, torch.stack(pixels) if pixels else torch.empty(0)


def _places(source: Source) -> list[int]:
    """Numbers of samples to try, spread over the source (its first ones where shards are fetched
    whole).
    """
    n_tried = 4 * N_SAMPLES
    places = np.linspace(0, len(source) - 1, n_tried).astype(int)

    # Spread over all shards, they would have to be fetched whole.
    if source.window or source.reserve:
        places = np.arange(n_tried)
    numbers = list(dict.fromkeys(int(i) for i in places if i < len(source)))

    # Every fourth first; the others stand in for pictures that do not open.
    stand_ins = [number for place, number in enumerate(numbers) if place % 4]
    return numbers[::4] + stand_ins


@torch.no_grad()
def _embedded(model: nn.Module, **rows: Tensor) -> Tensor:
    """[n, D] by `model` in evaluation mode, whose mode is put back."""
    [side] = rows

    # Locked towers alone are in evaluation mode already; a whole model is not.
    was_training = model.training
    model.eval()
    embedded = getattr(model(**rows), side).float()
    model.train(was_training)
    return embedded


def _compare(
    side: str, again: Tensor, stored: Tensor, folder: str, whose: str, option: str = ""
) -> None:
    """ValueError unless each stored row is the one embedded again, and no other sample's. `option`:
    of `vlp data embed`, which makes such embeddings.
    """
    made_by = f"made by {whose}"
    if again.shape != stored.shape:
        width = stored.shape[1]
        raise ValueError(
            f"{folder}: {side} embeddings of width {width} are not {made_by}, whose width is "
            f"{again.shape[1]}"
        )

    # A row of another sample that lies clearly nearer: the order of samples differs.
    cosines = cosine_similarity(again, stored)
    others = cosine_similarity(again[:, None], stored[None], dim=-1).fill_diagonal_(-1)
    swapped = (others.max(dim=1).values > cosines + MARGIN) & stored.any(dim=1)
    if cosines.min() >= LEAST_COSINE and not swapped.any():
        return

    # What differs is not known; the cosines let the user tell.
    shown = ", ".join(f"{cosine:.3f}" for cosine in cosines.tolist())
    nearer = "; some lie nearer to the row of another sample" if swapped.any() else ""
    raise ValueError(
        f"{folder}: the {side} embeddings are not {made_by}: {len(cosines)} samples embedded again "
        f"have cosines {shown} with them, expected at least {LEAST_COSINE}{nearer}. Weights, "
        "picture size, or the order of samples differ; make them anew with `vlp data "
        f"embed{option}` and this model"
    )
