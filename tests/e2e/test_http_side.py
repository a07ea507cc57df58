"""A probe is answered from the start on, also while the store hangs, and tells what there is."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.conftest import aws
from tests.fakes.s3_objects import Generated
from tests.fakes.store_faults import Stall

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.e2e.conftest import Daemons, Stores
    from tests.e2e.served import Served
    from tests.fakes.store_faults import Fault

URI = "s3://models/llm/"
MODEL = {"llm/model.gguf": Generated(3_000_000)}


def state_of(served: Served) -> dict[str, Any]:
    """Return what /models tells of the only model."""
    status, text = served.get("/models")
    assert status == 200, text
    (model,) = json.loads(text)["models"]
    assert isinstance(model, dict)
    return model


@pytest.mark.parametrize(
    ("fault", "state"),
    [([("LIST", 0)], "resolving"), (range(20), "loading")],  # each GET: hedges do not help
    ids=["listing", "get"],
)
def test_a_daemon_whose_store_hangs_is_healthy_and_not_ready(
    daemon: Daemons, store: Stores, fault: Iterable[int | tuple[str, int]], state: str
):
    faults: dict[int | tuple[str, int], Fault] = dict.fromkeys(fault, Stall(math.inf, -1))
    server = store(MODEL, faults=faults)
    served = daemon({"llm": URI}, more=aws(server), prefetch=True)
    assert server.stalled.wait(10)
    began_s = time.monotonic()

    assert served.get("/healthz") == (200, '{\n "healthy": true\n}\n')

    assert time.monotonic() - began_s < 5  # and not receive_timeout, 10 s
    status, text = served.get("/readyz")
    assert status == 503
    assert "not all there yet" in json.loads(text)["reason"]
    assert state_of(served)["state"] == state


@pytest.mark.parametrize("content", [Generated(3_000_000), b""], ids=["a file", "an empty file"])
def test_a_daemon_is_ready_when_what_is_prefetched_is_there(
    daemon: Daemons, store: Stores, content: Generated | bytes
):
    server = store({"llm/model.gguf": content})
    served = daemon({"llm": URI}, more=aws(server), prefetch=True)
    served.wait_for_state("llm", "resident")

    assert served.get("/readyz") == (200, '{\n "ready": true\n}\n')
    model = state_of(served)
    assert (model["name"], model["uri"], model["state"]) == ("llm", URI, "resident")
    assert model["files"] == 1
