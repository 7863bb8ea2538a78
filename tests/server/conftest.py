import pytest

from qpeft.methods.query_likelihood import Config, build_scorer
from qpeft.types import Passage, Query
from tiny_server import Watched, ready


@pytest.fixture(scope="module")
def lm(make_lm):
    return Watched(make_lm("qwen3"))


@pytest.fixture(scope="module")
def client(lm):
    with ready(lambda: lm) as client:
        yield client


@pytest.fixture
def offline(lm):
    """Return a function that scores documents as `qpeft score` would."""

    def score(query, documents, **options):
        scorer = build_scorer(Config(**options), lm)
        return scorer.score([(Query("q", query), Passage("p", document)) for document in documents])

    return score
