"""`ltx-titan init`: job files from recipes and answers."""

import builtins
import sys

import pytest

from ltx_titan.cli import main
from ltx_titan.commands.init import recipes
from ltx_titan.config import load_job, read_tables


def answers(checkpoint, data, *more):
    return ["--checkpoint", str(checkpoint), "--data", str(data), *map(str, more)]


@pytest.fixture
def no_terminal(monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda question: pytest.fail(f"asked: {question}"))


@pytest.mark.parametrize("recipe", [path.stem for path in recipes()])
def test_every_recipe_survives_with_its_keys(recipe, tmp_path, nano_path, no_terminal, capsys):
    out = tmp_path / "job.toml"
    encoder = str(nano_path.parent / "text_encoder")
    data = answers(nano_path, tmp_path, "--recipe", recipe, "--text-encoder", encoder)
    assert main(["init", str(out), *data]) == 0
    (path,) = (path for path in recipes() if path.stem == recipe)
    before, after = read_tables(path)[0], read_tables(out)[0]
    before["model"]["checkpoint_path"] = str(nano_path)
    if "sources" not in before["data"]:
        before["data"]["root"] = str(tmp_path)
    before["job"]["dump_folder"] = "outputs/job"
    if "validation" in before:
        before["validation"]["text_encoder_path"] = encoder
    assert after == before
    # Keys are explained by the schema; a recipe that is not valid here would not be valid there either.
    lines = out.read_text().splitlines()
    assert lines[lines.index("[training]") - 1] == "# Length, batch, precision."


def test_flags_and_overrides_reach_the_job(tmp_path, nano_path, no_terminal, capsys):
    out = tmp_path / "my job.toml"
    command = ["init", str(out), *answers(nano_path, tmp_path, "--trigger", 'SKS "DOG"'), "--prompt", "one"]
    command += ["--prompt", "two\nlines", "--text-encoder", str(nano_path.parent / "text_encoder")]
    assert main([*command, "--size", "64x64x9", "--training.steps=7", "--optimizer.lr=3e-5"]) == 0
    assert "not ready" not in capsys.readouterr().out
    job = load_job(out)
    assert (job.training.steps, job.optimizer.lr, job.job.trigger) == (7, 3e-5, 'SKS "DOG"')
    assert [sample.prompt for sample in job.validation.samples] == ["one", "two\nlines"]
    assert job.validation.video_dims == (64, 64, 9)
    assert job.validation.interval is not None


def test_a_terminal_is_asked_for_what_is_missing_only(tmp_path, nano_path, monkeypatch, capsys):
    asked = []
    replies = iter(["", str(tmp_path), "MYCAT", ""])

    def reply(question):
        asked.append(question)
        return next(replies)

    monkeypatch.setattr(builtins, "input", reply)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    out = tmp_path / "job.toml"
    assert main(["init", str(out), "--checkpoint", str(nano_path)]) == 0
    # An empty answer to what is needed is asked again.
    assert [question.partition(" ")[0] for question in asked] == ["folder", "folder", "trigger", "prompt"]
    job = load_job(out)
    assert (job.data.root, job.job.trigger, job.validation.interval) == (str(tmp_path), "MYCAT", None)


def test_nothing_is_asked_or_overwritten_without_a_terminal(tmp_path, nano_path, no_terminal, capsys):
    out = tmp_path / "job.toml"
    assert main(["init", str(out), "--checkpoint", str(nano_path)]) == 1
    assert "--data is missing" in capsys.readouterr().err
    assert not out.exists()
    out.write_text("mine")
    assert main(["init", str(out), *answers(nano_path, tmp_path)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["init", str(tmp_path / "a.toml"), "--recipe", "none"]) == 1
    assert "ltx23_lora_t2v" in capsys.readouterr().err


def test_a_job_that_is_not_ready_is_written_with_what_is_missing(tmp_path, no_terminal, capsys):
    out = tmp_path / "job.toml"
    assert main(["init", str(out), *answers("none.safetensors", "nowhere")]) == 0
    printed = capsys.readouterr().out
    assert "not ready yet" in printed
    assert "none.safetensors" in printed
    assert "doctor" in printed
