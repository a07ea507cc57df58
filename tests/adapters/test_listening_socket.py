"""A daemon gets its socket only where nobody lives, and leaves nothing of others touched."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cached.adapters import listening_socket
from cached.adapters.listening_socket import MAX_ADDRESS_BYTES, ListeningSocket, listen
from cached.core.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterator


def connects(address: str | Path) -> bool:
    name = os.fspath(address)
    with socket.socket(socket.AF_UNIX) as worker:
        try:
            worker.connect("\0" + name[1:] if name.startswith("@") else name)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def lock_of(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


def leave_dead(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a directory with a short name: pytest's own may be over the kernel's limit."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cached.sock"


@pytest.fixture
def abstract(request: pytest.FixtureRequest) -> str:
    return f"@cached-test-{os.getpid()}-{request.node.name}"


def test_it_listens_with_the_given_mode_whatever_the_umask(path: Path):
    before = os.umask(0o077)
    try:
        listening = listen(str(path), 0o662)
    finally:
        os.umask(before)
    found = path.stat().st_mode
    assert stat.S_ISSOCK(found)
    assert stat.S_IMODE(found) == 0o662
    assert connects(path)
    assert not listening.socket.getblocking()
    listening.close()


def test_nothing_but_the_socket_is_left_in_the_directory(path: Path):
    listening = listen(str(path))
    assert list(path.parent.iterdir()) == [path]
    listening.close()
    assert list(path.parent.iterdir()) == []
    listening.close()


def test_a_relative_path_is_fine(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(path.parent)
    listening = listen(path.name)
    assert connects(path)
    listening.close()


def test_a_dead_daemons_socket_is_replaced(path: Path):
    leave_dead(path)
    assert not connects(path)
    listening = listen(str(path))
    assert connects(path)
    listening.close()


def test_a_live_daemons_socket_is_refused_with_its_pid(path: Path):
    first = listen(str(path))
    with pytest.raises(InvalidConfig) as caught:
        listen(str(path))
    assert f"the socket {path} is taken by a process that runs (pid {os.getpid()})" in str(
        caught.value
    )
    assert "--socket" in caught.value.hint
    assert connects(path)
    first.close()


def test_a_live_daemon_whose_backlog_is_full_is_refused(path: Path):
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        with pytest.raises(InvalidConfig, match="taken by a process that does not answer"):
            listen(str(path))
    assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_refused_and_stays(path: Path, kind: str):
    if kind == "file":
        path.write_text("mine")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(InvalidConfig, match="something that is not a socket is there"):
        listen(str(path))
    assert list(path.parent.iterdir()) == [path]
    if kind == "file":
        assert path.read_text() == "mine"


def test_a_socket_of_another_kind_is_refused(path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(InvalidConfig, match=f"cannot listen on {path}: "):
            listen(str(path))
    assert path.exists()


@pytest.mark.parametrize("prefix", ["/", "@"])
def test_an_address_that_is_too_long_is_refused_with_both_numbers(prefix: str):
    address = prefix + "é" * 60
    length = len(address.removeprefix("@").encode())
    with pytest.raises(InvalidConfig, match=rf"is {length} bytes long.* at most 107"):
        listen(address)


@pytest.mark.parametrize("base", ["s", "cached.sock", "c" * 40])
def test_a_path_may_be_as_long_as_the_kernel_allows(tmp_path: Path, base: str):
    filler = MAX_ADDRESS_BYTES - len(str(tmp_path)) - len(base) - 2
    directory = tmp_path / ("d" * filler)
    directory.mkdir()
    path = directory / base
    assert len(str(path)) == MAX_ADDRESS_BYTES
    listening = listen(str(path))
    assert connects(path)
    listening.close()
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("address", ["", "@", "/a\0b"])
def test_an_address_must_be_a_name(address: str):
    with pytest.raises(InvalidConfig, match="must be a path or @NAME"):
        listen(address)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InvalidConfig, match=r"directory .*/gone does not exist; make it"):
        listen(str(tmp_path / "gone" / "cached.sock"))


def test_a_directory_that_is_a_file_is_refused(path: Path):
    path.write_text("")
    with pytest.raises(InvalidConfig, match="Not a directory"):
        listen(str(path / "cached.sock"))


def test_the_private_directory_is_made_with_mode_0700(tmp_path: Path):
    private = tmp_path / "cached-0"
    listening = listen(str(private / "cached.sock"), private=str(private))
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    listening.close()


def test_a_private_directory_that_others_may_enter_is_closed_to_them(tmp_path: Path):
    private = tmp_path / "cached-0"
    private.mkdir()
    private.chmod(0o777)
    listening = listen(str(private / "cached.sock"), private=str(private))
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    listening.close()


def test_a_private_directory_that_is_a_link_is_refused(tmp_path: Path):
    private = tmp_path / "cached-0"
    private.symlink_to(tmp_path)
    with pytest.raises(InvalidConfig, match="is not private to uid"):
        listen(str(private / "cached.sock"), private=str(private))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_private_directory_of_somebody_else_is_refused(tmp_path: Path):
    private = tmp_path / "cached-0"
    private.mkdir(0o755)
    os.chown(private, 4711, 4711)
    with pytest.raises(InvalidConfig, match="it belongs to uid 4711"):
        listen(str(private / "cached.sock"), private=str(private))
    assert list(private.iterdir()) == []


def test_of_two_daemons_that_start_at_once_one_is_refused(path: Path):
    leave_dead(path)

    def start(_: int) -> ListeningSocket | None:
        try:
            return listen(str(path))
        except InvalidConfig:
            return None

    with ThreadPool(8) as pool:
        started = [listening for listening in pool.map(start, range(8)) if listening]
    assert len(started) == 1
    assert connects(path)
    started[0].close()


def test_a_directory_that_stays_locked_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listening_socket, "LOCK_TRIES", 2)
    with lock_of(path).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InvalidConfig, match="locked by another process"):
            listen(str(path))
    assert not path.exists()


def test_who_locks_the_directory_does_not_keep_a_daemon_from_starting(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(listening_socket, "LOCK_TRIES", 2)
    folder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    listening = listen(str(path))
    assert connects(path)
    listening.close()
    os.close(folder)


def test_only_the_daemons_user_can_open_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch):
    modes = []
    rename = os.rename

    def look(*names: str) -> None:
        modes.append(stat.S_IMODE(lock_of(path).stat().st_mode))
        rename(*names)

    monkeypatch.setattr(os, "rename", look)
    listen(str(path)).close()
    assert modes == [0o600]


def test_a_lock_that_a_killed_daemon_left_is_taken_over_and_removed(path: Path):
    lock_of(path).touch()
    listening = listen(str(path))
    assert list(path.parent.iterdir()) == [path]
    listening.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_lock_of_somebody_else_is_refused(path: Path):
    lock_of(path).touch()
    os.chown(lock_of(path), 4711, 4711)
    with pytest.raises(InvalidConfig, match=r"belongs to uid 4711|Permission denied"):
        listen(str(path))
    assert lock_of(path).exists()


def test_a_temporary_name_that_is_in_use_is_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch):
    random = iter([b"\1" * 6, b"\1" * 6, b"\2" * 6])
    monkeypatch.setattr(os, "urandom", lambda size: next(random))
    other = path.parent / ("01" * 6)
    other.write_text("mine")
    listening = listen(str(path))
    assert next(random, None) is None
    assert connects(path)
    assert other.read_text() == "mine"
    listening.close()


def test_a_directory_without_a_free_name_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "urandom", lambda size: b"\1" * size)
    (path.parent / ("01" * 6)).touch()
    with pytest.raises(InvalidConfig, match="no free name for the socket"):
        listen(str(path))


@pytest.mark.parametrize("step", ["chmod", "rename"])
def test_a_start_that_is_cut_short_leaves_nothing_and_keeps_the_dead_socket(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    leave_dead(path)

    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(InvalidConfig, match="Read-only file system"):
        listen(str(path))
    assert list(path.parent.iterdir()) == [path]


def test_a_place_where_no_socket_can_be_made_is_refused():
    with pytest.raises(InvalidConfig, match=r"cannot listen on /proc/cached\.sock: .*; choose"):
        listen("/proc/cached.sock")


def test_a_bug_of_ours_is_not_hidden_and_leaves_nobody_listening(
    abstract: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(listening_socket, "BACKLOG", "many")
    with pytest.raises(TypeError):
        listen(abstract)
    assert not connects(abstract)


def test_close_leaves_a_socket_that_somebody_else_has_put_there(path: Path):
    first = listen(str(path))
    path.unlink()
    second = listen(str(path))
    first.close()
    assert connects(path)
    second.close()
    assert not path.exists()


def test_close_does_not_mind_that_the_directory_is_gone(path: Path):
    listening = listen(str(path))
    path.unlink()
    path.parent.rmdir()
    listening.close()


def test_a_changed_mode_is_still_our_socket(path: Path):
    listening = listen(str(path))
    path.chmod(0o600)
    listening.close()
    assert not path.exists()


def test_an_abstract_name_is_no_file_and_is_free_again_after_close(abstract: str):
    for _ in range(2):
        listening = listen(abstract)
        assert connects(abstract)
        listening.close()
        assert not connects(abstract)


def test_an_abstract_name_of_a_live_daemon_is_refused_with_its_pid(abstract: str):
    first = listen(abstract)
    with pytest.raises(InvalidConfig, match=rf"is taken by .* \(pid {os.getpid()}\)"):
        listen(abstract)
    first.close()


def test_the_mode_of_an_abstract_socket_is_applied_to_the_peer(abstract: str):
    us, group = os.geteuid(), os.getegid()
    for mode, stranger, colleague in ((0o600, 0, 0), (0o660, 0, 1), (0o666, 1, 1)):
        listening = listen(abstract, mode)
        assert listening.admits(us, group)
        assert listening.admits(0, 0)
        assert listening.admits(4711, 4711) == bool(stranger)
        assert listening.admits(4711, group) == bool(colleague)
        listening.close()


def test_who_takes_every_place_leaves_some_to_others_to_root_and_to_the_daemons_user(path: Path):
    listening = listen(str(path))
    connected: list[int] = []

    def has_place(uid: int) -> bool:
        return listening.has_place(uid, len(connected), connected.count(uid), 0, 1024)

    for uid in (4711, 4712, os.geteuid()):
        while has_place(uid):
            connected.append(uid)

    assert [connected.count(uid) for uid in (4711, 4712, os.geteuid())] == [768, 192, 64]
    connected.pop()
    assert has_place(0)
    listening.close()


@pytest.mark.parametrize("is_ours", [True, False])
def test_one_process_leaves_places_to_others_of_its_user(path: Path, is_ours: bool):
    uid = os.geteuid() if is_ours else 4711
    listening = listen(str(path))
    assert listening.has_place(uid, 767, 767, 767, 1024)
    assert not listening.has_place(uid, 768, 768, 768, 1024)
    assert listening.has_place(uid, 768, 768, 0, 1024) == is_ours
    listening.close()


def test_at_a_path_the_kernel_has_checked_already(path: Path):
    listening = listen(str(path), 0o600)
    assert listening.admits(4711, 4711)
    listening.close()


def test_a_daemon_that_was_killed_is_replaced_and_one_that_is_stopped_is_not(path: Path):
    code = (
        "import sys, signal; from cached.adapters.listening_socket import listen\n"
        f"kept = listen({str(path)!r}); print('up', flush=True); signal.pause()"
    )
    daemon = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    with daemon, daemon.stdout:
        assert daemon.stdout.readline() == b"up\n"
        with pytest.raises(InvalidConfig, match=rf"\(pid {daemon.pid}\)"):
            listen(str(path))
        daemon.kill()
        daemon.wait()
    listening = listen(str(path))
    assert connects(path)
    listening.close()
