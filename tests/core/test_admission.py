"""Who gets in: never over the budget, never more than the machine has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cached.core import admission
from cached.core.errors import OverBudget
from cached.core.ledger import Ledger
from cached.core.loads import Model
from cached.core.objects import ModelRef, VersionRef

SIZES = st.integers(0, 1000)


@given(budget=SIZES, reserved=SIZES, available=SIZES, headroom=SIZES)
def test_usable_is_within_the_budget_and_within_the_machine(budget, reserved, available, headroom):
    ledger = Ledger(budget)
    reserved = min(reserved, budget)
    ledger.reserve(VersionRef("other", "1"), reserved)

    usable = admission.usable_bytes(available, ledger, headroom)

    assert usable == max(0, min(budget - reserved, available - headroom - reserved))


@given(needed=SIZES, budget=SIZES, available=SIZES)
def test_with_nobody_to_evict_it_fits_or_is_refused_with_its_name(needed, budget, available):
    model = Model(ModelRef("m", "s3://b/"))
    model.available_bytes = available
    model.is_asked = True

    verdict = admission.decide(model, needed, [model], Ledger(budget), headroom_bytes=0, now_s=0.0)

    if needed <= min(budget, available):
        assert verdict == ()
    else:
        assert isinstance(verdict, OverBudget)
        assert verdict.message.startswith("m needs")
