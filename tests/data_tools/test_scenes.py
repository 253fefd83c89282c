"""Scenes: pictures agree with their JSON, captions with both, splits stay apart, bytes are
reproducible.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter, deque
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw

from tests.data_tools.scene_checker import truth
from vlp.data_tools import scenes
from vlp.data_tools.scenes import sound
from vlp.data_tools.scenes.sample import SPLITS, sample
from vlp.data_tools.scenes.words import (
    COLORS,
    HELDOUT_COUNTS,
    HELDOUT_KINDS,
    KINDS,
    TRAINED_KINDS,
    heldout,
)

N_PIXELS = 40  # scenes whose pixels are looked at
N_CAPTIONS = 600  # scenes of each split whose captions are checked


@cache
def some(split: str, n: int = N_CAPTIONS, seed: int = 0) -> list[scenes.Scene]:
    return [scenes.generate(i, seed, split) for i in range(n)]


@cache
def exact(split: str, n: int = N_CAPTIONS, seed: int = 0) -> list[dict]:
    """Scenes without pictures and captions, which take most of the time."""
    return [sample(i, seed, split) for i in range(n)]


def described(scene: dict) -> tuple:
    ground = scene["background"]
    return (
        ground["color"],
        ground["texture"],
        scene["relation"],
        tuple(tuple(g.items()) for g in scene["groups"]),
    )


# --- the JSON against the pixels ---


def blobs(image: Image.Image) -> Counter[str]:
    """Connected regions of each object color in a picture, by flood fill; specks below 12 pixels at
    128 px are edges.
    """
    width, height = image.size
    pixels = np.asarray(image).reshape(-1, 1, 3)
    near_colors = np.linalg.norm(pixels - np.array(list(COLORS.values())), axis=2) < 40
    first_near = near_colors.argmax(1)
    names = list(COLORS)
    label = [names[i] if any_near else None for i, any_near in zip(first_near, near_colors.any(1))]

    seen, found = set(), Counter()
    for start, name in enumerate(label):
        if name is None or start in seen:
            continue
        queue, area = deque([start]), 0
        seen.add(start)
        while queue:
            place = queue.popleft()
            area += 1
            x = place % width
            for near in (
                place - 1 if x else -1,
                place + 1 if x + 1 < width else -1,
                place - width,
                place + width,
            ):
                if 0 <= near < width * height and near not in seen and label[near] == name:
                    seen.add(near)
                    queue.append(near)
        if area >= 12:
            found[name] += 1
    return found


def test_every_object_is_one_blob_of_its_color() -> None:
    """Found in the pixels: exactly the objects of the JSON, by color; nothing overlaps or touches,
    nothing is missing.
    """
    kinds = Counter()
    for index in range(N_PIXELS):
        image, meta, _ = scenes.generate(index, 7, "train", size=128)
        expected = Counter(o["color"] for o in meta["scene"]["objects"])
        assert blobs(image) == expected, f"scene {index}"
        kinds.update((o["color"], o["shape"]) for o in meta["scene"]["objects"])
    assert len(kinds) > 30 and sum(kinds.values()) > 4 * N_PIXELS


def test_a_missing_object_is_noticed() -> None:
    """Negative control of the test above: paint one object over and the blobs no longer agree."""
    image, meta, _ = scenes.generate(0, 7, "train", size=128)
    first = meta["scene"]["objects"][0]
    r = first["diameter"] / 2
    box = [
        128 * (first["x"] - r),
        128 * (first["y"] - r),
        128 * (first["x"] + r),
        128 * (first["y"] + r),
    ]
    ImageDraw.Draw(image).rectangle(box, fill=(146, 148, 152))
    assert blobs(image) != Counter(o["color"] for o in meta["scene"]["objects"])


def test_objects_have_their_color_after_jpeg_at_64_and_32_pixels() -> None:
    n = 0
    for scene in some("test", 200):
        small = Image.open(io.BytesIO(_jpeg(scene.image))).resize(
            (32, 32), Image.Resampling.BICUBIC
        )
        for picture, side in ((Image.open(io.BytesIO(_jpeg(scene.image))), 64), (small, 32)):
            for o in scene.meta["scene"]["objects"]:
                if o["shape"] == "ring":
                    continue  # the background shows at its centre
                pixel = picture.getpixel((int(o["x"] * side), int(o["y"] * side)))
                assert min(COLORS, key=lambda name: math.dist(COLORS[name], pixel)) == o["color"]
                n += 1
    assert n > 1000


def test_shapes_differ_in_pixels() -> None:
    """At 32 px every two shapes of one color differ clearly, on average over angles."""
    from vlp.data_tools.scenes.draw import _mask

    shapes = sorted({shape for _, shape in KINDS})
    # A small object of a 64 px picture, halved.
    masks = {s: _mask(s, 7, 0, 0).tobytes() for s in shapes}
    gaps = [
        sum(abs(x - y) for x, y in zip(masks[a], masks[b])) / 49 / 255
        for a in shapes
        for b in shapes
        if a < b
    ]
    assert len(gaps) == 28 and min(gaps) > 0.06, min(gaps)


def _jpeg(image: Image.Image) -> bytes:
    from vlp.data_tools.scenes.draw import encode

    return encode(image)


# --- captions ---


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_and_different(split: str) -> None:
    for scene in some(split):
        assert (
            len(set(scene.captions)) == len(scene.captions) >= (1 if split in scenes.PROOFS else 3)
        )
        for caption in scene.captions:
            assert truth(caption, scene.meta["scene"]) is True, (caption, scene.meta["scene"])


def test_the_checker_refuses_captions_of_other_scenes() -> None:
    """Negative control: the same captions are (nearly) never true of another scene, and no
    gibberish is.
    """
    all_scenes = some("train")
    wrong = [truth(c, b.meta["scene"]) for a, b in pairwise(all_scenes) for c in a.captions]
    assert len(wrong) > 2500 and sum(w is True for w in wrong) / len(wrong) < 0.02
    assert not any(w is None for w in wrong)
    assert truth("red a circle", all_scenes[0].meta["scene"]) is None
    assert truth("a orange circle", all_scenes[0].meta["scene"]) is None


@pytest.mark.parametrize("kind", scenes.PROOFS)
def test_negatives_are_false_of_the_scene(kind: str) -> None:
    for scene in some(kind):
        meta = scene.meta
        texts = meta["negatives"]
        assert meta["kind"] == kind and meta["caption"] == scene.captions[0]
        assert len(texts) == len(meta["negative_kinds"]) == len(meta["negatives_valid"]) > 0
        assert len({*texts, meta["caption"]}) == len(texts) + 1
        verdicts = [truth(text, meta["scene"]) for text in texts]
        expected = {None, False} if kind == "order" else {False}
        assert set(verdicts) <= expected, (meta["caption"], list(zip(texts, verdicts)))


def test_negatives_speak_of_what_training_shows() -> None:
    """Else a model could tell a negative by its never having read such a combination."""
    for scene in [*some("binding"), *some("relations")]:
        for text in [scene.meta["caption"], *scene.meta["negatives"]]:
            assert not any(f"{color} {shape}" in text for color, shape in HELDOUT_KINDS)


def test_counting_is_balanced() -> None:
    counts = Counter(s.meta["scene"]["groups"][0]["count"] for s in some("counting", 540))
    assert counts == dict.fromkeys(range(2, 11), 60)
    assert all(len(s.meta["negatives"]) == 8 for s in some("counting"))
    assert sum(bool(s.meta["heldout"]) for s in some("counting", 540)) == 180


def test_training_sees_two_to_ten_about_equally_often() -> None:
    counts = Counter(g["count"] for scene in exact("train", 4000) for g in scene["groups"])
    shown = [counts[n] for n in range(2, 11)]
    assert min(shown) > 0.7 * max(shown), counts


# --- splits ---


def test_heldout_combinations_are_absent_from_training_and_present_in_heldout() -> None:
    assert len(HELDOUT_KINDS) == 8 and len(HELDOUT_COUNTS) == 9 and len(TRAINED_KINDS) == 56
    assert len({c for c, _ in HELDOUT_KINDS}) == len({s for _, s in HELDOUT_KINDS}) == 8
    seen = {"train": Counter(), "heldout": Counter()}
    for split, combinations in seen.items():
        for scene in exact(split, 4000):
            groups = scene["groups"]
            novel = [
                (g["color"], g["shape"])
                for g in groups
                if (g["color"], g["shape"]) in HELDOUT_KINDS
            ]
            novel += [
                (g["count"], g["shape"])
                for g in groups
                if (g["count"], g["shape"]) in HELDOUT_COUNTS
            ]
            assert len(novel) == len(heldout(groups))
            assert bool(novel) == (split == "heldout")
            combinations.update(novel)
    assert not seen["train"]
    assert set(seen["heldout"]) == HELDOUT_KINDS | HELDOUT_COUNTS


def test_no_evaluation_scene_is_described_like_a_training_scene() -> None:
    train = {described(scene) for scene in exact("train", 4000) + exact("train", 2000, 1)}
    for split in SPLITS:
        shared = train & {described(scene) for scene in exact(split)}
        assert bool(shared) == (split == "train"), split

    val = {described(scene) for scene in exact("val")}
    assert not val & {described(scene) for scene in exact("test")}


def test_generate_is_pure_and_seeds_matter() -> None:
    a, b, c = scenes.generate(5, 1), scenes.generate(5, 1), scenes.generate(5, 2)
    assert a.image.tobytes() == b.image.tobytes() and a.meta == b.meta and a.captions == b.captions
    assert a.image.tobytes() != c.image.tobytes()
    with pytest.raises(ValueError, match=r"no split 'trian'.*train"):
        scenes.generate(0, 0, "trian")


# --- what is written ---

SMALL = {
    "n_train": 1030,
    "n_val": 40,
    "n_test": 40,
    "n_zeroshot": 60,
    "n_retrieval": 120,
    "n_proofs": 27,
    "size": 32,
    "seed": 3,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same sets, written by one process and by two."""
    root = tmp_path_factory.mktemp("scenes")
    for n in (1, 2):
        made = scenes.write(root / str(n), processes=n, **SMALL)
    assert (
        made["zeroshot"] == 112
        and made["novel_zeroshot"] == 16
        and made["train"] == 1030
        and made["counting"] == 27
    )
    return root / "1", root / "2"


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_bytes_do_not_depend_on_the_number_of_processes(folders: tuple[Path, Path]) -> None:
    """Every file but the index, which holds times of change."""
    files = [
        [p.relative_to(f) for p in sorted(f.rglob("*")) if p.is_file() and p.name != "_index.bin"]
        for f in folders
    ]
    assert files[0] == files[1] and sum(p.suffix == ".tar" for p in files[0]) == 12
    for name in files[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_shards_hold_what_generate_returns(folders: tuple[Path, Path]) -> None:
    shard = members(folders[1] / "train" / "00001.tar")
    record = json.loads(shard["000010007.json"])
    scene = scenes.generate(1007, 3, "train", 32)
    assert shard["000010007.jpg"] == _jpeg(scene.image)
    assert record["captions"] == scene.captions and record["scene"] == json.loads(
        json.dumps(scene.meta["scene"])
    )
    assert record["index"] == 1007 and len(shard) == 3 * 30


def test_the_index_knows_every_sample(folders: tuple[Path, Path]) -> None:
    from vlp.data.format import index

    for split, n in {"train": 1030, "heldout": 40, "counting": 27}.items():
        found = index(sorted((folders[1] / split).glob("*.tar")))
        assert sum(s.count for s in found) == n and not any(s.n_problems for s in found)


@pytest.mark.parametrize(
    "name, n_classes, rounds", [("zeroshot", 56, 2), ("novel_zeroshot", 64, 2)]
)
def test_zeroshot_sets_follow_clip_benchmark(
    folders: tuple[Path, Path], name: str, n_classes: int, rounds: int
) -> None:
    folder = folders[0] / name
    classes = (folder / "classnames.txt").read_text().splitlines()
    assert len(classes) == len(set(classes)) == n_classes
    assert all(
        t.count("{c}") == 1
        for t in (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    )
    assert (folder / "test" / "nshards.txt").read_text().strip() == "1"
    found = members(folder / "test" / "0.tar")
    labels = Counter()
    for key in [n[:-5] for n in found if n.endswith(".json")]:
        scene = json.loads(found[f"{key}.json"])["scene"]
        cls = int(found[f"{key}.cls"])
        labels[cls] += 1
        assert truth(classes[cls], scene) is True
        assert [truth(c, scene) for c in classes].count(True) == 1
    assert set(labels.values()) == {rounds} and len(labels) == (56 if name == "zeroshot" else 8)


def test_retrieval_captions_belong_to_one_picture_each(folders: tuple[Path, Path]) -> None:
    found = members(folders[0] / "retrieval" / "test" / "0.tar")
    assert (folders[0] / "retrieval" / "dataset_type.txt").read_text().strip() == "retrieval"
    texts = {
        name: data.decode().splitlines() for name, data in found.items() if name.endswith(".txt")
    }
    records = {name: json.loads(found[name[:-4] + ".json"])["scene"] for name in texts}
    assert len(texts) == 120 and all(len(lines) == 3 for lines in texts.values())
    assert len({line for lines in texts.values() for line in lines}) == 360
    for name, lines in texts.items():
        for line in lines:
            assert [other for other, scene in records.items() if truth(line, scene) is True] == [
                name
            ], line


def test_a_killed_call_leaves_no_process_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlp.cli", "data", "scenes", "--to", str(tmp_path / "out")]
    arguments = [*command, "--train", "20000", "--processes", "2"]
    tool = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/train/*")) and time.monotonic() < deadline:
        time.sleep(0.02)

    workers = psutil.Process(tool.pid).children(recursive=True)
    tool.terminate()
    output, _ = tool.communicate(timeout=60)
    assert tool.returncode == 128 + signal.SIGTERM and len(workers) >= 2
    assert "vlp: ended by SIGTERM; the same command" in output
    _, alive = psutil.wait_procs(workers, timeout=10)
    for process in alive:
        process.kill()
    assert not alive


def test_a_folder_with_shards_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(FileExistsError, match=r"train.*already hold shards"):
        scenes.write(folders[0], n_train=10)


@pytest.mark.parametrize("wrong", [{"size": 8}, {"n_train": -1}])
def test_senseless_numbers_are_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match="16 pixels"):
        scenes.write(tmp_path, **wrong)


def test_the_command_writes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    scenes.arguments(parser)
    options = (
        "--train 5 --val 0 --test 0 --zeroshot 0 --retrieval 0 --proofs 0 --size 32 --processes 1"
    )
    assert scenes.run(parser.parse_args(["--to", str(tmp_path), *options.split()])) == 0
    assert "5 scenes in" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train"]


# Sounds


def test_each_object_is_a_beep_of_its_color_s_pitch_and_its_size_s_loudness():
    from vlp.data.sounds import decoded

    n, heard = 0, {}
    for index in range(40):
        scene = sample(index, 0, "train")
        rate, samples = decoded(sound.encode(scene))
        loud = np.abs(samples) > 0.02
        # Beeps are longer than any pause inside one, and pauses between them too.
        padded = np.convolve(loud, np.ones(200), "same") > 0
        starts = np.flatnonzero(np.diff(padded.astype(int)) == 1)
        ends = np.flatnonzero(np.diff(padded.astype(int)) == -1)
        assert rate == sound.RATE and len(starts) == len(ends) == len(scene["objects"])

        groups = scene["groups"]
        if scene["relation"] in ("right", "below"):
            groups = groups[::-1]
        kinds = [group for group in groups for _ in range(group["count"])]
        for kind, start, end in zip(kinds, starts, ends):
            beep = samples[start:end]
            assert (np.abs(beep).max() > 0.45) == (kind["size"] == "large")
            if kind["shape"] == "circle":
                spectrum = np.abs(np.fft.rfft(beep, 1 << 16))
                hertz = spectrum.argmax() * rate / (1 << 16)
                assert abs(hertz - sound.PITCHES[kind["color"]]) < 12
            heard.setdefault(kind["shape"], set()).add(kind["color"])
            n += 1
    assert n > 100 and len(heard) == 8 and all(heard.values())


def test_sounds_lie_beside_the_same_scenes(tmp_path):
    sets = {"n_val": 0, "n_test": 0, "n_zeroshot": 0, "n_retrieval": 0, "n_proofs": 0, "seed": 3}
    for name, sounds in (("plain", False), ("heard", True)):
        scenes.write(tmp_path / name, n_train=3, size=32, processes=1, sounds=sounds, **sets)
    plain, heard = (members(tmp_path / name / "train" / "00000.tar") for name in ("plain", "heard"))
    assert {name: heard[name] for name in plain} == plain and len(heard) == len(plain) + 3
    for index in range(3):
        assert heard[f"00000{index:04d}.wav"] == sound.encode(sample(index, 3, "train"))
