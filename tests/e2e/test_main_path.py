"""From a store to tensors in workers: what arrives is what was stored, each byte fetched once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors import safe_open

import cached
from bench import gpt2
from tests.e2e.served import MIB

if TYPE_CHECKING:
    from bench.seaweed import Seaweed
    from tests.e2e.conftest import Daemons

TOKENS = b"Where are the weights?"


def assert_equal(model: cached.Model, source: Path) -> None:
    """Check names, dtypes, shapes and bytes of all tensors."""
    expected = gpt2.load_files(source)
    assert set(model) == set(expected)
    for name, tensor in expected.items():
        assert model[name].dtype == tensor.dtype
        assert model[name].shape == tensor.shape
        assert model[name].tobytes() == tensor.tobytes()


def contents(directory: Path) -> dict[str, bytes]:
    """Return the files below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def upload(store: Seaweed, bucket: str, prefix: str, source: Path) -> None:
    client = store.client()
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=bucket)
    for path in source.rglob("*"):
        if path.is_file():
            key = prefix + path.relative_to(source).as_posix()
            client.upload_file(str(path), bucket, key)


def test_a_local_model_is_served_as_its_files_say(daemon: Daemons, tiny: Path):
    daemon({"llm": f"file://{tiny}/"})
    with cached.open("llm", timeout_s=15) as model:
        assert_equal(model, tiny)
        assert contents(Path(model.path)) == contents(tiny)
        assert not model.is_stale


def test_of_a_complete_model_no_byte_is_only_promised(daemon: Daemons, tiny: Path):
    served = daemon({"llm": f"file://{tiny}/"})
    assert served.run("prefetch", "llm").returncode == 0
    memory = served.status()["memory"]
    pages = [-(-len(data) // 4096) * 4096 for data in contents(tiny).values()]
    assert (memory["reserved_bytes"], memory["committed_bytes"]) == (0, sum(pages))
    assert sum(map(len, contents(tiny).values())) < sum(pages), "or it shows nothing"


def test_a_worker_computes_with_the_mapping_what_it_would_with_the_files(
    daemon: Daemons, tiny: Path
):
    daemon({"llm": f"file://{tiny}/"})
    expected = gpt2.logits(gpt2.load_files(tiny), gpt2.TINY, TOKENS)
    with cached.open("llm", timeout_s=15) as model:
        logits = gpt2.logits(dict(model.items()), gpt2.TINY, TOKENS)
    assert np.array_equal(logits, expected)


def test_a_view_outlives_the_block_that_opened_its_model(daemon: Daemons, tiny: Path):
    daemon({"llm": f"file://{tiny}/"})
    with cached.open("llm", timeout_s=15) as model:
        view = model["wte.weight"]
    assert view.tobytes() == gpt2.load_files(tiny)["wte.weight"].tobytes()
    assert not view.flags.writeable


def test_a_model_is_evicted_when_nobody_holds_it_and_comes_back_when_it_is_asked_for(
    daemon: Daemons, tiny: Path
):
    served = daemon({"llm": f"file://{tiny}/"})
    with cached.open("llm", timeout_s=15) as model:
        assert Path(model.path).is_dir()
        refused = served.run("evict", "llm")
        assert refused.returncode != 0
        assert "lease" in refused.stderr
    assert served.run("evict", "llm").returncode == 0
    served.wait_for_state("llm", "absent")
    assert served.left_files() == []
    with cached.open("llm", timeout_s=15) as model:
        assert_equal(model, tiny)


@pytest.mark.slow
def test_a_model_goes_from_s3_to_tensors(daemon: Daemons, seaweed: Seaweed, tiny: Path):
    upload(seaweed, "main-path", "tiny/", tiny)
    served = daemon({"llm": "s3://main-path/tiny/"}, more=seaweed.environment())
    assert served.run("prefetch", "llm").returncode == 0
    assert served.run("wait", "llm", "--until", "ready", "--timeout", "30s").returncode == 0
    path = Path(served.run("path", "llm").stdout.strip())
    assert contents(path) == contents(tiny)
    with cached.open("llm", timeout_s=15) as model:
        assert_equal(model, tiny)
        assert Path(model.path) == path


@pytest.mark.slow
def test_a_prefix_holds_any_files_below_it_and_a_uri_may_name_one_object(
    daemon: Daemons, seaweed: Seaweed, tiny: Path, tmp_path: Path
):
    names = ("onnx/model.bin", "a b+c/ü.txt", "zero.bin", "notes.safetensors.md")
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name == "zero.bin" else bytes([number]) * 100_000)
    upload(seaweed, "any-files", "deep/er/", tmp_path)
    shard = min(tiny.glob("*.safetensors"))
    seaweed.client().upload_file(str(shard), "any-files", "one/clip.safetensors")
    served = daemon(
        {"many": "s3://any-files/deep/er/", "one": "s3://any-files/one/clip.safetensors"},
        more=seaweed.environment(),
    )
    many, one = (Path(served.run("path", name).stdout.strip()) for name in ("many", "one"))
    assert contents(many) == contents(tmp_path)
    assert contents(one) == {"clip.safetensors": shard.read_bytes()}


@pytest.mark.slow
def test_a_large_object_that_was_uploaded_in_parts_arrives_whole(
    daemon: Daemons, seaweed: Seaweed, tmp_path: Path
):
    content = np.random.default_rng(1).bytes(40 * MIB + 1)
    (tmp_path / "weights.bin").write_bytes(content)
    upload(seaweed, "in-parts", "m/", tmp_path)  # boto3: parts of 8 MiB, an ETag with a dash
    served = daemon({"m": "s3://in-parts/m/"}, more=seaweed.environment())
    path = Path(served.run("path", "m").stdout.strip())
    assert (path / "weights.bin").read_bytes() == content


@pytest.mark.slow
def test_safetensors_opens_a_shard_by_path(daemon: Daemons, seaweed: Seaweed, tiny: Path):
    upload(seaweed, "by-path", "tiny/", tiny)
    daemon({"llm": "s3://by-path/tiny/"}, more=seaweed.environment())
    expected = gpt2.load_files(tiny)
    with cached.open("llm", timeout_s=15) as model:
        for shard in sorted(Path(model.path).glob("*.safetensors")):
            with safe_open(shard, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
                    assert opened.get_tensor(name).tobytes() == expected.pop(name).tobytes()
    assert expected == {}


@pytest.mark.slow
def test_transformers_loads_a_model_by_path(daemon: Daemons, tiny: Path):
    reason = "NO TEST WITH TRANSFORMERS: it is not installed, nor is it part of make setup"
    transformers = pytest.importorskip("transformers", reason=reason)
    torch = pytest.importorskip("torch", reason=reason)
    daemon({"llm": f"file://{tiny}/"})
    with cached.open("llm", timeout_s=15) as model:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
    tokens = tokenizer(TOKENS.decode())["input_ids"]
    with torch.no_grad():
        logits = loaded(torch.tensor([tokens])).logits[0].numpy()
    expected = gpt2.logits(gpt2.load_files(tiny), gpt2.TINY, tokens)
    assert np.allclose(logits, expected, atol=1e-4)
