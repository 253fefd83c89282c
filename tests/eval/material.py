"""Small things that evaluation tests are made of: pictures that say who they are, encoders with
known answers, tiny models.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlp.eval.models import Encoder

DATA = Path(
    os.environ.get("VLP_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data")
)


def shared(name: str) -> Path:
    """A file of the real data, or skip with the reason."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there; set VLP_DATA to the folder with the real data")
    return DATA / name


def picture(number: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A plain picture whose colour is its number."""
    return Image.new("RGB", size, (number % 256, number // 256, 7))


def number_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((image.width // 2, image.height // 2))
    return red + 256 * green


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def direction(*key: object, dim: int = 32) -> Tensor:
    """A unit vector that depends on `key` alone."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
    return torch.nn.functional.normalize(
        torch.randn(dim, generator=torch.Generator().manual_seed(seed)), dim=0
    )


def known_encoder(image, text, name: str = "known") -> Encoder:
    """An encoder from two functions: picture number -> vector, sentence -> vector."""
    return Encoder(
        name=name,
        pretrained="",
        prepare=lambda p: torch.tensor([number_of(p)]),
        image=lambda pixels: torch.stack([image(int(n)) for n in pixels[:, 0]]),
        text=lambda texts: torch.stack([text(t) for t in texts]),
    )


def constant() -> Encoder:
    """Everything is the same."""
    return known_encoder(lambda _: direction("same"), lambda _: direction("same"))


def random_encoder(seed: int = 0) -> Encoder:
    """Pictures and sentences that know nothing of each other."""
    return known_encoder(
        lambda n: direction(seed, "image", n), lambda t: direction(seed, "text", t)
    )


def hearing(encoder: Encoder, *key: object) -> Encoder:
    """The same with a tower for sounds, which knows their first number: a sound of number i is of
    the direction of `key` and i.
    """

    def others(rows: Tensor, lengths: Tensor) -> Tensor:
        return torch.stack([direction(*key, int(of_one[0])) for of_one in rows]).unsqueeze(1)

    return replace(encoder, others=others, modality_shapes={"audio": (1, 3)})


def matrix_encoder() -> Encoder:
    """Real arithmetic without a network: pixels and letter counts times fixed matrices. Starts at
    once on a fresh rank.
    """
    generator = torch.Generator().manual_seed(0)
    of_pixels, of_letters = (
        torch.randn(192, 24, generator=generator),
        torch.randn(128, 24, generator=generator),
    )

    def letters(text: str) -> Tensor:
        return torch.bincount(
            torch.tensor([ord(c) % 128 for c in text or " "]), minlength=128
        ).float()

    return Encoder(
        name="matrix",
        pretrained="",
        prepare=lambda p: torch.from_numpy(np.array(p.resize((8, 8)))).flatten() / 255 - 0.5,
        image=lambda pixels: pixels @ of_pixels,
        text=lambda texts: torch.stack([letters(t) for t in texts]) @ of_letters,
        fingerprint="matrix",
    )


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def clip_benchmark_set(
    root: Path,
    samples: list[tuple[bytes, object]],
    n_shards: int = 2,
    split: str = "test",
    classes: list[str] | None = None,
    templates: list[str] | None = None,
    kind: str = "",
) -> Path:
    """Samples (image bytes, label) as clip_benchmark's webdataset_builder writes them; a label is
    int, captions or array.
    """
    each = -(-len(samples) // n_shards)
    for shard in range(n_shards):
        members = []
        for i, (image, label) in list(enumerate(samples))[shard * each : (shard + 1) * each]:
            extension = "jpg" if image[:2] == b"\xff\xd8" else "png"
            members.append((f"s{i:07d}.{extension}", image))
            if isinstance(label, int):
                members.append((f"s{i:07d}.cls", str(label).encode()))
            elif isinstance(label, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, label)
                members.append((f"s{i:07d}.npy", buffer.getvalue()))
            else:
                members.append((f"s{i:07d}.txt", "\n".join(label).encode()))
        write_tar(root / split / f"{shard}.tar", members)
    (root / split / "nshards.txt").write_text(f"{n_shards}\n")
    for name, lines in (
        ("classnames", classes),
        ("zeroshot_classification_templates", templates),
        ("dataset_type", [kind]),
    ):
        if lines and lines != [""]:
            (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def tiny_open_clip(folder: Path, seed: int = 0) -> Path:
    """A randomly initialised open_clip model on disk, as `local-dir:` reads it."""
    import open_clip
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**TINY)
        with torch.no_grad():  # as initialised, a tiny text tower says the same of every sentence
            for value in model.parameters():
                if value.ndim > 1:
                    value.copy_(torch.randn_like(value) * value.shape[-1] ** -0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    preprocess = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess})
    )
    return folder


OUR_CONFIG = {
    "out": "runs/tiny",
    "data": {"sources": [{"name": "shards", "path": "data"}]},
    "model": {
        "image_tower": {
            "name": "vit",
            "width": 32,
            "layers": 1,
            "head_width": 16,
            "patch_size": 8,
            "image_size": 32,
        },
        "text_tower": {"name": "transformer", "width": 32, "layers": 1, "heads": 2},
        "embed_dim": 16,
    },
    "train": {"duration": 1, "batch": 4},
    "objective": {"infonce": {}},
}


def our_model(seed: int = 0):
    """A small DualEncoder of ours, randomly initialised."""
    from vlp import config
    from vlp.models.build import build

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(config.parse(OUR_CONFIG).model)


def members_of(tar: Path, names: list[str]) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {name: file.extractfile(name).read() for name in names}


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
