"""Retrieval and zero-shot classification of further modalities."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.data.test_sounds import tone
from tests.eval import material
from tests.eval.material import direction, hearing, known_encoder
from tests.models.tiny import tiny
from tests.test_modalities import write_rows
from vlp import plugin, watch
from vlp.data.decode import eval_transform
from vlp.data.sounds import cut, decoded, log_mel
from vlp.eval import evaluation, modalities
from vlp.eval.embed import Context
from vlp.eval.models import from_model
from vlp.eval.pictures import Contents, DataError
from vlp.schema import ConfigError

N = 9
CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, Path]:
    """Sample i is of class i mod 3, is called number i + 1, and has a sound unless i mod 3 is 0."""
    folder = tmp_path_factory.mktemp("heard")
    for first in range(0, N, 5):
        members = []
        for i in range(first, min(first + 5, N)):
            meta = {"captions": [f"{i + 1}", "another"], "class": CLASSES[i % 3]}
            members.append((f"{i}.png", material.png(material.picture(i + 1))))
            members.append((f"{i}.json", json.dumps(meta).encode()))
        material.write_tar(folder / "shards" / f"{first:05d}.tar", members)
    return folder / "shards", write_rows(folder / "audio", folder / "shards", (3,), lengths=False)


def of_number(number: int) -> torch.Tensor:
    return direction("sound", number)


def of_text(text: str) -> torch.Tensor:
    """A number's own direction; a class is near its members'."""
    if text.isdigit():
        return of_number(int(text))
    members = [i for i in range(N) if CLASSES[i % 3] in text]
    return torch.stack([of_number(i + 1) for i in members]).mean(0) if members else direction(text)


def knowing():
    return hearing(known_encoder(of_number, of_text), "sound")


def evaluated(encoder, task: str, options: dict) -> dict:
    (chosen,) = tasks = list(plugin.keyed("vlp.eval.tasks", {task: options}))
    records, _ = evaluation.evaluate(encoder, tasks, Context(workers=0), evaluation.read_all(tasks))
    record = records[0]
    assert not [name for name in record["metrics"] if watch.unlisted(chosen, name)]
    return record


def test_every_modality_finds_every_other_over_samples_that_have_both(stored):
    shards, audio = stored
    options = {"data": str(shards), "modalities": {"audio": str(audio)}}
    record = evaluated(knowing(), "modality_retrieval", options)
    scores, counts = record["metrics"], record["counts"]
    ways = [name for name in scores if name.endswith("_recall@1")]
    assert len(ways) == 6 and all(scores[way] == 1 for way in ways) and scores["mean_recall"] == 1
    assert counts["samples_with_text_and_audio"] == 6 and counts["samples_with_image_and_text"] == N

    # The sound of another sample is no match.
    deaf = hearing(known_encoder(of_number, of_text), "noise")
    chosen = options | {"pairs": [["text", "audio"]]}
    scores = evaluated(deaf, "modality_retrieval", chosen)["metrics"]
    assert set(scores) == {"mean_recall"} | {
        f"{way}_{recall}"
        for way in ("text_to_audio", "audio_to_text")
        for recall in ("recall@1", "recall@5", "recall@10", "mean_recall")
    }  # fmt: skip
    assert scores["text_to_audio_recall@1"] < 0.7 and scores["text_to_audio_recall@10"] == 1


def test_sounds_are_classified_by_prompts(stored):
    shards, audio = stored
    options = {"data": str(shards), "modalities": {"audio": str(audio)}, "templates": ["a {}"]}
    record = evaluated(knowing(), "modality_zeroshot", options)
    # A class is the mean of its members here, which another's mean may come close to.
    assert record["metrics"]["acc1"] == record["metrics"]["audio_acc1"] > 0.8
    assert record["counts"]["samples_with_audio"] == 6 and record["counts"]["classes"] == 3
    deaf = hearing(known_encoder(of_number, of_text), "noise")
    assert evaluated(deaf, "modality_zeroshot", options)["metrics"]["acc1"] < 0.7


def test_a_model_of_ours_embeds_them_as_in_training(stored):
    shards, audio = stored
    model = tiny(heads={"modalities": {"audio": {"features": 3}}}).eval()
    encoder = from_model(model)
    rows, lengths = torch.rand(4, 3), torch.ones(4, 1, dtype=torch.int64)
    expected = model(modalities=rows, modality_lengths=lengths).others
    torch.testing.assert_close(encoder.encode_others(rows, lengths), expected.detach())
    options = {"data": str(shards), "modalities": {"audio": str(audio)}}
    assert 0 <= evaluated(encoder, "modality_retrieval", options)["metrics"]["mean_recall"] <= 1


@pytest.fixture(scope="module")
def sounding(tmp_path_factory) -> Path:
    """Sample i is of class i mod 3, has the caption i + 1, and a tone unless i mod 3 is 0."""
    shards = tmp_path_factory.mktemp("sounding") / "shards"
    members = []
    for i in range(N):
        if i % 3:
            members.append((f"{i}.high.wav", tone(200 * (i + 1))))
        meta = {"captions": [f"{i + 1}"], "class": CLASSES[i % 3]}
        members.append((f"{i}.png", material.png(material.picture(i + 1))))
        members.append((f"{i}.json", json.dumps(meta).encode()))
    material.write_tar(shards / "00000.tar", members)
    return shards


def listening(**sound):
    """A model that makes rows of the sounds among the samples' members."""
    of_audio = {
        "sound": {"seconds": 0.1, "bands": 8, "rate": 8000} | sound,
        "patch": 2,
        "layers": 1,
    }
    model = tiny(heads={"modalities": {"audio": of_audio}}).eval()
    return model, from_model(model)


def test_members_are_decoded_as_the_model_reads_them(sounding):
    model, encoder = listening()
    (chosen,) = plugin.keyed(
        "vlp.eval.tasks",
        {"modality_retrieval": {"data": str(sounding), "modalities": {"audio": None}}},
    )
    data = chosen.module.read(chosen.options)
    rows, has = modalities.embedded(encoder, data.beside, Context(workers=0, batch=4))["audio"]
    assert has.tolist() == [i % 3 > 0 for i in range(N)]
    n = 0
    for i in range(N):
        if not i % 3:
            continue
        _, samples = decoded(tone(200 * (i + 1)))
        expected = torch.from_numpy(log_mel(cut(samples, 800, None), 8000, 8)[:10])
        of_one = model(modalities=expected.reshape(1, -1), modality_lengths=torch.tensor([[10]]))
        torch.testing.assert_close(rows[i], of_one.others[0, 0].detach())
        n += 1
    assert n == 6

    record = evaluated(encoder, "modality_retrieval", of_members(sounding))
    assert record["counts"]["samples_with_text_and_audio"] == 6
    record = evaluated(encoder, "modality_zeroshot", of_members(sounding) | {"templates": ["a {}"]})
    assert record["counts"]["samples_with_audio"] == 6

    # Another sound of the sample is another result.
    digests = {
        modalities.digest(data.beside, listening(member=member)[1])
        for member in ("", "high", "low")
    }
    assert len(digests) == 2, "the first sound is the high one, and there is no low one"


def test_frames_are_embedded_as_in_training(tmp_path):
    members = []
    for i, n_frames in enumerate((3, 1, 0, 7)):
        frames = [material.png(material.picture(10 * i + k + 2)) for k in range(n_frames)]
        members += [(f"{i}.{k}.png", frame) for k, frame in enumerate(frames)]
        members += [(f"{i}.png", material.png(material.picture(i + 1)))]
        members += [(f"{i}.txt", f"{i}".encode())]
    material.write_tar(tmp_path / "00000.tar", members)
    of_video = {"frames": {"n": 3}, "layers": 1, "width": 8, "heads": 2}
    model = tiny(heads={"modalities": {"video": of_video, "audio": {"features": 3}}}).eval()
    options = {"data": str(tmp_path), "modalities": {"video": None}}
    (chosen,) = plugin.keyed("vlp.eval.tasks", {"modality_retrieval": options})
    data = chosen.module.read(chosen.options)
    context = Context(workers=0, batch=3)
    embedded = modalities.embedded(from_model(model), data.beside, context)
    stored = {"data": str(tmp_path), "modalities": {"video": str(tmp_path / "rows")}}
    write_rows(tmp_path / "rows", tmp_path, (3, 4), lengths=True)
    with pytest.raises(DataError, match=r"reads no stored rows of it; write .*video: null"):
        evaluated(from_model(model), "modality_retrieval", stored)
    rows, has = embedded["video"]
    assert has.tolist() == [True, True, False, True] and embedded.keys() == {"video"}

    # One video alone, of the frames that are there.
    n = 0
    for i, places in ((0, (0, 1, 2)), (1, (0,)), (3, (0, 2, 5))):
        pictures = [material.png(material.picture(10 * i + k + 2)) for k in places]
        pixels = torch.stack([eval_transform(data, model.image_spec) for data in pictures])
        of_one = model(
            modalities=torch.zeros(1, 3),
            modality_lengths=torch.tensor([[0, len(places)]]),
            frames=pixels,
            frame_places=torch.arange(len(places)),
        )
        torch.testing.assert_close(rows[i], of_one.others[0, 1].detach(), atol=1e-5, rtol=1e-4)
        n += 1
    assert n == 3


def of_members(shards: Path) -> dict:
    return {"data": str(shards), "modalities": {"audio": None}}


def test_members_that_cannot_be_read_or_that_the_model_does_not_read_are_refused(
    sounding, tmp_path
):
    with pytest.raises(DataError, match="reads stored rows of audio, no members of samples"):
        evaluated(knowing(), "modality_zeroshot", of_members(sounding))
    with pytest.raises(DataError, match=r"no sample of .* has audio|no sample of .* has both"):
        evaluated(listening(member="low")[1], "modality_zeroshot", of_members(sounding))
    members = [("0.png", material.png(material.picture(1))), ("0.txt", b"one"), ("0.wav", b"")]
    material.write_tar(tmp_path / "00000.tar", members)
    with pytest.raises(DataError, match=r"audio at .*00000.tar, byte .*: a sound file of 0 bytes"):
        evaluated(listening()[1], "modality_retrieval", of_members(tmp_path))


def test_rows_are_part_of_what_was_scored(stored, tmp_path):
    shards, audio = stored
    other = write_rows(tmp_path / "other", shards, (2, 3), lengths=True)
    digests = []
    for folder in (audio, audio, other):
        options = {"data": str(shards), "modalities": {"audio": str(folder)}}
        (chosen,) = plugin.keyed("vlp.eval.tasks", {"modality_zeroshot": options})
        data = chosen.module.read(chosen.options)
        context = Context(workers=0, contents=Contents())
        encoder = knowing() if folder == audio else long(knowing())
        digests.append(chosen.module.run(encoder, data, chosen.options, context).digest)
    assert digests[0] == digests[1] != digests[2]


def long(encoder):
    """The same that would read two rows a sample."""
    return replace(encoder, modality_shapes={"audio": (2, 3)})


@pytest.mark.parametrize("task", ["modality_retrieval", "modality_zeroshot"])
def test_a_model_without_the_tower_and_data_without_the_rows_are_refused(stored, tmp_path, task):
    shards, audio = stored
    options = {"data": str(shards), "modalities": {"audio": str(audio)}}
    n = 0
    for encoder, changed, message in (
        (known_encoder(of_number, of_text), {}, "has no tower for audio; it reads image, text"),
        (long(knowing()), {"modalities": {"audio": str(tmp_path)}}, "no rows of a modality"),
        (knowing(), {"modalities": {"smell": str(audio)}}, "has no tower for smell"),
    ):
        with pytest.raises(DataError, match=message):
            evaluated(encoder, task, options | changed)
        n += 1
    assert n == 3

    loose = tmp_path / "loose" / "cat"
    loose.mkdir(parents=True)
    (loose / "0.png").write_bytes(material.png(material.picture(1)))
    (loose / "0.txt").write_text("one")
    with pytest.raises(DataError):
        evaluated(knowing(), task, options | {"data": str(loose.parent)})


@pytest.mark.parametrize("pairs", [[["text", "audoi"]], [["text", "text"]], []])
def test_pairs_that_are_none_are_refused(pairs):
    options = {"data": "x", "modalities": {"audio": "y"}, "pairs": pairs}
    with pytest.raises((ConfigError, ValueError), match="expected pairs of two of image"):
        plugin.keyed("vlp.eval.tasks", {"modality_retrieval": options})
