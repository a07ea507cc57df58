"""A daemon that was killed leaves nothing in the way of the next one on its root and socket."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

import cached
from tests.e2e.conftest import aws
from tests.e2e.served import MIB
from tests.e2e.sparse import is_whole, name_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Daemons, SparseModels, Stores
    from tests.e2e.served import Served

TENSORS = 8
TENSOR_BYTES = 4 * MIB
MODEL_BYTES = TENSORS * TENSOR_BYTES
FILE = "sparse.safetensors"
URI = f"s3://models/{FILE}"


def only_file(served: Served) -> Path:
    """Return the one file of the model that lies in a daemon's root."""
    (path,) = served.root.rglob(FILE)
    return path


def is_held_by_another(fd: int) -> bool:
    """Return whether anybody but this one descriptor has a file open or mapped: F_SETLEASE."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return True
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("state", ["loading", "resident"])
def test_the_next_daemon_takes_over_from_one_that_was_killed(
    daemon: Daemons, store: Stores, sparse_model: SparseModels, state: str
):
    path = sparse_model(tensors=TENSORS, tensor_bytes=TENSOR_BYTES)
    slow = store({FILE: path}, throttle_bytes_per_s=4e6 if state == "loading" else None)
    first = daemon({"llm": URI}, more=aws(slow))
    old = cached.open("llm", timeout_s=15)
    early = old[name_of(0)]
    first.wait_for_state("llm", state)
    first.kill()
    left = only_file(first)
    assert left.is_relative_to(first.root / ("filling" if state == "loading" else "models"))
    fd = os.open(left, os.O_RDONLY | os.O_CLOEXEC)
    assert os.fstat(fd).st_blocks * 512 >= TENSOR_BYTES

    second = daemon({"llm": URI}, more=aws(store({FILE: path})), at=first.socket, root=first.root)
    assert second.model("llm")["state"] == "absent"
    assert second.left_files() == []
    swept = [line for line in second.records() if line["event"] == "left-overs swept"]
    assert [(line["versions"], line["size_bytes"]) for line in swept] == [(1, path.stat().st_size)]

    with cached.open("llm", timeout_s=15) as model:
        assert bytes(model.file(FILE)) == path.read_bytes()
        assert all(is_whole(number, model[name_of(number)]) for number in range(TENSORS))
        assert only_file(second).read_bytes() == path.read_bytes()

    assert is_whole(0, early)
    assert is_held_by_another(fd)  # by this process's mapping
    del early
    old.close()
    assert os.fstat(fd).st_nlink == 0
    assert not is_held_by_another(fd)  # so its memory goes with this descriptor
    os.close(fd)
