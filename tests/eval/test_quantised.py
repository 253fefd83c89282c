"""Embeddings of a byte or a bit a number: what is stored, the recalls by loops, and the task."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.eval import material
from vlp import plugin, watch
from vlp.eval import evaluation, metrics, quantised
from vlp.eval.embed import Context
from vlp.eval.quantised import KINDS
from vlp.eval.tasks import retrieval

KS = (1, 3)


def rows_of(n, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=generator), dim=-1)


# --- what is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 8, 13, 64])
def test_a_byte_a_number_is_the_nearest_level(width):
    rows = rows_of(30, width)
    code = quantised.fitted("int8", rows.split(7))
    stored = code.encode(rows)
    assert stored.dtype == torch.uint8 and stored.shape == (30, width)
    assert (stored.amin(0) == 0).all() and (stored.amax(0) == 255).all()

    span = (rows.amax(0) - rows.amin(0)) / 255
    restored = rows.amin(0) + stored.float() * span
    assert ((restored - rows).abs() <= span / 2 + 1e-6).all()
    queries = rows_of(4, width, seed=1)
    torch.testing.assert_close(code.scores(queries, stored), queries @ restored.T)


@pytest.mark.parametrize("width", [1, 8, 13, 64])
def test_a_bit_a_number_is_numpys(width):
    """Also where D is no multiple of 8."""
    rows, queries = rows_of(30, width), rows_of(4, width, seed=1)
    code = quantised.fitted("binary", [rows])
    stored = code.encode(rows)
    assert np.array_equal(stored.numpy(), np.packbits(rows.numpy() > 0, axis=1))
    assert stored.shape[1] == quantised.bytes_a_row("binary", width) == -(-width // 8)
    assert torch.equal(code.scores(queries, stored), _signs(queries) @ _signs(rows).T)


def _signs(rows):
    return torch.where(rows > 0, 1.0, -1.0)


def test_faiss_stores_and_finds_the_same():
    import faiss

    rows, queries = rows_of(200, 16), rows_of(5, 16, seed=1)

    code = quantised.fitted("int8", [rows])
    index = faiss.IndexScalarQuantizer(
        16, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.train(rows.numpy())
    index.add(rows.numpy())
    # Theirs rounds down and restores the middle of a level: a step apart in a number at most.
    theirs, numbers = index.search(queries.numpy(), 10)
    ours = code.scores(queries, code.encode(rows)).gather(1, torch.from_numpy(numbers))
    assert (ours - torch.from_numpy(theirs)).abs().max() <= 16 * code.step.max()

    bits = quantised.fitted("binary", [rows])
    binary = faiss.IndexBinaryFlat(16)
    binary.add(bits.encode(rows).numpy())
    distances, _ = binary.search(bits.encode(queries).numpy(), 10)
    scores = bits.scores(queries, bits.encode(rows)).topk(10).values
    assert torch.equal(scores, 16 - 2 * torch.from_numpy(distances).float())


def test_rows_that_agree_in_a_number_are_no_division_by_zero():
    rows = torch.tensor([[0.6, 0.8], [0.6, -0.8]])
    code = quantised.fitted("int8", [rows, rows[:0]])
    assert code.encode(rows).tolist() == [[0, 255], [0, 0]]
    torch.testing.assert_close(code.scores(rows, code.encode(rows)), rows @ rows.T)


# --- recalls --------------------------------------------------------------------------------------


def loop(queries, rows, of_queries, of_rows, kind, ks, rescore):
    """`hits` from its definition, a query at a time."""
    code = quantised.fitted(kind, [rows])
    coarse = code.scores(queries, code.encode(rows)).tolist()
    fine = (queries.double() @ rows.double().T).tolist()
    found = []
    for i in range(len(queries)):
        right = [j for j in range(len(rows)) if of_rows[j] == of_queries[i]]
        wrong = [j for j in range(len(rows)) if j not in right]
        answers = []
        for k in ks:
            # Wrong ones first among equals.
            order = sorted(range(len(rows)), key=lambda j: (-coarse[i][j], j in right))
            last = order[: k * rescore][-1]
            listed = set(order[: k * rescore])
            if last not in right:
                listed |= {j for j in wrong if coarse[i][j] == coarse[i][last]}
            best = max((fine[i][j] for j in right if j in listed), default=None)
            rivals = [j for j in wrong if j in listed and best is not None and fine[i][j] >= best]
            answers.append(best is not None and len(rivals) < k)
        found.append(answers)
    return torch.tensor(found)


@pytest.mark.parametrize("kind", KINDS)
def test_recalls_are_those_of_a_loop(kind, monkeypatch):
    monkeypatch.setattr(quantised, "_TILE", 100)  # several tiles
    text = F.normalize(rows_of(24, 10).repeat_interleave(2, 0) + 1.5 * rows_of(48, 10, 1), dim=1)
    image, owner = rows_of(24, 10), torch.arange(24).repeat_interleave(2)
    n_cases, shares = 0, set()
    for queries, rows, of_queries, of_rows in (
        (text, image, owner, torch.arange(24)),
        (image, text, torch.arange(24), owner),
    ):
        for rescore in (1, 2, 50):
            arguments = (queries, rows, of_queries, of_rows, kind, KS, rescore)
            answers = quantised.hits(*arguments)
            assert torch.equal(answers, loop(*arguments)), rescore
            shares.add(float(answers.double().mean()))
            n_cases += 1
    assert n_cases == 6 and len(shares) > 2 and max(shares) < 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_everything_rescored_is_the_float_s_search(kind):
    image, text = rows_of(40, 12), F.normalize(rows_of(40, 12) + 0.5 * rows_of(40, 12, 1), dim=1)
    places = torch.arange(40)
    _, ranks = metrics.retrieval_ranks(image, text, places)
    answers = quantised.hits(text, image, places, places, kind, KS, rescore=40)
    assert torch.equal(answers, ranks.unsqueeze(1) <= torch.tensor(KS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_data_does_not_matter_and_equal_rows_find_nothing(kind):
    rows = rows_of(9, 6)[torch.arange(18) % 9]  # each twice: ties everywhere
    places = torch.arange(18)
    answers = quantised.hits(rows, rows, places, places, kind, (1, 2), rescore=2)
    assert not answers[:, 0].any()
    shuffled = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    moved = quantised.hits(rows, rows[shuffled], places, places[shuffled], kind, (1, 2), rescore=2)
    assert torch.equal(answers, moved)

    same = rows_of(1, 6).expand(7, -1)
    assert not quantised.hits(same, same, places[:7], places[:7], kind, (1, 3), rescore=2).any()


# --- the task -------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    samples = [(material.png(material.picture(i)), [f"picture {i}", f"{i}"]) for i in range(12)]
    return material.clip_benchmark_set(tmp_path / "set", samples, kind="retrieval")


def evaluate(encoder, **options):
    tasks = plugin.keyed("vlp.eval.tasks", {"retrieval": options})
    (record,), items = evaluation.evaluate(encoder, tasks, Context(batch=5, workers=0))
    assert set(record["metrics"]) == set(watch.scores(tasks[0]))
    return record, items


def test_the_task_has_them_beside_the_float_s(shards):
    plain, _ = evaluate(material.matrix_encoder(), data=str(shards))
    record, items = evaluate(
        material.matrix_encoder(), data=str(shards), stored_as=["int8", "binary"], rescore=2
    )
    of_float = {name: record["metrics"][name] for name in plain["metrics"]}
    assert of_float == plain["metrics"]

    n_compared = 0
    for kind in KINDS:
        for name in (name for name in plain["metrics"] if "recall" in name):
            stored = f"{name}_{kind}"
            assert record["chance"][stored] == plain["chance"][name]
            low, high = record["intervals_95"][stored]
            assert low <= record["metrics"][stored] <= high
            assert items[f"retrieval/{stored}"].shape == items[f"retrieval/{name}"].shape
            n_compared += 1
    assert n_compared == 16
    width, n_rows = 24, 36
    counts = record["counts"]
    assert (counts["bytes_as_float32"], counts["bytes_as_int8"], counts["bytes_as_binary"]) == (
        4 * width * n_rows, width * n_rows, width * n_rows // 8,
    )  # fmt: skip


def test_a_perfect_encoder_stays_perfect_and_a_constant_one_finds_nothing(shards):
    perfect = material.known_encoder(
        lambda n: material.direction(n), lambda t: material.direction(int(t.split()[-1]))
    )
    for encoder, value in ((perfect, 1), (material.constant(), 0)):
        record, _ = evaluate(encoder, data=str(shards), stored_as=["binary", "int8"])
        stored = {name: v for name, v in record["metrics"].items() if name.endswith(KINDS)}
        assert len(stored) == 16
        assert set(stored.values()) == {value}, stored


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stored_as": ["int4"]}, "int4"),
        ({"stored_as": ["int8", "int8"]}, "name each kind once"),
        ({"rescore": 0}, "rescore is 0; expected at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plugin.keyed("vlp.eval.tasks", {"retrieval": {"data": "absent", **options}})
    assert retrieval.Options(data="absent").stored_as == []
