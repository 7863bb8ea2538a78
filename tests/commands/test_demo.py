"""The demonstration compares Q-PEFT with what it has to beat, in tables that a terminal has room for."""

import contextlib
import io

import pytest

from qpeft.cli import main
from qpeft.data.collection import open_collection
from qpeft.data.trec import read_run
from qpeft.evaluation.measures import evaluate

ADAPTERS = ("tiny-lm-qpeft-r", "tiny-lm-qpeft-a")
ALONE = "query_likelihood"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return the demonstration's folder, and what it prints, line by line."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["demo", "--output", str(folder), "--limit-queries", "3", "--depth", "4"]) == 0
    return folder, out.getvalue().splitlines()


def mean(folder, name, measure):
    """Over the queries that were reranked; BM25 ranks all."""
    run, asked = (read_run(folder / f"{each}.test.trec") for each in (name, ALONE))
    assert len(asked) == 3
    qrels = open_collection("mini").qrels("test")
    return evaluate(run, {query_id: qrels[query_id] for query_id in asked}, [measure]).means[measure]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_q_peft_is_compared_with_zero_shot(demo, adapter):
    folder, lines = demo
    rows = [line.split() for line in lines if line.split()[:2] == [adapter, ALONE]]
    assert [row[2] for row in rows] == ["nDCG@10", "RR@10", "R@10"]
    for row in rows:
        difference = mean(folder, adapter, row[2]) - mean(folder, ALONE, row[2])
        assert float(row[3].strip("▲▼").replace("−", "-")) == pytest.approx(difference, abs=6e-4)
        assert 0 <= float(row[-1].removeprefix("<")) <= 1


@pytest.mark.parametrize("run", [ALONE, f"{ALONE}+bm25", *ADAPTERS])
def test_all_is_compared_with_bm25(demo, run):
    folder, lines = demo
    rows = [line.split() for line in lines if line.split()[:2] == [run, "bm25"]]
    assert len(rows) == 3
    if run in ADAPTERS:
        for row in rows:
            difference = mean(folder, run, row[2]) - mean(folder, "bm25", row[2])
            assert float(row[3].strip("▲▼").replace("−", "-")) == pytest.approx(difference, abs=6e-4)


def test_the_tables_have_room_in_100_columns(demo):
    _, lines = demo
    assert sum(set(line) == {"─"} for line in lines) == 2
    assert max(map(len, lines)) <= 100


def test_the_report_has_every_pair(demo):
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert "Holm-corrected over 30 comparisons" in page
    assert (demo[0] / "explanations.html").stat().st_size > 5_000


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"qpeft: error: {tmp_path / 'file'}: File exists\n"
