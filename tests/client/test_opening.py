"""``cached.open`` gives a lease or a typed error, in time, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import cached
from cached.core import wire
from cached.core.errors import (
    BadRequest,
    DaemonUnavailable,
    FrameError,
    HeaderError,
    InvalidConfig,
    LoadFailed,
    ModelUnknown,
    ProtocolMismatch,
    Stale,
    TensorUnknown,
    TimedOut,
    VersionUnknown,
)
from tests.fakes.local_daemon import (
    WAIT_S,
    GatedStore,
    LocalDaemon,
    ScriptedDaemon,
    open_descriptors,
    padded,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

    from tests.client.conftest import Serve
    from tests.fakes.local_daemon import Calls

PAYLOAD = b"x" * 5000
FILES = {"x.safetensors": padded("x", PAYLOAD), "config.json": b"{}"}


class Scripts:
    """A socket at which a scripted daemon answers."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.settimeout(WAIT_S)
        self.listener.bind(path)
        self.listener.listen()
        self.accepted: list[ScriptedDaemon] = []

    def accept(self) -> ScriptedDaemon:
        daemon = ScriptedDaemon(self.listener.accept()[0])
        self.accepted.append(daemon)
        daemon.greet()
        return daemon

    def granted(self, contents: dict[str, bytes], *, more: int = 0, **members: object) -> None:
        """Accept one worker and grant it files with these contents, or what ``members`` say."""
        daemon = self.accept()
        request = daemon.expect("open")
        descriptors = []
        for content in contents.values():
            fd = os.memfd_create("test")
            os.write(fd, content)
            descriptors.append(fd)
        files = [
            {"path": path, "size": len(content), "header_bytes": None}
            for path, content in contents.items()
        ]
        body = {
            "id": request["id"],
            "name": "m",
            "version": "1",
            "complete": True,
            "path": "/p",
            "files": files,
            "fds": len(descriptors),
            **members,
        }
        daemon.send(body, tuple(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)

    def close(self) -> None:
        self.listener.close()
        for daemon in self.accepted:
            daemon.close()


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripts]:
    path = str(tmp_path / "scripted.sock")
    monkeypatch.setenv("CACHED_SOCKET", path)
    made = Scripts(path)
    yield made
    made.close()


def test_open_returns_when_the_headers_are_there(serve: Serve):
    daemon = serve(GatedStore(FILES, ["x.safetensors"]))
    with cached.open("m", timeout_s=WAIT_S) as model:
        assert set(model) == {"x.pad", "x"}
        assert daemon.status()["state"] == "loading"
        daemon.store.release("x.safetensors")
        assert bytes(model["x"]) == PAYLOAD


def test_open_until_ready_returns_when_all_is_there(serve: Serve, call: Calls):
    daemon = serve(GatedStore(FILES, ["x.safetensors"]))
    with pytest.raises(TimedOut, match=r"waited 0\.2 s for m to be complete in vain"):
        cached.open("m", timeout_s=0.2, until="ready")
    opening = call(cached.open, "m", until="ready")
    daemon.store.release("x.safetensors")
    with opening.result(WAIT_S) as model:
        assert bytes(model["x"]) == PAYLOAD
    assert cached.open("m", until="ready", tensors=["x"]).path


def test_tensors_beyond_those_that_fit_a_request_are_waited_for_once_it_is_open(
    serve: Serve, call: Calls, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cached.core.wire.MAX_NAMES", 1)
    daemon = serve(GatedStore(FILES, ["x.safetensors"]))
    opening = call(cached.open, "m", until="ready", tensors=["x.pad", "x"])
    with pytest.raises(TimedOut, match="for tensor 'x' of m"):
        cached.open("m", timeout_s=0.5, until="ready", tensors=["x.pad", "x"])
    cached.open("m", timeout_s=WAIT_S, tensors=["x.pad", "x"]).close()
    daemon.store.release("x.safetensors")
    with opening.result(WAIT_S) as model:
        assert bytes(model["x"]) == PAYLOAD
    for until in ("header", "ready"):
        with pytest.raises(TensorUnknown, match="no tensor named 'y'"):
            cached.open("m", until=until, tensors=["x", "y"])


def test_names_too_long_for_one_request_are_named_in_part(serve: Serve):
    serve(GatedStore(FILES))
    with pytest.raises(TensorUnknown, match="no tensor named 'yyy"):
        cached.open("m", tensors=["x", "y" * 100_000])


def test_the_socket_may_be_named_in_the_call(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    daemon = serve(GatedStore(FILES))
    monkeypatch.setenv("CACHED_SOCKET", "/nowhere")
    cached.open("m", socket=daemon.address).close()


def test_an_abstract_socket_is_found(serve: Serve):
    serve(GatedStore(FILES), address=f"@cached-test-{os.getpid()}")
    cached.open("m").close()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"name": "y"}, ModelUnknown, "y"),
        ({"name": "m", "until": "soon"}, BadRequest, "until must be header or ready"),
        ({"name": "m", "tensors": ["x", "nope"]}, TensorUnknown, "nope"),
        ({"name": "m", "fallback": "ftp"}, ValueError, "fallback must be None or 's3'"),
        ({"name": "m", "tensors": "x"}, ValueError, "tensors must be a list of names"),
    ],
)
def test_a_wrong_argument_is_refused_and_leaves_nothing_open(
    serve: Serve, arguments: dict[str, Any], error: type[Exception], text: str
):
    daemon = serve(GatedStore(FILES))
    with pytest.raises(error, match=text):
        cached.open(**arguments)
    daemon.wait_for_leases(0)


def test_without_a_daemon_the_error_comes_at_once_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CACHED_SOCKET", str(tmp_path / "none"))
    for timeout_s in (None, 0, 0.03):
        with pytest.raises(DaemonUnavailable, match="cached serve"):
            cached.open("m", timeout_s=timeout_s)


def test_a_daemon_that_starts_within_the_time_out_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Calls
):
    monkeypatch.setenv("CACHED_SOCKET", str(tmp_path / "cached.sock"))
    opening = call(cached.open, "m", timeout_s=WAIT_S)
    with pytest.raises(TimeoutError):
        opening.result(0.01)
    daemon = LocalDaemon(tmp_path, GatedStore(FILES))
    opening.result(WAIT_S).close()
    daemon.stop()


def test_more_files_than_fit_one_reply_are_all_mapped(serve: Serve):
    files = {f"{number:03}.safetensors": weights((f"t{number}", "U8", [1], bytes([number])))
             for number in range(200)}  # fmt: skip
    daemon = serve(GatedStore(files | {f"{number}.txt": b"" for number in range(100)}))
    with cached.open("m", until="ready") as model:
        assert len(model.files) == 300
        assert [int(tensor[0]) for _, tensor in model.items()] == list(range(200))
    del model
    daemon.wait_for_leases(0)


def test_a_daemon_of_another_generation_is_a_mismatch(scripts: Scripts, call: Calls):
    opening = call(cached.open, "m")
    daemon = ScriptedDaemon(scripts.listener.accept()[0])
    scripts.accepted.append(daemon)
    daemon.greet(protocol=[2, 0])
    with pytest.raises(ProtocolMismatch, match="upgrade the client"):
        opening.result(WAIT_S)


BAD_HEADER = {"path": "x.safetensors", "size": 20, "header_bytes": 20}
NO_HEADER = {"path": "x", "size": 4, "header_bytes": None}


@pytest.mark.parametrize(
    ("contents", "members", "error"),
    [
        ({"x": b"1234"}, {"files": [NO_HEADER | {"size": 1 << 40}]}, LoadFailed),
        ({"x": b"1234", "y": b"12"}, {"files": [NO_HEADER | {"size": 5}, NO_HEADER]}, LoadFailed),
        ({"x": b"\7" * 20}, {"files": [BAD_HEADER]}, HeaderError),
        ({"x": b"1234"}, {"files": [{"path": "x"}]}, FrameError),
        ({"x": b"1234"}, {"version": None, "files": None}, FrameError),
        ({"x": b"1234"}, {"fds": 2}, FrameError),
        (
            {"x": b"1234", "y": b"1"},
            {"error": wire.error_body(LoadFailed("no"))["error"]},
            LoadFailed,
        ),
    ],
    ids=["too large", "half-way", "header", "members", "types", "count", "refused"],
)
def test_a_bad_answer_is_a_typed_error_and_leaves_nothing_open(
    scripts: Scripts, call: Calls, contents: dict[str, bytes], members: Any, error: type[Exception]
):
    before = len(open_descriptors())
    opening = call(cached.open, "m")
    scripts.granted(contents, **members)
    with pytest.raises(error):
        opening.result(WAIT_S)
    del opening
    assert scripts.accepted[0].is_hung_up()
    assert len(open_descriptors()) == before + 1  # the daemon's end


def test_descriptors_that_do_not_come_are_an_error_not_an_endless_loop(
    scripts: Scripts, call: Calls
):
    opening = call(cached.open, "m")
    scripts.granted({"x": b"1234"}, files=[NO_HEADER, NO_HEADER])
    request = scripts.accepted[0].expect("descriptors")
    assert request["files"] == [1]
    scripts.accepted[0].send({"id": request["id"]})
    with pytest.raises(FrameError, match="0 descriptors came, 1 were asked for"):
        opening.result(WAIT_S)


def test_more_descriptors_than_files_are_closed(scripts: Scripts, call: Calls):
    before = len(open_descriptors())
    opening = call(cached.open, "m")
    scripts.granted({"x": b"1234", "y": b"1", "z": b"2"}, files=[NO_HEADER])
    opening.result(WAIT_S).close()
    del opening
    assert len(open_descriptors()) <= before + 2


def test_a_child_of_fork_hears_that_the_version_is_another(scripts: Scripts, call: Calls):
    opening = call(cached.open, "m", timeout_s=WAIT_S)
    scripts.granted({"x": b"1234"}, complete=False, path=None)
    model = opening.result(WAIT_S)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            model.wait()
        except Stale as error:
            status = 0 if error.message == "m is 2 now, was 1" else 2
        finally:
            os._exit(status)
    scripts.granted({}, version="2")
    assert os.waitpid(child, 0)[1] == 0
    model.close()


def test_a_version_that_is_asked_for_is_named_to_the_daemon(scripts: Scripts, call: Calls):
    opening = call(cached.open, "m", version="1")
    daemon = scripts.accept()
    request = daemon.expect("open")
    assert request["version"] == "1"
    error = VersionUnknown("m has no version 1: there are 2, 3", hint="open one of these")
    daemon.send({"id": request["id"], **wire.error_body(error)})
    with pytest.raises(VersionUnknown, match="there are 2, 3; open one of these"):
        opening.result(WAIT_S)


def test_a_daemon_that_gives_another_version_than_was_asked_for_is_refused(
    scripts: Scripts, call: Calls
):
    opening = call(cached.open, "m", version="1")
    scripts.granted({"x": b"1234"}, version="2")
    with pytest.raises(VersionUnknown, match="m is 2 here, not 1"):
        opening.result(WAIT_S)
    assert scripts.accepted[0].is_hung_up()


def test_without_a_version_the_daemon_is_asked_for_none(scripts: Scripts, call: Calls):
    opening = call(cached.open, "m")
    daemon = scripts.accept()
    request = daemon.expect("open")
    assert "version" not in request
    daemon.send({"id": request["id"], **wire.error_body(ModelUnknown("no m"))})
    with pytest.raises(ModelUnknown):
        opening.result(WAIT_S)


def test_a_socket_in_a_directory_of_somebody_else_is_refused(monkeypatch: pytest.MonkeyPatch):
    with tempfile.TemporaryDirectory(prefix="cached-test-", dir="/tmp") as directory:
        os.chmod(directory, 0o777)
        monkeypatch.setenv("CACHED_SOCKET", f"{directory}/cached.sock")
        with pytest.raises(InvalidConfig, match="mode 40777"):
            cached.open("m")


def test_opening_imports_neither_numpy_nor_anything_heavy(serve: Serve):
    daemon = serve(GatedStore(FILES))
    code = (
        "import sys, cached\n"
        "model = cached.open('m', until='ready', socket=sys.argv[1])\n"
        "assert len(model.buffer('x')) == 5000 and model.path\n"
        "heavy = {'numpy', 'asyncio', 'boto3', 'logging', 'dataclasses', 'http', 'ssl', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith('cached.adapters')]\n"
        "model['x']\n"
        "assert 'numpy' in sys.modules\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, daemon.address], check=False, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr.decode()


def test_a_model_that_is_never_closed_ends_with_its_process_without_a_warning(serve: Serve):
    daemon = serve(GatedStore(FILES))
    code = (
        "import sys, cached\n"
        "model = cached.open('m', until='ready', socket=sys.argv[1])\n"
        "view = model['x']\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, daemon.address],
        check=False,
        capture_output=True,
    )
    assert (ended.returncode, ended.stderr.decode()) == (0, "")


def test_the_public_api_is_typed(serve: Serve):
    """mypy checks this function like a user's program; here it runs as well."""
    serve(GatedStore(FILES))
    with cached.open("m", timeout_s=WAIT_S, tensors=["x"], until="ready") as model:
        opened: cached.Model = model
        array: np.ndarray[Any, Any] = opened["x"]
        raw: memoryview = opened.buffer("x")
        path: str = opened.path
        stale: bool = opened.is_stale
        files: tuple[str, ...] = opened.files
        names: list[str] = [name for name, _ in opened.items(order="arrival")]
        version: str = opened.version
    assert (array.nbytes, len(raw), stale, names) == (5000, 5000, False, ["x.pad", "x"])
    assert version in path
    assert files == ("config.json", "x.safetensors")
