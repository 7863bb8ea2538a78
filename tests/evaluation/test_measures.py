import shutil

import ir_measures
import numpy as np
import pytest
import pytrec_eval

from qpeft.errors import InputError, OptionError
from qpeft.evaluation.answers import has_answer, judge
from qpeft.evaluation.measures import evaluate, parse_measures
from qpeft.types import Hit, Ranking, Run

TREC_EVAL = {
    "nDCG@10": "ndcg_cut_10",
    "nDCG": "ndcg",
    "AP": "map",
    "AP@20": "map_cut_20",
    "RR": "recip_rank",
    "P@5": "P_5",
    "R@20": "recall_20",
    "Success@5": "success_5",
    "Rprec": "Rprec",
    "Bpref": "bpref",
}


def ranked(query_id, passage_ids):
    return Ranking.from_scores(query_id, [(p, -float(rank)) for rank, p in enumerate(passage_ids)])


def random_collection(seed, queries=30, depth=60):
    """Scores with many exact ties, and some that are distinct in float64 but not as trec_eval's floats."""
    rng = np.random.default_rng(seed)
    scores, qrels = {}, {}
    for number in range(queries):
        ids = [f"p{passage}" for passage in rng.choice(300, depth, replace=False)]
        values = rng.integers(0, 8, depth) / 7 + rng.choice([0, 1e-9, 2e-9], depth)
        scores[f"q{number}"] = dict(zip(ids, values.tolist(), strict=True))
        judged = [*rng.choice(ids, 12, replace=False).tolist(), *(f"p{passage}" for passage in range(300, 305))]
        qrels[f"q{number}"] = dict(zip(judged, rng.integers(0, 4, len(judged)).tolist(), strict=True))
    return scores, qrels


@pytest.mark.parametrize("seed", range(4))
def test_values_are_trec_evals_on_runs_with_ties(seed):
    scores, qrels = random_collection(seed)
    expected = pytrec_eval.RelevanceEvaluator(qrels, set(TREC_EVAL.values())).evaluate(scores)
    run = Run((Ranking.from_scores(q, of_query.items()) for q, of_query in scores.items()), "random")
    found = evaluate(run, qrels, " ".join(TREC_EVAL))
    for measure, name in TREC_EVAL.items():
        for query_id in qrels:
            assert found.per_query[measure][query_id] == pytest.approx(expected[query_id][name], abs=1e-12)
        assert found.means[measure] == pytest.approx(np.mean([values[name] for values in expected.values()]))


def test_reciprocal_rank_with_a_cutoff_is_trec_evals_up_to_that_rank():
    scores, qrels = random_collection(7)
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(scores)
    run = Run((Ranking.from_scores(q, of_query.items()) for q, of_query in scores.items()), "random")
    for query_id, value in evaluate(run, qrels, "RR@3").per_query["RR@3"].items():
        uncut = expected[query_id]["recip_rank"]
        assert value == pytest.approx(uncut if uncut >= 1 / 3 else 0.0)


def test_the_order_of_the_ranking_is_evaluated_whatever_its_scores_say():
    run = Run([Ranking("q", (Hit("good", 0.5), Hit("zzz", 0.5), Hit("bad", 0.9)))], "order only")
    assert evaluate(run, {"q": {"good": 1}}, "RR@10 nDCG@10 AP").means == {"RR@10": 1.0, "nDCG@10": 1.0, "AP": 1.0}


def test_all_judged_queries_count_and_no_others():
    run = Run([ranked("q1", ["a", "b"]), ranked("unjudged", ["a"])], "run")
    found = evaluate(run, {"q1": {"b": 1}, "missing": {"a": 1}, "nothing judged": {}}, "RR@10 AP CandR@1 CandR_clean@1")
    assert found.queries == ("q1", "missing", "nothing judged")
    assert found.unranked == {"missing", "nothing judged"}
    assert found.per_query["RR@10"] == {"q1": 0.5, "missing": 0.0, "nothing judged": 0.0}
    assert found.per_query["AP"] == {"q1": 0.5, "missing": 0.0, "nothing judged": 0.0}
    assert found.per_query["CandR@1"] == {"q1": 0.0, "missing": 0.0, "nothing judged": 0.0}
    assert found.per_query["CandR_clean@1"] == {"q1": 0.0, "missing": 0.0}, "to skip a query must not pay"
    assert found.means["RR@10"] == pytest.approx(0.5 / 3)


def test_means_of_what_a_run_ranks():
    relevant = {query: {"a": 1} for query in ("found", "also", "lost", "skipped", "skipped too")}
    run = Run([ranked("found", ["a"]), ranked("also", ["a"]), ranked("lost", ["b"])], "sample")
    evaluation = evaluate(run, relevant, "RR@10 CandR_clean@10")
    assert evaluation.mean_of_ranked("RR@10") == pytest.approx(2 / 3)
    assert evaluation.mean_of_ranked("CandR_clean@10") == 1.0
    assert evaluate(Run([], "none"), relevant, "RR@10").mean_of_ranked("RR@10") is None


def test_ids_that_never_meet_are_an_error():
    run = Run([ranked("1", ["a"])], "run")
    with pytest.raises(InputError, match="run 'run' ranks '1' and others, but no judged query, such as 1"):
        evaluate(run, {1: {"a": 1}}, "RR@10")


def test_grades_of_numpy_and_measures_of_ir_measures():
    run = Run([ranked("q", ["a", "b"])], "run")
    wanted = evaluate(run, {"q": {"b": 2}}, "nDCG@10 RR@10").means
    assert evaluate(run, {"q": {"b": np.int64(2)}}, [ir_measures.nDCG @ 10, ir_measures.RR @ 10]).means == wanted


def test_no_judged_query_is_an_error():
    with pytest.raises(InputError, match="no judged queries"):
        evaluate(Run([], "empty"), {}, "RR@10")


@pytest.mark.skipif(shutil.which("perl") is None, reason="gdeval is a Perl program")
def test_measures_of_gdeval_work_with_any_query_id():
    run = Run([ranked("q-one", ["z", "y", "x"])], "run")
    # Chapelle et al. 2009 with grades up to 4: R_1 = 3/16, R_2 = 1/16
    assert evaluate(run, {"q-one": {"z": 2, "y": 1}}, "ERR@20").means["ERR@20"] == pytest.approx(
        3 / 16 + (13 / 16) * (1 / 16) / 2, abs=1e-5
    )
    with pytest.raises(OptionError, match="ERR@20"):
        evaluate(Run([ranked("q", ["a"])], "run"), {"q": {"an id with blanks": 1}}, "ERR@20")


def test_candidate_measures_by_hand():
    run = Run([ranked("q1", list("abcde")), ranked("q2", list("abcde")), ranked("q3", list("abcde"))], "run")
    qrels = {"q1": {"a": 1, "d": 1, "not a candidate": 1}, "q2": {"e": 2, "d": 1}, "q3": {"elsewhere": 1}}
    found = evaluate(
        run, qrels, "CandR@1 CandR@2 CandHit@2 CandR_clean@2 CandHit_clean@2 CandR(rel=2)@5 CandR(depth=4)@4"
    )
    assert found.per_query == {
        "CandR@1": {"q1": 0.5, "q2": 0.0, "q3": 0.0},
        "CandR@2": {"q1": 0.5, "q2": 0.0, "q3": 0.0},
        "CandHit@2": {"q1": 1.0, "q2": 0.0, "q3": 0.0},
        "CandR_clean@2": {"q1": 0.5, "q2": 0.0},
        "CandHit_clean@2": {"q1": 1.0, "q2": 0.0},
        "CandR(rel=2)@5": {"q1": 0.0, "q2": 1.0, "q3": 0.0},
        "CandR(depth=4)@4": {"q1": 1.0, "q2": 1.0, "q3": 0.0},
    }
    assert found.means["CandR@2"] == pytest.approx(0.5 / 3)
    assert found.means["CandR_clean@2"] == pytest.approx(0.25)


def test_the_mean_of_a_clean_measure_over_no_query_is_not_a_number_made_up():
    found = evaluate(Run([ranked("q", ["a"])], "run"), {"q": {"b": 1}}, "CandR_clean@5 CandR@5")
    assert found.means == {"CandR_clean@5": None, "CandR@5": 0.0}


def test_candidate_recall_is_trec_evals_recall_where_every_relevant_passage_is_a_candidate():
    scores, qrels = random_collection(11)
    inside = {q: {p: g for p, g in grades.items() if p in scores[q]} for q, grades in qrels.items()}
    run = Run((Ranking.from_scores(q, of_query.items()) for q, of_query in scores.items()), "random")
    found = evaluate(run, inside, "CandR@20 R@20 CandHit@5 Success@5")
    assert found.per_query["CandR@20"] == pytest.approx(found.per_query["R@20"])
    assert found.per_query["CandHit@5"] == found.per_query["Success@5"]


def test_judge_labels_each_candidate_once():
    asked = []

    def label(query_id, passage_id):
        asked.append((query_id, passage_id))
        return passage_id == "b"

    runs = [Run([ranked("q", ["a", "b"])], "one"), Run([ranked("q", ["b", "c"])], "two")]
    assert judge(runs, label) == {"q": {"a": 0, "b": 1, "c": 0}}
    assert asked == [("q", "a"), ("q", "b"), ("q", "c")]


def test_answer_strings_can_stand_in_for_judgements():
    texts = {"a": "Focus on this.", "b": "Paris, in France.", "c": "The U.S. and Paris"}
    answers = {"q1": ["paris"], "q2": ["us"]}
    run = Run([ranked("q1", "abc"), ranked("q2", "abc")], "run")
    labels = judge([run], lambda query_id, passage_id: has_answer(texts[passage_id], answers[query_id]))
    found = evaluate(run, labels, "CandR@2 CandHit@2 CandR_clean@2 RR")
    assert found.means == {"CandR@2": 0.25, "CandHit@2": 0.5, "CandR_clean@2": 0.5, "RR": 0.25}


def test_notation_is_made_canonical_and_repetitions_dropped():
    parsed = parse_measures("MRR@10, RR@10 Recall@5 P(rel=2, judged_only=True)@5\nCandHit_clean(depth=100)@10")
    assert [str(measure) for measure in parsed] == [
        "RR@10",
        "R@5",
        "P(rel=2,judged_only=True)@5",
        "CandHit_clean(depth=100)@10",
    ]
    assert parse_measures(["RR@10", "R@5"]) == parse_measures("RR@10 R@5")


@pytest.mark.parametrize(
    ("notation", "message"),
    [
        ("ndcg@10", "did you mean 'nDCG'"),
        ("Sucess@10", "did you mean 'Success'"),
        ("CandHits@10", "did you mean 'CandHit'"),
        ("nDCG", None),
        ("R", "needs its cutoff"),
        ("CandR", "needs its cutoff"),
        ("R@0", "at least 1"),
        ("R@1.5", "at least 1"),
        ("CandR(depth=0)@5", "at least 1"),
        ("R@-1", "cannot be read"),
        ("nDCG@10@5", "cannot be read"),
        ("P(rel=2", "cannot be read"),
        ("P(rell=2)@5", "did you mean 'rel'"),
        ("P(2)@5", "name=value"),
        ("P(rel=__import__('os'))@5", "cannot be read|name=value"),
        ("nDCG(dcg='no')@5", "dcg cannot be 'no'"),
        ("alpha_nDCG@10", "nothing installed computes it|^$"),
        ("  ", "no measure"),
    ],
)
def test_what_cannot_be_read_is_named(notation, message):
    if message is None:
        parse_measures(notation)
        return
    with pytest.raises(OptionError, match=message):
        parse_measures(notation)


def test_candidate_measures_alone_need_nothing_else():
    assert evaluate(Run([ranked("q", ["a"])], "run"), {"q": {"a": 1}}, "CandHit@5").means == {"CandHit@5": 1.0}


def test_a_skipped_query_without_anything_relevant_enough_is_left_out():
    run = Run([ranked("q", ["a"])], "run")
    found = evaluate(run, {"q": {"a": 2}, "low": {"a": 1}, "high": {"a": 2}}, "CandR_clean(rel=2)@1")
    assert found.per_query["CandR_clean(rel=2)@1"] == {"q": 1.0, "high": 0.0}
