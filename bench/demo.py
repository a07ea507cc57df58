"""The demo: a real S3 server, the daemon, four workers, and one short report.

Everything runs on this machine and is gone afterwards. The exit code is 0 if every worker's
logits are the same, bit for bit, as those of the source files; 1 if not or if something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import gpt2
from bench.process import pss_bytes
from bench.seaweed import Seaweed, SeaweedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).parents[1]
TMPFS = Path("/dev/shm")
WORKERS = 4
MIB = 1 << 20
DISK_BYTES = 2048 * MIB  # source, store and four downloads
MEMORY_BYTES = 300 * MIB  # one model
WORKER_TIMEOUT_S = 90.0
DAEMON_TIMEOUT_S = 20.0
BUCKET = "models"
PREFIX = "gpt2/"
URI = f"s3://{BUCKET}/{PREFIX}"
MODEL = "llm"
# numpy with one thread a worker, four workers on few cores; and no pages kept for scratch that was
# freed, else they would be counted as weights (mallopt(3)).
WORKER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}


class DemoError(Exception):
    """Something did not work; the text says what."""


class Figures(NamedTuple):
    """What one way of loading took; seconds from its start to the slowest worker.

    Attributes:
        first_tensor_s: until the tensor that a forward pass reads first.
        all_tensors_s: until every tensor.
        logits_s: until the end of the first forward pass.
        memory_bytes: for the weights of all workers.
    """

    first_tensor_s: float
    all_tensors_s: float
    logits_s: float
    memory_bytes: int


class Run(NamedTuple):
    """One way of loading, as it was measured.

    Attributes:
        figures: what it took.
        logits: the digest of each worker's logits.
    """

    figures: Figures
    logits: list[str]


def main() -> int:
    """Run the demo as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Load a model through cached and through boto3.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    began_s = time.monotonic()
    try:
        with ExitStack() as stack:
            report = _run(stack, lambda text: _progress(began_s, text))
    except KeyboardInterrupt:
        print("demo: interrupted; everything that it started is gone", file=sys.stderr)
        return 130
    except (DemoError, SeaweedError, OSError) as error:
        print(f"demo: failed: {error}", file=sys.stderr)
        return 1
    report["wall_s"] = time.monotonic() - began_s
    print(json.dumps(report, indent=2) if arguments.json else _text(report))
    return 0 if report["logits_equal"] else 1


def _interrupt(signum: int, frame: object) -> None:
    """Unwind, which cleans up; a second signal must not cut that short."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _progress(began_s: float, text: str) -> None:
    print(f"demo: {time.monotonic() - began_s:5.1f} s  {text}", file=sys.stderr, flush=True)


def _run(stack: ExitStack, progress: Callable[[str], None]) -> dict[str, Any]:
    directory = _temporary(stack, None)
    _check_space(directory)
    source = directory / "source"
    source.mkdir()
    progress("making a model in the shape of GPT-2 small: bfloat16, 4 shards, seed 0")
    gpt2.write_model(source)
    progress("starting SeaweedFS, an S3 server")
    store = stack.enter_context(Seaweed())
    size_bytes = sum(path.stat().st_size for path in source.iterdir())
    progress(f"uploading {len(list(source.iterdir()))} files, {size_bytes / MIB:.0f} MiB, by boto3")
    _upload(store, source)
    environment = _environment(store)
    progress("running a forward pass on the source files")
    expected = _from_files(source, environment)
    progress(f"cached: starting the daemon, {WORKERS} workers wait for it")
    ours = _through_cached(directory, environment)
    progress(f"boto3 + safetensors: {WORKERS} workers download the model")
    theirs = _through_boto3(directory, environment)
    progress("cleaning up")
    return {
        "model_bytes": size_bytes,
        "workers": WORKERS,
        "cores": len(os.sched_getaffinity(0)),
        "cached": ours.figures._asdict(),
        "boto3": theirs.figures._asdict(),
        "logits_equal": {*ours.logits, *theirs.logits} == {expected},
    }


def _temporary(stack: ExitStack, parent: Path | None) -> Path:
    directory = Path(tempfile.mkdtemp(prefix="cached-demo-", dir=parent))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _check_space(directory: Path) -> None:
    for path, needed in ((directory, DISK_BYTES), (TMPFS, MEMORY_BYTES)):
        free = shutil.disk_usage(path).free
        if free < needed:
            raise DemoError(
                f"{path} has {free / MIB:.0f} MiB free, the demo needs {needed / MIB:.0f} MiB; "
                "make room, or set TMPDIR (in a container: --shm-size)"
            )


def _upload(store: Seaweed, source: Path) -> None:
    client = store.client()
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(source.iterdir()):
        client.upload_file(str(path), BUCKET, PREFIX + path.name)


def _environment(store: Seaweed) -> dict[str, str]:
    """Return a user's environment: nothing of CACHED_* or AWS_* but what names the store."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "CACHED_"))}
    nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    local = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return kept | nothing | local | store.environment()


def _from_files(source: Path, environment: Mapping[str, str]) -> str:
    with ExitStack() as stack:
        worker = Worker(stack, ["files", str(source)], environment)
        worker.read()
        worker.begin(time.monotonic())
        digest: str = worker.read()["logits_sha256"]
    return digest


def _through_cached(directory: Path, environment: Mapping[str, str]) -> Run:
    with ExitStack() as stack:
        root = _temporary(stack, TMPFS)
        socket = directory / "cached.sock"
        environment = {**environment, "CACHED_SOCKET": str(socket)}
        workers = [Worker(stack, ["cached", MODEL], environment) for _ in range(WORKERS)]
        without_bytes = _ready(workers)
        began_s = time.monotonic()
        daemon = Daemon(stack, directory / "cached.log", root, environment)
        daemon.wait_for(socket)
        said = _work(workers, began_s)
        with_bytes = pss_bytes(daemon.process.pid) + _pss_bytes(workers)
        for worker in workers:
            worker.end()
        daemon.stop()
        if left := [path.name for path in root.rglob("*") if path.is_file()]:
            raise DemoError(f"the daemon ended and left {', '.join(left)}")
    return _summed(said, with_bytes - without_bytes)


def _through_boto3(directory: Path, environment: Mapping[str, str]) -> Run:
    with ExitStack() as stack:
        workers = []
        for _ in range(WORKERS):
            into = _temporary(stack, directory)
            workers.append(Worker(stack, ["boto3", URI, f"--into={into}"], environment))
        without_bytes = _ready(workers)
        said = _work(workers, time.monotonic())
        with_bytes = _pss_bytes(workers)
    return _summed(said, with_bytes - without_bytes)


def _ready(workers: Sequence[Worker]) -> int:
    """Wait until all have started; return their memory, all of them at rest."""
    for worker in workers:
        worker.read()
    return _pss_bytes(workers)


def _work(workers: Sequence[Worker], began_s: float) -> list[dict[str, Any]]:
    for worker in workers:
        worker.begin(began_s)
    return [worker.read() for worker in workers]


def _pss_bytes(workers: Sequence[Worker]) -> int:
    return sum(pss_bytes(worker.process.pid) for worker in workers)


def _summed(said: Sequence[Mapping[str, Any]], memory_bytes: int) -> Run:
    figures = Figures(
        first_tensor_s=max(each["first_tensor_s"] for each in said),
        all_tensors_s=max(each["all_tensors_s"] for each in said),
        logits_s=max(each["logits_s"] for each in said),
        memory_bytes=memory_bytes,
    )
    return Run(figures, [each["logits_sha256"] for each in said])


class Worker:
    """One process of demo_worker.py, killed when the stack unwinds.

    Attributes:
        process: of the worker.
    """

    def __init__(
        self, stack: ExitStack, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.demo_worker", *arguments],
            cwd=ROOT,
            env={**environment, **WORKER_ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C at the terminal is for the demo, which ends them
        )
        stack.callback(_kill, self.process)
        self._name = arguments[0]

    def begin(self, began_s: float) -> None:
        """Let it work; its times count from ``began_s``."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{began_s}\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """Return its next line."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], WORKER_TIMEOUT_S)[0]:
            raise DemoError(f"a worker ({self._name}) said nothing for {WORKER_TIMEOUT_S:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise DemoError(f"a worker ({self._name}) ended with {self.process.wait()}; see above")
        said: dict[str, Any] = json.loads(line)
        return said

    def end(self) -> None:
        """Let go of its weights, and return once it has ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(WORKER_TIMEOUT_S)


class Daemon:
    """``cached serve``, as a user types it; killed when the stack unwinds.

    Attributes:
        process: of the daemon.
    """

    def __init__(
        self, stack: ExitStack, log: Path, root: Path, environment: Mapping[str, str]
    ) -> None:
        self._log = log
        command = [
            str(Path(sysconfig.get_path("scripts"), "cached")),
            "serve",
            f"--model={MODEL}={URI}",
            f"--socket={environment['CACHED_SOCKET']}",
            f"--segment-root={root}",
            "--http-port=0",
            "--purge-on-exit",
        ]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        stack.callback(_kill, self.process)

    def wait_for(self, socket: Path) -> None:
        """Return once workers can connect."""
        deadline_s = time.monotonic() + DAEMON_TIMEOUT_S
        while not socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise DemoError(f"`cached serve` did not start:\n{self._tail()}")
            time.sleep(0.002)

    def stop(self) -> None:
        """End it as a supervisor does, by SIGTERM, and check that it ended well."""
        self.process.terminate()
        try:
            code = self.process.wait(DAEMON_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the daemon ignores SIGTERM:\n{self._tail()}") from None
        if code:
            raise DemoError(f"the daemon ended with {code}:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])


def _kill(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


ROWS = (
    ("first_tensor_s", "time to the first tensor"),
    ("all_tensors_s", "time to all tensors"),
    ("logits_s", "time to the logits of a forward pass"),
    ("memory_bytes", "memory for the weights"),
)
NOTES = """\
Times are of the slowest worker, from the start of the daemon (cached) or of the downloads (boto3:
each worker its own directory, download_file, then safetensors.numpy.load_file); interpreters and
imports of the workers were up before. The first tensor is the embedding, 74 MiB in a shard of its
own. Memory is the PSS of all workers after the forward pass, less what they had before they loaded;
for cached, all of the daemon's is added. What boto3 left on disk is not counted."""


def _text(report: Mapping[str, Any]) -> str:
    head = (
        f"GPT-2 small in bfloat16, {report['model_bytes'] / MIB:.0f} MiB in S3 (SeaweedFS), "
        f"{report['workers']} workers, {report['cores']} cores"
    )
    lines = ["", head, "", f"{'':38}{'cached':>11}{'boto3 + safetensors':>22}"]
    for key, title in ROWS:
        ours, theirs = report["cached"][key], report["boto3"][key]
        lines.append(f"{title:38}{_shown(key, ours):>11}{_shown(key, theirs):>22}")
    lines += ["", NOTES, "", _verdict(report)]
    return "\n".join(lines)


def _shown(key: str, value: float) -> str:
    return f"{value:.2f} s" if key.endswith("_s") else f"{value / MIB:.0f} MiB"


def _verdict(report: Mapping[str, Any]) -> str:
    if report["logits_equal"]:
        return (
            f"Logits: all {2 * report['workers']} workers got those of the source files, "
            f"bit for bit. The demo took {report['wall_s']:.0f} s."
        )
    return "Logits: DIFFERENT from those of the source files: the weights are not the same."


if __name__ == "__main__":
    sys.exit(main())
