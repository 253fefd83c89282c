"""Checkpoints in parts, as files: what is read of them, and what is refused."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_parts

from tests import ranks
from vlp import checkpoint, saving, staging
from vlp.pretrained import runs
from vlp.pretrained.parts import CheckpointError, Joined, Layout

WEIGHT = torch.arange(12.0).view(6, 2)
TEXTS = ("state.json", "model.json", "config.yaml")


def name_of(rank):
    return f"shard-{rank + 1:05d}-model-00001-of-00004.safetensors"


def write_part(folder, rank, tensors):
    """tensors: {name: (value, its first element in the whole tensor)}."""
    offsets = {name: {"saved_offsets": begins} for name, (_, begins) in tensors.items()}
    values = {name: value.contiguous() for name, (value, _) in tensors.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
    save_file(values, folder / name_of(rank), metadata=metadata)


def write_manifest(folder):
    """Of the parts of three ranks, as they lie there now."""
    entries = {}
    for name in (*map(name_of, range(3)), *TEXTS):
        path = folder / name
        entries[name] = {"bytes": path.stat().st_size, "sha256": runs.sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(entries))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's model by three ranks, two rows of a weight each; the first has more."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    for rank in range(3):
        tensors = {"model/w": (WEIGHT[2 * rank : 2 * rank + 2], [2 * rank, 0])}
        if rank == 0:
            tensors["model/scale"] = (torch.tensor(2.5), [])
            tensors["model/half"] = (torch.ones(3, dtype=torch.bfloat16), [0])
        write_part(folder, rank, tensors)
    for name in TEXTS:
        (folder / name).write_text("{}")
    write_manifest(folder)
    return folder


def test_tensors_are_whole_and_what_is_changed_of_them_stays_in_memory(folder):
    tensors = runs.tensors_of(folder, "model")
    assert sorted(tensors) == ["half", "scale", "w"]
    assert torch.equal(tensors["w"], WEIGHT) and tensors["scale"] == 2.5
    assert tensors["half"].tolist() == [1, 1, 1] and tensors["half"].dtype == torch.bfloat16
    assert len(runs.tensors_of(folder, "teacher")) == 0

    tensors["half"].zero_()
    tensors["w"].zero_()
    assert torch.equal(tensors["w"], WEIGHT) and tensors["half"].tolist() == [1, 1, 1]
    runs.verify(folder)


def test_a_layout_is_read_once_for_machines_that_see_the_disk_elsewhere(folder, tmp_path):
    told = pickle.dumps(runs.layout_of(folder))
    assert str(tmp_path).encode() not in told
    elsewhere = tmp_path / "mounted elsewhere"
    shutil.move(folder, elsewhere)
    assert torch.equal(Joined(elsewhere, pickle.loads(told), "model")["w"], WEIGHT)


def test_the_size_of_a_layout_is_bounded(tmp_path):
    """24 bytes a part, and what a name and a file cost."""
    n_ranks, n_tensors = 40, 30
    for rank in range(n_ranks):
        tensors = {f"model/{number}": (torch.ones(1, 2), [rank, 0]) for number in range(n_tensors)}
        write_part(tmp_path, rank, tensors)
    layout = Layout.of(tmp_path, [name_of(rank) for rank in range(n_ranks)])
    n_bytes = len(pickle.dumps(layout))
    assert n_bytes < 24 * n_ranks * n_tensors + 500 * n_tensors + 60 * n_ranks
    assert Joined(tmp_path, layout, "model")["7"].shape == (n_ranks, 2)


def test_parts_of_another_checkpoint_that_were_copied_along_are_not_read(folder):
    """Five ranks wrote what lay there before: the manifest names three."""
    for rank in (3, 4):
        write_part(folder, rank, {"model/w": (WEIGHT[:2], [2 * rank, 0])})
    assert torch.equal(runs.tensors_of(folder, "model")["w"], WEIGHT)
    runs.verify(folder)


def test_parts_that_make_no_whole_are_refused(folder):
    """As a folder that was put together by hand has them, with a manifest that fits."""
    n_cases = 0
    for rank, value, begins in (
        (1, WEIGHT[2:3], [2, 0]),  # a row is missing
        (1, WEIGHT[2:5], [2, 0]),  # one comes twice
        (1, WEIGHT[2:4, :1], [2, 0]),  # a column is missing
        (0, WEIGHT[2:4], [2, 0]),  # the part of another rank
        (1, WEIGHT[2:4].int(), [2, 0]),  # numbers of another kind, of as many bytes
        (1, WEIGHT[2:4].double(), [2, 0]),
        (1, WEIGHT[2:4, 0], [2]),  # a dimension is missing
        (1, WEIGHT[2:4], [2]),
    ):
        good = (folder / name_of(rank)).read_bytes()
        write_part(folder, rank, {"model/w": (value, begins)})
        write_manifest(folder)
        runs.verify(folder)
        with pytest.raises(CheckpointError, match=r"model/w the parts (leave gaps|differ in)"):
            runs.tensors_of(folder, "model")
        n_cases += 1
        (folder / name_of(rank)).write_bytes(good)
    assert n_cases == 8


DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16),
    *(torch.float32, torch.float64, torch.complex64),
]


def of_every_dtype():
    """Rows of several ranks, scalars, and nothing at all, of every dtype and odd names."""
    tensors = {}
    for dtype in DTYPES:
        bits = torch.arange(14).view(7, 2) % 3 == 0
        tensors[f"a.b/c/{dtype}"] = bits.to(dtype)
        tensors[f"a scalar {dtype}"] = torch.tensor(1).to(dtype)
        tensors[f"nothing/{dtype}"] = torch.empty(0, 3, dtype=dtype)
    return tensors | {"ünï cödé": torch.arange(10.0).view(1, 10)}


def save_every_dtype(folder):
    staging.DEALT_BYTES = 0  # these tensors are small
    saver = saving.Saver(folder, keep=1)
    contents = checkpoint.Contents({}, {})
    for name, value in of_every_dtype().items():
        written = saver.staging.held(f"model/{name}", value)
        if written is not None:
            contents.model[name] = written
    saver.write(1, contents, 0.0)
    saver.wait()


def test_what_two_ranks_wrote_of_any_dtype_is_read_by_this_and_by_torchs_own_reader(tmp_path):
    """The reader of torch.distributed.checkpoint, which other tools use."""
    ranks.run(2, save_every_dtype, tmp_path)
    folder = checkpoint.newest(tmp_path)
    written = runs.tensors_of(folder, "model")
    expected = of_every_dtype()
    assert written.keys() == expected.keys() and len(written) == 3 * len(DTYPES) + 1

    by_torch = {f"model/{name}": torch.empty_like(value) for name, value in expected.items()}
    load_parts(by_torch, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    for name, value in expected.items():
        for tensor in (written[name], by_torch[f"model/{name}"]):
            assert tensor.dtype == value.dtype and tensor.shape == value.shape
            assert tensor.tolist() == value.tolist(), name


def test_headers_that_cannot_be_read_are_refused(folder):
    path = folder / name_of(1)
    good = path.read_bytes()
    n_cases = 0
    for bad in (
        b"",
        good[:5],
        good[:40],
        b"\xff" * 8 + good[8:],
        good.replace(b"F32", b"F99"),
        good.replace(b"DCP_SHARDING_INFO", b"DCP_SHARDING_0000"),
        good.replace(b"saved_offsets", b"saved_0ffsets"),
        good.replace(b"data_offsets", b"data_0ffsets"),
        (2).to_bytes(8, "little") + b"[]",
        good[:-4],
        good.replace(b'"shape":[2,2]', b'"shape":[2,1]'),
        good.replace(b'"shape":[2,2]', b'"shape":[9,2]'),
    ):
        assert bad != good
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="is no part of a checkpoint"):
            runs.tensors_of(folder, "model")
        n_cases += 1
    assert n_cases == 12
