"""A second demo in one folder removes what the first one wrote, and nothing else."""

import json

import pytest

from vlp import demo


@pytest.fixture
def earlier(tmp_path):
    """The folder of a demo that was stopped half-way, beside a file of somebody else's."""
    for name in (
        "data/train/00000.tar",
        "config.yaml",
        "checkpoints/step_00000001/model.safetensors",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "thesis.tex").write_text("mine")
    record = {
        str(path.relative_to(tmp_path)): demo._stamp(path) for path in demo._in_places(tmp_path)
    }
    (tmp_path / demo.RECORD).write_text(json.dumps(record))
    return tmp_path


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_the_demo_wrote_is_removed_and_the_rest_stays(earlier):
    demo.remove_earlier(earlier)
    assert everything(earlier) == ["thesis.tex"]
    demo.remove_earlier(earlier)  # also where there is nothing of it
    assert everything(earlier) == ["thesis.tex"]


@pytest.mark.parametrize("name", ["data/train/mine.tar", "export/notes.md", "config.yaml"])
def test_a_file_that_it_did_not_write_or_that_was_changed_is_refused_and_nothing_removed(
    earlier, name
):
    (earlier / name).parent.mkdir(exist_ok=True)
    (earlier / name).write_text("somebody else's")
    before = everything(earlier)
    with pytest.raises(
        FileExistsError,
        match=rf"1 files .*{name}; move them away, or choose another folder with --out",
    ):
        demo.demo(earlier)
    assert everything(earlier) == before and (earlier / name).read_text() == "somebody else's"


def test_a_folder_of_another_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("out: x")
    with pytest.raises(FileExistsError, match=r"config.yaml"):
        demo.demo(tmp_path)
    assert everything(tmp_path) == ["config.yaml"]


def test_a_demo_that_fails_leaves_a_record_of_what_it_wrote(tmp_path, monkeypatch):
    def make(out):
        (out / "data").mkdir()
        (out / "data" / "00000.tar").write_text("x")
        raise OSError("no space")

    monkeypatch.setattr(demo, "make", make)
    for _ in range(2):  # the second one replaces what the first one left
        with pytest.raises(OSError, match="no space"):
            demo.demo(tmp_path)
        assert everything(tmp_path) == ["data", "data/00000.tar", "demo.json"]
