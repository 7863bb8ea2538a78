import subprocess
import sys
from pathlib import Path

import pytest

from qpeft.errors import OptionError
from qpeft.evaluation.cost import Cost, peak_memory


def test_rates():
    cost = Cost(seconds=4.0, queries=2, pairs=200, tokens=30_000)
    assert (cost.queries_per_second, cost.passages_per_second, cost.tokens_per_second) == (0.5, 50.0, 7500.0)


@pytest.mark.parametrize("values", [(0.0, 1, 1, 1), (-1.0, 1, 1, 1), (float("nan"), 1, 1, 1), (1.0, 1, -1, 1)])
def test_impossible_costs_are_refused(values):
    with pytest.raises(OptionError, match="must be positive"):
        Cost(*values)


def test_work_by_hand():
    cost = Cost(2.0, 4, 100, 9000, padding=1000, flops=8 * 10**14, cached=30, encoded=10)
    assert cost.padded_share == 0.1
    assert cost.cache_hit_rate == 0.75
    assert cost.teraflops_per_query == 200
    assert cost.queries_per_petaflop == 5
    assert cost.quality_per_petaflop(0.5) == 2.5
    assert cost.quality_per_petaflop(None) is None


def test_what_is_not_known_stays_unknown():
    for cost in (Cost(2.0, 4, 100, 9000), Cost(2.0, 0, 0, 0, padding=0, flops=0, cached=0, encoded=0)):
        assert (cost.padded_share, cost.cache_hit_rate, cost.queries_per_petaflop) == (None, None, None)
        assert cost.quality_per_petaflop(0.5) is None
    free = Cost(2.0, 4, 100, 0, padding=0, flops=0)
    assert (free.teraflops_per_query, free.queries_per_petaflop) == (0, None)


def test_as_dict_holds_work_and_rates_and_can_be_read_back():
    cost = Cost(2.0, 4, 100, 9000, padding=1000, flops=8 * 10**14, peak_memory=2**30)
    facts = cost.as_dict()
    assert (facts["seconds"], facts["queries"], facts["pairs"], facts["tokens"]) == (2.0, 4, 100, 9000)
    assert (facts["queries_per_second"], facts["passages_per_second"], facts["tokens_per_second"]) == (
        2.0,
        50.0,
        4500.0,
    )
    assert (facts["padded_share"], facts["cache_hit_rate"], facts["queries_per_petaflop"]) == (0.1, None, 5)
    assert Cost.from_dict(facts) == cost
    earlier = {name: facts[name] for name in ("seconds", "queries", "pairs", "tokens", "queries_per_second")}
    assert Cost.from_dict(earlier) == Cost(2.0, 4, 100, 9000)
    assert Cost.from_dict(Cost(0.0004, 1, 1, 1).as_dict()).seconds == 0.0004
    assert [Cost(seconds, 1, 1, 1).as_dict()["seconds"] for seconds in (1.23456e-5, 98765.4)] == [1.235e-5, 98770.0]
    with pytest.raises(OptionError, match="not a cost"):
        Cost.from_dict({"seconds": 2.0})


@pytest.mark.skipif(peak_memory() is None, reason="the system does not tell")
def test_peak_memory_is_in_bytes_and_does_not_fall():
    """In a process of its own, whose peak is its own."""
    code = (
        "from qpeft.evaluation.cost import peak_memory as p; a = p(); b = bytearray(b'1') * 2**28; del b; print(a, p())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 2**22 < before < 2**30
    assert 0.9 < (after - before) / 2**28 < 1.1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_a_peak_is_forgotten_and_counted_anew():
    code = (
        "from qpeft.evaluation.cost import forget_peak_memory, peak_memory as p; b = bytearray(b'1') * 2**28; del b\n"
        "a = p(); forget_peak_memory(); print(a, p())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 0.9 < (before - after) / 2**28 < 1.1
