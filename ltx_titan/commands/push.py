"""`ltx-titan push`: uploads the result of a job to the Hugging Face Hub. A job with `[hub]` does so at its end."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError

from ltx_titan.common.options import Flag, Maybe, Overrides, Positional, placeholder
from ltx_titan.common.secrets import redacted
from ltx_titan.config import JobConfig, read_tables

DESCRIPTION = """\
Upload the result of a job to the Hugging Face Hub: the newest export, a model card with the clips of the last
validation, the job and its metrics. All files are one commit. The token is read from the environment variable HF_TOKEN
and appears in no message. A job with hub.repo does this when it has finished.

examples:
  HF_TOKEN=... ltx-titan push outputs/film --repo me/film-lora
  HF_TOKEN=... ltx-titan push outputs/film --repo me/film-lora --hub.private=false --hub.base_model=Lightricks/LTX-2
  ltx-titan push outputs/film --repo me/film-lora --dry-run
"""

TOKEN_VARIABLE = "HF_TOKEN"

_CLIPS = (".mp4", ".wav", ".png")
_CONTACT_SHEET = "contact-sheet.png"
_LOSSES = {"loss": "loss", "loss_video": "video loss", "loss_audio": "audio loss"}


@dataclass(frozen=True)
class PushOptions:
    """Options of `ltx-titan push`."""

    folder: Annotated[Positional[Path], placeholder("DUMP_FOLDER")]
    """Folder of the run: job.dump_folder of the job."""

    repo: Annotated[Maybe[str], placeholder("OWNER/NAME")] = None
    """Repository. Default: hub.repo of the job."""

    weights: Annotated[Maybe[Path], placeholder("FILE")] = None
    """File with the weights. Default: the newest of export/."""

    dry_run: Flag = False
    """List the files and print the model card; upload nothing."""

    overrides: Overrides = ()


@dataclass(frozen=True)
class Upload:
    """Contents of a commit.

    Attributes:
        repo: OWNER/NAME.
        private: visibility of a new repository.
        files: path in the repository -> file.
        card: text of README.md.
    """

    repo: str
    private: bool
    files: Mapping[str, Path]
    card: str


def run(options: PushOptions) -> int:
    """Runs the command; returns the exit status."""
    job_file = options.folder / "job.toml"
    if not job_file.is_file():
        raise ValueError(f"{options.folder}: expected the dump folder of a job, found no job.toml; correct the path.")
    repo = [] if options.repo is None else [f"--hub.repo={options.repo}"]
    job = _read_job(job_file, [*repo, *options.overrides])
    upload = collect(job, options.folder, options.weights)
    if options.dry_run:
        for name, path in upload.files.items():
            print(f"{path.stat().st_size / 1e6:10,.1f} MB  {name}")
        print(f"\nREADME.md of {upload.repo}:\n\n{upload.card}")
        return 0
    print(push(upload))
    return 0


def push_finished(job: JobConfig) -> None:
    """Uploads a run that has just ended, if the job asks for it; whatever fails is reported and changes nothing."""
    if job.hub.repo is None:
        return
    # Here, because it imports torch, and most jobs upload nothing.
    from ltx_titan.plan import export_name

    folder = Path(job.job.dump_folder)
    weights = folder / "export" / export_name(job, job.training.stop_at or job.training.steps)
    if not weights.is_file():
        # Stopped by a signal: what checkpoint.export_interval has written so far is not the result.
        print(f"[ltx_titan] nothing is uploaded to {job.hub.repo}: {weights} does not exist", file=sys.stderr)
        return
    try:
        print(f"[ltx_titan] uploaded to {push(collect(job, folder, weights))}", file=sys.stderr)
    except Exception as error:  # the run is complete on disk, and nothing that a server does may make it fail
        reason = redacted(" ".join(str(error).split())) or type(error).__name__
        print(
            f"[ltx_titan] the run is complete, but its upload to {job.hub.repo} failed: {reason}\n"
            f"[ltx_titan] repeat it with: ltx-titan push {folder}",
            file=sys.stderr,
        )


def collect(job: JobConfig, folder: Path, weights: Path | None = None) -> Upload:
    """Chooses the files of a run.

    Args:
        job: of the run, with `hub.repo`.
        folder: its dump folder.
        weights: file with the weights; None for the newest export.

    Raises:
        ValueError: the job names no repository, or there are no weights, or they are damaged.
    """
    from ltx_titan.commands.model_card import model_card
    from ltx_titan.metrics.loggers import read_metrics
    from ltx_titan.weights import LoRAFacts, check_contents, read_metadata

    if job.hub.repo is None:
        raise ValueError("hub.repo is missing: expected a repository OWNER/NAME; pass --repo, or set it in the job.")
    if weights is None:
        exports = sorted((folder / "export").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        if not exports:
            raise ValueError(
                f"{folder / 'export'}: expected an exported file, found none; make one with ltx-titan export, or pass "
                "--weights."
            )
        weights = exports[-1]
    facts = LoRAFacts.read(read_metadata(weights).raw)
    check_contents(weights)
    clips = _clips(folder, [sample.prompt for sample in job.validation.samples]) if job.hub.clips else {}
    files = {weights.name: weights}
    files |= {name: folder / name for name in ("job.toml", "metrics.jsonl", "loss.png", "report.html")}
    files |= {f"clips/{path.name}": path for path in clips}
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    card = model_card(
        job,
        weights=[weights.name],
        clips={f"clips/{path.name}": prompt for path, prompt in clips.items()},
        losses=_last_losses(records),
        step=int(records[-1]["step"]) if records else None,
        license_=job.job.license or facts.license,
        trigger=job.job.trigger or facts.trigger,
    )
    existing = {name: path for name, path in files.items() if path.is_file()}
    return Upload(job.hub.repo, job.hub.private, existing, card)


def push(upload: Upload) -> str:
    """Creates the repository if it does not exist and uploads everything in one commit; returns its address.

    Raises:
        ValueError: there is no token, or the server refuses the upload; the token is not in the message.
    """
    # Here, because `--help` and a job without [hub] do not need it.
    from huggingface_hub import CommitOperationAdd, HfApi

    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise ValueError(
            f"{TOKEN_VARIABLE} is not set: expected a token with write access from your account's settings on the Hub; "
            "export it in the environment."
        )
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    operations = [CommitOperationAdd("README.md", upload.card.encode())]
    operations += [CommitOperationAdd(name, path) for name, path in upload.files.items()]
    try:
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        commit = api.create_commit(upload.repo, operations, commit_message="Upload of a run of ltx_titan")
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
        reason = redacted(" ".join(str(error).split())) or type(error).__name__
        raise ValueError(f"{upload.repo}: the upload failed: {reason}") from None
    return str(commit.commit_url)


def _read_job(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job of a run. Its files are not looked for: a run may be uploaded from another machine."""
    tables, _ = read_tables(path, overrides)
    try:
        return JobConfig.model_validate(tables)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise ValueError(f"{path}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None


def _clips(folder: Path, prompts: Sequence[str]) -> dict[Path, str]:
    """Clips of the newest validation, with their prompts."""
    steps = {
        int(path.name.removeprefix("step-")): path for path in (folder / "samples").glob("step-*") if path.is_dir()
    }
    if not steps:
        return {}
    paths = [path for path in sorted(steps[max(steps)].iterdir()) if path.suffix in _CLIPS]
    found = {}
    for path in paths:
        if path.name == _CONTACT_SHEET:
            continue
        number = path.stem.removeprefix("sample-")
        index = int(number) - 1 if number.isdecimal() else len(prompts)
        found[path] = prompts[index] if index < len(prompts) else ""
    return found


def _last_losses(records: list[dict[str, Any]]) -> dict[str, float]:
    losses = {}
    for key, title in _LOSSES.items():
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            losses[title] = float(values[-1])
    return losses
