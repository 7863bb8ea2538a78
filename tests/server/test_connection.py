"""Connections that ask for nothing: they are closed, and those that wait for an answer are not."""

import asyncio
import socket
import threading

import pytest
import uvicorn

from qpeft.server.connection import Connection

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
PATIENCE = 0.5


async def slow_app(scope, receive, send):
    await asyncio.sleep(2 * PATIENCE)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="module")
def address():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            slow_app, http=Connection, timeout_keep_alive=PATIENCE, lifespan="off", log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        yield listening.getsockname()
        server.should_exit = True
        thread.join(60)


@pytest.mark.parametrize("sent", [b"", b"G", HEAD])
def test_a_connection_without_a_whole_head_is_closed(address, sent):
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(sent)
        assert connection.recv(100) == b""


def test_one_that_waits_for_its_answer_stays_and_is_closed_in_the_midst_of_its_next_head(address):
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(HEAD[:-5])
        connection.sendall(HEAD[-5:] + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 204")
        connection.sendall(HEAD)
        assert connection.recv(100) == b""
