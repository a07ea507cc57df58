"""Whatever a store does wrong, a load ends with the right bytes or with an error that names it.

A thousand random plans of faults (tests/e2e/fault_plans.py), each with a whole daemon and a real
server, in threads of this process. A plan that fails is told with its seed.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

import cached
from cached.core import backoff
from cached.core.digests import MANIFEST_NAME
from cached.core.effects import Hedged
from cached.core.errors import NotPermitted
from tests.e2e import fault_plans
from tests.e2e.fault_plans import PREFIX, URI, Plan
from tests.fakes.hosted_daemon import HostedDaemon, config_of
from tests.fakes.local_daemon import open_descriptors
from tests.fakes.store_faults import Changed, Corrupted, Fault, NoEtag, OtherEtag
from tests.fakes.store_server import StoreServer
from tests.fakes.tls import AUTHORITY, server_context

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cached.core.errors import CachedError

PLANS_PER_SHARD = 50
SHARDS = 20
PLAN_S = 10.0
TMPFS = Path("/dev/shm")
UNLISTED = sorted({mode for mode in fault_plans.MODES if mode.verify != "digest"})


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GETs that fail in a row take a second instead of 13."""
    monkeypatch.setattr(backoff, "FIRST_DELAY_S", 0.01)


class Try:
    """One plan carried out."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan = plan
        self.error: CachedError | None = None
        self.root = directory / "root"
        faults = plan.faults
        tls = server_context() if plan.tls else None
        self.server = StoreServer(plan.objects(), faults=faults, tls=tls)
        flags: dict[str, object] = {
            "model": [f"llm={URI}"],
            "socket": str(directory / "s"),
            "segment_root": str(self.root),
            "segments": plan.segments,
            "verify": plan.mode.verify,
            "endpoint_url": self.server.endpoint_url,
            **({"ca_bundle": AUTHORITY} if plan.tls else {}),
        }
        seconds = {"receive_timeout_s": fault_plans.RECEIVE_TIMEOUT_S, "drain_timeout_s": 0.5}
        self.daemon = HostedDaemon(config_of(flags, **seconds))

    def run(self) -> None:
        began_s = time.monotonic()
        with self.server, self.daemon:
            error = self.error = self.read_early()
            self.judge(error)
            self.server.faults = {}
            self.server.resumed.set()
            if error is not None:
                self.server.objects = dict(self.plan.objects())
            self.read_by_name()
            self.evict()
        assert time.monotonic() - began_s < PLAN_S

    def read_early(self) -> CachedError | None:
        """Read every file as it comes, and all once more at the end; return what went wrong."""
        try:
            with cached.open("llm", socket=self.daemon.config.socket, timeout_s=PLAN_S) as model:
                for path in model.files:
                    read = bytes(model.file(path))
                    if not any(isinstance(fault, Corrupted) for _, fault in self.server.met):
                        self.compare(model.version, path, read)
                model.wait()
                for path in model.files:
                    self.compare(model.version, path, bytes(model.file(path)))
        except cached.CachedError as error:
            return error
        return None

    def compare(self, version: str, path: str, read: bytes) -> None:
        """Check that these are the bytes of this very version; flipped bits only if unchecked."""
        changes = sum(isinstance(fault, Changed) for _, fault in self.server.met)
        right = bytearray(fault_plans.versions(self.plan, changes)[version][path])
        is_believed = path == MANIFEST_NAME  # nothing vouches for the list of digests itself
        if is_believed or not self.plan.mode.finds_wrong_bytes:
            for key, at in self.server.corrupted:
                if key == PREFIX + path and read[at : at + 1] == bytes([right[at] ^ 1]):
                    right[at] ^= 1
        assert read == right, f"wrong bytes of {path} in {version}"

    def judge(self, error: CachedError | None) -> None:
        """Check that what came of it follows from what was met."""
        met = list(self.server.met)
        faults = [fault for _, fault in met]
        if error is not None:
            assert any(fault_plans.explains(fault, error) for fault in faults), repr(error)
            lasts = len(self.plan.faults) >= fault_plans.EVER
            assert lasts or not all(map(fault_plans.passes, faults)), repr(error)
        elif not self.daemon.observed.count(Hedged):
            final = [
                (asked.method, asked.path, fault)
                for asked, fault in met
                if isinstance(fault, Changed | OtherEtag | NoEtag)
                and asked.headers.get("range") != "bytes=0-0"  # asks for the reason of a refusal
            ]
            assert not final, "a final fault was passed over"

    def read_by_name(self) -> None:
        """Open it as a second worker does, now that nothing goes wrong: by tensor, and all."""
        address = self.daemon.config.socket
        with cached.open("llm", socket=address, timeout_s=PLAN_S, until="ready") as model:
            for path in model.files:
                self.compare(model.version, path, bytes(model.file(path)))
            may_be_spoilt = self.server.corrupted and not self.plan.mode.finds_wrong_bytes
            names = self.names()
            assert may_be_spoilt or list(model) == names
        if may_be_spoilt:
            return
        with cached.open("llm", socket=address, timeout_s=PLAN_S, tensors=names) as model:
            for path in self.paths():
                content = bytes(model.file(path))
                stop = 8 + int.from_bytes(content[:8], "little")
                parts = [bytes(model.buffer(f"{path}:{name}")) for name in "ab"]
                assert b"".join(parts) == content[stop:]

    def paths(self) -> list[str]:
        return sorted(path for path in self.plan.sizes if path.endswith(".safetensors"))

    def names(self) -> list[str]:
        return [f"{path}:{name}" for path in self.paths() for name in "ab"]

    def evict(self) -> None:
        """Have it freed: nothing may be counted, or open, from then on."""
        deadline_s = time.monotonic() + PLAN_S
        while True:
            try:
                self.daemon.ask("evict", model="llm")
            except NotPermitted:  # the daemon has not seen yet that the worker is gone
                assert time.monotonic() < deadline_s, "somebody holds it"
            else:
                break
        while any(self.counted().values()):
            assert time.monotonic() < deadline_s, f"still counted: {self.counted()}"
            time.sleep(0.005)
        held = {link for link in open_descriptors().values() if str(self.root) in link}
        assert held <= {str(self.root), f"{self.root}/lock"}, held
        assert not [link for link in open_descriptors().values() if link.startswith("/memfd")]

    def counted(self) -> dict[str, int]:
        memory = self.daemon.memory()
        return {key: memory[key] for key in ("reserved_bytes", "committed_bytes", "leased_bytes")}


def carry_out(plan: Plan) -> CachedError | None:
    """Try a plan, and see that nothing stays behind; return what the worker was told."""
    parent = TMPFS if plan.segments != "file" else None
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    with tempfile.TemporaryDirectory(prefix="cached-plan-", dir=parent) as directory:
        tried = Try(plan, Path(directory))
        tried.run()
    for thread in set(threading.enumerate()) - threads:
        if thread.name == "mover":
            thread.join(1)
    assert set(threading.enumerate()) <= threads
    assert open_descriptors() == descriptors
    return tried.error


def carry_out_all(seeds: range) -> None:
    for seed in seeds:
        plan = fault_plans.draw(seed)
        try:
            carry_out(plan)
        except BaseException as error:
            error.add_note(f"PLAN OF SEED {seed}: {told(plan)}")
            raise


def told(plan: Plan) -> str:
    """Return a plan without what its lasting faults repeat."""
    first: dict[int | tuple[str, int], object] = {}
    for at, fault in plan.faults.items():
        if fault not in first.values():
            first[at] = fault
    return repr(plan._replace(faults={}))[:-1] + f" first of each: {first}"


def test_some_plans():
    carry_out_all(range(-6, 0))


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("shard", range(SHARDS))
def test_whatever_a_store_does_bytes_are_right_or_the_error_names_it(shard: int):
    carry_out_all(range(shard * PLANS_PER_SHARD, (shard + 1) * PLANS_PER_SHARD))


@pytest.mark.parametrize("at", [14, 60, 90], ids=["a name", "an offset", "another name"])
def test_a_flipped_bit_of_a_header_is_not_believed_for_long(at: int):
    plan = fault_plans.draw(0)
    sizes = {"a.safetensors": 2000}
    carry_out(plan._replace(mode=fault_plans.MODES[0], sizes=sizes, faults={0: Corrupted(at)}))


@pytest.mark.parametrize("at", [1, 7, 8, 9], ids=["length", "huge", "no JSON", "no name"])
@pytest.mark.parametrize("mode", UNLISTED, ids=str)
def test_a_flipped_bit_that_breaks_a_header_is_mended(at: int, mode: fault_plans.Mode):
    plan = fault_plans.draw(0)
    sizes = {"a.safetensors": 2000}
    plan = plan._replace(mode=mode, sizes=sizes, faults={0: Corrupted(at)})
    assert carry_out(plan) is None


def test_by_digest_a_safetensors_file_may_be_longer_than_the_first_get():
    plan = fault_plans.draw(0)
    sizes = {"a.safetensors": 3 << 20, "config.json": 100}
    carry_out(plan._replace(mode=fault_plans.Mode("digest"), sizes=sizes, faults={}))


def shapes() -> Iterator[str]:
    """Yield what the plans are made of."""
    for seed in range(SHARDS * PLANS_PER_SHARD):
        plan = fault_plans.draw(seed)
        yield from (plan.segments, str(plan.tls), str(plan.mode))
        yield from {type(fault).__name__ for fault in plan.faults.values()}


def test_the_plans_cover_every_fault_back_end_and_check():
    drawn = list(shapes())
    assert min(drawn.count(shape) for shape in set(drawn)) >= 30
    assert len(set(drawn)) == 3 + 2 + len(set(fault_plans.MODES)) + len(get_args(Fault))
