"""`vlp data modality`: sounds, frames and vectors of samples become rows beside their shards."""

from __future__ import annotations

import io
import json
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from tests.data_tools.tools import call
from tests.eval.material import tiny_open_clip
from vlp.data.sounds import decoded, log_mel, resampled
from vlp.data_tools import modality, validate

READS = frozenset({"others"})


def sound(hertz: float, rate: int = 16_000, seconds: float = 0.5, width: int = 2, channels=1):
    """A PCM wave of one tone."""
    tone = np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate) / 2
    if width == 1:
        data = (tone * 128 + 128).astype(np.uint8)[:, None]
    else:
        whole = (tone * 2**31).astype("<i4").view(np.uint8).reshape(-1, 4)
        data = whole[:, 4 - width :]
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(width)
        writer.setframerate(rate)
        writer.writeframes(np.tile(data, (1, channels)).tobytes())
    return file.getvalue()


def numbers(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def shard(folder: Path, members: dict[str, list[tuple[str, bytes]]]) -> Path:
    """A tar of samples, each a picture and a caption with further members."""
    listed = []
    for key, further in members.items():
        listed += [(f"{key}.png", encoded(picture(1))), (f"{key}.txt", b"a caption")]
        listed += [(f"{key}.{name}", data) for name, data in further]
    write_tar(folder / "00000.tar", listed)
    return folder


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with safe_open(folder / "00000.safetensors", "numpy") as file:
        return file.get_tensor("rows"), file.get_tensor("length")


# Sounds


@pytest.mark.parametrize("width, channels", [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
def test_waves_of_every_width_are_one_sound(width, channels):
    rate, samples = decoded(sound(440, width=width, channels=channels))
    expected = np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000) / 2
    assert rate == 16_000 and samples.shape == (8000,) and samples.dtype == np.float32
    assert np.abs(samples - expected).max() < (0.01 if width == 1 else 1e-4)


def test_rows_show_the_tone_at_any_rate():
    """The loudest band of a tone is that of its frequency, in rows of 10 ms."""
    peaks = []
    for rate in (16_000, 22_050, 8000):
        _, samples = decoded(sound(1000, rate))
        rows = log_mel(resampled(samples, rate, 16_000), 16_000, 40)
        assert rows.shape == (50, 40) and np.isfinite(rows).all()
        peaks.append(int(rows[10:40].mean(0).argmax()))
    assert len(set(peaks)) == 1
    _, low = decoded(sound(300))
    assert log_mel(low, 16_000, 40)[10:40].mean(0).argmax() < peaks[0]


def test_sounds_become_rows_and_what_cannot_be_read_is_counted(tmp_path, capsys):
    floats = b"RIFF" + struct.pack("<I", 38) + b"WAVEfmt " + struct.pack(
        "<IHHIIHH", 16, 3, 1, 16_000, 64_000, 4, 32
    ) + b"data" + struct.pack("<I", 4) + b"\0\0\0\0"  # fmt: skip
    shards = shard(
        tmp_path / "a set",
        {
            "long": [("wav", sound(440, seconds=2))],
            "short": [("voice.wav", sound(440, seconds=0.004))],
            "silent": [("wav", sound(440, seconds=0))],
            "empty": [("wav", b"")],
            "torn": [("wav", sound(440)[:20])],
            "flac": [("flac", b"fLaC" + bytes(40))],
            "floats": [("wav", floats)],
            "none": [],
        },
    )
    out = tmp_path / "rows"
    options = ("--seconds", 1, "--bands", 8)
    assert call(modality, shards, "--sound", *options, "--to", out) == 0
    rows, lengths = read(out)
    assert rows.shape == (8, 100, 8) and rows.dtype == np.float16
    assert lengths.tolist() == [100, 1, 0, 0, 0, 0, 1, 0]
    assert np.isfinite(rows).all() and rows[0].any() and not rows[1, 1:].any()
    said = capsys.readouterr().out
    for reason in (
        "a sound without samples", "a sound file of 0 bytes", "no wave file (EOFError)",
        "no sound (File contains data in an unimplemented format.)",
        "samples that lack it", "samples with rows",
    ):  # fmt: skip
        assert reason in said, reason

    # Training reads them.
    source = {"name": "shards", "path": str(shards), "modalities": {"audio": str(out)}}
    batch = next(loader_of(data_of(source), 8, reads=READS, modalities={"audio": (100, 8)}))
    assert batch.modalities.shape == (8, 800)
    assert sorted(batch.modality_lengths.flatten().tolist()) == [0] * 5 + [1, 1, 100]


def test_validate_names_sounds_and_frames_that_cannot_be_read(tmp_path, capsys):
    still = encoded(picture(3))
    shards = shard(
        tmp_path / "set",
        {
            "right": [("wav", sound(440)), ("0.png", still), ("1.png", still)],
            "empty": [("voice.wav", b"")],
            "torn": [("0.png", still), ("1.png", still[:40])],
            "none": [],
        },
    )
    assert call(validate, shards, "--json", tmp_path / "report.json") == 1
    said = capsys.readouterr().out
    assert "empty.voice.wav: a sound file of 0 bytes" in said and "torn.1.png: " in said
    assert "2 samples with a sound, 2 samples with frames" in said and "4 good samples" in said
    summary = json.loads((tmp_path / "report.json").read_text())
    assert summary["problems"] == 2
    assert summary["further"] == {"samples with a sound": 2, "samples with frames": 2}
    # What is read is not odd: only what is wrong with two of them is told.
    assert not [kind for kind in summary["left_out"] if kind.startswith("members ")]
    assert "members ." not in said


def test_validate_lists_members_of_no_sample_and_second_ones_of_a_name(tmp_path, capsys):
    wave, still = sound(440), encoded(picture(3))
    shards = shard(tmp_path / "set", {"a": [("wav", wave), ("wav", wave), ("0.png", still)]})
    members = [("b.npy", b"numbers"), ("b.png", still), ("b.txt", b"words"), ("nobody.wav", wave)]
    write_tar(shards / "1.tar", [*members, ("b.first.png", still)])

    assert call(validate, shards, "--json", tmp_path / "report.json") == 0
    summary = json.loads((tmp_path / "report.json").read_text())
    assert summary["left_out"] == {"members .wav": 2, "members .first.png": 1}
    assert summary["further"] == {
        "samples with a sound": 1, "samples with frames": 1, "samples with numbers": 1
    }  # fmt: skip
    assert "odd or passed over: 2 × members .wav, 1 × members .first.png" in capsys.readouterr().out


def test_sounds_of_which_none_can_be_read_are_refused(tmp_path):
    shards = shard(tmp_path / "set", {"a": [("wav", b"")], "b": []})
    for name in ("", "voice"):
        with pytest.raises(ValueError, match=r"no sample has rows of .*members are named"):
            call(modality, shards, "--sound", "--name", name, "--to", tmp_path / f"rows{name}")


def test_an_audio_model_embeds_whole_sounds(tmp_path):
    from transformers import (
        ASTConfig,
        ASTFeatureExtractor,
        ASTModel,
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Model,
    )  # fmt: skip

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    ASTModel(
        ASTConfig(**small, intermediate_size=16, num_mel_bins=16, max_length=32)
    ).save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(num_mel_bins=16, max_length=32).save_pretrained(tmp_path / "ast")
    sounds = {"a": [("wav", sound(440, 22_050))], "b": [("wav", b"")], "c": [("wav", sound(900))]}
    shards = shard(tmp_path / "set", sounds)
    call(modality, shards, "--sound-model", tmp_path / "ast", "--to", tmp_path / "rows")
    rows, lengths = read(tmp_path / "rows")
    assert rows.shape == (3, 1, 16) and lengths.tolist() == [1, 0, 1]
    assert np.linalg.norm(rows[0].astype(np.float32)) == pytest.approx(1, abs=1e-2)
    assert np.abs(rows[0] - rows[2]).max() > 1e-3

    # Speech models give rows in time and no pooling.
    speech = Wav2Vec2Config(
        **small, intermediate_size=16, conv_dim=(8, 8), conv_stride=(5, 64), conv_kernel=(10, 64),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(speech).save_pretrained(tmp_path / "speech")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "speech")
    for name, message in (("speech", "does not say how it pools"), ("no", "no model of sounds at")):
        with pytest.raises(ValueError, match=message):
            call(modality, shards, "--sound-model", tmp_path / name, "--to", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# Videos


def test_frames_are_embedded_in_order_and_one_is_a_video(tmp_path):
    model = f"local-dir:{tiny_open_clip(tmp_path / 'model')}"
    frames = [(f"{i}.png", encoded(picture(i))) for i in (0, 10, 2, 9)]
    shards = shard(
        tmp_path / "set",
        {
            "film": frames,
            "still": [("0.png", encoded(picture(2)))],
            "torn": [("0.png", b"no picture"), ("1.png", encoded(picture(9)))],
            "gone": [("0.png", b"no picture")],
            "none": [],
        },
    )
    out = tmp_path / "rows"
    call(modality, shards, "--frames", 4, "--model", model, "--to", out)
    rows, lengths = read(out)
    assert rows.shape[:2] == (5, 4) and lengths.tolist() == [4, 1, 1, 0, 0]
    still, torn = rows[1, 0], rows[2, 0]
    norms = np.linalg.norm(rows[0].astype(np.float32), axis=1)
    assert norms == pytest.approx(1, abs=2e-3)
    assert np.abs(rows[0, 1] - still).max() < 2e-3, "0, 2, 9, 10: by number"
    assert np.abs(rows[0, 2] - torn).max() < 2e-3

    fewer = tmp_path / "fewer"
    call(modality, shards, "--frames", 2, "--model", model, "--to", fewer)
    assert np.abs(read(fewer)[0][0, 1] - torn).max() < 2e-3, "the first of each half"


# Vectors


def test_vectors_of_any_model_are_taken_as_they_are(tmp_path, capsys):
    shards = shard(
        tmp_path / "set",
        {
            "none": [],
            "a": [("depth.npy", numbers(np.arange(3.0)))],
            "b": [("depth.npy", numbers(np.arange(4.0)))],
            "c": [("depth.npy", numbers(np.array([{}], object)))],
            "d": [("depth.npy", numbers(np.full(3, np.nan)))],
            "e": [("depth.npy", b"")],
        },
    )
    out = tmp_path / "rows"
    call(modality, shards, "--vectors", "depth", "--to", out)
    rows, lengths = read(out)
    assert rows.shape == (6, 1, 3) and lengths.tolist() == [0, 1, 0, 0, 0, 0]
    assert rows[1, 0].tolist() == [0, 1, 2]
    said = capsys.readouterr().out
    for reason in ("an array [1, 4]; expected up to 1 rows of 3", "no array of numbers", "finite"):
        assert reason in said, reason

    call(modality, shards, "--vectors", "depth", "--shape", "2x4", "--to", tmp_path / "wide")
    assert read(tmp_path / "wide")[1].tolist() == [0, 0, 1, 0, 0, 0]
    with safe_open(out / "00000.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["made_by"])["kind"] == "vectors"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--vectors", "dept"], "no sample has a member KEY.dept.npy"),
        (["--vectors", "depth", "--shape", "3xx"], "--shape '3xx': expected numbers such as"),
        (["--frames", 0, "--model", "x"], "--frames 0: expected a number of frames"),
        (["--frames", 2], "embedded by a model; name it with --model"),
        (["--sound", "--model", "x"], "--model embeds frames"),
        (["--sound", "--seconds", 0], "expected at least 0.01 seconds"),
    ],
)
def test_what_is_mistyped_is_refused_before_anything_is_written(tmp_path, options, message):
    shards = shard(tmp_path / "set", {"a": [("depth.npy", numbers(np.arange(3.0)))]})
    with pytest.raises(ValueError, match=message):
        call(modality, shards, *options, "--to", tmp_path / "rows")
    assert not (tmp_path / "rows").exists()
