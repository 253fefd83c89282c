"""Compiled blocks: they compute what the plain ones do, and random parts repeat exactly."""

import copy

import pytest
import torch
from timm.layers import DropPath
from torch._dynamo.utils import counters

from tests import ranks
from tests.test_step import NEGATIVES, assert_close, gradients_and_weights, negatives_batch
from vlp.engines import compiling
from vlp.engines.copies import sharing


class Blocks(torch.nn.Module):
    """As much of a tower as draws random numbers: two equal blocks, so that compiling takes
    seconds.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Linear(8, 8)
        layers = [
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.3), DropPath(0.3))
            for _ in range(2)
        ]
        self.layers = torch.nn.Sequential(*layers)

    def blocks(self):
        return list(self.layers)

    def forward(self, rows):
        return self.layers(self.stem(rows))


def passed(model, rows, gradient):
    """The model's output with the random numbers of one seed."""
    torch.manual_seed(3)
    with torch.set_grad_enabled(gradient):
        return model(rows)


def gradients(model, output):
    output.square().sum().backward()
    return {n: p.grad.flatten().tolist() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.timeout(120)
def test_both_passes_draw_what_the_plain_blocks_draw():
    """Without and with gradient are two graphs, which blocks of one kind share."""
    plain = Blocks()
    compiled = copy.deepcopy(plain)
    compiling.compile_blocks(compiled)
    rows = torch.randn(6, 8)
    counters.clear()

    first = passed(compiled, rows, gradient=False)
    second = passed(compiled, rows, gradient=True)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert torch.equal(first, second)

    expected = passed(plain, rows, gradient=True)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-6)
    n_compared = assert_close(gradients(compiled, second), gradients(plain, expected), 1e-5, 1e-7)
    assert n_compared == 6

    # For evaluation: the same weights, nothing compiled.
    copied = sharing(compiled)
    assert copied.layers[0][0].weight is compiled.layers[0][0].weight
    assert torch.equal(passed(copied, rows, gradient=False), expected)
    assert counters["stats"]["unique_graphs"] == 2


def test_auto_compiles_on_gpus_where_it_works(monkeypatch, capsys):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [compiling.decide(wish, cpu) for wish in (True, False, "auto")] == [True, False, False]

    monkeypatch.setattr(compiling, "obstacle", lambda device: "")
    assert compiling.decide("auto", gpu)
    monkeypatch.setattr(compiling, "obstacle", lambda device: "TritonMissing: no triton")
    assert not compiling.decide("auto", gpu)
    message = capsys.readouterr().err
    assert "TritonMissing: no triton" in message and "train.compile: false" in message


def test_what_the_compiler_lacks_is_said(monkeypatch):
    def without_compiler(function):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    compiling.obstacle.cache_clear()
    monkeypatch.setattr(torch, "compile", without_compiler)
    reason = compiling.obstacle(torch.device("cpu"))
    compiling.obstacle.cache_clear()
    assert reason == "RuntimeError: Failed to find C compiler."


def steps(engine, checkpointing, compile):
    """Two steps with patch drop, and numbers of captions that change between micro-batches."""
    return gradients_and_weights(
        3,
        batch=negatives_batch,
        objective=NEGATIVES,
        engine=engine,
        patch_dropout=0.5,
        checkpointing=checkpointing,
        train={"compile": compile},
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "checkpointing"), [("ddp", False), ("ddp", True), ("fsdp2", False)]
)
def test_compiled_engines_equal_plain_ones(engine, checkpointing):
    plain = ranks.run(2, steps, engine, checkpointing, False)
    compiled = ranks.run(2, steps, engine, checkpointing, True, timeout_s=800)
    for (gradients_now, weights, loss), expected in zip(compiled, plain):
        assert assert_close(gradients_now, expected[0], 1e-9) > 20
        assert_close(weights, expected[1], 1e-9)
        assert loss == pytest.approx(expected[2], rel=1e-9)
