"""What every ``ObjectStore`` does alike: inherit, and provide the fixture ``place``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pytest

from cached.cancellation import NEVER, Token
from cached.core.errors import ObjectChanged, ObjectMissing, ObjectRefused, StoreUnavailable
from cached.core.objects import FileRef, ModelRef, ObjectFacts, Part, VersionRef
from tests.fakes.sinks import MemorySink

if TYPE_CHECKING:
    from cached.core.objects import Manifest, StoredObject
    from cached.ports import ObjectStore

    class WritableStore(ObjectStore, Protocol):
        def put(self, uri: str, body: bytes) -> None: ...

    class Place(Protocol):
        """A store, and a hand in it."""

        store: WritableStore

        def put(self, key: str, content: bytes) -> None:
            """Make an object, or replace it."""

        def uri(self, key: str) -> str:
            """Return what a model's URI says for a key, or for a prefix (ends with ``/``)."""


def part_of(
    manifest: Manifest, found: StoredObject, start: int = 0, stop: int | None = None
) -> Part:
    """Return a part of an object: all of it, if nothing else is said."""
    stop = found.size_bytes if stop is None else stop
    file = FileRef(VersionRef("llm", manifest.version), manifest.objects.index(found))
    return Part(1, file, manifest.uri, found, start, stop)


def fetched(store: ObjectStore, part: Part) -> bytes:
    """Return the bytes of a part."""
    sink = MemorySink(part.start, part.stop)
    store.fetch(part, sink)
    assert sink.watermark == part.stop
    return bytes(sink.data)


class ObjectStoreCases:
    def test_all_below_a_prefix_is_found_by_its_path(self, place: Place):
        place.put("llm/b.safetensors", b"bb")
        place.put("llm/sub/a.bin", b"a")
        place.put("llm2/c", b"c")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        found = [(stored.path, stored.size_bytes) for stored in manifest.objects]
        assert found == [("b.safetensors", 2), ("sub/a.bin", 1)]
        assert all(stored.etag for stored in manifest.objects)

    def test_an_empty_object_is_carried(self, place: Place):
        place.put("llm/a", b"")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        assert [stored.size_bytes for stored in manifest.objects] == [0]

    def test_one_object_is_named_by_the_end_of_its_key(self, place: Place):
        place.put("llm/sub/a.safetensors", b"abc")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/sub/a.safetensors")))
        assert [stored.path for stored in manifest.objects] == ["a.safetensors"]
        assert fetched(place.store, part_of(manifest, manifest.objects[0])) == b"abc"

    def test_the_version_is_the_same_until_an_object_is_replaced(self, place: Place):
        place.put("llm/a", b"abc")
        ref = ModelRef("llm", place.uri("llm/"))
        first, again = place.store.resolve(ref), place.store.resolve(ref)
        place.put("llm/a", b"abd")
        other = place.store.resolve(ref)
        assert first.version == again.version != other.version

    def test_nothing_below_a_prefix_is_an_error(self, place: Place):
        with pytest.raises(ObjectMissing):
            place.store.resolve(ModelRef("llm", place.uri("nothing/")))

    def test_an_object_that_is_not_there_is_an_error(self, place: Place):
        with pytest.raises(ObjectMissing):
            place.store.resolve(ModelRef("llm", place.uri("nothing")))

    def test_a_name_with_control_characters_is_refused(self, place: Place):
        place.put("llm/a\x01b", b"x")
        with pytest.raises(ObjectRefused):
            place.store.resolve(ModelRef("llm", place.uri("llm/")))

    @pytest.mark.parametrize("name", ["a b", "a+b", "a%20b", "ü-日本", "q?x=1&y#z", "~!$'()*,;=:@"])
    def test_a_key_is_taken_as_it_is(self, place: Place, name: str):
        place.put(f"llm/{name}", name.encode())
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        assert [stored.path for stored in manifest.objects] == [name]
        assert fetched(place.store, part_of(manifest, manifest.objects[0])) == name.encode()

    @pytest.mark.parametrize(("start", "stop"), [(0, 10), (0, 1), (9, 10), (3, 7)])
    def test_a_part_is_what_was_asked_for(self, place: Place, start: int, stop: int):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        part = part_of(manifest, manifest.objects[0], start, stop)
        assert fetched(place.store, part) == b"0123456789"[start:stop]

    def test_a_fetch_goes_on_at_the_watermark(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        sink = MemorySink(2, 9)
        sink.accept(2, memoryview(b"abc"))
        place.store.fetch(part_of(manifest, manifest.objects[0], 2, 9), sink)
        assert sink.data == b"abc5678"

    def test_a_part_that_is_whole_needs_nothing(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        sink = MemorySink(0, 3)
        sink.accept(0, memoryview(b"abc"))
        place.store.fetch(part_of(manifest, manifest.objects[0], 0, 3), sink)
        assert sink.data == b"abc"

    def test_an_object_that_was_replaced_is_noticed(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        place.put("llm/a", b"abcdefghij")
        with pytest.raises(ObjectChanged):
            fetched(place.store, part_of(manifest, manifest.objects[0]))

    def test_an_object_that_was_deleted_is_missing(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        found = manifest.objects[0]
        part = part_of(manifest, found)._replace(stored=found._replace(key=f"{found.key}-gone"))
        with pytest.raises(ObjectMissing):
            fetched(place.store, part)

    def test_a_cancel_that_comes_after_the_end_does_nothing(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        part = part_of(manifest, manifest.objects[0])
        token = Token()
        place.store.fetch(part, MemorySink(0, 10), token)
        token.cancel()
        assert fetched(place.store, part) == b"0123456789"

    def test_a_fetch_that_was_cancelled_before_it_began_fetches_nothing(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        part = part_of(manifest, manifest.objects[0])
        sink, token = MemorySink(0, 10), Token()
        token.cancel()
        with pytest.raises(StoreUnavailable):
            place.store.fetch(part, sink, token)
        assert sink.watermark == 0
        assert fetched(place.store, part) == b"0123456789"

    def test_what_is_told_of_an_object_is_of_the_version_that_was_listed(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        assert place.store.describe(manifest.uri, manifest.objects[0]) == ObjectFacts()

    @pytest.mark.parametrize("content", [b"", b"0123456789"])
    def test_a_small_object_is_read_whole(self, place: Place, content: bytes):
        place.put("llm/a", content)
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        found = manifest.objects[0]
        assert place.store.read(manifest.uri, found, NEVER, len(content)) == content

    def test_an_object_that_is_not_small_is_not_read(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        with pytest.raises(ObjectRefused, match="llm/a has 10 bytes, the limit is 9"):
            place.store.read(manifest.uri, manifest.objects[0], NEVER, 9)

    def test_an_object_that_was_replaced_is_not_read(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        place.put("llm/a", b"abcdefghij")
        with pytest.raises(ObjectChanged):
            place.store.read(manifest.uri, manifest.objects[0], NEVER, 99)

    def test_what_is_put_is_found(self, place: Place):
        place.put("llm/a", b"0123456789")
        for content in (b"{}", b'{"a": 1}'):
            place.store.put(place.uri("llm/b c.json"), content)
            manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
            assert [stored.path for stored in manifest.objects] == ["a", "b c.json"]
            assert fetched(place.store, part_of(manifest, manifest.objects[1])) == content

    def test_a_closed_store_fetches_nothing(self, place: Place):
        place.put("llm/a", b"0123456789")
        manifest = place.store.resolve(ModelRef("llm", place.uri("llm/")))
        place.store.close()
        with pytest.raises(StoreUnavailable):
            fetched(place.store, part_of(manifest, manifest.objects[0]))
        place.store.close()
