"""The life of the process: start → serve → drain → stop.

One mailbox, one thread that empties it. Everybody else posts events: fetch threads, the
segment thread, the epoll thread, the daemon's own HTTP thread, signals.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

from cached.core import effects, events
from cached.core.serving import LOCAL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cached.core.effects import Effect, Reply
    from cached.core.engine import Engine
    from cached.core.events import Event
    from cached.mailbox import Mailbox
    from cached.ports import Clock, Observer, Replies
    from cached.runner import Runner

SEGMENT_JOIN_S = 5.0  # of the segment thread: the last close of 1 GiB takes 130 ms
# Of all fetch threads together: one that waits on a socket ends in milliseconds; a connection that
# is being made, or a name that is looked up, cannot be cut and must not delay the end.
FETCH_JOIN_S = 1.0
CHECK_THREADS = 2  # one reads a file while another one's bytes come
_OVER = b"\0"  # no signal has this number
LONGEST_WAIT_S = 3600.0  # of the mailbox; a timer further away is asked for again


class Inquiries:
    """The way in for the daemon's own threads, and the way back to them and to workers.

    Args:
        post: puts an event into the mailbox.
        workers: where the replies to workers go.
    """

    def __init__(self, post: Callable[[Event], None], workers: Replies) -> None:
        self._post = post
        self._workers = workers
        self._lock = threading.Lock()
        self._next_id = 0
        self._callbacks: dict[int, Callable[[dict[str, object]], None]] = {}

    def ask(
        self, op: str, fields: dict[str, object], answered: Callable[[dict[str, object]], None]
    ) -> None:
        """Send a request as the daemon itself; ``answered`` is called in the mailbox thread."""
        with self._lock:
            request_id = self._next_id
            self._next_id += 1
            self._callbacks[request_id] = answered
        self._post(events.Requested(LOCAL, request_id, op, fields))

    def send(self, reply: Reply, descriptors: tuple[int, ...]) -> None:
        """Deliver a reply (the ``Replies`` port)."""
        if reply.peer != LOCAL:
            self._workers.send(reply, descriptors)
            return
        with self._lock:
            answered = self._callbacks.pop(reply.request_id)
        answered(reply.body)


class Daemon:
    """One daemon, in the thread that calls ``run``.

    Args:
        engine: decides.
        runner: carries out.
        mailbox: where events come from.
        observers: look at every event and effect, in order.
        clock: monotonic time.
        fetch_threads: how many.
    """

    def __init__(
        self,
        engine: Engine,
        runner: Runner,
        mailbox: Mailbox,
        *,
        observers: Sequence[Observer],
        clock: Clock,
        fetch_threads: int,
    ) -> None:
        self._engine = engine
        self._runner = runner
        self._mailbox = mailbox
        self._observers = observers
        self._clock = clock
        self._fetch_threads = [
            threading.Thread(target=runner.fetch_work, name=f"cached-fetch-{index}", daemon=True)
            for index in range(fetch_threads)
        ]
        self._check_threads = [
            threading.Thread(target=runner.check_work, name=f"cached-check-{index}", daemon=True)
            for index in range(CHECK_THREADS)
        ]
        self._segment_thread = threading.Thread(
            target=runner.segment_work, name="cached-segment", daemon=True
        )
        self._wake_at_s: float | None = None
        self._is_stopped = False

    def run(self) -> None:
        """Serve until a signal has been answered by a drain."""
        for thread in (*self._fetch_threads, *self._check_threads, self._segment_thread):
            thread.start()
        self._carry_out(self._engine.start(self._clock.now_s()))
        while not self._is_stopped:
            self._step()
        self._stop()

    def _stop(self) -> None:
        self._runner.cut()
        self._runner.stop(len(self._fetch_threads), len(self._check_threads))
        self._segment_thread.join(SEGMENT_JOIN_S)
        until_s = self._clock.now_s() + FETCH_JOIN_S
        for thread in (*self._fetch_threads, *self._check_threads):
            thread.join(max(0.0, until_s - self._clock.now_s()))

    def _step(self) -> None:
        event = self._mailbox.take(self._wait_s())
        if event is None:
            if self._wake_at_s is None or self._clock.now_s() < self._wake_at_s:
                return
            self._wake_at_s = None
            event = events.Ticked()
        now_s = self._clock.now_s()
        for observer in self._observers:
            observer.happened(event, now_s)
        self._carry_out(self._engine.handle(event, now_s))

    def _wait_s(self) -> float | None:
        if self._wake_at_s is None:
            return None
        return min(LONGEST_WAIT_S, max(0.0, self._wake_at_s - self._clock.now_s()))

    def _carry_out(self, decided: list[Effect]) -> None:
        for effect in decided:
            now_s = self._clock.now_s()
            for observer in self._observers:
                observer.decided(effect, now_s)
            match effect:
                case effects.WakeAt():
                    self._wake_at_s = effect.when_s
                case effects.Drained():
                    self._is_stopped = True
                case _:
                    self._runner.carry_out(effect)


def drain_on_signals(post: Callable[[Event], None]) -> Callable[[], None]:
    """Turn SIGTERM, SIGINT and SIGHUP into a drain; a second one ends it at once, cleanly too.

    Later ones change nothing, but that a third SIGINT ends the process as it stands. SIGHUP comes
    when a terminal closes; under nohup(1), which has it ignored, it stays so.

    Returns:
        What puts the handlers back that were there before.
    """
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
    asked = 0

    def handle(signum: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        while (number := os.read(read_fd, 1)) != _OVER:
            if number[0] in before:
                post(events.DrainRequested())

    # Python runs a handler when the main thread gets to it; which it does not, if the signal comes
    # in the moment before it goes to sleep on the mailbox. A thread that reads is always woken.
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    thread = threading.Thread(target=watch, name="cached-signals", daemon=True)
    thread.start()
    wakeup_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_fd)
        os.write(write_fd, _OVER)
        thread.join()
        os.close(read_fd)
        os.close(write_fd)

    for number in before:
        signal.signal(number, handle)
    return restore
