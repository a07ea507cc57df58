"""A root that is broken, or that somebody made to deceive, is neither believed nor followed."""

from __future__ import annotations

import os
import random
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import DirectorySegments
from cached.adapters.segments.description import encode
from cached.adapters.segments.survey import is_ours, last_number, survey, walk
from cached.core.objects import Manifest, Range, StoredObject, VersionRef
from tests.adapters.segments.versions import (
    DATA,
    OF,
    fill,
    make_deep,
    manifest_of,
    part_of,
    paths,
    put,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cached.core.objects import Left

BOOT = "boot"
HALF = VersionRef("half", "9")


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A published version, number 1, and one that is half there, number 2."""
    path = str(tmp_path / "root")
    store = DirectorySegments(path)
    fill(store)
    store.publish(OF)
    store.switch(OF)
    manifest = manifest_of(DATA, HALF.version)
    store.create(HALF, manifest)
    put(store, part_of(HALF, manifest, 2), DATA["sub/dir/b c+é.bin"])
    store.close()
    return path


def found(root: str) -> dict[str, Left]:
    return {relic.left.of.name: relic.left for relic in survey(root, BOOT)}


def test_what_is_sound_is_told_with_all_that_is_there(root):
    whole, half = survey(root, BOOT)
    assert whole.left.of == OF._replace(load=1)
    assert half.left.of == HALF._replace(load=2)
    assert (half.stem, whole.stem) == ("2", "1")
    assert half.left.there == ((), (), (Range(0, 10_000),), ())
    assert whole.left.there[1:3] == ((), (Range(0, 10_000),))
    assert whole.left.manifest == manifest_of(DATA)
    assert (half.left.is_published, half.left.is_current) == (False, False)
    assert (whole.left.is_published, whole.left.is_current) == (True, True)
    assert not whole.left.is_trusted
    assert half.left.path == f"{root}/filling/2"
    assert last_number(root) == 2


def test_a_root_that_says_no_start_of_the_machine_is_not_trusted(root):
    for path in Path(root, "about").glob("*.json"):
        number = path.stem
        of = OF if number == "1" else HALF
        path.write_bytes(encode(of, manifest_of(DATA, of.version), ""))
    assert [relic.left.is_trusted for relic in survey(root, "")] == [False, False]


CHECKED = ("crc32", "", "length", "sha256")


def test_by_what_a_version_was_checked_is_told(root):
    Path(root, "about/1.checked").write_text("crc32\n\nlength\nsha256\n")
    Path(root, "about/2.checked").write_text("crc32\n\nlength\nsha256\n")
    whole, half = survey(root, BOOT)
    assert (whole.left.checked_by, half.left.checked_by) == (CHECKED, ())
    assert Path(root, "about/1.checked").exists()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"crc32\n\nlength\nsha256",
        b"crc32\n\nlength\n",
        b"crc32\n\nlength\nsha256\n\n",
        b"crc32\n\nlength\nmagic\n",
        b"crc32\n\nlength\n\xff\n",
        b"crc32 length\n\n\n\n",
    ],
)
def test_what_is_cut_or_not_known_tells_of_no_check_and_the_version_is_sound(root, said: bytes):
    Path(root, "about/1.checked").write_bytes(said)
    left = found(root)["llm"]
    assert left.checked_by == ()
    assert left.manifest is not None


def wrong_size(root: str) -> None:
    os.truncate(f"{root}/filling/2/config.json", 3)
    os.truncate(f"{root}/models/llm/{OF.version}/config.json", 3)


def odd_mode(root: str) -> None:
    os.chmod(f"{root}/filling/2/config.json", 0o666)
    os.chmod(f"{root}/models/llm/{OF.version}/config.json", 0o600)


def link_to_a_file(root: str) -> None:
    for place in (f"{root}/filling/2", f"{root}/models/llm/{OF.version}"):
        os.rename(f"{place}/config.json", f"{root}/../precious")
        os.symlink(f"{root}/../precious", f"{place}/config.json")


def link_to_a_directory(root: str) -> None:
    for number, place in enumerate((f"{root}/filling/2", f"{root}/models/llm/{OF.version}")):
        os.rename(f"{place}/sub", f"{root}/../outside{number}")
        os.symlink(f"{root}/../outside{number}", f"{place}/sub")


def missing_file(root: str) -> None:
    os.unlink(f"{root}/filling/2/empty")
    os.unlink(f"{root}/models/llm/{OF.version}/empty")


def further_file(root: str) -> None:
    Path(root, "filling/2/sub/further").touch()
    Path(root, "models/llm", OF.version, "further").touch()


def fifo(root: str) -> None:
    for place in (f"{root}/filling/2", f"{root}/models/llm/{OF.version}"):
        os.unlink(f"{place}/empty")
        os.mkfifo(f"{place}/empty", 0o600)


def directory_for_all(root: str) -> None:
    os.chmod(f"{root}/filling/2/sub", 0o777)
    os.chmod(f"{root}/models/llm/{OF.version}", 0o777)


def no_map(root: str) -> None:
    for number in (1, 2):
        os.unlink(f"{root}/about/{number}.map")


def longer_map(root: str) -> None:
    for number in (1, 2):
        with open(f"{root}/about/{number}.map", "ab") as file:
            file.write(b"\1")


def map_for_all(root: str) -> None:
    for number in (1, 2):
        os.chmod(f"{root}/about/{number}.map", 0o666)


def link_to_a_map(root: str) -> None:
    for number in (1, 2):
        os.rename(f"{root}/about/{number}.map", f"{root}/../{number}.map")
        os.symlink(f"{root}/../{number}.map", f"{root}/about/{number}.map")


def link_to_a_description(root: str) -> None:
    for number in (1, 2):
        os.rename(f"{root}/about/{number}.json", f"{root}/../{number}.json")
        os.symlink(f"{root}/../{number}.json", f"{root}/about/{number}.json")


def no_description(root: str) -> None:
    for number in (1, 2):
        os.unlink(f"{root}/about/{number}.json")


def cut_description(root: str) -> None:
    for number in (1, 2):
        path = f"{root}/about/{number}.json"
        os.truncate(path, os.stat(path).st_size - 1)


def device_as_description(root: str) -> None:
    for number in (1, 2):
        os.unlink(f"{root}/about/{number}.json")
        os.mkfifo(f"{root}/about/{number}.json", 0o600)


def two_descriptions(root: str) -> None:
    for number in (1, 2):
        for kind in ("json", "map"):
            shutil.copy(f"{root}/about/{number}.{kind}", f"{root}/about/{number + 7}.{kind}")
    shutil.rmtree(f"{root}/filling/2")
    os.mkdir(f"{root}/filling/2")


def description_of_another_place(root: str) -> None:
    """One that names the other version's directory, or none."""
    of = VersionRef("llm", "elsewhere")
    Path(root, "about/1.json").write_bytes(encode(of, manifest_of(DATA, of.version), BOOT))
    objects = (StoredObject("a", "../../../precious", 0, "e"),)
    Path(root, "about/2.json").write_bytes(encode(HALF, Manifest("", "9", objects), BOOT))


SPOILED = [
    wrong_size,
    odd_mode,
    link_to_a_file,
    link_to_a_directory,
    missing_file,
    further_file,
    fifo,
    directory_for_all,
    no_map,
    longer_map,
    map_for_all,
    link_to_a_map,
    link_to_a_description,
    no_description,
    cut_description,
    device_as_description,
    two_descriptions,
    description_of_another_place,
]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_what_is_not_as_it_was_described_can_only_be_freed(root, spoil: Callable[[str], None]):
    spoil(root)
    outside = {path for path in Path(root).parent.rglob("*") if not path.is_relative_to(root)}
    store = DirectorySegments(root)
    left = store.found()
    assert [one.manifest for one in left] == [None, None]
    assert len({one.of for one in left}) == 2
    for one in left:
        assert store.free(one.of)
    assert paths(root) == set()
    store.close()
    assert all(path.exists() for path in outside), "nothing was removed that lies elsewhere"


def test_files_of_another_user_are_not_adopted(root, monkeypatch):
    facts = os.stat(f"{root}/filling/2/config.json")
    assert is_ours(facts, 2) == 0o600
    monkeypatch.setattr(os, "geteuid", lambda: facts.st_uid + 1)
    assert is_ours(facts, 2) is None
    assert [relic.left.manifest for relic in survey(root, BOOT)] == [None, None]


def test_strays_are_removed_and_current_leads_nowhere_else(root, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    for stray in ("models/file", "filling/file", "about/file", "about/77.json", "models/llm/file"):
        Path(root, stray).touch()
    for link in ("models/link", "filling/link", "about/link", "models/llm/link"):
        os.symlink(tmp_path / "precious", f"{root}/{link}")
    Path(root, "about", "directory", "below").mkdir(parents=True)
    Path(root, "models", "empty").mkdir()
    Path(root, "models", "other", "1").mkdir(parents=True)
    os.symlink("../../../precious", f"{root}/models/other/current")
    before = survey_paths(root)
    assert found(root).keys() == {"llm", "half", "other"}
    assert survey_paths(root) == before - {
        *("models/file", "filling/file", "about/file", "about/77.json", "models/llm/file"),
        *("models/link", "filling/link", "about/link", "models/llm/link", "models/empty"),
        *("about/directory", "about/directory/below", "models/other/current"),
    }
    assert (tmp_path / "precious" / "file").exists()


def survey_paths(root: str) -> set[str]:
    return {str(path.relative_to(root)) for path in Path(root).rglob("*")}


def test_directories_that_are_links_are_not_followed(root, tmp_path):
    for name in ("about", "filling", "models"):
        os.rename(f"{root}/{name}", tmp_path / name)
        os.symlink(tmp_path / name, f"{root}/{name}")
    before = survey_paths(str(tmp_path / "models"))
    store = DirectorySegments(root)
    assert store.found() == []
    store.close()
    assert survey_paths(str(tmp_path / "models")) == before


@pytest.mark.parametrize("place", ["filling/2", "filling/9", f"models/llm/{OF.version}"])
def test_what_lies_deeper_than_a_path_is_long_makes_a_version_unusable_and_can_be_freed(
    root, place
):
    make_deep(Path(root, "about", "deep"), 200, 30 * "x")
    make_deep(Path(root, place, "deep"), 200, 30 * "x")
    store = DirectorySegments(root)
    (spoilt,) = (left for left in store.found() if left.path == f"{root}/{place}")
    assert spoilt.manifest is None
    for left in store.found():
        assert store.free(left.of)
    assert paths(root) == set()
    store.close()


def test_names_that_are_not_text_can_be_freed(root):
    for place in (b"models/\xff/\xfe", b"filling/\xff"):
        os.makedirs(os.fsencode(root) + b"/" + place)
    store = DirectorySegments(root)
    for left in store.found():
        str(left).encode()
        assert store.free(left.of)
    assert paths(root) == set()
    store.close()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_bytes_lie_beside_the_versions_nothing_crashes(root, seed):
    rng = random.Random(seed)
    for path in Path(root, "about").iterdir():
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
    store = DirectorySegments(root)
    for left in store.found():
        if left.manifest is not None:
            store.create(left.of, left.manifest)
        assert store.free(left.of)
    assert paths(root) == set()
    store.close()


def test_a_file_that_several_have_counts_in_the_one_that_is_likelier_to_go_on(root):
    """Half versions come first, and all the same count nothing of what a complete one has."""
    alone = [relic.left.size_bytes for relic in survey(root, BOOT)]
    for place in ("filling/2", "filling/9", "models/llm/0"):
        os.makedirs(f"{root}/{place}", exist_ok=True)
        os.link(f"{root}/models/llm/{OF.version}/sub/dir/b c+é.bin", f"{root}/{place}/more")
    sizes = {relic.left.path: relic.left.size_bytes for relic in survey(root, BOOT)}
    assert sizes == {
        f"{root}/filling/2": alone[1],
        f"{root}/filling/9": 0,
        f"{root}/models/llm/0": 0,
        f"{root}/models/llm/{OF.version}": alone[0],
    }


def test_a_walk_follows_no_link_and_a_socket_is_no_file(tmp_path):
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "b").touch()
    os.symlink("/", tmp_path / "tree" / "out")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "tree" / "s"))
    names = [entry.name for entry in walk(str(tmp_path / "tree"))]
    assert names == ["a", "out", "s", "b"]
