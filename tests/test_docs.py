"""Every command of README and docs, typed by a newcomer with the nano pack in the files' places and small sizes.

Commands run in this process, in the order of their page. What would need a GPU, a network, gigabytes or hours is in
`CHECKED`, with the reason, and is checked as far as it can be without them. A command of neither kind fails its page.
"""

import builtins
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch

from ltx_titan.benchmarks.adamw import AdamWBenchOptions
from ltx_titan.benchmarks.load import LoadOptions
from ltx_titan.benchmarks.peer_lora import PeerOptions
from ltx_titan.benchmarks.precision import PrecisionOptions
from ltx_titan.benchmarks.scaling import ScalingOptions
from ltx_titan.benchmarks.step import StepBenchOptions
from ltx_titan.benchmarks.train import TrainBenchOptions
from ltx_titan.cli import main
from ltx_titan.commands.catalog import load_command
from ltx_titan.common.options import parse_options
from ltx_titan.config import load_job
from ltx_titan.media import write_video
from ltx_titan.plan import plan_job
from tests import fault_scenarios
from tests.jobs import train_rank
from tests.processes import run_here

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
STEPS = "LoRA on your own clips"
# Sizes that a CPU prepares and samples at once, and what README's run is called; all else is typed as it stands.
SUBSTITUTES = {
    "768x448x89": "64x64x9",
    "512x320x49": "64x64x9",
    "outputs/film": "outputs/my-lora",
    "step-2000": "step-2",
    "node0": "localhost",
    "$i": "1",
    "~/": "",
}
SHORT = (
    "--training.stop_at=2",
    "--training.dtype=float32",
    "--lora.base_dtype=float32",
    "--compile.enable=false",
    "--validation.video_dims=[64, 64, 9]",
    "--validation.inference_steps=1",
    "--metrics.tensorboard=false",
)


ASSIGNMENT = re.compile(r"\w+=.*", re.DOTALL)


class Command(NamedTuple):
    """A shell command: the variables set for it, and its words."""

    variables: dict[str, str]
    words: list[str]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def commands(text: str) -> list[Command]:
    """All commands of a page's shell blocks. Blocks without a language also hold diagrams and trees of files."""
    found = []
    variables: dict[str, str] = {}
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if language != "bash" and not line.startswith(("ltx-titan ", "python ", "torchrun ", "./run_train.sh")):
                continue
            for old, new in {**{f"${name}": value for name, value in variables.items()}, **SUBSTITUTES}.items():
                line = line.replace(old, new)
            for words in split(line):
                count = next((index for index, word in enumerate(words) if not ASSIGNMENT.fullmatch(word)), len(words))
                assigned = dict(word.split("=", 1) for word in words[:count])
                if count == len(words):
                    variables |= assigned
                else:
                    found.append(Command(assigned, words[count:]))
    return found


def split(line: str) -> list[list[str]]:
    """Words of the commands of a line, which `&&` or `;` separates."""
    found: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word != "&&":
            found[-1].append(word.removesuffix(";"))
        if word == "&&" or word.endswith(";"):
            found.append([])
    return [words for words in found if words]


# --- what is checked instead of run


def plans(command: Command, monkeypatch) -> None:
    """The command up to the start of its ranks, then what each of them checks before it takes memory."""
    arguments = command.words[1:]
    if command.words[0] == "torchrun":
        arguments = ["train", *command.words[command.words.index("-m") + 2 :]]
    elif command.words[0] == "./run_train.sh":
        arguments = ["train", *arguments]
    launched: list[str] = []
    # A status that is not 0: what follows training is not to begin.
    monkeypatch.setattr("ltx_titan.launch.launch", lambda words: launched.extend(words) or 1)
    assert main(arguments) == 1
    assert launched[launched.index("-m") + 1 :] == ["ltx_titan.train", *arguments[1:]]
    job = load_job(arguments[1], arguments[2:])
    plan_job(job, 8 if job.model.mode == "full" else 1)


def parses(command: Command, monkeypatch) -> Any:
    """The options, with the command's own parser."""
    _, name, *arguments = command.words
    if name == "bench":
        name, arguments = f"bench {arguments[0]}", arguments[1:]
    return parse_options(get_type_hints(load_command(name).run)["options"], arguments, prog=name, description="")


def plans_on_its_gpus(command: Command, monkeypatch) -> None:
    """The job on as many ranks as the command names, which is what a dry run builds and steps."""
    options = parses(command, monkeypatch)
    assert options.dry_run
    plan_job(load_job(options.job, options.overrides), options.gpus)


def measures(command: Command, monkeypatch) -> None:
    """Options and cases of a benchmark program."""
    number = command.words.index("-m")
    module, arguments = import_module(command.words[number + 1]), command.words[number + 2 :]
    known = {
        "train": TrainBenchOptions,
        "load": LoadOptions,
        "scaling": ScalingOptions,
        "adamw": AdamWBenchOptions,
        "precision": PrecisionOptions,
        "peer_lora": PeerOptions,
    }
    options = parse_options(known[module.__name__.rpartition(".")[2]], arguments, prog="", description="")
    for case in getattr(options, "case", ()):
        load_job(options.job, shlex.split(f"{options.all} {case.partition(':')[2]}"))


def profiles(command: Command, monkeypatch) -> None:
    """Options and job of `bench step` under torchrun."""
    arguments = command.words[command.words.index("step") + 1 :]
    options = parse_options(StepBenchOptions, arguments, prog="", description="")
    load_job(options.job, options.overrides)


def names_extras(command: Command, monkeypatch) -> None:
    """The package's extras that pip is to install."""
    extras = re.fullmatch(r"pip install -e \.\[([\w,]+)\]", command.text)
    assert extras
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= known.keys()


def names_files(command: Command, monkeypatch) -> None:
    """Files of the project that the command runs or passes on."""
    paths = [word for word in command.words if "/" in word or word.endswith((".toml", ".sbatch"))]
    for path in paths:
        # .venv is made by the command before it.
        assert path.startswith(".venv/") or path == "job.toml" or (ROOT / path).exists(), f"{command.text}: {path}"


def names_scenarios(command: Command, monkeypatch) -> None:
    """Options and scenarios of tests/fault_scenarios.py."""
    options = fault_scenarios.make_parser().parse_args(command.words[3:])
    assert set(options.names) <= fault_scenarios.SCENARIOS.keys()


def nothing(command: Command, monkeypatch) -> None:
    """A command that is not ours, and that no part of the project can check."""


# Beginning of a command: reason that it is not run, and what is done instead.
PUSH = "ltx-titan push outputs/my-lora --repo me/film-lora"
CHECKED: dict[str, tuple[str, Callable[[Command, pytest.MonkeyPatch], None]]] = {
    "python3 -m venv": ("makes a virtual environment, in CI for every clone", nothing),
    "source .venv": ("enters it", nothing),
    "pip install": ("downloads gigabytes", names_extras),
    "hf download": ("downloads 70 GB", nothing),
    "export HF_TOKEN": ("a secret of the user", nothing),
    "git clone": ("this repository", nothing),
    "cd ltx_titan": ("into it", nothing),
    ".venv/bin/pre-commit": ("changes the clone", names_files),
    "tests/run.sh": ("runs this test", names_files),
    "bash .ci/run": ("runs this test", names_files),
    "sbatch": ("needs Slurm", names_files),
    "ltx-titan train": ("hours on GPUs; README's is run by `home`", plans),
    "torchrun --nproc-per-node 8 -m ltx_titan.train": ("the same", plans),
    "./run_train.sh job.toml": ("the same", plans),
    "./run_train.sh": ("minutes; tests/test_launch.py runs the launcher", names_files),
    "torchrun --nproc-per-node 8 -m ltx_titan.benchmarks": ("needs eight GPUs", measures),
    "torchrun --nproc-per-node 4 -m ltx_titan.benchmarks": ("needs four GPUs", measures),
    "torchrun --nproc-per-node 1 -m ltx_titan.benchmarks": ("needs a GPU", measures),
    "torchrun --nproc-per-node 2 -m ltx_titan.benchmarks": ("needs two GPUs", measures),
    "python -m ltx_titan.benchmarks.adamw": ("needs a GPU", measures),
    "python -m ltx_titan.benchmarks.peer_lora": ("needs a GPU", measures),
    "python -m ltx_titan.benchmarks.precision": ("needs a GPU", measures),
    "python -m tests.fault_scenarios": ("needs two GPUs", names_scenarios),
    "ltx-titan bench step": ("needs a GPU", parses),
    "torchrun --nproc-per-node 2 -m ltx_titan.cli bench step": ("needs two GPUs", profiles),
    "torchrun --nproc-per-node 4 -m ltx_titan.cli bench step": ("needs four GPUs", profiles),
    "ltx-titan bench scaling": ("a minute; tests/benchmarks/test_scaling.py runs it", parses),
    "ltx-titan bench block --tokens 4032 16128 --providers triton native tensorwise": ("needs a GPU", parses),
    "ltx-titan bench small-gpu": ("needs a GPU", parses),
    "pytest -m gpu": ("needs a GPU", names_files),
    "ltx-titan bench nano": ("minutes on a GPU", parses),
    "ltx-titan make-checkpoint": ("writes 38 GB", parses),
    "ltx-titan estimate job.toml --gpus 512": ("20 s; tests/estimate runs dry runs", plans_on_its_gpus),
    PUSH: ("network; tests/commands/test_push.py has a server", parses),
}
# Commands whose defaults are sizes or compilation for a GPU, with what they get in addition.
LIGHTER = {"ltx-titan sample --model-path": ("--size", "64x64x9", "--steps", "1")}


def run_or_check(command: Command, monkeypatch, capsys) -> None:
    """Types a command in the current folder."""
    for name, value in command.variables.items():
        monkeypatch.setenv(name, value)
    beginning = next((start for start in CHECKED if command.text.startswith(start)), None)
    if beginning is not None and command.text != f"{PUSH} --dry-run":
        CHECKED[beginning][1](command, monkeypatch)
        return
    assert command.words[0] == "ltx-titan", f"{command.text}: neither run nor in CHECKED"
    words = command.words[1 : command.words.index(">") if ">" in command.words else None]
    status = main([*words, *next((more for start, more in LIGHTER.items() if command.text.startswith(start)), ())])
    printed = capsys.readouterr()
    # No disk of a test is fast enough to be asserted: doctor may warn, and its own tests hold what is broken.
    assert status == 0 or command.words[1] == "doctor", f"{command.text}\n{printed.out}\n{printed.err}"


# --- the newcomer's folder


def still_frames(count: int, color: int) -> torch.Tensor:
    """A scene of one color with a moving bar."""
    frames = torch.full((count, 64, 64, 3), color, dtype=torch.uint8)
    for number in range(count):
        frames[number, :, number % 60 : number % 60 + 4] = 255 - color
    return frames


@pytest.fixture(scope="module")
def home(tmp_path_factory, nano_path):
    """The folder in which everything is typed, after the five steps: job files, downloads, clips, a trained LoRA."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "train_configs").symlink_to(ROOT / "train_configs")
    (folder / "docs").symlink_to(ROOT / "docs")
    for name, target in {"ltx-2.3-22b-dev.safetensors": nano_path, "gemma": nano_path.parent / "text_encoder"}.items():
        for place in (folder, folder / "models"):
            place.mkdir(exist_ok=True)
            links = [name] if name != "gemma" else ["gemma-3-12b-it", "gemma-3-12b-it-qat-q4_0-unquantized"]
            for link in links:
                (place / link).symlink_to(target)
    (folder / "clips").mkdir()
    write_video(folder / "clips/fox.mp4", still_frames(9, 40), Fraction(24), torch.zeros(2, 18_000), 48_000)
    (folder / "clips/fox.txt").write_text("A fox trots through the snow; a crow calls.")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in steps():
            _, name, *arguments = command.words
            if name == "train":
                # The trainer's own entry point in one rank; the launcher around it has its own tests.
                run_here(train_rank, folder / arguments[0], *arguments[1:], *SHORT)
            else:
                assert main([name, *arguments]) == 0, command.text
        job = ["job.toml", "--recipe", "ltx23_full_av_8gpu", "--checkpoint", str(nano_path), "--data", "clips"]
        assert main(["init", *job]) == 0
    write_video(folder / "film.mkv", torch.cat([still_frames(30, 40), still_frames(30, 200)]), Fraction(24))
    export = folder / "outputs/my-lora/export"
    (folder / "lora-step-2.safetensors").symlink_to(export / "lora-step-2.safetensors")
    (export / "transformer-step-2.safetensors").symlink_to(nano_path)
    # The result of `lora merge`, which comes first on that page.
    (folder / "transformer-step-2.safetensors").symlink_to("merged.safetensors")
    return folder


def steps() -> list[Command]:
    """The commands of ours in README's five steps."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {STEPS}\n")[1].split("\n## ")[0]
    return [command for command in commands(section) if command.words[0] == "ltx-titan"]


def test_the_five_steps_end_with_something_to_look_at(home):
    assert [command.words[1] for command in steps()] == ["inspect", "process-dataset", "train", "sample"]
    assert len(list((home / "clips/.precomputed/latents").glob("*.pt"))) == 1
    run = home / "outputs/my-lora"
    assert len(list(run.glob("samples/step-0/*.mp4"))) == 2
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "lora-step-2.safetensors" in page
    assert page.count("<video") == 2


@pytest.mark.parametrize("page", [page for page in PAGES if commands((ROOT / page).read_text(encoding="utf-8"))])
def test_every_command_of_a_page_works(page, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    # In place of the model behind a server.
    monkeypatch.setattr("ltx_titan.commands.captioning.caption._captioner", lambda *_: lambda *_: "A bar moves.")
    job = (home / "job.toml").read_text()
    if page == "docs/command-line.md":
        (home / "job.toml").unlink()
        type_answers(monkeypatch, "ltx-2.3-22b-dev.safetensors", "clips", "", "")
    typed = [step.text for step in steps()]
    for command in commands((ROOT / page).read_text(encoding="utf-8")):
        if command.text not in typed:
            run_or_check(command, monkeypatch, capsys)
    (home / "job.toml").write_text(job)


def type_answers(monkeypatch, *answers: str) -> None:
    """Answers the questions of `init` on a terminal."""
    left = iter(answers)
    monkeypatch.setattr(builtins, "input", lambda question: next(left))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
