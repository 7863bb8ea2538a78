import gzip
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpeft.data.trec import read_qrels, read_run, write_qrels, write_run
from qpeft.errors import FormatError, InputError
from qpeft.types import Hit, Ranking, Run

ids = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=" \t\r\n\v\f\ufeff"), min_size=1, max_size=8)
scores = st.floats(width=32, allow_nan=False, allow_infinity=False)
rankings = st.dictionaries(ids, scores, min_size=1, max_size=6)


def ranking(query_id, scores):
    return Ranking.from_scores(query_id, scores.items())


@given(st.dictionaries(ids, rankings, max_size=4), ids)
def test_run_round_trip(tmp_path_factory, queries, tag):
    path = tmp_path_factory.mktemp("run") / "a.trec"
    run = Run([ranking(query_id, scores) for query_id, scores in queries.items()], tag)
    write_run(run, path)
    again = read_run(path)
    assert dict(again) == dict(run)
    assert list(again) == list(run)
    assert not queries or again.tag == tag


@given(st.dictionaries(ids, st.dictionaries(ids, st.integers(-2, 4), min_size=1, max_size=4), max_size=4))
def test_qrels_round_trip(tmp_path_factory, qrels):
    path = tmp_path_factory.mktemp("qrels") / "a"
    write_qrels(qrels, path)
    assert read_qrels(path) == qrels
    lines = (f"{q} 0 {passage} {grade}\n" for q, grades in qrels.items() for passage, grade in grades.items())
    path.write_text("".join(lines), encoding="utf-8")
    assert read_qrels(path) == qrels, "TREC's four columns"


def test_scores_survive_to_the_last_bit_and_stay_short(tmp_path):
    values = {"a": 0.1, "b": -12.34567, "c": math.nextafter(1.0, 2.0), "d": 1e-45, "e": 3.4028234e38}
    write_run(Run([ranking("q", values)], "t"), tmp_path / "r")
    written = {line.split()[2]: line.split()[4] for line in (tmp_path / "r").read_text().splitlines()}
    assert written["a"] == "0.1"
    assert all(np.float32(float(text)) == np.float32(values[key]) for key, text in written.items())


def test_close_scores_keep_their_order(tmp_path):
    close = {"b": 1.0, "a": float(np.nextafter(np.float32(1), np.float32(2)))}
    write_run(Run([ranking("q", close)], "t"), tmp_path / "r")
    assert [hit.passage_id for hit in read_run(tmp_path / "r")["q"].hits] == ["a", "b"]


def test_run_of_others(tmp_path):
    path = tmp_path / "pyserini.trec"
    path.write_text(
        "q1 Q0 d1 1 0.500000 x\n\n  q2\tQ0\td9\t1\t-3\tx \r\nq1 Q0 d3 7 0.500000 x\nq1 Q0 d2 2 9.250000 x\n"
    )
    run = read_run(path)
    assert run.tag == "x"
    assert list(run) == ["q1", "q2"]
    # The ranks 1, 7, 2 count for nothing; ties go by id, the greater first.
    assert run["q1"].hits == (Hit("d2", 9.25), Hit("d3", 0.5), Hit("d1", 0.5))


def test_the_first_line_says_the_tag(tmp_path):
    (tmp_path / "r").write_text("q Q0 a 1 1.0 first\nq Q0 b 2 0.5 second\n")
    assert read_run(tmp_path / "r").tag == "first"


def test_empty_run_is_named_by_its_file(tmp_path):
    (tmp_path / "bm25.trec").write_text("")
    run = read_run(tmp_path / "bm25.trec")
    assert (len(run), run.tag) == (0, "bm25.trec")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 d 1 0.5", "5 columns"),
        ("q Q0 d 1 0.5 t more", "7 columns"),
        ("q", "1 columns"),
        ("q Q0 d 1 high t", "'high' is not a number"),
        ("q Q0 d 1 nan t", "nan cannot be ranked"),
        ("q Q0 d 1 -inf t", "-inf cannot be ranked"),
        ("q Q0 d 1 1e39 t", "1e39 cannot be ranked"),
        ("q Q0 d 1 3.4028235677973366e38 t", "cannot be ranked"),
        ("q Q0 first 2 0.1 t", "'first' twice"),
    ],
)
@pytest.mark.parametrize("pack", [False, True])
def test_malformed_run(tmp_path, line, message, pack):
    path = tmp_path / ("r.gz" if pack else "r")
    content = f"q Q0 first 1 1.0 t\n\n{line}\n".encode()
    path.write_bytes(gzip.compress(content) if pack else content)
    with pytest.raises(FormatError, match=message) as caught:
        read_run(path)
    assert (caught.value.path, caught.value.line) == (str(path), 3)


@pytest.mark.parametrize("bad", ["", "a b", "a\tb", "a\nb"])
@pytest.mark.parametrize("where", ["query", "passage", "tag"])
def test_ids_that_no_column_holds_are_not_written(tmp_path, bad, where):
    parts = {"query": "q", "passage": "p", "tag": "t"} | {where: bad}
    run = Run([Ranking("fine", (Hit("p", 1.0),)), Ranking(parts["query"], (Hit(parts["passage"], 1.0),))], parts["tag"])
    with pytest.raises(InputError, match="cannot stand in a run or in qrels"):
        write_run(run, tmp_path / "r")
    assert os.listdir(tmp_path) == []


def test_qrels_formats(tmp_path):
    expected = {"q1": {"d1": 1, "d2": 0}, "q2": {"d1": -1}}
    contents = {
        "trec": "q1 0 d1 1\nq1\t0\td2\t0\n\nq2 Q0 d1 -1\nq1 0 d1 1\n",
        "beir": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td1\t-1\n",
        "no header": "q1\td1\t1\nq1\td2\t0\nq2\td1\t-1\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        assert read_qrels(tmp_path / name) == expected
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        assert read_qrels(tmp_path / f"{name}.gz") == expected


def test_between_tabs_ids_may_hold_blanks(tmp_path):
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq 1\tdoc one\t1\nq2\td \t 0\n")
    assert read_qrels(tmp_path / "qrels.tsv") == {"q 1": {"doc one": 1}, "q2": {"d": 0}}


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("q d\n", 1, "2 columns"),
        ("q 0 d 1 x\n", 1, "5 columns"),
        ("q 0 d 1\nq d 1\n", 2, "3 columns, but 4"),
        ("query-id\tcorpus-id\tscore\nq 0 d 1\n", 2, "1 columns, but 3"),
        ("query-id corpus-id score\nq 0 d 1\n", 2, "4 columns, but 3"),
        ("q 0 d 1\nq 0 e yes\n", 2, "'yes' is not an integer"),
        ("q 0 d 1.0\n", 1, "not an integer"),
        ("a\tb\tc\na\tb\tc\n", 2, "not an integer"),
        ("q 0 d --1\n", 1, "'--1' is not an integer"),
        ("q d --1\n", 1, "'--1' is not an integer"),
        ("q d 1.5\nq d 1\n", 1, "'1.5' is not an integer"),
        ("q 0 d 1_0\n", 1, "'1_0' is not an integer"),
        ("q 0 d " + "9" * 5000 + "\n", 1, "at most 18 digits"),
        ("q 0 d 1\nq 0 e 1\nq 0 d 2\n", 3, "grade 2, but 1 before"),
    ],
)
def test_malformed_qrels(tmp_path, content, line, message):
    (tmp_path / "qrels").write_text(content)
    with pytest.raises(FormatError, match=message) as caught:
        read_qrels(tmp_path / "qrels")
    assert caught.value.line == line


def test_bad_qrels_are_not_half_written(tmp_path):
    with pytest.raises(InputError, match="'b c' cannot stand in"):
        write_qrels({"q": {"a": 1, "b c": 1}}, tmp_path / "qrels")
    assert os.listdir(tmp_path) == []
