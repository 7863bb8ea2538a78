import html.parser
import re

import numpy as np
import pytest

from qpeft.analysis.examples import won_and_lost
from qpeft.analysis.report import write_comparison_report
from qpeft.errors import OptionError
from qpeft.evaluation.cost import Cost
from qpeft.evaluation.measures import evaluate
from qpeft.evaluation.significance import compare, compare_all_pairs
from qpeft.types import Passage, Query, Ranking, Run

DEPTH = 20
VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """Collects what a reader sees, and checks that elements nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.rows, self.text, self.links = [], [], [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def make_run(tag, seed, skill):
    rng = np.random.default_rng(seed)
    return Run(
        [
            Ranking.from_scores(
                f"q{number}",
                [(f"p{p}", float(rng.normal(skill if p == number % DEPTH else 0.0, 1.0))) for p in range(DEPTH)],
            )
            for number in range(40)
        ],
        tag,
    )


@pytest.fixture(scope="module")
def material():
    runs = [make_run("bm25", 1, 0.8), make_run("ql <b>", 2, 2.5), make_run("random", 3, 0.0)]
    qrels = {f"q{number}": {f"p{number % DEPTH}": 1} for number in range(40)}
    evaluations = [evaluate(run, qrels, "RR@10 nDCG@10") for run in runs]
    return runs, qrels, evaluations, compare(evaluations[0], evaluations[1:], resamples=200)


@pytest.fixture
def page(material, tmp_path):
    runs, qrels, evaluations, comparisons = material
    queries = {
        f"q{n}": Query(f"q{n}", f"<script>alert({n})</script> & 'more'", ("an <i>answer</i>",)) for n in range(40)
    }
    passages = {f"p{n}": Passage(f"p{n}", f"text of <img src=x> {n}", f"title {n}") for n in range(DEPTH)}
    write_comparison_report(
        tmp_path / "report.html",
        evaluations,
        comparisons,
        runs,
        qrels,
        queries,
        passages,
        {"collection": "made <up>", "settings": {"seed": 1}},
        costs={"bm25": Cost(2.0, 40, 800, 64_000, flops=8 * 10**15)},
    )
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_text_of_the_users_becomes_markup(page):
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert "&lt;script&gt;alert(" in page
    assert "<script>alert(" in parsed.text
    assert "text of <img src=x>" in parsed.text
    assert "made <up>" in parsed.text
    assert "ql <b>" in parsed.text


def test_it_stands_alone(page):
    parsed = Page(page)
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert "#010203" not in page


def test_costs_are_shown_where_they_are_known(page, material):
    rows = {row[0]: row for row in Page(page).rows if len(row) == 10}
    mean = material[2][0].means["RR@10"]
    assert rows["run"][1:] == [
        "passages/s", "tokens/s", "padding %", "cached %", "TFLOP/query", "QPP", "RPP RR@10", "peak MiB", "peak GPU MiB"
    ]  # fmt: skip
    assert rows["bm25"][1:] == ["400", "32,000", "–", "–", "200", "5.00", f"{5 * mean:.2f}", "–", "–"]
    assert rows["random"][1:] == ["–"] * 9


def test_its_numbers_are_the_evaluations(page, material):
    _, _, evaluations, comparisons = material
    rows = Page(page).rows
    assert rows[0] == ["run", "RR@10", "nDCG@10"]
    significant = {(each.run, each.measure) for each in comparisons if each.significant()}
    assert 0 < len(significant) < len(comparisons)
    for each, row in zip(evaluations, rows[1:4], strict=True):
        assert row[0].split(" baseline")[0] == each.run
        for measure, cell in zip(each.measures, row[1:], strict=True):
            mean, low, high = re.fullmatch(r"(\d\.\d{4})[▲▼]?(\d\.\d{3}) … (\d\.\d{3})", cell).groups()
            assert mean == f"{each.means[measure]:.4f}"
            assert float(low) < each.means[measure] < float(high)
            assert bool(re.search("[▲▼]", cell)) == ((each.run, measure) in significant)
    details = [row for row in rows if len(row) == 8][1:]
    for each, row in zip(comparisons, details, strict=True):
        assert row[:3] == [each.run, each.baseline, each.measure]
        assert float(row[3].strip("▲▼").replace("−", "-")) == pytest.approx(each.difference, abs=5e-5)
        low, high = (float(bound.replace("−", "-")) for bound in row[4].split(" … "))
        assert (low, high) == pytest.approx(each.interval, abs=5e-5)
        assert row[5] == f"{each.wins}/{each.ties}/{each.losses}"
        expected = each.corrected["t"]
        assert row[7] == ("<0.001" if expected < 0.001 else f"{expected:.3f}")


def test_figures_and_sections(page):
    parsed = Page(page)
    assert parsed.tags.count("svg") == 3  # curves, and bars for two runs
    assert "CandR@k" in parsed.text
    assert "All runs order the same candidates" in parsed.text
    assert "ql <b> against bm25" in parsed.text
    assert "Won most" in parsed.text
    assert "Lost most" in parsed.text


def test_examples_are_the_largest_differences(material):
    runs, qrels, evaluations, _ = material
    won, lost = won_and_lost((evaluations[0], evaluations[1]), (runs[0], runs[1]), qrels, "RR@10", count=3)
    a, b = evaluations[0].per_query["RR@10"], evaluations[1].per_query["RR@10"]
    differences = sorted(b[query_id] - a[query_id] for query_id in qrels)
    assert [example.difference for example in won] == pytest.approx(differences[:-4:-1])
    assert [example.difference for example in lost] == pytest.approx(differences[:3])
    example = won[0]
    assert example.query.text == example.query.id
    assert [p.id for p in example.run.passages] == [hit.passage_id for hit in runs[1][example.query.id].hits[:3]]
    assert 1 / example.run.first_relevant == pytest.approx(example.run.value)
    (relevant,) = [p.rank for p in example.run.passages if p.grade] or [example.run.first_relevant]
    assert relevant == example.run.first_relevant


def test_the_measures_own_grade_says_what_is_relevant(tmp_path):
    hits = [("a", 3.0), ("b", 2.0), ("c", 1.0), ("d", 0.5), ("e", 0.4), ("f", 0.3), ("g", 0.2), ("h", 0.1)]
    hits += [(f"x{i}", -float(i)) for i in range(8)]
    runs = [Run([Ranking.from_scores("q", hits)], "one")]
    runs.append(Run([Ranking.from_scores("q", [("b", 9.0), *(hit for hit in hits if hit[0] != "b")])], "other"))
    qrels, measure = {"q": {"a": 1, "b": 2}}, "RR(rel=2)@10"
    found = [evaluate(run, qrels, measure) for run in runs]
    (won,), _ = won_and_lost((found[0], found[1]), (runs[0], runs[1]), qrels, found[0].measures[0], count=1)
    assert (won.baseline.first_relevant, won.run.first_relevant) == (2, 1)
    assert [(passage.id, passage.relevant) for passage in won.baseline.passages[:2]] == [("a", False), ("b", True)]
    write_comparison_report(tmp_path / "r.html", found, compare_all_pairs(found, resamples=10), runs, qrels)
    parsed = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "CandR(rel=2)@k" in parsed.text
    assert "first relevant at rank 2" in parsed.text


def test_runs_with_other_candidates_are_not_compared_by_candidate_recall(material, tmp_path):
    runs, qrels, evaluations, _ = material
    half = Run((Ranking(q, ranking.hits[: DEPTH // 2]) for q, ranking in runs[1].items()), "half")
    found = [evaluations[0], evaluate(half, qrels, "RR@10 nDCG@10")]
    path = tmp_path / "report.html"
    write_comparison_report(path, found, compare_all_pairs(found, resamples=100), [runs[0], half], qrels)
    parsed = Page(path.read_text(encoding="utf-8"))
    assert "Success@k" in parsed.text
    assert "The runs rank different passages" in parsed.text


def test_shallow_runs_one_run_and_missing_queries_still_make_a_report(tmp_path):
    good, bad = [("a", 1.0), ("b", 0.5)], [("c", 1.0)]
    run = Run([Ranking.from_scores("q1", good), Ranking.from_scores("q2", bad)], "shallow")
    other = Run([Ranking.from_scores("q2", good)], "other")
    qrels = {"q1": {"a": 1}, "q2": {"b": 2}}
    measures = "RR@10 CandR_clean(rel=2)@5"  # which has no value for the first run
    found = [evaluate(run, qrels, measures), evaluate(other, qrels, measures)]
    path = tmp_path / "report.html"
    write_comparison_report(path, found[:1], [], [run], qrels)
    assert Page(path.read_text(encoding="utf-8")).tags.count("svg") == 0
    write_comparison_report(path, found, compare(found[0], found[1:]), [run, other], qrels)
    parsed = Page(path.read_text(encoding="utf-8"))
    assert parsed.tags.count("svg") == 1
    assert "nothing ranked" in parsed.text
    assert "relevant (2)" in parsed.text
    assert "–" in parsed.text


def test_a_run_that_is_not_given_is_named_and_the_old_report_stays(material, tmp_path):
    runs, qrels, evaluations, comparisons = material
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(OptionError, match="'random' is evaluated but not given"):
        write_comparison_report(path, evaluations, comparisons, runs[:2], qrels)
    with pytest.raises(OptionError, match="'random' is compared but"):
        write_comparison_report(path, evaluations[:2], comparisons, runs, qrels)
    with pytest.raises(OptionError, match="at least one"):
        write_comparison_report(path, [], [], runs, qrels)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
