"""Commands that give memory back say how much; with no daemon, purge removes what one left."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

import cached
from cached.adapters.segments import DirectorySegments
from cached.adapters.segments.root import claim
from cached.core.manifest import manifest_of
from cached.core.objects import FileRef, Part, StoredObject, VersionRef
from tests.fakes.commands import HELD, output

if TYPE_CHECKING:
    from pathlib import Path


def test_evicting_what_is_absent_tells_that_nothing_was_there(daemon, capsys):
    assert output(capsys, "evict", "m")[0] == "m: nothing of it was in memory\n"


def test_evict_is_refused_while_a_worker_holds_the_model(daemon, capsys):
    with cached.open("m", timeout_s=10, until="ready"):
        _, err = output(capsys, "evict", "m", code=1)
        assert "m is leased by 1 worker;" in err
    daemon.wait_for_leases(0)
    assert output(capsys, "evict", "m")[0] == "m: evicted, 1.0 MiB freed\n"


def test_evict_goes_on_after_one_that_cannot(daemon, capsys):
    output(capsys, "prefetch", "m")
    out, err = output(capsys, "evict", "nobody", "m", code=1)
    assert out == "m: evicted, 1.0 MiB freed\n"
    assert "nobody" in err


# --- purge


def test_purge_tells_what_it_freed(scripted, capsys):
    def script(daemon):
        daemon.greet()
        request = daemon.expect("purge")
        daemon.send({"id": request["id"], "freed_bytes": 3 << 20, "models": ["m", "clip"]})
        if is_text:
            daemon.send({"id": daemon.expect("status")["id"], "models": []})

    is_text = False
    for arguments, expected in (
        ([], "purged m, clip: 3 MiB freed\n"),
        (["--json"], '{\n  "freed_bytes": 3145728,\n  "models": [\n    "m",\n    "clip"\n  ]\n}\n'),
    ):
        is_text = not arguments
        scripted(script)
        assert output(capsys, "purge", *arguments)[0] == expected


def test_purge_of_nothing_says_so(scripted, capsys):
    def script(daemon):
        daemon.greet()
        daemon.send({"id": daemon.expect("purge")["id"], "freed_bytes": 0, "models": []})
        daemon.send({"id": daemon.expect("status")["id"], "models": []})

    scripted(script)
    assert output(capsys, "purge")[0] == "nothing was there that could be freed\n"


def test_purge_names_what_stays_and_who_holds_it(daemon, capsys):
    output(capsys, "prefetch", "clip", "m")
    with cached.open("m", timeout_s=10, until="ready"):
        out, _ = output(capsys, "purge")
        assert out == "purged clip: 1.0 MiB freed\nm stays: leased by 1 worker\n"
        with cached.open("m", timeout_s=10):
            out, _ = output(capsys, "purge")
            assert out == "nothing was freed\nm stays: leased by 2 workers\n"


def test_purge_names_what_is_mapped_by_path_alone(daemon, capsys):
    output(capsys, "prefetch", "m")
    with open(f"{daemon.status()['path']}/{HELD}", "rb"):
        out, _ = output(capsys, "purge")
    assert out == "nothing was freed\nm stays: mapped by a process that holds no lease\n"


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A segment root as a stopped daemon leaves it."""
    root = tmp_path / "left"
    segments = DirectorySegments(str(root))
    for name, size_bytes in (("m", 3000), ("n", 8 << 10)):
        listing = manifest_of("s3://b/", [StoredObject("w", "w", size_bytes, '"1"')])
        of = VersionRef(name, listing.version, 1)
        segments.create(of, listing)
        part = Part(0, FileRef(of, 0), "s3://b/", listing.objects[0], 0, size_bytes)
        segments.sink(part).accept(0, memoryview(bytes(size_bytes)))
        if name == "m":
            segments.publish(of)
    segments.close()
    monkeypatch.setenv("CACHED_SOCKET", str(tmp_path / "none"))
    monkeypatch.setenv("CACHED_SEGMENT_ROOT", str(root))
    return root


def test_without_a_daemon_purge_removes_what_one_left(left, capsys):
    out, _ = output(capsys, "purge")
    assert out == f"no daemon runs; in {left} purged m, n: 12 KiB freed\n"
    assert [path for path in left.rglob("*") if path.name != "lock"] == []
    out, _ = output(capsys, "purge", "--json")
    assert json.loads(out) == {"freed_bytes": 0, "models": []}


def test_purge_of_a_root_that_is_not_there_is_an_error_and_makes_none(left, capsys, tmp_path):
    other = tmp_path / "other"
    _, err = output(capsys, "purge", "--segment-root", str(other), code=2)
    assert f"segment root {other} is not there (from --segment-root); it may be purged " in err
    assert not other.exists()
    assert list(left.glob("models/m/*/w"))


def test_purge_of_a_root_with_nothing_in_it_is_fine(left, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    out, _ = output(capsys, "purge", "--segment-root", str(tmp_path / "empty"))
    assert out.endswith("nothing was there that could be freed\n")


def test_purge_where_no_daemon_has_been_yet_is_fine(left, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHED_SEGMENT_ROOT", str(tmp_path / "other"))
    out, _ = output(capsys, "purge")
    assert out.endswith("nothing was there that could be freed\n")
    assert not (tmp_path / "other").exists()


def test_purge_takes_nothing_from_a_daemon_on_another_socket(left, capsys):
    lock_fd = claim(str(left), 0o700)
    try:
        _, err = output(capsys, "purge", code=2)
    finally:
        os.close(lock_fd)
    assert f"segment root {left} is in use by another daemon, pid {os.getpid()}" in err
    assert list(left.glob("models/m/*/w"))


def test_purge_removes_nothing_when_the_daemon_dies_while_it_is_asked(
    left, scripted, capsys, monkeypatch
):
    def script(daemon):
        daemon.greet()
        daemon.expect("purge")

    scripted(script)
    _, err = output(capsys, "purge", code=3)
    assert "closed the connection" in err
    assert list(left.glob("models/m/*/w"))
