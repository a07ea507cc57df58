"""One worker of the demo: takes a model's weights, runs a forward pass, tells what it took.

It imports what it needs, writes one line of JSON, and waits for a line on its standard input
that holds the time from which to count. Then it works, writes a second line, and keeps the
weights until its standard input ends.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from bench import gpt2

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bench.gpt2 import Array

    Taken = tuple[Mapping[str, Array], Path]
    Take = Callable[[Callable[[], None]], Taken]

PROMPT = b"The weights are already here."
FIRST = "wte.weight"  # what a forward pass reads first: the embedding, a third of the model
OPEN_TIMEOUT_S = 60.0


def main() -> None:
    """Run one worker as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["cached", "boto3", "files"])
    parser.add_argument("model", help="its name, its s3:// URI or its directory")
    parser.add_argument("--into", type=Path, help="where boto3 downloads to")
    arguments = parser.parse_args()
    if arguments.way == "cached":
        take = _from_cached(arguments.model)
    elif arguments.way == "boto3":
        take = _from_boto3(arguments.model, arguments.into)
    else:
        take = _from_files(Path(arguments.model))
    _warm_up()
    _say({})
    began_s = float(sys.stdin.readline())
    _run(take, began_s)


def _warm_up() -> None:
    """Let numpy take the buffers that it keeps, so that they are not counted as weights."""
    shape = gpt2.Shape(layers=1, width=768, heads=12, vocabulary=257, positions=64)
    zeros = {name: np.zeros(dims, np.float32) for name, dims in gpt2.tensor_shapes(shape).items()}
    gpt2.logits(zeros, shape, PROMPT)


def _run(take: Take, began_s: float) -> None:
    seconds = {}

    def lap(name: str) -> None:
        seconds[name] = time.monotonic() - began_s

    weights, directory = take(lambda: lap("first_tensor_s"))
    lap("all_tensors_s")
    logits = gpt2.logits(weights, gpt2.read_shape(directory), PROMPT)
    lap("logits_s")
    digest = hashlib.sha256(logits.tobytes()).hexdigest()
    del logits
    _say({**seconds, "logits_sha256": digest})
    sys.stdin.read()  # the weights are held until then


def _from_cached(name: str) -> Take:
    import cached

    def take(first: Callable[[], None]) -> Taken:
        with cached.open(name, timeout_s=OPEN_TIMEOUT_S) as model:
            tensors = {FIRST: model[FIRST]}
            first()
            tensors |= dict(model.items())
            return tensors, Path(model.path)

    return take


def _from_boto3(uri: str, into: Path) -> Take:
    import boto3

    bucket, prefix = uri.removeprefix("s3://").split("/", 1)
    client = boto3.client("s3")

    def take(first: Callable[[], None]) -> Taken:
        tensors: dict[str, Array] = {}
        for key in _keys(client, bucket, prefix):
            path = into / key.removeprefix(prefix)
            client.download_file(bucket, key, str(path))
            loaded = load_file(path) if path.suffix == ".safetensors" else {}
            tensors |= loaded
            if FIRST in loaded:
                first()
        return tensors, into

    return take


def _keys(client: Any, bucket: str, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [stored["Key"] for page in pages for stored in page["Contents"]]


def _from_files(directory: Path) -> Take:
    def take(first: Callable[[], None]) -> Taken:
        tensors = gpt2.load_files(directory)
        first()
        return tensors, directory

    return take


def _say(content: dict[str, object]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
