"""`vlp data certainty`: the likelihood against known distributions, the loss against loops, curves
against a count, an adapter that finds planted uncertainty, and what is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.data_tools.tools import call
from vlp.data.format import ShardWriter
from vlp.data_tools import certainty
from vlp.eval import certainty as curves
from vlp.models.certainty import (
    Adapters,
    Distribution,
    Form,
    load,
    negative_log_likelihood,
    save,
    variance,
)


def of(scale: float, shape: float, n: int = 1) -> Distribution:
    values = (0.3, scale, shape)
    return Distribution(*(torch.full((n,), value, dtype=torch.float64) for value in values))


def test_shapes_of_two_and_one_are_gauss_and_laplace() -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    gauss = torch.distributions.Normal(0.3, 0.7).log_prob(x)
    found = negative_log_likelihood(x, of(0.7 * math.sqrt(2), 2, 61))
    torch.testing.assert_close(found, -gauss)
    laplace = torch.distributions.Laplace(0.3, 0.7).log_prob(x)
    torch.testing.assert_close(negative_log_likelihood(x, of(0.7, 1, 61)), -laplace)
    assert variance(of(0.7 * math.sqrt(2), 2)).item() == pytest.approx(0.49)
    assert variance(of(0.7, 1)).item() == pytest.approx(2 * 0.49)


@pytest.mark.parametrize(("scale", "shape"), [(0.5, 0.6), (1.3, 1.5), (0.2, 4.0)])
def test_every_shape_is_a_density_with_its_variance(scale: float, shape: float) -> None:
    x = torch.linspace(-80, 80, 400_001, dtype=torch.float64) * scale + 0.3
    found = of(scale, shape, len(x))
    density = (-negative_log_likelihood(x, found)).exp()
    step = x[1] - x[0]
    assert (density.sum() * step).item() == pytest.approx(1, abs=1e-3)
    second = (density * (x - 0.3) ** 2).sum() * step
    assert second.item() == pytest.approx(variance(of(scale, shape)).item(), rel=2e-3)


def test_the_loss_is_the_loop_s_with_its_gradients() -> None:
    torch.manual_seed(0)
    adapters = Adapters(Form(5, hidden=7, layers=2)).double().eval()
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    image, text = torch.randn(2, 3, 5, dtype=torch.float64)

    expected = 0
    for side, own, other in (("image", image, text), ("text", text, image)):
        mean, scale, shape = adapters.sides[side](own)
        for i in range(3):
            for d in range(5):
                m, a, b = mean[i, d], scale[i, d], shape[i, d]

                def likelihood(e, m=m, a=a, b=b):
                    power = (abs(e - m) / a) ** b
                    return power - torch.log(b / (2 * a)) + torch.lgamma(1 / b)

                one = abs(own[i, d] - m) + 0.05 * likelihood(own[i, d])
                expected = expected + (one + 1e-4 * likelihood(other[i, d])) / 15
    total = adapters.loss(image, text)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    parameters = list(adapters.parameters())
    for one, other in zip(*(torch.autograd.grad(v, parameters) for v in (total, expected))):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def test_curves_are_counts_whatever_the_order() -> None:
    hits = torch.tensor([True, True, False, True, False, False, True, False, False, False])
    certainty = torch.tensor([9.0, 8, 7, 6, 5, 5, 5, 5, 1, 0])
    shares = (1.0, 0.5, 0.3, 0.1, 0.01)
    # The four of certainty 5 count as a quarter each.
    expected = [0.4, (3 + 0.25) / 5, 2 / 3, 1.0, 1.0]
    assert curves.kept(hits, certainty, shares) == pytest.approx(expected)
    bins = curves.by_bin(hits, certainty, 5)
    assert bins == pytest.approx([0, 0.25, 0.25, 0.5, 1])
    assert curves.spearman(bins) == pytest.approx(0.9747, abs=1e-4)
    for seed in range(5):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        assert curves.kept(hits[order], certainty[order], shares) == pytest.approx(expected)
        assert curves.by_bin(hits[order], certainty[order], 5) == pytest.approx(bins)

    assert curves.spearman([1, 2, 3]) == pytest.approx(1) == -curves.spearman([3, 2, 1])
    assert curves.spearman([2, 2, 2]) == curves.spearman([7]) == 0
    assert curves.by_bin(hits[:3], certainty[:3]) == [0, 1, 1]
    assert curves.kept(hits[:1], certainty[:1]) == [1] * len(curves.SHARES)
    for one, other in ((hits[:2], certainty), (hits[:0], certainty[:0])):
        with pytest.raises(ValueError, match="expected as many"):
            curves.kept(one, other)
    with pytest.raises(ValueError, match="1 of 2 certainties are NaN"):
        curves.kept(hits[:2], torch.tensor([1.0, torch.nan]))


N, D = 240, 16


def write(folder: Path, rows: dict[str, np.ndarray] | None = None) -> tuple[Path, Path]:
    """Pairs of which every other is planted to be vague: its rows lie anywhere, image and text
    apart; those of the others on a plane, together. Some have no picture.
    """
    rng = np.random.default_rng(0)
    plane = np.zeros((N, D))
    plane[:, :3] = rng.normal(size=(N, 3))
    anywhere = rng.normal(size=(2, N, D))
    is_vague = (np.arange(N) % 2 == 1)[:, None]
    sides = {}
    for side, elsewhere in zip(("image", "text"), anywhere):
        values = np.where(is_vague, elsewhere, plane)
        sides[side] = values / np.linalg.norm(values, axis=1, keepdims=True)
    sides["image"][5] = 0

    shards, embedded = folder / "in put", folder / "embedded"
    with ShardWriter(shards, N) as writer:
        for i in range(N):
            writer.add(f"k{i}", f"image {i}".encode(), "jpg", [f"caption {i}"])
    embedded.mkdir()
    keys = hashlib.sha256("\n".join(f"k{i}" for i in range(N)).encode()).hexdigest()
    about = {"model": "not here", "scale": "10", "weights": "w", "keys": keys}
    halves = {side: values.astype(np.float16) for side, values in (rows or sides).items()}
    save_file(halves, embedded / "00000.safetensors", about)
    return shards, embedded


def test_the_adapter_finds_what_is_vague(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, embedded = write(tmp_path)
    options = ["--embeddings", embedded, "--epochs", 50, "--lr", 1e-2, "--hidden", 64]
    options += ["--layers", 2, "--dropout", 0, "--batch", 32]
    options += ["--held-out", 0.4, "--device", "cpu"]
    call(certainty, source, *options, "--to", tmp_path / "out")

    measured = json.loads((tmp_path / "out" / "certainty.json").read_text())
    assert measured["trained"] + measured["held_out"] == N - 1 and measured["held_out"] == 96
    assert len(measured["loss"]) == 50 and measured["loss"][-1] < measured["loss"][0]
    for way in ("image_retrieval", "text_retrieval"):
        of_share = dict(zip(measured["shares"], measured[way]["recall@1_of_share"]))
        assert of_share[0.5] > of_share[1.0] + 0.15
        assert measured[way]["spearman"] > 0.5
    printed = capsys.readouterr().out
    assert "R@1, text of an image:" in printed and "of the more certain half" in printed
    assert "<svg" in (tmp_path / "out" / "certainty.html").read_text()

    # The adapter is there again, for the model's own rows; and the same call makes the same.
    adapters = load(tmp_path / "out" / "adapter.safetensors")
    assert adapters.form == Form(D, 64, 2, 0.0, "not here", "w") and not adapters.training
    rows = torch.nn.functional.normalize(torch.eye(2, D), dim=1)
    assert adapters.certainty("image", rows).shape == (2,)
    call(certainty, source, *options, "--to", tmp_path / "again")
    made, again = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (tmp_path / "out", tmp_path / "again")
    )
    assert made == again and len(made) == 3


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    source, embedded = write(tmp_path)
    to = tmp_path / "out"
    trials = [
        (["--epochs", 0], "--epochs is 0; expected at least 1"),
        (["--lr", 0], "--lr is 0.0; expected a number > 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--dropout", 1], "--dropout is 1.0; expected 0 <= P < 1"),
        (["--held-out", 1], "--held-out is 1.0; expected a share between 0 and 1"),
    ]
    for options, expected in trials:
        with pytest.raises(ValueError, match=expected):
            call(certainty, tmp_path / "absent", "--embeddings", embedded, *options, "--to", to)
    with pytest.raises(ValueError, match="is a folder that is not empty"):
        call(certainty, source, "--embeddings", embedded, "--to", embedded)

    # All but three pairs have no picture.
    image = np.zeros((N, D))
    image[:3] = 1
    few = write(tmp_path / "few", {"image": image, "text": np.ones((N, D))})[1]
    with pytest.raises(ValueError, match="holds 3 pairs with both embeddings; expected at least 4"):
        call(certainty, source, "--embeddings", few, "--to", to)
    assert not to.exists() and len(trials) == 5


def test_a_file_that_holds_no_adapters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    trials = [b"", b"not a file of tensors", None]
    for content in trials:
        if content is None:
            save_file({"a": np.zeros(2)}, path, {"form": json.dumps({"width": 4})})
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"holds no adapters .* of `vlp data certainty`"):
            load(path)
    save(Adapters(Form(4)), path)
    assert load(path).form == Form(4) and len(trials) == 3
    with pytest.raises(ValueError, match="cannot be made so"):
        Form(0)
