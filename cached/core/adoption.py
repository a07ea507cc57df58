"""What an earlier daemon left in memory: what goes on, and what has to go.

Of each model one version goes on as the one that is offered: the current one, else a complete one,
else one that was being filled, if the model is prefetched. Beside it go on the other complete ones,
as kept, and the newest that was being filled, until the store has said whether it is wanted. All
the rest goes, and counts until the kernel has its memory back: workers of the dead daemon may map
it still.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached.core.digests import has_list
from cached.core.effects import Evicted
from cached.core.integrity import DIGEST, OFF, Integrity
from cached.core.loads import Load
from cached.core.manifest import version_of
from cached.core.objects import FileRef, Manifest
from cached.core.parts import Planner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cached.core.loads import Limits
    from cached.core.objects import Left, ModelRef
    from cached.core.shelf import Shelf

    Inode = tuple[int, int]
    Home = tuple[Load, int]


def adopt(shelf: Shelf, limits: Limits, left: Sequence[Left], now_s: float) -> list[Load]:
    """Return the loads that go on, their bytes counted; have the rest freed.

    Of each model the one to offer comes first, then complete ones, the newest first.

    Args:
        shelf: of an engine that starts.
        limits: what the operator allows.
        left: what was found.
        now_s: monotonic.
    """
    chosen = [_chosen(model.ref, limits, left) for model in shelf.models.values()]
    chosen.sort(key=lambda some: not (some and shelf.models[some[0].of.name].ref.pinned))
    going = [each for each in left if not any(each in some for some in chosen)]
    offered = [each for some in chosen for each in some[:1]]
    beside = [each for some in chosen for each in some[1:]]
    homes: dict[Inode, Home] = {}
    adopted = []
    for each in [*offered, *beside]:
        load = _load(each, limits, now_s, homes)
        load.is_aside = each.is_published and each in beside
        if load.own_bytes() <= shelf.ledger.free_bytes:
            shelf.ledger.reserve(load.of, load.own_bytes())
            for index, spans in enumerate(each.there):
                for span in spans if index not in load.shared else ():
                    shelf.commit(FileRef(load.of, index), span.start, span.stop)
            adopted.append(load)
            if each in offered and each.is_current:
                shelf.models[each.of.name].passed_over = each.passed_over
            for index, inode in enumerate(each.inodes):
                homes.setdefault(inode, (load, index))
        else:
            going.append(each)
    for each in going:  # counted last: what goes on was in memory beside it already
        shelf.ledger.take_over(each.of, each.size_bytes)
    for each in going:
        _retire(shelf, _load(each, limits, now_s, {}))
    return adopted


def _chosen(ref: ModelRef, limits: Limits, left: Sequence[Left]) -> list[Left]:
    """Return the versions of a model that go on: the one to offer, and those beside it."""
    usable = [each for each in left if _is_usable(each, ref, limits)]
    usable.sort(key=lambda each: (each.is_current, each.is_published, each.of.load), reverse=True)
    if not usable or not (usable[0].is_published or ref.prefetch):
        return []
    beside = [each for each in usable[1:] if each.is_published and each.is_trusted]
    half = [each for each in usable[1:] if not each.is_published]
    return [usable[0], *beside, *half[:1]] if usable[0].is_published else usable[:1]


def _is_usable(left: Left, ref: ModelRef, limits: Limits) -> bool:
    return (
        left.of.name == ref.name
        and left.manifest is not None
        and left.manifest.uri == ref.uri
        and _adds_up(left.manifest)
        and (left.is_trusted or limits.verify != OFF)
        and (limits.verify != DIGEST or has_list(left.manifest))
    )


def _adds_up(manifest: Manifest) -> bool:
    """Return whether what was written down of a version is what was listed once."""
    is_named = all(stored.key.endswith(stored.path) for stored in manifest.objects)
    return is_named and version_of(manifest.uri, manifest.objects) == manifest.version


def _load(left: Left, limits: Limits, now_s: float, homes: Mapping[Inode, Home]) -> Load:
    """Return a version as a load; files that lie in an earlier one's home are shared with that."""
    found = {index: homes[inode] for index, inode in enumerate(left.inodes) if inode in homes}
    shared = {index: FileRef(load.of, at) for index, (load, at) in found.items()}
    manifest = left.manifest or Manifest("", left.of.version, ())
    is_checked_first = limits.verify == DIGEST or not left.is_trusted
    planner = Planner(manifest, is_checked_first=is_checked_first)
    checked = {index: load.integrity.checked_by[at] for index, (load, at) in found.items()}
    if left.is_published and left.is_trusted and limits.verify != DIGEST:
        unknown = dict.fromkeys(range(len(manifest.objects)), "")
        checked = unknown | dict(enumerate(left.checked_by))
    integrity = Integrity(
        manifest,
        planner,
        verify=limits.verify,
        can=limits.can_check,
        trusted=left.is_trusted,
        checked=checked,
    )
    return Load(
        left.of, manifest, planner, now_s, integrity=integrity, shared=shared, is_adopted=True
    )


def _retire(shelf: Shelf, load: Load) -> None:
    load.leaving = "left"
    shelf.retired[load.of] = load
    shelf.effects.append(Evicted(load.of, load.leaving, shelf.ledger.size_of(load.of)))
    shelf.free(load)
