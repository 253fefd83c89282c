"""The geometry of embeddings against loops over rows, whole and in tiles."""

import math

import pytest
import torch

from vlp import geometry


def rows(n=11, seed=3):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(n, 5, generator=generator, dtype=torch.float64) + 0.4
    return torch.nn.functional.normalize(raw, dim=1)


def test_gap_and_alignment_are_the_loops():
    image, text = rows(seed=3), rows(seed=4)
    mean_image, mean_text = (sum(x) / len(x) for x in (image, text))
    gap = math.sqrt(sum((mean_image - mean_text) ** 2))
    assert geometry.modality_gap(image, text).item() == pytest.approx(gap, rel=1e-12)
    distances = [sum((x - t) ** 2).item() for x, t in zip(image, text)]
    alignment = sum(distances) / len(distances)
    assert geometry.alignment(image, text).item() == pytest.approx(alignment, rel=1e-12)


@pytest.mark.parametrize("tile", [1, 4, 11, 1024])
def test_uniformity_is_the_loop_over_pairs_in_tiles_of_any_size(tile, monkeypatch):
    monkeypatch.setattr(geometry, "TILE_ROWS", tile)
    x = rows()
    kernels = []
    for i in range(len(x)):
        kernels += [math.exp(-3 * sum((x[i] - x[j]) ** 2)) for j in range(i)]
    assert len(kernels) == 55
    expected = math.log(sum(kernels) / len(kernels))
    assert geometry.uniformity(x, t=3).item() == pytest.approx(expected, rel=1e-12)


def test_one_row_has_no_pairs_and_equal_rows_have_uniformity_zero():
    with pytest.raises(ValueError, match="at least two rows, found 1"):
        geometry.uniformity(rows(1))
    assert geometry.uniformity(rows(1).repeat(4, 1)).item() == pytest.approx(0, abs=1e-12)
