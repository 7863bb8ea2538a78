import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpeft.data.beir import BeirCollection, write_beir
from qpeft.errors import FormatError, InputError, OptionError, QueryError, UnknownIdError
from qpeft.evaluation.answers import has_answer
from qpeft.training.groups import (
    MiningCounts,
    draw,
    groups_from_collection,
    groups_from_jsonl,
    in_batch_negatives,
    next_queries,
    of_other_queries,
    unscored,
)
from qpeft.types import Group, Passage, Query, Ranking, Run

SHARED = Path(__file__).parents[3] / "shared" / "data"

PASSAGES = [
    Passage("sun", "The blue sky scatters the light of the sun."),
    Passage("sun2", "The blue  sky scatters the light\nof the sun."),
    Passage("sky", "A blue sky promises a fine day.", "Sky"),
    Passage("rayleigh", "The sky is blue by Rayleigh scattering."),
    Passage("paint", "Blue paint for a sky on canvas."),
    Passage("song", "Blue sky, said the song."),
    Passage("blank", " ", " "),
    *(Passage(f"other{i}", f"blue sky number {i}") for i in range(30)),
]
QUERIES = [
    Query("why", "why is the sky blue", ("Rayleigh",)),
    Query("where", "where is a blue sky painted"),
    Query("gone", "blue sky"),
    Query("none", "blue sky"),
    Query("alone", "zebra"),
]
QRELS = {
    "train": {
        "why": {"sky": 1, "sun": 2, "blank": 3, "missing": 3, "song": 0},
        "where": {"paint": 1},
        "gone": {"missing": 1},
        "none": {"sky": 0},
        "alone": {"paint": 1},
    },
    "dev": {"gone": {"missing": 1}},
}


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def collection(folder, passages=PASSAGES, queries=QUERIES, qrels=QRELS):
    write_beir(folder, passages, queries, qrels)
    return BeirCollection(folder, "sky")


def mine(source, **options):
    options = {"negatives": 3, "seed": 1, "depth": 100} | options
    groups, counts = groups_from_collection(source, "train", **options)
    return {group.query.id: group for group in groups}, counts


def ids(passages):
    return [passage.id for passage in passages]


def test_what_is_mined(tmp_path):
    groups, counts = mine(collection(tmp_path / "c"), pool=100)
    assert groups.keys() == {"why", "where", "alone"}
    assert ids(groups["why"].positives) == ["sun", "sky"]
    others = {f"other{i}" for i in range(30)}
    assert set(ids(groups["why"].negatives)) == others | {"paint", "song"}
    assert set(ids(groups["where"].negatives)) == others | {"sun", "sun2", "sky", "rayleigh", "song"}
    assert groups["alone"].negatives == ()
    assert counts == MiningCounts(
        queries=3,
        without_positive=2,
        without_negative=1,
        dropped_as_answer=1,
        dropped_as_positive=1,
        dropped_as_empty=1,
    )


def test_the_pool_is_bounded_and_grows_at_its_end(tmp_path):
    source = collection(tmp_path / "c")
    small, large = mine(source, pool=5)[0], mine(source, pool=9)[0]
    for query_id in ("why", "where"):
        assert len(small[query_id].negatives) == 5
        assert len(large[query_id].negatives) == 9
        assert large[query_id].negatives[:5] == small[query_id].negatives
    assert len(mine(source, pool=5, negatives=7)[0]["why"].negatives) == 7


def test_no_negatives_wanted(tmp_path):
    groups, counts = mine(collection(tmp_path / "c"), negatives=0)
    assert all(group.negatives == () for group in groups.values())
    assert counts.without_negative == 3


def test_negatives_come_from_the_top_of_the_run(tmp_path):
    ranked = ["song", "sun", "other1", "rayleigh", "other2", "other3"]
    run = Run([Ranking.from_scores("why", [(id, -float(i)) for i, id in enumerate(ranked)])], "mine")
    groups, counts = mine(collection(tmp_path / "c"), run=run, depth=5)
    assert set(ids(groups["why"].negatives)) == {"song", "other1", "other2"}
    assert groups["where"].negatives == ()
    assert (counts.without_negative, counts.dropped_as_answer, counts.dropped_as_positive) == (2, 1, 0)


def test_order_of_files_and_mappings_has_no_influence(tmp_path):
    # A run, since BM25's own ties at the depth could fall differently.
    run = Run([Ranking.from_scores(q.id, [(p.id, 1.0) for p in PASSAGES]) for q in QUERIES], "all")
    expected = groups_from_collection(collection(tmp_path / "a"), "train", negatives=3, seed=1, run=run)
    for seed in range(3):
        rng = random.Random(seed)
        passages, queries = rng.sample(PASSAGES, len(PASSAGES)), rng.sample(QUERIES, len(QUERIES))
        judged = rng.sample(sorted(QRELS["train"]), len(QRELS["train"]))
        qrels = {"train": {q: dict(reversed(QRELS["train"][q].items())) for q in judged}}
        run = Run([Ranking.from_scores(q.id, [(p.id, 1.0) for p in passages]) for q in queries], "all")
        source = collection(tmp_path / f"b{seed}", passages, queries, qrels)
        assert groups_from_collection(source, "train", negatives=3, seed=1, run=run) == expected


def test_another_process_finds_the_same(tmp_path):
    source = collection(tmp_path / "c")
    code = (
        "import sys; from qpeft.data.beir import BeirCollection; from qpeft.training.groups import *\n"
        "groups, _ = groups_from_collection(BeirCollection(sys.argv[1]), 'train', negatives=3, seed=1)\n"
        "print([(g.query.id, [p.id for p in g.negatives], [p.id for p in draw(g, 2, 5, 1)]) for g in groups])\n"
        "sys.exit('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(source.folder)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    groups, _ = mine(source)
    assert found.stdout == f"{[(q, ids(g.negatives), ids(draw(g, 2, 5, 1))) for q, g in groups.items()]}\n"


def many(folder, count=40):
    queries = [Query(f"q{i}", "blue sky") for i in range(count)]
    return collection(folder, queries=queries, qrels={"train": {query.id: {"sky": 1} for query in queries}})


def test_samples_are_seeded_and_nested(tmp_path):
    source = many(tmp_path / "c")
    five, ten, every = (mine(source, queries=count)[0] for count in (5, 10, None))
    assert (len(five), len(ten), len(every)) == (5, 10, 40)
    assert list(every)[:10] == list(ten)
    assert list(ten)[:5] == list(five)
    assert all(every[query_id] == group for query_id, group in ten.items())
    assert mine(source, queries=5)[0] == five
    assert mine(source, queries=5, seed=2)[0].keys() != five.keys()
    assert len(mine(source, queries=1000)[0]) == 40


def test_a_sample_is_of_queries_with_a_positive(tmp_path):
    source = collection(tmp_path / "c")
    for seed in range(10):
        groups, counts = mine(source, queries=3, seed=seed)
        assert len(groups) == counts.queries == 3


def test_queries_have_negatives_of_their_own(tmp_path):
    groups, _ = mine(many(tmp_path / "c"), pool=5)
    assert len({group.negatives for group in groups.values()}) > 30
    assert groups != mine(many(tmp_path / "d"), pool=5, seed=2)[0]


def test_a_title_stands_for_a_missing_text(tmp_path):
    passages = [Passage("a", "", "Blue sky"), Passage("b", "", "Blue  sky"), Passage("c", "", "Blue sea")]
    source = collection(tmp_path / "c", passages, [Query("q", "blue")], {"train": {"q": {"a": 1}}})
    groups, counts = mine(source)
    assert ids(groups["q"].negatives) == ["c"]
    assert counts.dropped_as_positive == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": -1}, "--negatives is -1; it must be at least 0"),
        ({"depth": 0}, "--depth is 0; it must be at least 1"),
        ({"pool": 0}, "--pool is 0; it must be at least 1"),
        ({"queries": 0}, "--queries is 0; it must be at least 1"),
    ],
)
def test_numbers_out_of_range(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        mine(collection(tmp_path / "c"), **options)


def test_unusable_collections(tmp_path):
    source = collection(tmp_path / "c")
    with pytest.raises(InputError, match="sky: no query of split 'dev' has a relevant passage"):
        groups_from_collection(source, "dev", negatives=1, seed=1)
    with pytest.raises(OptionError, match="no split 'trian'"):
        groups_from_collection(source, "trian", negatives=1, seed=1)
    with pytest.raises(UnknownIdError, match="run 'mine', query 'why': passage 'nowhere' is not in the collection"):
        mine(source, run=Run([Ranking.from_scores("why", [("nowhere", 1.0)])], "mine"))
    blank = collection(tmp_path / "d", queries=[Query("why", " ")], qrels={"train": {"why": {"sun": 1}}})
    with pytest.raises(QueryError, match="query 'why' is empty"):
        mine(blank)


GROUP = Group(Query("q", "?"), (Passage("p", "+"), Passage("p2", "+")), tuple(Passage(f"n{i}", "-") for i in range(9)))


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(0, 99), st.integers(0, 2**40))
def test_draw(negatives, epoch, seed):
    first, *drawn = draw(GROUP, negatives, epoch, seed)
    assert first in GROUP.positives
    assert len(set(drawn)) == len(drawn) == min(negatives, 9)
    assert set(drawn) <= set(GROUP.negatives)
    assert draw(GROUP, negatives, epoch, seed) == (first, *drawn)


def test_draws_change_with_epoch_seed_and_query():
    other = Group(Query("r", "?"), GROUP.positives, GROUP.negatives)
    assert len({draw(GROUP, 3, epoch, 1) for epoch in range(50)}) > 40
    assert len({draw(GROUP, 3, 0, seed) for seed in range(50)}) > 40
    assert [draw(GROUP, 3, epoch, 1) for epoch in range(9)] != [draw(other, 3, epoch, 1) for epoch in range(9)]


def test_draws_use_every_negative_alike():
    drawn = [passage.id for epoch in range(900) for passage in draw(GROUP, 3, epoch, 1)[1:]]
    assert all(abs(drawn.count(passage.id) - 300) < 75 for passage in GROUP.negatives)  # 5 standard deviations


def test_draws_use_every_positive_alike():
    positives = tuple(Passage(name, name) for name in ("one", "two", "three"))
    group = Group(Query("q", "?"), positives, GROUP.negatives)
    drawn = [draw(group, 1, epoch, 1)[0] for epoch in range(900)]
    assert all(abs(drawn.count(passage) - 300) < 75 for passage in positives)
    negatives = [draw(Group(group.query, some, group.negatives), 3, 4, 1)[1:] for some in (positives, positives[:1])]
    assert negatives[0] == negatives[1]


def test_a_negative_number_cannot_be_drawn():
    with pytest.raises(OptionError, match="negatives is -1"):
        draw(GROUP, -1, 0, 0)


def write(folder, *lines, name="train.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" if line is not None else "\n" for line in lines))
    return path


def texts(groups):
    return [(g.query.text, [p.text for p in g.positives], [p.text for p in g.negatives]) for g in groups]


FLAG = {"query": "a?", "pos": ["a", " ", "aa"], "neg": ["b", " a ", "", "c", "aa"]}
TEVATRON = {
    "query_id": 7,
    "query": "a?",
    "positive_passages": [{"docid": "1", "title": "T", "text": "a"}],
    "negative_passages": [
        {"docid": "2", "title": "U", "text": "a"},
        {"docid": "1", "text": "b"},
        {"docid": 3, "text": "c"},
    ],
}
DPR = {
    "question": "a?",
    "answers": ["c"],
    "positive_ctxs": [{"title": "T", "text": "a", "passage_id": "1"}],
    "hard_negative_ctxs": [{"title": "T", "text": "c", "passage_id": "2"}],
    "negative_ctxs": [{"title": "T", "text": "a", "passage_id": "3"}],
}


def test_flagembedding(tmp_path):
    groups, counts = groups_from_jsonl(write(tmp_path, FLAG, {"query": "b?", "pos": ["b"]}))
    assert texts(groups) == [("a?", ["a", "aa"], ["b", "c"]), ("b?", ["b"], [])]
    assert counts == MiningCounts(queries=2, without_negative=1, dropped_as_positive=2, dropped_as_empty=2)


def test_a_positive_of_another_line_of_the_query_is_no_negative(tmp_path):
    lines = [{"query": "a?", "pos": ["x"], "neg": ["y", "z"]}, {"query": "a?", "pos": ["y"], "neg": ["x", "w"]}]
    groups, counts = groups_from_jsonl(write(tmp_path, *lines, {"query": "b?", "pos": ["z"], "neg": ["x"]}))
    assert texts(groups) == [("a?", ["x"], ["z"]), ("a?", ["y"], ["w"]), ("b?", ["z"], ["x"])]
    assert counts.dropped_as_positive == 2


def test_a_positive_of_another_line_of_the_query_is_no_negative_in_a_batch(tmp_path):
    lines = [{"query": query, "pos": [text]} for query, text in (("a?", "x"), ("a?", "y"), ("b?", "y"), ("c?", "z"))]
    groups, _ = groups_from_jsonl(write(tmp_path, *lines))
    drawn = [group.positives for group in groups]

    def others(own):
        return in_batch_negatives(groups[own], drawn[own], of_other_queries(groups[own], groups, drawn))

    assert [[passage.text for passage in others(own)] for own in range(4)] == [["z"], ["z"], ["x", "z"], ["x", "y"]]


def test_tevatron(tmp_path):
    groups, counts = groups_from_jsonl(write(tmp_path, TEVATRON))
    assert groups == [Group(Query("7", "a?"), (Passage("1", "a", "T"),), (Passage("3", "c"),))]
    assert counts == MiningCounts(queries=1, dropped_as_positive=2)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", ["", "\ufeff", " \n"])
def test_dpr(tmp_path, indent, before):
    path = tmp_path / "train.json"
    path.write_text(before + json.dumps([DPR, DPR | {"positive_ctxs": []}], indent=indent), encoding="utf-8")
    groups, counts = groups_from_jsonl(path)
    assert groups == [Group(Query("0", "a?", ("c",)), (Passage("1", "a", "T"),), (Passage("2", "c", "T"),))]
    assert counts == MiningCounts(queries=1, dropped_as_positive=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"query": "b?", "pos": []}, "no positive"),
        ({"query": "b?", "pos": [" "]}, "no positive has a text"),
        ({"query": " ", "pos": ["b"]}, "the query is empty"),
        ({"query": "b?"}, "none of the keys"),
        ([], "not a JSON object"),
    ],
)
def test_malformed_lines(tmp_path, line, message):
    path = write(tmp_path, FLAG, None, line, FLAG)
    with pytest.raises(FormatError, match=message) as caught:
        groups_from_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (DPR | {"question": " "}, "question '1': the query is empty"),
        (DPR | {"positive_ctxs": [{"text": ""}]}, "question '1': no positive has a text"),
        (DPR | {"question": None}, "question 1: no 'question'"),
    ],
)
def test_malformed_questions(tmp_path, question, message):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([DPR, question]))
    with pytest.raises(FormatError, match=message):
        groups_from_jsonl(path)


@pytest.mark.parametrize("content", ["", "\n \n", "[]", json.dumps([DPR | {"positive_ctxs": []}])])
def test_files_without_a_group(tmp_path, content):
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    with pytest.raises(FormatError, match=r"train\.jsonl: no group with a positive"):
        groups_from_jsonl(path)
    with pytest.raises(InputError, match=r"none\.jsonl: No such file"):
        groups_from_jsonl(tmp_path / "none.jsonl")


def test_what_a_teacher_did_not_score():
    one, two, three, four = (Passage(name, name) for name in ("one", "two", "three", "four"))
    groups = [Group(Query("a", "a"), (one, two), (three, four)), Group(Query("b", "b"), (three,), (one,))]
    teacher = {("a", "one"): 0.0, ("a", "four"): -1.0, ("b", "one"): 2.0, ("c", "three"): 1.0}
    assert unscored(groups, teacher) == ([("a", "two"), ("b", "three")], [("a", "three")])
    every = [("a", "one"), ("a", "two"), ("b", "three")], [("a", "three"), ("a", "four"), ("b", "one")]
    assert unscored(groups, {}) == every


def test_the_next_query_of_a_list():
    a, b, c = (Query(name, name) for name in "abc")
    assert next_queries([a, b, c]) == {"a": b, "b": c, "c": a}
    assert next_queries([a, a, b, a]) == {"a": b, "b": a}
    assert next_queries([]) == {}
    with pytest.raises(OptionError, match="needs two queries"):
        next_queries([a, a])


@pytest.mark.collections
@pytest.mark.parametrize("name", ["squad", "reddit-shift"])
def test_a_real_collection(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not here")
    source = BeirCollection(SHARED / name)
    groups, counts = groups_from_collection(source, "train", negatives=3, seed=42, queries=80, depth=50)
    qrels = source.qrels("train")
    assert counts.queries == len(groups) == 80
    assert counts.without_negative < 8
    assert counts.dropped_as_answer > 0
    for group in groups:
        assert {passage.id for passage in group.positives} == set(qrels[group.query.id])
        assert len(group.negatives) <= 20
        for passage in group.negatives:
            assert source.passages[passage.id] == passage
            assert not has_answer(passage.text, group.query.answers)


def test_positives_are_drawn_by_query_and_seed_too():
    positives = tuple(Passage(name, name) for name in ("one", "two", "three"))
    queries = {draw(Group(Query(f"q{i}", "?"), positives), 0, 0, 1)[0] for i in range(20)}
    seeds = {draw(Group(Query("q", "?"), positives), 0, 0, seed)[0] for seed in range(20)}
    assert queries == seeds == set(positives)
