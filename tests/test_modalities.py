"""Further modalities all the way: rows beside shards → batch → towers → terms → gradients, with
samples that lack some; and two modalities as ever.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests import ranks
from tests.data.material import data_of, loader_of, write_shards
from tests.models.tiny import tiny
from tests.test_step import ROWS, assert_close, gradients_and_weights, make_batch, make_training
from vlp import config, losses, plugin, schema
from vlp.checks import check_modalities, check_needs
from vlp.models.build import from_description
from vlp.models.modalities import Tower
from vlp.passes import as_terms_read
from vlp.step import train_step
from vlp.types import Batch

READS = frozenset({"others", "others_valid"})
SHAPES = {"audio": (6, 4), "depth": (1, 3)}
TOWERS = {
    "depth": {"features": 3},
    "audio": {"features": 4, "length": 6, "patch": 2, "layers": 1, "width": 8, "heads": 2},
}
WITH_VIDEO = TOWERS | {"video": {"frames": {"n": 3}, "layers": 1, "width": 8, "heads": 2}}
PAIRS = [["text", "image"], ["text", "audio"], ["text", "depth"], ["text", "video"]]
HEADS = {"modalities": WITH_VIDEO, "translators": {"pairs": PAIRS, "width": 8}}
ALL = {"modality_pairs": {}, "gram": {}, "symile": {}, "translation": {"distance": "squared"}}


def write_rows(folder: Path, shards: Path, shape: tuple[int, ...], lengths: bool) -> Path:
    """As `vlp data modality` writes them; every third sample lacks the modality."""
    folder.mkdir()
    first = 0
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            keys = list(dict.fromkeys(name.split(".")[0] for name in tar.getnames()))
        numbers = np.arange(first, first + len(keys))
        first += len(keys)
        has = numbers % 3 > 0
        rows = np.zeros((len(keys), *shape), np.float16)
        rows[has] = 1 + numbers[has].reshape(-1, *(1 for _ in shape))
        tensors = {"rows": rows}
        if lengths:
            tensors["length"] = np.where(has, 1 + numbers % shape[0], 0).astype(np.int32)
        about = {"keys": hashlib.sha256("\n".join(keys).encode()).hexdigest(), "model": "none"}
        save_file(tensors, folder / f"{path.stem}.safetensors", about)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("with blanks in its name")
    shards = write_shards(folder / "shards", 18, 7)
    audio = write_rows(folder / "audio", shards, (5, 4), lengths=True)
    depth = write_rows(folder / "depth", shards, (3,), lengths=False)
    return shards, {"depth": str(depth), "audio": str(audio)}


def source(shards: Path, modalities: dict[str, str]) -> dict:
    return {"name": "shards", "path": str(shards), "modalities": modalities}


# Data → batch


def test_rows_come_with_their_samples_and_say_who_lacks_them(stored):
    data = data_of(source(*stored))
    loader = loader_of(data, 9, reads=READS, modalities=SHAPES)
    assert loader.carries >= {"modalities", "modality_lengths"}
    # As a loader process gets it.
    sent = pickle.loads(pickle.dumps(loader._steps))
    n = 0
    for batch in (next(loader), sent[0][0]):
        assert batch.modalities.shape == (9, 27) and batch.modality_lengths.shape == (9, 2)
        numbers = batch.sample_id.tolist()
        for i, rows, lengths in zip(numbers, batch.modalities, batch.modality_lengths):
            audio, depth = rows[:24].view(6, 4), rows[24:]
            expected = 0 if i % 3 == 0 else 1 + i % 5
            assert lengths.tolist() == [expected, int(i % 3 > 0)]
            assert (audio[:expected] == i + 1).all() and not audio[expected:].any()
            assert (depth == (i + 1 if i % 3 else 0)).all()
            n += 1
    assert n == 18

    unread = loader_of(data, 9, reads=frozenset(), modalities=SHAPES)
    assert next(unread).modalities is None, "rows cost reading"


def test_a_source_without_a_modality_lacks_it(stored, tmp_path):
    plain = write_shards(tmp_path / "plain", 4, 4, start=50)
    of_both = [source(*stored), source(plain, {})]
    data = data_of(*(of_one | {"weight": 1.0} for of_one in of_both))
    batch = next(loader_of(data, 8, reads=READS, modalities=SHAPES))
    lacking = batch.sample_id >= 18
    assert 0 < lacking.sum() < 8
    assert not batch.modality_lengths[lacking].any() and not batch.modalities[lacking].any()


@pytest.mark.parametrize(
    "shapes, named, message",
    [
        ({"audio": (6, 4), "taste": (1, 2)}, ["audio"], "reads 'taste', which no source has.*DIR"),
        ({"audio": (6, 4)}, ["audio", "depth"], "'depth', which the model does not read"),
        ({"audio": (4, 4)}, ["audio"], r"5 rows of 4 numbers.*up to 4.*length: 5"),
        ({"audio": (5, 8)}, ["audio"], "reads up to 5 of 8"),
    ],
)  # fmt: skip
def test_modalities_that_do_not_fit_the_model_are_refused(stored, shapes, named, message):
    shards, folders = stored
    data = data_of(source(shards, {name: folders[name] for name in named}))
    with pytest.raises(ValueError, match=message):
        loader_of(data, 9, reads=READS, modalities=shapes)


def test_files_that_are_not_of_the_shards_are_refused(stored, tmp_path):
    _, folders = stored
    others = write_shards(tmp_path / "others", 18, 6)
    n = 0
    for folder, message in (
        (folders["audio"], "of other samples than the 6 of 00000.tar"),
        (str(tmp_path / "nowhere"), "holds no rows of a modality .*vlp data modality"),
    ):
        with pytest.raises(ValueError, match=message):
            loader_of(data_of(source(others, {"audio": folder})), 9)
        n += 1
    assert n == 2


# Towers


def test_rows_beyond_a_sample_s_length_have_no_influence():
    torch.manual_seed(0)
    rows, lengths = torch.randn(3, 6, 4), torch.tensor([6, 3, 0])
    for layers in (0, 2):
        options = config.Modality(4, length=6, layers=layers, patch=2, width=8, heads=2)
        tower = Tower(options, 5).eval()
        changed = rows.clone()
        changed[1, 4:] = torch.randn(2, 4)  # the patch of the third row ends before them
        first, second = tower(rows, lengths), tower(changed, lengths)
        assert first.shape == (3, 5) and first.isfinite().all()
        assert torch.equal(first, second)
        changed[1, 0] += 1
        assert not torch.allclose(first[1], tower(changed, lengths)[1])


def test_a_video_s_mean_begins_as_that_of_its_frames_embeddings():
    model = tiny(heads={"modalities": {"video": {"frames": {"n": 3}}}})
    frames = torch.randint(0, 256, (4, 3, *model.image_spec.size), dtype=torch.uint8)
    others = model(
        modalities=torch.zeros(2, 0),
        modality_lengths=torch.tensor([[3], [1]]),
        frames=frames,
        frame_places=torch.tensor([0, 1, 2, 3]),
    ).others
    of_frames = model.encode_image(frames)
    expected = torch.stack([of_frames[:3].mean(0), of_frames[3]])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(others[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_the_description_builds_the_same_towers_and_exports_leave_them():
    model = tiny(heads={"modalities": TOWERS})
    again = from_description(model.description())
    again.load_state_dict(model.state_dict())
    assert list(again.modality_shapes) == ["audio", "depth"]
    assert model.modality_shapes == again.modality_shapes == SHAPES
    assert not any("modalities" in name for name in model.open_clip_state_dict())


@pytest.mark.parametrize(
    "towers, message",
    [
        ({"image": {"features": 3}}, "modalities names image; expected words other than"),
        ({"a.b": {"features": 3}}, "modalities names a.b"),
        ({"audio": {"features": 0}}, "expected numbers >= 1"),
        ({"audio": {"features": 3, "length": 5, "patch": 2}}, "length 5 in patches of 2"),
        ({"audio": {"features": 3, "width": 6, "heads": 4}}, "width 6 of 4 heads"),
    ],
)
def test_towers_that_cannot_be_are_refused(towers, message):
    with pytest.raises(ValueError, match=message):
        schema.parse(config.Heads, {"modalities": towers})


# Steps


def with_modalities(rows=slice(None)) -> Batch:
    """Samples of which some lack the sound, some the depth or the video, and the last all."""
    generator = torch.Generator().manual_seed(7)
    batch = make_batch(slice(None))
    lengths = torch.tensor(
        [[6, 1, 3], [3, 1, 1], [0, 1, 2], [1, 0, 3], [2, 1, 0], [5, 1, 2]]
    ).repeat(2, 1)
    lengths[-1] = 0
    batch = Batch(
        batch.image,
        batch.text,
        batch.sample_id,
        batch.key,
        modalities=torch.randn(ROWS, 27, generator=generator, dtype=torch.float64),
        modality_lengths=lengths,
        frames=batch.image.unsqueeze(1).expand(-1, 3, -1, -1, -1).flip(0).contiguous(),
    )
    return batch._rows(rows)


def on_one_rank_only(rows=slice(None)) -> Batch:
    """The samples of the second of two ranks have neither sound nor video."""
    batch = with_modalities()
    batch.modality_lengths[ROWS // 2 :, [0, 2]] = 0
    return batch._rows(rows)


def trained(micro_batches=1, engine="ddp", batch=with_modalities):
    return gradients_and_weights(
        micro_batches,
        steps=1,
        batch=batch,
        heads=HEADS,
        objective=ALL,
        engine=engine,
    )


def test_micro_batches_and_ranks_change_nothing():
    expected = trained()
    of_towers = {name for name in expected[0] if name.startswith("heads.modalities.")}
    assert len(of_towers) > 15
    translators = [name for name in expected[0] if name.startswith("heads.translators.")]
    assert len(translators) == 32 and all(any(expected[0][name]) for name in translators)
    live = [name for name in of_towers if any(expected[0][name])]
    assert len(live) >= len(of_towers) - 1, "an empty gradient proves nothing"

    in_parts = trained(3)
    assert assert_close(in_parts[0], expected[0], 1e-9) > 35
    assert_close(in_parts[1], expected[1], 1e-9)
    alone = trained(batch=on_one_rank_only)
    of_ranks = ranks.run(2, _trained_both)
    assert len(of_ranks) == 2
    for whole, some_without in of_ranks:
        for of_rank, of_one in ((whole, expected), (some_without, alone)):
            assert_close(of_rank[0], of_one[0], 1e-9)
            assert_close(of_rank[1], of_one[1], 1e-9)


def _trained_both() -> tuple:
    return trained(2), trained(batch=on_one_rank_only)


@pytest.mark.slow
def test_shards_of_weights_change_nothing():
    expected = trained(batch=on_one_rank_only)
    for gradients, weights, _ in ranks.run(2, trained, 3, "fsdp2", on_one_rank_only):
        assert_close(gradients, expected[0], 1e-9)
        assert_close(weights, expected[1], 1e-9)


def test_a_batch_in_which_a_modality_is_absent_trains_on():
    training = make_training(2, heads=HEADS, objective=ALL)
    batch = with_modalities()
    batch.modality_lengths[:, [0, 2]] = 0
    scalars = train_step(training, batch)
    assert scalars["gram"] == scalars["symile"] == scalars["gram.complete"] == 0
    assert scalars["translation"] > 0, "text and image are there"
    assert scalars["modality_pairs.image_0"] == scalars["modality_pairs.image_2"] == 0
    assert scalars["modality_pairs.image_1"] > 0.5
    assert all(p.isfinite().all() for p in training.engine.module.parameters())


def test_two_modalities_are_today_s_loss_and_state_bit_for_bit():
    results = []
    for objective in ({"infonce": {}}, {"modality_pairs": {}}):
        training = make_training(3, objective=objective, double=False)
        values = [train_step(training, make_batch())["loss"] for _ in range(2)]
        results.append((values, training.engine.state(everywhere=True)))
    (plain, state), (pairs, other) = results
    assert plain == pairs
    assert len(state[0]) > 20 and not any("modalities" in name for name in state[0])
    for one, two in zip(state, other, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_masks_are_those_of_the_lengths():
    lengths = torch.tensor([[2, 0], [0, 1]])
    found = as_terms_read({"others": torch.zeros(2, 2, 3), "modality_lengths": lengths})
    assert found["others_valid"].tolist() == [[True, False], [False, True]]
    assert "others_valid" not in as_terms_read({"scale": 1.0})


# What is mistyped


def objective(**terms):
    return losses.build(plugin.keyed("vlp.losses", terms))


def test_names_and_idle_towers_are_refused_before_the_first_step():
    model = tiny(heads={"modalities": TOWERS})
    right = objective(modality_pairs={"pairs": [["text", "audio"]]})
    check_modalities(right, model, 12)
    check_needs(right, frozenset(), model)
    wrong = objective(modality_pairs={"pairs": [["text", "audoi"]]})
    expected = "found audoi, expected modalities of the run: image, text, audio, depth"
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_modalities(wrong, model, 12)
    narrow = tiny(heads={"modalities": TOWERS}, embed_dim=3)
    with pytest.raises(ValueError, match="'gram': found 4 modalities in a space of 3 dimensions"):
        check_modalities(objective(gram={}), narrow, 12)
    nested = objective(matryoshka={"widths": [48, 3], "of": {"gram": {}}})
    expected = "'matryoshka': the term 'gram': found 4 modalities in a space of 3 dimensions"
    with pytest.raises(ValueError, match=expected):
        check_modalities(nested, model, 12)
    many = objective(symile={"negatives": "n_squared"})
    with pytest.raises(ValueError, match="'symile': negatives: n_squared compares 65 candidates"):
        check_modalities(many, model, 65)
    with pytest.raises(ValueError, match=r"gives \['others'\], which no term reads"):
        check_needs(objective(infonce={}), frozenset(), model)
    with pytest.raises(ValueError, match="expected pairs of two different modalities"):
        objective(modality_pairs={"pairs": [["text", "text"]]})
    rows = torch.eye(4)
    with pytest.raises(ValueError, match="other_names: found audio, expected one"):
        right(image=rows, text=rows, others=rows.expand(2, 4, 4), other_names=("audio",), scale=1.0)
    for names in (("audio", "audio"), ("audio", "image")):
        with pytest.raises(ValueError, match=r"other_names: found .* expected different names"):
            right(image=rows, text=rows, others=rows.expand(2, 4, 4), other_names=names, scale=1.0)
