import pandas as pd
import pyterrier as pt
import pytest

from mini_candidates import mini_candidates, mini_qrels
from qpeft import Reranker, Run
from qpeft.errors import InputError
from qpeft.evaluation.measures import evaluate
from qpeft.integrations.pyterrier import QpeftReRanker

# pyterrier 1.1 under pandas 3.1
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword:pandas.errors.Pandas4Warning")


@pytest.fixture(scope="module")
def titled():
    """Return candidates whose passages have titles."""
    return mini_candidates(titles=True)


@pytest.fixture(scope="module")
def frame(titled):
    """Return the candidates as a PyTerrier result frame."""
    rows = [
        {"qid": item.query.id, "query": item.query.text, "docno": p.id, "text": p.text, "title": p.title, "score": s}
        for item in titled
        for p, s in zip(item.passages, item.scores, strict=True)
    ]
    return pt.model.add_ranks(pd.DataFrame(rows))


@pytest.fixture(scope="module")
def wanted(tiny, titled):
    """Return the offline rankings of passages with titles."""
    return {item.query.id: ranking for item, ranking in zip(titled, tiny.rerank(titled), strict=True)}


def scores_of(frame):
    return {(row.qid, row.docno): row.score for row in frame.itertuples()}


def test_scores_and_ranks_are_the_offline_ones(tiny, frame, wanted):
    before = frame.copy()
    found = QpeftReRanker(tiny)(frame.assign(extra=range(len(frame))))
    pd.testing.assert_frame_equal(frame, before)
    assert scores_of(found) == pytest.approx({(q, hit.passage_id): hit.score for q in wanted for hit in wanted[q].hits})
    for qid, rows in found.groupby("qid"):
        assert list(rows.sort_values("rank").docno) == [hit.passage_id for hit in wanted[qid].hits]
        assert sorted(rows["rank"]) == list(range(len(rows)))
    assert list(found.extra) == list(range(len(frame)))
    assert list(found.docno) == list(frame.docno)
    assert set(found.columns) == {*frame.columns, "extra"}


def test_titles_are_read_where_there_are_some(tiny, frame, offline):
    found = QpeftReRanker(tiny)(frame.drop(columns="title"))
    assert scores_of(found) == pytest.approx({(q, p): s for q, scores in offline.items() for p, s in scores.items()})
    assert scores_of(found) != pytest.approx(scores_of(QpeftReRanker(tiny)(frame)))


def test_rows_may_come_in_any_order_and_with_any_index(tiny, frame):
    shuffled = frame.sample(frac=1, random_state=3)
    assert list(shuffled.index) != sorted(shuffled.index)
    found = QpeftReRanker(tiny)(shuffled)
    assert scores_of(found) == pytest.approx(scores_of(QpeftReRanker(tiny)(frame)))


def test_batches_reach_across_queries(frame, titled, wanted):
    reranker = Reranker.from_pretrained("tiny-lm", dtype="float32", device="cpu", queries_per_batch=len(titled))
    sizes = []
    score = reranker._scorer.score
    reranker._scorer.score = lambda pairs: sizes.append(len(pairs)) or score(pairs)
    found = QpeftReRanker(reranker)(frame)
    assert sizes == [len(frame)]
    assert scores_of(found) == pytest.approx(
        {(q, hit.passage_id): hit.score for q in wanted for hit in wanted[q].hits}, abs=1e-4
    )


def test_an_experiment_gives_our_own_measures(tiny, frame, wanted):
    pt_qrels = pd.DataFrame(
        [(q, p, grade) for q, judged in mini_qrels().items() if q in wanted for p, grade in judged.items()],
        columns=["qid", "docno", "label"],
    )
    first_stage = pt.Transformer.from_df(frame)
    topics = frame[["qid", "query"]].drop_duplicates()
    measures = [pt.measures.nDCG @ 10, pt.measures.RR @ 10]
    systems = [first_stage, first_stage >> QpeftReRanker(tiny), first_stage % 2 >> QpeftReRanker(tiny)]
    table = pt.Experiment(systems, topics, pt_qrels, measures, names=["bm25", "ours", "two"], plan="tree")
    judged = {q: grades for q, grades in mini_qrels().items() if q in wanted}
    means = evaluate(Run(wanted.values(), "ours"), judged, ["nDCG@10", "RR@10"]).means
    row = table.set_index("name").loc["ours"]
    assert row.to_dict() == pytest.approx({"nDCG@10": means["nDCG@10"], "RR@10": means["RR@10"]})
    assert not table.drop(columns="name").duplicated().any(), "three systems that differ"


def test_sliding_windows_compose(tiny, frame):
    pipe = (
        pt.text.sliding(text_attr="text", length=10, stride=5, prepend_attr=None)
        >> QpeftReRanker(tiny)
        >> pt.text.max_passage()
    )
    first = frame.head(3).drop(columns=["score", "rank", "title"])
    found = pipe(first)
    assert set(found.docno) == set(first.docno)


def test_what_pyterrier_asks_of_a_transformer(tiny, frame):
    ranker = QpeftReRanker(tiny)
    assert [set(names) for names in pt.inspect.transformer_inputs(ranker)] == [{"qid", "query", "docno", "text"}]
    assert set(pt.inspect.transformer_outputs(ranker, ["qid", "query", "docno", "text"])) == {
        "qid", "query", "docno", "text", "score", "rank"
    }  # fmt: skip
    assert len(ranker(frame.head(0))) == 0
    records = ranker(frame.to_dict(orient="records"))
    assert [record["docno"] for record in records] == list(frame.docno)


def test_bad_frames(tiny, frame):
    with pytest.raises(pt.validate.InputValidationError, match="text"):
        QpeftReRanker(tiny)(frame.drop(columns="text"))
    holed = frame.copy()
    holed.loc[2, "text"] = None
    with pytest.raises(InputError, match=f"document '{frame.docno[2]}': it has no text"):
        QpeftReRanker(tiny)(holed)
    twice = frame.copy()
    twice.loc[1, "query"] = "another"
    with pytest.raises(InputError, match=f"query '{frame.qid[1]}' has several texts: "):
        QpeftReRanker(tiny)(twice)


def test_java_was_not_started():
    assert not pt.java.started()
