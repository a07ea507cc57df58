"""A seeded model in the shape of GPT-2, as the Hugging Face hub lays it out, and its forward pass.

The weights are random, the files are not: names, shapes, dtype, shards, index, configuration and
tokenizer are what ``from_pretrained`` expects. The forward pass is plain numpy: bfloat16 weights
are converted to float32 one tensor at a time, so it reads every byte of a mapping and keeps none.
"""

from __future__ import annotations

import json
import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

END_OF_TEXT = "<|endoftext|>"
EPSILON = 1e-5
DEVIATION = 0.02  # of the weights at GPT-2's own initialisation
STEP = 8192  # rows of the embedding that are converted at once


class Shape(NamedTuple):
    """The sizes of a GPT-2.

    Attributes:
        layers: blocks of attention and MLP.
        width: of the residual stream; a multiple of ``heads``.
        heads: of attention.
        vocabulary: tokens; at least 257: the bytes and the end of a text.
        positions: the longest sequence.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int


SMALL = Shape(layers=12, width=768, heads=12, vocabulary=50257, positions=1024)
TINY = Shape(layers=2, width=32, heads=2, vocabulary=300, positions=64)


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return every tensor's name and shape, in the order in which the forward pass needs them."""
    width = shape.width
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (shape.vocabulary, width),
        "wpe.weight": (shape.positions, width),
    }
    for layer in range(shape.layers):
        prefix = f"h.{layer}"
        shapes |= _norm(f"{prefix}.ln_1", width)
        shapes |= _linear(f"{prefix}.attn.c_attn", width, 3 * width)
        shapes |= _linear(f"{prefix}.attn.c_proj", width, width)
        shapes |= _norm(f"{prefix}.ln_2", width)
        shapes |= _linear(f"{prefix}.mlp.c_fc", width, 4 * width)
        shapes |= _linear(f"{prefix}.mlp.c_proj", 4 * width, width)
    return shapes | _norm("ln_f", width)


def write_model(directory: Path, shape: Shape = SMALL, *, shards: int = 4, seed: int = 0) -> None:
    """Write a model with all its files into an existing directory."""
    names = _cut(tensor_shapes(shape), shards)
    random = np.random.default_rng(seed)
    table = _normal_table()
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(names, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        tensors = {name: _tensor(name, dims, random, table) for name, dims in shard.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors makes it 0600
        weight_map |= dict.fromkeys(shard, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_configuration(directory, shape)
    _write_tokenizer(directory, shape)


def read_shape(directory: Path) -> Shape:
    """Return the sizes that a model's config.json tells."""
    config = json.loads((directory / "config.json").read_text())
    return Shape(
        layers=config["n_layer"],
        width=config["n_embd"],
        heads=config["n_head"],
        vocabulary=config["vocab_size"],
        positions=config["n_positions"],
    )


def load_files(directory: Path) -> dict[str, Array]:
    """Return all tensors of a model's files, copied into this process."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def logits(weights: Mapping[str, Array], shape: Shape, tokens: Sequence[int]) -> Array:
    """Return the float32 logits, (tokens, vocabulary), of one forward pass."""
    x = _f32(weights["wte.weight"][list(tokens)])
    x = x + _f32(weights["wpe.weight"][: len(tokens)])
    for layer in range(shape.layers):
        prefix = f"h.{layer}"
        x = x + _attention(weights, prefix, _normed(weights, f"{prefix}.ln_1", x), shape.heads)
        x = x + _mlp(weights, prefix, _normed(weights, f"{prefix}.ln_2", x))
    x = _normed(weights, "ln_f", x)
    embedding = weights["wte.weight"]
    slices = [slice(at, at + STEP) for at in range(0, shape.vocabulary, STEP)]
    return np.concatenate([x @ _f32(embedding[rows]).T for rows in slices], axis=1)


def _f32(array: Array) -> Array:
    return array.astype(np.float32, copy=False)


def _normed(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    gain, bias = _f32(weights[f"{name}.weight"]), _f32(weights[f"{name}.bias"])
    normed: Array = centred / np.sqrt(variance + np.float32(EPSILON)) * gain + bias
    return normed


def _projected(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    return x @ _f32(weights[f"{name}.weight"]) + _f32(weights[f"{name}.bias"])


def _attention(weights: Mapping[str, Array], prefix: str, x: Array, heads: int) -> Array:
    length, width = x.shape
    mixed = _projected(weights, f"{prefix}.attn.c_attn", x)
    query, key, value = mixed.reshape(length, 3, heads, width // heads).transpose(1, 2, 0, 3)
    scores = query @ key.transpose(0, 2, 1) / np.float32(math.sqrt(width // heads))
    scores = np.where(np.tri(length, dtype=bool), scores, np.float32(-np.inf))
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    joined = (shares @ value).transpose(1, 0, 2).reshape(length, width)
    return _projected(weights, f"{prefix}.attn.c_proj", joined)


def _mlp(weights: Mapping[str, Array], prefix: str, x: Array) -> Array:
    x = _projected(weights, f"{prefix}.mlp.c_fc", x)
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    x = np.float32(0.5) * x * (1 + np.tanh(inner))  # GELU in GPT-2's spelling, gelu_new
    return _projected(weights, f"{prefix}.mlp.c_proj", x)


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}


def _cut(shapes: dict[str, tuple[int, ...]], shards: int) -> list[dict[str, tuple[int, ...]]]:
    """Return the tensors in their order, cut into about equal shards, none of them empty."""
    total = sum(map(math.prod, shapes.values()))
    cut: list[dict[str, tuple[int, ...]]] = [{}]
    before = 0
    for name, dims in shapes.items():
        if cut[-1] and before >= total * len(cut) / shards:
            cut.append({})
        cut[-1][name] = dims
        before += math.prod(dims)
    if len(cut) != shards:
        msg = f"{len(shapes)} tensors cannot be cut into {shards} shards"
        raise ValueError(msg)
    return cut


def _normal_table() -> Array:
    """Return 65,536 quantiles of the normal distribution: drawing from a table is fast."""
    inverse = NormalDist(0.0, DEVIATION).inv_cdf
    return np.array([inverse((i + 0.5) / 65536) for i in range(65536)], dtype=np.float32)


def _tensor(name: str, dims: tuple[int, ...], random: np.random.Generator, table: Array) -> Array:
    mean = 1.0 if ".ln_" in f".{name}" and name.endswith(".weight") else 0.0
    drawn = np.frombuffer(random.bytes(2 * math.prod(dims)), np.uint16)
    values: Array = (table + np.float32(mean)).astype(ml_dtypes.bfloat16)[drawn]
    return values.reshape(dims)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_configuration(directory: Path, shape: Shape) -> None:
    end = shape.vocabulary - 1
    config = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": end,
        "eos_token_id": end,
        "layer_norm_epsilon": EPSILON,
        "model_type": "gpt2",
        "n_ctx": shape.positions,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_layer": shape.layers,
        "n_positions": shape.positions,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})


def _write_tokenizer(directory: Path, shape: Shape) -> None:
    """Write a byte-level tokenizer: a token for each byte, no merges."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    vocabulary[END_OF_TEXT] = shape.vocabulary - 1
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {"id": shape.vocabulary - 1, "content": END_OF_TEXT, "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": bytewise,
        "post_processor": bytewise,
        "decoder": bytewise,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    ends = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")}
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": shape.positions}
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(directory / "tokenizer_config.json", ends | settings)
    _write_json(directory / "special_tokens_map.json", ends)
    _write_json(directory / "vocab.json", vocabulary)
    (directory / "merges.txt").write_text("#version: 0.2\n")


def _byte_symbols() -> list[str]:
    """Return GPT-2's printable character for each byte (openai/gpt-2, encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
