"""Videos as frames among the members of samples: which frames, cropped alike, resumed exactly."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch

from tests.data.material import IMAGE, data_of, encoded, loader_of, picture, write_tar
from vlp import config, schema
from vlp.config import Augment
from vlp.data.decode import train_transform
from vlp.data.frames import chosen

READS = frozenset({"others", "others_valid"})
N = 9
MOST = 4
_MIDDLE = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}


def frame(i: int, k: int) -> bytes:
    """Frame k of video i, in which each pixel tells k."""
    return encoded(picture(20 * i + k, (32, 32)))


def n_frames(i: int) -> int:
    """Every third sample has no video, and sample 1 one of one frame."""
    return 0 if i % 3 == 0 else (1, 12, 0, 3, 7)[(i - 1) % 5]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("films with blanks")
    members = []
    for i in range(N):
        frames = [(f"film.{i}.{k}.png", frame(i, k)) for k in range(n_frames(i))]
        # In the order of their names 10 comes before 2, and all before the picture.
        members += sorted(frames)
        members += [(f"film.{i}.png", encoded(picture(i))), (f"film.{i}.txt", b"a caption")]
    write_tar(folder / "00000.tar", members)
    return folder


def video_loader(path: Path, batch: int = N, augment=_MIDDLE, **options):
    options = {
        "reads": READS,
        "modalities": {"video": (MOST, 0)},
        "decoded": {"video": config.Frames(MOST)},
    } | options
    return loader_of(data_of(path, augment=augment), batch, **options)


def test_frames_are_chosen_evenly():
    assert chosen(0, 4, None) == [] and chosen(1, 4, random.Random(0)) == [0]
    assert chosen(4, 4, random.Random(0)) == [0, 1, 2, 3]
    assert chosen(12, 4, None) == [1, 4, 7, 10] and chosen(9, 1, None) == [4]
    drawn = {tuple(chosen(12, 4, random.Random(seed))) for seed in range(200)}
    assert len(drawn) > 50
    for places in drawn:
        assert all(3 * part <= place < 3 * part + 3 for part, place in enumerate(places))
    assert {place for places in drawn for place in places} == set(range(12))


def test_frames_come_with_their_samples_and_zeros_behind_the_last(shards):
    loader = video_loader(shards, random_pieces=False)
    assert loader.carries >= {"frames", "modalities", "modality_lengths"}
    assert not [problem for problem in loader.problems() if "png" in problem]
    batch = next(loader)
    assert batch.frames.shape == (N, MOST, 3, *IMAGE.size) and batch.modalities.shape == (N, 0)
    n_seen = 0
    for key, frames, lengths in zip(batch.key, batch.frames, batch.modality_lengths):
        i = int(key.rpartition(".")[2])
        places = chosen(n_frames(i), MOST, None)
        assert lengths.tolist() == [len(places)] and not frames[len(places) :].any()
        for place, pixels in zip(places, frames):
            expected = train_transform(frame(i, place), IMAGE, Augment(**_MIDDLE), random.Random(0))
            assert torch.equal(pixels, expected)
            n_seen += 1
    assert n_seen == sum(min(n_frames(i), MOST) for i in range(N)) > 8


def test_frames_are_drawn_anew_cropped_alike_and_the_same_when_a_step_is_made_again(shards):
    whole = video_loader(shards, 3, {"scale": [0.3, 0.9], "flip": 0.5})
    steps = [next(whole) for _ in range(6)]
    still = {}
    for batch in steps:
        for key, frames, lengths in zip(batch.key, batch.frames, batch.modality_lengths):
            if lengths[0]:
                still.setdefault(key, []).append(frames)
    assert len(still) == 5 or len(still) == 6
    assert all(len(seen) == 2 and not torch.equal(*seen) for seen in still.values())

    resumed = video_loader(shards, 3, {"scale": [0.3, 0.9], "flip": 0.5})
    resumed.load_state_dict(whole.state_dict(4))
    sent = pickle.loads(pickle.dumps(whole._steps))
    assert torch.equal(next(resumed).frames, steps[4].frames)
    assert torch.equal(sent[2][0].frames, steps[2].frames)


def test_all_frames_of_a_video_have_one_crop(tmp_path):
    """A video that stands still has equal frames, whatever the crop."""
    members = [(f"a.{k}.png", encoded(picture(5))) for k in range(MOST)]
    members += [("a.png", encoded(picture(5))), ("a.txt", b"a caption")]
    write_tar(tmp_path / "00000.tar", members)
    augment = {"scale": [0.2, 0.6], "flip": 0.5, "color": 0.4, "blur": 0.5}
    (frames,) = next(video_loader(tmp_path, 1, augment)).frames
    assert frames[0].any() and all(torch.equal(frames[0], other) for other in frames)


def test_a_frame_that_does_not_open_costs_its_sample(tmp_path):
    members = []
    for i in range(6):
        torn = [(f"{i}.0.png", frame(i, 0)), (f"{i}.1.png", b"" if i == 2 else frame(i, 1))]
        members += [*torn, (f"{i}.png", encoded(picture(i))), (f"{i}.txt", b"a caption")]
    write_tar(tmp_path / "00000.tar", members)
    loader = video_loader(tmp_path, 6)
    assert (next(loader).modality_lengths == 2).all()
    ((_, key, reason),) = loader.bad
    assert key == "2" and "frame 1 of the video" in reason


def test_samples_without_any_frame_are_refused(tmp_path):
    members = [("a.png", encoded(picture(1))), ("a.txt", b"a"), ("a.first.png", frame(1, 0))]
    write_tar(tmp_path / "00000.tar", members)
    with pytest.raises(ValueError, match=r"reads frames \(KEY.000.jpg, .*no sample of any source"):
        video_loader(tmp_path, 1)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"video": {"frames": {"n": 0}}}, "expected at least 1 frame"),
        ({"video": {"frames": {}, "sound": {}}}, "sound and frames are both given"),
        ({"video": {"frames": {}, "features": 8}}, "the members give 8 rows of embeddings"),
        ({"video": {"frames": {}, "patch": 3}}, "length 8 in patches of 3"),
        ({"video": {"frames": {}}, "film": {"frames": {}}}, "film, video|video, film"),
    ],
)
def test_videos_that_cannot_be_are_refused(keys, message):
    with pytest.raises(schema.ConfigError, match=message):
        schema.parse(config.Heads, {"modalities": keys})
