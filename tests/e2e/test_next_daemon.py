"""What the next daemon on a root believes, serves, checks and throws away; one at a time."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

import cached
from cached.core.digests import MANIFEST_NAME
from tests.e2e.conftest import aws
from tests.e2e.dense import PREFIX, SHARDS, URI, bytes_asked, dense
from tests.e2e.left import assert_counts, assert_nothing_but, found
from tests.e2e.served import run
from tests.fakes.s3_objects import stored
from tests.fakes.store_faults import Stall

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Daemons, Stores
    from tests.e2e.served import Served
    from tests.fakes.store_server import StoreServer

pytestmark = pytest.mark.usefixtures("tmpfs")

MODEL = dense()
SIZES = {path: len(content) for path, content in MODEL.files.items()}
LAST = list(MODEL.tensors)[-1]
SILENCE = Stall(math.inf, -1)  # not even a head


def loaded(daemon: Daemons, store: Stores, *flags: str, root: Path | None = None) -> Served:
    """Return a daemon that has the model."""
    more = aws(store(MODEL.objects()))
    served = daemon({"llm": URI}, *flags, more=more, prefetch=True, purge=False, root=root)
    served.wait_for_state("llm", "resident")
    return served


def next_one(
    daemon: Daemons, before: Served, server: StoreServer, *flags: str, prefetch: bool = True
) -> Served:
    """Start another daemon on root and socket of one that has ended."""
    return daemon(
        {"llm": URI},
        *flags,
        more=aws(server),
        prefetch=prefetch,
        purge=False,
        at=before.socket,
        root=before.root,
    )


def assert_whole(**settings: Any) -> None:
    """See that a worker gets every byte of the model."""
    with cached.open("llm", timeout_s=30, until="ready", **settings) as model:
        for name, content in MODEL.tensors.items():
            assert model[name].tobytes() == content, name
        for path, content in MODEL.files.items():
            assert bytes(model.file(path)) == content, path


def assert_tidy(served: Served) -> None:
    """See that it has the model, and in its root nothing else, all of it counted."""
    status = served.status()
    (told,) = status["models"]
    assert (told["state"], told["error"]) == ("resident", None)
    assert_nothing_but(served.root, told["version"], MODEL.files)
    assert_counts(served.root, status["memory"])


# --- a clean stop


@pytest.mark.slow
def test_what_a_stopped_daemon_left_is_served_before_the_store_answers(
    daemon: Daemons, store: Stores
):
    first = loaded(daemon, store)
    left = found(first.root)
    verified = first.model("llm")["verified"]
    assert first.stop() == 0
    assert found(first.root) == left

    faults = {("LIST", at): SILENCE for at in range(50)}
    server = store(MODEL.objects(), faults=faults)
    second = next_one(daemon, first, server)
    assert_whole()
    assert server.stalled.wait(30)
    told = second.model("llm")
    assert (told["state"], told["confirmed"]) == ("resident", False)
    assert told["verified"] == verified == "crc32"
    assert second.get("/readyz")[0] == 200

    server.faults.clear()
    server.resumed.set()
    wait_for(lambda: bool(second.model("llm")["confirmed"]))
    assert (server.gets, server.count("HEAD")) == (0, 0)
    assert_tidy(second)


@pytest.mark.slow
@pytest.mark.parametrize("is_running", [True, False], ids=["running", "stopped"])
def test_purge_removes_what_a_stopped_daemon_left(daemon: Daemons, store: Stores, is_running: bool):
    first = loaded(daemon, store)
    first.stop()
    if is_running:
        second = next_one(daemon, first, store(MODEL.objects()), prefetch=False)
        second.wait_for_state("llm", "resident")
        ended = second.run("purge", "--json")
        memory = second.status()["memory"]
        assert memory["free_bytes"] == memory["budget_bytes"]
        assert found(first.root) == ["about/", "filling/", "lock", "models/"]
    else:
        ended = first.run("purge", "--json", f"--segment-root={first.root}")
        assert not first.root.exists()
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["models"] == ["llm"]
    assert MODEL.size_bytes <= told["freed_bytes"] < MODEL.size_bytes + 4096 * len(MODEL.files)


def wait_for(is_so: Callable[[], bool]) -> None:
    """Return once it is so; the time limit of the test bounds it."""
    while not is_so():
        pass


# --- two daemons on one root


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tmpfs", "memfd"])
def test_a_second_daemon_on_a_root_is_refused(
    daemon: Daemons, store: Stores, tmp_path: Path, kind: str
):
    first = loaded(daemon, store)
    left = found(first.root)
    ended = run(
        "serve",
        f"--socket={tmp_path}/other.sock",
        f"--segment-root={first.root}",
        f"--segments={kind}",
        f"--model=llm={URI}",
    )
    assert ended.returncode == 2, ended.stderr
    assert f"in use by another daemon, pid {first.pid}" in ended.stderr
    assert str(first.root) in ended.stderr
    assert found(first.root) == left
    assert_whole()

    first.kill()
    next_one(daemon, first, store(MODEL.objects()))
    assert_whole()


# --- a worker with a lease


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("call", ["is_stale", "tensor"])
def test_a_lease_is_renewed_by_the_next_call(daemon: Daemons, store: Stores, call: str):
    slow = store(MODEL.objects(), faults=dict.fromkeys(range(8, 100), SILENCE))
    first = daemon({"llm": URI}, more=aws(slow), prefetch=True, purge=False)
    model = cached.open("llm", timeout_s=30)
    assert slow.stalled.wait(30)
    first.kill()
    with pytest.raises(cached.DaemonUnavailable):
        model.is_stale  # noqa: B018 - it asks

    second = next_one(daemon, first, store(MODEL.objects()))
    assert second.model("llm")["leases"] == 0
    if call == "is_stale":
        assert not model.is_stale
    else:
        assert model[LAST].tobytes() == MODEL.tensors[LAST]
    assert second.model("llm")["leases"] == 1
    assert second.run("evict", "llm").returncode == 1, "it is leased"

    for name, content in MODEL.tensors.items():
        assert model[name].tobytes() == content, name
    model.close()
    wait_for(lambda: second.model("llm")["leases"] == 0)


# --- roots of other times


def rewritten(root: Path, **told: object) -> None:
    """Change what is told about the one version in a root."""
    (description,) = root.glob("about/*.json")
    description.write_text(json.dumps({**json.loads(description.read_text()), **told}))


def flipped(root: Path, path: str, at: int | None = None) -> None:
    """Change one byte of a file, as a disk may after a power cut: in the middle, or ``at``."""
    file = root / "models/llm/current" / path
    mode = file.stat().st_mode
    file.chmod(0o600)
    with file.open("r+b") as opened:
        opened.seek((SIZES[path] // 2 if at is None else at) % SIZES[path])
        (byte,) = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))
    file.chmod(mode)


@pytest.mark.slow
def test_what_a_daemon_leaves_that_is_killed_between_two_steps_goes(daemon: Daemons, store: Stores):
    first = loaded(daemon, store)
    first.stop()
    for path in ("about/8.map", "about/8.new", "about/9.json", "filling/9/a.bin", "models/x/1/b"):
        debris = first.root / path
        debris.parent.mkdir(parents=True, exist_ok=True)
        debris.write_bytes(b"{}" * 50_000)
    (first.root / "models/llm/.current").symlink_to("elsewhere")
    server = store(MODEL.objects())
    second = next_one(daemon, first, server)
    assert_whole()
    going = [second.root / "models/x", second.root / "filling/9"]
    wait_for(lambda: not any(place.exists() for place in going))
    assert bytes_asked(server) == {}
    assert_tidy(second)


@pytest.mark.slow
def test_a_root_of_another_layout_is_not_believed(daemon: Daemons, store: Stores):
    first = loaded(daemon, store)
    first.stop()
    rewritten(first.root, layout=2)
    server = store(MODEL.objects())
    second = next_one(daemon, first, server)
    assert_whole()
    assert bytes_asked(server) == SIZES
    assert_tidy(second)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tmpfs", "file"])
def test_what_an_earlier_boot_left_is_checked_before_it_is_read(
    daemon: Daemons, store: Stores, request: pytest.FixtureRequest, kind: str
):
    root: Path | None = request.getfixturevalue("on_disk") if kind == "file" else None
    segments = f"--segments={kind}"
    first = loaded(daemon, store, segments, root=root)
    first.stop()
    wrong = f"model-{SHARDS - 1}.safetensors"
    rewritten(first.root, boot_id="00000000-0000-0000-0000-000000000000")
    flipped(first.root, wrong)

    faults = {("HEAD", at): SILENCE for at in range(50)}
    server = store(MODEL.objects(), faults=faults)
    second = next_one(daemon, first, server, segments)
    assert server.stalled.wait(30)
    with pytest.raises(cached.TimedOut):
        cached.open("llm", timeout_s=0.5)
    assert second.model("llm")["state"] == "loading"

    server.faults.clear()
    server.resumed.set()
    assert_whole()
    assert bytes_asked(server) == {wrong: SIZES[wrong]}
    assert second.model("llm")["verified"] == "crc32"
    assert_tidy(second)


@pytest.mark.slow
def test_what_an_earlier_boot_left_goes_if_nothing_is_checked(daemon: Daemons, store: Stores):
    first = loaded(daemon, store)
    first.stop()
    rewritten(first.root, boot_id="00000000-0000-0000-0000-000000000000")
    flipped(first.root, f"model-{SHARDS - 1}.safetensors")
    server = store(MODEL.objects())
    second = next_one(daemon, first, server, "--verify=off")
    assert_whole()
    assert bytes_asked(server) == SIZES
    assert_tidy(second)


@pytest.mark.slow
def test_what_an_earlier_boot_left_and_cannot_be_checked_is_fetched_anew(
    daemon: Daemons, store: Stores
):
    first = loaded(daemon, store)
    first.stop()
    rewritten(first.root, boot_id="00000000-0000-0000-0000-000000000000")
    for path in SIZES:
        flipped(first.root, path)
    plain = {key: found._replace(headers=()) for key, found in MODEL.objects().items()}
    server = store(plain)
    second = next_one(daemon, first, server)
    assert_whole()
    assert bytes_asked(server) == SIZES
    assert_tidy(second)


@pytest.mark.slow
def test_by_digests_every_next_daemon_checks_and_views_heal_in_place(
    daemon: Daemons, store: Stores, tmp_path: Path
):
    for path, content in MODEL.files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert run("digest", f"file://{tmp_path}/").returncode == 0
    listed = stored((tmp_path / MANIFEST_NAME).read_bytes())
    objects = {**MODEL.objects(), PREFIX + MANIFEST_NAME: listed}

    more = aws(store(objects))
    first = daemon({"llm": URI}, "--verify=digest", more=more, prefetch=True, purge=False)
    with cached.open("llm", timeout_s=30, until="ready") as model:
        view = model[LAST]
    assert first.model("llm")["verified"] == "digest"
    first.stop()
    wrong = f"model-{SHARDS - 1}.safetensors"
    flipped(first.root, wrong, at=-1)
    assert view.tobytes() != MODEL.tensors[LAST]

    server = store(objects)
    second = next_one(daemon, first, server, "--verify=digest")
    assert_whole()
    assert view.tobytes() == MODEL.tensors[LAST]
    assert bytes_asked(server) == {wrong: SIZES[wrong]}
    assert second.model("llm")["verified"] == "digest"
