"""Each tensor of each file is found by exactly one name."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from cached.client import table
from cached.client.mappings import File, Lease
from cached.core import header


def file_of(path: str, names: list[str], metadata: dict[str, str] | None = None) -> File:
    """Return a mapped file that holds a byte under each of these names."""
    raw = header.write([(name, "U8", [1]) for name in names], metadata)
    size_bytes = len(raw) + len(names)
    descriptor = os.memfd_create(path)
    os.write(descriptor, raw)
    os.truncate(descriptor, size_bytes)
    file = File(path, size_bytes, len(raw))
    file.map(descriptor, Lease(lambda: None))
    return file


def test_names_of_different_files_make_one_table_in_their_order():
    files = [
        file_of("1.safetensors", ["b", "a"], {"format": "pt", "author": "x"}),
        File("config.json", 2, None),
        file_of("2.safetensors", ["c"], {"author": "y"}),
    ]
    found = table.read(files)
    assert [(name, index) for name, (index, _) in found.tensors.items()] == [
        ("b", 0),
        ("a", 0),
        ("c", 2),
    ]
    assert found.metadata == {"format": "pt", "author": "y"}
    assert found.ambiguous == {}


def test_a_name_of_two_files_is_found_with_the_file_only():
    found = table.read([file_of("1", ["w", "a"]), file_of("2", ["w"]), file_of("3", ["w", "b"])])
    assert list(found.tensors) == ["1::w", "a", "2::w", "3::w", "b"]
    assert found.ambiguous == {"w": ["1::w", "2::w", "3::w"]}
    assert {name: tensor.name for name, (_, tensor) in found.tensors.items()}["2::w"] == "w"


def test_a_model_without_tensors_has_an_empty_table():
    assert table.read([File("config.json", 2, None), file_of("1", [])]) == ({}, {}, {})


@given(st.lists(st.lists(st.sampled_from("abcd"), unique=True), max_size=4))
def test_every_tensor_of_every_file_is_found_once(contents: list[list[str]]):
    found = table.read([file_of(str(index), names) for index, names in enumerate(contents)])
    listed = [(index, tensor.name) for index, tensor in found.tensors.values()]
    assert listed == [(index, name) for index, names in enumerate(contents) for name in names]
    assert found.tensors.keys().isdisjoint(found.ambiguous)
    for name, names in found.ambiguous.items():
        assert {found.tensors[each][1].name for each in names} == {name}
