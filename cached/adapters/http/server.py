"""The HTTP side: health, readiness, metrics and the models, in a thread of its own.

With a token file it takes orders too: what the commands prefetch, evict, refresh and purge do.

The port is taken by the constructor, which needs nothing but ``socket``: a port that is in use is
an error at start. aiohttp and uvloop (as slow to import as all the rest of the daemon) are
imported by the thread ``cached-http``; who connects before that waits in the kernel's backlog.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import socket
import threading
from typing import TYPE_CHECKING

from cached.core.errors import BadRequest, CachedError, InvalidConfig, NotPermitted, TimedOut
from cached.core.wire import error_body

if TYPE_CHECKING:
    import asyncio
    import logging
    from collections.abc import Callable, Iterator

    from aiohttp import web

    from cached.adapters.http.token_file import TokenFile

    Body = dict[str, object]
    Ask = Callable[[str, Body, Callable[[Body], None]], None]
    """Sends the daemon a request (op, fields); any thread may call back, once or never."""

    Render = Callable[[Body, str], tuple[bytes, str]]
    """Makes the exposition of the metrics, and its content type, of a status and ``Accept``."""

SNAPSHOT_TIMEOUT_S = 2.0  # a mailbox that is busy for so long is what a probe should see
CHANGE_TIMEOUT_S = 60.0  # evict and purge wait for the kernel: 0.13 s for 1 GiB
MAX_BODY_BYTES = 4096
SHUTDOWN_TIMEOUT_S = 1.0  # for answers under way, and for idle connections of scrapers
BACKLOG = 128
NEEDS = ("aiohttp", "uvloop", "prometheus_client")
OURS = "set --http-host to an address of this host"
OFF = "choose another with --http-port or CACHED_HTTP_PORT (0: a free one, off: no HTTP side)"
INDEX = """\
cached
/healthz  200 while the process serves
/readyz   200 once the models to be prefetched are there, else 503 with the reason
/models   models and memory, JSON
/metrics  Prometheus text or OpenMetrics

With --http-token-file and "Authorization: Bearer TOKEN":
POST /models/NAME/prefetch   POST /models/NAME/evict   POST /purge
POST /models/NAME/refresh    with {"version": "V"}: go back to a version in memory
"""
STATUSES = {  # of the daemon's refusals; of others 500
    "bad_request": 400,
    "model_unknown": 404,
    "version_unknown": 404,
    "not_permitted": 409,  # the token allows it; somebody holds the model
    "load_failed": 502,
    "daemon_unavailable": 503,
    "timed_out": 504,
    "out_of_space": 507,
    "over_budget": 507,
}


class HttpServer:
    """Answers GET and HEAD on one port; changes something only by the token.

    Args:
        host: address or name to bind to.
        port: 0 takes a free one, see ``port``.
        why_not_ready: a flag read, in the HTTP thread: "" when ready, else the reason.
        ask: the daemon, as its owner.
        token_file: who knows what is in it may POST; ``None``: nobody may.
        render: for /metrics; called in the HTTP thread.
        failed: told of errors inside the HTTP side, one line of text each.
        open_files: the limit of this process; HTTP takes a small part of them.
        crowded: told now and then how many connections were closed because more came, and how
            many may be open; in the HTTP thread.

    Attributes:
        host: as given.
        port: that is bound.

    Raises:
        InvalidConfig: the port is taken or the host is none of ours; or a library is missing.
    """

    def __init__(  # noqa: PLR0913 - made in one place, by keywords
        self,
        host: str,
        port: int,
        *,
        why_not_ready: Callable[[], str],
        ask: Ask,
        token_file: TokenFile | None,
        render: Render,
        failed: Callable[[str], None],
        open_files: int,
        crowded: Callable[[int, int], None],
    ) -> None:
        _check_libraries()
        self._socket = _bind(host, port)
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        self._why_not_ready = why_not_ready
        self._ask = ask
        self._token_file = token_file
        self._render = render
        self._failed = failed
        self._open_files = open_files
        self._crowded = crowded
        self._lock = threading.Lock()  # of the two below
        self._end: Callable[[], object] | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="cached-http", daemon=True)

    def start(self) -> None:
        """Begin to answer; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Answer what is under way, close, and join the thread. May be called again."""
        with self._lock:
            self._is_stopped = True
            if self._end is not None:
                self._end()
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()

    # --- all below: the HTTP thread

    def _run(self) -> None:
        import asyncio

        import uvloop

        with (
            _forwarded_logs(self._failed),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(self._serve())

    async def _serve(self) -> None:
        import asyncio

        from aiohttp import web

        from cached.adapters.http.connections import Connections, most_connections

        most = most_connections(self._open_files)
        connections = Connections(most, lambda closed: self._crowded(closed, most))
        middlewares = [connections.middleware()]
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
        app.add_routes(
            [
                web.get("/", self._index),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/models", self._models),
                web.get("/metrics", self._metrics),
                web.post("/models/{model}/{op:prefetch|evict|refresh}", self._change),
                web.post("/{op:purge}", self._change),
            ]
        )
        app.on_response_prepare.append(_set_headers)
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            auto_decompress=False,
        )
        await runner.setup()
        assert runner.server is not None  # noqa: S101 - setup made it
        try:
            async with asyncio.TaskGroup() as group:
                accepting = group.create_task(connections.accept(self._socket, runner.server))
                await self._stopped()
                accepting.cancel()
        finally:
            await runner.cleanup()

    async def _stopped(self) -> None:
        """Return once ``stop`` was called."""
        import asyncio

        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        with self._lock:
            self._end = lambda: loop.call_soon_threadsafe(ended.set)
            if self._is_stopped:
                ended.set()
        try:
            await ended.wait()
        finally:
            with self._lock:
                self._end = None

    async def _index(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.Response(text=INDEX)

    async def _healthz(self, request: web.Request) -> web.Response:
        return _json({"healthy": True})

    async def _readyz(self, request: web.Request) -> web.Response:
        reason = self._why_not_ready()
        if reason:
            return _json({"ready": False, "reason": reason}, 503)
        return _json({"ready": True})

    async def _models(self, request: web.Request) -> web.Response:
        try:
            return _json(await self._answer("status", {}, SNAPSHOT_TIMEOUT_S))
        except TimedOut as error:
            return _json(error_body(error), 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        from aiohttp import web

        try:
            status = await self._answer("status", {}, SNAPSHOT_TIMEOUT_S)
        except TimedOut as error:
            return _json(error_body(error), 503)
        body, content_type = self._render(status, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _change(self, request: web.Request) -> web.Response:
        """Do what the path says, for who knows the token; before that nothing else is looked at."""
        refusal = self._refusal(request.headers.get("Authorization"))
        if refusal is not None:
            return refusal
        op = request.match_info["op"]
        try:
            fields = await _fields(request, op)
            if "model" in request.match_info:
                fields["model"] = request.match_info["model"]
            reply = await self._answer(op, fields, CHANGE_TIMEOUT_S)
        except CachedError as error:
            reply = error_body(error)
        return _json(reply, _status_of(reply))

    def _refusal(self, authorization: str | None) -> web.Response | None:
        """Return what whoever may not change anything is told; ``None``: go on."""
        if self._token_file is None:
            off = NotPermitted(
                "changes over HTTP are off", hint="start the daemon with --http-token-file PATH"
            )
            return _json(error_body(off), 404)
        if authorization is None:
            missing = NotPermitted("who asks is not known", hint="send Authorization: Bearer TOKEN")
            return _json(error_body(missing), 401, {"WWW-Authenticate": "Bearer"})
        try:
            if self._token_file.allows(authorization):
                return None
        except InvalidConfig as error:
            self._failed(str(error))
            closed = NotPermitted("the token cannot be read", hint="the daemon's log says why")
            return _json(error_body(closed), 503)
        wrong = NotPermitted("the token is wrong", hint="it is the text in --http-token-file")
        return _json(error_body(wrong), 403)

    async def _answer(self, op: str, fields: Body, timeout_s: float) -> Body:
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[Body] = loop.create_future()

        def settle(reply: Body) -> None:
            if not future.done():
                future.set_result(reply)

        def answered(reply: Body) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, reply)

        self._ask(op, fields, answered)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            message = f"the daemon did not answer {op} within {timeout_s:g} s"
            raise TimedOut(message, hint="it is busy or hangs: see its log") from error


async def _fields(request: web.Request, op: str) -> Body:
    """Return the members of the body, which may be empty.

    Raises:
        BadRequest: it is no JSON object, too long, late, or holds what nobody reads.
    """
    import asyncio

    from aiohttp import web

    known = {"version"} if op == "refresh" else set()
    try:
        async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
            raw = await request.read()
        fields = json.loads(raw or b"{}")
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is not JSON", hint="leave it empty") from error
    except (TimeoutError, web.HTTPRequestEntityTooLarge) as error:
        most = f"{MAX_BODY_BYTES} bytes, and come within {SNAPSHOT_TIMEOUT_S:g} s"
        message = f"the body may have at most {most}"
        raise BadRequest(message, hint="leave it empty") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or fields.keys() - known or not isinstance(version, str | None):
        takes = 'empty, or {"version": "V"}' if known else "empty"
        message = f"the body of {op} must be {takes}"
        raise BadRequest(message, hint="docs/wire.md says what each takes")
    return fields


def _status_of(reply: Body) -> int:
    error = reply.get("error")
    return STATUSES.get(str(error.get("code")), 500) if isinstance(error, dict) else 200


def _json(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    from aiohttp import web

    return web.json_response(body, status=status, headers=headers, dumps=_dumps)


def _dumps(body: object) -> str:
    return json.dumps(body, indent=1) + "\n"


async def _set_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
    response.headers["Server"] = "cached"
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"


def _check_libraries() -> None:
    for name in NEEDS:
        if importlib.util.find_spec(name) is None:
            message = f"the HTTP side needs {name}, which is not installed"
            hint = "pip install 'cached-models[daemon]', or --http-port off"
            raise InvalidConfig(message, hint=hint)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        message = f"cannot listen on http_host {host}: {error}"
        raise InvalidConfig(message, hint=OURS) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        why = "the port is taken" if error.errno == errno.EADDRINUSE else error.strerror
        message = f"cannot listen on {host}:{port} for HTTP: {why}"
        is_foreign = error.errno == errno.EADDRNOTAVAIL
        hint = OURS if is_foreign else f"stop what uses it, or {OFF}"
        raise InvalidConfig(message, hint=hint) from error
    return listener


@contextlib.contextmanager
def _forwarded_logs(failed: Callable[[str], None]) -> Iterator[None]:
    """Send what the libraries log to ``failed``, so that stderr holds our own lines only.

    All but bad requests: they are the peer's fault, and have been answered with 400.
    """
    import logging

    from aiohttp.http_exceptions import HttpProcessingError

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)):
                failed(self.format(record))

    forward = Forward(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("aiohttp", "asyncio")]
    for logger in loggers:
        logger.addHandler(forward)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(forward)
