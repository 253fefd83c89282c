"""Runs of terms over patches, tokens, sentences, modalities and captions' words that are stopped
and go on: with micro-batches the same to the bit, in loss, weights and moments.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import ranks
from tests.data.material import encoded, picture
from tests.test_modalities import write_rows
from vlp import checkpoint, config, dist
from vlp.data.format import ShardWriter
from vlp.train import train

# Texts have dropout: what a resumed run draws must be what it would have drawn.
IMAGE = {"name": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 1}
IMAGE |= {"head_width": 16}
TEXT = {"name": "transformer", "context_length": 16, "width": 16, "layers": 1, "heads": 2}
TEXT |= {"dropout": 0.1}
DECODER = {
    "image_tower": IMAGE | {"attentional_pool": "cascade", "pool_queries": 4, "pool_heads": 2},
    "text_tower": TEXT | {"class_token": True},
    "decoder": {"layers": 1},
}
LOCAL = {
    "image_tower": IMAGE,
    "text_tower": TEXT,
    "heads": {
        "regions": {},
        "modalities": {"audio": {"features": 4, "length": 3, "layers": 1, "width": 8}},
        "translators": {"pairs": [["text", "image"], ["text", "audio"]], "width": 8},
    },
}
TERMS = {
    "infonce": {},
    "fsc": {},
    "filip": {"candidates": "rank", "keep": 0.5},
    "mil": {},
    "prior": {},
    "gram": {},
    "modality_pairs": {},
    "translation": {},
}
SENTENCES = {"choose": "sentences", "n": 3}
CASES = {
    "local": (LOCAL, TERMS, {"captions": SENTENCES}),
    "decoder": (DECODER, {"infonce": {}, "captioning": {}}, {"captions": {"choose": "random"}}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures with reports of one to four sentences, hard captions, and a sound that some lack."""
    folder = tmp_path_factory.mktemp("local")
    shards = folder / "shards"
    with ShardWriter(shards, 100) as writer:
        for i in range(20):
            report = " ".join(f"It shows the number {i + k}." for k in range(1 + i % 4))
            meta = {"negatives": [f"It shows {i + 1}.", f"Nothing {i}."][: 1 + i % 2]}
            writer.add(f"k{i}", encoded(picture(i, (16, 16))), "png", [report], meta)
    write_rows(folder / "audio", shards, (3, 4), lengths=True)
    return folder


def configured(world, case, out, *overrides):
    model, terms, data = CASES[case]
    audio = {"modalities": {"audio": str(world / "audio")}} if terms is TERMS else {}
    source = {"name": "shards", "path": str(world / "shards"), **audio}
    sections = {
        "out": str(world / out),
        "data": {"sources": [source], "workers": 0, **data},
        "model": {"embed_dim": 16, **model},
        "objective": terms,
        "train": {
            "duration": 4,
            "batch": 8,
            "micro_batches": 2,
            "precision": "float32",
            "device": "cpu",
            "optimizer": {"lr": 1e-2},
        },
        "log": {"every": 1},
        "checkpoint": {"every": 2, "keep": 2},
    }
    path = world / f"{case} {dist.rank()}.json"  # each rank writes its own
    path.write_text(json.dumps(sections))
    return config.load(path, list(overrides))


# What the clock and the process say; captions that were cut are counted from its start.
OF_THE_PROCESS = ("samples_s", "text_tokens_s", "data_wait", "waited_s", "mfu")
OF_THE_PROCESS += ("peak_resident_gib", "truncated_captions")


def logged(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in OF_THE_PROCESS} for line in lines]


def trained(world, case, name, *overrides):
    """On any number of ranks: the folder of the run, once the first of them has written it."""
    run = train(configured(world, case, name, *overrides))
    dist.barrier()
    return str(run)


@pytest.mark.parametrize(
    "case, n_ranks",
    [
        ("local", 1),
        pytest.param("decoder", 1, marks=pytest.mark.slow),
        pytest.param("local", 2, marks=pytest.mark.slow),
        pytest.param("decoder", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(world, case, n_ranks):
    def run(name, *overrides):
        arguments = (world, case, f"{name} {case} {n_ranks}", *overrides)
        if n_ranks == 1:
            return Path(trained(*arguments))
        return Path(ranks.run(n_ranks, trained, *arguments)[0])

    whole = run("whole")
    cut = shutil.copytree(whole, whole.parent / f"cut {case} {n_ranks}")
    shutil.rmtree(checkpoint.newest(cut))
    assert checkpoint.newest(cut).name == "step_00000002"
    before = checkpoint.load(checkpoint.newest(cut)).model
    assert run("cut", "resume=auto") == cut

    records = logged(whole)
    assert logged(cut) == records and len(records) == 4
    terms = CASES[case][1]
    assert all(term in record for term in terms for record in records)

    one, other = (checkpoint.load(checkpoint.newest(run)) for run in (whole, cut))
    assert all(value.equal(other.model[name]) for name, value in one.model.items())
    assert all(value.equal(other.optimizer[name]) for name, value in one.optimizer.items())
    assert len(one.optimizer) > 60
    moved = [name for name, value in one.model.items() if not value.equal(before[name])]
    assert len(moved) > 30, "steps that change nothing prove nothing"
