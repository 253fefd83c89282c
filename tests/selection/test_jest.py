"""JEST: the draw against a naive loop, against chance, over ranks, and in whole runs that stop and
go on.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from vlp import checkpoint, config, dist
from vlp.cli import main
from vlp.config import ConfigError
from vlp.seeds import derive
from vlp.selection.jest import Embedded, exchange, select
from vlp.train import train
from vlp.types import Batch

N, D = 24, 6


def embedded(seed, n=N, noise=0.7, scale=8.0, bias=-5.0):
    """Pairs that belong together more or less."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, D, generator=generator)
    text = image + noise * torch.randn(n, D, generator=generator)
    return Embedded(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, bias)


def naive(learner, reference, n_chosen, chunks, seed, step, couplings=True):
    """The published procedure on the whole matrix, float64, one pair at a time."""

    def losses(model):
        z = model.scale * (model.image.double() @ model.text.double().T).numpy() + model.bias
        return [
            [np.log1p(np.exp(-z[i, j] if i == j else z[i, j])) for j in range(len(z))]
            for i in range(len(z))
        ]

    s = np.array(losses(learner)) - np.array(losses(reference))

    chosen = []
    for chunk in range(chunks):
        generator = torch.Generator().manual_seed(derive(seed, "jest", step, chunk))
        uniform = torch.rand(len(s), dtype=torch.float64, generator=generator).tolist()
        keys = {}
        for i in set(range(len(s))) - set(chosen):
            logit = s[i, i] + couplings * sum(s[i, k] + s[k, i] for k in chosen)
            keys[i] = logit - np.log(-np.log(uniform[i]))
        chosen += sorted(keys, key=keys.get)[-n_chosen // chunks :]

    return sorted(chosen)


def test_the_draw_equals_the_naive_loop():
    n_cases, n_other = 0, 0
    for seed in range(12):
        learner, reference = (
            embedded(seed, noise=1.5),
            embedded(seed + 100, noise=0.3, scale=12.0, bias=-7.0),
        )
        for n_chosen, chunks in ((12, 1), (12, 4), (8, 8), (24, 3)):
            chosen, own = select(learner, reference, n_chosen, chunks, seed, step=3)
            assert chosen.tolist() == naive(learner, reference, n_chosen, chunks, seed, 3)
            n_cases += 1
            n_other += chosen.tolist() != naive(
                learner, reference, n_chosen, chunks, seed, 3, couplings=False
            )
        expected = F.softplus(-learner.scale * (learner.image * learner.text).sum(1) - learner.bias)
        expected -= F.softplus(
            -reference.scale * (reference.image * reference.text).sum(1) - reference.bias
        )
        torch.testing.assert_close(own, expected.double())

    assert n_cases == 48
    # Negative control: without the couplings between chosen pairs the sets are others.
    assert n_other >= 12


@pytest.mark.parametrize("same", [True, False])
def test_one_chunk_of_equal_models_is_uniform(same):
    """4,000 draws of 3 of 6 rows: χ² of the 20 possible sets, 19 degrees of freedom; 43.8 is
    exceeded by chance once in 1,000.

    Negative control: against another reference the sets are far from equally frequent.
    """
    learner = embedded(0, n=6)
    reference = learner if same else embedded(1, n=6)
    counts = {}
    for step in range(4000):
        chosen, own = select(learner, reference, 3, 1, seed=5, step=step)
        counts[tuple(chosen.tolist())] = counts.get(tuple(chosen.tolist()), 0) + 1
    assert own.eq(0).all() == same
    chi2 = sum((counts.get(key, 0) - 200) ** 2 / 200 for key in counts) + 200 * (20 - len(counts))
    assert (chi2 < 43.8) == same
    assert not same or len(counts) == 20


def selected(seed, n_chosen=12, chunks=4):
    """On any number of ranks: what is chosen, and this rank's rows after the exchange."""
    group = dist.world()
    mine = slice(group.index * N // group.size, (group.index + 1) * N // group.size)
    models = [
        Embedded(m.image[mine], m.text[mine], m.scale, m.bias)
        for m in (embedded(seed, noise=1.5), embedded(seed + 100))
    ]
    chosen, _ = select(*models, n_chosen, chunks, seed, step=1)
    number = torch.arange(N)[mine]
    batch = Batch(
        image=number.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8),
        text=number[:, None] + torch.arange(5),
        sample_id=number + 1000,
        key=[f"key {i}" for i in number.tolist()],
        negatives=number.view(-1, 1, 1).expand(-1, 2, 5),
        negatives_valid=torch.stack([number % 2 == 0, number % 3 == 0], 1),
        score=number / 10,
    )
    moved = exchange(batch, chosen, torch.device("cpu"))

    assert moved.image.dtype == torch.uint8 and moved.negatives_valid.dtype == torch.bool
    values = (moved.image[:, 0, 0, 0], moved.text[:, 0], moved.negatives[:, 0, 0])
    assert all(v.tolist() == (moved.sample_id - 1000).tolist() for v in values)
    assert moved.negatives_valid[:, 1].tolist() == [i % 3 == 0 for i in values[1].tolist()]
    assert torch.equal(moved.score, values[1] / 10)
    return chosen.tolist(), moved.sample_id.tolist(), moved.key


def all_selected():
    return [selected(seed) for seed in range(4)]


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_choose_one_set_and_share_its_rows(n_ranks):
    alone = all_selected()
    together = ranks.run(n_ranks, all_selected)

    n_compared = 0
    for case, (chosen, ids, keys) in enumerate(alone):
        parts = [together[rank][case] for rank in range(n_ranks)]
        assert all(part[0] == chosen for part in parts)
        assert [len(part[1]) for part in parts] == [12 // n_ranks] * n_ranks
        assert [i for part in parts for i in part[1]] == ids == [1000 + i for i in chosen]
        assert [k for part in parts for k in part[2]] == keys
        n_compared += 1

    assert n_compared == 4


SETTINGS = """
out: {out}
data:
  sources: [{{name: shards, path: {data}}}]
  workers: 0
model:
  image_tower:
    {{name: vit, image_size: 16, patch_size: 8, width: 32, layers: 1, head_width: 16,
      patch_dropout: 0.25}}
  text_tower: {{name: transformer, context_length: 24, width: 32, layers: 1, heads: 2}}
  embed_dim: 16
  scale: {{init: 10}}
  bias: -10
train:
  {{duration: 6, batch: 16, micro_batches: 2, precision: float32, device: cpu,
    optimizer: {{lr: 1e-2}}}}
objective: {{siglip: {{}}}}
log: {{every: 1}}
checkpoint: {{every: 3, keep: 2}}
"""


@pytest.fixture(scope="module")
def home(scenes, tmp_path_factory):
    """A folder with `reference`, a short run that the others choose by."""
    folder = tmp_path_factory.mktemp("jest")
    train(settings(folder, scenes, "reference", "train.duration=8"))
    return folder


def settings(folder, scenes, out, *overrides):
    path = Path(folder) / f"{out}.yaml"
    path.write_text(SETTINGS.format(out=Path(folder) / out, data=scenes / "train"))
    return config.load(path, list(overrides))


def chosen_by(home, **options):
    return "selection=" + json.dumps(
        {"jest": {"reference": str(home / "reference"), "keep": 0.5, "chunks": 4, **options}}
    )


OF_THE_MACHINE = ("samples_s", "data_wait", "waited_s", "text_tokens_s", "mfu", "peak_resident_gib")


def logged(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]


def test_a_run_that_stops_goes_on_exactly_and_counts_its_cost(home, scenes):
    whole = train(settings(home, scenes, "whole", chosen_by(home)))
    shutil.copytree(whole, home / "cut")
    shutil.rmtree(home / "cut" / "checkpoints" / "step_00000006")
    again = train(settings(home, scenes, "cut", chosen_by(home), "resume=auto"))

    assert logged(again) == logged(whole)
    one, other = (checkpoint.load(checkpoint.newest(run)) for run in (whole, again))
    assert all(one.model[k].equal(other.model[k]) for k in one.model)
    records = logged(whole)
    assert [r["step"] for r in records] == list(range(1, 7))
    assert all(r["jest.scored_rows"] == 32 for r in records)  # B / keep rows of 16
    assert all(r["jest.reference_rows"] == 32 for r in records)
    assert records[0]["jest.learnability_chosen"] > records[0]["jest.learnability"]
    assert one.state["loader"]["batch"] == 32


def test_stored_embeddings_choose_as_the_reference_does(home, scenes):
    shards, stored = scenes / "train", home / "stored"
    assert (
        main(
            ["data", "embed", str(shards), "--model", str(home / "reference"), "--to", str(stored)]
        )
        == 0
    )
    plain = ("data.augment.scale=[1.0, 1.0]", "data.captions.choose=first", "train.duration=2")
    by_model = logged(train(settings(home, scenes, "by_model", chosen_by(home), *plain)))
    scale, bias = (v.item() for v in checkpoint.load_model(home / "reference").scaling())
    by_rows = chosen_by(home, reference="precomputed", scale=scale, bias=bias)
    source = f"data.sources=[{{name: shards, path: {shards}, embeddings: {stored}}}]"
    by_file = logged(train(settings(home, scenes, "by_file", by_rows, source, *plain)))

    shutil.copytree(stored, home / "again")
    two = source.replace(f"embeddings: {stored}", f"embeddings: [{stored}, {home / 'again'}]")
    with pytest.raises(ValueError, match=r"stored embeddings of one model, .* are of 2; name one"):
        train(settings(home, scenes, "by_two", by_rows, two, *plain))

    assert [r["jest.reference_rows"] for r in by_file] == [0, 0]
    # Stored as float16.
    assert by_file[0]["jest.learnability"] == pytest.approx(
        by_model[0]["jest.learnability"], rel=1e-3
    )
    assert by_file[0]["jest.learnability_chosen"] == pytest.approx(
        by_model[0]["jest.learnability_chosen"], rel=1e-3
    )


def losses_of(path, *overrides):
    run = train(config.load(path, list(overrides)))
    dist.barrier()  # the first rank has written its log
    return [
        (record["loss"], record["jest.reference_rows"], record["jest.learnability_chosen"])
        for record in logged(run)
    ]


@pytest.mark.parametrize(
    "engine",
    ["ddp", *(pytest.param(e, marks=pytest.mark.slow) for e in ("fsdp2", "zero2", "zero3"))],
)
def test_two_ranks_train_on_what_one_chooses(home, scenes, engine):
    settings(home, scenes, "one")
    options = (
        chosen_by(home),
        "train.duration=3",
        "model.image_tower.patch_dropout=0",
        "train.micro_batches=1",
    )
    alone = losses_of(home / "one.yaml", *options, f"out={home / f'one_{engine}'}")
    together = ranks.run(
        2, losses_of, home / "one.yaml", *options, f"out={home / engine}", f"train.engine={engine}"
    )[0]

    assert len(alone) == 3
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_refusals(home, scenes):
    def refused(match, *overrides, error=ValueError):
        with pytest.raises(error, match=match):
            train(settings(home, scenes, "refused", *overrides))
        assert not (home / "refused").exists()

    refused("inverse must be a whole number", chosen_by(home, keep=0.3), error=ConfigError)
    refused(
        "set both to those of the model",
        'selection={"jest": {"reference": "precomputed"}}',
        error=ConfigError,
    )
    refused(
        "one at a time",
        'selection={"jest": {"reference": "x"}, "mcl": {"labels": ["y"]}}',
        error=ConfigError,
    )
    refused("5 chunks of jest do not divide train.batch 16", chosen_by(home, chunks=5))
    refused("leave out data.together", chosen_by(home), "data.together=2")
    refused(
        "embeds the pixels",
        chosen_by(home),
        "model.image_tower.locked=true",
        "model.image_tower.precomputed=true",
    )
    refused("set model.bias", chosen_by(home), "model.bias=null", "objective={infonce: {}}")
    refused(
        "selection.jest.reference .* reads \\(16, 16\\) pixels",
        chosen_by(home),
        "model.image_tower.image_size=24",
    )
    refused(
        "selection.jest.reference .* but the model .*context_length=20",
        chosen_by(home),
        "model.text_tower.context_length=20",
    )
    refused("nowhere", chosen_by(home, reference="nowhere"))
    precomputed = chosen_by(home, reference="precomputed", scale=10, bias=-10)
    refused(r"needs \['teacher_image', 'teacher_text'\].*vlp data embed", precomputed)
    refused("larger than the data", chosen_by(home, keep=0.01))
    train(
        settings(
            home, scenes, "clip", "model.bias=null", "objective={infonce: {}}", "train.duration=1"
        )
    )
    refused(
        "clip has no logit bias.*selection.jest.bias", chosen_by(home, reference=str(home / "clip"))
    )
    train(
        settings(
            home,
            scenes,
            "by_clip",
            chosen_by(home, reference=str(home / "clip"), bias=-10),
            "train.duration=1",
        )
    )
