"""Generated requests, good and bad: never a fault of the server, and never an answer that the documentation denies."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from qpeft.server.app import create_app
from qpeft.server.dialects import requests
from qpeft.server.settings import Settings
from tiny_server import Watched, ready

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
FEW = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
ROUTES = ("/v1/rerank", "/v2/rerank", "/rerank", "/score", "/v1/rerank/batch")


@pytest.fixture(scope="module")
def server(make_lm):
    with ready(lambda: Watched(make_lm("llama")), Settings(port=0, max_wait_ms=0)) as client:
        yield client


API = schemathesis.openapi.from_dict(create_app(Settings(), lambda: None).openapi())
OPERATIONS = [found.ok() for found in API.get_all_operations()]


CASES = [(operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
CASES += [(operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation.body]


@pytest.mark.parametrize(("operation", "mode"), CASES, ids=lambda each: getattr(each, "label", None))
def test_requests_made_from_the_documentation(server, operation, mode):
    @given(case=operation.as_strategy(generation_mode=mode))
    @FEW
    def ask(case):
        case.call_and_validate(base_url=str(server.base_url), checks=CHECKS, timeout=120)  # of a busy machine

    ask()


names = st.text(st.characters(), max_size=5)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=10,
)
REQUESTS = (requests.RerankV1, requests.RerankTei, requests.RerankDocuments, requests.RerankBatch, requests.Score)
NAMES = sorted({name for request in REQUESTS for name in request.model_fields})
texts = st.text(st.characters(), max_size=30)  # lone surrogates too
plausible = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(NAMES, anything),
        "query": texts,
        "rank_fields": st.lists(st.sampled_from(["", "a"]) | texts, max_size=2) | anything,
        "documents": st.lists(
            texts | st.dictionaries(st.sampled_from(["", "a", "text"]) | texts, texts | anything, max_size=3),
            max_size=4,
        ),
        "texts": st.lists(texts, max_size=4),
        "text_1": texts | st.lists(texts, max_size=3),
        "text_2": texts | st.lists(texts, max_size=3),
        "queries": st.lists(st.fixed_dictionaries({"query": texts, "documents": st.lists(texts)}), max_size=3),
    },
)


@pytest.mark.parametrize("route", ROUTES)
@given(body=plausible | anything)
@settings(FEW, max_examples=60)
def test_whatever_json_comes_it_is_no_fault_of_the_server(server, route, body):
    response = server.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404, 413, 422), response.text
    json.loads(response.content.decode("utf-8"))


@pytest.mark.parametrize("route", ROUTES)
@given(content=st.binary(max_size=50))
@settings(FEW, max_examples=30)
def test_whatever_bytes_come_it_is_no_fault_of_the_server(server, route, content):
    response = server.post(route, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
