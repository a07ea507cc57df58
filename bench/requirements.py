"""What a bench needs of the machine; a bench run installs nothing.

``python -m bench.requirements`` says what is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

# Debian keeps servers out of a user's PATH.
SEARCH = (sysconfig.get_path("scripts"), "/usr/sbin", "/usr/local/sbin")


class Need(NamedTuple):
    """Something that has to be installed.

    Attributes:
        name: of the distribution or program.
        module: what to import; None for a program.
    """

    name: str
    module: str | None


NGINX = Need("nginx", None)
SEAWEEDFS = Need("weed", None)
TORCH = Need("torch", "torch")
SAFETENSORS = Need("safetensors", "safetensors")
NUMPY = Need("numpy", "numpy")
PEERS = {
    "aiohttp": Need("aiohttp", "aiohttp"),
    "awscrt": Need("awscrt", "awscrt"),
    "boto3": Need("boto3", "boto3"),
    "obstore": Need("obstore", "obstore"),
    "runai-model-streamer": Need("runai-model-streamer", "runai_model_streamer"),
    "s3torchconnector": Need("s3torchconnector", "s3torchconnector"),
    "s5cmd": Need("s5cmd", "s5cmd"),
    "tensorizer": Need("tensorizer", "tensorizer"),
}
ALL = (NGINX, SEAWEEDFS, TORCH, SAFETENSORS, NUMPY, *PEERS.values())


def program(name: str) -> str | None:
    """Return the path of a program, looked for beside this interpreter first."""
    for directory in SEARCH:
        path = Path(directory, name)
        if path.exists():
            return str(path)
    return shutil.which(name)


def missing(needs: Iterable[Need]) -> list[str]:
    """Return the names of what is not there, in order."""
    return [need.name for need in needs if not _is_there(need)]


def _is_there(need: Need) -> bool:
    if need.module is None:
        return program(need.name) is not None
    return importlib.util.find_spec(need.module) is not None


def insist(needs: Iterable[Need]) -> None:
    """End the process with status 2 and the names, if something is missing."""
    absent = missing(needs)
    if absent:
        print(
            f"bench: MISSING: {', '.join(absent)} (looked with {sys.executable}).\n"
            "bench: a bench run installs nothing; run `make bench-setup`, then this again.",
            file=sys.stderr,
        )
        raise SystemExit(2)


def versions(needs: Iterable[Need]) -> dict[str, str]:
    """Return the versions of the distributions among ``needs``."""
    return {need.name: importlib.metadata.version(need.name) for need in needs if need.module}


if __name__ == "__main__":
    insist(ALL)
