"""clip_benchmark's probe against its own numbers, few shots, features before the projection."""

import json

import pytest
import torch

from tests.eval import material
from tests.models.tiny import tiny
from vlp import plugin
from vlp.eval import evaluation, models, probes
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.unprojected import unprojected


def clusters() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Unit rows [n, 8] of six overlapping classes: training, validation, test."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator)
    parts = []
    for n in (150, 60, 120):
        labels = torch.arange(n) % 6
        rows = centres[labels] + 0.9 * torch.randn(n, 8, generator=generator)
        parts.append((torch.nn.functional.normalize(rows, dim=1), labels))
    return parts


def accuracy(rows: torch.Tensor, labels: torch.Tensor, layer: tuple) -> float:
    return float((probes.ranks(rows, labels, *layer) == 1).double().mean())


def test_the_probe_equals_clip_benchmarks():
    """Frozen: what `train` and `find_peak` of LAION-AI/CLIP_benchmark@48de38c give for these rows
    on a CPU, without amp (torch 2.15.0, three epochs, batch 64, seed 0).
    """
    train, validation, test = clusters()
    settings = probes.AdamW(epochs=3)
    before = torch.random.get_rng_state()
    layer = probes.adamw_probe(*train, 6, 0.01, settings)
    assert torch.equal(torch.random.get_rng_state(), before)
    weight, bias = layer[0].double(), layer[1]
    assert float(weight.sum()) == pytest.approx(-1.8026336580514908, abs=1e-4)
    assert float(weight.square().sum()) == pytest.approx(8.194361492678706, abs=1e-4)
    assert bias[1].item() == pytest.approx(0.1819043755531311, abs=1e-5)
    assert accuracy(*test, layer) == pytest.approx(0.6166666666666667)

    def by_validation(decay: float) -> float:
        return accuracy(*validation, probes.adamw_probe(*train, 6, decay, settings))

    decay = probes.swept_decay(by_validation)
    assert decay == pytest.approx(21.54434690031882)
    both = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    layer = probes.adamw_probe(*both, 6, decay, settings)
    assert accuracy(*test, layer) == pytest.approx(0.7583333333333333)
    assert float(layer[0].double().square().sum()) == pytest.approx(0.05971442929717222, abs=1e-5)


def test_of_equal_decays_the_first_that_is_tried_wins():
    tried = []
    assert probes.swept_decay(lambda decay: tried.append(decay) or 0.5) == pytest.approx(1e-6)
    assert len(tried) == 11  # seven, and four to the right of the first
    assert probes.swept_decay(lambda decay: -abs(decay - 1)) == pytest.approx(1e-6)
    peak = probes.swept_decay(lambda decay: 1 / (1 + abs(torch.tensor(decay).log10().item() - 1)))
    assert peak == pytest.approx(10, rel=0.2)


def photos(root, n=24):
    """Three splits of four classes of pictures, as folders."""
    for s, split in enumerate(("train", "val", "test")):
        for i in range(n):
            folder = root / split / "abcd"[i % 4]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(material.png(material.picture(100 * s + i)))
    return root


def evaluate(encoder, **options):
    chosen = plugin.keyed("vlp.eval.tasks", {"clip_benchmark_probe": options})
    return evaluation.evaluate(encoder, chosen, Context(workers=0, contents=Contents()))[0][0]


@pytest.mark.parametrize("more", [{}, {"val_split": "val"}, {"val_proportion": 0.25}, {"shots": 2}])
def test_the_task_finds_clusters(more, tmp_path):
    photos(tmp_path)
    knows = material.known_encoder(
        lambda n: material.direction(n % 4) + 0.1 * material.direction("noise", n),
        lambda text: material.direction(text),
    )
    record = evaluate(knows, data=str(tmp_path), epochs=4, **more)
    assert record["task"] == "linear_probe" and record["metrics"]["lp_acc1"] == 1
    assert record["metrics"]["lp_mean_per_class_recall"] == 1
    assert record["chance"]["lp_acc1"] == 1 / 4
    has_decay = "val_split" in more or "val_proportion" in more
    assert (record["metrics"]["weight_decay"] > 0) == has_decay


def test_what_the_probe_cannot_do_is_said_at_the_start(tmp_path):
    photos(tmp_path, 8)
    with pytest.raises(DataError, match="2 training images, fewer than shots=3"):
        evaluate(material.random_encoder(), data=str(tmp_path), shots=3)
    for options, message in (
        ({"val_split": "val", "val_proportion": 0.1}, "both given"),
        ({"val_proportion": 1.5}, "expected 0 to 1"),
        ({"epochs": 0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(material.random_encoder(), data=str(tmp_path), **options)
    with pytest.raises(DataError, match="features before the projection are not known"):
        evaluate(material.random_encoder(), data=str(tmp_path), features="unprojected")


def read(task, **options):
    return evaluation.read_all(plugin.keyed("vlp.eval.tasks", {task: options}))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("clip_benchmark_probe", {"val_split": "test"}, "'test' and 'test' of .* share pictures"),
        ("clip_benchmark_probe", {"val_split": "train"}, "share pictures (8, e.g. "),
        ("clip_benchmark_probe", {"val_split": "few"}, "different classes: d"),
        ("clip_benchmark_probe", {"shots": 3}, "class 'a' has 2 training images, fewer than"),
        ("clip_benchmark_probe", {"val_proportion": 0.01}, "of 8 training images is 0; expected"),
        ("clip_benchmark_probe", {"val_proportion": 0.99}, "of 8 training images is 8; expected"),
        ("clip_benchmark_probe", {"val_proportion": 0.5, "shots": 2}, "fewer than shots=2"),
        ("linear_probe", {}, "no class of .* has 5 training images"),
        ("few_shot", {"shots": [3]}, "2 training images, fewer than shots=3"),
        ("few_shot", {"train_split": "few"}, "different classes: d"),
        ("knn", {"train_split": "test"}, "'test' and 'test' of .* share pictures"),
    ],
)
def test_splits_that_do_not_go_together_are_told_before_anything_is_embedded(
    tmp_path, task, options, message
):
    photos(tmp_path, 8)
    few = tmp_path / "few"
    for name in "abc":
        (few / name).mkdir(parents=True)
        (few / name / "0.png").write_bytes(material.png(material.picture(500 + ord(name))))
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        read(task, data=str(tmp_path), **options)


def test_what_decides_about_a_probe_is_in_the_hash_of_its_data(tmp_path):
    """Names, prompts, and the images that choose the decay; each by itself."""
    photos(tmp_path, 8)
    (tmp_path / "val2").mkdir()
    for i, name in enumerate("abcd"):
        (tmp_path / "val2" / name).mkdir()
        path = tmp_path / "val2" / name / "0.png"
        path.write_bytes(material.png(material.picture(900 + i)))
    cases = {
        "few_shot": [
            {"shots": [1], "templates": ["a {}"]},
            {"shots": [1], "templates": ["the {}"]},
            {"shots": [1], "templates": ["a {}"], "classes": ["a", "b", "c", "d"]},
            {"shots": [1], "templates": ["a {}"], "classes": ["b", "a", "c", "d"]},
        ],
        "clip_benchmark_probe": [{}, {"val_split": "val"}, {"val_split": "val2"}],
    }
    encoder = material.random_encoder()
    hashes = {}
    for task, options in cases.items():
        more = {"epochs": 1} if task == "clip_benchmark_probe" else {}
        every = [{"data": str(tmp_path), **chosen, **more} for chosen in options]
        chosen = plugin.keyed("vlp.eval.tasks", {task: every})
        records, _ = evaluation.evaluate(encoder, chosen, Context(workers=0, contents=Contents()))
        hashes[task] = [record["data_sha256"] for record in records]

    # The same names said, or taken from the folders, are the same data.
    assert hashes["few_shot"][0] == hashes["few_shot"][2]
    assert len(set(hashes["few_shot"])) == len(set(hashes["clip_benchmark_probe"])) == 3


def test_features_before_the_projection_are_those_it_reads(tmp_path):
    """Times the projection they are the projected features again; the tower is left as it was."""
    material.tiny_open_clip(tmp_path / "model")
    ours = models.from_model(material.our_model().eval(), keep=True)
    cases = [models.load(f"local-dir:{tmp_path / 'model'}"), ours]
    pictures = [material.picture(i, (32, 32)) for i in (3, 700)]
    for encoder in cases:
        features = unprojected(encoder)
        rows = features.encode_images(pictures)
        projected = torch.nn.functional.normalize(rows @ encoder.tower.proj, dim=1)
        assert rows.shape == (2, 32)
        assert torch.allclose(projected, encoder.encode_images(pictures), atol=1e-6)
        assert features.fingerprint not in ("", encoder.fingerprint)
    assert len(cases) == 2


def test_features_of_nonnegative_embeddings_have_both_signs():
    """Their last step follows the projection."""
    pictures = [material.picture(i, (32, 32)) for i in (3, 700)]
    for heads in ({}, {"nonnegative": True}):
        encoder = models.from_model(tiny(heads=heads), keep=True)
        rows = unprojected(encoder).encode_images(pictures)
        assert (rows < 0).any() and (rows > 0).any()
        assert (encoder.encode_images(pictures) >= 0).all() == bool(heads)


def test_our_own_probe_reads_them_too(tmp_path):
    photos(tmp_path, 8)
    material.tiny_open_clip(tmp_path / "model")
    options = {"data": str(tmp_path), "features": "unprojected", "decays": [0.01]}
    chosen = plugin.keyed("vlp.eval.tasks", {"linear_probe": options})
    encoder = models.load(f"local-dir:{tmp_path / 'model'}")
    (record,), _ = evaluation.evaluate(encoder, chosen, Context(workers=0))
    assert record["task"] == "linear_probe_lbfgs" and "acc1" in json.loads(
        json.dumps(record["metrics"])
    )


def test_few_shots_start_at_the_zero_shot_classifier_and_learn(tmp_path):
    """Text embeddings know two of four classes; the shots teach the others."""
    photos(tmp_path, 24)
    told = {"a": 0, "b": 1, "c": 3, "d": 2}
    encoder = material.known_encoder(
        lambda n: material.direction(n % 4) + 0.1 * material.direction("noise", n),
        lambda text: material.direction(told[text.rstrip(".").split()[-1]]),
    )
    options = {"data": str(tmp_path), "templates": "photo", "shots": [1, 4]}
    far = {**options, "decays": [1e9]}
    chosen = plugin.keyed("vlp.eval.tasks", {"few_shot": [options, far]})
    (near_record, far_record), _ = evaluation.evaluate(encoder, chosen, Context(workers=0))
    for record in (near_record, far_record):
        assert record["metrics"]["acc1_0_shots"] == 1 / 2
    assert near_record["metrics"]["acc1_4_shots"] == 1
    # A penalty without bound leaves the zero-shot classifier.
    assert far_record["metrics"]["acc1_4_shots"] == 1 / 2
    assert near_record["metrics"]["decay_4_shots"] < 1

    too_many = plugin.keyed("vlp.eval.tasks", {"few_shot": {**options, "shots": [7]}})
    with pytest.raises(DataError, match="6 training images, fewer than shots=7"):
        evaluation.read_all(too_many)
