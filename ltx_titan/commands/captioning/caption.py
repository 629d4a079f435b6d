"""`ltx-titan caption`: captions of clips from a multimodal model that receives frames and audio.

Every caption is appended to a journal next to the table, which is merged into the table periodically and at the end: a
killed run loses the requests in progress and nothing else.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

from ltx_titan.commands.captioning.parts import ClipParts, read_parts
from ltx_titan.commands.captioning.server import LAUNCH, Captioner, CaptionError, ServerUnreachable, server_captioner
from ltx_titan.commands.captioning.table import CaptionTable
from ltx_titan.commands.captioning.text import instruction, read_answer
from ltx_titan.commands.report import Report
from ltx_titan.common.options import Flag, Maybe, Positional, alias, default_device, placeholder
from ltx_titan.common.ranks import own_device, own_share
from ltx_titan.common.secrets import redacted
from ltx_titan.media import MediaError
from ltx_titan.tables.folders import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES

DESCRIPTION = f"""\
Caption clips, images or audio with a multimodal model: it receives frames with their times and the audio, and the
captions are written to a table that process-dataset reads. The instruction states whether audio is attached, so that
captions describe audio if and only if there is some.

INPUT is a file, a folder, or a table (such as scenes.jsonl of split-scenes), which gets the column caption. Rows that
have a caption are skipped. An interrupted run resumes when it is started again; failed files are reported at the end.

The model runs behind any OpenAI-compatible server, such as vLLM on one 80 GB GPU (video and audio):
  {LAUNCH}
or in this process with --local-model: a local folder of an instruction-tuned model for transformers (Qwen3-Omni,
Gemma 3n, Gemma 3, Qwen3-VL, ...). Models without audio input need --skip-audio. Weights that do not fit into the free
memory of the GPU are loaded in int8; for images and audio on 12 GB: google/gemma-3n-E2B-it, which needs `pip install
timm` (about 10 GiB, estimated from its weights, not run on such a card).

examples:
  ltx-titan caption clips/
  ltx-titan caption clips/scenes.jsonl --output clips/dataset.jsonl --num-workers 8
  ltx-titan caption photos/ --local-model gemma-3-12b-it --skip-audio
  ltx-titan caption clips/ --local-model gemma-3n-E2B-it --max-frames 16                # a GPU of 12 GB
  ltx-titan caption clips/ --server https://api.example.com/v1 --model some-model     # key: OPENAI_API_KEY
  torchrun --nproc-per-node 8 -m ltx_titan.cli caption clips/ --local-model Qwen3-Omni-30B-A3B-Instruct
"""

_STAGE = "caption"
_SAVE_INTERVAL_S = 60.0


@dataclass(frozen=True)
class CaptionOptions:
    """Options of `ltx-titan caption`."""

    input: Positional[Path]
    """A file, a folder, or a table (.csv, .json, .jsonl)."""

    output: Annotated[Maybe[Path], alias("-o")] = None
    """Table to write: .csv, .json, .jsonl, or .txt for two parallel files of captions and paths. Default: the input
    table, or dataset.jsonl in the folder."""

    recursive: Annotated[Flag, alias("-r")] = False
    """Search the subfolders of INPUT."""

    extensions: Annotated[Maybe[str], alias("-e"), placeholder("EXT,...")] = None
    """Extensions of the files to caption, for example mp4,mov,png. Default: videos and images, or audio files in a
    folder with neither."""

    overwrite: Annotated[Flag, alias("--override")] = False
    """Caption files again that have a caption."""

    num_workers: Annotated[int, alias("-w")] = 4
    """Files in parallel."""

    dry_run: Flag = False
    """List the files and the contents of one request, and stop."""

    instruction: Annotated[Maybe[str], alias("-i")] = None
    """Instruction that replaces the built-in one."""

    skip_audio: Flag = False
    """Do not send audio, for models without audio input."""

    fps: Annotated[float, alias("-f")] = 2.0
    """Frames per second of video."""

    max_frames: int = 32
    """Maximal number of frames, evenly spaced."""

    max_side: int = 768
    """Pixels of the longer side that frames are reduced to."""

    max_tokens: int = 4096
    """Maximal length of an answer."""

    server: Annotated[str, placeholder("URL")] = "http://127.0.0.1:8001/v1"
    """Address of an OpenAI-compatible server."""

    model: Maybe[str] = None
    """Name of the model on the server. Default: the first that it lists."""

    api_key: Maybe[str] = None
    """Refused on a command line, which other users can read: set the variable OPENAI_API_KEY."""

    send: Literal["frames", "video"] = "frames"
    """Send frames (any server), or the video file (vLLM, SGLang)."""

    temperature: float = 0.0
    """Sampling temperature of the server's model; 0 is greedy."""

    timeout: float = 600.0
    """Seconds until a request fails."""

    retries: int = 3
    """Retries of a failed request, with exponential backoff."""

    extra_body: Annotated[Maybe[str], placeholder("JSON")] = None
    """Further fields of the request, for example '{"chat_template_kwargs": {"enable_thinking": false}}'."""

    local_model: Annotated[Maybe[Path], placeholder("FOLDER")] = None
    """Run this model with transformers instead of using a server."""

    load_in_8bit: Flag = False
    """Load the local model with int8 weights: half the memory. Default: if bfloat16 does not fit into the GPU."""

    strict: Flag = False
    """Exit with status 1 if any file failed; otherwise only if nothing could be done."""

    device: str = field(default_factory=default_device)
    """Device of the local model: cuda, cpu, or auto to distribute it over all GPUs."""

    @property
    def suffixes(self) -> frozenset[str]:
        """Suffixes of the files that are captioned."""
        if self.extensions is None:
            return VIDEO_SUFFIXES | IMAGE_SUFFIXES | AUDIO_SUFFIXES
        return frozenset(f".{extension.strip().lower().lstrip('.')}" for extension in self.extensions.split(","))


def run(options: CaptionOptions) -> int:
    """Runs the command; the exit status is 1 if no file has a caption at the end, or if one failed with `--strict`."""
    if options.api_key is not None:
        raise ValueError(
            "--api-key: every user of this machine can read it in the list of processes; set the variable "
            "OPENAI_API_KEY instead."
        )
    report = caption_files(options)
    report.print("caption")
    return report.status(options.strict, options.dry_run)


def caption_files(options: CaptionOptions, console: Console | None = None) -> Report:
    """Captions files; those that cannot be captioned are reported and skipped.

    Raises:
        ValueError: there are no files, the model cannot be used, or its server stopped answering.
    """
    extra_body = _extra_body(options.extra_body)
    report = Report(console or Console())
    table = CaptionTable(options.input, options.output, options.suffixes, options.recursive)
    todo = []
    # Shares of all files, not of the missing ones, which ranks that start later would see differently.
    for path in own_share(table.files):
        if table.has(path) and not options.overwrite:
            report.add(_STAGE, "skipped")
        else:
            todo.append(path)
    for number in table.rows_without_file:
        report.fail(_STAGE, f"row {number}", "names no file")
    if options.dry_run:
        _print_plan(todo, options, report)
        return report
    if todo:
        _caption(todo, table, _captioner(options, extra_body), options, report)
    # Also if there was nothing to do: a killed run may have left captions in the journal.
    table.save()
    return report


def _caption(
    todo: list[Path], table: CaptionTable, captioner: Captioner, options: CaptionOptions, report: Report
) -> None:
    def caption(path: Path) -> str:
        parts = read_parts(path, options.fps, options.max_frames, options.max_side, not options.skip_audio)
        answer = captioner(parts, instruction(parts.kind, parts.audio_state, options.instruction))
        return read_answer(answer)

    saved = time.monotonic()
    with report.progress(_STAGE, len(todo)) as bar, _workers(options.num_workers) as pool:
        futures: dict[Future[str], Path] = {pool.submit(caption, path): path for path in todo}
        # In the order of completion: one slow file must not keep finished captions out of the journal.
        for future in as_completed(futures):
            path = futures[future]
            try:
                table.add(path, future.result())
            except ServerUnreachable as error:
                # Every further file would fail as well, each after all of its retries.
                raise ValueError(
                    f"{error}; captions so far are saved: restart the server, then run the command again"
                ) from error
            except (MediaError, CaptionError, ValueError, OSError) as error:
                reason = error.reason if isinstance(error, MediaError) else str(error)
                report.fail(_STAGE, str(path), redacted(reason))
            else:
                report.add(_STAGE, "done")
            bar.advance()
            # Not after every caption: a merge reads and writes the whole table.
            if time.monotonic() - saved > _SAVE_INTERVAL_S:
                table.save()
                saved = time.monotonic()


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Thread pool whose pending tasks are canceled if the block raises."""
    pool = ThreadPoolExecutor(count, "ltx-titan-caption")
    try:
        yield pool
    finally:
        # Without it, thousands of queued files would still be sent before the error is shown.
        pool.shutdown(cancel_futures=True)


def _captioner(options: CaptionOptions, extra_body: Mapping[str, Any]) -> Captioner:
    if options.local_model is None:
        return server_captioner(
            options.server,
            options.model,
            options.api_key,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            timeout_s=options.timeout,
            retries=options.retries,
            send=options.send,
            extra_body=extra_body,
        )
    # Here, because it imports model code that clients of a server do without.
    from ltx_titan.commands.captioning.local import local_captioner

    captioner = local_captioner(
        options.local_model,
        own_device(options.device),
        options.max_tokens,
        options.load_in_8bit,
        with_audio=not options.skip_audio,
    )
    lock = threading.Lock()

    def one_at_a_time(parts: ClipParts, text: str) -> str:
        # The other threads read the next files in the meantime.
        with lock:
            return captioner(parts, text)

    return one_at_a_time


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        body = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--extra-body: not valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise ValueError(f"--extra-body: expected a JSON object, found {text}")
    return body


def _print_plan(todo: list[Path], options: CaptionOptions, report: Report) -> None:
    for path in todo:
        report.write(str(path))
    report.notes["would be captioned"] = len(todo)
    for path in todo:
        try:
            parts = read_parts(path, options.fps, options.max_frames, options.max_side, not options.skip_audio)
        # The first file that can be read stands for all.
        except (MediaError, OSError):
            continue
        audio = "no audio" if parts.audio is None else f"{parts.audio.duration_s:.1f} s of audio"
        size = parts.frames[0][1].size if parts.frames else (0, 0)
        report.write(f"\nrequest for {path.name}: {len(parts.frames)} frame(s) of {size[0]}x{size[1]}, {audio}, and:\n")
        report.write(instruction(parts.kind, parts.audio_state, options.instruction))
        break
