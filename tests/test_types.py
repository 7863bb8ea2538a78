import dataclasses
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpeft.errors import OptionError, ScoreError
from qpeft.pointwise import Pointwise
from qpeft.types import (
    UNREADABLE,
    Candidates,
    Passage,
    Query,
    QueryBatches,
    Ranking,
    Reranker,
    Run,
    ScoringCounts,
    whole,
)

ids = st.text(st.characters(exclude_categories=("Cs",)), max_size=5)
scored = st.dictionaries(ids, st.floats(-1e30, 1e30) | st.sampled_from([0.0, -0.0, 1.0, 1.0 + 1e-12]), max_size=8).map(
    lambda scores: list(scores.items())
)


@given(scored, st.randoms())
def test_the_order_of_arrival_does_not_matter(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    assert Ranking.from_scores("q", shuffled) == Ranking.from_scores("q", pairs)


@given(scored)
def test_every_passage_once_with_its_score_as_float32(pairs):
    hits = Ranking.from_scores("q", pairs).hits
    assert sorted(hit.passage_id for hit in hits) == sorted(passage_id for passage_id, _ in pairs)
    given_scores = dict(pairs)
    assert all(hit.score == float(np.float32(given_scores[hit.passage_id])) for hit in hits)


@given(scored)
def test_trec_eval_order(pairs):
    hits = Ranking.from_scores("q", pairs).hits
    for above, below in itertools.pairwise(hits):
        assert above.score >= below.score
        if above.score == below.score:
            assert above.passage_id.encode() > below.passage_id.encode()


@given(scored)
def test_sorting_again_changes_nothing(pairs):
    ranking = Ranking.from_scores("q", pairs)
    again = Ranking.from_scores("q", [(hit.passage_id, hit.score) for hit in ranking.hits])
    assert again == ranking


def test_ids_are_compared_as_bytes():
    # In UTF-16, and so in some languages' string order, the emoji would come before U+FFFD.
    hits = Ranking.from_scores("q", [("\ufffd", 1.0), ("😀", 1.0), ("a", 1.0), ("Z", 1.0)]).hits
    assert [hit.passage_id for hit in hits] == ["😀", "\ufffd", "a", "Z"]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_scores_that_cannot_be_ranked(score):
    with pytest.raises(ScoreError, match="'q', passage 'b'"):
        Ranking.from_scores("q", [("a", 1.0), ("b", score)])


def test_a_passage_may_not_occur_twice():
    with pytest.raises(ScoreError, match="'a' occurs twice"):
        Ranking.from_scores("q", [("a", 1.0), ("b", 2.0), ("a", 3.0)])


def test_by_position_keeps_equal_scores_in_the_order_given():
    ranking = Ranking.from_scores("q", [("10", 1.0), ("2", 1.0), ("3", 2.0), ("1", 1.0)])
    assert [hit.passage_id for hit in ranking.by_position()] == ["3", "1", "2", "10"]
    told = dataclasses.replace(ranking, unreadable=frozenset(["10"])).by_position()
    assert [hit.score for hit in told] == [2.0, 1.0, 1.0, UNREADABLE]


def test_constant_scores_are_seen():
    assert not Ranking.from_scores("q", [("alone", 1.0)]).constant
    assert not Ranking.from_scores("q", []).constant
    assert not Ranking.from_scores("q", [("a", 1.0), ("b", 1.1), ("c", 1.0)]).constant
    # Different as float64, equal as float32.
    assert Ranking.from_scores("q", [("a", 1.0), ("b", 1.0 + 1e-9)]).constant


def test_passages_below_keep_their_order_even_as_float32():
    ranking = Ranking.from_scores("q", [("a", -1e7), ("b", -2e7)])
    longer = ranking.followed_by(["z", "c", "y"])
    assert longer.hits[:2] == ranking.hits
    again = Ranking.from_scores("q", [(hit.passage_id, hit.score) for hit in longer.hits])
    assert [hit.passage_id for hit in again.hits] == ["a", "b", "z", "c", "y"]


def test_a_run_ranks_each_query_once():
    rankings = [Ranking("q2", ()), Ranking("q1", ())]
    run = Run(rankings, "t")
    assert list(run) == ["q2", "q1"]
    assert run["q1"] is rankings[1]
    with pytest.raises(ScoreError, match="'q2' is ranked twice"):
        Run([*rankings, Ranking("q2", ())], "t")


def test_candidates_need_all_scores_or_none():
    passages = (Passage("a", "x"), Passage("b", "y"))
    assert Candidates(Query("q", "?"), passages).scores == ()
    with pytest.raises(ScoreError, match="2 passages but 1"):
        Candidates(Query("q", "?"), passages, (1.0,))


def test_candidates_of_any_iterable():
    made = Candidates(Query("q", "?"), (Passage(name, "x") for name in "ab"), np.array([2.0, 1.0]))
    assert [passage.id for passage in made.passages] == ["a", "b"]
    assert made.scores == (2.0, 1.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Passage(7, "x"), "passage 7: its id is no text, but int"),
        (lambda: Passage("a", "x", None), "passage 'a': its title is None, not a text"),
        (lambda: Query("q", 1.5), "query 'q': its text is 1.5, not a text"),
        (lambda: Query("q", "?", "answer"), "query 'q': answers are one text, 'answer', not several"),
        (lambda: Candidates(Query("q", "?"), ["x"]), "query 'q': a candidate is 'x', not a Passage"),
        (lambda: Candidates(Query("q", "?"), [Passage("a", "x")] * 2), "query 'q': passage 'a' occurs twice"),
    ],
)
def test_what_cannot_be_ranked_is_named_before_it_is(make, words):
    with pytest.raises((OptionError, ScoreError)) as error:
        make()
    assert str(error.value) == words


@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.builds(QueryBatches, st.none() | st.integers(1, 4), st.integers(1, 20)),
    st.integers(0, 12),
)
def test_batches_are_told_from_any_number_of_finished_queries(sizes, batches, finished):
    items = [Candidates(Query(str(i), "x"), tuple(Passage(str(p), "y") for p in range(n))) for i, n in enumerate(sizes)]
    parts = list(batches.split(items))
    assert [item for part in parts for item in part] == items
    for part in parts[:-1]:
        pairs = [len(item.passages) for item in part]
        if batches.queries is not None:
            assert len(part) == batches.queries
        else:
            assert sum(pairs) >= batches.pairs > sum(pairs[:-1])
    borders = {0, *itertools.accumulate(map(len, parts))}
    assert batches.whole(sizes[:finished]) == max(
        border
        for border in borders
        if border <= finished and (border < len(items) or batches.whole(sizes) == len(items))
    )


@dataclass
class Longest(Reranker):
    """Scores a passage by how much longer it is than the query."""

    def check(self, query):
        pass

    def rerank(self, items):
        for item in items:
            scores = ((p.id, len(p.text) - len(item.query.text)) for p in item.passages)
            yield Ranking.from_scores(item.query.id, scores)


def test_rerankers_are_themselves():
    one, other = (Pointwise(SimpleNamespace(counts=ScoringCounts(), facts={})) for _ in range(2))
    assert one != other
    assert len({one, other, one}) == 2


@pytest.mark.parametrize("pair", [("why sky", "blue"), ["why sky", "blue"], ("ab", "cd")])
def test_a_single_pair_gets_a_single_score(pair):
    assert Longest().predict(pair) == Longest().predict([pair])[0] == len(pair[1]) - len(pair[0])


def test_pairs_get_a_score_each():
    pairs = [("a", "bbb"), ("a", "b"), ("aa", "b")]
    assert (
        Longest().predict(pairs) == Longest().predict(iter(pairs)) == Longest().predict(map(list, pairs)) == [2, 0, -1]
    )
    assert Longest().predict(np.array(pairs)) == [2, 0, -1]
    assert len(Longest().rank("a", ["b", "bb", "bbb"], top_k=np.int64(2))) == 2
    assert Longest().predict([]) == Longest().predict(()) == []


@pytest.mark.parametrize("pairs", ["ab", ("a", "b", "c"), ["ab"], [("a", "b"), "ab"], [("a", "b", "c")]])
def test_what_is_no_pair_is_refused(pairs):
    with pytest.raises(OptionError, match=r"is one text|, not a pair"):
        Longest().predict(pairs)


def test_a_text_in_the_place_of_passages_is_refused():
    with pytest.raises(OptionError, match="passages is one text, 'abc', not a list"):
        Longest().rank("sky", "abc")


class Table(list):
    """Stands for one of pandas or polars, whose items are the names of its columns."""

    columns = ("query", "passage")


@pytest.mark.parametrize("given", [Table(["query", "passage"]), {"query": "passage"}, {"a", "b"}])
def test_tables_and_what_has_no_order_are_refused(given):
    with pytest.raises(OptionError, match=f"pairs is a {type(given).__name__}, not a list"):
        Longest().predict(given)
    with pytest.raises(OptionError, match=f"passages is a {type(given).__name__}, not a list"):
        Longest().rank("a", given)


def test_half_characters_are_replaced():
    assert Query("q", "why \ud83d", ("\udc00",)) == Query("q", "why \ufffd", ("\ufffd",))
    assert Passage("p", "\ud83d\ude00", "a\udce9b") == Passage("p", "\U0001f600", "a\ufffdb")


@given(st.text(st.characters()))
def test_whole_text_can_be_written_and_stays_as_it_is(text):
    found = whole(text)
    assert whole(found) == found.encode().decode() == found
    assert found == text or any("\ud800" <= character <= "\udfff" for character in text)
