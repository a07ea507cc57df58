"""The misbehaving store of ``fault_proxy.py``, started and told what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from bench import fault_plan, record
from bench.fault_proxy import Counts, Order, Setup
from bench.seaweed import ACCESS_KEY, REGION, SECRET_KEY
from bench.servers import BUCKET, Store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from bench.fault_plan import Fault

STOP_TIMEOUT_S = 10


class FaultStore:
    """A running store; use it in a ``with`` block, which ends it.

    Args:
        file: the object; its name is the key.
        replacement: what ``Replaced`` puts in its place, of the same size.
        checksums: that may be offered later.

    Attributes:
        store: as the other stores are.
    """

    def __init__(self, file: Path, replacement: Path, checksums: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.fault_proxy"],
            cwd=record.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        setup = Setup(BUCKET, {file.name: str(file)}, {file.name: str(replacement)}, [*checksums])
        endpoint_url = self._ask(setup._asdict())["endpoint_url"]
        self.store = Store(
            endpoint_url=endpoint_url,
            url=lambda key: f"{endpoint_url}/{BUCKET}/{quote(key)}",
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            region=REGION,
        )

    def follow(
        self,
        plan: Sequence[Fault] = (),
        *,
        seed: int = 0,
        link_bytes_per_s: float = 0,
        checksums: Sequence[str] = (),
    ) -> Counts:
        """Begin a plan and a new count, and return what was counted before."""
        order = Order(fault_plan.to_data(plan), seed, link_bytes_per_s, [*checksums])
        return Counts(**self._ask(order._asdict()))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the fault proxy ended; its reason is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(STOP_TIMEOUT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
