"""A manifest names a version by its objects, and no key becomes a path outside its model."""

from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.core.errors import ObjectMissing, ObjectRefused
from cached.core.manifest import layout_path, manifest_of, version_of
from cached.core.objects import StoredObject

URI = "s3://bucket/models/llm/"
PREFIX = "models/llm/"

GOOD = [
    "config.json",
    "model-00001-of-00004.safetensors",
    "sub/dir/a b+c.bin",
    "größe/模型.safetensors",
    "...",
    "..a/b..",
    ".hidden",
    "a\\b",
    "~",
    "x" * 255,
]
BAD = {
    "": "nothing is left",
    "/": "segment is empty",
    "/etc/passwd": "segment is empty",
    "a//b": "segment is empty",
    "a/": "segment is empty",
    "..": "'..' is a segment",
    "../../etc/passwd": "'..' is a segment",
    "a/../b": "'..' is a segment",
    "a/.": "'.' is a segment",
    "./a": "'.' is a segment",
    "a\0b": "control character",
    "a\nb": "control character",
    "a\x7f": "control character",
    "a\x9bb": "control character",
    "x" * 256: "a segment has 256 bytes, the limit is 255",
    "ü" * 128: "a segment has 256 bytes, the limit is 255",
    "x/" * 600 + "x": "it has 1201 bytes after the prefix, the limit is 1024",
    "a\udcff": "not UTF-8",
}


def stored(path: str, size: int = 1, etag: str = '"e"', version: str | None = None) -> StoredObject:
    return StoredObject(PREFIX + path, path, size, etag, version)


objects = st.builds(
    stored,
    st.sampled_from(["a", "b", "c/d", "c/e"]),
    st.integers(0, 9),
    st.sampled_from(['"e"', '"f"']),
    st.sampled_from([None, "", "1", "2"]),
)
listings = st.lists(objects, max_size=4, unique_by=lambda one: one.path)


@pytest.mark.parametrize("path", GOOD)
def test_a_key_lies_where_its_author_put_it(path: str):
    assert layout_path(PREFIX + path, PREFIX) == path


@pytest.mark.parametrize("path", BAD)
def test_a_hostile_key_is_refused_with_its_fault(path: str):
    with pytest.raises(ObjectRefused, match=BAD[path]) as caught:
        layout_path(PREFIX + path, PREFIX)
    assert str(caught.value).isprintable()
    assert caught.value.hint


def test_a_key_outside_the_prefix_is_refused():
    with pytest.raises(ObjectRefused, match=r"'other/a' does not start with 'models/llm/'"):
        layout_path("other/a", PREFIX)


@given(st.text(st.sampled_from("./a\0é \\")) | st.text())
def test_what_is_let_through_stays_below_any_root(key: str):
    try:
        path = layout_path(key, "")
    except ObjectRefused:
        return
    joined = posixpath.join("/root/model", path)
    assert posixpath.normpath(joined) == joined
    assert joined.startswith("/root/model/")
    assert "\0" not in path


def test_sorts_by_path():
    manifest = manifest_of(URI, [stored("b"), stored("a/z"), stored("a.json")])
    assert [one.path for one in manifest.objects] == ["a.json", "a/z", "b"]
    assert manifest.uri == URI


@given(listings.filter(bool), st.randoms())
def test_the_order_of_the_listing_does_not_matter(listing, random):
    shuffled = random.sample(listing, len(listing))
    assert manifest_of(URI, listing) == manifest_of(URI, shuffled)
    assert version_of(URI, listing) == version_of(URI, shuffled)


@given(listings, listings)
def test_versions_are_equal_only_for_equal_objects(left, right):
    def facts(listing: list[StoredObject]) -> set[tuple[object, ...]]:
        return {(one.path, one.size_bytes, one.etag, one.version_id or "") for one in listing}

    same = version_of(URI, left) == version_of(URI, right)
    assert same == (facts(left) == facts(right))


def test_the_same_objects_elsewhere_are_another_version():
    assert version_of(URI, [stored("a")]) != version_of("s3://other/", [stored("a")])


def test_a_version_is_a_short_word_that_stays_what_it_is():
    # written into paths and logs: a change of the rule would orphan what lies in memory
    assert version_of(URI, [stored("a"), stored("b", 2, '"f"', "v")]) == "7f4edc041a9ac74b"


def test_no_objects_is_a_clear_error():
    with pytest.raises(ObjectMissing, match="no objects at s3://bucket/models/llm/"):
        manifest_of(URI, [])


@pytest.mark.parametrize(
    ("paths", "fault"),
    [
        (["a", "a"], "two objects would be the file 'a'"),
        (["a", "a/b"], "'a' would be a file and a directory"),
        (["a/b/c", "a/b"], "'a/b' would be a file and a directory"),
        (["a", "../b"], r"'\.\.' is a segment"),
    ],
)
def test_paths_that_cannot_lie_in_one_directory_are_refused(paths: list[str], fault: str):
    with pytest.raises(ObjectRefused, match=fault):
        manifest_of(URI, [stored(path) for path in paths])
