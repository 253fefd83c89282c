"""open_clip's own training loader reads shards that we write, and we read what img2dataset writes,
byte for byte.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.loader import peer_python
from tests.data.material import encoded, picture, write_shards, write_tar
from vlp.config import Captions
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards

# Runs in an environment of its own: open_clip's training loader breaks on newer webdatasets than
# 0.2.86.
READ = """
import argparse, json, sys
from open_clip import SimpleTokenizer, image_transform
from open_clip_train.data import get_wds_dataset
options = argparse.Namespace(
    train_data=sys.argv[1], val_data=sys.argv[1],
    train_num_samples=int(sys.argv[2]), val_num_samples=int(sys.argv[2]),
    train_data_upsampling_factors=None, dataset_resampled=False,
    seed=0, batch_size=8, workers=1, world_size=1,
)
tokenizer = SimpleTokenizer()
evaluated = image_transform((36, 40), is_train=False, mean=(0,) * 3, std=(1,) * 3)
info = get_wds_dataset(options, evaluated, False, tokenizer=tokenizer)
pairs = [pair for images, texts in info.dataloader for pair in zip(images, texts)]
found = [(tokenizer.decode(text.tolist()), float(image.mean())) for image, text in pairs]
trained = image_transform((32, 32), is_train=True)
train = get_wds_dataset(options, trained, True, tokenizer=tokenizer)
shapes = [list(images.shape) for images, _ in train.dataloader]
print(json.dumps([found, shapes]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_open_clips_loader_reads_our_shards(tmp_path):
    folder = Path(os.environ.get("VLP_CACHE") or Path.home() / ".cache" / "vlp") / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        python = peer_python(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"open_clip's environment cannot be made here: {error}")
    write_shards(tmp_path, 24, 8)
    urls = f"{tmp_path}/{{00000..00002}}.tar"
    done = subprocess.run(
        [python, "-c", READ, urls, "24"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, shapes = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 24 and shapes == [[8, 3, 32, 32]] * 3
    for i, (text, mean) in enumerate(found):
        assert f"caption{i}one<" in text.replace(" ", "")
        pixels = list(picture(i).convert("RGB").tobytes())
        assert abs(mean - sum(pixels) / len(pixels) / 255) < 0.01


def test_we_read_img2datasets_layout(tmp_path):
    """Successes only, in the order of completion, .jpg .json .txt, a missing caption without .txt,
    statistics beside.
    """
    members, kept = [], [3, 0, 7, 12]
    for i in kept:
        key = f"00000{i:04d}"
        record = {
            "caption": f"text {i}",
            "url": f"https://example.org/{i}",
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 40,
            "height": 36,
            "exif": "{}",
            "sha256": "0" * 64,
        }
        members += [
            (f"{key}.jpg", encoded(picture(i), "JPEG")),
            (f"{key}.json", json.dumps(record).encode()),
        ]
        members += [(f"{key}.txt", f"text {i}".encode())]
    bare = {
        "caption": None,
        "url": "https://example.org/9",
        "key": "000000009",
        "status": "success",
    }
    members += [
        ("000000009.jpg", encoded(picture(9), "JPEG")),
        ("000000009.json", json.dumps(bare).encode()),
    ]
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 20, "successes": 5}))
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    refused = r"1 of 5 samples have no caption.* vlp data filter SHARDS --to DIR"
    with pytest.raises(ValueError, match=refused):
        open_shards(Options(str(tmp_path)), Captions())
    source = open_shards(Options(str(tmp_path)), Captions(missing="drop"))
    assert [source[k].captions for k in range(4)] == [
        (f"text {i}",) for i in kept
    ] and source.n_left_out == 1
    assert [source[k].image for k in range(4)] == [encoded(picture(i), "JPEG") for i in kept]
    assert source[1].key == "000000000" and source[1].meta["url"] == "https://example.org/0"
