"""Malformed checkpoints and adapters: headers, configs of wrong types, damaged data, other trainers' files."""
# ruff: noqa: E501  (one row a line)

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_titan.weights import read_metadata
from tests.jobs import write_job
from tests.malformed import check, refuse_to_train, rows

__all__ = ["refuse_to_train"]

Header = dict[str, Any]


@pytest.fixture(scope="module")
def nano_parts(nano_path) -> tuple[Header, bytes]:
    """Header and data of the nano checkpoint."""
    content = nano_path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def file_of(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header, however malformed."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def first_tensor(header: Header) -> str:
    """The tensor whose data comes first."""
    return min((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])


def with_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Header], None]:
    """A change of the config object in the metadata."""

    def apply(header: Header) -> None:
        config = json.loads(header["__metadata__"]["config"])
        change(config)
        header["__metadata__"]["config"] = json.dumps(config)

    return apply


def setting(path: str, value: Any) -> Callable[[Header], None]:
    """Sets one value of the config by dotted path."""

    def change(config: dict[str, Any]) -> None:
        *parts, last = path.split(".")
        for part in parts:
            config = config[part]
        config[last] = value

    return with_config(change)


def entry(**values: Any) -> Callable[[Header], None]:
    """Replaces values of the first tensor's header entry; None removes one."""

    def change(header: Header) -> None:
        found = header[first_tensor(header)]
        found.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del found[key]

    return change


def replaced(value: Any) -> Callable[[Header], None]:
    """Replaces the whole entry of the first tensor."""
    return lambda header: header.update({first_tensor(header): value})


def metadata(value: Any) -> Callable[[Header], None]:
    """Replaces `__metadata__`."""
    return lambda header: header.update({"__metadata__": value})


def renamed(old: str, new: str) -> Callable[[Header], None]:
    """Renames tensors by a part of their name."""

    def change(header: Header) -> None:
        for name in list(header):
            if old in name:
                header[name.replace(old, new)] = header.pop(name)

    return change


def dropped(part: str) -> Callable[[Header], None]:
    """Moves the space of the tensors with this part in their name to a tensor of another name."""
    return renamed(part, "nonsense.")


T = "config.transformer."
HEADERS = rows(
    ("dtype is a number", entry(dtype=5), ("dtype = 5", "expected")),
    ("dtype unknown", entry(dtype="F31"), ("dtype", "F31", "expected one of")),
    ("dtype missing", entry(dtype=None), ("dtype", "expected")),
    ("dtype of another size", entry(dtype="F64"), ("needs", "the header has")),
    ("shape is text", entry(shape="4,4"), ("shape", "4,4", "expected a list")),
    ("shape is a number", entry(shape=4), ("shape = 4", "expected a list")),
    ("shape of text", entry(shape=["4", "4"]), ("shape.0", "expected an integer")),
    ("shape of floats", entry(shape=[4.5]), ("shape.0", "expected an integer")),
    ("shape negative", entry(shape=[-4, -4]), ("shape.0", "expected")),
    ("shape huge", entry(shape=[2**62, 2**62]), ("needs", "the header has")),
    ("shape beyond 64 bits", entry(shape=[10**30]), ("shape.0", "expected")),
    ("shape null", replaced({"dtype": "F32", "shape": None, "data_offsets": [0, 4]}), ("shape", "expected a list")),
    ("shape nested", entry(shape=[[4], 4]), ("shape.0", "expected an integer")),
    ("offsets missing", entry(data_offsets=None), ("data_offsets", "expected")),
    ("offsets of one", entry(data_offsets=[0]), ("data_offsets", "expected")),
    ("offsets of three", entry(data_offsets=[0, 1, 2]), ("data_offsets", "expected")),
    ("offsets of text", entry(data_offsets=["0", "64"]), ("data_offsets.0", "expected an integer")),
    ("offsets negative", entry(data_offsets=[-64, 0]), ("data_offsets.0", "expected")),
    ("offsets swapped", lambda h: h[first_tensor(h)]["data_offsets"].reverse(), ("needs", "the header has")),
    ("offsets are an object", entry(data_offsets={"start": 0}), ("data_offsets", "expected a list")),
    ("offsets overlap", lambda h: h.update(copy=dict(h[first_tensor(h)])), ("data_offsets", "expected it to start")),
    ("offsets leave a gap", lambda h: h.pop(first_tensor(h)), ("data_offsets", "expected it to start at 0")),
    (
        "offsets beyond the file",
        lambda h: h.update(more={"dtype": "U8", "shape": [10**6], "data_offsets": [end(h), end(h) + 10**6]}),
        ("cut short", "expected"),
    ),
    ("data behind the tensors", lambda h: h.pop(last_tensor(h)), ("longer than its tensors", "expected")),
    ("entry is a list", replaced([1, 2]), ("header.", "expected a table")),
    ("entry is text", replaced("F32"), ("header.", "expected a table")),
    ("entry is null", replaced(None), ("header.", "expected a table")),
    ("metadata is a list", metadata(["config"]), ("__metadata__", "expected a table")),
    ("metadata is text", metadata("config"), ("__metadata__", "expected a table")),
    ("metadata is a number", metadata(5), ("__metadata__ = 5", "expected a table")),
    ("metadata is null", metadata(None), ("__metadata__", "expected a table")),
    (
        "metadata values are objects",
        metadata({"config": {"transformer": {}}}),
        ("__metadata__.config", "expected a string"),
    ),
    ("metadata values are numbers", metadata({"config": 5}), ("__metadata__.config", "expected a string")),
    ("no metadata", lambda h: h.pop("__metadata__"), ("config.transformer", "without the official metadata")),
    ("metadata without config", metadata({"format": "pt"}), ("config.transformer", "without the official metadata")),
    ("config is not JSON", metadata({"config": "{transformer"}), ("'config' is not JSON",)),
    ("config is empty", metadata({"config": ""}), ("'config' is not JSON",)),
    ("config is a list", metadata({"config": "[]"}), ("'config' is list", "expected an object")),
    ("config is a number", metadata({"config": "5"}), ("'config' is int", "expected an object")),
    ("config is null", metadata({"config": "null"}), ("'config' is NoneType", "expected an object")),
    ("config nested deep", metadata({"config": "[" * 10**5}), ("'config' is not JSON",)),
    ("config without transformer", with_config(lambda c: c.pop("transformer")), ("config.transformer", "official")),
    ("transformer is a list", setting("transformer", []), ("config.transformer", "expected a table")),
    ("transformer is text", setting("transformer", "AVTransformer3DModel"), ("config.transformer", "expected a table")),
    ("transformer is a number", setting("transformer", 5), ("config.transformer = 5", "expected a table")),
    ("transformer is empty", setting("transformer", {}), ("config.transformer", "official")),
    ("num_layers text", setting("transformer.num_layers", "2"), (T + "num_layers", "expected an integer")),
    ("num_layers null", setting("transformer.num_layers", None), (T + "num_layers", "expected an integer")),
    ("num_layers float", setting("transformer.num_layers", 2.5), (T + "num_layers", "expected")),
    ("num_layers 0", setting("transformer.num_layers", 0), (T + "num_layers = 0", "expected")),
    ("num_layers negative", setting("transformer.num_layers", -1), (T + "num_layers = -1", "expected")),
    ("num_layers list", setting("transformer.num_layers", [2]), (T + "num_layers", "expected an integer")),
    ("num_layers 100000", setting("transformer.num_layers", 100_000), (T + "num_layers = 100000", "expected")),
    (
        "num_layers of another model",
        setting("transformer.num_layers", 999),
        (T + "num_layers = 999", "blocks in the file"),
    ),
    (
        "heads text",
        setting("transformer.num_attention_heads", "four"),
        (T + "num_attention_heads", "expected an integer"),
    ),
    ("heads 0", setting("transformer.num_attention_heads", 0), (T + "num_attention_heads", "expected")),
    ("heads of another model", setting("transformer.num_attention_heads", 3), ("num_attention_heads", "differ")),
    (
        "audio heads text",
        setting("transformer.audio_num_attention_heads", "4"),
        (T + "audio_num_attention_heads", "expected an integer"),
    ),
    (
        "head_dim of another model",
        setting("transformer.attention_head_dim", 64),
        ("does not fit", "with another shape"),
    ),
    (
        "head_dim bool",
        setting("transformer.attention_head_dim", True),
        (T + "attention_head_dim", "expected an integer"),
    ),
    ("in_channels huge", setting("transformer.in_channels", 10**18), (T + "in_channels", "expected")),
    ("in_channels of another model", setting("transformer.in_channels", 64), ("does not fit", "with another shape")),
    (
        "cross_attention_dim object",
        setting("transformer.cross_attention_dim", {}),
        (T + "cross_attention_dim", "expected an integer"),
    ),
    (
        "caption_channels text",
        setting("transformer.caption_channels", "3840"),
        (T + "caption_channels", "expected an integer"),
    ),
    ("theta 0", setting("transformer.positional_embedding_theta", 0), (T + "positional_embedding_theta", "expected")),
    (
        "theta negative",
        setting("transformer.positional_embedding_theta", -1.0),
        (T + "positional_embedding_theta", "expected"),
    ),
    (
        "theta text",
        setting("transformer.positional_embedding_theta", "1e4"),
        (T + "positional_embedding_theta", "expected a number"),
    ),
    (
        "theta NaN",
        setting("transformer.positional_embedding_theta", float("nan")),
        (T + "positional_embedding_theta", "expected"),
    ),
    (
        "theta infinite",
        setting("transformer.positional_embedding_theta", float("inf")),
        (T + "positional_embedding_theta", "expected"),
    ),
    ("norm_eps 0", setting("transformer.norm_eps", 0), (T + "norm_eps", "expected")),
    ("norm_eps text", setting("transformer.norm_eps", "small"), (T + "norm_eps", "expected a number")),
    (
        "max_pos is a number",
        setting("transformer.positional_embedding_max_pos", 20),
        (T + "positional_embedding_max_pos", "expected a list"),
    ),
    (
        "max_pos of two",
        setting("transformer.positional_embedding_max_pos", [20, 2048]),
        (T + "positional_embedding_max_pos", "expected"),
    ),
    (
        "max_pos of 0",
        setting("transformer.positional_embedding_max_pos", [0, 0, 0]),
        (T + "positional_embedding_max_pos.0", "expected"),
    ),
    (
        "audio max_pos of text",
        setting("transformer.audio_positional_embedding_max_pos", ["20"]),
        (T + "audio_positional_embedding_max_pos.0", "expected a number"),
    ),
    ("rope_type number", setting("transformer.rope_type", 1), (T + "rope_type", "expected a string")),
    ("rope_type unknown", setting("transformer.rope_type", "spiral"), (T + "rope_type", "split", "spiral")),
    (
        "timestep scale 0",
        setting("transformer.timestep_scale_multiplier", 0),
        (T + "timestep_scale_multiplier", "expected"),
    ),
    (
        "timestep scale list",
        setting("transformer.timestep_scale_multiplier", [1000]),
        (T + "timestep_scale_multiplier", "expected a number"),
    ),
    (
        "gated text",
        setting("transformer.apply_gated_attention", "true"),
        (T + "apply_gated_attention", "expected true or false"),
    ),
    (
        "gated number",
        setting("transformer.apply_gated_attention", 1),
        (T + "apply_gated_attention", "expected true or false"),
    ),
    (
        "gated of another model",
        setting("transformer.apply_gated_attention", False),
        ("does not fit", "in the file, but not in the model"),
    ),
    (
        "adaln null",
        setting("transformer.cross_attention_adaln", None),
        (T + "cross_attention_adaln", "expected true or false"),
    ),
    (
        "caption keys contradict",
        setting("transformer.caption_proj_input_norm", True),
        ("caption projection keys",),
    ),
    (
        "caption key text",
        setting("transformer.caption_proj_before_connector", "yes"),
        (T + "caption_proj_before_connector", "expected true or false"),
    ),
    (
        "activation of another family",
        setting("transformer.activation_fn", "relu"),
        (T + "activation_fn", "gelu-approximate", "relu"),
    ),
    ("qk_norm of another family", setting("transformer.qk_norm", ["rms"]), (T + "qk_norm", "rms_norm")),
    ("dropout text", setting("transformer.dropout", "0"), (T + "dropout", "expected 0.0")),
    (
        "connector layers text",
        setting("transformer.connector_num_layers", "two"),
        (T + "connector_num_layers", "expected an integer"),
    ),
    (
        "connector layers of another model",
        setting("transformer.connector_num_layers", 7),
        ("text connectors", "missing from the file"),
    ),
    (
        "registers 0",
        setting("transformer.connector_num_learnable_registers", 0),
        (T + "connector_num_learnable_registers", "expected"),
    ),
    (
        "registers text",
        setting("transformer.connector_num_learnable_registers", "128"),
        (T + "connector_num_learnable_registers", "expected an integer"),
    ),
    (
        "connector heads list",
        setting("transformer.connector_num_attention_heads", [4]),
        (T + "connector_num_attention_heads", "expected an integer"),
    ),
    (
        "connector max_pos number",
        setting("transformer.connector_positional_embedding_max_pos", 4096),
        (T + "connector_positional_embedding_max_pos", "expected a list"),
    ),
    ("vae is text", setting("vae", "vae"), ("config.vae", "expected a table")),
    ("vae is a list", setting("vae", [1]), ("config.vae", "expected a table")),
    ("vae blocks are text", setting("vae.encoder_blocks", "res_x"), ("config.vae.encoder_blocks", "expected a list")),
    (
        "vae blocks of text",
        setting("vae.encoder_blocks", ["res_x"]),
        ("config.vae.encoder_blocks.0", "expected a list"),
    ),
    ("vae blocks of one", setting("vae.encoder_blocks", [["res_x"]]), ("config.vae.encoder_blocks.0", "expected")),
    (
        "vae block kind is a number",
        setting("vae.encoder_blocks", [[1, {}]]),
        ("config.vae.encoder_blocks.0", "expected"),
    ),
    ("vae patch text", setting("vae.patch_size", "four"), ("config.vae.patch_size", "expected an integer")),
    ("vae patch 0", setting("vae.patch_size", 0), ("config.vae.patch_size = 0", "expected")),
    ("audio vae is a list", setting("audio_vae", []), ("config.audio_vae", "expected a table")),
    ("audio vae model is text", setting("audio_vae.model", "x"), ("config.audio_vae.model", "expected a table")),
    (
        "audio vae channels text",
        setting("audio_vae.model.params.ddconfig.ch", "x"),
        ("config.audio_vae.model.params.ddconfig.ch", "expected an integer"),
    ),
    (
        "audio vae rate 0",
        setting("audio_vae.model.params.sampling_rate", 0),
        ("config.audio_vae.model.params.sampling_rate", "expected"),
    ),
    ("vocoder is text", setting("vocoder", "x"), ("config.vocoder", "expected a table")),
    (
        "tensor missing",
        dropped("model.diffusion_model.patchify_proj.weight"),
        ("1 missing from the file", "patchify_proj.weight"),
    ),
    (
        "tensor unexpected",
        renamed("patchify_proj.weight", "patchify_proj.extra"),
        ("in the file, but not in the model", "patchify_proj.extra"),
    ),
    ("no transformer tensors", renamed("model.diffusion_model.", "model.other."), ("missing from the file",)),
    ("names of another trainer", renamed("model.diffusion_model.", ""), ("missing from the file",)),
)


def end(header: Header) -> int:
    """End of the data."""
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


def last_tensor(header: Header) -> str:
    """The tensor whose data comes last."""
    return max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])


@pytest.mark.parametrize("row", HEADERS)
def test_a_malformed_header_or_config_is_refused_by_key(
    row, tmp_path, nano_path, data_root, nano_parts, runner, refuse_to_train
):
    header, data = json.loads(json.dumps(nano_parts[0])), nano_parts[1]
    row.change(header)
    path = tmp_path / "broken.safetensors"
    path.write_bytes(file_of(json.dumps(header).encode(), data))
    job = write_job(tmp_path, path, data_root)
    check(
        runner.train(job),
        row._replace(parts=("broken.safetensors" if "config" not in row.parts[0] else row.parts[0], *row.parts)),
    )


FILES = rows(
    ("empty", lambda whole: b"", ("not a safetensors file", "0 bytes")),
    ("seven bytes", lambda whole: whole[:7], ("not a safetensors file", "7 bytes")),
    ("length alone", lambda whole: whole[:8], ("cut short", "found 8")),
    ("header cut", lambda whole: whole[:1000], ("cut short", "found 1,000")),
    ("data cut", lambda whole: whole[:-1], ("cut short", "expected")),
    ("data half", lambda whole: whole[: len(whole) // 2], ("cut short", "expected")),
    ("one byte more", lambda whole: whole + b"\0", ("longer than its tensors", "expected")),
    ("zeros", lambda whole: bytes(1000), ("not a safetensors file",)),
    ("ones", lambda whole: b"\xff" * 1000, ("not a safetensors file", "header length")),
    ("text", lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", ("not a safetensors file",)),
    ("a web page", lambda whole: b"<!doctype html><html><body>404</body></html>", ("not a safetensors file",)),
    ("a pickle", lambda whole: b"\x80\x04\x95" + bytes(100), ("not a safetensors file",)),
    ("a zip", lambda whole: b"PK\x03\x04" + bytes(100), ("not a safetensors file",)),
    ("GGUF", lambda whole: b"GGUF" + bytes(100), ("not a safetensors file",)),
    ("header is a list", lambda whole: file_of(b"[]", b""), ("no JSON object",)),
    ("header is a number", lambda whole: file_of(b"5", b""), ("no JSON object",)),
    ("header is null", lambda whole: file_of(b"null", b""), ("no JSON object",)),
    ("header is empty", lambda whole: file_of(b"{}", b""), ("config.transformer", "0 tensors")),
    ("header nested deep", lambda whole: file_of(b'{"a":' * 10**5, b""), ("its header is not JSON",)),
    ("header of latin-1", lambda whole: file_of('{"ä": 1}'.encode("latin-1"), b""), ("its header is not JSON",)),
    (
        "header with one name twice",
        lambda whole: file_of(
            b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
            b"x",
        ),
        ("called 'a'",),
    ),
    ("header longer than the file", lambda whole: file_of(b"{}", b"", 10**6), ("cut short", "1,000,008")),
)


@pytest.mark.parametrize("row", FILES)
def test_a_file_that_is_no_checkpoint_is_refused(row, tmp_path, nano_path, data_root, runner, refuse_to_train):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(row.change(nano_path.read_bytes()))
    check(runner.train(write_job(tmp_path, path, data_root)), row._replace(parts=("broken.safetensors", *row.parts)))


def lora(rank: int = 2, name: str = "diffusion_model.transformer_blocks.{}.attn1.to_q", **more: torch.Tensor):
    """Tensors of an adapter of the nano model's video self-attention queries."""
    width = 128
    tensors = {}
    for block in range(2):
        key = name.format(block)
        tensors[f"{key}.lora_A.weight"] = torch.ones(rank, width)
        tensors[f"{key}.lora_B.weight"] = torch.ones(width, rank)
    return tensors | more


def changed_lora(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Writes the adapter after a change."""

    def write(path: Path) -> None:
        tensors = lora()
        change(tensors)
        save_file(tensors, path)

    return write


FIRST = "diffusion_model.transformer_blocks.0.attn1.to_q"
ADAPTERS = rows(
    ("empty file", lambda path: path.write_bytes(b""), ("not a safetensors file",)),
    ("cut", lambda path: (save_file(lora(), path), path.write_bytes(path.read_bytes()[:-8])), ("cut short",)),
    ("no tensors", lambda path: save_file({}, path), ("expected a LoRA file", "no LoRA weights")),
    (
        "a checkpoint",
        lambda path: save_file({"model.diffusion_model.a.weight": torch.ones(2, 2)}, path),
        ("expected a LoRA file",),
    ),
    (
        "lora_B missing",
        changed_lora(lambda t: t.pop(f"{FIRST}.lora_B.weight")),
        ("without the other of A and B", FIRST),
    ),
    (
        "with DoRA's magnitudes",
        changed_lora(lambda t: t.update({f"{FIRST}.dora_scale": torch.ones(4)})),
        ("other than LoRA weights", "dora_scale", "DoRA", "merge it"),
    ),
    (
        "kohya names",
        changed_lora(lambda t: t.update({"lora_unet_x.lora_down.weight": torch.ones(2, 2)})),
        ("without the other of A and B", "lora_down"),
    ),
    (
        "ranks differ within a layer",
        changed_lora(lambda t: t.update({f"{FIRST}.lora_B.weight": torch.ones(128, 3)})),
        ("rank 2", "damaged"),
    ),
    ("another rank", lambda path: save_file(lora(rank=4), path), ("rank is 4", "lora.rank")),
    (
        "one dimension",
        changed_lora(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(2)})),
        ("other than LoRA weights", FIRST),
    ),
    (
        "three dimensions",
        changed_lora(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(2, 2, 2)})),
        ("other than LoRA weights", FIRST),
    ),
    (
        "another width",
        changed_lora(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(2, 99)})),
        ("another shape", "99"),
    ),
    (
        "a layer of no model",
        changed_lora(
            lambda t: t.update(
                {
                    "diffusion_model.nope.lora_A.weight": torch.ones(2, 4),
                    "diffusion_model.nope.lora_B.weight": torch.ones(4, 2),
                }
            )
        ),
        ("nope", "no adapter in the model"),
    ),
    (
        "a block missing",
        changed_lora(lambda t: [t.pop(key) for key in list(t) if ".1." in key]),
        ("missing from the file", "lora.targets"),
    ),
    ("integers", changed_lora(lambda t: t.update({key: value.int() for key, value in t.items()})), ("I32", "format")),
)


@pytest.mark.parametrize("row", ADAPTERS)
def test_a_malformed_adapter_is_refused(row, tmp_path, nano_path, data_root, runner, refuse_to_train):
    path = tmp_path / "broken.safetensors"
    row.change(path)
    job = write_job(
        tmp_path,
        nano_path,
        data_root,
        model__mode="lora",
        model__adapter_path=str(path),
        lora__rank=2,
        lora__targets=["attn1.to_q"],
    )
    check(runner.train(job), row._replace(parts=("broken.safetensors", *row.parts)))


def poisoned(path: Path, part: str, value: float) -> None:
    """Overwrites the first number of a tensor, and writes the file as other tools do: without a digest."""
    tensors, metadata = load_file(path), read_metadata(path).raw
    tensors[next(name for name in tensors if part in name)].view(-1)[0] = value
    save_file(tensors, path, metadata)


NUMBERS = rows(
    (
        "NaN in the base, full",
        ("full", "transformer_blocks.1.attn1.to_q.weight", float("nan")),
        ("base.safetensors", "NaN or infinity", "attn1.to_q.weight"),
    ),
    (
        "infinity in the base, LoRA",
        ("lora", "transformer_blocks.0.attn1.to_q.weight", float("inf")),
        ("base.safetensors", "NaN or infinity", "attn1.to_q.weight"),
    ),
    ("NaN in the adapter", ("adapter", "lora_A", float("nan")), ("adapter.safetensors", "NaN or infinity", "lora_A")),
    (
        "NaN in a quantized base",
        ("int8", "transformer_blocks.0.attn1.to_q.weight", float("nan")),
        ("base.safetensors", "NaN or infinity", "attn1.to_q.weight"),
    ),
    (
        "NaN in the text connectors",
        ("full", "embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight", float("nan")),
        ("base.safetensors", "NaN or infinity", "attn1.to_q.weight"),
    ),
)


@pytest.mark.parametrize("row", NUMBERS)
def test_weights_that_are_not_finite_are_blamed_on_their_file(row, tmp_path, nano_path, data_root, runner):
    mode, part, value = row.change
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    base.write_bytes(nano_path.read_bytes())
    save_file(lora(), adapter)
    poisoned(adapter if mode == "adapter" else base, part, value)
    settings = {"training__steps": 1}
    if mode != "full":
        settings |= {"model__mode": "lora", "lora__rank": 2, "lora__targets": ["attn1.to_q"]}
    if mode == "adapter":
        settings["model__adapter_path"] = str(adapter)
    if mode == "int8":
        settings["lora__base_dtype"] = "int8"
    check(runner.train(write_job(tmp_path, base, data_root, **settings)), row)
    assert not (tmp_path / "run/checkpoint").exists()
