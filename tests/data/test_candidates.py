import itertools

import pytest
from cats import PASSAGES, QUERIES

from qpeft.data.candidates import candidates_from_run, check_run
from qpeft.data.store import PassageStore
from qpeft.errors import OptionError, UnknownIdError
from qpeft.types import Candidates, Hit, Ranking, Run

QUERY = {query.id: query for query in QUERIES}
PASSAGE = {passage.id: passage for passage in PASSAGES}


def run(*rankings):
    return Run([Ranking(query_id, tuple(Hit(*hit) for hit in hits)) for query_id, *hits in rankings], "bm25")


def test_first_stage_order_and_scores(beir):
    first_stage = run(("q1", ("p2", 3.0), ("p1", 1.0)), ("q2",))
    assert list(candidates_from_run(first_stage, QUERY, beir.passages)) == [
        Candidates(QUERY["q1"], (PASSAGE["p2"], PASSAGE["p1"]), (3.0, 1.0)),
        Candidates(QUERY["q2"], ()),
    ]


def test_what_is_below_the_depth_is_not_even_looked_up():
    first_stage = run(("q1", ("p2", 3.0), ("p1", 1.0), ("gone", 0.5)))
    (item,) = candidates_from_run(first_stage, QUERY, PASSAGE, depth=2)
    assert [passage.id for passage in item.passages] == ["p2", "p1"]
    check_run(first_stage, QUERY, PASSAGE, depth=2)
    with pytest.raises(UnknownIdError):
        check_run(first_stage, QUERY, PASSAGE)


def test_lazy():
    first_stage = run(("q1", ("p1", 1.0)), ("q2", ("gone", 1.0)))
    (first,) = itertools.islice(candidates_from_run(first_stage, QUERY, PASSAGE), 1)
    assert first.query.id == "q1"


def test_unknown_ids_are_named_with_run_and_nearest():
    with pytest.raises(UnknownIdError, match="run 'bm25': query 'q11' is unknown; did you mean 'q1'"):
        check_run(run(("q11",)), QUERY, PASSAGE)
    with pytest.raises(UnknownIdError, match="run 'bm25', query 'q1': passage 'x' is not in the collection; known: p1"):
        check_run(run(("q1", ("x", 1.0))), QUERY, PASSAGE)


def test_large_sets_are_not_listed():
    many = {str(i): PASSAGES[0] for i in range(1000)}
    with pytest.raises(UnknownIdError, match=r"'x' is not in the collection$"):
        check_run(run(("q1", ("x", 1.0))), QUERY, many)


@pytest.mark.parametrize("depth", [0, -1])
def test_depth_is_at_least_one(depth):
    with pytest.raises(OptionError, match=f"depth is {depth}"):
        candidates_from_run(run(), QUERY, PASSAGE, depth)


def test_from_a_store(beir):
    (item,) = candidates_from_run(run(("q1", ("p3", 1.0))), QUERY, PassageStore(beir.folder / "corpus.jsonl"))
    assert item.passages == (PASSAGE["p3"],)
