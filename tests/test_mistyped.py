"""A mistyped folder is answered at once, in one way, wherever a model or a data set is named: no
Hub is asked, and the folders near it are named.
"""

import shlex
import socket
from string import Template

import pytest

from vlp.cli import main
from vlp.pretrained import places

TRAIN = "train $config out=$out "


def tower(name, options):
    """A run with this text tower."""
    return f"{TRAIN} 'model.text_tower={{name: {name}, {options}}}' model.embed_dim=16"


# The command as it is typed, and what its message names besides the folder near it.
MISTYPED = [
    (tower("huggingface", "model: models/lama"), "no Hugging Face model configuration"),
    (tower("huggingface", "model: models/lama, pooler: mean_pooler"), "configuration"),
    (
        tower("huggingface", "model: models/bert, tokenizer: models/lama"),
        "text_tower.tokenizer",
    ),
    (tower("llm", "model: models/lama"), "no Hugging Face model configuration"),
    (tower("llm", "model: ./models/lama/"), "no Hugging Face model configuration"),
    (TRAIN + "init_from=models/lama", "no model 'models/lama'"),
    # Before evaluation data, which may take minutes to read.
    (f"{TRAIN} init_from=models/lama $eval", "no model 'models/lama'"),
    (f"{TRAIN} teacher.model=models/lama $eval", "no model 'models/lama'"),
    (TRAIN + "model.pretrained=models/lama", "pretrained: no model"),
    (TRAIN + "teacher.model=models/lama", "no model 'models/lama'"),
    (TRAIN + "teacher.cross_encoder=models/lama", "cannot be loaded as a cross-encoder"),
    (TRAIN + "teacher.cross_encoder=mllm:models/lama", "cannot be loaded as a mllm"),
    (TRAIN + "'data.sources=[{name: huggingface, path: models/lama}]'", "the source huggingface"),
    (TRAIN + "'data.sources=[{name: huggingface, path: $models/lama}]'", "source"),
    (
        "data embed $shards --to $out --text-model models/lama",
        "no Hugging Face model configuration",
    ),
    ("data embed $shards --to $out --text-model $models/lama", "configuration"),
    ("data embed $shards --to $out --model models/lama", "no model"),
    ("data rewrite $shards --to $out --kinds paraphrase --model models/lama", "language model"),
    ("data negatives $shards --to $out --rewriter models/lama", "language model"),
    ("data filter $shards --to $out --min-score .3 --model models/lama", "no model"),
    ("data filter $shards --to $out --max-overlap .5 --ocr transformers:models/lama", "--ocr"),
    ("data cells $run/config.yaml --to $out.safetensors --model models/lama", "no model"),
    ("eval $models/lama --task retrieval --data $pictures", "no model"),
    ("search models/lama $pictures dog", "no model"),
    ("embed models/lama $pictures --to $out.npy", "no model"),
    ("export models/lama --to $out", "no model"),
    ("export --average $run,models/lama --to $out", "no model"),
    ("export --blend $run models/lama --to $out", "no model"),
]
# What can be no repository has no folder near it either.
NO_NAMES = [
    ("eval $run --task zeroshot --data hf:some/where/else", "no name of a repository"),
    ("push $run ./models/lama", "no export"),
    ('search $run $pictures ""', "a QUERY is empty"),
    ('search $run $pictures dog " "', "a QUERY is empty"),
    (TRAIN + "'data.sources=[{name: huggingface, path: photos.csv}]'", "no folder 'photos.csv'"),
    (
        TRAIN + "'data.sources=[{name: huggingface, path: \"https://hf.co/datasets/a/b\"}]'",
        "write hf-hub:a/b",
    ),
    (TRAIN + "teacher.cross_encoder=hf-hub:a/b/c", "no name of a repository"),
]


@pytest.fixture
def asked(monkeypatch):
    """The hosts that were asked for; none answers."""
    hosts = []

    def ask(host, *_, **__):
        hosts.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    def connect(self, address):
        if self.family == socket.AF_UNIX:  # of processes here
            return plain(self, address)
        return ask(address)

    plain = socket.socket.connect
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(socket.socket, "connect", connect)
    return hosts


@pytest.fixture
def names(small_world, tmp_path, monkeypatch):
    from tests.models.languages import language_model
    from tests.models.tiny import language_model as bert

    models = tmp_path / "models"
    models.mkdir()
    bert(models / "bert")
    language_model(models / "llama")
    monkeypatch.chdir(tmp_path)
    nowhere = "'eval={zeroshot: {data: nowhere}}'"
    return small_world | {"models": models, "out": tmp_path / "out", "eval": nowhere}


def test_a_mistyped_folder_is_answered_without_asking_a_hub(names, asked, capfd):
    n_answered, wrong = 0, []
    cases = [(command, "models/llama", part) for command, part in MISTYPED]
    cases += [(command, "", part) for command, part in NO_NAMES]
    for command, near, part in cases:
        capfd.readouterr()
        asked.clear()
        status = main(shlex.split(Template(command).substitute(names)))
        text = capfd.readouterr().err
        is_short = len(text) < 1200 and "huggingface.co" not in text
        if status != 1 or asked or near not in text or part not in text or not is_short:
            wrong.append(f"{command}\n  status {status}, asked {asked}: {text.strip()[-700:]}")
        n_answered += 1
    assert not wrong, "\n".join(wrong)
    assert n_answered == len(cases) >= 31
    assert not (names["out"]).exists()


def test_a_name_that_no_hub_answers_ends_with_both_possibilities(names, asked, capfd):
    """A repository, an old one of one word, and a data set; each is asked for once."""
    questions = {
        tower("huggingface", "model: some/bertt"): "no folder 'some/bertt' here",
        tower("llm", "model: gpt3"): "no folder 'gpt3' here",
        tower("llm", "model: hf-hub:models/llama"): "within 10 s",
        TRAIN + "'data.sources=[{name: huggingface, path: some/photos}]'": "'some/photos' here",
        "data rewrite $shards --to $out --kinds paraphrase --model some/gptt": "'some/gptt' here",
        TRAIN + "teacher.cross_encoder=some/blipp": "'some/blipp' here",
        "eval $run --task zeroshot --data hf:some/photos": "for some/photos",
    }
    n_asked = 0
    for command, part in questions.items():
        capfd.readouterr()
        asked.clear()
        assert main(shlex.split(Template(command).substitute(names))) == 1
        text = capfd.readouterr().err
        assert part in text and "no Hub answered" in text and "look at the network" in text, text
        # huggingface_hub may have a question of its own.
        assert 1 <= len(asked) <= 2, (command, asked)
        n_asked += 1
    assert n_asked == len(questions) == 7


def test_a_name_of_the_hub_is_read_from_its_cache_where_none_answers(names, monkeypatch, tmp_path):
    """Also beside a folder of the user's name, which alone would make the name a path."""
    from tests.loopback_hub import loopback_hub
    from tests.models.test_references import use_hub
    from vlp.towers.huggingface import language_config

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    files = {path.name: path.read_bytes() for path in (tmp_path / "models/bert").iterdir()}
    with loopback_hub() as hub:
        use_hub(monkeypatch, hub.url)
        hub.repos["someone/bert"] = files
        assert language_config("someone/bert").model_type == "bert"
        with pytest.raises(ValueError, match=r"has no model 'someone/bart', or it is private"):
            language_config("someone/bart")

    use_hub(monkeypatch, "http://127.0.0.1:9")
    (tmp_path / "someone").mkdir()
    assert language_config("someone/bert").model_type == "bert"
    with pytest.raises(ValueError, match=r"no folder 'someone/bart' here; expected .*hf-hub:some"):
        language_config("someone/bart")


PATHS = [
    "./a",
    "../a/b",
    "/a/b",
    "~/a",
    "a/b/c",
    "a/b/",
    "a\\b",
    "C:/a",
    "a/b.safetensors",
    "b.tar",
]
PATHS += ["a b", "a/ä", "here/b", "a@ema", "", "a//b", "weights.PT", "a/b.json", "x--y", "a/b:c"]
NAMES = ["a/b", "gpt2", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "a_b/c-d", "v1.5/model"]


def test_what_can_be_a_name_of_the_hub_and_what_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert [text for text in PATHS if not places.is_path(text)] == []
    assert [text for text in NAMES if places.is_path(text)] == []
    assert len(PATHS) == 20 and len(NAMES) == 6
