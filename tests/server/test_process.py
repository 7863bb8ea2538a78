"""The command itself, as a process: what it prints, what it logs, how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from qpeft.cli import main
from tiny_server import DOCUMENTS, QUERY, wait_until

BODY = {"query": QUERY, "documents": DOCUMENTS * 40}
HEAD = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@contextmanager
def process(*arguments, **environment):
    """Run `qpeft serve`; gives the process, and a client once it says that it serves."""
    command = [sys.executable, "-m", "qpeft", "serve", "--port", "0", "--dtype", "float32", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = started.stdout.readline()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+) serves (.*)\n", line)
        assert found, started.communicate(timeout=60)
        with httpx2.Client(base_url=found[1], timeout=120, trust_env=False) as client:
            client.models = found[2].split(", ")
            yield started, client
    finally:
        started.kill()
        started.communicate()


def logged(stderr):
    return [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]


def test_sigterm_under_load_answers_what_was_accepted(saved_model):
    with (
        process("--model", str(saved_model), "--max-batch-pairs", "16") as (started, client),
        ThreadPoolExecutor(12) as pool,
    ):
        assert client.models == [saved_model.name]

        def ask(_):
            try:
                response = client.post("/v2/rerank", json=BODY)
            except httpx2.TransportError as error:
                return type(error).__name__
            return len(response.json()["results"]) if response.status_code == 200 else response.status_code

        def arrived():
            metrics = client.get("/metrics").text
            return sum(map(float, re.findall(r"^qpeft_(?:queued_pairs|pairs_total) (\S+)", metrics, re.M)))

        accepted = [pool.submit(ask, i) for i in range(8)]
        wait_until(lambda: arrived() > 1400)  # of 1600: all eight are in
        started.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200
        refused = ask(None)
        assert [future.result() for future in accepted] == [200] * 8
        assert refused == 503
        _, stderr = started.communicate(timeout=60)
    assert started.returncode == 0
    events = logged(stderr)
    (draining,) = [line for line in events if line["event"] == "draining"]
    (drained,) = [line for line in events if line["event"] == "drained"]
    assert draining["in_flight"] > 0
    assert drained["left"] == 0
    assert [line["status"] for line in events if line["event"] == "request" and line["path"] == "/v2/rerank"].count(
        200
    ) == 8


def test_an_idle_server_ends_at_once_and_its_logs_hold_no_secret(saved_model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("from-the-file\n")
    arguments = ("--model", str(saved_model), "--api-key-file", str(keys))
    with process(*arguments, QPEFT_API_KEYS="from-outside") as (started, client):
        for key, status in (("from-the-file", 200), ("from-outside", 200), ("guessed", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"query": "confidential", "documents": ["the sky"]}
            assert client.post("/v1/rerank?key=in-the-url", json=body, headers=headers).status_code == status
        started.send_signal(signal.SIGINT)
        stdout, stderr = started.communicate(timeout=60)
    assert started.returncode == 0
    assert [json.loads(line)["event"] for line in stderr.splitlines()].count("request") == 3
    for secret in ("from-the-file", "from-outside", "guessed", "confidential", "in-the-url"):
        assert secret not in stdout + stderr


@pytest.mark.parametrize(("signals", "timeout"), [(2, "600"), (1, "0.2")])
def test_a_second_signal_or_the_end_of_patience_ends_it_though_requests_are_open(saved_model, signals, timeout):
    body = json.dumps({"query": QUERY, "documents": DOCUMENTS}).encode()
    with (
        process("--model", str(saved_model), "--drain-timeout", timeout, "--max-wait-ms", "600000") as (
            started,
            client,
        ),
        socket.create_connection((client.base_url.host, client.base_url.port)) as slow,
    ):
        slow.sendall(HEAD % len(body) + body)
        wait_until(lambda: "qpeft_queued_pairs 5.0" in client.get("/metrics").text)  # for company that never comes
        started.send_signal(signal.SIGTERM)
        if signals == 2:
            wait_until(lambda: client.get("/ready").status_code == 503)
            started.send_signal(signal.SIGTERM)
        assert slow.recv(100).startswith(b"HTTP/1.1 503")
        _, stderr = started.communicate(timeout=60)
    assert started.returncode == 0
    assert "Traceback" not in stderr
    drained = [line["left"] for line in logged(stderr) if line["event"] == "drained"]
    assert signals == 2 or drained == [1]


def test_a_body_that_does_not_come_does_not_hold_up_the_end(saved_model):
    with (
        process("--model", str(saved_model), "--drain-timeout", "600") as (started, client),
        socket.create_connection((client.base_url.host, client.base_url.port)) as slow,
    ):
        slow.sendall(HEAD % 10 + b"1")
        assert client.get("/health").status_code == 200  # by now the other is in
        started.send_signal(signal.SIGTERM)
        assert slow.recv(100).startswith(b"HTTP/1.1 503")
        _, stderr = started.communicate(timeout=60)
    assert started.returncode == 0
    assert [line["left"] for line in logged(stderr) if line["event"] == "drained"] == [0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_as_many_connections_as_the_system_allows(saved_model):
    with process("--model", str(saved_model)) as (started, _):
        limits = Path(f"/proc/{started.pid}/limits").read_text()
    soft, hard = re.search(r"^Max open files +(\S+) +(\S+)", limits, re.M).groups()
    assert soft == hard


def run(*arguments):
    command = [sys.executable, "-m", "qpeft", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_model_that_cannot_be_opened_ends_it_with_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = run("--port", "0", "--model", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("qpeft: error: model folder")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_port_in_use_ends_it_with_one_line(saved_model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", str(saved_model), "--port", str(port)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"qpeft: error: --host 127.0.0.1 --port {port}: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--adapters", "absent"], "--adapters absent: No such file or directory"),
        (["--api-key-file", "absent"], "--api-key-file absent: "),
        (["--max-documents", "0"], "--max-documents is 0; it must be at least 1"),
        (["--max-document", "5"], "unknown option --max-document; did you mean 'max-documents'?"),
        (["--port", "99999"], "--port is 99999"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_options(capsys, arguments, says):
    assert main(["serve", "--port", "0", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--port", "0"]) == 2
    assert "'uvicorn': pip install 'qpeft[server]'" in capsys.readouterr().err


def test_help_says_how_to_ask(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for word in ("--adapters", "--api-key-file", "QPEFT_API_KEYS", "--model", "/v1/rerank", "--max-wait-ms", "429"):
        assert word in text
