"""Folders that bring code along: whatever reads them, nothing of it is run, asked about, or left
unsaid.
"""

import json
import shutil

import pytest

from tests.data_tools.tools import call
from tests.models.tiny import language_model, tiny
from vlp import checkpoint
from vlp.data_tools import embed, filter
from vlp.eval import models
from vlp.export import folder as export
from vlp.models.assemble import text_spec

EVIL = """
import pathlib
pathlib.Path({sprung!r}).write_text("run")
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
class EvilConfig(BertConfig): pass
class EvilModel(BertModel): pass
"""


def plant(folder, sprung):
    """All in a folder that makes transformers import evil.py from it, if it is allowed to."""
    (folder / "evil.py").write_text(EVIL.format(sprung=str(sprung)))
    entries = {
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "config.json": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"},
    }
    for name, entry in entries.items():
        path = folder / name
        stated = json.loads(path.read_text()) if path.exists() else {}
        stated.pop("tokenizer_class", None)
        path.write_text(json.dumps(stated | {"auto_map": entry}))


@pytest.fixture
def trapped(tmp_path, monkeypatch):
    """An export and a run with a language model as the text tower, whose folders bring evil.py; and
    what it would write.
    """
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("asked whether to run the folder's code")
    )
    text = {
        "name": "huggingface",
        "model": str(language_model(tmp_path / "bert")),
        "context_length": 12,
        "pretrained": False,
    }
    model = tiny(text_tower=text)
    export.export(model, tmp_path / "export")
    sprung = tmp_path / "sprung"
    description = json.loads((tmp_path / "export/open_clip_config.json").read_text())
    asked = json.loads(json.dumps(description))
    asked["model_cfg"]["text_cfg"]["tokenizer_kwargs"] |= {"trust_remote_code": True}
    for name, said in (("kwargs", asked), ("silent", description)):
        folder = shutil.copytree(tmp_path / "export", tmp_path / name)
        plant(folder, sprung)
        plant(folder / "text_tower", sprung)
        (folder / "open_clip_config.json").write_text(json.dumps(said))
        del said["vlp"]
        foreign = shutil.copytree(folder, tmp_path / f"foreign_{name}")
        (foreign / "open_clip_config.json").write_text(json.dumps(said))
    run = checkpoint.Contents(
        model.state_dict(),
        {},
        config="out: run",
        description=asked | {"vlp": model.description()["vlp"]},
    )
    checkpoint.save(tmp_path / "run", 1, run, keep=1)
    plant(tmp_path / "bert", sprung)
    return tmp_path, sprung


def test_no_command_runs_a_folders_code(trapped, scenes):
    home, sprung = trapped
    asked = [home / name for name in ("kwargs", "foreign_kwargs", "run")]
    commands = {
        "eval, report": lambda ref: models.load(ref),
        "data embed": lambda ref: call(
            embed, scenes / "train", "--model", ref, "--to", home / "embedded"
        ),
        "data filter": lambda ref: call(
            filter, scenes / "train", "--model", ref, "--to", home / "kept", "--min-score", "0.1"
        ),
        "init_from, teacher.model": lambda ref: checkpoint.load_any(ref),
        "pretrained": lambda ref: tiny(pretrained=ref),
        "export": lambda ref: export.export_run(ref, home / "again", overwrite=True),
    }
    n_refused = 0
    for reference in map(str, asked):
        for name, command in commands.items():
            if name == "pretrained" and reference.endswith(("kwargs", "run")):
                continue  # it takes the tensors alone, and these do not fit
            with pytest.raises(
                ValueError,
                match=r"tokenizer_kwargs holds trust_remote_code; expected only clean, end",
            ):
                command(reference)
            n_refused += 1
    assert n_refused == 15 and not sprung.exists()


def test_a_folder_that_only_offers_its_code_is_refused_in_our_words(trapped):
    home, sprung = trapped
    n_refused = 0
    for name in ("silent", "foreign_silent", "bert"):
        with pytest.raises(
            ValueError,
            match=r"code that it brings along, which vlp never runs|transformers cannot load",
        ) as caught:
            models.load(str(home / name))
        assert "trust_remote_code" not in str(caught.value)
        n_refused += 1
    # The towers are transformers' own: their code is not needed.
    checkpoint.load_any(home / "silent")
    assert n_refused == 3 and not sprung.exists()


def test_the_trap_works(trapped, monkeypatch):
    """Negative control: transformers itself, told to trust the folder, runs its code."""
    from transformers import AutoTokenizer

    home, sprung = trapped
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(home / "modules"))
    monkeypatch.syspath_prepend(str(home / "modules"))
    AutoTokenizer.from_pretrained(home / "kwargs", trust_remote_code=True)
    assert sprung.read_text() == "run"


@pytest.mark.parametrize(
    "options",
    [{"trust_remote_code": True}, {"cache_dir": "/x"}, {"additional_special_tokens": ["<x>"]}],
)
def test_tokenizer_options_of_a_folder_pass_a_list(options):
    with pytest.raises(ValueError, match="tokenizer_kwargs holds"):
        text_spec(
            {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": "whitespace"} | options}, 8
        )
    known = {"clean": "canonicalize", "strip_sep_token": True}
    assert text_spec({"tokenizer_kwargs": known}, 8).options == {"strip_sep_token": True}
