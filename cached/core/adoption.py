"""What an earlier daemon left in memory: what goes on, and what has to go.

Of each model at most one version goes on: the current one, else a complete one, else one that was
being filled, if the model is prefetched. All the rest goes, and counts until the kernel has its
memory back: workers of the dead daemon may map it still.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.effects import Evicted
from cached.core.integrity import DIGEST, OFF, Integrity
from cached.core.loads import Load, footprint_bytes
from cached.core.manifest import version_of
from cached.core.objects import Manifest
from cached.core.parts import Planner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cached.core.loads import Limits
    from cached.core.objects import Left, ModelRef
    from cached.core.shelf import Shelf


def adopt(shelf: Shelf, limits: Limits, left: Sequence[Left], now_s: float) -> list[Load]:
    """Return the loads that go on, their bytes counted; have the rest freed.

    Args:
        shelf: of an engine that starts.
        limits: what the operator allows.
        left: what was found.
        now_s: monotonic.
    """
    best = [_best(model.ref, limits, left) for model in shelf.models.values()]
    chosen = [each for some in best for each in some]
    going = [each for each in left if each not in chosen]
    for each in going:
        shelf.ledger.take_over(each.of, each.size_bytes)
    adopted = []
    for each in chosen:
        load = _load(each, limits, now_s)
        if footprint_bytes(load.manifest) <= shelf.ledger.free_bytes:
            shelf.ledger.reserve(load.of, footprint_bytes(load.manifest))
            adopted.append(load)
        else:
            shelf.ledger.take_over(each.of, each.size_bytes)
            going.append(each)
    for each in going:
        _retire(shelf, _load(each, limits, now_s))
    return adopted


def _best(ref: ModelRef, limits: Limits, left: Sequence[Left]) -> list[Left]:
    """Return the version of a model that goes on, if there is one."""
    found = [
        each
        for each in left
        if each.of.name == ref.name
        and each.manifest is not None
        and each.manifest.uri == ref.uri
        and _adds_up(each.manifest)
        and (each.is_published or ref.prefetch)
        and (each.is_trusted or limits.verify != OFF)
    ]
    found.sort(key=lambda each: (each.is_current, each.is_published, each.of.load))
    return found[-1:]


def _adds_up(manifest: Manifest) -> bool:
    """Return whether what was written down of a version is what was listed once."""
    is_named = all(stored.key.endswith(stored.path) for stored in manifest.objects)
    return is_named and version_of(manifest.uri, manifest.objects) == manifest.version


def _load(left: Left, limits: Limits, now_s: float) -> Load:
    manifest = left.manifest or Manifest("", left.of.version, ())
    is_checked_first = limits.verify == DIGEST or not left.is_trusted
    planner = Planner(manifest, is_checked_first=is_checked_first)
    was_checked = left.is_published and left.is_trusted and limits.verify != DIGEST
    integrity = Integrity(
        manifest,
        planner,
        verify=limits.verify,
        can=limits.can_check,
        trusted=left.is_trusted,
        checked=range(len(manifest.objects)) if was_checked else (),
    )
    return Load(left.of, manifest, planner, now_s, integrity=integrity, is_adopted=True)


def _retire(shelf: Shelf, load: Load) -> None:
    load.leaving = "left"
    shelf.retired[load.of] = load
    shelf.effects.append(Evicted(load.of, load.leaving, shelf.ledger.size_of(load.of)))
    shelf.free(load)
