"""MCL: clustering, batches from one cell, and three stages that become one model."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from tests.loopback_hub import TOKEN, loopback_hub
from tests.models.tiny import inputs, language_model, tiny
from tests.selection.test_jest import settings
from vlp import checkpoint
from vlp.cli import main
from vlp.config import Captions
from vlp.data.cells import Cells, read_labels, write_labels
from vlp.data.mix import Mixture
from vlp.data.sources import shards, webdataset
from vlp.data_tools.cells import kmeans, nearest
from vlp.eval.models import load as load_encoder
from vlp.export.folder import export, export_concatenated, export_run
from vlp.export.push import push
from vlp.models.concatenated import Concatenated
from vlp.models.load import load as load_model
from vlp.train import train

B = 16


@pytest.fixture
def source(scenes):
    return shards.open(shards.Options(path=str(scenes / "train")), Captions())


@pytest.fixture
def labelled(source, tmp_path):
    """Makes a file of labels for the 200 scenes and says where it is."""

    def write(labels, n_clusters, name="labels"):
        path = tmp_path / f"{name}.safetensors"
        write_labels(path, np.asarray(labels), n_clusters, mixture(source), {"model": "none"})
        return str(path)

    return write


def mixture(source, weight=None):
    return Mixture([source], [weight], seed=0, shuffle=True)


def cells(source, labels, batch=B, seed=3, weight=None, **options):
    return Cells([source], [weight], seed=seed, shuffle=True, labels=labels, batch=batch, **options)


def mixed_batches(order, labels, steps):
    return [step for step in steps if len({tuple(row) for row in labels[order.batch(step, B)]}) > 1]


def test_an_epoch_holds_every_batch_of_every_cell_once(source, labelled):
    labels = np.random.default_rng(0).choice(3, 200, p=[0.5, 0.3, 0.2])
    order = cells(source, [labelled(labels, 3)])
    n_batches = sum(int(size) // B for size in np.bincount(labels))

    assert order.steps_per_epoch(B) == n_batches
    epochs = [
        np.concatenate([order.batch(e * n_batches + s, B) for s in range(n_batches)])
        for e in range(3)
    ]

    for ids in epochs:
        assert len(set(ids.tolist())) == len(ids) == n_batches * B
        assert Counter(labels[ids].tolist()) == {
            c: int(size) // B * B for c, size in enumerate(np.bincount(labels))
        }
    assert len({ids.tobytes() for ids in epochs}) == 3
    assert set(epochs[0]) != set(epochs[1])  # others are left out
    assert not mixed_batches(order, labels[:, None], range(3 * n_batches))
    firsts = [int(labels[order.batch(s, B)[0]]) for s in range(n_batches)]
    assert firsts != sorted(firsts)  # cells take turns
    again = cells(source, [labelled(labels, 3)])
    assert all(np.array_equal(again.batch(s, B), order.batch(s, B)) for s in (n_batches, 0, 5))
    # Negative control.
    assert len(mixed_batches(mixture(source), labels[:, None], range(n_batches))) == n_batches


def test_labels_of_stages_combine(source, labelled):
    one, two = np.arange(200) // 100, np.arange(200) % 2
    files = [labelled(one, 2, "one"), labelled(two, 2, "two")]
    both = np.stack([one, two], 1)
    order = cells(source, files)

    assert order.sizes.tolist() == [50] * 4 and order.steps_per_epoch(B) == 12
    assert not mixed_batches(order, both, range(12))
    # Negative control: one stage's labels do not do it.
    assert mixed_batches(cells(source, files[:1]), both, range(12))
    assert order.identity() != cells(source, files[:1]).identity()


def test_small_cells_are_refused_or_pooled(source, labelled):
    labels = np.repeat([0, 1, 2, 3, 4, 5], [150, 10, 5, 9, 20, 6])
    path = labelled(labels, 6)

    with pytest.raises(
        ValueError,
        match=r"4 of 6 cells are smaller than the batch of 16 \(the smallest has 5.*small: merge",
    ):
        cells(source, [path])

    order = cells(source, [path], small="merge")
    # 10 + 5 + 9 fill a batch; the last 6 join them.
    assert sorted(order.sizes.tolist()) == [20, 30, 150]
    pooled = np.array([0, 1, 1, 1, 2, 1])[labels]
    assert not mixed_batches(order, pooled[:, None], range(30))
    few = cells(source, [labelled(np.repeat([0, 1], [190, 10]), 2)], small="merge")
    # Too few for a batch of their own: they join the largest cell.
    assert few.sizes.tolist() == [200]


def test_stand_ins_come_from_the_cell(source, labelled):
    labels = np.repeat([0, 1], [180, 20])
    order = cells(source, [labelled(labels, 2)])

    n_checked = 0
    for step in range(order.steps_per_epoch(B)):
        batch = order.batch(step, B)
        found = [next(order.replacements(int(batch[row]), step, row, batch)) for row in (0, 1)]
        assert set(labels[found]) == set(labels[batch]) and not set(found) & set(batch.tolist())
        # The small cell has four left: rows may share them.
        assert found[0] != found[1] or labels[found[0]] == 1
        n_checked += 1

    assert n_checked == 12
    tight = cells(source, [labelled(np.repeat([0, 1], [184, 16]), 2)])
    step = next(s for s in range(12) if tight.batch(s, B).min() >= 184)
    batch = tight.batch(step, B)

    # Nothing else is left.
    assert next(tight.replacements(int(batch[0]), step, 0, batch)) in set(batch[1:].tolist())


def test_labels_of_other_samples_are_refused(source, labelled, scenes, tmp_path):
    path = labelled(np.zeros(200), 1)
    labels, n_clusters = read_labels(path, mixture(source))

    assert labels.tolist() == [0] * 200 and n_clusters == 1
    with pytest.raises(
        ValueError, match=r"labels 200 samples, but the data has 400; make labels .* vlp data cells"
    ):
        read_labels(path, Mixture([source, source], [None, None], seed=0, shuffle=True))

    shutil.copytree(scenes / "train", tmp_path / "changed")
    (tar,) = (tmp_path / "changed").glob("*.tar")
    content = bytearray(tar.read_bytes())
    start = content.index(b"IDAT") if b"IDAT" in content else content.index(b"\xff\xda")
    content[start + 20] ^= 1  # a bit of the first picture: layout, keys and captions are the same
    tar.write_bytes(content)
    # What the tar was written with: without it, the change is one made on purpose.
    tar.with_name(f"{tar.stem}_stats.json").unlink()
    changed = shards.open(shards.Options(path=str(tmp_path / "changed")), Captions())

    assert changed.fingerprint() == source.fingerprint()
    with pytest.raises(ValueError, match="other samples than those of the data"):
        read_labels(path, mixture(changed))
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    for name in ("no.safetensors", "absent.safetensors"):
        with pytest.raises(ValueError, match=f"{name} holds no labels"):
            read_labels(tmp_path / name, mixture(source))
    with pytest.raises(ValueError, match="leave the weights out"):
        cells(source, [path], weight=1.0)
    stream = webdataset.open(webdataset.Options(samples=200, urls=str(tar)), Captions())
    with pytest.raises(ValueError, match="a stream gives them in turn; pack it into shards"):
        cells(stream, [path])


def test_kmeans_finds_separate_groups_and_rests_at_a_fixed_point():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 5
    middles = torch.eye(5, 8) * 4
    rows = middles[truth] + 0.3 * torch.randn(300, 8, generator=generator)
    found = nearest(rows, kmeans(rows, 5, seed=1))

    # The same groups under other numbers.
    assert len({(a, b) for a, b in zip(truth.tolist(), found.tolist())}) == 5

    n_checked = 0
    for seed in range(5):
        overlapping = torch.randn(200, 4, generator=generator)
        centres = kmeans(overlapping, 6, seed)
        cell = [
            min(range(6), key=lambda c: float((row - centres[c]).square().sum()))
            for row in overlapping
        ]
        for c in range(6):
            torch.testing.assert_close(
                centres[c], overlapping[[i for i, own in enumerate(cell) if own == c]].mean(0)
            )
            n_checked += 1
        assert centres.equal(kmeans(overlapping, 6, seed))

    assert n_checked == 30
    with pytest.raises(ValueError, match="only 2 different features; --clusters 3"):
        kmeans(torch.eye(2, 4)[torch.arange(10) % 2], 3, seed=0)


def test_three_stages_become_one_model(scenes, tmp_path, capsys):
    labels, runs = [], []
    for stage in (1, 2, 3):
        chosen = (
            [f"selection={json.dumps({'mcl': {'labels': labels, 'small': 'merge'}})}"]
            if labels
            else []
        )
        run = train(
            settings(
                tmp_path, scenes, f"stage{stage}", f"seed={stage}", "train.duration=3", *chosen
            )
        )
        runs.append(str(run))
        labels.append(str(tmp_path / f"cells{stage}.safetensors"))
        assert (
            main(
                [
                    "data",
                    "cells",
                    str(run / "config.yaml"),
                    "--model",
                    str(run),
                    "--clusters",
                    "3",
                    "--to",
                    labels[-1],
                ]
            )
            == 0
        )

    capsys.readouterr()
    third = (tmp_path / "stage3" / "config.yaml").read_text()

    assert "cells2.safetensors" in third
    state = checkpoint.load(checkpoint.newest(tmp_path / "stage3")).state
    assert "cells" in state["loader"]  # a resumed run compares the cells

    to = tmp_path / "joined"
    export_run(runs[0], tmp_path / "first")  # a stage may also be an export

    assert (
        main(
            ["export", str(tmp_path / "first"), *runs[1:], "--to", str(to), "--license", "cc0-1.0"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "vlp_stages.json" in printed and "no model of theirs joins" in printed
    assert "license: cc0-1.0" in (to / "README.md").read_text()
    model = checkpoint.load_any(str(to)).eval()
    members = [checkpoint.load_model(run) for run in runs]
    pixels, ids = members[0].example(3)
    with torch.no_grad():
        whole, parts = model(pixels, ids), [member(pixels, ids) for member in members]
    assert model.embed_dim == whole.image.shape[1] == 3 * 16
    torch.testing.assert_close(
        whole.image @ whole.text.T, sum(p.image @ p.text.T for p in parts) / 3
    )
    torch.testing.assert_close(whole.image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(whole.text, model.encode_text(ids))
    torch.testing.assert_close(whole.scale, sum(p.scale for p in parts) / 3)
    torch.testing.assert_close(whole.bias, sum(p.bias for p in parts) / 3)

    out = tmp_path / "results.json"
    task = [
        "--task",
        "zeroshot",
        "--data",
        str(scenes / "zeroshot"),
        "--cache",
        "none",
        "--quiet",
        "--out",
        str(out),
    ]

    assert main(["eval", str(to), *task]) == 0
    assert 0 <= json.loads(out.read_text())["results"][0]["metrics"]["acc1"] <= 1
    assert load_encoder(str(to)).fingerprint != load_encoder(runs[0]).fingerprint
    import open_clip

    # A stage alone is an export like any other.
    theirs = open_clip.create_model(f"local-dir:{to / 'stage_2'}").eval()

    torch.testing.assert_close(
        theirs.encode_image(pixels, normalize=True), parts[1].image, atol=1e-5, rtol=0
    )


def test_stages_must_read_the_same_batch(scenes, tmp_path):
    one = train(settings(tmp_path, scenes, "one", "train.duration=1"))
    other = train(
        settings(tmp_path, scenes, "other", "train.duration=1", "model.image_tower.image_size=24")
    )

    assert main(["export", str(one), str(other), "--to", str(tmp_path / "joined")]) == 1
    assert not (tmp_path / "joined").exists()
    with pytest.raises(
        ValueError, match=r"same pixels and tokens.*size=\(16, 16\).* and .*size=\(24, 24\)"
    ):
        Concatenated([checkpoint.load_model(one), checkpoint.load_model(other)])


def test_stages_bring_their_own_copies_of_a_tokenizer(tmp_path):
    text = {
        "name": "huggingface",
        "model": str(language_model(tmp_path / "bert")),
        "context_length": 12,
        "pretrained": False,
    }
    members = [tiny(seed=seed, text_tower=text) for seed in (0, 1)]
    for i, member in enumerate(members):
        export(member, tmp_path / f"stage{i}")
    export_concatenated([tmp_path / "stage0", tmp_path / "stage1"], tmp_path / "joined")
    loaded = load_model(tmp_path / "joined").eval()

    assert loaded.members[0].text_spec != loaded.members[1].text_spec  # in folders of their own
    pixels, ids = inputs(members[0])
    with torch.no_grad():
        whole, parts = loaded(pixels, ids), [member(pixels, ids) for member in members]
    torch.testing.assert_close(
        whole.image @ whole.text.T, sum(p.image @ p.text.T for p in parts) / 2
    )


def test_more_clusters_than_samples(source, scenes, tmp_path, capsys):
    run = train(settings(tmp_path, scenes, "one", "train.duration=1"))
    command = [
        "data",
        "cells",
        str(run / "config.yaml"),
        "--model",
        str(run),
        "--to",
        str(tmp_path / "cells.safetensors"),
    ]

    assert main([*command, "--clusters", "201"]) == 1
    assert "--clusters 201 must lie between 2 and the 200 samples" in capsys.readouterr().err
    assert main([*command, "--fit", "50"]) == 0  # centres of some, labels for all
    found, n_clusters = read_labels(tmp_path / "cells.safetensors", mixture(source))
    assert len(found) == 200 and n_clusters == 10 and len(set(found.tolist())) > 1


LOADED = """
import json, torch
from vlp.models.load import load
model = load("hf-hub:someone/joined").eval()
pixels, ids = model.members[0].example(2)
with torch.no_grad():
    scores = model(pixels, ids).image @ model(pixels, ids).text.T
    print(json.dumps([model.embed_dim, scores.tolist()]))
"""


@pytest.mark.slow
def test_stages_travel_over_a_hub(tmp_path, monkeypatch):
    members = [tiny(seed=seed).eval() for seed in (0, 1)]
    for i, member in enumerate(members):
        export(member, tmp_path / f"stage{i}")
    export_concatenated([tmp_path / "stage0", tmp_path / "stage1"], tmp_path / "joined")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with loopback_hub() as hub:
        push(tmp_path / "joined", "someone/joined", endpoint=hub.url, say=lambda line: None)
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }
        ran = subprocess.run(
            [sys.executable, "-c", LOADED],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    embed_dim, scores = json.loads(ran.stdout.strip().splitlines()[-1])
    pixels, ids = members[0].example(2)
    with torch.no_grad():
        parts = [member(pixels, ids) for member in members]
    assert embed_dim == sum(member.embed_dim for member in members)
    torch.testing.assert_close(
        torch.tensor(scores), sum(p.image @ p.text.T for p in parts) / 2, atol=1e-5, rtol=0
    )
