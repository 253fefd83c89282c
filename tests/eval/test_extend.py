"""What docs/extend-task.md promises: its task and its prompt set run as they stand there, and every
task keeps the contract.
"""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from tests.eval import material
from vlp import config, plugin
from vlp.eval import evaluation, prompts, tasks
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extend-task.md"
BLOCK = re.compile(r"^```(?:python|text)\n# (eval/\S+)\n(.*?)^```$", re.M | re.S)


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """The page's files in the folders of plug-ins; yields where they were written."""
    files = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    assert files.keys() == {"eval/tasks/colours.py", "eval/prompts/sketch.txt"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "eval" / "tasks")])
    monkeypatch.setattr(prompts, "__path__", [*prompts.__path__, str(tmp_path / "eval/prompts")])
    yield tmp_path
    sys.modules.pop("vlp.eval.tasks.colours", None)


def write_colours(folder):
    """Two red pictures and a green one; the second red one's caption names the wrong colour."""
    rows = []
    colours = [("red", "red", "blue"), ("red", "blue", "red"), ("green", "green", "blue")]
    for i, (colour, right, wrong) in enumerate(colours):
        (folder / f"{i}.png").write_bytes(material.png(material.picture(i)))
        captions = {"caption": f"a {right} car", "wrong_caption": f"a {wrong} car"}
        rows.append({"image": f"{i}.png", "colour": colour, **captions})
    table = folder / "colours.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    return table


def test_the_example_task_scores_and_is_known_to_configurations(extended):
    table = write_colours(extended)
    near, far = material.direction("near"), material.direction("far")
    encoder = material.known_encoder(lambda n: near, lambda text: far if "blue" in text else near)

    chosen = plugin.keyed("vlp.eval.tasks", {"colours": {"data": str(table), "every": "5%"}})
    context = Context(workers=0, contents=Contents())
    (record,), items = evaluation.evaluate(encoder, chosen, context, evaluation.read_all(chosen))
    assert record["metrics"] == {"red": 1 / 2, "green": 1, "mean": 3 / 4}
    assert set(record["chance"].values()) == {1 / 2}
    assert record["counts"] == {"items": 3, "skipped": 0}
    assert items["colours/red"].tolist() == [[1, 1], [0, 1]]
    assert record["data_sha256"]

    parsed = config.parse({**material.OUR_CONFIG, "eval": {"colours": {"data": str(table)}}})
    assert [task.name for task in parsed.eval] == ["colours"]


def test_the_example_task_refuses_what_it_cannot_score(extended):
    table = write_colours(extended)
    (extended / "2.png").unlink()
    (chosen,) = plugin.keyed("vlp.eval.tasks", {"colours": {"data": str(table)}})
    with pytest.raises(DataError, match=r"1 of 3 annotations name images that are not in"):
        chosen.module.read(chosen.options)
    table.write_text(json.dumps({"image": "0.png", "caption": "a red car"}))
    with pytest.raises(DataError, match=r"lacks wrong_caption, colour"):
        chosen.module.read(chosen.options)


def test_the_example_prompt_set_is_found_by_its_name(extended):
    assert "sketch" in prompts.sets()
    expected = ["a sketch of a {}.", "a pencil drawing of a {}."]
    assert prompts.templates("sketch") == expected
    assert prompts.templates(str(extended / "eval/prompts/sketch.txt")) == expected


def test_every_task_keeps_the_contract():
    names = plugin.names("vlp.eval.tasks")
    for name in names:
        task = plugin.load("vlp.eval.tasks", name)
        assert task.__doc__ and type(task.VERSION) is int and task.KNOWN_AS and task.MAIN, name
        assert task.Options.__dataclass_params__.frozen, name
        assert list(inspect.signature(task.read).parameters) == ["options"], name
        parameters = list(inspect.signature(task.run).parameters)
        assert parameters == ["encoder", "data", "options", "context"], name
        with pytest.raises(DataError):
            task.read(task.Options(data="/nowhere"))
    assert len(names) == 32
