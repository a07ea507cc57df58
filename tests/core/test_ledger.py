"""The ledger against a model: dicts and sets of single bytes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cached.core.ledger import Ledger
from cached.core.objects import FileRef, VersionRef
from tests.reference.accounts import NaiveLedger

BUDGET = 1000
A = VersionRef("a", "1")
versions = st.sampled_from([A, VersionRef("a", "2"), VersionRef("b", "1")])
offsets = st.integers(0, 60)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(BUDGET)
        self.naive = NaiveLedger(BUDGET)

    @rule(of=versions, size=st.integers(0, 600) | offsets)
    def reserve(self, of: VersionRef, size: int) -> None:
        if self.naive.used() + size > self.naive.budget:
            with pytest.raises(ValueError, match=f"cannot reserve {size} bytes for {of}"):
                self.ledger.reserve(of, size)
            return
        self.ledger.reserve(of, size)
        self.naive.sizes[of] = self.naive.sizes.get(of, 0) + size

    @rule(of=versions, index=st.integers(0, 1), start=offsets, stop=offsets)
    def commit(self, of: VersionRef, index: int, start: int, stop: int) -> None:
        file = FileRef(of, index)
        new = self.naive.new(of, index, start, stop)
        if of not in self.naive.sizes:
            assert self.ledger.commit(file, start, stop) == 0
        elif self.naive.committed(of) + len(new) > self.naive.sizes[of]:
            with pytest.raises(ValueError, match=f"cannot commit {len(new)} bytes of {of}"):
                self.ledger.commit(file, start, stop)
        else:
            assert self.ledger.commit(file, start, stop) == len(new)
            self.naive.on_pages[of] = self.naive.on_pages.get(of, set()) | new

    @rule(of=versions)
    def release(self, of: VersionRef) -> None:
        self.naive.on_pages.pop(of, None)
        assert self.ledger.release(of) == self.naive.sizes.pop(of, 0)
        assert self.ledger.release(of) == 0

    @rule(budget=st.integers(0, 2 * BUDGET))
    def set_budget(self, budget: int) -> None:
        self.ledger.budget_bytes = budget
        self.naive.budget = budget

    @invariant()
    def agrees_on_every_sum(self) -> None:
        committed = sum(self.naive.committed(of) for of in self.naive.sizes)
        assert self.ledger.used_bytes == self.naive.used()
        assert self.ledger.committed_bytes == committed
        assert self.ledger.reserved_bytes == self.naive.used() - committed
        assert self.ledger.free_bytes == self.naive.budget - self.naive.used()
        for of in self.naive.sizes:
            assert self.ledger.size_of(of) == self.naive.sizes[of]
            assert self.ledger.committed_of(of) == self.naive.committed(of)


TestLedger = LedgerMachine.TestCase


def test_bytes_that_are_committed_twice_count_once():
    ledger = Ledger(BUDGET)
    ledger.reserve(A, 100)
    assert ledger.commit(FileRef(A, 0), 0, 60) == 60
    assert ledger.commit(FileRef(A, 0), 40, 80) == 20
    assert ledger.commit(FileRef(A, 1), 0, 20) == 20
    assert ledger.committed_of(A) == 100
    assert ledger.reserved_bytes == 0


def test_what_is_not_known_takes_nothing():
    ledger = Ledger(BUDGET)
    assert ledger.size_of(A) == 0
    assert ledger.committed_of(A) == 0


def test_what_is_there_already_is_on_pages_though_the_budget_is_less():
    ledger = Ledger(BUDGET)
    of = VersionRef("left", "1")
    ledger.take_over(of, BUDGET + 1)
    assert (ledger.free_bytes, ledger.reserved_bytes) == (-1, 0)
    assert ledger.committed_of(of) == BUDGET + 1
    assert ledger.release(of) == BUDGET + 1
    assert (ledger.used_bytes, ledger.committed_bytes) == (0, 0)


def test_the_bytes_of_one_file_are_those_of_its_ranges():
    ledger = Ledger(BUDGET)
    of = VersionRef("m", "1")
    ledger.reserve(of, 100)
    ledger.commit(FileRef(of, 0), 0, 10)
    ledger.commit(FileRef(of, 1), 20, 50)
    ledger.commit(FileRef(of, 1), 60, 70)
    assert [ledger.committed_in(FileRef(of, index)) for index in range(3)] == [10, 40, 0]
    assert ledger.committed_in(FileRef(VersionRef("m", "2"), 0)) == 0
