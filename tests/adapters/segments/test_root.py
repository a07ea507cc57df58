"""A root has one owner, and a refusal of the system says what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import root as root_module
from cached.adapters.segments.root import (
    claim,
    is_directory,
    make_directory,
    make_parents,
    parent_of,
    remove,
    take_directory,
    translated,
)
from cached.core.errors import InvalidConfig, LoadFailed, OutOfSpace
from tests.adapters.segments.versions import make_deep

if TYPE_CHECKING:
    from pathlib import Path


needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="NO TEST WITH ANOTHER USER'S FILES: only root can make them"
)


def mode(path: str) -> int:
    return os.stat(path).st_mode & 0o7777


def test_a_root_is_made_with_its_mode_and_names_its_owner(tmp_path: Path):
    root = str(tmp_path / "a" / "b")
    fd = claim(root, 0o750)
    assert mode(root) == 0o750
    assert (tmp_path / "a" / "b" / "lock").read_text() == f"{os.getpid()}\n"
    os.close(fd)


def test_a_root_in_use_is_refused_with_the_pid_of_its_owner(tmp_path: Path):
    code = (
        "import sys; from cached.adapters.segments.root import claim;"
        "claim(sys.argv[1], 0o750); print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        (sys.executable, "-c", code, str(tmp_path)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(InvalidConfig, match=f"in use by another daemon, pid {other.pid}; stop"):
            claim(str(tmp_path), 0o750)
        other.kill()
    os.close(claim(str(tmp_path), 0o750))


def test_a_root_is_free_again_once_its_descriptor_is_closed(tmp_path: Path):
    for _ in range(2):
        os.close(claim(str(tmp_path), 0o750))


def test_a_root_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfig, match="is not a directory"):
        claim(str(tmp_path / "file"), 0o750)


def test_a_root_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfig, match=r"cannot use segment root .*: Not a directory"):
        claim(str(tmp_path / "file" / "root"), 0o750)


def test_a_root_that_another_user_made_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    real = os.lstat(tmp_path)
    stranger = os.stat_result([*real[:4], 4242, *real[5:]])
    monkeypatch.setattr(os, "lstat", lambda _: stranger)
    with pytest.raises(InvalidConfig, match="belongs to uid 4242"):
        claim(str(tmp_path), 0o750)


@needs_root
@pytest.mark.parametrize("name", ["about", "filling", "models"])
def test_a_directory_of_ours_that_another_user_made_is_refused(tmp_path: Path, name: str):
    tmp_path.chmod(0o777)
    (tmp_path / name).mkdir()
    os.chown(tmp_path / name, 4711, 4711)
    refusal = f"{tmp_path}/{name} belongs to uid 4711, not to uid 0; remove it, or name another"
    with pytest.raises(InvalidConfig, match=refusal):
        claim(str(tmp_path), 0o750)
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(InvalidConfig, match=refusal):  # it came after the root was claimed
        take_directory(str(tmp_path), name, 0o750)


def test_a_link_that_came_in_the_place_of_a_directory_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "outside").mkdir(0o700)
    (tmp_path / "models").symlink_to("outside")
    monkeypatch.setattr(root_module, "is_directory", lambda _: True)  # it was one a moment ago
    with pytest.raises(NotADirectoryError):
        take_directory(str(tmp_path), "models", 0o755)
    assert mode(str(tmp_path / "outside")) == 0o700


@pytest.mark.parametrize("there", ["nothing", "a file", "a link", "a directory"])
def test_a_directory_of_ours_is_made_with_its_mode(tmp_path: Path, there: str):
    place, outside = tmp_path / "models", tmp_path / "outside"
    outside.mkdir(0o700)
    if there == "a file":
        place.touch()
    elif there == "a link":
        place.symlink_to("outside")
    elif there == "a directory":
        place.mkdir(0o777)
    take_directory(str(tmp_path), "models", 0o755)
    assert is_directory(str(place))
    assert (mode(str(place)), mode(str(outside))) == (0o755, 0o700)


def test_only_the_daemons_user_can_open_the_lock_and_with_that_hold_it(tmp_path: Path):
    (tmp_path / "lock").touch(0o644)
    os.close(claim(str(tmp_path), 0o750))
    assert mode(f"{tmp_path}/lock") == 0o600
    (tmp_path / "lock").unlink()
    os.close(claim(str(tmp_path), 0o750))
    assert mode(f"{tmp_path}/lock") == 0o600


def test_a_lock_that_is_no_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(InvalidConfig, match="lock is no regular file"):
        claim(str(tmp_path), 0o750)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(InvalidConfig):
        claim(str(tmp_path), 0o750)
    assert (tmp_path / "victim").read_text() == "precious"


def test_the_mode_of_a_directory_does_not_depend_on_the_umask(tmp_path: Path):
    before = os.umask(0o077)
    try:
        make_directory(str(tmp_path / "a"), 0o755)
    finally:
        os.umask(before)
    assert mode(str(tmp_path / "a")) == 0o755


def test_a_tree_is_removed_without_following_links(tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "a" / "link").symlink_to(tmp_path / "outside")
    (tree / "dangling").symlink_to("nowhere")
    remove(str(tree))
    assert not tree.exists()
    assert (tmp_path / "outside" / "precious").exists()
    remove(str(tree))


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    (tmp_path / "link").symlink_to("outside")
    assert not is_directory(str(tmp_path / "link"))
    remove(str(tmp_path / "link"))
    assert os.listdir(tmp_path) == ["outside"]
    assert (tmp_path / "outside" / "precious").exists()


def test_a_tree_is_removed_however_deep_it_is(tmp_path: Path):
    """Deeper than Python recurses, than descriptors are there, and than a path may be long."""
    (tmp_path / "outside").mkdir()
    make_deep(tmp_path / "tree", 1100, "directory")
    make_deep(tmp_path / "tree" / "beside", 10, "d")
    remove(str(tmp_path / "tree"))
    assert os.listdir(tmp_path) == ["outside"]


def test_a_tree_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tree" / "a" / "b").mkdir(parents=True)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "rmdir", refused)
    with pytest.raises(PermissionError):
        remove(str(tmp_path / "tree"))


def test_on_the_way_to_a_file_no_link_is_followed(tmp_path: Path):
    (tmp_path / "real/a/b").mkdir(parents=True)
    (tmp_path / "real/a/b/file").write_bytes(b"x")
    (tmp_path / "real/link").symlink_to("a")
    (tmp_path / "root").symlink_to("real")
    root = str(tmp_path / "root")
    before = len(os.listdir("/proc/self/fd"))
    with parent_of(root, "a/b/file") as (directory, name):
        assert os.stat(name, dir_fd=directory).st_size == 1
    with parent_of(root, "file") as (directory, _):
        assert os.path.samestat(os.fstat(directory), os.stat(root))
    for path in ("link/b/file", "link/file"):
        with pytest.raises(NotADirectoryError), parent_of(root, path):
            pass
    with pytest.raises(FileNotFoundError), parent_of(root, "a/none/file"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_parents_are_made_once_each_with_their_mode(tmp_path: Path):
    for path in ("top", "a/b/c", "a/b/d", "a/e"):
        make_parents(str(tmp_path), path, 0o755)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"a", "a/b"}
    assert mode(str(tmp_path / "a" / "b")) == 0o755


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.ENOSPC, OutOfSpace, "more room"),
        (errno.EDQUOT, OutOfSpace, "more room"),
        (errno.ENOMEM, OutOfSpace, "more room"),
        (errno.EMFILE, LoadFailed, "ulimit -n"),
        (errno.EACCES, LoadFailed, "check the segment root"),
    ],
)
def test_a_refusal_of_the_system_says_what_to_do(number, kind, hint):
    error = translated(OSError(number, os.strerror(number)), "cannot make a")
    assert type(error) is kind
    assert error.message == f"cannot make a: {os.strerror(number)}"
    assert hint in error.hint
