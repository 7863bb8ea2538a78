import json

import numpy as np
import pytest
import torch
from sentence_transformers.cross_encoder.evaluation import (
    CrossEncoderCorrelationEvaluator,
    CrossEncoderNanoBEIREvaluator,
    CrossEncoderRerankingEvaluator,
)

from mini_candidates import mini_qrels
from qpeft.errors import OptionError
from qpeft.integrations.sentence_transformers import CrossEncoder
from qpeft.types import Passage

PAIRS = [
    ("why is the sky blue", "Bread rises because of yeast."),
    ("why is the sky blue", "Air scatters short waves more than long ones."),
    ("what makes the sea salty", "Rivers carry minerals to the sea."),
]


@pytest.fixture(scope="module")
def encoder(tiny):
    """Return the embedded model as a CrossEncoder."""
    return CrossEncoder(tiny)


def test_predict_returns_what_was_asked_for(encoder, tiny):
    wanted = tiny.predict(PAIRS)
    scores = encoder.predict(PAIRS, batch_size=2, show_progress_bar=True)
    assert isinstance(scores, np.ndarray)
    assert scores.dtype == np.float32
    assert list(scores) == pytest.approx(wanted)
    tensor = encoder.predict(PAIRS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.tolist() == pytest.approx(wanted)
    listed = encoder.predict(PAIRS, convert_to_numpy=False)
    assert isinstance(listed, list)
    assert [float(each) for each in listed] == pytest.approx(wanted)
    assert list(encoder.predict(sentences=[list(pair) for pair in PAIRS])) == pytest.approx(wanted)
    assert float(encoder.predict(PAIRS[2])) == pytest.approx(wanted[2])
    assert encoder.predict(PAIRS[2]).shape == ()
    assert encoder.predict([]).shape == (0,)


def test_batches_reach_across_queries(tiny, candidates):
    encoder = CrossEncoder("tiny-lm", dtype="float32", device="cpu", queries_per_batch=2)
    sizes = []
    score = encoder.reranker._scorer.score
    encoder.reranker._scorer.score = lambda pairs: sizes.append(len(pairs)) or score(pairs)
    assert list(encoder.predict(PAIRS)) == pytest.approx(tiny.predict(PAIRS), abs=1e-4)
    assert sizes == [3], "two queries, three pairs"


def test_activation(encoder, tiny):
    wanted = torch.tensor(tiny.predict(PAIRS)).sigmoid()
    assert list(encoder.predict(PAIRS, activation_fn=torch.nn.Sigmoid())) == pytest.approx(wanted.tolist())
    ranked = encoder.rank(PAIRS[0][0], [passage for _, passage in PAIRS[:2]], activation_fn=lambda scores: -scores)
    assert [entry["corpus_id"] for entry in ranked] == [0, 1]


def test_rank_equals_the_rerankers_own(encoder, tiny, candidates):
    texts = [passage.text for passage in candidates[0].passages] * 2
    query = candidates[0].query.text
    assert encoder.rank(query, texts) == tiny.rank(query, texts)
    assert encoder.rank(query, texts, top_k=3, return_documents=True, batch_size=8) == tiny.rank(
        query, texts, top_k=3, return_documents=True
    )


@pytest.mark.parametrize("option", ["prompt", "prompt_name", "device", "pool", "chunk_size"])
def test_what_would_have_no_effect_is_refused(encoder, option):
    assert len(encoder.predict(PAIRS, **{option: None})) == 3
    with pytest.raises(OptionError, match=option):
        encoder.predict(PAIRS, **{option: "something"})


def samples(candidates):
    """Return the candidates in the form of CrossEncoderRerankingEvaluator."""
    qrels = mini_qrels()
    return [
        {
            "query": item.query.text,
            "positive": [p.text for p in item.passages if qrels[item.query.id].get(p.id, 0) > 0],
            "documents": [p.text for p in item.passages],
        }
        for item in candidates
    ]


def test_the_reranking_evaluator(encoder, candidates, offline, tmp_path):
    evaluator = CrossEncoderRerankingEvaluator(samples(candidates), name="mini", always_rerank_positives=False)
    results = evaluator(encoder, output_path=str(tmp_path))
    reciprocal_ranks = []
    for item in candidates:
        ranked = sorted(offline[item.query.id], key=lambda passage_id: -offline[item.query.id][passage_id])
        relevant = [mini_qrels()[item.query.id].get(passage_id, 0) > 0 for passage_id in ranked]
        reciprocal_ranks.append(1 / (relevant.index(True) + 1) if any(relevant) else 0.0)
    assert results["mini_mrr@10"] == pytest.approx(np.mean(reciprocal_ranks))
    assert len(list(tmp_path.glob("*.csv"))) == 1
    worst = evaluator(CrossEncoder(encoder.reranker), output_path=None)
    assert worst == pytest.approx(results)


def test_the_correlation_evaluator(encoder):
    evaluator = CrossEncoderCorrelationEvaluator([list(pair) for pair in PAIRS], [1.0, 0.0, 1.0], name="toy")
    assert -1 <= evaluator(encoder)["toy_spearman"] <= 1


def test_the_nano_beir_evaluator(encoder, candidates, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs qpeft[mteb]")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    qrels = mini_qrels()
    tables = {
        "corpus": [{"_id": p.id, "text": p.text} for item in candidates for p in item.passages],
        "queries": [{"_id": item.query.id, "text": item.query.text} for item in candidates],
        "qrels": [
            {"query-id": item.query.id, "corpus-id": p.id}
            for item in candidates
            for p in item.passages
            if qrels[item.query.id].get(p.id, 0) > 0
        ],
        "bm25": [{"query-id": item.query.id, "corpus-ids": [p.id for p in item.passages]} for item in candidates],
    }
    folder = tmp_path / "nano"
    folder.mkdir()
    lines = ["---", "configs:"]
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: NanoMSMARCO\n    path: {name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---"]))
    results = CrossEncoderNanoBEIREvaluator(["msmarco"], dataset_id=str(folder), batch_size=4)(encoder)
    alone = CrossEncoderRerankingEvaluator(samples(candidates), name="mini")(encoder)
    assert results["NanoBEIR_R100_mean_mrr@10"] == pytest.approx(alone["mini_mrr@10"])


@pytest.mark.parametrize("options", [{"convert_to_numpy": False}, {"convert_to_tensor": True}])
def test_rank_returns_numbers_whatever_is_asked_of_predict(encoder, options):
    texts = [passage for _, passage in PAIRS[:2]]
    assert encoder.rank(PAIRS[0][0], texts, **options) == encoder.rank(PAIRS[0][0], texts)


def test_a_text_in_the_place_of_several_is_refused(encoder):
    with pytest.raises(OptionError, match="documents is one text, 'abc'"):
        encoder.rank("sky", "abc")
    with pytest.raises(OptionError, match="pairs is one text, 'ab'"):
        encoder.predict("ab")


def test_what_is_no_text_is_not_read_as_one(encoder, tiny):
    with pytest.raises(OptionError, match="its text is None, not a text"):
        encoder.predict([("sky", None)])
    with pytest.raises(OptionError, match="its text is None, not a text"):
        encoder.predict([(None, "sky")])
    passage = Passage("a", "The sky is blue.", "Sky")
    assert encoder.predict([("sky", passage)]).tolist() == pytest.approx(tiny.predict([("sky", passage)]), abs=1e-6)
