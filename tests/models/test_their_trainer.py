"""A model that open_clip's own trainer trained goes on here at the loss that it has there."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import open_clip
import pytest
import torch
from PIL import Image

from tests.data.material import encoded, picture, write_tar
from tests.test_train import losses
from vlp import config
from vlp.train import train

SIDE, N = 32, 12
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
THEIRS = """
import sys, open_clip
open_clip.add_model_config(sys.argv[1])
from open_clip_train.main import main
main(sys.argv[2:])
"""
OURS = """
out: {out}
init_from: "{start}"
data:
  sources: [{{name: shards, path: "{data}"}}]
  workers: 0
  augment: {{scale: [1.0, 1.0], ratio: [1.0, 1.0]}}
model:
  image_tower: {{name: vit, image_size: 32, patch_size: 8, width: 64, layers: 2, head_width: 64}}
  text_tower: {{name: transformer, context_length: 24, width: 32, layers: 1, heads: 2}}
  embed_dim: 16
train: {{duration: 1, batch: 12, precision: float32}}
objective: {{infonce: {{}}}}
log: {{every: 1}}
"""


@pytest.mark.slow
def test_the_next_loss_is_the_one_that_their_model_has(tmp_path):
    captions = [f"a picture of {i} things" for i in range(N)]
    data = [encoded(picture(i, (SIDE, SIDE))) for i in range(N)]
    rows, members = [["filepath", "title"]], []
    for i, (caption, png) in enumerate(zip(captions, data)):
        (tmp_path / f"{i}.png").write_bytes(png)
        rows.append([str(tmp_path / f"{i}.png"), caption])
        members += [(f"{i:03}.png", png), (f"{i:03}.txt", caption.encode())]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    write_tar(tmp_path / "shards/00000.tar", members)
    architecture = tmp_path / "own.json"
    architecture.write_text(json.dumps(ARCHITECTURE))

    # Two epochs of theirs, far enough to be no longer the start.
    options = f"""--model own --dataset-type csv --train-data {tmp_path}/pairs.csv --device cpu
        --batch-size 6 --epochs 2 --lr 1e-3 --warmup 0 --workers 0 --seed 0 --precision fp32
        --logs {tmp_path}/logs --name tuned"""
    command = [sys.executable, "-c", THEIRS, str(architecture), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    trained = tmp_path / "logs/tuned/checkpoints/epoch_2.pt"
    assert trained.exists(), done.stderr[-2000:]

    open_clip.add_model_config(architecture)
    theirs, _, transform = open_clip.create_model_and_transforms(
        "own", pretrained=str(trained), load_weights=True
    )

    pixels = torch.stack([transform(Image.open(tmp_path / f"{i}.png")) for i in range(N)])
    tokens = open_clip.get_tokenizer("own")(captions)
    with torch.no_grad():
        features = theirs.eval()(pixels, tokens)
        expected = open_clip.ClipLoss()(*features[:3]).item()

    settings = tmp_path / "ours.yaml"
    start = f"{architecture}:{trained}"
    settings.write_text(OURS.format(out=tmp_path / "run", start=start, data=tmp_path / "shards"))
    run = train(config.load(settings, []))
    assert losses(run)[1] == pytest.approx(expected, rel=1e-5)

    # Their start would not do.
    fresh = open_clip.create_model("own")
    with torch.no_grad():
        assert abs(open_clip.ClipLoss()(*fresh.eval()(pixels, tokens)[:3]).item() - expected) > 1e-3
