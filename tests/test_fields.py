"""The table of what a batch carries, and several captions of a sample all the way through it: data,
batch, embeddings, gradients, resume, refusals.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests import ranks
from tests.data.material import TEXT, data_of, encoded, loader_of, picture
from tests.losses.captions_loops import decoupled_form
from tests.models.tiny import tiny
from tests.test_step import (
    LENGTH,
    ROWS,
    assert_close,
    gradients_and_weights,
    make_batch,
    make_training,
)
from vlp import losses, plugin
from vlp.checks import check_needs
from vlp.data.format import ShardWriter
from vlp.data.loader import DataError
from vlp.data.text import build as build_tokenizer
from vlp.fields import CARRIED, EMBEDDED, FIELDS, LABELS
from vlp.losses import Inputs
from vlp.schema import ConfigError
from vlp.step import embed, train_step
from vlp.types import Batch

ROOT = Path(__file__).resolve().parent.parent
READS = frozenset({"captions", "captions_valid"})
CARRIED_CAPTIONS = 3  # K' of the data below


def write(folder, most=4, n=8):
    """n samples; sample i has i mod `most` + 1 captions that tell i and their place."""
    with ShardWriter(folder, 5) as writer:
        for i in range(n):
            captions = [f"picture {i} line {k}" for k in range(i % most + 1)]
            writer.add(f"k{i}", encoded(picture(i)), "png", captions)
    return folder


def loader(folder, n=CARRIED_CAPTIONS, **options):
    captions = {"choose": "all", "n": n, **options.pop("captions", {})}
    data = data_of(folder, captions=captions)
    return loader_of(data, 8, **{"reads": READS, **options})


# The table


def test_the_table_holds_every_field_of_a_batch_and_of_the_inputs():
    of_batch = {field.name for field in dataclasses.fields(Batch)}
    of_inputs = {field.name for field in dataclasses.fields(Inputs)}
    assert of_batch == {*CARRIED, "key"}
    assert of_inputs == {*FIELDS, "step", "other_names", "translations"}
    assert EMBEDDED.keys() | LABELS.keys() == CARRIED.keys() and not EMBEDDED.keys() & LABELS.keys()
    assert len(EMBEDDED) == 9 and len(LABELS) == 15 and len(FIELDS) == 68


# Data → batch


def test_all_captions_are_carried_and_more_are_drawn_without_replacement(tmp_path):
    steps = loader(write(tmp_path))
    tokenize = build_tokenizer(TEXT)
    drawn, n_rows = set(), 0
    for _ in range(6):
        batch = next(steps)
        assert batch.captions.shape == (8, CARRIED_CAPTIONS, TEXT.context_length)
        for row, key in enumerate(batch.key):
            i = int(key[1:])
            n = i % 4 + 1
            valid = batch.captions_valid[row].tolist()
            assert valid == [k < n for k in range(CARRIED_CAPTIONS)]
            all_ids = tokenize([f"picture {i} line {k}" for k in range(n)])
            places = [
                int((all_ids == ids).all(1).nonzero()) for ids in batch.captions[row][: sum(valid)]
            ]
            assert places == sorted(set(places)), "in their order, none twice"
            if n <= CARRIED_CAPTIONS:
                assert places == list(range(n))
            else:
                drawn.add(tuple(places))
            n_rows += 1
    assert n_rows == 48 and len(drawn) > 1, "another choice at another visit"


def test_ranks_and_a_second_run_have_the_same_captions(tmp_path):
    folder = write(tmp_path)
    whole, again = loader(folder), loader(folder)
    parts = [loader(folder, rank=rank, world=2) for rank in range(2)]
    for _ in range(2):
        batch = next(whole)
        assert torch.equal(batch.captions, next(again).captions)
        halves = [next(part) for part in parts]
        assert torch.equal(batch.captions, torch.cat([half.captions for half in halves]))
        assert torch.equal(
            batch.captions_valid, torch.cat([half.captions_valid for half in halves])
        )


def test_the_text_is_one_of_the_captions_beside_it_whether_they_are_read_or_not(tmp_path):
    folder = write(tmp_path)
    with_captions, without = loader(folder), loader(folder, reads=frozenset({"score"}))
    for _ in range(2):
        batch, plain = next(with_captions), next(without)
        assert torch.equal(batch.text, plain.text) and torch.equal(batch.image, plain.image)
        assert plain.captions is None and plain.captions_valid is None
        for row in range(8):
            assert (batch.captions[row] == batch.text[row]).all(1)[batch.captions_valid[row]].any()


def test_the_width_is_the_largest_number_in_the_data(tmp_path):
    assert loader(write(tmp_path / "four"), n=9).widths["captions"] == 4
    assert loader(write(tmp_path / "two", most=2), n=9).widths["captions"] == 2
    assert "captions" not in loader(write(tmp_path / "one", most=1)).carries


def test_a_resumed_run_goes_on_with_the_same_captions_or_is_refused(tmp_path):
    folder = write(tmp_path)
    first = loader(folder)
    next(first)
    state, expected = first.state_dict(), next(first)
    second = loader(folder)
    second.load_state_dict(state)
    assert torch.equal(next(second).captions, expected.captions)
    with pytest.raises(DataError, match=r"captions was .*, is .*restore it, or start a new run"):
        loader(folder, n=2).load_state_dict(state)


# Batch → embeddings → gradients


def objective_of_captions():
    """As `objective:` of a configuration."""
    return plugin.keyed("vlp.losses", {"captions": {"form": "decoupled"}})


def captions_batch(rows=slice(None)):
    """`make_batch` with three captions a sample, 15 of the 36 valid, unevenly over ranks."""
    generator = torch.Generator().manual_seed(13)
    texts = torch.randint(1, 400, (ROWS, 3, LENGTH), generator=generator)
    texts[..., 9], texts[..., 10:] = 49407, 0
    n_valid = torch.tensor([3, 3, 3, 2, 0, 1, 0, 0, 1, 0, 2, 0])
    valid = torch.arange(3) < n_valid.unsqueeze(1)
    batch = make_batch(rows)
    return dataclasses.replace(batch, captions=texts[rows], captions_valid=valid[rows])


def with_captions(micro_batches=1):
    return gradients_and_weights(
        micro_batches, batch=captions_batch, objective=objective_of_captions()
    )


@pytest.fixture(scope="module")
def loop_gradients():
    """Of a loop over captions, each by itself through the text tower, in float64."""
    model = make_training(objective=objective_of_captions()).engine.module
    batch = captions_batch()
    captions = torch.zeros(ROWS, 3, model.embed_dim, dtype=torch.float64)
    for i, k in batch.captions_valid.nonzero().tolist():
        captions[i, k] = model.encode_text(batch.captions[i, k].unsqueeze(0))[0]

    embedded = {
        "image": torch.cat([model.encode_image(picture.unsqueeze(0)) for picture in batch.image]),
        "captions": captions,
        "captions_valid": batch.captions_valid,
        "scale": model.scaling()[0],
    }
    decoupled_form()(embedded).backward()
    read = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.norm() > 0 for gradient in read.values()) and len(read) > 20
    return {name: gradient.flatten().tolist() for name, gradient in read.items()}


def assert_gradients(found, expected):
    """The same; what the loop does not meet (the bias) has none."""
    rest = found.keys() - expected.keys()
    assert not any(any(found[name]) for name in rest) and len(rest) <= 1
    assert assert_close({name: found[name] for name in expected}, expected, 1e-10) > 20


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_are_those_of_a_loop_over_captions(loop_gradients, micro_batches):
    assert_gradients(with_captions(micro_batches)[0], loop_gradients)


def test_ranks_with_unequal_numbers_of_captions_change_nothing(loop_gradients):
    results = ranks.run(2, with_captions, 3)
    for gradients, _, _ in results:
        assert_gradients(gradients, loop_gradients)
    alone = with_captions()
    mean = [sum(values) / 2 for values in zip(*(loss for _, _, loss in results))]
    assert mean == pytest.approx(alone[2], rel=1e-12)


def test_captions_that_do_not_count_have_no_influence_and_no_gradient():
    objective = objective_of_captions()
    training = make_training(objective=objective)
    rows = []
    training.engine.module.text.register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    batch = captions_batch()
    before = train_step(training, batch)["loss"]
    assert rows == [ROWS + 15], "only captions that count pass the text tower"
    batch.captions[~batch.captions_valid] = 7
    assert train_step(make_training(objective=objective), batch)["loss"] == before

    embedded = embed(training, batch, 0)
    assert embedded["captions"].shape == (ROWS, 3, 16)
    assert not embedded["captions"][~batch.captions_valid].any()
    leaf = embedded["captions"].detach()
    leaf[~batch.captions_valid] = torch.nan
    total, _ = losses.build(objective)(
        image=embedded["image"].detach(),
        text=embedded["text"].detach(),
        scale=1.0,
        captions=leaf.requires_grad_(),
        captions_valid=batch.captions_valid,
    )
    (gradient,) = torch.autograd.grad(total, leaf)
    norms = gradient.norm(dim=-1)
    assert (norms[batch.captions_valid] > 0).all() and (norms[~batch.captions_valid] == 0).all()


# What is refused, and how it reads


def test_a_bound_that_carries_no_second_caption_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="n is 1; expected at least 2 captions of a sample"):
        loader(tmp_path, n=1)
    with pytest.raises(ConfigError, match=r"captions\.carried: 'carried' is called 'n' now"):
        loader(tmp_path, captions={"carried": 4})


def test_data_with_one_caption_a_sample_are_refused_by_name(tmp_path):
    one = loader(write(tmp_path, most=1))
    objective = losses.build(objective_of_captions())
    with pytest.raises(ValueError) as refused:
        check_needs(objective, one.carries, tiny())
    for name in ("captions", "captions_valid"):
        assert (
            f"the term 'captions' needs {name!r}, which this run does not have; it comes "
            "from samples with several captions (data.captions: {choose: all, n: K})"
        ) in str(refused.value)


def test_a_call_with_another_number_of_masks_is_refused():
    rows = F.normalize(torch.randn(4, 3, 5), dim=-1)
    objective = losses.build(objective_of_captions())
    call = {"image": rows[:, 0], "text": rows[:, 1], "scale": 1.0, "captions": rows}
    with pytest.raises(ValueError, match=r"captions_valid: found .*and K' is 3 in captions"):
        objective(**call, captions_valid=torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs 'captions_valid', which the call does not carry"):
        objective(**call)
    # K counts negatives and K' captions: they need not be alike.
    mask = {"captions_valid": torch.ones(4, 3, dtype=torch.bool)}
    negatives = {"negatives": rows[:, :2], "negatives_valid": torch.ones(4, 2, dtype=torch.bool)}
    both = losses.build({"hard_negatives": {"form": "own"}})
    both.plugins += objective_of_captions()
    both.required |= {"captions": READS}
    both.reads |= READS
    assert both(**call, **mask, **negatives)[0].isfinite()


# How a field is added, by the documentation alone


def apply(block, folder):
    """Put a block of the documentation where its first line says: into a class of the table, at
    the end of a file, or into a new one.
    """
    where, _, code = block.partition("\n")
    name, _, place = where.removeprefix("# ").partition(", ")
    path = folder / name
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    assert ("new file" in place) == (not before), where
    if "class Carried" in place:
        end = before.index("\n\n@dataclass(frozen=True)\nclass Readable")
        path.write_text(f"{before[:end]}\n{code}{before[end:]}", encoding="utf-8")
    else:
        path.write_text(f"{before}\n\n{code}", encoding="utf-8")


@pytest.mark.slow
def test_the_documented_label_and_text_field_work(tmp_path):
    text = (ROOT / "docs" / "extend-field.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 5
    rooms_above = shutil.ignore_patterns("__pycache__", "eval", "data_tools", "launch", "configs")
    shutil.copytree(ROOT / "vlp", tmp_path / "vlp", ignore=rooms_above)
    for block in blocks:
        apply(block, tmp_path)

    with ShardWriter(tmp_path / "data", 4) as writer:
        for i in range(6):
            title = {} if i % 2 else {"title": f"page {i}"}
            meta = {"difficulty": i / 4, **title}
            writer.add(str(i), encoded(picture(i)), "png", [f"text {i}"], meta)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("added_fields.py"), tmp_path / "data"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=120,
    )
    assert done.stdout.strip() == "label and text field: ok", done.stderr
