"""The daemon as ``cached serve`` puts it together, in a thread of this process.

Nothing in it is a fake but the signals, which only a main thread may have: ``stop`` is SIGTERM.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest

from cached.cli.asking import Asking
from cached.cli.load import load
from cached.core import events
from cached.hosts import standalone

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from cached.core.config import Config
    from cached.core.effects import Effect
    from cached.core.events import Event
    from cached.ports import Post

START_S = 20.0
STOP_S = 12.0


class Observed:
    """In the place of the log: keeps what was decided.

    Attributes:
        decisions: effects, in order.
    """

    def __init__(self) -> None:
        self.decisions: list[Effect] = []

    def happened(self, event: Event, now_s: float) -> None:
        pass

    def decided(self, effect: Effect, now_s: float) -> None:
        self.decisions.append(effect)

    def count(self, kind: type) -> int:
        """Return how many effects of a kind there were."""
        return sum(isinstance(effect, kind) for effect in self.decisions)


def config_of(flags: dict[str, object], **more: Any) -> Config:
    """Return a configuration: flags as ``cli.load`` takes them, then fields with any value.

    Nothing is prefetched.
    """
    config = load({"log_level": "error", "anonymous": "true", **flags}, {})
    models = tuple(ref._replace(prefetch=False) for ref in config.models)
    return config._replace(**{"models": models, "http_port": None, **more})


class HostedDaemon:
    """Serves from the start of its ``with`` block to the end.

    Args:
        config: of ``cached serve``.

    Attributes:
        observed: what the engine decided.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.observed = Observed()
        self._patches = pytest.MonkeyPatch()
        self._posts: SimpleQueue[Post] = SimpleQueue()
        self._post: Post
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="daemon of a test")

    def _run(self) -> None:
        try:
            standalone.run(self.config)
        except BaseException as error:  # noqa: BLE001 - it belongs to the test
            self._error = error
            self._posts.put(lambda _: None)

    def __enter__(self) -> HostedDaemon:
        def without_signals(post: Post) -> Callable[[], None]:
            self._posts.put(post)
            return lambda: None

        self._patches.setattr(standalone, "drain_on_signals", without_signals)
        self._patches.setattr(standalone, "Log", lambda _: self.observed)
        self._patches.setattr(standalone, "raise_open_files", int)  # of this process
        self._thread.start()
        self._post = self._posts.get(timeout=START_S)
        try:
            self.ask("status")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._post(events.DrainRequested())
        self._thread.join(STOP_S)
        self._patches.undo()
        assert not self._thread.is_alive(), "the daemon does not end"
        if self._error is not None:
            raise self._error

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Return the reply to a request on a connection of its own."""
        with Asking(self.config.socket, START_S) as asking:
            return asking.ask(op, **fields)

    def memory(self) -> dict[str, int]:
        """Return what the ledger says."""
        told: dict[str, int] = self.ask("status")["memory"]
        return told
