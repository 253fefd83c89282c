"""`vlp data filter --like`: pictures in the cells of another set's pictures, by planted cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.data_tools.mining import D, N, counted, store, write
from tests.data_tools.test_work import digests
from tests.data_tools.tools import call, read
from vlp.data_tools import filter as filtering

N_CELLS = 5


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Samples in five far cells, i % 5; another set in cells 1 and 3; picture 6 did not open."""
    rows = in_cells()
    rows[6] = 0
    source, embedded = write(tmp_path / "in"), store(tmp_path / "e", rows, rows)
    return source, embedded, other(tmp_path / "other", rows[[1, 3, 8, 6]])


def in_cells() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = np.eye(N_CELLS, D)[np.arange(N) % N_CELLS] + rng.normal(size=(N, D)) * 0.02
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def other(folder: Path, rows: np.ndarray, model: str = "not here", **about: str) -> Path:
    folder.mkdir(exist_ok=True)
    metadata = {"model": model} | about
    save_file({"image": rows.astype(np.float16)}, folder / "0.safetensors", metadata)
    return folder


def test_pictures_of_chosen_cells_stay(
    planted: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, embedded, like = planted
    options = ["--embeddings", embedded, "--like", like, "--cells", N_CELLS]
    call(filtering, source, "--to", tmp_path / "out", *options)
    inside = [i for i in range(N) if i % N_CELLS in (1, 3) and i != 6]
    assert list(read(tmp_path / "out")) == [f"k{i}" for i in inside] and len(inside) == 9
    name = "dropped: --like: in no cell of its pictures"
    assert counted(capsys.readouterr().out, name) == N - len(inside)

    # Beside a share, as DataComp's image-based ∩ CLIP score: what both keep.
    both = [*options, "--top", "extra=50%"]
    call(filtering, source, "--to", tmp_path / "both", *both)
    assert list(read(tmp_path / "both")) == [f"k{i}" for i in inside if i >= N // 2]

    # A call that goes on takes the cells that are decided.
    whole = digests(tmp_path / "both")
    decided = (tmp_path / "both" / "_cells.npz").stat().st_mtime_ns
    (tmp_path / "both" / "00002_filter.json").unlink()
    call(filtering, source, "--to", tmp_path / "both", *both)
    assert digests(tmp_path / "both") == whole
    assert (tmp_path / "both" / "_cells.npz").stat().st_mtime_ns == decided


def test_another_set_of_the_same_size_is_another_call(
    planted: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    source, embedded, like = planted
    options = ["--embeddings", embedded, "--like", like, "--cells", N_CELLS, "--to", tmp_path / "o"]
    other(like, np.eye(4, D), keys="of set a")
    call(filtering, source, *options)
    other(like, np.eye(4, D)[::-1], keys="of set b")
    with pytest.raises(ValueError, match="was made from other input or settings"):
        call(filtering, source, *options)


def test_one_part_decides_for_all(planted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """K-means is not the same on two machines: the shards of both are of the first one's cells."""
    source, embedded, like = planted
    options = ["--embeddings", embedded, "--like", like, "--cells", N_CELLS]
    call(filtering, source, "--to", tmp_path / "whole", *options)
    out, decided = tmp_path / "parts", []
    for part in ("2/2", "1/2", "2/2"):
        call(filtering, source, "--to", out, *options, "--part", part)
        cells = out / "_cells.npz"
        decided.append(cells.stat().st_mtime_ns if cells.exists() else None)
    assert digests(out) == digests(tmp_path / "whole")
    assert decided[0] is None and decided[1] == decided[2] is not None


def test_rows_that_are_not_finite_lie_in_no_cell(tmp_path: Path) -> None:
    """Of a model that overflows in half precision; of the other set they choose none."""
    rows = in_cells()
    rows[6], rows[8] = np.nan, np.inf
    source, embedded = write(tmp_path / "in"), store(tmp_path / "e", rows, rows)
    like = other(tmp_path / "other", rows[[3, 6, 8]])
    options = ["--embeddings", embedded, "--like", like, "--cells", N_CELLS]
    call(filtering, source, "--to", tmp_path / "out", *options)
    assert list(read(tmp_path / "out")) == [
        f"k{i}" for i in range(N) if i % N_CELLS == 3 and i != 8
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--min-words", 1, "--seed", 3], "--seed is of the cells of --like"),
        (["--like", "{like}"], "--like DIR, --cells K and --embeddings DIR go together"),
        (["--embeddings", "{embedded}", "--cells", 3], "--like DIR, --cells K and --embeddings"),
        (["--embeddings", "{embedded}", "--like", "{like}"], "go together"),
        (
            ["--embeddings", "{embedded}", "--like", "{source}", "--cells", 3],
            "holds no embeddings; make them with `vlp data embed`",
        ),
        (
            ["--embeddings", "{embedded}", "--like", "{strange}", "--cells", 3],
            "is of another, width 16, weights .; the source's embeddings are of not here, width 16",
        ),
        (
            ["--embeddings", "{embedded}", "--like", "{trained}", "--cells", 3],
            "is of not here, width 16, weights v; .* weights w: embed both with one model",
        ),
        (
            ["--embeddings", "{embedded}", "--like", "{flat}", "--cells", 3],
            "holds no embeddings of pictures",
        ),
        (["--embeddings", "{embedded}", "--like", "{like}", "--cells", 0], "--cells 0 must lie"),
        (["--embeddings", "{embedded}", "--like", "{like}", "--cells", 25], "--cells 25 must lie"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    planted: tuple[Path, Path, Path], tmp_path: Path, options: list, message: str
) -> None:
    source, embedded, like = planted
    strange = other(tmp_path / "strange", np.eye(2, D), "another")
    flat = other(tmp_path / "flat", np.zeros(5))
    places = {"source": source, "embedded": embedded, "like": like, "strange": strange}
    places |= {"flat": flat, "trained": other(tmp_path / "trained", np.eye(2, D), weights="v")}
    options = [str(option).format(**places) for option in options]
    with pytest.raises(ValueError, match=message):
        call(filtering, source, "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
