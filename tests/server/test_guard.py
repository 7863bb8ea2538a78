"""Keys, ids, logs, origins; clients that go away; time-outs; and a server that is alive whatever the model does."""

import json
import logging
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from qpeft.errors import FormatError, InputError, ModelError, OptionError
from qpeft.server import guard
from qpeft.server.guard import KEYS_VARIABLE, Keys, read_keys
from qpeft.server.logs import JsonLines
from qpeft.server.settings import Settings
from tiny_server import DOCUMENTS, QUERY, Watched, ready, running, wait_until

BODY = {"query": QUERY, "documents": DOCUMENTS}
KEYS = ("key-of-a", "key-of-b")


@pytest.fixture
def watched(make_lm):
    return Watched(make_lm("llama"))


@pytest.fixture(scope="module")
def locked(make_lm):
    with ready(lambda: Watched(make_lm("llama")), keys=KEYS) as client:
        yield client


def service(client):
    return client.app.state.service


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer key-of-", 401),
        ("Bearer key-of-aa", 401),
        ("Bearer key-of-a,key-of-b", 401),
        ("Basic key-of-a", 401),
        ("key-of-a", 401),
        ("Bearer key-of-a", 200),
        ("bearer key-of-b", 200),
    ],
)
def test_keys(locked, header, status):
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("POST", "/v2/rerank"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/info")):
        response = locked.request(method, path, json=BODY if method == "POST" else None, headers=headers)
        assert response.status_code == status, (path, response.text)
        assert ("www-authenticate" in response.headers) == (status == 401)
        assert not any(key in response.text for key in KEYS)


def test_what_needs_no_key(locked):
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert locked.get(path).status_code == 200
    for path in ("/health/", "/health//", "/v1/adapters/health", "/nothing", "/openapi.json/../metrics"):
        assert locked.get(path).status_code == 401, path
    assert locked.delete("/v1/adapters/x").status_code == 401


def test_the_documentation_needs_nothing_from_elsewhere(locked):
    loaded = re.findall(r'(?:src|href)="([^"]+)"', locked.get("/docs").text)
    assert len(loaded) == 3
    for path in loaded:
        assert path.startswith("/")
        assert locked.get(path).status_code == 200
    assert locked.get("/docs-files/redoc.standalone.js").status_code == 401, "which no page needs"


def test_a_body_without_a_key_is_not_even_read(locked):
    with socket.create_connection((locked.base_url.host, locked.base_url.port)) as connection:
        connection.sendall(b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_every_key_is_compared_whole(monkeypatch):
    compared = []
    real = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    keys = Keys(["first", "second", "third"])
    assert keys.allow({"headers": [(b"authorization", b"Bearer first")]})
    assert not keys.allow({"headers": [(b"authorization", b"Bearer firs")]})
    assert compared == [(32, 32)] * 6


def test_keys_from_a_file_and_from_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# operators\nfirst\n\n  second  \n")
    monkeypatch.setenv(KEYS_VARIABLE, "third, fourth,")
    assert read_keys(str(file)) == ["third", "fourth", "first", "second"]
    monkeypatch.delenv(KEYS_VARIABLE)
    assert read_keys(None) == []
    for nothing in ("", " , "):
        monkeypatch.setenv(KEYS_VARIABLE, nothing)
        with pytest.raises(OptionError, match="QPEFT_API_KEYS is set but has no key"):
            read_keys(str(file))
    monkeypatch.delenv(KEYS_VARIABLE)
    file.write_text("fine\nnot fine\n")
    with pytest.raises(FormatError, match=r"keys:2: a key is printable ASCII") as caught:
        read_keys(str(file))
    assert "not fine" not in str(caught.value)
    file.write_text("# nothing\n")
    with pytest.raises(FormatError, match="no keys"):
        read_keys(str(file))
    with pytest.raises(InputError, match="--api-key-file"):
        read_keys(str(tmp_path / "absent"))


@pytest.mark.parametrize("given", ["abc-1", "A.b_c", "x" * 128])
def test_a_request_id_comes_back(locked, given):
    for path in ("/health", "/metrics"):
        assert locked.get(path, headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "a;b", b"\xc3\xa9", "<script>"])
def test_a_harmful_request_id_does_not(locked, given):
    found = locked.get("/health", headers={"X-Request-ID": given}).headers["x-request-id"]
    assert len(found) == 32
    assert found.isalnum()


def test_logs_are_json_and_hold_no_secret(locked, caplog):
    with caplog.at_level(logging.DEBUG):
        headers = {"Authorization": "Bearer key-of-a", "X-Request-ID": "id-7"}
        locked.post("/v2/rerank?token=hidden", json={**BODY, "query": "confidential"}, headers=headers)
        locked.post("/v2/rerank", json=BODY, headers={"Authorization": "Bearer wrong-key"})
        locked.get("/a%0Ab%1b%22")
        wait_until(lambda: len(caplog.records) >= 3)
    records = [record for record in caplog.records if record.name == "qpeft.server"]
    lines = [json.loads(JsonLines().format(record)) for record in records]
    first = next(line for line in lines if line["id"] == "id-7")
    assert first["event"] == "request"
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v2/rerank", 200)
    assert {"time", "level", "ms"} <= set(first)
    ours = [record for record in caplog.records if record.name in ("qpeft.server", "uvicorn.error")]
    everything = "".join(JsonLines().format(record) for record in ours)
    for secret in ("key-of-a", "wrong-key", "hidden", "confidential", "octopus"):
        assert secret not in everything
    assert "\n" not in everything
    assert "\x1b" not in everything


def test_metrics(locked):
    headers = {"Authorization": "Bearer key-of-a"}

    def value(name):
        lines = locked.get("/metrics", headers=headers).text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)

    request = 'qpeft_requests_total{route="/v2/rerank",status="200"}'
    names = (request, "qpeft_pairs_total", "qpeft_tokens_total", "qpeft_truncated_documents_total")
    before = [value(name) for name in names]
    body = {**BODY, "max_tokens_per_doc": 3}
    tokens = locked.post("/v2/rerank", json=body, headers=headers).json()["usage"]["total_tokens"]
    locked.get("/invented/17")
    assert [value(name) - was for name, was in zip(names, before, strict=True)] == [1, 5, tokens, 5]
    assert value('qpeft_request_seconds_count{route="/v2/rerank"}') >= 1
    assert value("qpeft_batch_fill_count") >= 1
    assert value("qpeft_queued_pairs") == 0
    assert value("qpeft_ready") == 1
    text = locked.get("/metrics", headers=headers).text
    assert "qpeft_passage_cache_hits_total" in text
    assert "invented" not in text


def test_the_passage_cache_is_counted(make_lm):
    from tiny_adapters import with_store

    with ready(lambda: Watched(with_store(make_lm("llama")))) as client:

        def counted():
            text = client.get("/metrics").text
            return [float(line.split()[-1]) for line in text.splitlines() if line.startswith("qpeft_passage_cache_")]

        hits, misses = counted()
        client.post("/v2/rerank", json=BODY)
        assert counted() == [hits, misses + 5]
        client.post("/v2/rerank", json={**BODY, "query": "who"})
        assert counted() == [hits + 5, misses + 5]


def test_origins(watched):
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with ready(lambda: watched) as client:
        assert client.options("/v2/rerank", headers=preflight).status_code == 405
        response = client.post("/v2/rerank", json=BODY, headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in response.headers
    settings = Settings(port=0, cors_origin=("https://a.example",))
    with ready(lambda: watched, settings, keys=KEYS) as client:
        allowed = client.options("/v2/rerank", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = client.post("/v2/rerank", json=BODY, headers={"Origin": "https://a.example"})
        assert refused.status_code == 401  # and the browser may read why
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        other = client.post("/v2/rerank", json=BODY, headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_alive_while_the_model_works_and_ready_only_once_it_is_open(watched):
    opening = threading.Event()

    def open_lm():
        assert opening.wait(60)
        return watched

    with running(open_lm) as client, ThreadPoolExecutor() as pool:
        assert client.get("/health").status_code == 200
        for method, path in (("GET", "/ready"), ("POST", "/v2/rerank"), ("GET", "/info"), ("GET", "/v1/models")):
            response = client.request(method, path, json=BODY if method == "POST" else None)
            assert response.status_code == 503
            assert "loading" in response.json()["message"]
            assert int(response.headers["retry-after"]) > 0
        assert client.post("/rerank", json={"query": QUERY, "texts": ["a"]}).json()["error_type"] == "Unhealthy"
        opening.set()
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert watched.batches  # warm before it is ready
        watched.forget()
        watched.close()
        asked = pool.submit(client.post, "/v2/rerank", json=BODY)
        watched.wait_for_batch()
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/info", "/docs"):
            assert client.get(path).status_code == 200
        assert client.post("/v2/rerank", json={}).status_code == 422
        assert not asked.done()  # all of this while the model was busy
        watched.open()
        assert asked.result().status_code == 200


def test_a_model_that_cannot_be_opened_is_never_ready():
    def open_lm():
        raise ModelError("no such model")

    with running(open_lm) as client:
        wait_until(lambda: service(client).state == "failed")
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        assert isinstance(service(client).failure, ModelError)


def test_a_client_that_goes_away_frees_the_queue(watched, caplog):
    with ready(lambda: watched) as client, ThreadPoolExecutor() as pool:
        watched.forget()
        watched.close()
        first = pool.submit(client.post, "/v2/rerank", json=BODY)
        watched.wait_for_batch()
        content = json.dumps({**BODY, "documents": ["the king"] * 30}).encode()
        head = (
            f"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        )
        with caplog.at_level(logging.INFO, "qpeft.server"):
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(head.encode() + b"\r\n\r\n" + content)
                wait_until(lambda: service(client).batcher.queued == 30)
            wait_until(lambda: service(client).batcher.queued == 0)
            wait_until(lambda: service(client).in_flight == 1)
            # One that goes in the midst of its body leaves nothing behind either.
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(head.encode() + b"\r\n\r\n" + content[:20])

            def gone():
                return [each.facts["status"] for each in caplog.records if each.message == "request"].count(499)

            wait_until(lambda: gone() == 2)
        assert service(client).in_flight == 1
        watched.open()
        assert first.result().status_code == 200
        client.post("/v2/rerank", json=BODY)
        assert [len(rows) for rows, _ in watched.batches] == [5, 5]


def test_a_request_that_takes_too_long_gets_504(watched):
    with ready(lambda: watched, Settings(port=0, request_timeout=0.3)) as client:
        watched.forget()
        watched.close()
        response = client.post("/v2/rerank", json=BODY)
        assert response.status_code == 504
        assert response.json()["error"]["type"] == "timeout_error"
        tei = client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS})
        assert (tei.status_code, tei.json()["error_type"]) == (504, "Overloaded")
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n1")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert service(client).batcher.queued == 0
        watched.open()


def test_a_full_queue_gets_429(watched):
    with ready(lambda: watched, Settings(port=0, max_queue_pairs=6)) as client, ThreadPoolExecutor() as pool:
        watched.forget()
        watched.close()
        asked = [pool.submit(client.post, "/v2/rerank", json=BODY)]
        watched.wait_for_batch()
        asked.append(pool.submit(client.post, "/v2/rerank", json=BODY))
        wait_until(lambda: service(client).batcher.queued == 5)
        refused = client.post("/v2/rerank", json=BODY)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        tei = client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS})
        assert (tei.status_code, tei.json()["error_type"]) == (429, "Overloaded")
        watched.open()
        assert [each.result().status_code for each in asked] == [200, 200]
        assert client.post("/v2/rerank", json=BODY).status_code == 200


def test_only_the_poisoned_request_fails(watched):
    poison = watched.tokenizer.convert_tokens_to_ids("lion")
    with ready(lambda: watched, Settings(port=0, max_wait_ms=20)) as client, ThreadPoolExecutor(8) as pool:
        watched.poison = poison
        bodies = [{**BODY, "documents": ["the lion"] if i == 3 else DOCUMENTS} for i in range(8)]
        found = list(pool.map(lambda body: client.post("/v2/rerank", json=body), bodies))
        assert [each.status_code for each in found] == [200] * 3 + [500] + [200] * 4
        assert "poison" not in found[3].text
        watched.poison = None


def test_searches_of_one_request_fail_together(watched):
    """No part of a refused request is scored after the refusal."""
    with ready(lambda: watched) as client:
        queries = [{"query": " ", "documents": ["a"]}, *({"query": QUERY, "documents": DOCUMENTS} for _ in range(40))]
        assert client.post("/v1/rerank/batch", json={"queries": queries}).status_code == 422
        assert service(client).batcher.queued == 0


def test_connections_do_not_wait_for_acknowledgements(locked):
    with httpx2.Client(base_url=locked.base_url, trust_env=False) as client:
        assert client.get("/health").status_code == 200
        sockets = [each.transport.get_extra_info("socket") for each in locked.server.server_state.connections]
        assert sockets
        assert all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets)
