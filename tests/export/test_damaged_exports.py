"""JSON files of an export that say something else than it wrote: each reader of the folder refuses
them in words.
"""

import json
import shutil

import pytest
import torch

from tests.models.tiny import tiny
from vlp import faults
from vlp.export.folder import export, export_run
from vlp.export.push import push
from vlp.models.load import load

CONFIG, MANIFEST = "open_clip_config.json", "vlp_export.json"
# What no reader takes for the file of an export, and a part of the message.
NO_OBJECTS = {
    "": "is not JSON",
    "[]": "holds a list",
    "3": "holds a int",
    '{"a"': "is not JSON",
    '{"model_cfg": {}, "files": [], "model_cfg": {}, "files": []}': "stands twice in one object",
    "{}": "vlp_export.json does not list|has no section 'model_cfg'",
}
# A key by its path, the value in its place (None: the key is gone), and a part of the message.
WRONG = [
    (CONFIG, "model_cfg", 3, "its model_cfg is '3'"),
    (CONFIG, "model_cfg", {}, "its vision_cfg is 'None'"),
    (CONFIG, "model_cfg.text_cfg", [], "its text_cfg is"),
    (CONFIG, "model_cfg.text_cfg", None, "its text_cfg is 'None'"),
    (CONFIG, "preprocess_cfg", "x", "its preprocess_cfg is 'x'"),
    (CONFIG, "vlp", 3, "its vlp is '3'"),
]
# These only loading knows.
UNBUILDABLE = [
    (CONFIG, "model_cfg.embed_dim", "x", "open_clip cannot build"),
    (CONFIG, "model_cfg.embed_dim", None, "open_clip cannot build"),
    (CONFIG, "model_cfg.vision_cfg.layers", [], "open_clip cannot build"),
    (CONFIG, "model_cfg.vision_cfg.odd", 1, "open_clip cannot build"),
    (CONFIG, "preprocess_cfg.mean", 3, "preprocess_cfg.mean"),
    (CONFIG, "preprocess_cfg.mean", [0.5], "preprocess_cfg.mean"),
    (CONFIG, "preprocess_cfg.std", [1, 1, 0], "three positive numbers"),
    (CONFIG, "preprocess_cfg.interpolation", "nearest", "preprocess_cfg.interpolation"),
    (CONFIG, "preprocess_cfg.decoding", "x", "preprocess_cfg.decoding"),
    (CONFIG, "vlp.scale", [], "expected a mapping"),
    (CONFIG, "vlp.heads", "x", "expected a mapping"),
]
# And these only publishing.
UNPUBLISHABLE = [
    (MANIFEST, "name", None, "does not say the name"),
    (MANIFEST, "name", 3, "does not say the name"),
    (MANIFEST, "files", None, "does not list the files"),
    (MANIFEST, "files", [3], "does not list the files"),
    (MANIFEST, "files", {"a": 1}, "does not list the files"),
    ("tokenizer_config.json", "", None, "is not JSON"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "tiny"
    export(tiny(), folder)
    return folder


def publish(folder):
    push(folder, "someone/tiny", endpoint="http://127.0.0.1:9", attempts=1, say=lambda line: None)


def changed(text, path, value):
    """JSON with another value at a path of keys; nothing of it for no path."""
    if not path:
        return ""
    whole = json.loads(text)
    *sections, key = path.split(".")
    section = whole
    for name in sections:
        section = section[name]
    section.pop(key, None)
    if value is not None:
        section[key] = value
    return json.dumps(whole)


def test_what_is_no_export_is_refused_by_each_reader(written, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(written, folder)
    cases = []
    for name in (CONFIG, MANIFEST):
        readers = (publish, load) if name == CONFIG else (publish,)
        cases += [(name, text, part, readers) for text, part in NO_OBJECTS.items()]
    for rows, readers in ((WRONG, (publish, load)), (UNBUILDABLE, (load,))):
        for name, path, value, part in rows:
            cases.append((name, changed((written / name).read_text(), path, value), part, readers))
    for name, path, value, part in UNPUBLISHABLE:
        cases.append((name, changed((written / name).read_text(), path, value), part, (publish,)))

    n_refused, wrong = 0, []
    for name, text, part, readers in cases:
        (folder / name).write_text(text)
        for reader in readers:
            with pytest.raises(Exception) as caught:
                reader(folder)
            message = faults.message(caught.value) or f"a traceback: {caught.value!r}"
            is_named = any(each in message for each in part.split("|"))
            if not is_named or "traceback" in message:
                wrong.append(f"{name} {text[:60]!r}, {reader.__name__}: {message[:300]}")
            n_refused += 1
        shutil.copy(written / name, folder / name)
    assert not wrong, "\n".join(wrong)
    assert n_refused == 3 * 6 + 2 * 6 + 11 + 6


def test_files_cut_short_are_not_published(written, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(written, folder)
    weights = (written / "open_clip_model.safetensors").read_bytes()
    damaged = [
        ("open_clip_model.safetensors", b"", "no whole file of weights"),
        ("open_clip_model.safetensors", weights[:-9], "no whole file of weights"),
        ("model.safetensors", weights[:99], "no whole file of weights"),
        ("config.json", b"3", "expected an object"),
        *(("modules.json", data, "does not list modules") for data in (b"{}", b"[]", b'["0"]')),
        ("modules.json", b'[{"path": "", "type": 3}]', "does not list modules"),
    ]
    n_refused = 0
    for name, data, part in damaged:
        (folder / name).write_bytes(data)
        with pytest.raises(Exception, match=part):
            publish(folder)
        shutil.copy(written / name, folder / name)
        n_refused += 1
    assert n_refused == 8


def test_a_mark_in_front_of_the_json_is_read_over(written, tmp_path):
    """As editors of Windows write it."""
    folder = tmp_path / "tiny"
    shutil.copytree(written, folder)
    for name in (CONFIG, MANIFEST):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    plain, marked = load(written), load(folder)
    assert torch.equal(plain.logit_scale, marked.logit_scale)
    with pytest.raises(Exception, match="failed"):  # at the upload alone
        publish(folder)


def test_an_export_of_what_is_no_folder_names_those_near_it(written, tmp_path):
    with pytest.raises(Exception, match=r"near it: .*tiny"):
        publish(written.with_name("tinny"))
    with pytest.raises(ValueError, match=r"near it: .*tiny"):
        export_run(written.with_name("tinny"), tmp_path / "out")
