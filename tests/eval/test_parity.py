"""The same model and photos give the numbers of clip_benchmark (frozen, see tests/eval/parity.py)
and of open_clip.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.eval import material, parity
from vlp import plugin
from vlp.eval import embed, models, run
from vlp.eval.embed import Context

FROZEN = json.loads((Path(__file__).parent / "parity.json").read_text())


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    parity.build(root)
    return root


@pytest.fixture(scope="module")
def encoder(room):
    return models.load(f"local-dir:{room / 'model'}")


@pytest.mark.parametrize("name", parity.SETS)
def test_scores_equal_those_of_clip_benchmark(room, encoder, name):
    task = "retrieval" if name == "retrieval" else "zeroshot"
    records, _ = run.evaluate(
        encoder, plugin.keyed("vlp.eval.tasks", {task: {"data": str(room / name)}}), Context()
    )
    ours = {metric: records[0]["metrics"][metric] for metric in FROZEN[name]}
    assert ours == pytest.approx(FROZEN[name], abs=2e-7)  # it averages recalls in float32
    assert len(ours) == {"zeroshot": 3, "retrieval": 6, "multilabel": 1}[name]


@pytest.mark.slow
def test_the_frozen_numbers_are_what_clip_benchmark_says_today(room):
    """Where VLP_CLIP_BENCHMARK names the command of an environment that has it."""
    command = os.environ.get("VLP_CLIP_BENCHMARK")
    if not command:
        pytest.skip("set VLP_CLIP_BENCHMARK to the clip_benchmark command of its own environment")
    for name in parity.SETS:
        task = "zeroshot_retrieval" if name == "retrieval" else "zeroshot_classification"
        arguments = [
            "eval",
            "--dataset",
            f"wds/{name}",
            "--dataset_root",
            room / name,
            "--split",
            "test",
            "--task",
            task,
        ]
        arguments += [
            "--model",
            f"local-dir:{room / 'model'}",
            "--pretrained",
            "",
            "--no_amp",
            "--num_workers",
            "0",
        ]
        arguments += ["--recall_k", "1", "5", "10", "--output", room / f"{name}.json"]
        subprocess.run([command, *map(str, arguments)], check=True, capture_output=True)
    assert parity.collect(room) == FROZEN


def test_zero_shot_equals_open_clips_own(room, encoder):
    """Against open_clip's classifier builder on the same photos: the weights, and every picture's
    answer.
    """
    import open_clip

    ref = f"local-dir:{room / 'model'}"
    model, _, transform = open_clip.create_model_and_transforms(ref)
    model.eval()
    (task,) = plugin.keyed("vlp.eval.tasks", {"zeroshot": {"data": str(room / "zeroshot")}})
    data = task.module.read(task.options)
    classifier = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(ref), data.classes, data.templates
    )
    with torch.no_grad():
        pixels = torch.stack([transform(r.picture.open()) for r in data.source.records])
        answers = (
            torch.nn.functional.normalize(model.encode_image(pixels), dim=-1) @ classifier
        ).argmax(1)
    result = task.module.run(encoder, data, task.options, Context())
    assert torch.equal(result.items["acc1"][:, 0], (answers == data.labels).double())
    text = embed.texts(
        encoder, [t.replace("{}", c) for c in data.classes for t in data.templates], Context()
    )
    ours = torch.nn.functional.normalize(
        text.view(len(data.classes), len(data.templates), -1).mean(1), dim=-1
    )
    assert torch.allclose(ours.T, classifier, atol=1e-6)


def test_the_parity_sets_are_the_same_bytes_every_time(room, tmp_path):
    material.tiny_open_clip(tmp_path / "model")
    weights = "open_clip_model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (room / "model" / weights).read_bytes()
