"""`vlp data filter --head`, `--top`: scores of stored embeddings against their networks in float64,
shares against a sort over all samples, on any number of processes, and what is refused.
"""

from __future__ import annotations

import io
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.data.material import encoded, picture
from tests.data_tools.mining import D, N, counted, rows, store, write
from tests.data_tools.test_work import digests
from tests.data_tools.tools import call, read
from tests.eval.material import tiny_open_clip
from vlp.data.format import ShardWriter
from vlp.data_tools import filter as filtering
from vlp.data_tools.filter.heads import Head
from vlp.data_tools.filter.scores import Top

IMAGE, TEXT = rows(0), rows(1)


def network(between: str, width: int = D) -> nn.Sequential:
    """As LAION's predictors are built: dropout, with ReLU before it or not, and one bare gap."""
    torch.manual_seed(0)
    gap = [nn.Dropout()] if between == "linear" else [nn.ReLU(), nn.Dropout()]
    layers = [nn.Linear(width, 12), *gap, nn.Linear(12, 11), *gap, nn.Linear(11, 5)]
    return nn.Sequential(*layers, nn.Linear(5, 1)).double().eval()


def write_head(path: Path, state: dict[str, torch.Tensor], prefix: str = "layers.") -> Path:
    state = {prefix + name: value.float().contiguous() for name, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def embedded(tmp_path: Path) -> tuple[Path, Path]:
    """24 samples in three shards with their embeddings; two pictures did not open."""
    image = IMAGE.copy()
    image[[3, 20]] = 0
    return write(tmp_path / "in"), store(tmp_path / "e", image, TEXT)


def scores_of(folder: Path, name: str) -> dict[str, float]:
    return {key: s.meta[name] for key, s in read(folder).items() if name in s.meta}


@pytest.mark.parametrize(
    "between, suffix", [("linear", ".pth"), ("relu", ".pth"), ("relu", ".safetensors")]
)
def test_a_head_scores_as_its_network_does(
    embedded: tuple[Path, Path], tmp_path: Path, between: str, suffix: str
) -> None:
    source, folder = embedded
    model = network(between)
    head = write_head(tmp_path / f"my head{suffix}", model.state_dict())
    options = ["--embeddings", folder, "--head", f"aesthetic={head},{between}"]
    call(filtering, source, "--to", tmp_path / "out", *options)

    weights = [p.float().double() for p in model.parameters()]
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights):
            parameter.copy_(weight)
        expected = model(torch.from_numpy(IMAGE.astype(np.float16)).double()).flatten().tolist()
    scores = scores_of(tmp_path / "out", "aesthetic")
    assert scores == {
        f"k{i}": pytest.approx(expected[i], abs=6e-5) for i in range(N) if i not in (3, 20)
    }
    assert len(set(scores.values())) > 15, "the comparison would be empty"

    # The other reading of the same file is another head.
    other = {"linear": "relu", "relu": "linear"}[between]
    assert Head.of(f"a={head},{other}").scores(IMAGE, TEXT)[0] != scores["k0"]


def test_scores_are_fields_for_the_other_rules(
    embedded: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, folder = embedded
    weight = torch.zeros(1, D)
    weight[0, 0] = 1
    head = write_head(tmp_path / "h.pth", {"weight": weight}, prefix="")
    heads = ["--embeddings", folder, "--head", f"first={head}", "--head", "near=cosine"]
    options = [*heads, "--keep", "first > -0.1", "--drop", "near < 0"]
    call(filtering, source, "--to", tmp_path / "out", *options)

    near = (IMAGE.astype(np.float16).astype(float) * TEXT.astype(np.float16)).sum(1)
    opened = [i for i in range(N) if i not in (3, 20)]
    kept = [i for i in opened if np.float16(IMAGE[i, 0]) > -0.1 and near[i] >= 0]
    assert list(read(tmp_path / "out")) == [f"k{i}" for i in kept] and 2 < len(kept) < 20
    assert scores_of(tmp_path / "out", "near") == {
        f"k{i}": pytest.approx(near[i], abs=6e-5) for i in kept
    }
    assert counted(capsys.readouterr().out, "dropped: --keep first > -0.1: no such value") == 2

    # A score of an earlier call is not taken for this one's where there is none.
    again = [
        "--embeddings",
        store(tmp_path / "e2", np.zeros((N, D)), TEXT),
        "--head",
        "near=cosine",
    ]
    call(filtering, source, "--to", tmp_path / "again", *again)
    assert not scores_of(tmp_path / "again", "near") and len(read(tmp_path / "again")) == N


def test_rows_that_are_not_finite_have_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A model that overflows in half precision writes them; infinity is no JSON."""
    image = IMAGE.copy()
    image[2], image[5], image[7] = np.nan, np.inf, 0
    source, folder = write(tmp_path / "in"), store(tmp_path / "e", image, TEXT)
    head = write_head(tmp_path / "h.pth", {"weight": torch.ones(1, D)}, prefix="")
    heads = ["--embeddings", folder, "--head", f"a={head}", "--head", "extra=cosine"]
    call(filtering, source, "--to", tmp_path / "out", *heads)
    expected = {f"k{i}" for i in range(N) if i not in (2, 5, 7)}
    assert set(scores_of(tmp_path / "out", "a")) == expected
    assert set(scores_of(tmp_path / "out", "extra")) == expected and len(expected) == N - 3

    # A field of the samples' own goes for the score, and that is said.
    name = "--head extra: replaced what the JSON had there"
    assert counted(capsys.readouterr().out, name) == N


def test_an_onnx_head(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    import onnx

    helper = onnx.helper
    rng = np.random.default_rng(2)
    w, v = rng.normal(size=(D, 7)).astype(np.float32), rng.normal(size=(7, 1)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Sigmoid", ["h"], ["s"]),
        helper.make_node("MatMul", ["s", "v"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", width])
        for name, width in (("x", D), ("y", 1))
    ]
    tensors = [onnx.numpy_helper.from_array(array, name) for array, name in ((w, "w"), (v, "v"))]
    graph = helper.make_graph(nodes, "head", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "h.onnx")

    image = IMAGE.astype(np.float16)
    scores = Head.of(f"a={tmp_path / 'h.onnx'}").scores(image, TEXT)
    expected = 1 / (1 + np.exp(-(image.astype(float) @ w))) @ v
    np.testing.assert_allclose(scores, expected[:, 0], atol=1e-4)
    with pytest.raises(ValueError, match=r"does not score embeddings of width 9"):
        Head.of(f"a={tmp_path / 'h.onnx'}").check(9)


def filled(folder: Path, values: list[Any], per_shard: int = 4) -> Path:
    with ShardWriter(folder, per_shard) as writer:
        for i, value in enumerate(values):
            writer.add(f"k{i}", encoded(picture(i)), "png", ["x y"], {} if value is None else value)
    return folder


VALUES = [5, "7.5", None, 2, 7.5, float("nan"), 1, 7.5, 3, "high", 9, 2.5, True, [1, 8], 0, -1]
NUMBERS = {0: 5, 1: 7.5, 3: 2, 4: 7.5, 6: 1, 7: 7.5, 8: 3, 10: 9, 11: 2.5, 13: 8, 14: 0, 15: -1}


@pytest.mark.parametrize("share", ["30%", "1/3", "0.01", "0.99"])
def test_a_share_is_of_all_that_have_a_number(tmp_path: Path, capsys, share: str) -> None:
    source = filled(tmp_path / "in", [None if v is None else {"s": v} for v in VALUES])
    call(filtering, source, "--to", tmp_path / "out", "--top", f"s={share}")

    part = Fraction(share.rstrip("%")) / (100 if "%" in share else 1)
    n_kept = max(1, int(part * len(NUMBERS)))
    least = sorted(NUMBERS.values(), reverse=True)[n_kept - 1]
    kept = [f"k{i}" for i, number in NUMBERS.items() if number >= least]
    assert list(read(tmp_path / "out")) == kept
    out = capsys.readouterr().out
    assert f"--top s={share}: s >= {least:g}\n" in out
    assert counted(out, f"dropped: --top s={share}: no such value") == len(VALUES) - len(NUMBERS)
    assert counted(out, f"dropped: --top s={share}: not among the highest") == 12 - len(kept)


def test_shares_are_of_all_samples_whatever_else_is_asked(tmp_path: Path) -> None:
    """DataComp's intersections: what two rules keep is what each of them keeps."""
    metas = [{"s": i % 7, "t": -i, "u": i % 2} for i in range(20)]
    source = filled(tmp_path / "in", metas)
    kept = {}
    for name, options in {
        "s": ["--top", "s=.5"],
        "t": ["--top", "t=60%"],
        "u": ["--drop", "u == 1"],
        "all": ["--top", "t=60%", "--drop", "u == 1", "--top", "s=.5"],
    }.items():
        call(filtering, source, "--to", tmp_path / name, *options)
        kept[name] = set(read(tmp_path / name))
    assert kept["all"] == kept["s"] & kept["t"] & kept["u"] and kept["all"]


def headed(embedded: tuple[Path, Path], head: Path) -> list[Any]:
    """A call with shares of a field and of a head's scores."""
    source, folder = embedded
    write_head(head, network("relu").state_dict())
    heads = ["--embeddings", folder, "--head", f"a={head},relu"]
    return [source, "--top", "extra=80%", *heads, "--top", "a=40%"]


@pytest.mark.slow  # six processes that import torch
def test_any_number_of_processes(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    options = headed(embedded, tmp_path / "h.pth")
    call(filtering, *options, "--to", tmp_path / "one")
    call(filtering, *options, "--to", tmp_path / "three", "--processes", 3)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    assert len(digests(tmp_path / "one")) == 3


def test_a_call_that_goes_on(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    options = headed(embedded, tmp_path / "h.pth")
    call(filtering, *options, "--to", tmp_path / "one")

    # As after a kill between the passes, and in the middle of the second.
    before = digests(tmp_path / "one")
    for name in ("00001.tar", "00001_filter.json", "00002.tar", "00002_filter.json"):
        (tmp_path / "one" / name).unlink()
    surveyed = tmp_path / "one" / "00000_scores.npz"
    written = surveyed.stat().st_mtime_ns
    call(filtering, *options, "--to", tmp_path / "one")
    assert digests(tmp_path / "one") == before and surveyed.stat().st_mtime_ns == written

    surveyed.write_bytes(surveyed.read_bytes()[:50])
    (tmp_path / "one" / "00001_filter.json").unlink()
    with pytest.raises(ValueError, match=r"00000_scores.npz is damaged .* delete it with its mark"):
        call(filtering, *options, "--to", tmp_path / "one")


def test_a_folder_from_before_there_were_scores_goes_on(tmp_path: Path) -> None:
    """What is claimed of a call without the new options is what was claimed then."""
    call(filtering, write(tmp_path / "in"), "--to", tmp_path / "out", "--languages", "en")
    claimed = json.loads((tmp_path / "out" / "_filter.json").read_text())["settings"]
    assert claimed == {
        "min_side": 0, "max_aspect": 0.0, "keep": [], "drop": [], "uids": "", "min_words": 0,
        "max_words": 0, "match": "", "reject": "", "max_repeats": 0, "languages": ["en"],
        "unclear": "keep", "min_relations": 0, "action": False, "min_score": None,
    }  # fmt: skip


def test_the_parts_of_two_machines_share_a_threshold(tmp_path: Path) -> None:
    source = filled(tmp_path / "in", [{"s": i * 7 % 10} for i in range(16)])
    call(filtering, source, "--to", tmp_path / "whole", "--top", "s=50%")
    for part in ("1/2", "2/2", "1/2"):
        call(filtering, source, "--to", tmp_path / "parts", "--top", "s=50%", "--part", part)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_the_model_s_cosines_make_a_share(tmp_path: Path, capsys) -> None:
    ref = f"local-dir:{tiny_open_clip(tmp_path / 'model')}"
    with ShardWriter(tmp_path / "in", 3) as writer:
        for i in range(8):
            captions = [[f"a dog {i}"], [f"a red cat {i}", f"sofa {i}"], []][i % 3]
            meta = {"clip_scores": [9.0] * len(captions)}  # of an earlier call
            writer.add(f"k{i}", encoded(picture(i)), "png", captions, meta)
        writer.add("broken", b"no picture", "jpg", ["a dog"], {"clip_scores": [9.0]})
    options = [tmp_path / "in", "--model", ref, "--batch", 2]
    call(filtering, *options, "--min-score", -1, "--to", tmp_path / "all")
    cosines = {key: s.meta["clip_scores"] for key, s in read(tmp_path / "all").items()}
    assert len(cosines) == 6

    capsys.readouterr()
    call(filtering, *options, "--top", "clip_scores=50%", "--to", tmp_path / "half")
    best = sorted((max(scores) for scores in cosines.values()), reverse=True)
    kept = {key: scores for key, scores in cosines.items() if max(scores) >= best[2]}
    assert {key: s.meta["clip_scores"] for key, s in read(tmp_path / "half").items()} == kept
    name = "dropped: --top clip_scores=50%: no such value"
    assert counted(capsys.readouterr().out, name) == 3


def _write_wrong(folder: Path) -> dict[str, Path]:
    """Heads that are none, or none for these embeddings."""
    torch.save({"layers.0.weight": torch.zeros(1, D + 1)}, folder / "wide.pth")
    torch.save({"layers.0.weight": torch.zeros(2, D)}, folder / "two.pth")
    torch.save({"conv.weight": torch.zeros(2, 3, 3, 3)}, folder / "conv.pth")
    torch.save({"bn.weight": torch.zeros(D), "bn.running_mean": torch.zeros(D)}, folder / "bn.pth")
    pair = {"hidden.weight": torch.zeros(2, D), "out.weight": torch.zeros(1, 2)}
    torch.save(pair, folder / "named.pth")
    blocks = {"0.0.weight": torch.zeros(2, D), "1.0.weight": torch.zeros(1, 2)}
    torch.save(blocks, folder / "blocks.pth")
    bias = {"0.weight": torch.zeros(1, D), "0.bias": torch.zeros(3)}
    torch.save(bias, folder / "bias.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"weight": torch.full((1, D), torch.nan)}, folder / "nan.pth")
    torch.save(nn.Linear(D, 1), folder / "module.pth")
    write_head(folder / "gaps.pth", network("relu").state_dict())
    for name in ("torn.pth", "torn.safetensors", "torn.onnx"):
        (folder / name).write_bytes(b"not at all")
    (folder / "head.txt").write_text("x")
    return {"folder": folder}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--head", "a={wrong}/wide.pth"], r"wide.pth does not score embeddings of width 16"),
        (["--head", "a={wrong}/two.pth"], "two.pth gives 2 numbers a picture; expected one score"),
        (["--head", "a={wrong}/conv.pth"], r"holds conv.weight \(2, 3, 3, 3\); expected weights"),
        (["--head", "a={wrong}/bn.pth"], r"running_mean.*export another network as .onnx"),
        (["--head", "a={wrong}/named.pth"], "layers hidden.weight, out.weight; what stands betwe"),
        (["--head", "a={wrong}/named.pth,relu"], "export another network as .onnx"),
        (["--head", "a={wrong}/blocks.pth,relu"], "layers 0.0.weight, 1.0.weight; what stands"),
        (["--head", "a={wrong}/bias.pth"], r"0.bias has the shape \(3,\), expected \(1,\)"),
        (["--head", "a={wrong}/list.pth"], "holds list, expected a state dict"),
        (["--head", "a={wrong}/module.pth"], "module.pth cannot be read as weights"),
        (["--head", "a={wrong}/gaps.pth"], r"ReLU or only dropout.*gaps.pth,relu or ,linear"),
        (["--head", "a={wrong}/torn.pth"], "torn.pth cannot be read as weights"),
        (["--head", "a={wrong}/torn.safetensors"], "torn.safetensors cannot be read as weights"),
        (["--head", "a={wrong}/torn.onnx"], "torn.onnx cannot be read as weights"),
        (["--head", "a={wrong}/head.txt"], "head.txt is no file of a head; expected --head NAME="),
        (["--head", "a={wrong}/none.pth"], "there is no file .*none.pth"),
        (["--head", "a={wrong}/nan.pth"], "nan.pth scores nan: its weights are not all finite"),
        (["--head", "captions=cosine"], "overwrite the field 'captions' of the JSON"),
        (["--head", "negative_scores=cosine"], "overwrite the field 'negative_scores'"),
        (["--head", "cosine"], "--head 'cosine': expected --head NAME=FILE"),
        (["--head", "a=cosine", "--head", "a=cosine"], "given twice under one name: a, a"),
        (["--top", "extra"], "expected FIELD=SHARE with a share between 0 and 1"),
        (["--top", "extra=0"], "expected FIELD=SHARE"),
        (["--top", "extra=1.0"], "expected FIELD=SHARE"),
        (["--top", "extra=120%"], "expected FIELD=SHARE"),
        (["--top", "extra=most"], "expected FIELD=SHARE"),
        (["--top", "=.3"], "expected FIELD=SHARE"),
        (["--top", "extr=.3"], "'extr=.3': no sample has that field, did you mean 'extra'"),
        (["--top", "captions=.3"], "'captions=.3': no sample has a number in it"),
        (["--top", "clip_scores=.3"], "no sample has that field"),
        (["--top", "extra=.3", "--model", "x"], "--min-score X and --model REF go together, or"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    embedded: tuple[Path, Path], tmp_path: Path, options: list[str], message: str
) -> None:
    source, folder = embedded
    _write_wrong(tmp_path)
    options = [option.format(wrong=tmp_path) for option in options]
    if "--head" in options:
        options += ["--embeddings", str(folder)]
    with pytest.raises(ValueError, match=message):
        call(filtering, source, "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_head_cut_anywhere_is_told(tmp_path: Path, as_zip: bool) -> None:
    """torch, zipfile and pickle each have errors of their own for a damaged file."""
    whole = io.BytesIO()
    torch.save(network("relu").state_dict(), whole, _use_new_zipfile_serialization=as_zip)
    data, n = whole.getvalue(), 0
    for end in range(0, len(data), len(data) // 60):
        path = tmp_path / f"{end}.pth"
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=f"{end}.pth cannot be read as weights"):
            Head.of(f"a={path},relu").check(D)
        n += 1
    assert n > 55


def test_embeddings_must_be_of_these_samples(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = embedded
    for options in (["--embeddings", folder], ["--head", "a=cosine"]):
        with pytest.raises(ValueError, match=r"--embeddings DIR .* and --head NAME=FILE go toge"):
            call(filtering, source, "--to", tmp_path / "out", *options)

    filled(tmp_path / "other", [{}] * N, per_shard=8)
    (tmp_path / "other" / "00001.tar").write_bytes((source / "00002.tar").read_bytes())
    (tmp_path / "other" / "_index.bin").unlink()
    options = ["--embeddings", folder, "--head", "a=cosine", "--to", tmp_path / "out"]
    with pytest.raises(ValueError, match=re.escape("00001.safetensors")):
        call(filtering, tmp_path / "other", *options)
    assert not (tmp_path / "out").exists()


def test_a_share_is_read_as_it_is_written() -> None:
    values = np.arange(1000, dtype=float)
    for text, least in (("a=.29", 710), ("a=29%", 710), ("b=c=0.001", 999), ("a=0.9999", 1)):
        top = Top.of(text)
        assert top.threshold(values) == least
    assert Top.of("b=c=0.001").field == "b=c"
