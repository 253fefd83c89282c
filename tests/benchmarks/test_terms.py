"""The benchmark of objectives measures every one whose rows meet, on the inputs that it reads."""

import pytest
import torch

from tests.benchmarks import terms
from vlp import plugin


def test_every_objective_is_measured_or_stands_alone():
    measured = {term.partition(".")[0] for term in terms.TERMS}
    names = set(plugin.names("vlp.losses"))
    assert measured | set(terms.ALONE) == names
    assert measured.isdisjoint(terms.ALONE)
    assert len(names) >= 45


@pytest.mark.parametrize("term", terms.TERMS)
def test_inputs_are_those_that_the_term_reads(term):
    terms.run_on(term, 16, 16, torch.device("cpu"))()


def test_a_ratio_needs_both_numbers():
    assert terms.ratio(6.0, 2.0) == 3
    assert terms.ratio(None, 2.0) is None
    assert terms.ratio(6.0, None) is None
