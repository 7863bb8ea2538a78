import csv
import io
import json
import re

import numpy as np
import pytest

from qpeft.errors import OptionError
from qpeft.evaluation.cost import Cost
from qpeft.evaluation.measures import Evaluation
from qpeft.evaluation.significance import compare, compare_all_pairs
from qpeft.evaluation.table_formats import render
from qpeft.evaluation.tables import measure_table, rounded

MEASURES = ("nDCG@10", "RR@10")


def evaluation(tag, gain, seed, unranked=""):
    rng = np.random.default_rng(seed)
    queries = tuple(f"q{number}" for number in range(60))
    per_query = {m: {q: float(np.clip(rng.normal(0.5 + gain, 0.15), 0, 1)) for q in queries} for m in MEASURES}
    return Evaluation(tag, MEASURES, queries, frozenset(unranked), per_query)


@pytest.fixture(scope="module")
def evaluations():
    return [
        evaluation("base", 0, 1),
        evaluation("a|b_50%", 0.2, 2),
        evaluation("worse", -0.2, 3, unranked="ab"),
    ]


@pytest.fixture(scope="module")
def comparisons(evaluations):
    return compare(evaluations[0], evaluations[1:], resamples=500)


def markdown_rows(text):
    tables = []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            tables.append(cells)
    return tables


def test_markdown_parses_back(evaluations, comparisons):
    header, rule, *rows = markdown_rows(render(evaluations, comparisons, format="markdown", digits=6))
    assert header == ["run", *MEASURES]
    assert rule == ["---", "---:", "---:"]
    for each, row, mark in zip(evaluations, rows, ["", "▲", "▼"], strict=False):
        assert row[0] == each.run
        for measure, cell in zip(MEASURES, row[1:], strict=True):
            assert cell.endswith(mark)
            assert float(cell.strip("*▲▼")) == pytest.approx(each.means[measure], abs=1e-6)
            assert cell.startswith("**") == (each.run == "a|b_50%")
    details = rows[len(evaluations) + 2 :]
    assert len(details) == len(comparisons)
    for each, row in zip(comparisons, details, strict=True):
        assert row[:3] == [each.run, each.baseline, each.measure]
        assert float(row[3].strip("▲▼").replace("−", "-")) == pytest.approx(each.difference, abs=1e-6)
        assert row[5] == f"{each.wins}/{each.ties}/{each.losses}"


def test_csv_has_full_precision(evaluations, comparisons):
    rows = list(csv.DictReader(io.StringIO(render(evaluations, format="csv"))))
    assert [row["run"] for row in rows] == [each.run for each in evaluations]
    assert [int(row["queries"]) for row in rows] == [60, 60, 60]
    assert [float(row["RR@10"]) for row in rows] == [each.means["RR@10"] for each in evaluations]
    rows = list(csv.DictReader(io.StringIO(render(evaluations, comparisons, format="csv"))))
    for each, row in zip(comparisons, rows, strict=True):
        assert float(row["mean"]) == each.mean
        assert float(row["interval_low"]) == each.interval[0]
        assert float(row["p_permutation_holm"]) == each.corrected["permutation"]
        assert int(row["wins"]) == each.wins


def test_json_holds_everything(evaluations, comparisons):
    content = json.loads(render(evaluations, comparisons, format="json", test="permutation", alpha=0.01))
    assert [each["means"] for each in content["runs"]] == [each.means for each in evaluations]
    assert content["runs"][2]["unranked"] == 2
    assert (content["test"], content["alpha"]) == ("permutation", 0.01)
    for each, row in zip(comparisons, content["comparisons"], strict=True):
        assert row["corrected"] == each.corrected
        assert row["significant"] == each.significant("permutation", 0.01)
    assert "comparisons" not in json.loads(render(evaluations, format="json"))


def test_text_is_aligned_and_explains_itself(evaluations, comparisons):
    text = render(evaluations, comparisons)
    header, rule, *rows = text.splitlines()
    assert set(rule) == {"─"}
    ends = [match.end() for match in re.finditer(r"\S+@10", header)]
    for row in rows[:3]:
        assert [match.end() for match in re.finditer(r"\d\.\d{4}", row)] == ends
    assert "60 queries" in text
    assert "worse does not rank 2 of them" in text
    assert "paired t-test, p ≤ 0.05, Holm-corrected over 4 comparisons" in text


def test_latex_is_escaped_and_balanced(evaluations, comparisons):
    text = render(evaluations, comparisons, format="latex")
    assert r"a\textbar{}b\_50\%" in text
    assert r"\textbf{" in text
    assert "$^{+}$" in text
    assert "$^{-}$" in text
    assert not re.search(r"[▲▼≤−…]", text)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    rows = re.search(r"\\midrule\n(.*?)\\bottomrule", text, re.S)[1].splitlines()
    assert [row.count(" & ") for row in rows] == [2, 2, 2]


def test_marks_are_about_the_first_baseline_and_need_significance(evaluations):
    pairs = compare_all_pairs(evaluations, resamples=200)
    marks = {row[0].text: row[1].mark for row in measure_table(evaluations, pairs).rows}
    assert marks == {"base": "", "a|b_50%": "▲", "worse": "▼"}
    strict = measure_table(evaluations, pairs, alpha=0.0)
    assert not any(cell.mark for row in strict.rows for cell in row)


def test_missing_values_are_dashes_not_zeros():
    empty = Evaluation("run", ("CandR_clean@5",), ("q1",), frozenset(), {"CandR_clean@5": {}})
    assert "–" in render([empty])
    assert "over the 0 queries with a relevant candidate" in render([empty])
    assert json.loads(render([empty], format="json"))["runs"][0]["means"] == {"CandR_clean@5": None}


def test_an_unknown_format_is_named(evaluations):
    with pytest.raises(OptionError, match="did you mean 'markdown'"):
        render(evaluations, format="markdwon")


def test_costs_stand_in_a_table_of_their_own(evaluations):
    costs = {"base": Cost(2.0, 4, 100, 9000, padding=1000, flops=8 * 10**14, peak_memory=3 * 2**30)}
    header, _, *rows = markdown_rows(render(evaluations, format="markdown", costs=costs))[len(evaluations) + 2 :]
    mean = evaluations[0].means["nDCG@10"]
    expected = ["50.0", "4,500", "10.0", "–", "200", "5.00", f"{5 * mean:.2f}", "3,072", "–"]
    assert header[4:8] == ["cached %", "TFLOP/query", "QPP", "RPP nDCG@10"]
    assert rows[0] == ["base", *expected]
    assert rows[2] == ["worse", *["–"] * 9]
    assert "QPP" not in render(evaluations, format="markdown")


def test_programs_read_costs_too(evaluations):
    costs = {"worse": Cost(2.0, 4, 100, 9000, flops=8 * 10**14)}
    quality = 5 * evaluations[2].mean_of_ranked("nDCG@10")
    runs = json.loads(render(evaluations, format="json", costs=costs))["runs"]
    assert [run["cost"] is None for run in runs] == [True, True, False]
    assert runs[2]["cost"]["quality_per_petaflop"] == quality
    rows = list(csv.DictReader(io.StringIO(render(evaluations, format="csv", costs=costs))))
    assert [row["cost_queries_per_petaflop"] for row in rows] == ["", "", "5.0"]
    assert float(rows[2]["cost_quality_per_petaflop"]) == quality
    assert "cost" not in json.loads(render(evaluations, format="json"))["runs"][0]


def test_quality_and_work_are_of_the_same_queries():
    per_query = {"RR@10": {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.0}}
    evaluation = Evaluation("part", ("RR@10",), ("a", "b", "c", "d"), frozenset("cd"), per_query)
    costs = {"part": Cost(1.0, 2, 20, 900, flops=4 * 10**14)}  # of the two that are ranked
    (run,) = json.loads(render([evaluation], format="json", costs=costs))["runs"]
    assert run["cost"]["quality_per_petaflop"] == 0.75 * 5
    assert evaluation.means["RR@10"] == 0.375


def test_a_csv_of_comparisons_does_not_lose_costs_silently(evaluations, comparisons):
    with pytest.raises(OptionError, match="has no place for costs"):
        render(evaluations, comparisons, format="csv", costs={})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.012345, "0.0123"), (1.0, "1.00"), (99.96, "100.0"), (1234.5, "1,234"), (None, "–")],
)
def test_significant_digits(value, text):
    assert rounded(value) == text


@pytest.mark.parametrize(("option", "value"), [("digits", -1), ("digits", 18), ("alpha", 7), ("alpha", -0.1)])
@pytest.mark.parametrize("format", ["text", "csv"])
def test_numbers_out_of_range_are_named(evaluations, format, option, value):
    with pytest.raises(OptionError, match=f"{option} is {value}; it must be between 0 and"):
        render(evaluations, format=format, **{option: value})
