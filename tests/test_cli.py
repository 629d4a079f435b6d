import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from ltx_titan import __version__
from ltx_titan.cli import COMMANDS, main
from ltx_titan.common.options import Flag, Group, Overrides, Positional, Repeated, alias, parse_options
from tests.media.clips import write_clip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other slow down tests that run in parallel."""
    torch.set_num_threads(1)


def test_help_lists_every_command_without_loading_torch():
    script = "import sys; from ltx_titan.cli import main\n"
    script += "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stdout.splitlines()[-1] == "False"


def test_help_of_light_commands_does_not_load_torch():
    commands = ["train", "init", "doctor", "push", "lora merge", "lora convert"]
    script = "import sys; from ltx_titan.cli import main\n"
    script += f"for command in {commands}:\n    try: main([*command.split(), '--help'])\n    except SystemExit: pass\n"
    script += "    assert not {'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules), command"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: ltx-titan {command}" in done.stdout for command in commands)


def test_the_launcher_explains_itself_at_once(tmp_path):
    # Without a Python, so before packages are looked for.
    script = Path(__file__).parents[1] / "run_train.sh"
    done = subprocess.run(
        [script, "--help"], env={"PATH": "/usr/bin:/bin", "PYTHON": "none"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "./run_train.sh [job.toml]" in done.stdout
    assert "MASTER_ADDR" in done.stdout


def test_a_job_with_an_error_starts_no_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ltx_titan.launch.launch", lambda arguments: pytest.fail(f"launched {arguments}"))
    (tmp_path / "job.toml").write_text("[training]\nstep = 3\n")
    assert main(["train", str(tmp_path / "job.toml")]) == 1
    error = capsys.readouterr().err
    assert "training.step" in error
    assert "Traceback" not in error
    assert "[rank" not in error


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_options_and_values(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("process-dataset", "--resolution-buckets", "lora", "resize", "--strength", "bench", "kohya"):
        assert word in script, word


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"ltx-titan {command}" in capsys.readouterr().out.partition("usage:")[2].partition("\n")[2]


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ltx-titan {__version__}\n"


@pytest.mark.parametrize("arguments", [["make-nanno"], ["bench", "kernel"], ["bench"], []])
def test_unknown_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "<command>" in capsys.readouterr().err


@dataclass(frozen=True)
class Size:
    """Size of the output."""

    width: int = 8
    """Pixels."""


@dataclass(frozen=True)
class Example:
    """One option of each form."""

    source: Positional[Path]
    """Input file."""

    size: Group[Size] = Size()

    output: Annotated[Path | None, alias("-o")] = None
    """Output file."""

    kind: Literal["edges", "blur"] = "edges"
    """Filter."""

    tokens: tuple[int, ...] = (1, 2)
    """Token counts."""

    prompt: Repeated[str] = ()
    """Text."""

    dry_run: Flag = False
    """Only list."""

    tiling: bool = True
    """Work in tiles."""

    overrides: Overrides = ()


def parse(*arguments):
    return parse_options(Example, arguments, prog="example", description="Example.")


def test_options_become_a_command_line():
    assert parse("a.mp4") == Example(Path("a.mp4"))
    parsed = parse(
        "a", "-o", "b", "--kind", "blur", "--tokens", "3", "4", "--dry-run", "--prompt", "x", "--prompt", "y"
    )
    assert parsed == Example(Path("a"), Size(), Path("b"), "blur", (3, 4), ("x", "y"), True)
    assert parse("a", "--no-tiling", "--width", "16") == Example(Path("a"), Size(16), tiling=False)


def test_overrides_of_a_job_are_kept_apart_from_options():
    parsed = parse("job.toml", "--video.latents_dir=a b.c", "--output=x.toml", "--kernels.enable")
    assert parsed.overrides == ("--video.latents_dir=a b.c", "--kernels.enable")
    assert parsed.output == Path("x.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SOURCE"),
        (["a", "--kind", "depth"], "invalid choice 'depth'"),
        (["a", "--width", "wide"], "--width"),
        (["a", "--overwrite"], "--overwrite"),
        (["a", "--no-dry-run"], "--no-dry-run"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("example: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_states_every_option(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("SOURCE", "Input file.", "--kind", "{edges,blur}", "-o", "--no-tiling"))
    assert "--overrides" not in printed


def test_exit_status_says_whether_anything_was_prepared(tmp_path, capsys):
    assert main(["make-nano", str(tmp_path / "nano"), "--seed", "3"]) == 0
    rows = tmp_path / "dataset.json"
    command = ["process-dataset", str(rows), "--resolution-buckets", "64x32x9", "--device", "cpu"]
    command += ["--model-path", str(tmp_path / "nano" / "ltx-2.3-nano.safetensors")]
    command += ["--text-encoder-path", str(tmp_path / "nano" / "text_encoder")]
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    rows.write_text(json.dumps([{"video": "bad.mp4", "caption": "x"}]))
    assert main(command) == 1
    assert "bad.mp4" in capsys.readouterr().out
    write_clip(tmp_path / "good.mp4", frames=9)
    rows.write_text(json.dumps([{"video": "bad.mp4", "caption": "x"}, {"video": "good.mp4", "caption": "y"}]))
    assert main(command) == 0
    assert (tmp_path / ".precomputed" / "latents" / "good.pt").is_file()


def test_user_errors_are_one_line(tmp_path, capsys):
    command = ["process-dataset", str(tmp_path / "none.csv"), "--model-path", "m", "--text-encoder-path", "t"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "none.csv: no such file" in error
    assert "Traceback" not in error
