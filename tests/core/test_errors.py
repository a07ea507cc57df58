"""An error can be shown as it is: one line, whatever a store or a file wrote into it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.core.errors import LoadFailed, TensorUnknown, printable


@pytest.mark.parametrize("foreign", ["\x1b", "\a", "\n", "\r", "\x9b", "\u202e", "\udc80"])
def test_what_a_terminal_would_obey_is_no_part_of_a_message(foreign: str):
    error = LoadFailed(f"the store said{foreign}[31mred", hint=f"ask{foreign}it")
    assert str(error) == "the store said [31mred; ask it"
    assert (error.message, error.hint) == ("the store said [31mred", "ask it")


def test_letters_of_any_language_stay():
    assert TensorUnknown("Gewichtsmatrix \u533a\xe4").message == "Gewichtsmatrix \u533a\xe4"


@given(st.text())
def test_foreign_text_cannot_steer_a_terminal(text: str):
    assert printable(text).isprintable()
    assert len(printable(text)) == len(text)
