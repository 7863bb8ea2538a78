import gzip
import json
import os

import pytest
from cats import PASSAGES, QRELS, QUERIES, jsonl

from qpeft.data.beir import BeirCollection, write_beir
from qpeft.errors import FormatError, InputError, OptionError, StateError
from qpeft.types import Hit, Ranking, Run


def test_round_trip(beir):
    assert beir.name == "cats"
    assert tuple(beir.passages.values()) == PASSAGES
    assert beir.splits() == ["dev", "test"]
    assert {split: beir.qrels(split) for split in beir.splits()} == QRELS
    # In the order of the queries file, only what the split judges, answers kept.
    assert list(beir.queries("test").values()) == [QUERIES[0], QUERIES[1]]
    assert list(beir.queries("dev").values()) == [QUERIES[1]]


def test_files_are_beir(beir):
    first = json.loads((beir.folder / "corpus.jsonl").read_text().splitlines()[0])
    assert first == {"_id": "p1", "title": "Cats", "text": "The cat sat on the mat."}
    assert (beir.folder / "qrels" / "dev.tsv").read_text() == "query-id\tcorpus-id\tscore\nq1\tp2\t1\n"
    assert (beir.folder / "queries.jsonl").read_text().splitlines()[1] == '{"_id": "q1", "text": "who drinks coffee"}'


def test_gzip_folder(beir):
    queries, qrels = beir.queries("test"), beir.qrels("test")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        path = beir.folder / name
        (beir.folder / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    again = BeirCollection(beir.folder)
    assert tuple(again.passages.values()) == PASSAGES
    assert again.queries("test") == queries
    assert again.qrels("test") == qrels
    assert again.splits() == ["dev", "test"]
    before = again.fingerprint()
    (beir.folder / "qrels" / "test.tsv.gz").write_bytes(gzip.compress(b"query-id\tcorpus-id\tscore\nq1\tp2\t1\n"))
    assert BeirCollection(beir.folder).fingerprint() != before
    (beir.folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t2\n")
    assert BeirCollection(beir.folder).qrels("test") == {"q1": {"p1": 2}}, "what is unpacked goes before"


def test_unknown_split_names_the_known(beir):
    for method in (beir.queries, beir.qrels):
        with pytest.raises(OptionError, match="cats has no split 'train'; it has dev, test"):
            method("train")


def test_a_folder_without_qrels_has_no_splits(tmp_path):
    write_beir(tmp_path / "a", PASSAGES, QUERIES, {})
    collection = BeirCollection(tmp_path / "a")
    assert collection.splits() == []
    with pytest.raises(OptionError, match="it has none"):
        collection.qrels("test")


def test_qrels_for_an_unknown_query_name_file_and_line(beir):
    path = beir.folder / "qrels" / "dev.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq1\tp2\t1\n\nstray\tp1\t1\n")
    with pytest.raises(FormatError, match=r"query 'stray' is not in queries\.jsonl") as caught:
        beir.qrels("dev")
    assert (caught.value.path, caught.value.line) == (str(path), 4)


def test_qrels_for_an_unknown_passage_are_kept(beir):
    assert beir.qrels("test")["q1"]["gone"] == 1
    assert "gone" not in beir.passages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"_id": "q1", "text": "again"}, "query 'q1' occurs twice"),
        ({"_id": "x"}, "no 'text'"),
        ({"text": "x"}, "no '_id'"),
        ({"_id": "x", "text": "x", "answers": [1]}, "'answers' holds 1"),
        ({"_id": "x", "text": "x", "answers": 1}, "'answers' is 1"),
    ],
)
def test_malformed_queries(beir, line, message):
    path = beir.folder / "queries.jsonl"
    path.write_text(jsonl({"_id": "q1", "text": "a", "metadata": {"x": 1}}, line))
    with pytest.raises(FormatError, match=message) as caught:
        beir.queries("dev")
    assert caught.value.line == 2


def test_missing_files(tmp_path, beir):
    with pytest.raises(InputError, match="no such folder"):
        BeirCollection(tmp_path / "none")
    (beir.folder / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"no queries\.jsonl or queries\.jsonl\.gz"):
        BeirCollection(beir.folder)


def test_fingerprint_follows_the_content_not_the_place(beir, tmp_path):
    write_beir(tmp_path / "elsewhere", PASSAGES, QUERIES, QRELS)
    first = beir.fingerprint()
    assert BeirCollection(tmp_path / "elsewhere").fingerprint() == first
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv"):
        path = beir.folder / name
        before = path.read_text()
        path.write_text(before.replace("1", "2", 1))
        assert BeirCollection(beir.folder).fingerprint() != first
        path.write_text(before)
    assert BeirCollection(beir.folder).fingerprint() == first
    (beir.folder / "qrels" / "dev.tsv").rename(beir.folder / "qrels" / "a.tsv")
    assert BeirCollection(beir.folder).fingerprint() != first


def test_fingerprint_sees_both_ends_and_the_size_of_a_large_corpus(beir):
    path = beir.folder / "corpus.jsonl"
    seen = set()
    for content in ("a" + "x" * 2**22 + "z", "b" + "x" * 2**22 + "z", "a" + "x" * 2**22 + "y", "a" + "x" * 2**21 + "z"):
        path.write_text(content)
        seen.add(beir.fingerprint())
    assert len(seen) == 4


def test_a_change_that_the_fingerprint_misses_is_told_by_the_time(beir, tmp_path):
    path = beir.folder / "corpus.jsonl"
    path.write_text("a" + "x" * 2**22 + "z")
    fingerprint, written = beir.fingerprint(), beir.written()
    path.write_text("a" + "x" * 2**21 + "y" + "x" * (2**21 - 1) + "z")
    os.utime(path, ns=(written + 1, written + 1))
    assert (beir.fingerprint(), beir.written()) == (fingerprint, written + 1)


def test_a_run_goes_into_the_folder(tmp_path):
    run = Run([Ranking("q1", (Hit("p1", 1.0),))], "t")
    write_beir(tmp_path / "a", PASSAGES, QUERIES, {}, run)
    assert (tmp_path / "a" / "candidates.trec").read_text() == "q1 Q0 p1 1 1.0 t\n"


def test_an_existing_folder_is_not_overwritten(beir, tmp_path):
    with pytest.raises(StateError, match="exists already"):
        write_beir(beir.folder, (), (), {})
    (tmp_path / "empty").mkdir()
    write_beir(tmp_path / "empty", PASSAGES, QUERIES, QRELS)
    assert tuple(BeirCollection(tmp_path / "empty").passages.values()) == PASSAGES


def test_no_half_written_folder(tmp_path):
    with pytest.raises(InputError, match="'a space' cannot stand in"):
        write_beir(tmp_path / "new" / "a", PASSAGES, QUERIES, {"test": {"a space": {"p1": 1}}})
    with pytest.raises(ZeroDivisionError):
        write_beir(tmp_path / "new" / "a", (PASSAGES[1 // i] for i in (1, 0)), QUERIES, {})
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.collections
@pytest.mark.parametrize(
    ("name", "passages", "queries"),
    [("squad", 4496, [2777, 7793, 11877]), ("nq-mini", 939, [140, 348, 450]), ("cacm", 3204, [52])],
)
def test_real_folders(shared, name, passages, queries):
    collection = BeirCollection(shared(name))
    assert len(collection.passages) == passages
    assert [len(collection.queries(split)) for split in collection.splits()] == queries
