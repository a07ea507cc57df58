"""A real control group around the daemon: it stays within the limit, also when that is lowered.

Who writes a page of a tmpfs is charged for it: the daemon's group holds the models. Its limit
counts at each admission. What is in memory already, the kernel can take back from nobody.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import cached
from tests.e2e.conftest import aws
from tests.e2e.served import COMMAND, MIB
from tests.e2e.sparse import is_whole, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Daemons, SparseModels, Stores
    from tests.e2e.served import Served
    from tests.fakes.store_server import StoreServer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tmpfs")]

TENSORS = 4
TENSOR_BYTES = 20 * MIB
MODEL_BYTES = TENSORS * TENSOR_BYTES
ROOM_BYTES = 64 * MIB  # for the daemon itself
ALL_BYTES = 3 * MODEL_BYTES + ROOM_BYTES
URIS = {name: f"s3://models/{name}/" for name in "ab"}


class Group(NamedTuple):
    """A control group of memory.

    Attributes:
        path: its directory.
        limit: the file with the limit.
        usage: the file with what is used.
    """

    path: Path
    limit: str
    usage: str

    def lower(self, limit_bytes: int) -> None:
        (self.path / self.limit).write_text(str(limit_bytes))

    @property
    def used_bytes(self) -> int:
        return int((self.path / self.usage).read_text())

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for it."""
        for name in ("memory.events", "memory.oom_control"):
            if (self.path / name).exists():
                words = (self.path / name).read_text().split()
                return int(dict(zip(words[::2], words[1::2], strict=True))["oom_kill"])
        raise AssertionError("the group tells nothing of kills")

    @property
    def command(self) -> tuple[str, ...]:
        """Return the command of a daemon that runs in it."""
        return ("sh", "-c", f'echo $$ >{self.path}/cgroup.procs && exec "$0" "$@"', str(COMMAND))


@pytest.fixture
def group() -> Iterator[Group]:
    """Make a group below this process's own, with room for three models and a daemon."""
    made = _made()
    if made is None:
        pytest.skip("NO TEST OF CONTROL GROUPS: none can be made here (root, and a writable mount)")
    made.lower(ALL_BYTES)
    yield made
    made.path.rmdir()


def _made() -> Group | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            kinds = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        elif not controllers:
            kinds = ("", "memory.max", "memory.current")
        else:
            continue
        mount, limit, usage = kinds
        place = Path("/sys/fs/cgroup", mount, path.strip("/"), f"cached-test-{os.getpid()}")
        with contextlib.suppress(OSError):
            place.mkdir()
            if os.access(place / limit, os.W_OK):
                return Group(place, limit, usage)
            place.rmdir()
    return None


@pytest.fixture
def server(store: Stores, sparse_model: SparseModels) -> StoreServer:
    path = sparse_model(tensors=TENSORS, tensor_bytes=TENSOR_BYTES)
    return store({f"{name}/model.safetensors": path for name in URIS})


@pytest.fixture
def served(group: Group, daemon: Daemons, server: StoreServer) -> Served:
    """A daemon in the group, that has the first model."""
    served = daemon(URIS, "--memory-headroom=16MiB", more=aws(server), command=group.command)
    assert served.run("prefetch", "a").returncode == 0
    assert MODEL_BYTES < group.used_bytes <= ALL_BYTES
    return served


def assert_whole(model: cached.Model) -> None:
    for number in range(TENSORS):
        assert is_whole(number, model[name_of(number)])


def test_a_model_that_nobody_has_goes_for_another_once_the_limit_is_lowered(
    group: Group, served: Served
):
    lowered_bytes = MODEL_BYTES + ROOM_BYTES + MODEL_BYTES // 4
    group.lower(lowered_bytes)
    with cached.open("b", timeout_s=30, until="ready") as model:
        assert_whole(model)
        assert served.model("a")["state"] == "absent"
        assert group.used_bytes <= lowered_bytes
    assert group.kills == 0


def test_without_a_lower_limit_both_stay(group: Group, served: Served):
    with cached.open("b", timeout_s=30, until="ready") as model:
        assert_whole(model)
    assert served.model("a")["state"] == "resident"
    assert group.kills == 0


def test_what_somebody_has_stays_and_the_other_is_refused_with_the_numbers(
    group: Group, served: Served
):
    with cached.open("a", timeout_s=30) as model:
        group.lower(MODEL_BYTES + ROOM_BYTES + MODEL_BYTES // 4)
        with pytest.raises(cached.OverBudget, match=r"b needs 80\.1 MiB, .* free"):
            cached.open("b", timeout_s=30)
        assert_whole(model)
        group.lower(ALL_BYTES)
        with cached.open("b", timeout_s=30, until="ready") as other:
            assert_whole(other)
    assert served.model("a")["state"] == "resident"
    assert group.kills == 0


def test_a_limit_below_what_somebody_has_is_the_kernels_to_refuse(group: Group, served: Served):
    if group.limit == "memory.max":
        pytest.skip("NO TEST OF A LIMIT BELOW WHAT IS USED: cgroup v2 takes it, and kills")
    with cached.open("a", timeout_s=30) as model:
        with pytest.raises(OSError) as refused:
            group.lower(MODEL_BYTES // 2)
        assert refused.value.errno == errno.EBUSY
        assert_whole(model)
    assert served.model("a")["state"] == "resident"
    assert group.kills == 0
