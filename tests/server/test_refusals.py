"""What is refused, with which status, which field is named, and in which words of which dialect."""

import json
import logging
import socket

import pytest

from qpeft.server.settings import Settings
from tiny_server import DOCUMENTS, QUERY, Watched, ready

GOOD = {"query": QUERY, "documents": DOCUMENTS[:2]}
LONG = " ".join(["the sea"] * 100)


@pytest.mark.parametrize(
    ("route", "body", "status", "param"),
    [
        ("/v1/rerank", {}, 422, "query"),
        ("/v2/rerank", {"query": QUERY}, 422, "documents"),
        ("/v2/rerank", {**GOOD, "documents": []}, 422, "documents"),
        ("/v2/rerank", {**GOOD, "documents": ["a", 3]}, 422, "documents.1"),
        ("/v2/rerank", {**GOOD, "documents": [{"text": 3}]}, 422, "documents.0.text"),
        ("/v2/rerank", {**GOOD, "documents": "a"}, 422, "documents"),
        ("/v2/rerank", {**GOOD, "query": ""}, 422, "query"),
        ("/v2/rerank", {**GOOD, "query": " \u0000\t"}, 422, "query"),
        ("/v2/rerank", {**GOOD, "query": LONG}, 422, "query"),
        ("/v2/rerank", {**GOOD, "query": None}, 422, "query"),
        ("/v2/rerank", {**GOOD, "top_n": -1}, 422, "top_n"),
        ("/v2/rerank", {**GOOD, "top_n": "many"}, 422, "top_n"),
        ("/v2/rerank", {**GOOD, "max_tokens_per_doc": -1}, 422, "max_tokens_per_doc"),
        ("/v2/rerank", {**GOOD, "model": 3}, 422, "model"),
        ("/v2/rerank", [], 422, "body"),
        ("/v2/rerank", "text", 422, "body"),
        ("/v2/rerank", {**GOOD, "model": "tiny-qwen"}, 404, "model"),
        ("/v2/rerank", {**GOOD, "documents": ["a"] * 21}, 413, "documents"),
        ("/v2/rerank", {**GOOD, "documents": ["a"] * 20, "explain": True}, 200, None),
        ("/v2/rerank", {**GOOD, "documents": [{"title": "a"}]}, 422, "documents.0.text"),
        ("/v1/rerank", {**GOOD, "documents": ["a", {"body": "a"}]}, 422, "documents.1.text"),
        ("/v1/rerank", {**GOOD, "documents": [3], "rank_fields": ["a"]}, 422, "documents.0"),
        ("/v1/rerank", {**GOOD, "rank_fields": []}, 422, "rank_fields"),
        ("/v1/rerank", {**GOOD, "documents": [{"text": "a"}], "rank_fields": [[]]}, 422, "rank_fields.0"),
        ("/v1/rerank", {**GOOD, "documents": [{"a": 1}, {"b": 1}], "rank_fields": ["a"]}, 422, "rank_fields"),
        ("/v1/rerank", {**GOOD, "documents": [{"a": None, "text": "b"}], "rank_fields": ["a"]}, 422, "rank_fields"),
        ("/v1/rerank", {**GOOD, "documents": [{"a": []}], "rank_fields": ["a"]}, 422, "rank_fields"),
        ("/v1/rerank", {**GOOD, "documents": [{"a": 1, "b": {}}], "rank_fields": ["a", "b"]}, 422, "rank_fields"),
        ("/v1/rerank", {**GOOD, "documents": [{"a": [1, [2]]}], "rank_fields": ["a"]}, 422, "rank_fields"),
        ("/rerank", {"query": QUERY}, 422, "documents"),
        ("/rerank", {**GOOD, "documents": [["a"]]}, 422, "documents.0"),
        ("/score", {"text_1": QUERY}, 422, "body"),
        ("/score", {"text_1": [QUERY, QUERY], "text_2": ["a", "b", "c"]}, 422, "body"),
        ("/score", {"text_1": QUERY, "text_2": [3]}, 422, "text_2.0"),
        ("/v1/rerank/batch", {"queries": []}, 422, "queries"),
        ("/v1/rerank/batch", {"queries": [GOOD, {"query": "a"}]}, 422, "queries.1.documents"),
        ("/v1/rerank/batch", {"queries": [GOOD, {**GOOD, "query": " "}]}, 422, "query"),  # its message says which
        ("/v1/rerank/batch", {"queries": [{**GOOD, "documents": ["a"] * 20}] * 6}, 413, None),
        ("/v1/nothing", {}, 404, None),
    ],
)
def test_bad_bodies(small, route, body, status, param):
    response = small.post(route, json=body)
    assert response.status_code == status, response.text
    if status != 200:
        found = response.json()
        assert set(found) == {"id", "message", "detail", "error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        assert (found["error"]["code"], found["error"]["param"]) == (status, param)
        assert found["message"] == found["detail"] == found["error"]["message"]
        assert "\n" not in found["message"]
        assert found["id"] == response.headers["x-request-id"]
        if param not in (None, "body"):
            assert param.split(".")[0] in found["message"]


@pytest.fixture(scope="module")
def small(make_lm):
    settings = Settings(port=0, max_wait_ms=0, max_documents=20, max_queue_pairs=100, max_body_mib=0.01)
    with ready(lambda: Watched(make_lm("llama")), settings) as client:
        yield client


@pytest.mark.parametrize(
    ("change", "status", "kind", "says"),
    [
        ({"texts": []}, 400, "Empty", "cannot be empty"),
        ({"texts": [3]}, 422, "Validation", "texts.0"),
        ({"query": 3}, 422, "Validation", "query"),
        ({"query": " "}, 422, "Validation", "empty"),
        ({"texts": ["a"] * 21}, 413, "Validation", "21 documents"),
        ({"texts": ["a", LONG], "truncate": False}, 413, "Validation", "document 1 does not fit"),
        ({"texts": ["a", LONG]}, 200, None, ""),
        ({"truncation_direction": "Left"}, 422, "Validation", "truncation_direction"),
        ({"model": "other"}, 404, "Validation", "no model 'other'"),
    ],
)
def test_tei_says_it_in_its_own_way(small, change, status, kind, says):
    response = small.post("/rerank", json={"query": QUERY, "texts": ["a"], **change})
    assert response.status_code == status, response.text
    if status != 200:
        assert set(response.json()) == {"error", "error_type"}
        assert response.json()["error_type"] == kind
        assert says in response.json()["error"]


def test_unknown_models_are_answered_with_the_nearest(small):
    message = small.post("/v2/rerank", json={**GOOD, "model": "tiny-lama"}).json()["message"]
    assert message == "no model 'tiny-lama'; did you mean 'tiny-llama'?"


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"", 422, "body"),
        (b'{"query": "a" "b"}', 400, "not JSON"),
        (b"\xff\xfe\xff", 400, "parsing the body"),
        (b"[" * 9000, 400, "parsing the body"),
        (b'{"query": "why", "documents": ["sky"], "top_n": NaN}', 422, "top_n"),
        (b'{"query": "why", "documents": ["sky"], "top_n": ' + b"9" * 5000 + b"}", 400, "parsing the body"),
        (b'{"query": "why", "documents": ["sky"], "other": [NaN, {"a": 1}]}', 200, "relevance_score"),
        (b'{"query": "why \\ud83d", "documents": ["\\udc00 sky", {"text": "\\ud800"}]}', 200, "\ufffd"),
        (b'{"query": "why", "documents": ["sky \\ud83d\\ude00 \\u0000\\u001b[31m\\u2028"]}', 200, "\U0001f600"),
        (b'{"query": "why", "documents": ["sky"], "model": "\\ud800\\u0000"}', 404, "no model"),
        (b'{"query": "why", "documents": [{"\\ud800": "\\ud800", "text": "sky"}], "\\ud800": 1}', 200, "sky"),
        (b'{"query": "why", "documents": [{"\\ud800": "sky \\udc00"}], "rank_fields": ["\\ud800"]}', 200, "sky \ufffd"),
        (b'{"query": "why", "documents": [{"a": 1, "b": [NaN, 1e999]}], "rank_fields": ["a"]}', 200, "[null,null]"),
        (
            b'{"query": "why", "documents": [{"a": 1, "b": ' + b"[" * 700 + b"]" * 700 + b'}], "rank_fields": ["a"]}',
            422,
            "nested too deep",
        ),
    ],
)
def test_whatever_bytes_come_it_is_no_fault_of_the_server(small, content, status, says):
    response = small.post("/v1/rerank", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert says in response.content.decode("utf-8")
    json.loads(response.content)


def test_what_is_not_declared_json_is_not_read(small):
    response = small.post("/v1/rerank", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
    assert response.status_code == 422
    assert "Content-Type: application/json" in response.json()["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused_before_they_are_parsed(small, chunked):
    content = b'{"query": "why", "documents": ["' + b"a " * 20_000 + b'"'  # not even JSON
    pieces = (content[start : start + 1000] for start in range(0, len(content), 1000))
    headers = {"Content-Type": "application/json"}
    response = small.post("/v1/rerank", content=pieces if chunked else content, headers=headers)
    assert ("content-length" in response.request.headers) != chunked
    assert response.status_code == 413
    assert "larger than 10485 bytes" in response.json()["message"]


@pytest.mark.parametrize("header", ["X-None: x", "Expect: 100-continue"])
def test_a_body_that_says_that_it_is_too_large_need_not_come(small, header):
    with socket.create_connection((small.base_url.host, small.base_url.port)) as connection:
        head = f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\n{header}\r\nContent-Length: 20000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_fault_of_the_server_is_logged_and_shows_nothing(small, caplog, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr("qpeft.server.routes.responses.reranked", fail)
    with caplog.at_level(logging.INFO, "qpeft.server"):
        response = small.post("/v1/rerank", json=GOOD, headers={"X-Request-ID": "abc-1"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "internal_error"
    assert "abc-1" in response.json()["message"]
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    (failed,) = [record for record in caplog.records if record.message == "failed"]
    assert failed.facts["id"] == "abc-1"
    assert "secret detail" in str(failed.exc_info[1])
    assert small.post("/v1/rerank", json={**GOOD, "query": 3}).status_code == 422


def test_settings_say_what_is_wrong():
    from qpeft.errors import OptionError

    for name, value in (("max_batch_pairs", 0), ("request_timeout", 0), ("max_wait_ms", -1), ("port", 70000)):
        with pytest.raises(OptionError, match=f"--{name.replace('_', '-')} is"):
            Settings(**{name: value})
