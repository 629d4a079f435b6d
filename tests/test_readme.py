"""A newcomer who types README's five steps, with the nano pack in the files' places and small sizes."""

import re
import shlex
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ltx_titan.cli import main
from ltx_titan.media import write_video
from tests.jobs import train_rank
from tests.processes import run_here

ROOT = Path(__file__).parent.parent
# A size that a CPU prepares at once, and two steps: the commands are otherwise typed as they stand.
SMALL = ("768x448x89", "64x64x9")
REDUCED = (
    "--training.stop_at=2",
    "--training.dtype=float32",
    "--lora.base_dtype=float32",
    "--compile.enable=false",
    "--validation.video_dims=[64, 64, 9]",
    "--validation.inference_steps=1",
    "--metrics.tensorboard=false",
)


def commands(heading: str) -> list[list[str]]:
    """The shell commands of a section's code blocks, as lists of words."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_readme_installs_and_downloads_before_anything_else():
    first = [" ".join(words) for words in commands("LoRA on your own clips")][:5]
    assert first[:2] == ["python3 -m venv .venv", "source .venv/bin/activate"]
    assert first[2] == "pip install -e .[preprocess,tools]"
    assert [line.split()[:2] for line in first[3:]] == [["hf", "download"]] * 2


@pytest.fixture(scope="module")
def home(tmp_path_factory, nano_path):
    """The folder in which the commands are typed: the project's job files, downloads and clips with captions."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "train_configs").symlink_to(ROOT / "train_configs")
    (folder / "models").mkdir()
    (folder / "models/ltx-2.3-22b-dev.safetensors").symlink_to(nano_path)
    (folder / "models/gemma-3-12b-it").symlink_to(nano_path.parent / "text_encoder")
    (folder / "clips").mkdir()
    frames = torch.randint(0, 256, (9, 64, 64, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    write_video(folder / "clips/fox.mp4", frames, Fraction(24), torch.zeros(2, 18_000), 48_000)
    (folder / "clips/fox.txt").write_text("A fox trots through the snow; a crow calls.")
    return folder


def test_the_five_steps_work_as_typed(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    typed = [words[1:] for words in commands("LoRA on your own clips") if words[0] == "ltx-titan"]
    assert [words[0] for words in typed] == ["inspect", "process-dataset", "train", "sample"]
    for command, *arguments in typed:
        arguments = [argument.replace(*SMALL) for argument in arguments]
        if command == "train":
            # The trainer's own entry point in one rank; the launcher around it has its own tests.
            run_here(train_rank, home / arguments[0], *arguments[1:], *REDUCED)
        else:
            # The short run has exported after its own last step, and has no GPU.
            arguments = [argument.replace("step-2000", "step-2") for argument in arguments]
            device = ["--device", "cpu"] if command != "inspect" else []
            assert main([command, *arguments, *device]) == 0, capsys.readouterr()
    assert len(list((home / "clips/.precomputed/latents").glob("*.pt"))) == 1
    run = home / "outputs/my-lora"
    assert len(list(run.glob("samples/step-0/*.mp4"))) == 2
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "lora-step-2.safetensors" in page
    assert page.count("<video") == 2


def test_the_job_of_full_fine_tuning_exists_and_is_full():
    (words,) = commands("Full fine-tuning")
    assert words[:2] == ["ltx-titan", "train"]
    assert 'mode = "full"' in (ROOT / words[2]).read_text()
