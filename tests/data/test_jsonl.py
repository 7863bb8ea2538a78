import pytest
from cats import jsonl

from qpeft.data.jsonl import read_groups, read_requests
from qpeft.errors import FormatError
from qpeft.types import Candidates, Group, Passage, Query

GROUPS = [
    Group(Query("q1", "who?", ("me",)), (Passage("1", "x", "T"), Passage("2", "y")), (Passage("3", "é"),)),
    Group(Query("q2", "why?"), (Passage("4", "z"),)),
]


def write(folder, *values):
    path = folder / "a.jsonl"
    path.write_text(jsonl(*values))
    return path


def texts(groups):
    return [
        (group.query.text, [p.text for p in group.positives], [p.text for p in group.negatives]) for group in groups
    ]


def test_tevatron(tmp_path):
    passages = [{"docid": "1", "title": "T", "text": "x"}, {"docid": "2", "title": "", "text": "y"}]
    first = {"query_id": "q1", "query": "who?", "answers": ["me"], "positive_passages": passages}
    second = {"query_id": "q2", "query": "why?", "positive_passages": [{"docid": "4", "text": "z"}]}
    negatives = {"negative_passages": [{"docid": "3", "title": "", "text": "é"}]}
    assert read_groups(write(tmp_path, first | negatives, second)) == GROUPS


def test_flagembedding_as_found(tmp_path):
    line = {"query": "a", "pos": ["b"], "neg": ["c", "d"], "pos_scores": [1], "neg_scores": [0, 0], "prompt": "p"}
    assert texts(read_groups(write(tmp_path, line))) == [("a", ["b"], ["c", "d"])]


@pytest.mark.parametrize(
    "line",
    [
        {"query": "a", "positive": "b", "negative": "c"},
        {"query": "a", "positive": "b", "negatives": ["c"]},
        {"query": "a", "positives": ["b"], "negatives": [{"text": "c"}]},
        {"query": {"text": "a"}, "positive": {"contents": "b"}, "negative": ["c"]},
    ],
)
def test_plain(tmp_path, line):
    assert texts(read_groups(write(tmp_path, line))) == [("a", ["b"], ["c"])]


def test_pairs_with_ids(tmp_path):
    line = {"query": {"qid": 5, "text": "a"}, "positive": {"id": 9, "title": "T", "text": "b"}}
    assert read_groups(write(tmp_path, line)) == [Group(Query("5", "a"), (Passage("9", "b", "T"),))]


def test_without_ids_equal_content_is_the_same(tmp_path):
    one, two = read_groups(write(tmp_path, {"query": "a", "pos": ["b"]}, {"query": "a", "pos": ["c"], "neg": ["b"]}))
    assert one.query == two.query
    assert one.positives == two.negatives
    assert one.positives != two.positives


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"query": "a"}, "none of the keys that tell the format: 'pos', 'positive_passages', 'positives' or"),
        ({"query": "a", "pos": ["b"], "positive": "b"}, "several of the keys"),
        ({"query": "a", "positive_passages": [{"text": "b"}]}, "a Tevatron line, but the lines above are Flag"),
        ({"query": "a", "pos": []}, "no positive"),
        ({"pos": ["b"]}, "no 'query'"),
        ({"query": 1, "pos": ["b"]}, "'query' is 1"),
        ({"query": "a", "pos": [1]}, r"pos\[0\]: 1 is not"),
        ({"query": "a", "pos": [{"id": 1}]}, r"pos\[0\]: no 'text'"),
        ({"query": "a", "pos": ["b"], "neg": 3}, "'neg' is 3, not a list"),
        (["a"], "not a JSON object"),
    ],
)
def test_malformed_groups(tmp_path, line, message):
    with pytest.raises(FormatError, match=message) as caught:
        read_groups(write(tmp_path, {"query": "fine", "pos": ["x"]}, line))
    assert caught.value.line == 2


REQUEST = {
    "query": {"text": "who?", "qid": 264014},
    "candidates": [
        {"docid": "d1", "score": 14.9, "doc": {"contents": "x", "title": "T"}},
        {"docid": 2, "score": 3, "doc": {"segment": "y", "url": "u"}},
        {"docid": "d3", "score": 1.5, "doc": "z"},
    ],
}


def test_requests(tmp_path):
    bare = {"query": {"text": "?", "qid": "q"}, "candidates": [{"docid": "d", "doc": {"text": "x"}}]}
    passages = (Passage("d1", "x", "T"), Passage("2", "y"), Passage("d3", "z"))
    assert list(read_requests(write(tmp_path, REQUEST, bare, {"query": bare["query"], "candidates": []}))) == [
        Candidates(Query("264014", "who?"), passages, (14.9, 3.0, 1.5)),
        Candidates(Query("q", "?"), (Passage("d", "x"),)),
        Candidates(Query("q", "?"), ()),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": "who?"}, "query: 'who\\?' is not a JSON object"),
        ({"query": {"text": "x"}}, "query: no 'qid'"),
        ({"candidates": ["d1"]}, r"candidates\[0\]: 'd1' is not"),
        ({"candidates": [{"docid": "d"}]}, "no 'doc'"),
        ({"candidates": [{"docid": "d", "doc": {"url": "x"}}]}, r"candidates\[0\], doc: no 'text'"),
        ({"candidates": REQUEST["candidates"] * 2}, "a passage occurs twice"),
        ({"candidates": [*REQUEST["candidates"], {"docid": "d", "doc": "x"}]}, "3 of 4 passages have a 'score'"),
        ({"candidates": [{"docid": "d", "doc": "x", "score": "1"}]}, "score '1' is not a finite number"),
        ({"candidates": [{"docid": "d", "doc": "x", "score": 10**400}]}, "is not a finite number"),
        ({"candidates": [{"docid": "\ud83d", "doc": "x"}]}, r"candidates\[0\]: the id '.ud83d' has half a character"),
        ({"candidates": [{"docid": "d", "doc": "x", "score": float("nan")}]}, "score nan is not a finite number"),
    ],
)
def test_malformed_requests(tmp_path, change, message):
    with pytest.raises(FormatError, match=message) as caught:
        list(read_requests(write(tmp_path, REQUEST, REQUEST | change)))
    assert caught.value.line == 2


def test_half_characters_are_replaced_in_texts(tmp_path):
    line = {
        "query": "why \ud83d",
        "positive": {"title": "\udc00", "text": "\ud83d\ude00 \ud83d"},
        "answers": ["\ud83d"],
    }
    path = write(tmp_path, line)
    assert "\\ud83d" in path.read_text(), "as JSON that others write has it"
    (group,) = read_groups(path)
    assert (group.query.text, group.query.answers) == ("why \ufffd", ("\ufffd",))
    assert (group.positives[0].title, group.positives[0].text) == ("\ufffd", "\U0001f600 \ufffd")
