import json
import os
import shutil

import pytest
from cats import PASSAGES, QRELS, QUERIES, jsonl

from qpeft.data.beir import BeirCollection
from qpeft.data.convert import FORMATS, convert
from qpeft.data.info import info
from qpeft.data.trec import read_run
from qpeft.errors import FormatError, InputError, OptionError, StateError
from qpeft.types import Hit, Passage, Query

DPR = [
    {
        "question": "who?",
        "answers": ["me"],
        "ctxs": [
            {"id": 1, "title": "T", "text": "x", "score": "2", "has_answer": False},
            {"id": 2, "title": "", "text": "y", "score": "1", "has_answer": True},
        ],
    }
]
REQUEST = {"query": {"text": "?", "qid": "q"}, "candidates": [{"docid": d, "doc": d * 2} for d in ("b", "a", "c")]}
SQUAD = {
    "data": [{"title": "A", "paragraphs": [{"context": "c", "qas": [{"id": "q", "question": "?", "answers": []}]}]}]
}
SOURCES = {
    "squad": json.dumps(SQUAD),
    "dpr": json.dumps(DPR),
    "evidence": "id\ttext\ttitle\n1\tx\tT\n",
    "dpr-training": json.dumps([{"question": "?", "answers": [], "positive_ctxs": [{"text": "x"}]}]),
    "groups": jsonl({"query": "a", "pos": ["b"], "neg": ["c"]}, {"query": "a", "pos": ["c"], "neg": ["d", "b"]}),
    "requests": jsonl(REQUEST),
}


@pytest.fixture
def source(tmp_path):
    def write(format):
        path = tmp_path / f"{format} source.json"
        path.write_text(SOURCES[format])
        return str(path)

    return write


def test_every_format_is_tried_here():
    assert set(SOURCES) | {"collection"} == set(FORMATS)


@pytest.mark.parametrize("format", SOURCES)
def test_every_format_becomes_a_folder_that_opens(tmp_path, source, format):
    convert(source(format), tmp_path / "out", format)
    collection = BeirCollection(tmp_path / "out")
    assert len(collection.passages) > 0
    for split in collection.splits():
        assert set(collection.queries(split)) == set(collection.qrels(split))
        assert all(
            passage_id in collection.passages for grades in collection.qrels(split).values() for passage_id in grades
        )
    assert info(collection)["passages"] == len(collection.passages)


@pytest.mark.parametrize("format", SOURCES)
def test_a_malformed_source_leaves_nothing(tmp_path, format):
    path = tmp_path / "bad"
    path.write_text('[{"question": }')
    with pytest.raises(FormatError, match="bad:1"):
        convert(str(path), tmp_path / "out", format)
    assert os.listdir(tmp_path) == ["bad"]


def test_collection(beir, tmp_path):
    convert(str(beir.folder), tmp_path / "all", "collection")
    copy = BeirCollection(tmp_path / "all")
    assert tuple(copy.passages.values()) == PASSAGES
    assert {split: copy.qrels(split) for split in copy.splits()} == QRELS
    convert(str(beir.folder), tmp_path / "dev", "collection", split="dev")
    copy = BeirCollection(tmp_path / "dev")
    assert copy.splits() == ["dev"]
    assert copy.queries("dev") == {"q1": QUERIES[1]}
    shutil.rmtree(beir.folder / "qrels")
    for name, split in (("unjudged", None), ("asked", "test")):
        convert(str(beir.folder), tmp_path / name, "collection", split=split)
        copy = BeirCollection(tmp_path / name)
        assert copy.splits() == []
        assert tuple(copy.queries("test").values()) == tuple(QUERIES)


def test_groups(tmp_path, source):
    convert(source("groups"), tmp_path / "out", "groups")
    collection = BeirCollection(tmp_path / "out")
    ids = {passage.text: passage.id for passage in collection.passages.values()}
    assert list(ids) == ["b", "c", "d"]
    ((query_id, grades),) = collection.qrels("train").items()
    assert collection.queries("train")[query_id].text == "a"
    # A positive of one line that is a negative of another is relevant.
    assert grades == {ids["b"]: 1, ids["c"]: 1, ids["d"]: 0}


def test_dpr(tmp_path, source):
    convert(source("dpr"), tmp_path / "out", "dpr", split="nq")
    collection = BeirCollection(tmp_path / "out")
    assert list(collection.passages.values()) == [Passage("1", "x", "T"), Passage("2", "y")]
    assert collection.queries("nq") == {"0": Query("0", "who?", ("me",))}
    assert collection.qrels("nq") == {"0": {"1": 0, "2": 1}}
    assert read_run(tmp_path / "out" / "candidates.trec")["0"].hits == (Hit("1", 2.0), Hit("2", 1.0))


def test_dpr_with_evidence(tmp_path, source):
    bare = [{"question": "?", "answers": [], "ctxs": [{"id": 1}]}]
    path = tmp_path / "upr.json"
    path.write_text(json.dumps(bare))
    convert(str(path), tmp_path / "out", "dpr", evidence=source("evidence"))
    collection = BeirCollection(tmp_path / "out")
    assert dict(collection.passages) == {"1": Passage("1", "x", "T")}
    assert collection.splits() == []
    with pytest.raises(OptionError, match="evidence belongs to the format 'dpr', not to 'squad'"):
        convert(str(path), tmp_path / "two", "squad", evidence=source("evidence"))


def test_lists_from_a_pipe_cannot_have_evidence(tmp_path, source):
    reading, writing = os.pipe()
    os.write(writing, b'[{"question": "?", "ctxs": [{"id": 1}]}]')
    os.close(writing)
    with pytest.raises(OptionError, match=f"/dev/fd/{reading} is a pipe"):
        convert(f"/dev/fd/{reading}", tmp_path / "out", "dpr", evidence=source("evidence"))
    os.close(reading)


def test_candidates_without_scores_keep_their_order(tmp_path, source):
    convert(source("requests"), tmp_path / "out", "requests")
    assert [hit.passage_id for hit in read_run(tmp_path / "out" / "candidates.trec")["q"].hits] == ["b", "a", "c"]


def test_one_id_for_two_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        jsonl(REQUEST, {"query": {"text": "!", "qid": "r"}, "candidates": [{"docid": "b", "doc": "other"}]})
    )
    with pytest.raises(InputError, match="the id 'b' stands for two different passage texts"):
        convert(str(path), tmp_path / "out", "requests")


def test_unknown_format_and_existing_target(tmp_path, source, beir):
    with pytest.raises(OptionError, match="unknown format 'sqad'; did you mean 'squad'"):
        convert(source("squad"), tmp_path / "out", "sqad")
    with pytest.raises(StateError, match="exists already"):
        convert(source("squad"), beir.folder, "squad")
