"""The texts of a step travel while the pictures pass their tower, and no bit of a run changes."""

import pytest
import torch
import torch.distributed as torch_dist

from tests import ranks
from tests.losses.family_data import data, gradients_of
from tests.losses.family_data import own_rows as of_rank
from tests.losses.test_family import FAMILY
from tests.test_step import ROWS, make_batch, make_training, own_rows
from vlp import dist, engines, losses
from vlp.passes import embed
from vlp.step import train_step

BOTH = {"infonce": {}, "siglip": {"weight": 0.3}}
SMOOTHED = {"infonce": {"label_smoothing": 0.1}, "cyclip": {}, "hn_nce": {}}
DROPOUT = {"towers": {"text": {"dropout": 0.3}}}
DIM = 16  # of the embeddings
# objective, topology, micro-batches, options of the training
CASES = {
    "plain": ({"infonce": {}}, "global", 1, {}),
    "three terms": (SMOOTHED, "global", 1, {}),
    "micro-batches": (BOTH, "global", 3, {}),
    "sharded": (BOTH, "global", 1, {"engine": "fsdp2"}),  # as weights travel, texts go apart
    "patch dropout": (BOTH, "global", 1, {"patch_dropout": 0.5}),
    "text dropout": (BOTH, "global", 1, DROPOUT),
    "two dropouts": (BOTH, "global", 1, {"patch_dropout": 0.5} | DROPOUT),
    "ring": ({"infonce": {}}, "ring", 1, {}),
    "nobody gathers": ({"alignment": {}}, "global", 1, {}),
}
EARLY = ["texts", "gather", "images", "wait"]
LATE = ["images", "texts", "gather", "wait"]
NEVER = ["images", "texts"]
# of the second step, as far as the objective
EXPECTED = {
    "plain": EARLY,
    "three terms": None,  # gathers other rows as well
    "micro-batches": 2 * ["images", "texts"] + EARLY,
    "sharded": ["texts", "gather apart", "images", "wait"],
    "patch dropout": EARLY,
    "text dropout": EARLY,
    # One stream of random numbers: texts that pass first would get those of the pictures.
    "two dropouts": LATE,
    "ring": NEVER,
    "nobody gathers": NEVER,
}


class Heard:
    """An exchange under way that says when it is waited for."""

    def __init__(self, work, events):
        self.work, self.events = work, events

    def wait(self):
        self.events.append("wait")
        return self.work.wait()


def training_of(case):
    _, _, micro_batches, options = CASES[case]
    training = make_training(micro_batches, double=False, **options)
    training.objective = objective_of(case, training.engine)
    return training


def objective_of(case, engine):
    objective, topology, _, _ = CASES[case]
    return losses.build(objective, topology=topology, texts_apart=engines.shards_model(engine))


def run(case, *, resumed):
    """On a rank: what happens in the first step and in the second, up to the objective's end; their
    losses and the weights after them. resumed: each step is the first of a run, which has not seen
    what its objective gathers.
    """
    training, events, by_step, values = training_of(case), [], [], []
    encoder = training.engine.module
    encoder.visual.register_forward_pre_hook(lambda *_: events.append("images"))
    encoder.text.register_forward_pre_hook(lambda *_: events.append("texts"))

    original = torch_dist.all_gather_into_tensor

    def listening(*arguments, **keywords):
        work = original(*arguments, **keywords)
        # Weights of shards are gathered as well, without a sound.
        if arguments[0].shape != (ROWS, DIM):
            return work
        of_world = keywords["group"] is torch_dist.group.WORLD
        events.append("gather" if of_world else "gather apart")
        return work if work is None else Heard(work, events)

    torch_dist.all_gather_into_tensor = listening
    try:
        for _ in range(2):
            if resumed:
                training.objective = objective_of(case, training.engine)
            events.clear()
            values.append(train_step(training, make_batch(own_rows()))["loss"].item())

            # Further micro-batches pass once more, for backward.
            n_again = 2 * (training.micro_batches - 1)
            by_step.append(events[: len(events) - n_again])
    finally:
        torch_dist.all_gather_into_tensor = original

    weights, _ = training.engine.state(everywhere=True)
    return by_step, values, weights


def all_cases():
    results = {}
    for case in CASES:
        events, values, weights = run(case, resumed=False)
        events_resumed, values_resumed, weights_resumed = run(case, resumed=True)
        differ = [name for name in weights if not weights[name].equal(weights_resumed[name])]
        results[case] = events, events_resumed, values == values_resumed and not differ
    return results


@pytest.fixture(scope="module")
def by_rank():
    return ranks.run(2, all_cases, timeout_s=300)


@pytest.mark.parametrize("case", [case for case, events in EXPECTED.items() if events])
def test_texts_travel_while_pictures_pass(by_rank, case):
    n_late = 0
    for of_cases in by_rank:
        (first, second), *_ = of_cases[case]
        assert second == EXPECTED[case]
        # What no step has shown yet is not begun early.
        n_late += "gather" in first and first.index("gather") > first.index("images")
    assert n_late == (0 if EXPECTED[case] == NEVER else len(by_rank))


def test_no_bit_changes(by_rank):
    """Two runs are held against one another that differ in when they gather."""
    n_early = 0
    for of_cases in by_rank:
        for events, events_resumed, are_equal in of_cases.values():
            assert are_equal
            assert events_resumed == [events[0], events[0]]
            n_early += events[1] != events[0]
    assert n_early == 2 * 6


def gather_for_nobody():
    rows = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    begun = dist.Gathering(rows, dist.world())
    objective = losses.build({"alignment": {}})
    objective.evaluate(image=rows, text=rows, scale=torch.ones(()), texts_begun=begun)
    return begun.works == []


def test_what_nobody_asks_for_is_waited_for_all_the_same():
    assert ranks.run(2, gather_for_nobody) == [True, True]


def evaluated(name, options, is_early):
    """A term's value and all its gradients on this rank, and whether it asked for the texts."""
    given = data()
    rows = of_rank(given)
    objective = losses.build({name: options})
    begun = dist.Gathering(rows["text"], objective.backend.group_of_texts(1)) if is_early else None
    total, _, _ = objective.evaluate(**rows, step=1, texts_begun=begun)
    return gradients_of(total, given), objective.gathers_texts_in(1) is not None


def differing_terms():
    differ, n_asked = [], 0
    for name, options, _ in FAMILY:
        late, was_asked = evaluated(name, options, is_early=False)
        early, _ = evaluated(name, options, is_early=True)
        n_asked += was_asked
        if early != late:
            differ.append((name, options))
    return differ, n_asked


@pytest.mark.parametrize("n_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_term_takes_texts_that_are_under_way(n_ranks):
    for differ, n_asked in ranks.run(n_ranks, differing_terms):
        assert differ == []
        assert n_asked == 47, "terms that read the texts as they are"


@pytest.mark.parametrize("texts_first", [False, True])
def test_backward_passes_the_texts_first(texts_first):
    """As it does where they pass last: ranks lay gradients out in the order of backward."""
    training, order, passed = make_training(), [], []
    encoder, part = training.engine.module, make_batch()
    embed(training, part, 0)  # shows that neither side draws random numbers
    # As a validation does, and at every step a choice of samples by the model.
    training.engine.model.eval()
    embed(training, part, 0)
    training.engine.model.train()

    encoder.visual.register_forward_pre_hook(lambda *_: passed.append("image"))
    encoder.text.register_forward_pre_hook(lambda *_: passed.append("text"))
    for side in (encoder.visual, encoder.text):
        for parameter in side.parameters():
            parameter.register_hook(lambda _, side=side: order.append(side is encoder.text))
    output = embed(training, part, 0, (lambda _: None) if texts_first else None)
    (output["image"] * output["text"]).sum().backward()

    assert passed == (["text", "image"] if texts_first else ["image", "text"])
    n_of_texts = sum(order)
    assert 10 < n_of_texts < len(order) - 10
    assert all(order[:n_of_texts])
