"""Worker processes that open models; they stay alive and do what they are told, line by line.

Run as ``python -m bench.worker KIND``: each line of standard input is a JSON order, each line of
standard output its JSON answer. ``Worker`` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from bench.record import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    # Opens the model at a place (a name or a path) and returns what holds it, and every tensor.
    Open = Callable[[str], tuple[object, Mapping[str, Any]]]

OPEN_TIMEOUT_S = 30.0
END_TIMEOUT_S = 20.0


class WorkerError(Exception):
    """A worker ended; what it wrote to standard error says why."""


class Worker:
    """A worker process; use it in a ``with`` block, which ends it.

    Attributes:
        pid: of the process.
    """

    def __init__(self, kind: str, socket_path: Path | None = None) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CACHED_")}
        if socket_path is not None:
            environment["CACHED_SOCKET"] = str(socket_path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", kind],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def send(self, **order: object) -> None:
        """Give an order; ``receive`` gets its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for an answer.

        Raises:
            WorkerError: the worker ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"a worker ended with {self._process.wait()}; see its error above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **order: object) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        self.send(**order)
        return self.receive()

    def close(self) -> None:
        """Let it end, and all that it maps with it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(kind: str, orders: Iterable[str]) -> None:
    """Carry out orders until there are no more."""
    open_model = KINDS[kind]()
    held = []
    print(json.dumps({"kind": kind}), flush=True)
    for line in orders:
        order = json.loads(line)
        if order["op"] == "time":
            answer: dict[str, object] = {"ms": _time(open_model, order["place"], order["samples"])}
        else:
            model, tensors = open_model(order["place"])
            held.append((model, tensors))
            answer = {"bytes": sum(_touch(tensor) for tensor in tensors.values())}
        print(json.dumps(answer), flush=True)


def _time(open_model: Open, place: str, samples: int) -> list[float]:
    """Return how long each open took, in ms, until every tensor was there."""
    open_model(place)  # what only the first one costs is not part of a warm process
    taken = []
    for _ in range(samples):
        began_s = time.perf_counter()
        held = open_model(place)
        taken.append((time.perf_counter() - began_s) * 1000)
        del held
    return taken


def _touch(tensor: Any) -> int:
    """Read every byte without a copy; return how many there were."""
    import numpy as np

    flat = tensor.reshape(-1)
    if not isinstance(tensor, np.ndarray):
        import torch

        flat = flat.view(torch.uint8).numpy()
    flat = flat.view(np.uint8)
    flat.max()
    return int(flat.nbytes)


def _cached() -> Open:
    import ml_dtypes  # noqa: F401  the dtype of the tensors; who wants bfloat16 has it
    import numpy as np  # noqa: F401  not part of an open in a warm process

    import cached

    def open_model(place: str) -> tuple[object, Mapping[str, Any]]:
        model = cached.open(place, timeout_s=OPEN_TIMEOUT_S)
        return model, dict(model.items())

    return open_model


def _safe_open_by(framework: str) -> Callable[[], Open]:
    def prepare() -> Open:
        import ml_dtypes  # noqa: F401  numpy's bfloat16
        from safetensors import safe_open

        if framework == "pt":
            import torch  # noqa: F401  not part of an open in a warm process

        def open_model(place: str) -> tuple[object, Mapping[str, Any]]:
            with safe_open(place, framework=framework) as file:
                return None, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

        return open_model

    return prepare


def _load_file() -> Open:
    import ml_dtypes  # noqa: F401  numpy's bfloat16
    from safetensors.numpy import load_file

    return lambda place: (None, load_file(place))


KINDS: dict[str, Callable[[], Open]] = {
    "cached": _cached,
    "safe_open": _safe_open_by("pt"),
    "safe_open-numpy": _safe_open_by("np"),
    "safetensors": _load_file,
}


if __name__ == "__main__":
    serve(sys.argv[1], sys.stdin)
