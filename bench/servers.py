"""The stores that the benches fetch from: nginx (fast, no S3) and SeaweedFS (real S3).

Both hold one bucket and answer on 127.0.0.1. Each is used in a ``with`` block, which ends it.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from bench import requirements
from bench.seaweed import ACCESS_KEY, REGION, SECRET_KEY, Seaweed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BUCKET = "models"
HOST = "127.0.0.1"
NGINX_WORKERS = 2
START_TIMEOUT_S = 10.0
SIGNED_FOR_S = 3600
UPLOAD_PART_BYTES = 64 << 20

NGINX_CONF = """\
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
worker_processes {workers};
{user}
events {{ worker_connections 512; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  tcp_nodelay on;
  keepalive_timeout 600s;
  keepalive_requests 1000000;
  default_type application/octet-stream;
  open_file_cache max=64;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  server {{
    listen {host}:{port};
    location /{bucket}/ {{ alias {objects}/; }}
  }}
}}
"""


class Store(NamedTuple):
    """A running store with its objects in the bucket.

    Attributes:
        endpoint_url: where it answers.
        url: of an object by its key, signed where the store wants it.
        access_key, secret_key, region: of a user who may read.
    """

    endpoint_url: str
    url: Callable[[str], str]
    access_key: str
    secret_key: str
    region: str

    def environment(self) -> dict[str, str]:
        """Return the AWS_* variables of that user."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def nginx(objects: Path) -> Iterator[Store]:
    """Serve the files of ``objects``, by two workers, from the page cache.

    Raises:
        RuntimeError: it does not come up; the text holds its error log.
    """
    program = requirements.program("nginx")
    if program is None:
        raise RuntimeError("there is no nginx; run `make bench-setup`")
    directory = Path(tempfile.mkdtemp(prefix="cached-nginx-"))
    port = free_port()
    (directory / "nginx.conf").write_text(
        NGINX_CONF.format(
            directory=directory,
            workers=NGINX_WORKERS,
            user="user root;" if os.geteuid() == 0 else "",
            host=HOST,
            port=port,
            bucket=BUCKET,
            objects=objects,
        )
    )
    command = [program, "-p", str(directory), "-c", "nginx.conf", "-e", f"{directory}/error.log"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        if not _answers(process, port):
            log = (directory / "error.log").read_text(errors="replace")
            raise RuntimeError(f"nginx does not answer on port {port}:\n{log}")
        endpoint_url = f"http://{HOST}:{port}"
        yield Store(
            endpoint_url=endpoint_url,
            url=lambda key: f"{endpoint_url}/{BUCKET}/{quote(key)}",
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            region=REGION,
        )
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def seaweedfs(objects: Sequence[Path]) -> Iterator[Store]:
    """Serve the given files, uploaded first, by SeaweedFS."""
    from boto3.s3.transfer import TransferConfig

    with Seaweed() as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        transfer = TransferConfig(
            multipart_threshold=UPLOAD_PART_BYTES,
            multipart_chunksize=UPLOAD_PART_BYTES,
            max_concurrency=2,
        )
        for path in objects:
            client.upload_file(str(path), BUCKET, path.name, Config=transfer)

        def url(key: str) -> str:
            signed: str = client.generate_presigned_url(
                "get_object", Params={"Bucket": BUCKET, "Key": key}, ExpiresIn=SIGNED_FOR_S
            )
            return signed

        yield Store(
            endpoint_url=server.endpoint_url,
            url=url,
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            region=REGION,
        )


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        connection = http.client.HTTPConnection(HOST, port, timeout=5)
        try:
            connection.request("HEAD", "/")
            connection.getresponse()
        except OSError:
            time.sleep(0.02)
        else:
            return True
        finally:
            connection.close()
    return False
