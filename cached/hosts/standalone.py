"""The daemon alone on one machine: ``cached serve``.

A composition root: it builds the adapters, hands them to the daemon, and knows what starts
when. The HTTP side (aiohttp on uvloop, as slow to import as all the rest) starts once the
first GET has ended, or nothing is to be fetched, and in any case soon.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import threading
from time import process_time
from typing import TYPE_CHECKING

import cached
from cached.adapters.audit import Audit
from cached.adapters.checksums import Checksums
from cached.adapters.clock import SystemClock
from cached.adapters.listening_socket import listen
from cached.adapters.log import Log, Writer
from cached.adapters.memory import SystemMemory
from cached.adapters.metrics import Metrics
from cached.adapters.segments import open_segments
from cached.adapters.unix_socket import UnixSocket
from cached.core import effects, events
from cached.core.engine import Engine
from cached.core.loads import Limits
from cached.core.reporting import About
from cached.daemon import Daemon, Inquiries, drain_on_signals
from cached.hosts.stores import stores
from cached.mailbox import Mailbox
from cached.runner import Ports, Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cached.core.config import Config
    from cached.core.effects import Effect
    from cached.core.events import Event
    from cached.core.objects import Left
    from cached.ports import MemoryProbe, Observer


# After the first listing was asked for. It has mostly ended by then, and GETs are under way; if
# the store hangs, probes are answered nevertheless (Kubernetes gives them 1 s).
HTTP_LATEST_S = 0.3
GARBAGE = 20_000  # objects, between two looks for cycles
MAX_MODELS_NAMED = 8  # where a probe is told why the daemon is not ready


class HttpStart:
    """An observer that starts the HTTP side as soon as it no longer delays the first GET.

    Args:
        start: starts it; called once, from any thread.
        latest_s: after the first listing was asked for.
    """

    def __init__(self, start: Callable[[], None], latest_s: float = HTTP_LATEST_S) -> None:
        self._start = start
        self._lock = threading.Lock()  # of the two below
        self._is_over = False  # started or stopped
        self._timer: threading.Timer | None = None
        self._latest_s = latest_s

    def now(self) -> None:
        """Start it unless it is, or was stopped; any thread."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            if self._timer is not None:
                self._timer.cancel()
            self._start()

    def stop(self) -> None:
        """Start it no more; afterwards nothing of this runs."""
        with self._lock:
            self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def happened(self, event: Event, now_s: float) -> None:
        """See whether the first GET is over, or there will be none for a while."""
        if isinstance(
            event,
            events.PartFetched | events.PartFailed | events.Published | events.ResolveFailed,
        ):
            self.now()

    def decided(self, effect: Effect, now_s: float) -> None:
        """See whether there will be no GET at all, or the first may take long to come."""
        if isinstance(effect, effects.Refused):
            self.now()
        elif isinstance(effect, effects.Resolve) and self._timer is None:
            self._timer = threading.Timer(self._latest_s, self.now)
            self._timer.name = "cached-http-start"
            self._timer.daemon = True
            self._timer.start()


class Readiness:
    """An observer that latches: every model that is prefetched at start has been complete.

    A daemon that is being stopped is not ready any more.

    Args:
        prefetched: the models' names.
    """

    def __init__(self, prefetched: Iterable[str]) -> None:
        self.is_ready = False
        self.is_draining = False
        self._missing = dict.fromkeys(prefetched, "is queued")  # what it does, by model
        self._errors: dict[str, str] = {}  # the last, by model

    def happened(self, event: Event, now_s: float) -> None:
        """See whether the daemon is to stop, or a model is there."""
        match event:
            case events.DrainRequested():
                self.is_draining = True
            case events.Published():
                self._missing.pop(event.of.name, None)
            case _:
                pass

    def decided(self, effect: Effect, now_s: float) -> None:
        """Take note of the engine's word."""
        match effect:
            case effects.MarkReady():
                self.is_ready = True
            case effects.Resolve():
                self._note(effect.ref.name, "is being listed")
            case effects.CreateSegments():
                self._note(effect.of.name, "is loading")
            case effects.Retried():
                self._errors[effect.name] = effect.error
            case effects.Refused():
                self._note(effect.name, "has failed")
                self._errors[effect.name] = effect.message
            case _:
                pass

    def _note(self, name: str, doing: str) -> None:
        if name in self._missing:
            self._missing[name] = doing

    def why_not(self) -> str:
        """Return why the daemon is not ready; empty when it is. Any thread."""
        if self.is_draining:
            return "the daemon is stopping"
        if self.is_ready:
            return ""
        told = [
            f"{name} {doing}" + (f" ({error})" if (error := self._errors.get(name)) else "")
            for name, doing in list(self._missing.items())[:MAX_MODELS_NAMED]
        ]
        if len(self._missing) > MAX_MODELS_NAMED:
            told.append(f"and {len(self._missing) - MAX_MODELS_NAMED} more")
        return "models that are prefetched at start are not all there yet: " + ", ".join(told)


def run(config: Config, config_file: str | None = None) -> int:
    """Serve until a signal ends it; return the exit code.

    Args:
        config: what it shall be.
        config_file: where part of that was read, for the log; None: no file.

    Raises:
        InvalidConfig: the socket, the port or the segment root cannot be had. Nothing is left
            behind.
    """
    clock = SystemClock()
    writer = Writer(2, clock, level=config.log_level, is_text=config.log_format == "text")
    with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        _serve(config, config_file, clock, writer, stack)
    return 0


def _serve(
    config: Config,
    config_file: str | None,
    clock: SystemClock,
    writer: Writer,
    stack: contextlib.ExitStack,
) -> None:
    began_s = clock.now_s()
    open_files = raise_open_files()
    mailbox = Mailbox()
    stack.callback(drain_on_signals(mailbox.post))  # before anybody can see the socket, and stop us
    workers = UnixSocket(listen(config.socket, config.socket_mode), mailbox.lane, clock)
    stack.callback(workers.stop)
    directory_mode = _directory_mode(config.socket_mode)
    segments = open_segments(config.segments, config.segment_root, dir_mode=directory_mode)
    stack.callback(segments.purge if config.purge_on_exit else segments.close)
    left = segments.found()
    memory = SystemMemory(config.segment_root, segments.kind)
    checksums = Checksums()
    by_scheme = stores(config, clock, writer, mailbox.post)
    for store in by_scheme.values():
        stack.callback(store.close)
    inquiries = Inquiries(mailbox.lane().post, workers)
    ports = Ports(
        checksums=checksums,
        stores=by_scheme,
        segments=segments,
        memory=memory,
        replies=inquiries,
        clock=clock,
    )
    metrics = _metrics(config, memory, workers, mailbox, writer)
    readiness = Readiness(ref.name for ref in config.models if ref.prefetch)
    http = _http(config, inquiries, metrics, readiness, writer, stack, open_files)
    budget_bytes = _budget_bytes(config, memory, left)
    daemon = Daemon(
        _engine(config, budget_bytes, checksums.can, left, began_s),
        Runner(ports, mailbox.post, random.random),
        mailbox,
        observers=[Log(writer), *_audit(config, writer), metrics, readiness, http],
        clock=clock,
        fetch_threads=config.fetch_threads,
    )
    writer.write(
        "info",
        "daemon started",
        **_told(config),
        config_file=config_file or "none",
        segments=segments.kind,
        budget_bytes=budget_bytes,
        open_files=open_files,
    )
    stack.callback(http.stop)
    workers.start()
    if not any(ref.prefetch for ref in config.models):
        http.now()
    settle_heap()
    daemon.run()
    writer.write("info", "daemon stopped", uptime_s=round(clock.now_s() - began_s, 3))


def _audit(config: Config, writer: Writer) -> list[Observer]:
    return [Audit(writer.write)] if config.audit else []


def _told(config: Config) -> dict[str, object]:
    """Return what the log says of a configuration."""
    return {
        "version": cached.__version__,
        "pid": os.getpid(),
        "socket": config.socket,
        "segment_root": config.segment_root,
        "endpoint": config.endpoint_url or "AWS",
        "models": len(config.models),
        "verify": config.verify,
    }


def settle_heap() -> None:
    """Spare what is there from now on, and short-lived lists, from the collector of cycles.

    A full collection holds up all threads for 10 ms and more, and a request of a few thousand lists
    is enough for one.
    """
    gc.freeze()
    gc.set_threshold(GARBAGE)


def raise_open_files() -> int:
    """Raise this process's soft limit of open files to the hard one; return what it is now.

    Every file in memory and every worker takes one. The soft limit is often 1024 for the sake of
    ``select``, which nothing here uses; systemd and Go programs do the same.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox refuses: then it stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft


def _budget_bytes(config: Config, memory: MemoryProbe, left: Sequence[Left]) -> int:
    """Return the least of what was allowed and what the machine has, minus headroom.

    What an earlier daemon left in memory is ours.
    """
    ours_bytes = sum(each.size_bytes for each in left)
    there_bytes = max(0, memory.available_bytes() + ours_bytes - config.memory_headroom_bytes)
    if config.memory_budget_bytes is None:
        return there_bytes
    return min(there_bytes, config.memory_budget_bytes)


def _engine(
    config: Config,
    budget_bytes: int,
    can_check: frozenset[str],
    left: Sequence[Left],
    began_s: float,
) -> Engine:
    return Engine(
        config.models,
        budget_bytes=budget_bytes,
        limits=Limits(
            fetch_slots=config.fetch_threads,
            headroom_bytes=config.memory_headroom_bytes,
            part_attempts=config.max_attempts,
            verify=config.verify,
            can_check=can_check,
            kept_versions=config.kept_versions,
            refresh_interval_s=config.refresh_interval_s,
        ),
        about=About(
            version=cached.__version__,
            pid=os.getpid(),
            owner_uid=os.geteuid(),
            socket=config.socket,
            began_s=began_s,
        ),
        drain_s=config.drain_timeout_s,
        left=left,
    )


def _metrics(
    config: Config, memory: SystemMemory, workers: UnixSocket, mailbox: Mailbox, writer: Writer
) -> Metrics:
    return Metrics(
        cached.__version__,
        [ref.name for ref in config.models],
        {
            "cached_process_private_bytes": memory.private_bytes,
            "cached_process_cpu_seconds_total": process_time,
            "cached_connections_refused_total": lambda: workers.counts().refused,
            "cached_frames_malformed_total": lambda: workers.counts().malformed,
            "cached_replies_unread_total": lambda: workers.counts().unread,
            "cached_events_waiting": mailbox.count,
            "cached_log_lines_dropped_total": lambda: writer.dropped,
        },
    )


def _http(  # noqa: PLR0913, PLR0917 - called in one place
    config: Config,
    inquiries: Inquiries,
    metrics: Metrics,
    readiness: Readiness,
    writer: Writer,
    stack: contextlib.ExitStack,
    open_files: int,
) -> HttpStart:
    """Take the port now, so that one that is taken is an error at start; serve it later."""
    if config.http_port is None:
        return HttpStart(lambda: None)
    from cached.adapters.http import HttpServer, TokenFile

    token = config.http_token_file
    server = HttpServer(
        config.http_host,
        config.http_port,
        why_not_ready=readiness.why_not,
        ask=inquiries.ask,
        token_file=None if token is None else TokenFile(token),
        render=metrics.render,
        failed=lambda text: writer.write("error", "http failed", reason=text),
        open_files=open_files,
        crowded=lambda closed, most: writer.write(
            "warning", "http connections closed for newer ones", closed=closed, most=most
        ),
    )
    stack.callback(server.stop)

    def start() -> None:
        server.start()
        writer.write("info", "http started", host=server.host, port=server.port)

    return HttpStart(start)


def _directory_mode(socket_mode: int) -> int:
    """Return the mode of directories: who may connect may also look a model up by path."""
    group = 0o050 if socket_mode & 0o060 else 0
    others = 0o005 if socket_mode & 0o006 else 0
    return 0o700 | group | others
