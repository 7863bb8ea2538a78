import pytest

from qpeft.errors import OptionError
from qpeft.evaluation.cost import Cost


def test_rates():
    cost = Cost(seconds=4.0, queries=2, pairs=200, tokens=30_000)
    assert (cost.queries_per_second, cost.passages_per_second, cost.tokens_per_second) == (0.5, 50.0, 7500.0)


@pytest.mark.parametrize("values", [(0.0, 1, 1, 1), (-1.0, 1, 1, 1), (float("nan"), 1, 1, 1), (1.0, 1, -1, 1)])
def test_impossible_costs_are_refused(values):
    with pytest.raises(OptionError, match="must be positive"):
        Cost(*values)


def test_as_dict_holds_work_and_rates():
    facts = Cost(seconds=2.0, queries=4, pairs=100, tokens=9000).as_dict()
    assert facts["queries_per_second"] == 2.0
    assert (facts["passages_per_second"], facts["tokens_per_second"]) == (50.0, 4500.0)
    assert (facts["seconds"], facts["queries"], facts["pairs"], facts["tokens"]) == (2.0, 4, 100, 9000)
