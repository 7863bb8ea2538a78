import pytest

from mini_candidates import mini_candidates
from qpeft import Reranker


@pytest.fixture(scope="session")
def tiny():
    """Return the embedded model as a reranker whose scores do not depend on the machine's choice of number type."""
    return Reranker.from_pretrained("tiny-lm", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def candidates():
    """Return five queries with six passages each."""
    return mini_candidates()


@pytest.fixture(scope="session")
def offline(tiny, candidates):
    """Return the scores that `Reranker.rerank` gives, by query id and passage id."""
    rankings = zip(candidates, tiny.rerank(candidates), strict=True)
    return {item.query.id: {hit.passage_id: hit.score for hit in ranking.hits} for item, ranking in rankings}


@pytest.fixture(scope="session")
def order(offline):
    """Return a function that gives a query's passage ids, best first."""
    return lambda query_id: sorted(offline[query_id], key=lambda passage_id: -offline[query_id][passage_id])
