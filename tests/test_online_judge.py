"""A judge in the step: the scores of a loop, at any number of ranks and micro-batches."""

from __future__ import annotations

import dataclasses
import zlib

import pytest
import torch

from tests import ranks
from tests.losses import distill_loops
from tests.test_step import ROWS, assert_close, make_batch, make_training, own_rows
from vlp import config
from vlp.data.raw_texts import CAPTION_BYTES, from_bytes, to_bytes
from vlp.online_judge import OF_BATCH, OnlineJudge
from vlp.passes import embed, judged
from vlp.step import train_step
from vlp.teacher import Teacher

R, QUEUE, STEPS = 4, 20, 2
JUDGE = f"{__name__}:by_bytes"
RANKING = {"form": "ranking", "candidates": "batch", "delta": 0.3, "hardest": R}
CAPTIONS = [f"caption {'é' * i} of {i}" for i in range(ROWS)]


def by_bytes(pictures: list, captions: list[str]) -> list[float]:
    """A judge in no order that embeddings could have: of the bytes of pixels and caption."""
    pairs = zip(pictures, captions, strict=True)
    return [zlib.crc32(picture.tobytes() + text.encode()) / 2**32 for picture, text in pairs]


def score(pixels: torch.Tensor, caption: str) -> float:
    """The judge's score, of the pixels as PIL keeps them."""
    return zlib.crc32(pixels.permute(1, 2, 0).contiguous().numpy().tobytes() + caption.encode()) / (
        2**32
    )


def batch_of(rows=slice(None), step: int = 0):
    """`make_batch`, other pictures at every step, with hard captions for some rows."""
    batch = make_batch(rows)
    valid = torch.arange(ROWS).unsqueeze(1) > torch.tensor([2, 7])
    texts = [[f"not {i}", f"nor {i}"] for i in range(ROWS)]
    written = to_bytes([text for row in texts for text in row]).view(ROWS, 2, -1)
    return dataclasses.replace(
        batch,
        image=batch.image + step,
        caption_bytes=to_bytes(CAPTIONS)[rows],
        negatives=make_batch().text.flip(0).unsqueeze(1).repeat(1, 2, 1)[rows],
        negatives_valid=valid[rows],
        negatives_bytes=written[rows],
    )


def undecided(pictures: list, captions: list[str]) -> list[float | None]:
    """The same, of captions that end in 1; it says nothing of others."""
    scores = zip(captions, by_bytes(pictures, captions))
    return [value if text.endswith("1") else None for text, value in scores]


def judging(
    micro_batches: int = 1, distill: list | None = None, queue: bool = False, judge: str = JUDGE
):
    """A training whose terms ask a judge."""
    terms = distill or [RANKING | {"queue": queue}]
    training = make_training(micro_batches, objective={"infonce": {}, "distill": terms})
    options = config.Teacher(
        ema=0.7 if queue else None,
        queue=QUEUE if queue else 0,
        cross_encoder=judge,
        cross_encoder_batch=5,
    )
    engine, objective = training.engine, training.objective
    training.judge = OnlineJudge(options, objective, frozenset(), engine.device, training.dtype)
    if queue:
        needs = objective.needs | training.judge.queued
        training.teacher = Teacher(options, engine, engine.evaluation_model(), needs, {})
    return training


def expected_fields(training, batch, queue=None):
    """What the judge should give, by loops over the embeddings of one process."""
    d = {name: value.detach() for name, value in embed(training, batch, 0).items()}
    own = [score(batch.image[i], CAPTIONS[i]) for i in range(ROWS)]
    fields = {"pair_score": torch.tensor(own, dtype=torch.float64)}

    pixels, captions = list(batch.image), list(CAPTIONS)
    if queue is not None:
        pixels += list(queue["queue_pixels"])
        captions += from_bytes(queue["queue_caption_bytes"])
    for side, other in (("image", "text"), ("text", "image")):
        columns = d[other] if queue is None else torch.cat([d[other], queue[f"queue_{other}"]])
        cosines = d[side] @ columns.T
        cosines[:, :ROWS].fill_diagonal_(-torch.inf)
        cosines[:, ~columns.any(1)] = -torch.inf
        places = cosines.topk(R, 1).indices
        scores = [
            score(pixels[i], captions[j]) if side == "image" else score(pixels[j], captions[i])
            for i in range(ROWS)
            for j in places[i].tolist()
        ]
        fields[f"candidate_{other}s"] = places
        fields[f"candidate_{other}_scores"] = torch.tensor(scores).double().view(ROWS, R)
    return d | fields | (queue or {})


def same(judged_fields, expected):
    assert judged_fields.keys() == OF_BATCH
    for name, value in judged_fields.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-6, atol=0)


def test_the_judges_scores_and_the_term_are_those_of_a_loop():
    training, batch = judging(), batch_of()
    expected = expected_fields(training, batch)
    same(judged(training, training.objective, batch, expected, 0), expected)
    term = train_step(training, batch)["distill.ranking"]
    loop = distill_loops.candidates(RANKING["delta"])(expected)
    torch.testing.assert_close(term, loop, rtol=1e-6, atol=0)
    assert term > 0.1


def test_keys_of_the_queue_are_judged_by_their_own_pictures_and_captions():
    training, n_queued = judging(queue=True), 0
    for step in range(STEPS + 1):
        batch = batch_of(step=step)
        queue = dict(training.teacher.queue)
        queue |= {name: queue[name].double() for name in ("queue_image", "queue_text")}
        expected = expected_fields(training, batch, queue)
        same(judged(training, training.objective, batch, expected, step), expected)
        n_queued += int((expected["candidate_texts"] >= ROWS).sum())
        loop = distill_loops.candidates(RANKING["delta"], queued=True)(expected)
        term = train_step(training, batch)["distill.ranking"]
        torch.testing.assert_close(term, loop, rtol=1e-6, atol=0)
    assert n_queued > 20


def test_empty_places_of_a_queue_take_no_part():
    """Of 12 rows with 13 candidates asked, two come from a queue that holds nothing yet."""
    distill = [RANKING | {"queue": True, "hardest": 13}]
    training, batch = judging(distill=distill, queue=True), batch_of()
    rows = embed(training, batch, 0) | training.teacher.queue
    fields = judged(training, training.objective, batch, rows, 0)
    empty = fields["candidate_texts"] >= ROWS
    assert empty.sum() == 2 * ROWS
    assert fields["candidate_text_scores"].isnan().equal(empty)
    assert train_step(training, batch)["loss"].isfinite()


def test_a_queue_saved_without_pictures_starts_empty(capsys):
    """A judge that came later would see a black picture and no caption for every saved key."""
    training = judging(queue=True)
    train_step(training, batch_of())
    saved = {name: value.clone() for name, value in training.teacher.queue.items()}
    assert all(value.any() for value in saved.values()) and len(saved) == 4
    options = config.Teacher(ema=0.7, queue=QUEUE, cross_encoder=JUDGE)
    engine, needs = training.engine, training.objective.needs | training.judge.queued
    for kept, is_whole in ((saved.keys(), True), ({"queue_image", "queue_text"}, False)):
        of_checkpoint = {name: saved[name] for name in kept}
        teacher = Teacher(options, engine, engine.evaluation_model(), needs, of_checkpoint)
        assert all(bool(value.any()) == is_whole for value in teacher.queue.values())
    assert "holds no queue_caption_bytes, queue_pixels" in capsys.readouterr().err


OF_CAPTIONS = [{"form": "ranking", "delta": 0.2}, {"form": "margin"}]
BOTH = [RANKING, *OF_CAPTIONS]


def weights_and_terms(micro_batches: int = 1, queue: bool = False):
    """Of STEPS steps of this rank."""
    training = judging(micro_batches, [RANKING | {"queue": queue}, *OF_CAPTIONS], queue)
    terms = []
    for step in range(STEPS):
        scalars = train_step(training, batch_of(own_rows(), step))
        terms.append([value.item() for name, value in scalars.items() if "distill" in name])
    weights, _ = training.engine.state(everywhere=True)
    held = {} if training.teacher is None else training.teacher.queue
    tensors = weights | {name: value.double() for name, value in held.items()}
    return terms, {name: value.flatten().tolist() for name, value in tensors.items()}


@pytest.mark.parametrize("queue", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ranks_and_micro_batches_change_nothing(queue):
    terms, tensors = weights_and_terms(queue=queue)
    assert {len(step) for step in terms} == {3} and all(all(step) for step in terms)
    expected = torch.tensor(terms, dtype=torch.float64)
    tolerance = 1e-6 if queue else 1e-9  # keys are of float32

    for results in ([weights_and_terms(3, queue)], ranks.run(2, weights_and_terms, 3, queue)):
        shares = [of_rank for of_rank, _ in results]
        mean = torch.tensor(shares, dtype=torch.float64).mean(0)
        torch.testing.assert_close(mean, expected, rtol=tolerance, atol=0)
        assert assert_close(results[0][1], tensors, tolerance) > 20


def test_hard_captions_are_judged_where_the_data_carry_no_scores():
    training, batch = judging(distill=OF_CAPTIONS), batch_of()
    fields = judged(training, training.objective, batch, embed(training, batch, 0), 0)
    assert fields.keys() == {"score", "teacher_scores"}
    n = 0
    for i, k in batch.negatives_valid.nonzero().tolist():
        wanted = score(batch.image[i], ["not", "nor"][k] + f" {i}")
        assert fields["teacher_scores"][i, k].item() == pytest.approx(wanted, rel=1e-6)
        n += 1
    assert n == 13 and not fields["teacher_scores"][~batch.negatives_valid].any()


def test_a_judge_may_say_nothing():
    training = judging(distill=BOTH, judge=f"{__name__}:undecided")
    batch = batch_of()
    fields = judged(training, training.objective, batch, embed(training, batch, 0), 0)
    assert (~fields["pair_score"].isnan()).nonzero().flatten().tolist() == [1, 11]
    unscored = fields["candidate_text_scores"].isnan()
    assert unscored.any() and not unscored.all()
    scalars = train_step(training, batch)
    assert all(scalars[name].isfinite() for name in ("loss", "grad_norm", "distill.ranking"))


def test_texts_travel_as_they_are_written():
    texts = [
        "",
        "a dog",
        "Ein Hühnchen läuft",
        "犬が走る",
        "x" * CAPTION_BYTES,
        "é" * CAPTION_BYTES,
    ]
    again = from_bytes(to_bytes(texts))
    assert again[:5] == texts[:5] and again[5] == "é" * (CAPTION_BYTES // 2)
    assert from_bytes(to_bytes(["a" + "é" * CAPTION_BYTES])) == [
        "a" + "é" * (CAPTION_BYTES // 2 - 1)
    ]
