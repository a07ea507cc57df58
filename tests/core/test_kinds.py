"""Values of options: what is written is read, and written back; the rest is refused."""

from __future__ import annotations

import pytest

from cached.core import kinds
from cached.core.errors import InvalidConfig

KINDS = {name: kind for name, kind in vars(kinds).items() if isinstance(kind, kinds.Kind)}


@pytest.mark.parametrize(
    ("name", "text", "meant", "shown"),
    [
        ("BYTES", "1.5GiB", 3 << 29, "1.5 GiB"),
        ("BYTES_OR_AUTO", "auto", None, "auto"),
        ("BYTES_OR_AUTO", "64MiB", 64 << 20, "64 MiB"),
        ("SECONDS", "1m30s", 90.0, "1m30s"),
        ("COUNT", "12", 12, "12"),
        ("PORT", "off", None, "None"),
        ("PORT", "0", 0, "0"),
        ("MODE", "0660", 0o660, "0660"),
        ("SWITCH", "Yes", True, "True"),
        ("SOCKET", "@name", "@name", "@name"),
        ("ENDPOINT", "https://s3.example.org/", "https://s3.example.org", "https://s3.example.org"),
        ("REGION", "eu-central-1", "eu-central-1", "eu-central-1"),
    ],
)
def test_a_value_is_read_and_written_back(name, text, meant, shown):
    kind = KINDS[name]
    value = kind.parse(text)

    assert value == meant
    assert kind.show(value) == shown


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("BYTES", True),
        ("BYTES", "many"),
        ("SECONDS", None),
        ("COUNT", "1.5"),
        ("COUNT", True),
        ("PORT", "on"),
        ("MODE", "9"),
        ("SWITCH", "maybe"),
        ("TEXT", "a\nb"),
        ("TEXT", " "),
        ("PATH", 5),
        ("SOCKET", "@"),
        ("SOCKET", "/" + "a" * 107),
        ("ENDPOINT", "ftp://host"),
        ("ENDPOINT", "https://user@host"),
        ("REGION", "eu central"),
    ],
)
def test_anything_else_is_refused(name, wrong):
    with pytest.raises((TypeError, ValueError, InvalidConfig)):
        KINDS[name].parse(wrong)


def test_one_of_some_words_is_one_of_them_as_it_is_written():
    kind = kinds.one_of("off", "on")

    assert kind.parse("on") == "on"
    assert kind.rule == "one of off, on"
    with pytest.raises(ValueError):
        kind.parse("ON")
