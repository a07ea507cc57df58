"""A copy counts only if it is the object."""

from __future__ import annotations

import pytest

from bench import fetch

SIZE = (3 << 20) + 17


def test_a_copy_that_differs_is_no_sample(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    content = bytearray(SIZE)
    source.write_bytes(content)
    copy.write_bytes(content)
    fetch.insist_same(source, copy)
    content[-1] = 1
    copy.write_bytes(content)
    with pytest.raises(ValueError, match="differs from"):
        fetch.insist_same(source, copy)
    copy.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"has {SIZE - 1} bytes, not {SIZE}"):
        fetch.insist_same(source, copy)


def test_the_subjects_take_turns_in_being_first():
    assert [fetch.order("abc", turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert fetch.order("abc", 1) == ["b", "c", "a"]
