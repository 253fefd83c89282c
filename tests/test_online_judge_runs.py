"""Runs that a judge teaches, and what is refused before anything long starts."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.data_tools.language import write_cross_encoder
from tests.test_train import losses
from vlp import checkpoint
from vlp.train import train

SHORT = ("data.workers=0", "train.batch=16", "log.every=1", "checkpoint={every: 2, keep: 3}")
OF_BATCH_AND_QUEUE = (
    "objective={infonce: {}, distill: {form: ranking, candidates: batch, hardest: 4, queue: true}}"
)


def test_a_cross_encoder_teaches_a_run_which_resumes_bit_for_bit(
    settings, scenes, tmp_path, capsys
):
    judge = write_cross_encoder(tmp_path / "my blip")
    held_out = f"{{name: shards, path: {scenes / 'val'}}}"
    options = (
        *SHORT,
        OF_BATCH_AND_QUEUE,
        f"teacher={{ema: 0.9, queue: 20, cross_encoder: '{judge}', cross_encoder_batch: 50}}",
        f"validation={{data: {{sources: [{held_out}]}}, batch: 8, every: 2}}",
        "train.duration=4",
    )
    whole = train(settings(*options, out="whole"))
    cost = "reads 9 pairs a row, 144 a step, 50 at once"
    assert f"cross-encoder:{judge} {cost}" in capsys.readouterr().out
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(line["distill.ranking"] > 0 for line in lines if line["kind"] == "train")
    assert [line["val.distill.ranking"] > 0 for line in lines if "val.loss" in line] == [True] * 2

    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000004")
    again = train(settings(*options, "resume=auto", out="cut"))
    assert losses(again) == losses(whole)
    one, other = (checkpoint.load(checkpoint.newest(run)).teacher for run in (whole, again))
    assert one["queue_pixels"].any() and all(one[name].equal(other[name]) for name in one)


def judge_that_must_not_run(pictures: list, captions: list[str]) -> list[float]:
    raise AssertionError("asked")


ASKED = "objective={infonce: {}, distill: {form: ranking, candidates: batch}}"
NAMED = f"teacher.cross_encoder={__name__}:judge_that_must_not_run"


@pytest.mark.parametrize(
    "options, message",
    [
        ([NAMED], r"cross_encoder is set, but no term asks it; add distill with form: ranking"),
        (["objective={infonce: {}, distill: {form: cross}}", NAMED], "needs 'teacher_image'"),
        ([ASKED], "needs 'pair_score', which this run does not have; it comes from a cross-enc"),
        (
            [ASKED, "teacher.cross_encoder=/no/such"],
            "judge '/no/such' cannot be loaded",
        ),
        ([ASKED, "teacher.cross_encoder='mllm:'"], "teacher.cross_encoder 'mllm:': expected"),
        ([ASKED, f"teacher.cross_encoder={__name__}:absent"], "has no attribute 'absent'"),
        ([ASKED, NAMED, "train.batch=8"], "hardest is 8, but a row has 7 other candidates and 0"),
        (
            [ASKED, NAMED, "stages=[{duration: 1}, {duration: 1, batch: 4}]"],
            r"stages\.1: distill\.hardest is 8, but a row has 3 other candidates",
        ),
        (
            [ASKED, NAMED, "train.batch=8", "stages=[{duration: 1, batch: 16}]"],
            r"after the stages: distill\.hardest is 8, but a row has 7 other candidates",
        ),
        (
            [ASKED.replace("batch}", "batch, queue: true}"), NAMED],
            "needs 'queue_image', which this run does not have",
        ),
        (
            [
                ASKED.replace("{form: ranking,", "[{form: ranking, hardest: 3,")[:-2]
                + "}, {form: ranking, candidates: batch}]}",
                NAMED,
            ],
            "ask the cross-encoder for different candidates",
        ),
        (["objective={infonce: {}, distill: {form: ranking}}", NAMED], "needs 'negatives'"),
        (["teacher.cross_encoder_batch=0"], "cross_encoder_batch is 0; expected a number of pairs"),
        (["objective={distill: {form: ranking, hardest: 4}}"], "hardest: belongs to a ranking of"),
        (
            ["objective={distill: {form: ranking, candidates: batch, hardest: 1}}"],
            "hardest: found 1, expected at least 2",
        ),
    ],
)
def test_what_does_not_fit_is_answered_before_the_first_step(settings, options, message):
    with pytest.raises(ValueError, match=message):
        train(settings(*SHORT, *options))
