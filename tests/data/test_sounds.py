"""Sounds among the members of samples, decoded in the loader: pieces by the step's own seeds, rows
beside their samples, and what cannot be heard.
"""

from __future__ import annotations

import io
import pickle
import random
import re
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from vlp import config, schema
from vlp.data.further_members import Files, Member, of_tar
from vlp.data.modalities import check
from vlp.data.sounds import cut, decoded, log_mel, resampled, rows_of
from vlp.data.steps import DataError

READS = frozenset({"others", "others_valid"})
SOUND = config.Sound(seconds=0.1, bands=8, rate=8000)
SHAPES = {"audio": (10, 8)}
N = 12


def tone(hertz: float, seconds: float = 0.5, rate: int = 8000, channels: int = 1) -> bytes:
    """A PCM wave of one tone, of 16 bits."""
    times = np.arange(round(seconds * rate)) / rate
    return encoded_wave(np.sin(2 * np.pi * hertz * times) / 2, rate, channels)


def sweep(seconds: float, rate: int = 8000) -> bytes:
    """A tone that rises, so that each piece of it is another."""
    times = np.arange(round(seconds * rate)) / rate
    return encoded_wave(np.sin(2 * np.pi * (200 + 1500 * times / seconds) * times) / 2, rate)


def encoded_wave(samples: np.ndarray, rate: int, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((channels, 2, rate, 0, "NONE", ""))
        writer.writeframes(np.repeat((samples * 32767).astype("<i2"), channels).tobytes())
    return file.getvalue()


def members(sounds: dict[str, tuple[str, bytes] | None]) -> list[tuple[str, bytes]]:
    """A picture and a caption of each key, and its sound, if it has one."""
    listed = []
    for i, (key, sound) in enumerate(sounds.items()):
        if sound is not None and sound[0] < "png":
            listed.append((f"{key}.{sound[0]}", sound[1]))  # in order of names, before the picture
        listed += [(f"{key}.png", encoded(picture(i))), (f"{key}.txt", b"a caption")]
        if sound is not None and sound[0] >= "png":
            listed.append((f"{key}.{sound[0]}", sound[1]))
    return listed


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Sample i has a sound of i + 1 tenths of a second, and every third none."""
    folder = tmp_path_factory.mktemp("clips with blanks")
    for first in range(0, N, 5):
        sounds = {
            f"clip.{i}": None if i % 3 == 0 else ("wav", sweep((i + 1) / 10))
            for i in range(first, min(first + 5, N))
        }
        write_tar(folder / f"{first:05d}.tar", members(sounds))
    return folder


def sound_loader(path: Path, batch: int = N, **options):
    options = {"reads": READS, "modalities": SHAPES, "decoded": {"audio": SOUND}} | options
    return loader_of(data_of(path), batch, **options)


def of_samples(batch) -> dict[str, tuple[torch.Tensor, int]]:
    rows = batch.modalities.unflatten(1, SHAPES["audio"])
    return {key: (rows[i], int(batch.modality_lengths[i, 0])) for i, key in enumerate(batch.key)}


# From members to batches


def test_sounds_come_with_their_samples_and_others_lack_them(shards):
    loader = sound_loader(shards, random_pieces=False)
    assert loader.carries >= {"modalities", "modality_lengths"}
    assert not [problem for problem in loader.problems() if ".wav" in problem]
    heard = of_samples(next(loader))
    n = 0
    for i in range(N):
        rows, length = heard[f"clip.{i}"]
        if i % 3 == 0:
            assert not length and not rows.any()
            continue
        _, samples = decoded(sweep((i + 1) / 10))
        middle = cut(samples, 800, None)
        expected = log_mel(middle, 8000, 8)[:10]
        assert length == len(expected) == 10
        np.testing.assert_array_equal(rows.numpy(), expected)
        n += 1
    assert n == 8

    unread = sound_loader(shards, reads=frozenset())
    assert next(unread).modalities is None and not unread.sources[0].members, "headers cost reading"


def test_pieces_are_drawn_anew_and_the_same_wherever_and_whenever_a_step_is_made(shards):
    whole = sound_loader(shards, 6)
    steps = [next(whole) for _ in range(4)]
    epochs = [of_samples(one) | of_samples(two) for one, two in (steps[:2], steps[2:])]
    again = [torch.equal(epochs[0][key][0], epochs[1][key][0]) for key in epochs[0]]
    # Four have no sound.
    assert len(again) == N and sum(again) == 4

    resumed = sound_loader(shards, 6)
    resumed.load_state_dict(whole.state_dict(2))
    assert torch.equal(next(resumed).modalities, steps[2].modalities)
    ranks = [sound_loader(shards, 6, rank=rank, world=2) for rank in (0, 1)]
    for step in steps[:2]:
        halves = [next(rank).modalities for rank in ranks]
        assert torch.equal(torch.cat(halves), step.modalities)
    # As loader processes get it.
    sent = pickle.loads(pickle.dumps(whole._steps))
    for number, step in enumerate(steps[:3]):
        assert torch.equal(sent[number][0].modalities, step.modalities)


def test_a_member_belongs_to_its_sample_wherever_it_lies(tmp_path):
    loose = tone(440)
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("b.voice.wav", tone(200)), ("folder/x.flac", b"fLaC"), ("a.wav", loose),
            ("a.jpg", encoded(picture(0), "JPEG")), ("a.txt", b"one"),
            ("b.jpg", encoded(picture(1), "JPEG")), ("b.txt", b"two"), ("b.wav", tone(300)),
            ("folder/x.jpg", encoded(picture(2), "JPEG")), ("folder/x.txt", b"three"),
            ("b.10.jpg", b"ten"), ("b.9.jpg", b"nine"), ("b.c.jpg", encoded(picture(3), "JPEG")),
            ("b.c.txt", b"a sample of its own"), ("b.c.ogg", b"OggS"), ("nobody.wav", loose),
            ("b.negative.jpg", b"no frame"), ("._a.wav", b"left by a system"),
        ],
    )  # fmt: skip
    found = of_tar(path)
    endings = {key: [member.ending for member in of] for key, of in found.members.items()}
    assert endings == {
        "a": [".wav"],
        "b": [".wav", ".10.jpg", ".9.jpg", ".voice.wav"],
        "b.c": [".ogg"],
        "folder/x": [".flac"],
    }
    assert sorted(found.pictures.values()) == ["a", "b", "b.c", "folder/x"] and not found.damage
    with open(path, "rb") as file:
        assert found.members["a"][0].read(file) == loose


def test_members_behind_damage_are_lacking_and_told(tmp_path, capsys):
    sounds = {f"{i}": ("wav", tone(300 + i, 0.05)) for i in range(4)}
    path = write_tar(tmp_path / "00000.tar", members(sounds))
    whole = of_tar(path)
    end = whole.members["1"][0].offset
    path.write_bytes(path.read_bytes()[: end + 100])
    torn = of_tar(path)
    assert torn.damage and torn.members.keys() == {"0"} and torn.members["0"] == whole.members["0"]
    batch = next(sound_loader(tmp_path, 1))
    assert batch.modality_lengths.shape == (1, 1)
    assert "audio of the samples after damage is lacking" in capsys.readouterr().err


def test_samples_of_other_sources_lack_sounds(shards, tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"loose{i}.png").write_bytes(encoded(picture(i)))
        (tmp_path / f"loose{i}.txt").write_text("a caption")
        (tmp_path / f"loose{i}.wav").write_bytes(tone(440))
    sources = [
        {"name": "shards", "path": str(shards), "weight": 1.0},
        {"name": "folder", "path": str(tmp_path), "weight": 1.0},
    ]
    options = {"reads": READS, "modalities": SHAPES, "decoded": {"audio": SOUND}}
    batch = next(loader_of(data_of(*sources), 8, **options))
    loose = [key.startswith("loose") for key in batch.key]
    assert sum(loose) == 4 and not batch.modality_lengths[loose].any()
    assert batch.modality_lengths.any()
    assert "source folder lack audio" in capsys.readouterr().err


# A sound


def files(tmp_path: Path, data: bytes) -> Files:
    path = tmp_path / "file"
    path.write_bytes(data)
    return Files(str(path), [Member("", "wav", 0, len(data))])


def test_rows_of_a_long_and_of_a_short_sound(tmp_path):
    long = files(tmp_path, sweep(2))
    pieces = [rows_of(long, SOUND, random.Random(seed)) for seed in range(5)]
    assert all(piece.shape == (10, 8) and piece.dtype == np.float32 for piece in pieces)
    assert len({piece.tobytes() for piece in pieces}) == 5
    assert rows_of(long, SOUND, random.Random(0)).tobytes() == pieces[0].tobytes()
    assert rows_of(Files("", []), SOUND, None).shape == (0, 8)
    for seconds, expected in ((0.05, 5), (0.001, 1), (0.1, 10)):
        assert rows_of(files(tmp_path, tone(440, seconds)), SOUND, None).shape == (expected, 8)


def test_two_channels_and_another_rate_are_one_sound(tmp_path):
    expected = rows_of(files(tmp_path, tone(1000)), SOUND, None)
    stereo = rows_of(files(tmp_path, tone(1000, channels=2)), SOUND, None)
    np.testing.assert_allclose(stereo, expected, atol=1e-5)
    faster = rows_of(files(tmp_path, tone(1000, rate=22_050)), SOUND, None)
    assert faster.shape == expected.shape
    assert (faster.mean(0).argmax(), len(faster)) == (expected.mean(0).argmax(), 10)


def test_rows_are_those_of_the_formula():
    """By a loop over frames and numpy's transform of each."""
    samples = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(129, 8, 0.0, 4000, 8000, norm="slaney", mel_scale="slaney")
    padded = np.concatenate([np.zeros(100), samples, np.zeros(100)])
    hann = np.sin(np.pi * np.arange(200) / 200) ** 2
    expected = []
    for row in range(1000 // 80):
        piece = padded[80 * row : 80 * row + 200] * hann
        power = np.abs(np.fft.rfft(piece, 256)) ** 2
        expected.append((np.log10(np.maximum(power @ filters, 1e-10)) + 4) / 4)
    np.testing.assert_allclose(log_mel(samples, 8000, 8), expected, rtol=1e-5)
    assert len(resampled(samples, 8000, 16_000)) == 2000


# What cannot be heard


@pytest.mark.parametrize(
    "bad, reason",
    [
        (b"", "a sound file of 0 bytes"),
        (tone(440, 0), "a sound without samples"),
        (tone(440)[:20], "no wave file"),
        (b"neither wave nor anything", "no wave of PCM|no sound"),
    ],
)
def test_a_sound_that_cannot_be_read_costs_its_sample_alone(tmp_path, bad, reason):
    sounds = {f"{i}": ("wav", tone(300 + i)) for i in range(8)}
    write_tar(tmp_path / "00000.tar", members(sounds | {"3": ("wav", bad)}))
    loader = sound_loader(tmp_path, 4)
    batches = [next(loader) for _ in range(2)]
    assert all((batch.modality_lengths == 10).all() for batch in batches)
    ((_, key, told),) = loader.bad
    assert key == "3" and re.search(reason, told)


def test_whatever_a_damaged_header_says_is_an_answer_in_words():
    chance = random.Random(0)
    n_read, reasons = 0, set()
    for _ in range(1500):
        data = bytearray(tone(440, 0.02, channels=2))
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(60)] = chance.randrange(256)
        try:
            rate, samples = decoded(bytes(data))
        except ValueError as error:
            reasons.add(str(error))
        else:
            assert rate > 0 and samples.ndim == 1 and samples.size
            n_read += 1
    assert n_read > 100 and {"no wave file (RuntimeError)", "a sound without samples"} < reasons
    assert not [reason for reason in reasons if "broadcast" in reason or "reshape" in reason]
    assert any(reason.endswith("expected 8, 16, 24 or 32") for reason in reasons)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_waves_of_floats_that_are_no_numbers_are_refused(odd):
    samples = np.array([0, odd] * 50, "<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 8000, 32000, 4, 32)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", 400) + samples
    with pytest.raises(ValueError, match="NaN or infinity among its samples"):
        decoded(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)


def test_what_is_no_sound_is_told_alike_each_time():
    reasons = set()
    for data in (b"hello" * 20, b"others" * 20):
        with pytest.raises(ValueError, match="no sound") as raised:
            decoded(data)
        reasons.add(str(raised.value))
    assert len(reasons) == 1 and "0x" not in reasons.pop()


def test_sounds_of_which_too_many_are_broken_end_the_run(tmp_path):
    sounds = {f"{i}": ("wav", b"" if i else tone(300)) for i in range(32)}
    write_tar(tmp_path / "00000.tar", members(sounds))
    with pytest.raises(DataError, match=r"could not be used by step|are all bad"):
        next(sound_loader(tmp_path, 32))


@pytest.mark.parametrize(
    "options, sound, message",
    [
        ({}, None, r"reads sounds \(KEY.wav, flac, ogg, mp3\).*no sample of any source"),
        ({"decoded": {"audio": config.Sound(0.1, 8, 8000, member="voice")}}, ("wav", tone(440)),
         r"reads sounds \(KEY.voice.wav"),
    ],
)  # fmt: skip
def test_members_that_no_sample_has_are_refused_before_the_first_step(
    tmp_path, options, sound, message
):
    write_tar(tmp_path / "00000.tar", members({"a": sound, "b": None}))
    with pytest.raises(ValueError, match=message):
        sound_loader(tmp_path, 2, **options)


@pytest.mark.parametrize(
    "form, subtype, tolerance",
    [
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.05),
        ("MP3", None, 0.05),
        ("WAV", "FLOAT", 1e-6),
    ],
)
def test_sounds_of_other_kinds_are_those_that_were_encoded(form, subtype, tolerance):
    times = np.arange(8000) / 16_000
    stereo = np.stack([np.sin(2 * np.pi * 440 * times) / 2, np.zeros(8000)], 1)
    encoded_sound = as_soundfile(stereo, form, subtype)

    rate, samples = decoded(encoded_sound)

    assert rate == 16_000 and samples.dtype == np.float32 and len(samples) >= 8000
    # Codecs are worst at the ends.
    error = np.abs(samples[1000:7000] - stereo.mean(1)[1000:7000])
    assert error.max() < tolerance
    # Cut short, it is no sound, or a shorter one.
    for length in (4, 100, len(encoded_sound) // 2):
        try:
            _, shorter = decoded(encoded_sound[:length])
        except ValueError as cause:
            assert "0x" not in str(cause), "reasons are counted: an address makes each another"
        else:
            assert len(shorter) <= len(samples)


def test_a_header_that_tells_of_more_samples_than_there_are_costs_its_sample_alone():
    flac = bytearray(as_soundfile(np.zeros((800, 1)), "FLAC", "PCM_16"))
    # 2 to the 36 samples, which would be 256 GiB.
    flac[21] |= 0x0F
    flac[22:26] = b"\xff" * 4
    try:
        _, samples = decoded(bytes(flac))
    except ValueError:
        return
    assert len(samples) == 800


def as_soundfile(samples: np.ndarray, form: str, subtype: str | None) -> bytes:
    """Samples [t, channels] at 16 kHz in another format."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format=form, subtype=subtype)
    return file.getvalue()


def test_flac_and_ogg_are_batches_as_waves_are(tmp_path):
    times = np.arange(1600) / 16_000
    samples = np.sin(2 * np.pi * 440 * times)[:, None] / 2
    kinds = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS"}
    sounds = {kind: (kind, as_soundfile(samples, kind.upper(), kinds[kind])) for kind in kinds}
    write_tar(tmp_path / "00000.tar", members(sounds))

    batch = next(sound_loader(tmp_path, 3))

    wave_rows, *others = batch.modalities[batch.sample_id.argsort()].unbind()
    for rows in others:
        torch.testing.assert_close(rows, wave_rows, rtol=0, atol=0.3)
    assert batch.modality_lengths.flatten().tolist() == [10, 10, 10]


def test_sounds_of_another_kind_ask_for_their_package(tmp_path, monkeypatch):
    write_tar(tmp_path / "00000.tar", members({"a": ("flac", b"fLaC"), "b": None}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"members \.flac, which need .*: pip install 'vlp\[audio\]'"
    ):
        sound_loader(tmp_path, 2)


def test_rows_beside_the_shards_and_members_of_one_name_are_refused():
    with pytest.raises(ValueError, match="a source names rows of 'audio', which the model makes"):
        check([{"audio": None}], SHAPES, {"audio": SOUND})


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"sound": {"seconds": 0}}, "expected at least one row of 10 ms"),
        ({"sound": {"hop_ms": 30}}, "expected 1 <= hop_ms <= window_ms"),
        ({"sound": {"bands": 0}}, "at least 1,000 Hz and a band"),
        ({"sound": {"bands": 500}}, "tells 200 apart at most"),
        ({"sound": {}, "features": 80}, "the members give 1000 rows of 64; leave both out"),
        ({"sound": {}, "length": 7}, "the members give 1000 rows of 64"),
        ({"sound": {}, "patch": 7}, "length 1000 in patches of 7"),
        ({}, "features, length.*found 0"),
    ],
)
def test_sounds_that_cannot_be_are_refused(keys, message):
    with pytest.raises(schema.ConfigError, match=message):
        schema.parse(config.Heads, {"modalities": {"audio": keys}})


def test_the_shape_of_rows_is_that_of_the_sound():
    heads = schema.parse(config.Heads, {"modalities": {"audio": {"sound": {"seconds": 2}}}})
    assert (heads.modalities["audio"].length, heads.modalities["audio"].features) == (200, 64)
    again = schema.parse(config.Heads, schema.plain(heads))
    assert again == heads
