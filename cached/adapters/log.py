"""The log: one line for each thing that happened, as JSON or, on a terminal, as text.

What becomes a line, at which level, is the table ``ROWS``. The writer never blocks and never
raises: a line that cannot be written at once is dropped and counted (docs/decisions/
002-one-json-writer.md says why it is our own).
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import time
from typing import TYPE_CHECKING

from cached.core import effects, errors, events
from cached.core.objects import FileRef, Manifest, ModelRef, Part, VersionRef

if TYPE_CHECKING:
    from cached.core.effects import Effect
    from cached.core.events import Event
    from cached.ports import Clock

    Fields = dict[str, object]

LEVELS = ("debug", "info", "warning", "error")
MAX_LINE_BYTES = select.PIPE_BUF  # so much is written whole, or not at all: pipe(7)
REPEAT_S = 10.0  # lines of one kind, model and code: one in so many seconds, with a count

# event or effect: level, text. What is not here is silent: SILENT, and a test compares.
ROWS: dict[type, tuple[str, str]] = {
    events.Connected: ("debug", "worker connected"),
    events.Disconnected: ("debug", "worker disconnected"),
    events.Requested: ("debug", "request received"),
    events.Resolved: ("info", "model resolved"),
    events.ResolveFailed: ("debug", "resolve failed"),
    events.SegmentsReady: ("debug", "segments made"),
    events.SegmentsFailed: ("warning", "segments failed"),
    events.HeaderRead: ("debug", "header read"),
    events.HeaderSized: ("debug", "long header found"),
    events.HeaderRefused: ("warning", "header refused"),
    events.Described: ("debug", "object described"),
    events.DescribeFailed: ("debug", "description failed"),
    events.DigestsRead: ("debug", "digests read"),
    events.DigestsRefused: ("warning", "digests refused"),
    events.Checked: ("debug", "bytes summed"),
    events.CheckFailed: ("warning", "check failed"),
    events.PartStalled: ("debug", "part stalled"),
    events.PartFetched: ("debug", "part fetched"),
    events.PartFailed: ("debug", "part failed"),
    events.Published: ("info", "model published"),
    events.Freed: ("info", "memory freed"),
    events.StillMapped: ("debug", "memory found still mapped"),
    events.FreeFailed: ("warning", "freeing failed"),
    effects.Resolve: ("debug", "resolve began"),
    effects.CreateSegments: ("info", "model admitted"),
    effects.FetchPart: ("debug", "part requested"),
    effects.CancelParts: ("debug", "parts cancelled"),
    effects.ReadHeader: ("debug", "header asked for"),
    effects.Describe: ("debug", "description asked for"),
    effects.ReadDigests: ("debug", "digests asked for"),
    effects.Check: ("debug", "check asked for"),
    effects.Publish: ("debug", "publication began"),
    effects.Free: ("debug", "freeing began"),
    effects.Reply: ("debug", "request answered"),
    effects.MarkReady: ("info", "daemon became ready"),
    effects.Refused: ("error", "load refused"),
    effects.Retried: ("warning", "retry planned"),
    effects.Evicted: ("info", "model evicted"),
    effects.Adopted: ("info", "model adopted"),
    effects.Switched: ("info", "version became current"),
    effects.Looked: ("debug", "object looked at"),
    effects.Mismatched: ("warning", "wrong bytes found"),
    effects.Hedged: ("debug", "part hedged"),
    effects.DrainBegan: ("info", "drain began"),
    effects.DrainCut: ("info", "drain cut short"),
    effects.Drained: ("info", "daemon drained"),
}
SILENT = {events.Ticked, events.DrainRequested, effects.WakeAt}
REPEATED = {effects.Retried, effects.Refused, effects.Reply}

# These pass, or the next version does: no person must act.
_PASSING = {
    error.code
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.CachedError) and error.transient
} | {errors.ObjectChanged.code, errors.Stale.code}

_SECRET = re.compile(
    r"""(?ix) (?<= ://) [^/@\s]+ (?= @)
    | (?<= [?&\s"'] ) (x-amz-(?:signature|security-token|credential) \s* [=:] \s*) [^\s&"',;]+
    | (\b (?: authorization | aws_secret_access_key | aws_session_token ) ["']? \s* [=:] \s*) .+
    """
)
_PLAIN = re.compile(r"[\w./:@+-]+", re.ASCII)


class Writer:
    """Writes lines to a descriptor; any thread.

    Args:
        fd: duplicated; the copy is closed by ``close``.
        clock: for ``ts``.
        level: the least that is written: one of ``LEVELS``.
        is_text: for people instead of programs.

    Attributes:
        dropped: lines that could not be written at once.
    """

    __slots__ = ("_clock", "_fd", "_is_text", "_is_torn", "_least", "_poll", "_untold", "dropped")

    def __init__(
        self, fd: int, clock: Clock, *, level: str = "info", is_text: bool = False
    ) -> None:
        self._clock = clock
        self._least = LEVELS.index(level)
        self._is_text = is_text
        self._is_torn = False
        self._untold = 0
        self.dropped = 0
        self._poll = select.poll()
        try:
            self._fd = os.dup(fd)
        except OSError:
            self._fd = -1  # closed: all lines are dropped
        else:
            self._poll.register(self._fd, select.POLLOUT)

    def is_wanted(self, level: str) -> bool:
        """Return whether lines of this level are written."""
        return LEVELS.index(level) >= self._least

    def write(self, level: str, event: str, **fields: object) -> None:
        """Write one line, if its level is wanted.

        Args:
            level: one of ``LEVELS``.
            event: constant text, lower case, past tense.
            fields: names with units; strings are scrubbed of secrets.
        """
        if not self.is_wanted(level):
            return
        if self._untold:
            fields["dropped_before"] = self._untold
        record = {"ts": timestamp(self._clock.wall_s()), "level": level, "event": event}
        if self._emit(_line(record, fields, is_text=self._is_text)):
            self._untold = 0
        else:
            self._untold += 1
            self.dropped += 1

    def close(self) -> None:
        """Close the descriptor; later lines are dropped."""
        if self._fd >= 0:
            self._poll.unregister(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _emit(self, line: bytes) -> bool:
        """Write without blocking; return whether all of it went out.

        The descriptor stays as it is: O_NONBLOCK would be set for everyone who shares the
        terminal or pipe. A pipe that polls as writable takes PIPE_BUF bytes.
        """
        if self._is_torn:
            line = b"\n" + line
        try:
            if not self._poll.poll(0):
                return False
            written = os.write(self._fd, line)
        except OSError:
            return False
        self._is_torn = written < len(line)
        return not self._is_torn


class Log:
    """An Observer that writes what ``ROWS`` names; in the mailbox thread."""

    __slots__ = (
        "_began_s",
        "_fetched_bytes",
        "_filling",
        "_repeats",
        "_size_bytes",
        "_told",
        "_writer",
    )

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._began_s: dict[str | VersionRef, float] = {}  # of resolves and of loads
        self._size_bytes: dict[VersionRef, int] = {}  # of versions that are being loaded
        self._fetched_bytes: dict[VersionRef, int] = {}  # of those: what was not there before
        self._filling: set[VersionRef] = set()  # those of which a GET went out
        self._told: set[tuple[VersionRef, str]] = set()  # what is said once of a version
        self._repeats: dict[tuple[object, ...], tuple[float, int]] = {}

    def happened(self, event: Event, now_s: float) -> None:
        """Write a line for an event."""
        self._note(event, now_s)

    def decided(self, effect: Effect, now_s: float) -> None:
        """Write a line for an effect."""
        match effect:
            case effects.Resolve():
                self._began_s[effect.ref.name] = now_s
            case effects.CreateSegments():
                self._began_s[effect.of] = now_s
                self._size_bytes[effect.of] = size_bytes = effect.manifest.size_bytes
                objects = effect.manifest.objects
                shared_bytes = sum(objects[index].size_bytes for index in effect.shared)
                self._fetched_bytes[effect.of] = size_bytes - shared_bytes
            case effects.Adopted():
                size_bytes = self._size_bytes.get(effect.of, 0)
                self._fetched_bytes[effect.of] = size_bytes - effect.there_bytes
            case effects.FetchPart() if effect.part.file.of not in self._filling:
                of = effect.part.file.of
                self._filling.add(of)
                self._writer.write("info", "loading began", model=of.name, version=of.version)
            case effects.Looked():
                self._looked(effect)
            case effects.Evicted():
                self._forget(effect.of)
                self._told = {told for told in self._told if told[0] != effect.of}
            case _:
                pass
        self._note(effect, now_s)

    def _looked(self, effect: effects.Looked) -> None:
        facts = effect.facts
        if not effect.algorithm:
            hint = "length and ETag are compared; upload it with a checksum, or write digests"
            self._once(effect, "object cannot be checked", hint)
        if (facts.encryption or "").startswith("aws:kms") and not facts.has_bucket_key:
            hint = "every GET is a call of KMS: use an S3 bucket key"
            self._once(effect, "object without bucket key found", hint)

    def _once(self, effect: effects.Looked, text: str, hint: str) -> None:
        """Write a line about the first such object of a version."""
        of = effect.file.of
        if (of, text) not in self._told:
            self._told.add((of, text))
            fields = {"model": of.name, "version": of.version, "path": effect.path}
            self._writer.write("warning", text, **fields, hint=hint)

    def _forget(self, of: VersionRef) -> None:
        self._began_s.pop(of, None)
        self._size_bytes.pop(of, None)
        self._fetched_bytes.pop(of, None)
        self._filling.discard(of)

    def _note(self, record: Event | Effect, now_s: float) -> None:
        row = ROWS.get(type(record))
        if row is None:
            return
        level, text = row
        if isinstance(record, events.Published) and record.of not in self._began_s:
            level = "debug"  # it was before, and has become current again
        extra = self._extra(record, now_s)
        code = extra.get("code")
        if isinstance(record, effects.Refused) and record.code in _PASSING:
            level = "warning"
        elif isinstance(record, effects.Mismatched) and record.is_final:
            level = "error"
        elif isinstance(record, effects.Reply) and code not in {None, errors.TimedOut.code}:
            level, text = "info", "request refused"
        if not self._writer.is_wanted(level):
            return
        fields = fields_of(record) | extra
        if level != "debug" and type(record) in REPEATED and self._is_repeated(fields, now_s):
            return
        self._writer.write(level, text, **fields)

    def _extra(self, record: Event | Effect, now_s: float) -> Fields:
        """Return what the record itself does not hold: durations, codes."""
        match record:
            case events.Resolved():
                return _seconds(self._began_s.pop(record.name, None), now_s)
            case events.Published():
                return self._published(record.of, now_s)
            case effects.Reply(body={"error": dict(error)}):
                told = {"code": error.get("code"), "error": error.get("message")}
                return told | ({"hint": error["hint"]} if error.get("hint") else {})
            case effects.DrainBegan():
                return {"hint": "it ends once they are answered; a second signal ends it at once"}
            case _:
                return {}

    def _published(self, of: VersionRef, now_s: float) -> Fields:
        """Return how much was published, in which time; and how fast, if any of it was fetched."""
        fields = _seconds(self._began_s.get(of), now_s)
        if of in self._size_bytes:
            fields["size_bytes"] = self._size_bytes[of]
        took_s, fetched_bytes = fields.get("seconds"), self._fetched_bytes.get(of, 0)
        if isinstance(took_s, float) and took_s > 0 and fetched_bytes:
            fields["mb_per_s"] = round(fetched_bytes / 1e6 / took_s, 1)
        self._forget(of)
        return fields

    def _is_repeated(self, fields: Fields, now_s: float) -> bool:
        """Return whether such a line was just written; count it if so, tell the count if not."""
        key = (fields.get("model"), fields.get("op"), fields.get("code"))
        last_s, count = self._repeats.get(key, (-math.inf, 0))
        if now_s - last_s < REPEAT_S:
            self._repeats[key] = (last_s, count + 1)
            return True
        if len(self._repeats) >= 1000:
            self._repeats.clear()  # an op is the peer's own text: as many as it likes
        self._repeats[key] = (now_s, 0)
        if count:
            fields["repeated"] = count
        return False


def timestamp(wall_s: float) -> str:
    """Return RFC 3339 in UTC with milliseconds: ``2026-01-31T23:59:59.123Z``."""
    seconds, milliseconds = divmod(int(wall_s * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03d}Z"


def fields_of(record: Event | Effect) -> Fields:
    """Return the fields of an event or effect that belong into a line.

    What a peer sent beside its op, and what a reply holds, do not.
    """
    fields: Fields = {}
    for name, value in zip(record._fields, record, strict=True):
        match value:
            case VersionRef():
                fields |= {"model": value.name, "version": value.version}
            case FileRef():
                fields |= {"model": value.of.name, "version": value.of.version}
                fields["file"] = value.index
            case Part():
                fields |= {"part": value.part_id, "model": value.file.of.name}
                fields |= {"key": value.stored.key, "start": value.start, "stop": value.stop}
            case ModelRef():
                fields |= {"model": value.name, "uri": value.uri}
            case Manifest():
                fields |= {"version": value.version, "files": len(value.objects)}
                fields["size_bytes"] = value.size_bytes
            case errors.CachedError():
                fields |= {"code": value.code, "error": str(value)}
            case "":
                pass  # no hint, no text
            case str() | int() | float():
                fields["model" if name == "name" else name] = value
            case _:
                pass
    return fields


def _seconds(began_s: float | None, now_s: float) -> Fields:
    return {} if began_s is None else {"seconds": round(now_s - began_s, 3)}


def _line(record: dict[str, str], fields: Fields, *, is_text: bool) -> bytes:
    render = _text if is_text else _json
    for most in (2000, 200, 20, 0):
        line = render(record, {key: _clean(value, most) for key, value in fields.items()})
        if len(line) <= MAX_LINE_BYTES - 1:  # one for a newline before it
            return line
    return render(record, {})


def _json(record: dict[str, str], fields: Fields) -> bytes:
    return json.dumps({**record, **fields, **record}).encode() + b"\n"  # record wins, and is first


def _text(record: dict[str, str], fields: Fields) -> bytes:
    words = [f"{key}={_word(value)}" for key, value in fields.items()]
    head = f"{record['ts']} {record['level'].upper():7} {record['event']}"
    return "  ".join([head, *words]).encode() + b"\n"


def _word(value: object) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value)


def _clean(value: object, most: int) -> object:
    """Return a JSON value: no secret, no string over ``most`` characters, no NaN."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    text = _SECRET.sub(lambda found: (found[1] or found[2] or "") + "***", str(value))
    return text if len(text) <= most else text[:most] + "…"
