"""The configuration that a bench's daemon gets, and the frames that a bench speaks."""

from __future__ import annotations

import json
import os
import socket
import tomllib
from threading import Thread

import pytest

from bench.daemon import Connection, DaemonError, toml


def test_models_are_configured_but_not_prefetched():
    models = {"open-2GiB": "file:///a/b.safetensors", "m": "s3://models/m"}
    assert tomllib.loads(toml(models)) == {
        "models": {name: {"uri": uri, "prefetch": False} for name, uri in models.items()}
    }


def _answer(listener, replies):
    """Answer each request with the next reply, two bytes at a time, a descriptor beside each."""
    stream, _ = listener.accept()
    with stream:
        for reply in replies:
            size = int.from_bytes(stream.recv(4, socket.MSG_WAITALL), "big")
            request = json.loads(stream.recv(size, socket.MSG_WAITALL))
            body = json.dumps({"id": request["id"], **reply}).encode()
            frame = len(body).to_bytes(4, "big") + body
            with open(os.devnull) as file:
                socket.send_fds(stream, [frame[:2]], [file.fileno()])
            for at in range(2, len(frame), 2):
                stream.sendall(frame[at : at + 2])


@pytest.fixture
def serve(tmp_path):
    threads = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def start(*replies):
        threads.append(Thread(target=_answer, args=(listener, replies)))
        threads[0].start()
        return tmp_path / "s"

    yield start
    threads[0].join()
    listener.close()


def test_a_reply_in_pieces_is_put_together_and_its_descriptors_are_closed(serve):
    path = serve({"protocol": [1, 0]}, {"path": "/m", "fds": 1})
    before = len(os.listdir("/proc/self/fd"))
    with Connection(path) as connection:
        assert connection.ask("open", model="m")["path"] == "/m"
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the other end may still be open


def test_an_error_reply_is_an_error_that_names_code_and_text(serve):
    error = {"code": "model_unknown", "message": "there is no model m", "hint": "name one"}
    path = serve({"protocol": [1, 0]}, {"error": error})
    with (
        Connection(path) as connection,
        pytest.raises(DaemonError, match="open: model_unknown: there is no model m"),
    ):
        connection.ask("open", model="m")


def test_a_daemon_that_hangs_up_is_an_error(serve):
    path = serve({"protocol": [1, 0]})
    with Connection(path) as connection, pytest.raises(DaemonError, match="hung up"):
        connection.ask("status")
