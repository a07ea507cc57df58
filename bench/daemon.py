"""`cached serve` as a user runs it: a process of its own, told what to do over its socket.

The few frames that are needed here are written after docs/wire.md, not taken from the package:
what is measured should not measure itself.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from bench import process
from bench.record import ROOT
from bench.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

START_TIMEOUT_S = 20.0
LOAD_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
FREE_TIMEOUT_S = 20.0
PROTOCOL = [1, 0]
TMPFS = Path("/dev/shm")
MAX_DESCRIPTORS = 128


class DaemonError(Exception):
    """The daemon did not start, or refused what a bench asked."""


class DaemonTimeout(DaemonError):
    """The daemon did not answer in time."""


class Refused(DaemonError):
    """The daemon answered with an error.

    Attributes:
        code: of the error, as docs/wire.md lists them.
    """

    def __init__(self, op: str, error: Mapping[str, str]) -> None:
        super().__init__(f"{op}: {error['code']}: {error['message']}")
        self.code = error["code"]


class Settings(NamedTuple):
    """How the daemon is started.

    Attributes:
        models: URI by name; none is fetched before it is asked for.
        memory_budget: as the flag takes it.
        fetch_threads: how many GETs may run at a time.
        environment: beside that of the bench, AWS_* for instance.
        flags: more of `cached serve`.
    """

    models: Mapping[str, str]
    memory_budget: str
    fetch_threads: int = 8
    environment: Mapping[str, str] | None = None
    flags: Sequence[str] = ()


class Load(NamedTuple):
    """One load, from the prefetch request to ready.

    Attributes:
        wall_s: of the load.
        cpu_s: of the daemon meanwhile, all threads.
        peak_rss_bytes: the daemon's highest resident memory meanwhile.
        path: the directory of the model.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    path: str


class Daemon:
    """A running daemon; use it in a ``with`` block, which ends it and frees its memory.

    Attributes:
        directory: for its socket, configuration and log.
        socket_path: where it listens.
        segment_root: where its segments are, in a tmpfs.
        pid: of the daemon.
    """

    def __init__(self, settings: Settings) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cached-bench-"))
        self.socket_path = self.directory / "cached.sock"
        self.segment_root = Path(tempfile.mkdtemp(prefix="cached-bench-", dir=TMPFS))
        self._http_port = free_port()
        self._process = self._spawn(settings)
        self.pid = self._process.pid
        try:
            self._wait_for_start()
        except BaseException:
            self.close()
            raise

    def load(self, model: str, timeout_s: float = LOAD_TIMEOUT_S) -> Load:
        """Fetch a model that is absent, and return what it took once it is complete.

        Raises:
            DaemonError: the load failed.
            DaemonTimeout: it is not complete after ``timeout_s``.
        """
        process.forget_peak_rss(self.pid)
        with (
            Connection(self.socket_path) as control,
            Connection(self.socket_path, timeout_s) as waiter,
        ):
            began_cpu_s = process.cpu_s(self.pid)
            began_s = time.perf_counter()
            control.ask("prefetch", model=model)
            reply = waiter.ask("open", model=model, until="ready")
            wall_s = time.perf_counter() - began_s
            return Load(
                wall_s=wall_s,
                cpu_s=process.cpu_s(self.pid) - began_cpu_s,
                peak_rss_bytes=process.peak_rss_bytes(self.pid),
                path=str(reply["path"]),
            )

    def evict(self, model: str) -> None:
        """Drop a model, and return when its memory is free.

        Raises:
            DaemonError: it is leased, or the memory does not come back.
        """
        deadline_s = time.monotonic() + FREE_TIMEOUT_S
        with Connection(self.socket_path) as control:
            while not self._is_evicted(control, model):
                if time.monotonic() > deadline_s:
                    raise DaemonError(f"{model} is not free after {FREE_TIMEOUT_S:.0f} s")
                time.sleep(0.005)

    @staticmethod
    def _is_evicted(control: Connection, model: str) -> bool:
        state = control.ask("status", model=model)["models"][0]
        if state["state"] == "resident" and not state["leases"]:
            control.ask("evict", model=model)
        return bool(state["state"] == "absent")

    def close(self) -> None:
        """End the daemon and remove what it left; nothing the second time."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.segment_root, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _spawn(self, settings: Settings) -> subprocess.Popen[bytes]:
        config = self.directory / "cached.toml"
        config.write_text(toml(settings.models))
        command = [
            sys.executable,
            "-m",
            "cached",
            "serve",
            f"--config={config}",
            f"--socket={self.socket_path}",
            f"--segment-root={self.segment_root}",
            f"--http-port={self._http_port}",
            "--purge-on-exit",
            f"--fetch-threads={settings.fetch_threads}",
            f"--memory-budget={settings.memory_budget}",
            *settings.flags,
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CACHED_")}
        with (self.directory / "log").open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | dict(settings.environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_for_start(self) -> None:
        """Wait until workers and HTTP are served: its imports are part of no measurement."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline_s:
            try:
                Connection(self.socket_path).close()
                socket.create_connection(("127.0.0.1", self._http_port)).close()
            except OSError:
                time.sleep(0.01)
            else:
                return
        log = (self.directory / "log").read_text(errors="replace")
        raise DaemonError(f"`cached serve` did not start:\n{log}")


def toml(models: Mapping[str, str]) -> str:
    """Return a configuration with these models, none of them prefetched."""
    tables = (
        f"[models.{json.dumps(name)}]\nuri = {json.dumps(uri)}\nprefetch = false\n"
        for name, uri in models.items()
    )
    return "\n".join(tables)


class Connection:
    """A connection that asks one thing at a time; descriptors that come along are closed."""

    def __init__(self, path: Path, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        self._data = b""
        self._last_id = 0
        try:
            self._socket.connect(str(path))
            self.ask("hello", protocol=PROTOCOL, client="cached-bench")
        except BaseException:
            self._socket.close()
            raise

    def ask(self, op: str, **members: object) -> dict[str, Any]:
        """Send a request and return its reply.

        Raises:
            Refused: the reply is an error.
            DaemonError: the daemon hung up.
            DaemonTimeout: the reply does not come.
        """
        self._last_id += 1
        body = json.dumps({"id": self._last_id, "op": op, **members}).encode()
        try:
            self._socket.sendall(len(body).to_bytes(4, "big") + body)
            reply = self._read()
        except TimeoutError as error:
            message = f"{op}: no reply within {self._socket.gettimeout()} s"
            raise DaemonTimeout(message) from error
        except OSError as error:
            raise DaemonError(f"{op}: the daemon hung up: {error}") from error
        if refusal := reply.get("error"):
            raise Refused(op, refusal)
        return reply

    def close(self) -> None:
        """Hang up, which also ends the lease."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        self._fill(4)
        size_bytes = int.from_bytes(self._data[:4], "big")
        self._fill(4 + size_bytes)
        body, self._data = self._data[4 : 4 + size_bytes], self._data[4 + size_bytes :]
        reply: dict[str, Any] = json.loads(body)
        return reply

    def _fill(self, size_bytes: int) -> None:
        while len(self._data) < size_bytes:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, MAX_DESCRIPTORS)
            for each in descriptors:
                os.close(each)
            if not data:
                raise DaemonError("the daemon hung up")
            self._data += data
