"""The generated pages of docs/ are those that are committed."""

from __future__ import annotations

import tomllib
from pathlib import Path

from cached.cli.main import COMMANDS
from cached.cli.reference import command_line, configuration, example, main, pages
from cached.core.config import from_document, resolve
from cached.core.options import OPTIONS
from tests.reference.settings import DEFAULTS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_pages_are_up_to_date():
    stale = [name for name, text in pages().items() if (DOCS / name).read_text() != text]
    assert stale == [], "run make docs"


def test_every_option_has_its_row():
    page = configuration()
    for option in OPTIONS:
        assert f"| `{option.flag}` | `{option.env}`" in page
        assert option.help in page
    assert page.count("\n| `--") == len(OPTIONS)


def test_every_command_has_its_section():
    page = command_line()
    assert [line[10:] for line in page.splitlines() if line.startswith("## cached ")] == list(
        COMMANDS
    )


def test_the_example_is_a_file_of_the_defaults():
    level = from_document(tomllib.loads(example()), "cached.toml")
    config = resolve([level])
    for option in OPTIONS:
        if option.default is not None:
            assert getattr(config, option.field) == DEFAULTS[option.key]
    assert config.models[0].pinned


def test_check_names_what_is_not_up_to_date(tmp_path: Path, capsys):
    assert main(["--check"], tmp_path) == 1
    assert "docs/cli.md is not up to date: run make docs" in capsys.readouterr().err
    assert main(["--write"], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == pages().keys()
    capsys.readouterr()
    assert main(["--write"], tmp_path) == 0
    assert capsys.readouterr().out == ""
