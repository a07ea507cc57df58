"""``cached serve`` as a real process, and what can be seen of it from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMAND = Path(sysconfig.get_path("scripts"), "cached")
TMPFS = Path("/dev/shm")
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 12.0  # less than a fast test may take
MIB = 1 << 20


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without CACHED_*, AWS_* and proxies, and with ``more``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CACHED_", "AWS_")) and not name.lower().endswith("_proxy")
    }
    nothing = {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONFAULTHANDLER": "1",
    }
    return {**kept, **nothing, **(more or {})}


def run(
    *arguments: str, more: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run one command of ``cached`` to its end."""
    return subprocess.run(
        [COMMAND, *arguments],
        env=environment(more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class Served:
    """A running daemon.

    Attributes:
        directory: of its socket and log.
        socket: where workers connect.
        root: of its segments; on a tmpfs where there is one.
        process: the daemon.
        purge: it shall leave nothing in its root when it ends.
    """

    def __init__(  # noqa: PLR0913 - by keywords
        self,
        models: Mapping[str, str],
        *flags: str,
        more: Mapping[str, str] | None = None,
        prefetch: bool = False,
        at: Path | None = None,
        root: Path | None = None,
        purge: bool = True,
        command: tuple[str, ...] = (str(COMMAND),),
    ) -> None:
        self.purge = purge
        self.directory = Path(tempfile.mkdtemp(prefix="cached-e2e-"))
        self.root = root or Path(
            tempfile.mkdtemp(prefix="cached-e2e-", dir=TMPFS if TMPFS.is_dir() else None)
        )
        self.socket = self.directory / "cached.sock" if at is None else at
        self.log = self.directory / "log"
        self.http_port = free_port()
        config = self.directory / "cached.toml"
        config.write_text(_toml(models, prefetch=prefetch))
        arguments = [
            "serve",
            f"--config={config}",
            f"--socket={self.socket}",
            f"--segment-root={self.root}",
            f"--http-port={self.http_port}",
            *(["--purge-on-exit"] if purge else []),
            *flags,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                env=environment(more),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def wait_for_start(self) -> None:
        """Return once it listens."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._listens():
            assert self.process.poll() is None, f"the daemon ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline_s, f"the daemon is silent:\n{self.log.read_text()}"
            time.sleep(0.002)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def worker_environment(self) -> dict[str, str]:
        """Return what a worker needs to find it."""
        return {"CACHED_SOCKET": str(self.socket)}

    def run(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command of ``cached`` that talks to this daemon."""
        return run(*arguments, more=self.worker_environment(), timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """Return what ``cached status --json`` tells."""
        ended = self.run("status", "--json")
        assert ended.returncode == 0, ended.stderr
        told: dict[str, Any] = json.loads(ended.stdout)
        return told

    def model(self, name: str) -> dict[str, Any]:
        """Return what ``cached status --json`` tells of a model."""
        return next(model for model in self.status()["models"] if model["name"] == name)

    def wait_for_state(self, name: str, state: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Return a model's status once it is in this state."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            model = self.model(name)
            if model["state"] == state:
                return model
            assert time.monotonic() < deadline_s, f"{name} is not {state} but {model}"
            time.sleep(0.05)

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body of a GET to its HTTP side; waits until that answers."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                url = f"http://127.0.0.1:{self.http_port}{path}"
                with urllib.request.urlopen(url, timeout=10) as reply:
                    return reply.status, reply.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()
            except urllib.error.URLError:
                assert time.monotonic() < deadline_s, "the HTTP side does not answer"
                time.sleep(0.02)

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample, summed over the labels that are not given; 0 if there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        status, text = self.get("/metrics")
        assert status == 200, text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of its log; every one must be JSON, but the last if it was cut."""
        return [
            json.loads(line)
            for line in self.log.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]

    def stop(self) -> int:
        """End it by SIGTERM and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler tells where every thread is
            self.process.wait()
            raise AssertionError(f"the daemon does not end:\n{self.log.read_text()}") from None

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()
        self.process.wait()

    def left_files(self) -> list[str]:
        """Return what is in its segment root; directories and the lock in use do not count."""
        is_running = self.process.poll() is None
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*")
            if not path.is_dir() and not (is_running and path == self.root / "lock")
        )

    def remove(self) -> None:
        """Kill it if it still runs, and remove everything."""
        self.kill()
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def _toml(models: Mapping[str, str], *, prefetch: bool) -> str:
    tables = (
        f"[models.{json.dumps(name)}]\n"
        f"uri = {json.dumps(uri)}\n"
        f"prefetch = {'true' if prefetch else 'false'}\n"
        for name, uri in models.items()
    )
    return "\n".join(tables)
