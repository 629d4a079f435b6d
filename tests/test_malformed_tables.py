"""Malformed tables, media, options and checkpoints of the commands other than training."""
# ruff: noqa: E501  (one row a line)

import json
import shutil
from pathlib import Path

import pytest

from tests.jobs import write_job
from tests.malformed import check, rows

GOOD = json.dumps({"video": "a.mp4", "caption": "a"})


@pytest.fixture(scope="module")
def clip():
    """A small video."""
    return Path(__file__).parents[1] / "ltx_titan" / "nano" / "clips"


def jsonl(*lines: str) -> dict[str, bytes]:
    """A table of lines."""
    return {"t.jsonl": "\n".join(lines).encode()}


# fmt: off
TABLES = rows(
    ("missing", {}, ("t.jsonl", "no such file")),
    ("empty", jsonl(""), ("t.jsonl", "no rows")),
    ("not JSON", jsonl("{video"), ("t.jsonl", "line 1 is not valid JSON")),
    ("second line not JSON", jsonl(GOOD, "{"), ("row 2", "line 2", "not valid JSON")),
    ("a list per line", jsonl('["a.mp4", "a"]'), ("t.jsonl", "list of objects")),
    ("numbers", jsonl("5"), ("t.jsonl", "expected an object", "a number")),
    ("nested deep", jsonl('{"a":' * 10**5), ("t.jsonl", "line 1 is nested too deeply")),
    ("number of 5000 digits", jsonl('{"video": "a.mp4", "caption": ' + "9" * 5000 + "}"), ("t.jsonl", "line 1 is not valid JSON")),
    ("no caption", jsonl('{"video": "a.mp4"}'), ("t.jsonl", "caption", "--caption-column")),
    ("no media", jsonl('{"caption": "a"}'), ("t.jsonl", "'video'", "'audio'")),
    ("two columns of videos", jsonl('{"video": "a.mp4", "media_path": "b.mp4", "caption": "a"}'), ("t.jsonl", "mean the same", "--video-column")),
    ("latin-1", {"t.jsonl": '{"video": "ä.mp4", "caption": "a"}'.encode("latin-1")}, ("t.jsonl", "UTF-8")),
    ("UTF-16 cut", {"t.jsonl": GOOD.encode("utf-16")[:-1]}, ("t.jsonl", "UTF-16")),
    ("binary", {"t.jsonl": bytes(range(256))}, ("t.jsonl",)),
    ("JSON object", {"t.json": GOOD.encode()}, ("t.json", "list of objects")),
    ("JSON cut", {"t.json": b'[{"video": "a.mp4",'}, ("t.json", "not valid JSON")),
    ("JSON nested deep", {"t.json": b"[" * 10**5}, ("t.json", "nested too deeply")),
    ("csv empty", {"t.csv": b""}, ("t.csv", "no rows")),
    ("csv header alone", {"t.csv": b"video,caption\n"}, ("t.csv", "no rows")),
    ("csv latin-1", {"t.csv": "video,caption\na.mp4,ä\n".encode("latin-1")}, ("t.csv", "UTF-8")),
    ("csv cell of 1 MB", {"t.csv": b"video,caption\na.mp4," + b"x" * 10**6 + b"\n"}, ("t.csv", "not valid CSV")),
    ("csv with NUL", {"t.csv": b"video,caption\na\0.mp4,a\n"}, ("row 1", "NUL byte")),
    ("csv with a comma too many", {"t.csv": b"video,caption\na.mp4,a cat, asleep\n"}, ("row 1", "has 3 cells, expected 2")),
    ("csv without caption", {"t.csv": b"video\na.mp4\n"}, ("t.csv", "caption")),
    ("csv with bars", {"t.csv": b"video|caption\na.mp4|a\n"}, ("t.csv", "column")),
    ("another suffix", {"t.xlsx": b"PK"}, ("t.xlsx", ".xlsx", "expected one of")),
    ("no suffix", {"t": b"video,caption\n"}, ("expected one of",)),
)
# fmt: on

BUCKETS = ("--resolution-buckets", "64x64x9")


@pytest.mark.parametrize("row", TABLES)
def test_a_malformed_table_is_named(row, tmp_path, nano_path, runner):
    for name, content in row.change.items():
        (tmp_path / name).write_bytes(content)
    table = tmp_path / next(iter(row.change), "t.jsonl")
    encoder = nano_path.parent / "text_encoder"
    options = ["--model-path", nano_path, "--text-encoder-path", encoder, *BUCKETS, "--device", "cpu", "--dry-run"]
    check(runner.command("process-dataset", table, *options), row)


ROWS = rows(
    ("video is not there", '{"video": "no.mp4", "caption": "a"}', ("no.mp4",)),
    ("video is a folder", '{"video": ".", "caption": "a"}', ("row 1", "expected a file")),
    ("video is empty", '{"video": "empty.mp4", "caption": "a"}', ("empty.mp4",)),
    ("video is text", '{"video": "text.mp4", "caption": "a"}', ("text.mp4",)),
    ("video is null", '{"video": null, "caption": "a"}', ("row 1", "empty")),
    ("video is a list", '{"video": ["a.mp4"], "caption": "a"}', ("row 1", "text")),
    ("caption is a list", '{"video": "a.mp4", "caption": ["a"]}', ("row 1", "caption", "list")),
    ("caption is an object", '{"video": "a.mp4", "caption": {"en": "a"}}', ("row 1", "caption", "an object")),
    ("caption is a number", '{"video": "a.mp4", "caption": 5}', ("row 1", "caption", "a number")),
    (
        "caption with half a character",
        '{"video": "a.mp4", "caption": "\\ud800"}',
        ("row 1", "caption", "surrogate"),
    ),
    ("video with NUL", '{"video": "a\\u0000.mp4", "caption": "a"}', ("row 1",)),
    (
        "video of 300 letters",
        json.dumps({"video": "x" * 300 + ".mp4", "caption": "a"}),
        ("has 303 bytes, file systems allow 255",),
    ),
    ("video outside", '{"video": "../../etc/passwd", "caption": "a"}', ("passwd",)),
    ("video is a URL", '{"video": "http://127.0.0.1:9/a.mp4", "caption": "a"}', ("a.mp4",)),
    ("video is a playlist", '{"video": "list.m3u8", "caption": "a"}', ("list.m3u8",)),
    ("video is a concat list", '{"video": "concat.mp4", "caption": "a"}', ("concat.mp4",)),
)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_cannot_be_used_is_named_and_nothing_is_written_outside(row, tmp_path, nano_path, runner):
    data = tmp_path / "a/data"
    data.mkdir(parents=True)
    (data / "t.jsonl").write_text(row.change)
    (data / "empty.mp4").write_bytes(b"")
    (data / "text.mp4").write_text("hello" * 100)
    (data / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    (data / "concat.mp4").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    before = sorted(path for path in tmp_path.rglob("*"))
    encoder = nano_path.parent / "text_encoder"
    options = ["--model-path", nano_path, "--text-encoder-path", encoder, *BUCKETS, "--device", "cpu", "--dry-run"]
    check(runner.command("process-dataset", data / "t.jsonl", *options), row)
    assert sorted(path for path in tmp_path.rglob("*")) == before


OPTIONS = rows(
    ("bucket of two", ("--resolution-buckets", "64x64"), ("--resolution-buckets", "WxHxF")),
    ("bucket of text", ("--resolution-buckets", "axbxc"), ("--resolution-buckets", "WxHxF")),
    ("bucket of 0", ("--resolution-buckets", "0x64x9"), ("--resolution-buckets", "WxHxF")),
    ("bucket not of the VAE", ("--resolution-buckets", "65x64x9"), ("--resolution-buckets", "multiple")),
    ("bucket frames not of the VAE", ("--resolution-buckets", "64x64x10"), ("--resolution-buckets", "multiple")),
    ("bucket huge", ("--resolution-buckets", "99999968x64x9"), ("--resolution-buckets", "99999968")),
    ("no bucket", ("--resolution-buckets", ";"), ("--resolution-buckets", "names no bucket")),
    ("fps text", (*BUCKETS, "--fps", "fast"), ("--fps", "fast")),
    ("fps 0", (*BUCKETS, "--fps", "0"), ("--fps", "positive")),
    ("fps infinite", (*BUCKETS, "--fps", "inf"), ("--fps",)),
    ("shard size 0", (*BUCKETS, "--shard-size", "0"), ("--shard-size", "1 or more")),
    ("workers negative", (*BUCKETS, "--num-workers", "-1"), ("--num-workers", "0 or more")),
    ("workers text", (*BUCKETS, "--num-workers", "two"), ("num-workers", "two")),
    ("durations with videos", (*BUCKETS, "--audio-durations", "2.0"), ("--audio-durations",)),
    ("unknown option", (*BUCKETS, "--resolution", "1"), ("--resolution",)),
    ("reshape unknown", (*BUCKETS, "--reshape-mode", "left"), ("reshape-mode", "left")),
    ("reference factor 0", (*BUCKETS, "--reference-downscale-factor", "0"), ("--reference-downscale-factor",)),
    ("device unknown", (*BUCKETS, "--device", "gpu9"), ("--device", "gpu9")),
    ("column missing", (*BUCKETS, "--video-column", "film"), ("film", "--video-column")),
    ("checkpoint missing", (*BUCKETS, "--model-path", "/nope.safetensors"), ("/nope.safetensors", "no such file")),
    ("text encoder missing", (*BUCKETS, "--text-encoder-path", "/nope"), ("/nope", "config.json")),
    ("text encoder is a checkpoint", (*BUCKETS, "--text-encoder-path", "{model}"), ("gemma_config",)),
)


@pytest.mark.parametrize("row", OPTIONS)
def test_a_malformed_option_is_named(row, tmp_path, nano_path, runner):
    (tmp_path / "t.jsonl").write_text(GOOD)
    (tmp_path / "a.mp4").write_bytes(b"")
    defaults = {"--model-path": nano_path, "--text-encoder-path": nano_path.parent / "text_encoder", "--device": "cpu"}
    given = [str(nano_path) if option == "{model}" else option for option in row.change]
    options = [part for name, value in defaults.items() if name not in given for part in (name, value)]
    check(runner.command("process-dataset", tmp_path / "t.jsonl", *options, *given, "--dry-run"), row)


ENCODERS = rows(
    ("config is not JSON", {"config.json": "{"}, ("config.json", "Gemma 3")),
    ("config is empty", {"config.json": ""}, ("config.json", "Gemma 3")),
    ("config is a list", {"config.json": "[]"}, ("config.json",)),
    ("config of another model", {"config.json": '{"model_type": "llama"}'}, ("model_type", "llama")),
    ("config without type", {"config.json": "{}"}, ("config.json",)),
    (
        "config with its own code",
        {
            "config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}',
            "mine.py": "raise SystemExit('owned')",
        },
        ("config.json", "custom code"),
    ),
    (
        "config of wrong types",
        {"config.json": '{"model_type": "gemma3_text", "num_hidden_layers": "two", "hidden_size": []}'},
        ("config.json",),
    ),
)


@pytest.mark.parametrize("row", ENCODERS)
def test_a_malformed_text_encoder_is_named_and_runs_no_code(row, tmp_path, nano_path, runner, monkeypatch):
    folder = tmp_path / "encoder"
    shutil.copytree(nano_path.parent / "text_encoder", folder)
    for name, text in row.change.items():
        (folder / name).write_text(text)
    (tmp_path / "t.jsonl").write_text(GOOD)
    (tmp_path / "a.mp4").write_bytes(b"")
    # An answer to a question would have to come from here.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    options = ["--model-path", nano_path, "--text-encoder-path", folder, "--device", "cpu"]
    check(runner.command("process-dataset", tmp_path / "t.jsonl", *options, *BUCKETS, "--dry-run"), row)


COMMANDS = rows(
    ("export: no checkpoint", ("export", "{tmp}/step-1", "{tmp}/out.safetensors"), ("step-1", "trainer.json")),
    ("export: a file", ("export", "{file}", "{tmp}/out.safetensors"), ("a_file", "trainer.json")),
    (
        "export: trainer.json of another tool",
        ("export", "{foreign}", "{tmp}/out.safetensors"),
        ("foreign", "cannot be used"),
    ),
    ("sample: nothing", ("sample",), ("--model-path",)),
    (
        "sample: no model",
        ("sample", "--model-path", "/nope.safetensors", "--prompt", "a"),
        ("/nope.safetensors", "no such file"),
    ),
    ("sample: job is not TOML", ("sample", "--job", "{file}", "--prompt", "a"), ("a_file", "TOML")),
    ("sample: size", ("sample", "--model-path", "{model}", "--prompt", "a", "--size", "big"), ("--size", "WxHxF")),
    (
        "sample: lora is not there",
        (
            "sample",
            "--model-path",
            "{model}",
            "--prompt",
            "a",
            "--lora",
            "/nope",
            "--size",
            "64x64x9",
            "--stg-blocks",
            "1",
            "--text-encoder-path",
            "/nope-encoder",
        ),
        ("/nope",),
    ),
    (
        "decode: nothing there",
        ("decode-latents", "/nope", "{tmp}/out", "--model-path", "{model}"),
        ("/nope", "no such file or folder"),
    ),
    (
        "decode: empty folder",
        ("decode-latents", "{tmp}/empty", "{tmp}/out", "--model-path", "{model}"),
        ("empty", "no latents"),
    ),
    ("inspect: nothing there", ("inspect", "/nope"), ("/nope",)),
    ("import-config: not YAML", ("import-config", "{yaml}"), ("broken.yaml",)),
    ("import-config: runs no code", ("import-config", "{tag}"), ("tag.yaml",)),
    ("compute-reference: nothing there", ("compute-reference", "/nope"), ("/nope",)),
    ("split-scenes: nothing there", ("split-scenes", "/nope.mp4", "{tmp}/out"), ("/nope.mp4",)),
    (
        "caption: key on the command line",
        ("caption", "{tmp}", "--api-key", "sk-secret-value"),
        ("--api-key", "OPENAI_API_KEY"),
    ),
    (
        "caption: address is none",
        ("caption", "{clips}", "--server", "http://[::1"),
        ("--server", "expected an address"),
    ),
    (
        "caption: address without scheme",
        ("caption", "{clips}", "--server", "localhost:8001"),
        ("--server", "expected an address"),
    ),
    ("caption: extra body is not JSON", ("caption", "{clips}", "--extra-body", "{"), ("--extra-body",)),
    ("estimate: no job", ("estimate", "/nope.toml"), ("/nope.toml",)),
    ("unknown command", ("trian",), ("trian",)),
    ("no command", (), ("command",)),
)


@pytest.mark.parametrize("row", COMMANDS)
def test_a_command_names_what_it_cannot_use(row, tmp_path, nano_path, runner):
    (tmp_path / "empty").mkdir()
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"")
    file = tmp_path / "a_file"
    file.write_text("[broken")
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "tag.yaml").write_text("a: !!python/object/apply:os.mkdir ['owned']")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "trainer.json").write_text("[1, 2]")
    filled = {
        "{tmp}": tmp_path,
        "{file}": file,
        "{foreign}": foreign,
        "{clips}": clips,
        "{model}": nano_path,
        "{yaml}": tmp_path / "broken.yaml",
        "{tag}": tmp_path / "tag.yaml",
    }
    arguments = []
    for argument in row.change:
        for key, value in filled.items():
            argument = argument.replace(key, str(value))
        arguments.append(argument)
    outcome = runner.command(*arguments)
    check(outcome, row)
    assert "sk-secret-value" not in outcome.text
    assert not Path("owned").exists()


def test_a_job_with_secrets_keeps_them_out_of_messages(tmp_path, nano_path, data_root, runner, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijk")
    job = write_job(
        tmp_path, nano_path, data_root, data__root="/nope/hf_abcdefghijk", model__connectors_path="s3://me:pass@host/x"
    )
    outcome = runner.train(job)
    assert outcome.code == 1
    assert "/nope/***" in outcome.text
    assert "s3://***@host/x" in outcome.text
    assert "hf_abcdefghijk" not in outcome.text
    assert "me:pass" not in outcome.text
