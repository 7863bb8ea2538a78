import json

import mteb
import pytest
from datasets import Dataset
from mteb.mocks.mock_tasks.reranking import MockRerankingTask

from mini_candidates import mini_qrels
from qpeft.integrations.mteb import QpeftCrossEncoder


class MiniReranking(MockRerankingTask):
    """mteb's own reranking task, over our candidates instead of its two documents."""

    candidates = ()

    def load_data(self, num_proc=None, **kwargs):
        passages = {p.id: p for item in self.candidates for p in item.passages}
        ids = {item.query.id for item in self.candidates}
        self.dataset = {
            "default": {
                "test": {
                    "corpus": Dataset.from_list([{"id": p.id, "title": "", "text": p.text} for p in passages.values()]),
                    "queries": Dataset.from_list([{"id": i.query.id, "text": i.query.text} for i in self.candidates]),
                    "relevant_docs": {q: dict(judged) for q, judged in mini_qrels().items() if q in ids},
                    "top_ranked": {i.query.id: [p.id for p in i.passages] for i in self.candidates},
                }
            }
        }
        self.data_loaded = True


def test_a_reranking_task_gives_the_offline_scores(tiny, candidates, offline, tmp_path):
    model = QpeftCrossEncoder(tiny, name="qpeft/tiny-lm")
    assert isinstance(model, mteb.CrossEncoderProtocol)
    task = MiniReranking()
    task.candidates = candidates
    results = mteb.evaluate(
        model,
        [task],
        cache=None,
        encode_kwargs={"batch_size": 7},
        prediction_folder=tmp_path,
        show_progress_bar=False,
    )
    assert results.model_name == "qpeft/tiny-lm"
    (path,) = tmp_path.glob("*.json")
    predictions = json.loads(path.read_text())["default"]["test"]
    assert predictions.keys() == offline.keys()
    for query_id, scores in predictions.items():
        assert scores == pytest.approx(offline[query_id])
