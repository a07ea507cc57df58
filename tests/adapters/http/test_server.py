"""The HTTP side answers probes and scrapes from a flag and one question, and changes nothing.

Every test talks to the real server over loopback.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from typing import TYPE_CHECKING

import pytest
import uvloop

from cached.adapters.http import HttpServer, TokenFile
from cached.adapters.http import server as http
from cached.core.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STATUS: dict[str, object] = {"daemon": "0.1.0", "models": [{"name": "llm", "state": "resident"}]}
OPEN_FILES = 256  # of which 16 may be HTTP connections


class Daemon:
    """What the HTTP side sees of the daemon, and a client of it."""

    def __init__(
        self, port: int = 0, *, is_started: bool = True, token_file: TokenFile | None = None
    ) -> None:
        self.reason = ""
        self.failures: list[str] = []
        self.crowds: list[tuple[int, int]] = []
        self.questions = 0
        self.asked: list[tuple[str, dict[str, object]]] = []
        self.reply: dict[str, object] = {"freed_bytes": 7}
        self.is_mute = False
        self.unanswered: list[Callable[[dict[str, object]], None]] = []
        self.server = HttpServer(
            "127.0.0.1",
            port,
            why_not_ready=lambda: self.reason,
            ask=self.ask_daemon,
            token_file=token_file,
            render=self.render,
            failed=self.failures.append,
            open_files=OPEN_FILES,
            crowded=lambda closed, most: self.crowds.append((closed, most)),
        )
        if is_started:
            self.server.start()

    def ask_daemon(
        self, op: str, fields: dict[str, object], answered: Callable[[dict[str, object]], None]
    ) -> None:
        self.questions += 1
        self.asked.append((op, fields))
        if self.is_mute:
            self.unanswered.append(answered)
            return
        reply = STATUS if op == "status" else self.reply
        # the daemon answers from another thread
        threading.Thread(target=answered, args=(reply,)).start()

    def render(self, status: dict[str, object], accept: str) -> tuple[bytes, str]:
        assert status == STATUS
        if accept == "boom":
            raise RuntimeError("boom")
        return f"# {accept}\n# EOF\n".encode(), "text/plain; version=1"

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> tuple[int, object]:
        status, found, body = self.ask("GET", path, None, **headers)
        assert found["Content-Type"] == "application/json; charset=utf-8"
        return status, json.loads(body)


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    daemon = Daemon()
    yield daemon
    daemon.server.stop()


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    """Return the one server of this module, as new: its start takes 0.2 s."""
    shared.reason, shared.questions, shared.is_mute = "", 0, False
    yield shared
    shared.unanswered.clear()
    assert shared.failures == []


def test_health_is_told_without_asking_the_daemon(daemon: Daemon):
    daemon.is_mute = True
    assert daemon.get("/healthz") == (200, {"healthy": True})
    assert daemon.questions == 0


def test_readiness_is_a_flag_with_a_reason(daemon: Daemon):
    daemon.is_mute = True
    assert daemon.get("/readyz") == (200, {"ready": True})
    daemon.reason = "llm is loading"
    assert daemon.get("/readyz") == (503, {"ready": False, "reason": "llm is loading"})
    assert daemon.questions == 0


def test_the_models_are_the_status_of_the_daemon(daemon: Daemon):
    assert daemon.get("/models") == (200, STATUS)


def test_the_index_lists_what_there_is(daemon: Daemon):
    status, headers, body = daemon.ask("GET", "/")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    for path in ("/healthz", "/readyz", "/models", "/metrics"):
        assert path.encode() in body


def test_metrics_are_rendered_for_who_accepts_them(daemon: Daemon):
    status, headers, body = daemon.ask("GET", "/metrics", Accept="application/openmetrics-text")
    assert (status, body) == (200, b"# application/openmetrics-text\n# EOF\n")
    assert headers["Content-Type"] == "text/plain; version=1"


@pytest.mark.parametrize("path", ["/models", "/metrics"])
def test_a_daemon_that_does_not_answer_in_time_is_unavailable(
    daemon: Daemon, path: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(http, "SNAPSHOT_TIMEOUT_S", 0.01)
    daemon.is_mute = True
    status, body = daemon.get(path)
    assert status == 503
    assert isinstance(body, dict)
    assert body["error"]["code"] == "timed_out"
    assert body["error"]["message"] == "the daemon did not answer status within 0.01 s"
    (answered,) = daemon.unanswered
    answered(STATUS)  # too late: nobody minds
    daemon.is_mute = False
    monkeypatch.undo()
    assert daemon.get("/models") == (200, STATUS)


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/models", "/metrics"])
def test_head_tells_what_get_would_without_its_body(daemon: Daemon, path: str):
    status, headers, body = daemon.ask("HEAD", path)
    _, expected, whole = daemon.ask("GET", path)
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == expected["Content-Length"] == str(len(whole))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_no_other_method_is_allowed(daemon: Daemon, method: str):
    status, headers, _ = daemon.ask(method, "/models")
    assert status == 405
    assert headers["Allow"] == "GET,HEAD"


def test_an_unknown_path_is_not_found(daemon: Daemon):
    assert daemon.ask("GET", "/../etc/passwd")[0] == 404


def test_nothing_is_stored_and_no_version_of_a_library_is_told(daemon: Daemon):
    for path in ("/healthz", "/nothing"):
        _, headers, _ = daemon.ask("GET", path)
        assert headers["Server"] == "cached"
        assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02garbage\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=["garbage", "a huge header", "a huge path"],
)
def test_bad_requests_are_refused_and_the_server_goes_on(daemon: Daemon, raw: bytes):
    with socket.create_connection(("127.0.0.1", daemon.server.port), timeout=10) as client:
        client.sendall(raw)
        assert client.recv(100).startswith(b"HTTP/1.0 400 Bad Request")
    assert daemon.get("/healthz")[0] == 200


def test_a_keep_alive_connection_answers_probe_after_probe(daemon: Daemon):
    connection = HTTPConnection("127.0.0.1", daemon.server.port, timeout=10)
    for _ in range(100):
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b'{\n "ready": true\n}\n')
    connection.close()


def test_an_error_inside_is_told_to_the_daemons_log_and_not_to_stderr(
    shared: Daemon, capfd: pytest.CaptureFixture[str]
):
    assert shared.ask("GET", "/metrics", Accept="boom")[0] == 500
    (line,) = shared.failures
    assert "RuntimeError: boom" in line
    assert capfd.readouterr().err == ""
    shared.failures.clear()


def test_a_port_that_is_taken_is_refused_by_the_constructor(daemon: Daemon):
    port = daemon.server.port
    with pytest.raises(InvalidConfig, match="the port is taken") as caught:
        Daemon(port)
    assert caught.value.message == f"cannot listen on 127.0.0.1:{port} for HTTP: the port is taken"
    assert "--http-port" in caught.value.hint


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "x" * 300])
def test_a_host_that_is_not_ours_is_refused(host: str):
    with pytest.raises(InvalidConfig, match="cannot listen on ") as caught:
        HttpServer(
            host,
            0,
            why_not_ready=str,
            ask=print,
            token_file=None,
            render=lambda status, accept: (b"", ""),
            failed=print,
            open_files=OPEN_FILES,
            crowded=print,
        )
    assert caught.value.hint == "set --http-host to an address of this host"


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "NEEDS", ("json", "a_library_that_is_not_there"))
    with pytest.raises(InvalidConfig, match="needs a_library_that_is_not_there") as caught:
        Daemon(is_started=False)
    assert "pip install 'cached-models[daemon]'" in caught.value.hint


def test_who_asks_before_the_start_is_answered_after_it():
    daemon = Daemon(is_started=False)
    with socket.create_connection(("127.0.0.1", daemon.server.port), timeout=10) as early:
        early.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        daemon.server.start()
        assert early.recv(100).startswith(b"HTTP/1.0 200 OK")
    daemon.server.stop()


def test_stop_joins_the_thread_frees_the_port_and_may_be_called_again():
    daemon = Daemon()
    assert daemon.get("/healthz")[0] == 200
    assert "cached-http" in {thread.name for thread in threading.enumerate()}
    before = {thread for thread in threading.enumerate() if thread.name == "cached-http"}
    daemon.server.stop()
    daemon.server.stop()
    alive = {thread for thread in threading.enumerate() if thread.name == "cached-http"}
    assert len(alive) == len(before) - 1
    with pytest.raises(ConnectionRefusedError):
        daemon.get("/healthz")
    again = Daemon(daemon.server.port, is_started=False)
    again.server.stop()


def test_stop_before_the_thread_is_up_is_heard(monkeypatch: pytest.MonkeyPatch):
    daemon = Daemon(is_started=False)
    new_event_loop = uvloop.new_event_loop

    def late() -> uvloop.Loop:
        while not daemon.server._is_stopped:
            time.sleep(0)
        return new_event_loop()

    monkeypatch.setattr(uvloop, "new_event_loop", late)
    daemon.server.start()
    daemon.server.stop()
    assert daemon.failures == []


def test_a_server_that_was_never_started_can_be_stopped():
    Daemon(is_started=False).server.stop()


def test_stop_does_not_wait_for_an_answer_that_does_not_come(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "SHUTDOWN_TIMEOUT_S", 0.01)
    daemon = Daemon()
    daemon.is_mute = True
    idle = socket.create_connection(("127.0.0.1", daemon.server.port), timeout=10)
    idle.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n")
    while not daemon.unanswered:
        daemon.get("/healthz")
    daemon.server.stop()
    daemon.unanswered[0](STATUS)  # after the loop is closed
    assert idle.recv(100) == b""
    idle.close()
    assert daemon.failures == []


def test_the_port_is_bound_before_anything_slow_is_imported():
    code = """
import sys
from cached.adapters.http import HttpServer
no = dict(why_not_ready=str, ask=print, token_file=None, render=print, failed=print)
HttpServer("127.0.0.1", 0, open_files=256, crowded=print, **no).stop()
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"asyncio", "logging", "aiohttp", "uvloop"} & set(done.stdout.split()) == set()


def test_a_crowd_of_idle_connections_is_bounded_and_a_probe_is_answered(daemon: Daemon):
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", daemon.server.port)
        crowd = [
            stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(40)
        ]
        assert crowd[0].recv(1) == b""  # the one that was idle for longest
        assert daemon.get("/healthz")[0] == 200
        crowd[-1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert crowd[-1].recv(100).startswith(b"HTTP/1.0 200 OK")
    assert daemon.crowds == [(1, 16)]  # the others are told of later, in one line


# --- changes

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def token_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("token") / "token"


@pytest.fixture(scope="module")
def shared_open(token_path: Path) -> Iterator[Daemon]:
    token_path.write_text(TOKEN)
    token_path.chmod(0o600)
    daemon = Daemon(token_file=TokenFile(str(token_path)))
    yield daemon
    daemon.server.stop()


@pytest.fixture
def changing(shared_open: Daemon, token_path: Path) -> Iterator[Daemon]:
    """Return a server that takes orders; one for this module."""
    shared_open.asked, shared_open.reply, shared_open.is_mute = [], {"freed_bytes": 7}, False
    yield shared_open
    token_path.chmod(0o600)
    shared_open.unanswered.clear()
    assert shared_open.failures == []


def post(
    daemon: Daemon, path: str, body: bytes | None = None, token: str | None = TOKEN
) -> tuple[int, dict[str, object]]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    status, _, answer = daemon.ask("POST", path, body, **headers)
    found = json.loads(answer)
    assert isinstance(found, dict)
    return status, found


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/models/llm/prefetch", None, ("prefetch", {"model": "llm"})),
        ("/models/llm/evict", b"{}", ("evict", {"model": "llm"})),
        ("/models/llm/refresh", b"", ("refresh", {"model": "llm"})),
        (
            "/models/a.b-c/refresh",
            b'{"version": "v1"}',
            ("refresh", {"model": "a.b-c", "version": "v1"}),
        ),
        ("/purge", None, ("purge", {})),
    ],
)
def test_an_order_with_the_token_is_asked_of_the_daemon(
    changing: Daemon, path: str, body: bytes | None, expected: tuple[str, dict[str, object]]
):
    assert post(changing, path, body) == (200, {"freed_bytes": 7})
    assert changing.asked == [expected]


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("wrong", 403), ("", 403)])
def test_without_the_token_nothing_is_asked(changing: Daemon, token: str | None, status: int):
    found, body = post(changing, "/models/llm/evict", b"{", token)
    assert (found, changing.asked) == (status, [])
    error = body["error"]
    assert isinstance(error, dict)
    assert error["code"] == "not_permitted"
    assert TOKEN not in json.dumps(body)


def test_who_sends_no_token_is_told_how(changing: Daemon):
    _, headers, _ = changing.ask("POST", "/purge")
    assert headers["WWW-Authenticate"] == "Bearer"


def test_without_a_token_file_nobody_may_change_anything(daemon: Daemon):
    for path in ("/models/llm/prefetch", "/purge"):
        status, body = post(daemon, path)
        assert status == 404
        assert body["error"] == {
            "code": "not_permitted",
            "message": "changes over HTTP are off",
            "hint": "start the daemon with --http-token-file PATH",
        }
    assert daemon.questions == 0


def test_a_token_file_that_became_readable_for_others_lets_nobody_in(
    changing: Daemon, token_path: Path
):
    token_path.chmod(0o644)
    status, body = post(changing, "/purge")
    assert (status, changing.asked) == (503, [])
    assert '"not_permitted"' in json.dumps(body)
    (failure,) = changing.failures
    assert "has mode 0644" in failure
    assert TOKEN not in failure + json.dumps(body)
    changing.failures.clear()


def test_a_compressed_body_is_not_unpacked(changing: Daemon):
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Encoding": "gzip"}
    for body in (b"xxxx", gzip.compress(b" " * 10)):
        status, _, found = changing.ask("POST", "/purge", body, **headers)
        assert (status, changing.asked) == (400, [])
        assert b"the body is not JSON" in found


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/purge", b"{", "the body is not JSON"),
        ("/purge", b"[" * 4000, "the body is not JSON"),
        ("/purge", b"\xff", "the body is not JSON"),
        ("/purge", b'{"version": "v"}', "the body of purge must be empty"),
        ("/models/llm/evict", b"[]", "the body of evict must be empty"),
        ("/models/llm/refresh", b'{"model": "x"}', "the body of refresh must be empty, or {"),
        ("/models/llm/refresh", b'{"version": 5}', "the body of refresh must be empty, or {"),
        ("/models/llm/refresh", b'{"version": ["v"]}', "docs/wire.md says what each takes"),
        ("/models/llm/refresh", b'{"version": "' + b"x" * 4096 + b'"}', "at most 4096 bytes"),
    ],
)
def test_a_body_that_nobody_reads_is_refused(changing: Daemon, path: str, body: bytes, said: str):
    status, found = post(changing, path, body)
    assert (status, changing.asked) == (400, [])
    assert said in json.dumps(found, ensure_ascii=False).replace('\\"', '"')


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("model_unknown", 404),
        ("version_unknown", 404),
        ("not_permitted", 409),
        ("bad_request", 400),
        ("daemon_unavailable", 503),
        ("over_budget", 507),
        ("of_tomorrow", 500),
    ],
)
def test_a_refusal_of_the_daemon_has_its_status(changing: Daemon, code: str, status: int):
    changing.reply = {"error": {"code": code, "message": "m", "hint": "h"}}
    assert post(changing, "/models/llm/evict") == (status, changing.reply)


def test_a_daemon_that_does_not_answer_an_order_in_time_is_told(
    changing: Daemon, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(http, "CHANGE_TIMEOUT_S", 0.01)
    changing.is_mute = True
    status, body = post(changing, "/models/llm/evict")
    assert status == 504
    assert "the daemon did not answer evict within 0.01 s" in json.dumps(body)


def test_a_body_that_does_not_come_is_not_waited_for(
    changing: Daemon, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(http, "SNAPSHOT_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", changing.server.port), timeout=10) as client:
        head = f"POST /purge HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        client.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    assert changing.asked == []


@pytest.mark.parametrize("path", ["/purge", "/models/llm/evict"])
def test_an_order_is_no_get(changing: Daemon, path: str):
    status, headers, _ = changing.ask("GET", path, Authorization=f"Bearer {TOKEN}")
    assert (status, headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize("path", ["/models/llm/frobnicate", "/models/llm", "/models//evict"])
def test_an_unknown_order_is_not_found(changing: Daemon, path: str):
    assert changing.ask("POST", path, Authorization=f"Bearer {TOKEN}")[0] == 404
    assert changing.asked == []
