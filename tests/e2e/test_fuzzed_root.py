"""Whatever became of a root, the next daemon starts on it and serves the bytes of the store.

Roots that a daemon left, a complete one and half ones, are spoilt at random: bytes of descriptions,
maps and files, names, modes, links. Files that are complete, and of this boot, are believed: of
them everything is spoilt but the bytes (docs/semantics.md, 5 and 6).
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import cached
from cached.core.effects import Adopted, Mismatched, Refused
from cached.core.errors import InvalidConfig
from tests.fakes.hosted_daemon import HostedDaemon, config_of
from tests.fakes.local_daemon import open_descriptors, weights
from tests.fakes.s3_objects import Generated, stored, summed
from tests.fakes.store_faults import Stall
from tests.fakes.store_server import StoreServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fakes.store_faults import Fault

TMPFS = Path("/dev/shm")
SEEDS_PER_SHARD = 250
SHARDS = 4
OPEN_S = 10.0
URI = "s3://models/llm/"
SECRET = b"nobody's business"
CONTENT = {
    "a.safetensors": weights(("a", "U8", [1_400_000], Generated(1_400_000).content(0, 1_400_000))),
    "config.json": b'{"a": 1}' * 40,
    "empty": b"",
    "sub/b.bin": Generated(2_200_000, 1).content(0, 2_200_000),
}
OBJECTS = {f"llm/{path}": summed(stored(data), "crc32") for path, data in CONTENT.items()}


class Root(NamedTuple):
    """What a daemon left.

    Attributes:
        is_believed: its files are complete, and of this boot.
    """

    path: Path
    is_believed: bool


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    with StoreServer(OBJECTS) as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("roots")
    yield path
    shutil.rmtree(path)


def daemon_on(root: Path, server: StoreServer) -> HostedDaemon:
    flags: dict[str, object] = {
        "model": [f"llm={URI}"],
        "socket": str(root.parent / "socket"),
        "segment_root": str(root),
        "segments": "file",
        "endpoint_url": server.endpoint_url,
    }
    config = config_of(flags, drain_timeout_s=0.1)
    models = tuple(ref._replace(prefetch=True) for ref in config.models)
    return HostedDaemon(config._replace(models=models))


@pytest.fixture(scope="module")
def roots(home: Path, server: StoreServer) -> list[Root]:
    """Let daemons leave roots behind."""
    whole = home / "whole"
    with daemon_on(whole, server) as daemon:
        read(daemon)
    left = [Root(whole, is_believed=True), Root(rebooted(whole), is_believed=False)]
    for number in range(3):
        faults: dict[int | tuple[str, int], Fault] = {
            server.gets + number + k: Stall(math.inf, 100_000) for k in range(40)
        }
        server.faults = faults
        half = home / f"half{number}"
        with daemon_on(half, server):
            assert server.stalled.wait(10)
            wait_for_file(half, "about/*.map")
        server.resumed.set()
        server.faults = {}
        server.resumed = threading.Event()
        left.append(Root(half, is_believed=False))
    return left


def wait_for_file(directory: Path, pattern: str) -> None:
    deadline_s = time.monotonic() + 10
    while not any(directory.glob(pattern)):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def rebooted(whole: Path) -> Path:
    """Return a copy of a root that says another start of the machine."""
    path = whole.with_name("rebooted")
    shutil.copytree(whole, path, symlinks=True)
    for description in path.glob("about/*.json"):
        told = json.loads(description.read_bytes())
        description.write_text(json.dumps({**told, "boot_id": "another"}))
    return path


def read(daemon: HostedDaemon) -> None:
    """Open the model as a worker does that is told to open again, and compare all of it."""
    deadline_s = time.monotonic() + OPEN_S
    while True:
        try:
            with cached.open("llm", socket=daemon.config.socket, timeout_s=OPEN_S) as model:
                model.wait()
                assert {path: bytes(model.file(path)) for path in model.files} == CONTENT
                assert bytes(model.buffer("a")) == CONTENT["a.safetensors"][-1_400_000:]
        except cached.Stale:  # it goes on with a version that the store does not have
            assert time.monotonic() < deadline_s
        else:
            return


# --- what may happen to a root


def flip(path: Path, rng: random.Random) -> None:
    """Change some bytes, or the length."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 255, rng.randrange(256)))
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)
    path.chmod(mode & 0o777)


def retell(path: Path, rng: random.Random) -> None:
    """Change a member of a description that stays one."""
    told: dict[str, Any] = json.loads(path.read_bytes())
    where: dict[str, Any] = told if rng.random() < 0.4 else rng.choice(told["objects"])
    values: tuple[Any, ...] = (
        None,
        "",
        "x",
        "../x",
        "a/../../x",
        "/etc/x",
        0,
        1,
        -1,
        1 << 70,
        [],
        {},
        "\0",
        "é",
    )
    others: list[Any] = [each[key] for each in told["objects"] for key in ("key", "path", "etag")]
    where[rng.choice(list(where))] = rng.choice((*values, *others))
    if rng.random() < 0.2:
        rng.shuffle(told["objects"])
    path.write_text(json.dumps(told))


def remove(path: Path, rng: random.Random) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def chmod(path: Path, rng: random.Random) -> None:
    if not path.is_symlink():
        path.chmod(rng.choice((0o777, 0o666, 0o600, 0o444, 0o700, 0o755)))


def rename(path: Path, rng: random.Random) -> None:
    other = rng.choice(list(path.parent.iterdir()))
    name = rng.choice((other.name, f"{path.name}x", "7", "current"))
    beside = path.with_name(f"{rng.randrange(1 << 30)}")
    path.rename(beside)
    if not os.path.lexists(path.with_name(name)):
        beside.rename(path.with_name(name))
    elif path.with_name(name).is_file() and beside.is_file():
        path.with_name(name).rename(path)
        beside.rename(path.with_name(name))


def link(path: Path, rng: random.Random) -> None:
    """Put a link to something outside, or to a neighbour, in its place."""
    target = rng.choice((outside(path), *path.parent.iterdir()))
    remove(path, rng)
    path.symlink_to(rng.choice((target, "nowhere", "..", ".")))


def pipe(path: Path, rng: random.Random) -> None:
    remove(path, rng)
    os.mkfifo(path)


def stray(path: Path, rng: random.Random) -> None:
    place = path if path.is_dir() and not path.is_symlink() else path.parent
    name = rng.choice(("stray", "9.json", "9.map", "1.map", "current", "é"))
    if not os.path.lexists(place / name):
        (place / name).write_bytes(rng.randbytes(100))


def twice(path: Path, rng: random.Random) -> None:
    copy = path.with_name(rng.choice(("8.json", "8.map", "8", path.name + "2")))
    if path.is_symlink() or os.path.lexists(copy):
        return
    if path.is_dir():
        shutil.copytree(path, copy, symlinks=True)
    else:
        shutil.copy2(path, copy)


ANYWHERE = (remove, chmod, rename, link, pipe, stray, twice)


def outside(path: Path) -> Path:
    """Return the directory beside the root that nobody may touch."""
    return next(each for each in path.parents if each.name == "root").parent / "outside"


def spoil(root: Path, rng: random.Random, *, is_believed: bool) -> list[str]:
    """Spoil it once to four times; return what was done."""
    done = []
    for _ in range(rng.randint(1, 4)):
        there = sorted(path for path in root.rglob("*") if path != root / "lock")
        if not there:
            break
        path = rng.choice(there)
        is_told = path.parent.name == "about" and path.is_file() and not path.is_symlink()
        is_data = not is_told and path.is_file() and not path.is_symlink()
        actions: list[Callable[[Path, random.Random], None]] = list(ANYWHERE)
        if is_told or (is_data and not is_believed):
            actions = [flip, flip, flip, *actions]
        if path.suffix == ".json" and is_told:
            actions = [retell] * 9
        action = rng.choice(actions)
        if is_believed and is_data and action in {rename, twice}:
            continue  # the same as other bytes
        try:
            action(path, rng)
        except (ValueError, KeyError, TypeError, IndexError):
            continue  # no description any more
        except (shutil.Error, shutil.SpecialFileError):
            pass  # it holds a pipe
        done.append(f"{action.__name__} {path.relative_to(root)}")
    return done


def carry_out(seed: int, roots: list[Root], server: StoreServer, directory: Path) -> str:
    """Copy a root, spoil it, start a daemon on it, and another one after that; tell what it did."""
    rng = random.Random(seed)
    origin = rng.choice(roots)
    root = directory / "root"
    shutil.copytree(origin.path, root, symlinks=True)
    (directory / "outside" / "sub").mkdir(parents=True)
    (directory / "outside" / "file").write_bytes(SECRET)
    done = [origin.path.name, *spoil(root, rng, is_believed=origin.is_believed)]
    descriptors = open_descriptors()
    became = "given up"
    try:
        with daemon_on(root, server) as daemon:
            read(daemon)
            if daemon.observed.count(Adopted):
                became = "taken over"
        with daemon_on(root, server) as daemon:
            read(daemon)
    except InvalidConfig:
        became = "refused at start"
    except BaseException as error:
        error.add_note(f"SEED {seed}: {done}")
        raise
    assert (directory / "outside" / "file").read_bytes() == SECRET, (seed, done)
    assert (directory / "outside" / "sub").is_dir(), (seed, done)
    assert not [each for each in threading.enumerate() if each.name.startswith("cached-")]
    assert {link for link in open_descriptors().values() if str(root) in link} <= set(
        descriptors.values()
    ), (seed, done)
    return became


def carry_out_all(seeds: range, roots: list[Root], server: StoreServer, home: Path) -> Counter[str]:
    became: Counter[str] = Counter()
    for seed in seeds:
        directory = home / f"seed{seed}"
        directory.mkdir()
        became[carry_out(seed, roots, server, directory)] += 1
        shutil.rmtree(directory)
    return became


def test_the_roots_are_what_they_are_named_for(roots: list[Root]):
    names = {root.path.name: list(root.path.glob("filling/*")) for root in roots}
    assert [bool(found) for found in names.values()] == [False, False, True, True, True]


def test_a_byte_that_a_crash_of_the_machine_spoilt_is_fetched_once_more(
    roots: list[Root], server: StoreServer, tmp_path: Path
):
    root = tmp_path / "root"
    shutil.copytree(roots[1].path, root, symlinks=True)
    (path,) = root.rglob("a.safetensors")
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"spoilt")
    path.chmod(0o444)
    with daemon_on(root, server) as daemon:
        read(daemon)
        assert daemon.observed.count(Adopted) == daemon.observed.count(Mismatched) == 1
        assert not daemon.observed.count(Refused)


def test_some_spoilt_roots_are_taken_over_or_given_up(
    roots: list[Root], server: StoreServer, home: Path
):
    carry_out_all(range(-10, 0), roots, server, home)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("shard", range(SHARDS))
def test_whatever_became_of_a_root_the_bytes_are_those_of_the_store(
    roots: list[Root], server: StoreServer, home: Path, shard: int
):
    seeds = range(shard * SEEDS_PER_SHARD, (shard + 1) * SEEDS_PER_SHARD)
    became = carry_out_all(seeds, roots, server, home)
    print(became)
    assert min(became["given up"], became["taken over"]) > SEEDS_PER_SHARD // 10
