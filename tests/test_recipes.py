"""Every shipped configuration trains: its data fields, objective, teacher, heads and views, with
tiny towers and pictures.

And every command of its header is one that can be given.
"""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.data.material import encoded, picture
from tests.data.test_sounds import tone
from tests.models import multimodals
from tests.test_modalities import write_rows
from tests.test_text_pairs import rows, words, write_table
from vlp import checkpoint, cli, config, plugin
from vlp.data.format import ShardWriter
from vlp.data.members import Picture
from vlp.train import train

TEXT = "{name: transformer, context_length: 16, width: 16, layers: 1, heads: 2}"
# Run by make demo, by the benchmark, in tests/selection, and with its second stage below.
ELSEWHERE = {"demo", "caltech101", "jest", "mcl", "edgevl"}
# They differ from `sogclr`, from `clip` or from `vlm2vec` in the options of one term, which
# tests/losses runs.
LIKE_SOGCLR = {
    "align", "basic", "convirt", "cyclip", "decoupled", "isogclr", "macl", "mann_whitney",
    "unime_2",
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Samples with all that any recipe reads of its data."""
    folder = tmp_path_factory.mktemp("recipes") / "shards"
    with ShardWriter(folder, 100) as writer:
        for i in range(40):
            meta = {
                "negatives": [f"not {i}", f"nor {i}"],
                "counterfactuals": [f"{i} and two", f"{i} and three"],
                "short_caption": f"picture {i}",
                "long_caption": f"A picture, whose number is {i}. It is of one colour.",
                "class": f"kind {i % 7}",
                "origin": f"pair {i // 2}",
                "paraphrase": [f"picture {i} is this"],
                "negative_scores": [0.2 + i / 100, 0.4],
                "score": 0.5,
                "concepts": [i % 5, 5 + i % 3],
            }
            own, other = (encoded(picture(k, (16, 16))) for k in (i, i + 50))
            images = dict.fromkeys(range(2), Picture(other, "png"))
            captions = [f"this is picture {i}: {words(i)}"]
            sound = {} if i % 4 == 0 else {"wav": tone(200 + 20 * i)}
            writer.add(f"k{i}", own, "png", captions, meta, negative_images=images, further=sound)
    return folder


def tiny(recipe: Path, shards: Path, out: Path, *more: str) -> config.Config:
    plain = config.load(recipe)
    locked = plain.model.image_tower.common is not None and plain.model.image_tower.common.locked
    tower = (
        "{name: vit, image_size: 16, patch_size: 8, width: 16, layers: 1, head_width: 16, "
        f"locked: {str(locked).lower()}}}"
    )
    paths = [f"data.sources.{i}.path={shards}" for i in range(len(plain.data.sources))]
    if plain.model.heads.teacher is not None:
        more = ("model.heads.teacher.width=16", *more)
    queue, micro_batches = min(plain.teacher.queue, 16), min(plain.train.micro_batches, 2)
    return config.load(
        recipe,
        [
            f"out={out}",
            *paths,
            "data.workers=0",
            f"model.image_tower={tower}",
            f"model.text_tower={TEXT}",
            "model.embed_dim=16",
            "model.pretrained=null",
            "pairwise.topology=auto",
            "train.duration=3",
            "train.batch=16",
            f"train.micro_batches={micro_batches}",
            "train.optimizer.warmup=1",
            "train.precision=float32",
            f"teacher.queue={queue}",
            "eval={}",
            *more,
        ],
    )


def losses(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


ROOT = Path(config.__file__).resolve().parent.parent
RECIPES = {path.stem: path for path in sorted(ROOT.glob("configs/*.yaml"))}


def test_every_recipe_has_a_header():
    """What it is, its data, its command, the hardware and the result; and the number of recipes
    that are run below.
    """
    assert RECIPES.keys() == config.shipped().keys() and len(RECIPES) == 63
    for name, path in RECIPES.items():
        header = header_of(path)
        assert {"command", "hardware", "result"} <= set(re.findall(r"^# +(\w+)  ", header, re.M)), (
            name
        )
        assert name == "demo" or re.search(r"^# data  ", header, re.M), name
        assert f"vlp train {name}" in header or f"train.py {name}" in header or name == "demo"
        ours = name in ("demo", "caltech101", "photos")  # no paper's
        assert ours or re.search(r"^# difference  ", header, re.M), (
            f"{name} says nothing of what differs from its paper"
        )


def header_of(path: Path) -> str:
    return re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0]


def commands_of(header: str) -> list[list[str]]:
    """Lines that are a command, after a label such as `command` or alone; a remark stands behind
    three spaces.
    """
    lines = [re.sub(r"^#\s*((data|command)\s{2,})?", "", line) for line in header.splitlines()]
    commands = [
        re.split(r"\s{3,}\(", line)[0]
        for line in lines
        if re.match(r"(vlp|accelerate launch) ", line)
    ]
    return [shlex.split(command) for command in commands]


def parse(command: list[str], name: str) -> str:
    """Give a command to its own parsers, and an overridden configuration to its reader; returns
    what it starts.
    """
    if command[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(command[2:])
        assert (
            ROOT / launched.config_file
        ).is_file() and launched.training_script == "launch/train.py"
        return parse(["vlp", "train", *launched.training_script_args], name)

    options = cli.build_parser(command[1:]).parse_args(command[1:])
    if command[1] in ("train", "data") and hasattr(options, "config"):
        loaded = config.load(config.find(options.config), getattr(options, "overrides", []))
        assert config.find(options.config).stem == name and loaded.out
    if command[1] == "eval":
        assert plugin.names("vlp.eval.tasks").count(options.task[0]) == 1
    return command[1]


def test_every_command_of_every_header_can_be_given():
    started, n_tools = [], 0
    for name, path in RECIPES.items():
        header = header_of(path)
        commands = commands_of(header)
        assert commands, f"{name} has no command"
        started += [parse(command, name) for command in commands]
        for tool in re.findall(r"\bvlp data (\w+)", header):  # also where it is only named
            assert tool in plugin.names("vlp.data_tools"), f"{name} names vlp data {tool}"
            n_tools += 1
    counts = {command: started.count(command) for command in sorted(set(started))}
    assert counts == {"data": 33, "demo": 1, "eval": 6, "export": 5, "train": 85}
    assert n_tools == 41


def test_a_command_that_does_not_exist_is_noticed(capsys):
    """The parsers above would prove nothing if they took everything."""
    for command in (
        "vlp data filter data/laion --diht --to data/pairs",
        "vlp data embed data/pairs --to x",
    ):
        with pytest.raises(SystemExit):
            parse(shlex.split(command), "hn_nce")
    assert "--diht" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown key"):
        parse(shlex.split("vlp train hn_nce trian.batch=2"), "hn_nce")


# Their tower is one model, tiny here, of this family.
OF_MULTIMODAL = {"vlm2vec": "qwen2_vl", "e5v": "llava", "unime_1": "llava", "unime_2": "qwen2_vl"}


def of_multimodal(name: str, shards: Path, folder: Path) -> list[str]:
    """Overrides that put a tiny model, a table of texts and an earlier run in their place."""
    model = multimodals.multimodal_model(folder / "model", OF_MULTIMODAL[name])
    whole = multimodals.tower(model, lora={"r": 2})
    more = [f"model.{key}={json.dumps(value)}" for key, value in whole.items()]
    plain = config.load(RECIPES[name])
    if plain.data.pairs == "text":
        table = write_table(folder / "nli_for_simcse.csv", rows())
        more.append(f"data.sources.0.path={table}")

    # A run before it: its teacher, or what it starts from.
    for key, is_set in (("teacher.model", plain.teacher.models), ("init_from", plain.init_from)):
        if is_set:
            before = tiny(RECIPES["vlm2vec"], shards, folder / "before", *more[:3])
            more.append(f"{key}={train(before)}")
    return more


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_SOGCLR else [])
        for name in sorted(RECIPES.keys() - ELSEWHERE)
    ],
)
def test_a_recipe_trains(name, shards, tmp_path):
    more = []
    n_teachers = len(config.load(RECIPES[name]).teacher.models)
    if n_teachers and name not in OF_MULTIMODAL:
        teacher = str(train(tiny(RECIPES["clip"], shards, tmp_path / "teacher")))
        more = [f"teacher.model={teacher if n_teachers == 1 else [teacher] * n_teachers}"]
    if name == "clipa":
        # Its two stages in three steps.
        stages = "{duration: 2, batch: 32, image_size: 8, warmup: 1}, {duration: 1, lr: 0.5}"
        more = [f"stages=[{stages}]"]
    if name == "matryoshka":
        more = ["objective.matryoshka.widths=[8, 16]"]  # of the tiny towers' 16
    if name in OF_MULTIMODAL:
        more = of_multimodal(name, shards, tmp_path)
    if name == "gram":
        audio = write_rows(tmp_path / "audio", shards, (3, 4), lengths=True)
        video = write_rows(tmp_path / "video", shards, (2, 5), lengths=True)
        more = [
            f"data.sources.0.modalities={{audio: {audio}, video: {video}}}",
            "model.heads.modalities={audio: {features: 4, length: 3, layers: 1, width: 8}, "
            "video: {features: 5, length: 2}}",
        ]
    if name == "lat":
        video = write_rows(tmp_path / "video", shards, (2, 5), lengths=True)
        more = [
            f"data.sources.0.modalities={{video: {video}}}",
            "model.heads.modalities={video: {features: 5, length: 2}}",
        ]
    run = train(tiny(RECIPES[name], shards, tmp_path / "run", *more, "log.every=1"))
    records = [line for line in losses(run) if line["kind"] == "train"]
    assert [line["step"] for line in records] == [1, 2, 3]
    terms = [term.label for term in config.load(RECIPES[name]).objective]
    assert all(term in line for term in terms for line in records)
    assert len({line["loss"] for line in records}) == 3  # it moves


def of_two_kinds(shards: Path, tmp_path: Path) -> list[str]:
    """Each picture a second time, as by another camera, with what a teacher made of the first."""
    with ShardWriter(tmp_path / "depth", 100) as writer:
        for i in range(40):
            other = encoded(picture(i + 90, (16, 16)))
            writer.add(f"k{i}", other, "png", [f"this is picture {i}: {words(i)}"], {})

    teacher = train(tiny(RECIPES["clip"], shards, tmp_path / "teacher"))
    embedded = tmp_path / "embedded"
    arguments = ["embed", str(shards), "--model", str(teacher), "--to", str(embedded)]
    assert cli.main(["data", *arguments]) == 0
    return [
        f"data.sources.1.path={tmp_path / 'depth'}",
        *(f"data.sources.{i}.embeddings={embedded}" for i in range(2)),
    ]


def test_edgevl_s_second_stage_goes_on_from_its_first(shards, tmp_path):
    """Both kinds of picture are of one teacher row, which has to be said, and what the first stage
    learned is kept.
    """
    sources = of_two_kinds(shards, tmp_path)
    of_sources = [*sources, "log.every=1"]
    same = tiny(RECIPES["edgevl"], shards, tmp_path / "same", *of_sources)
    of_depth = dataclasses.replace(same.data.sources[1].options, other_pictures=False)
    of_same = dataclasses.replace(same.data.sources[1], options=of_depth)
    data = dataclasses.replace(same.data, sources=[of_same])
    with pytest.raises(ValueError, match="the image embeddings are not made by"):
        train(dataclasses.replace(same, data=data))

    first = train(tiny(RECIPES["edgevl"], shards, tmp_path / "first", *of_sources))
    settings = [
        f"init_from={first}",
        "model.image_tower.int8_aware=true",
        "objective={infonce: {positives: caption}}",
    ]
    second = train(tiny(RECIPES["edgevl"], shards, tmp_path / "second", *of_sources, *settings))
    records = [line for line in losses(second) if line["kind"] == "train"]
    assert [line["step"] for line in records] == [1, 2, 3]
    assert all(line["infonce.positives"] > 1 for line in records), "both kinds of one picture"

    one, other = (checkpoint.load(checkpoint.newest(run)).model for run in (first, second))
    assert one.keys() == other.keys()
    weights = [of_run["visual.conv1.weight"] for of_run in (one, other)]
    moved = (weights[0] - weights[1]).norm() / weights[0].norm()
    assert 0 < moved < 0.3, "other random weights would be 1.4 away"


def test_a_width_beyond_the_model_is_answered_before_the_data_are_read(tmp_path):
    absent = tmp_path / "absent"
    wrong = tiny(
        RECIPES["matryoshka"], absent, tmp_path / "run", "objective.matryoshka.widths=[17]"
    )
    with pytest.raises(ValueError, match=r"found 17, but the embeddings have 16 numbers"):
        train(wrong)
    assert not (tmp_path / "run").exists()
