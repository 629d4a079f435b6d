import json
import subprocess
import sys

import pytest
import torch

from ltx_titan.cli import COMMANDS, main
from tests.media.clips import write_clip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other crawl where tests run side by side."""
    torch.set_num_threads(1)


def test_help_lists_every_command_without_loading_torch():
    script = "import sys; from ltx_titan.cli import main\n"
    script += "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"ltx-titan {command}" in capsys.readouterr().out.split("options:")[0].split("example")[1]


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["make-nanno"])
    assert caught.value.code == 2
    assert "make-nanno" in capsys.readouterr().err


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
