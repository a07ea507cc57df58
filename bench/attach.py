"""Open a resident model: how long until every tensor is a view, beside ``safe_open``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import options, record, requirements, workload
from bench.daemon import Daemon, Settings
from bench.record import Samples
from bench.worker import Worker

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from bench.record import Row
    from bench.workload import Workload

NAME = "attach"
MEMORY_BUDGET = "4GiB"
ROUNDS = 5
WORKLOAD = (
    "A model of one safetensors file (bfloat16 tensors of mixed sizes) is resident in a tmpfs; "
    "300 tensors in 100 MiB, 500 MiB and 2 GiB, and 3,000 tensors in 100 MiB. A warm process "
    "(everything imported, one open before) opens it again and again: from the call to every "
    "tensor as an array. cached: `cached.open` by name, with connecting, to numpy views. "
    "safe_open: `safetensors.safe_open` of the same path with `get_tensor` of all names, to torch "
    "tensors (mapped); safe_open-numpy the same to numpy arrays (copied). The subjects take turns."
)
NEEDS = (requirements.NUMPY, requirements.SAFETENSORS, requirements.TORCH)
CASES: dict[str, Workload] = {
    "open-100MiB": workload.sized("100MiB"),
    "open-500MiB": workload.sized("500MiB"),
    "open-2GiB": workload.sized("2GiB"),
    "open-3000-tensors": workload.sized("100MiB", tensors=3000),
}


class Amount(NamedTuple):
    """How many samples a subject gives in each round."""

    full: int
    quick: int


SUBJECTS = {
    "cached": Amount(40, 10),
    "safe_open": Amount(10, 4),
    "safe_open-numpy": Amount(2, 0),
}


def main(arguments: Sequence[str]) -> None:
    """Measure, print the rows, and write the result."""
    args = options.parser(NAME, "Open a resident model.").parse_args(arguments)
    cases = options.chosen(list(CASES), args.case)
    requirements.insist(NEEDS)
    run = record.Run(
        name=NAME,
        command=options.command(NAME, arguments),
        workload=WORKLOAD,
        quick=args.quick,
        versions=requirements.versions(NEEDS),
    )
    options.finish(run, _measure(cases, args), args.results)


def _measure(cases: Sequence[str], args: argparse.Namespace) -> Iterator[Row]:
    files = {}
    for case in cases:
        options.progress(f"{NAME}: workload {CASES[case].key}")
        files[case] = workload.make(CASES[case], args.cache)
    models = {case: path.as_uri() for case, path in files.items()}
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(Settings(models, MEMORY_BUDGET)))
        workers = _workers(daemon.socket_path, quick=args.quick, stack=stack)
        for case in cases:
            options.progress(f"{NAME}: {case}: loading")
            path = Path(daemon.load(case).path) / files[case].name
            yield from _run_case(case, path, workers, args)


def _workers(socket_path: Path, *, quick: bool, stack: ExitStack) -> dict[str, Worker]:
    workers = {
        name: stack.enter_context(Worker(name, socket_path))
        for name, amount in SUBJECTS.items()
        if amount.full and (amount.quick or not quick)
    }
    for each in workers.values():
        each.receive()
    return workers


def _run_case(
    case: str, path: Path, workers: dict[str, Worker], args: argparse.Namespace
) -> Iterator[Row]:
    taken: dict[str, list[float]] = {name: [] for name in workers}
    rounds = args.rounds or ROUNDS
    for turn in range(rounds):
        options.progress(f"{NAME}: {case} round {turn + 1}/{rounds}")
        for name, worker in workers.items():
            amount = SUBJECTS[name]
            answer = worker.ask(
                op="time",
                place=case if name == "cached" else str(path),
                samples=amount.quick if args.quick else amount.full,
            )
            taken[name] += answer["ms"]
    for name, values in taken.items():
        yield record.row(Samples(case, name, "open_ms", "ms", values))


if __name__ == "__main__":
    main(sys.argv[1:])
