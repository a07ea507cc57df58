"""Published versions lie in their model's directory, one of them is current."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cached.adapters.segments import homes
from cached.core.errors import ObjectRefused
from cached.core.objects import Manifest, StoredObject, VersionRef

if TYPE_CHECKING:
    from pathlib import Path

OF = VersionRef("llm", "1")
MANIFEST = Manifest("s3://b/", "1", (StoredObject("a", "a/b", 1, '"e"'),))


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "models").mkdir()
    (tmp_path / "next").mkdir()
    return str(tmp_path)


def test_a_version_is_shown_in_the_home_of_its_model(root):
    shown = homes.show(root, OF, f"{root}/next", 0o755)
    assert shown == f"{root}/models/llm/1"
    assert os.path.isdir(shown)
    assert os.stat(f"{root}/models/llm").st_mode & 0o777 == 0o755


def test_what_cannot_be_shown_is_where_it_was(root):
    os.makedirs(f"{root}/models/llm/1/full")
    with pytest.raises(OSError, match="not empty"):
        homes.show(root, OF, f"{root}/next", 0o755)
    assert os.path.isdir(f"{root}/next")


def test_current_is_a_link_that_can_be_moved_and_taken_away(root):
    home = homes.home_of(root, OF)
    os.makedirs(home)
    assert homes.current(home) is None
    for version in ("1", "2"):
        homes.make_current(root, OF._replace(version=version))
        assert homes.current(home) == version
    homes.hide(home, "1")
    assert homes.current(home) == "2"
    homes.hide(home, "2")
    assert os.listdir(home) == []
    homes.leave(home)
    assert not os.path.exists(home)
    homes.leave(home)


def test_a_home_with_something_in_it_stays(root):
    os.makedirs(f"{root}/models/llm/1")
    homes.leave(homes.home_of(root, OF))
    assert os.path.isdir(f"{root}/models/llm/1")


def test_good_names_pass():
    homes.check_names(OF, MANIFEST)


@pytest.mark.parametrize(
    ("of", "path"),
    [
        (VersionRef("..", "1"), "a"),
        (VersionRef("a/b", "1"), "a"),
        (VersionRef("llm", ".."), "a"),
        (VersionRef("llm", "current"), "a"),
        (VersionRef("llm", ".current"), "a"),
        (VersionRef("llm", "1"), "../a"),
        (VersionRef("llm", "1"), "/a"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(of, path):
    with pytest.raises(ObjectRefused):
        homes.check_names(of, Manifest("s3://b/", "1", (StoredObject("a", path, 1, "e"),)))
