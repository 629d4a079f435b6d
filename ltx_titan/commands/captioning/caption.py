"""`ltx-titan caption`: descriptions of clips, by a multimodal model that sees and, where it can, hears them.

Every caption is kept the moment it is there, in a journal beside the table, and the journal goes into the table from
time to time and at the end: a run that is killed loses the requests under way and no more.
"""

import argparse
import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from ltx_titan.commands.captioning.parts import read_parts
from ltx_titan.commands.captioning.server import LAUNCH, Captioner, CaptionError, ServerGone, server_captioner
from ltx_titan.commands.captioning.table import CaptionTable
from ltx_titan.commands.captioning.text import instruction, read_answer
from ltx_titan.commands.files import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from ltx_titan.commands.report import Report
from ltx_titan.common.ranks import own_device, own_share
from ltx_titan.media import IMAGE_SUFFIXES, MediaError

DEFAULT_SERVER = "http://127.0.0.1:8001/v1"
_STAGE = "caption"
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class CaptionOptions:
    """What `caption_files` is told; the command line has the same names.

    Attributes:
        input: a file, a folder of files, or a table of them.
        output: table to write (.csv, .json, .jsonl, .txt); None: the given table, or `dataset.jsonl` in the folder.
        server: address of an OpenAI-compatible server.
        model: its name on the server; None: the first that it lists.
        api_key: for the server; None: the variable OPENAI_API_KEY.
        local_model: folder of a model to run here instead of asking a server.
        load_in_8bit: weights of the local model in int8.
        device: where the local model runs.
        instruction: the user's own, in place of ours.
        skip_audio: do not send audio.
        send: frames, or the video file itself (servers that take it).
        fps: frames for each second of video.
        max_frames: at most.
        max_side: pixels of the frames' longer side.
        max_tokens: length of an answer.
        temperature: of the server's model.
        timeout: seconds for one request.
        retries: of a request that failed for a passing reason.
        extra_body: further fields of the request, as JSON.
        num_workers: files at once.
        recursive: look into subfolders.
        extensions: of the files that are captioned; None: videos and images, in a folder without any also audio.
        overwrite: caption again what has a caption.
        dry_run: only say what would be done.
    """

    input: Path
    output: Path | None = None
    server: str = DEFAULT_SERVER
    model: str | None = None
    api_key: str | None = None
    local_model: Path | None = None
    load_in_8bit: bool = False
    device: str = "cpu"
    instruction: str | None = None
    skip_audio: bool = False
    send: Literal["frames", "video"] = "frames"
    fps: float = 2.0
    max_frames: int = 32
    max_side: int = 768
    max_tokens: int = 4096
    temperature: float = 0.0
    timeout: float = 600.0
    retries: int = 3
    extra_body: str | None = None
    num_workers: int = 4
    recursive: bool = False
    extensions: tuple[str, ...] | None = None
    overwrite: bool = False
    dry_run: bool = False

    @property
    def suffixes(self) -> frozenset[str]:
        """Suffixes of the files that are captioned."""
        if self.extensions is None:
            return VIDEO_SUFFIXES | IMAGE_SUFFIXES | AUDIO_SUFFIXES
        return frozenset(f".{extension.strip().lower().lstrip('.')}" for extension in self.extensions)


def caption_files(options: CaptionOptions, console: Console | None = None) -> Report:
    """Caption files; those that cannot be captioned are named in the report and left out.

    Raises:
        ValueError: there are no files, the model cannot be used, or its server is gone.
    """
    extra_body = _extra_body(options.extra_body)
    report = Report(console or Console())
    table = CaptionTable(options.input, options.output, options.suffixes, options.recursive)
    todo = []
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
    # Also where there was nothing to do: a run that was killed may have left captions in the journal.
    table.save()
    return report


def _caption(
    todo: list[Path], table: CaptionTable, captioner: Captioner, options: CaptionOptions, report: Report
) -> None:
    def caption(path: Path) -> str:
        parts = read_parts(path, options.fps, options.max_frames, options.max_side, not options.skip_audio)
        answer = captioner(parts, instruction(parts.kind, parts.heard, options.instruction))
        return read_answer(answer)

    saved = time.monotonic()
    with report.progress(_STAGE, len(todo)) as bar, _workers(options.num_workers) as pool:
        futures: dict[Future[str], Path] = {pool.submit(caption, path): path for path in todo}
        for future in as_completed(futures):
            path = futures[future]
            try:
                table.add(path, future.result())
            except ServerGone as error:
                raise ValueError(
                    f"{error}; what is captioned is kept: start it again, then repeat the command"
                ) from error
            except (MediaError, CaptionError, ValueError, OSError) as error:
                report.fail(_STAGE, str(path), error.reason if isinstance(error, MediaError) else str(error))
            else:
                report.add(_STAGE, "done")
            bar.advance()
            if time.monotonic() - saved > _SAVE_EVERY_S:
                table.save()
                saved = time.monotonic()


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are given up, with what waits for them, when the caller ends early."""
    pool = ThreadPoolExecutor(count, "ltx-titan-caption")
    try:
        yield pool
    finally:
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
    # Here, because it brings torch models along, and a server needs none.
    from ltx_titan.commands.captioning.local import local_captioner

    captioner = local_captioner(
        options.local_model,
        own_device(options.device),
        options.max_tokens,
        options.load_in_8bit,
        with_audio=not options.skip_audio,
    )
    lock = threading.Lock()

    def one_at_a_time(parts: Any, text: str) -> str:
        # Further threads read the next files meanwhile.
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
    def say(text: str) -> None:
        report.console.print(text, markup=False, highlight=False, soft_wrap=True)

    for path in todo:
        say(str(path))
    report.notes["would be captioned"] = len(todo)
    for path in todo:
        try:
            parts = read_parts(path, options.fps, options.max_frames, options.max_side, not options.skip_audio)
        except (MediaError, OSError):
            continue
        audio = "no audio" if parts.audio is None else f"{parts.audio.duration_s:.1f} s of audio"
        size = parts.frames[0][1].size if parts.frames else (0, 0)
        say(f"\nof {path.name} would be sent: {len(parts.frames)} frame(s) of {size[0]}x{size[1]}, {audio}, and:\n")
        say(instruction(parts.kind, parts.heard, options.instruction))
        break


DESCRIPTION = f"""\
Describe clips, images or audio with a multimodal model: frames with their times and the audio go to the model, and
the captions into a table that process-dataset reads. The model is told whether there is audio, so that captions
describe what is heard, and only that.

INPUT is a file, a folder, or a table (such as scenes.jsonl of split-scenes), which gets the column caption. Rows that
have a caption are left alone. A run that was stopped goes on where it was; files that fail are named at the end.

The model runs behind any OpenAI-compatible server, such as vLLM on one 80 GB GPU (sees and hears):
  {LAUNCH}
or here, with --local-model: a local folder of an instruction-tuned model of transformers (Qwen3-Omni, Gemma 3n,
Gemma 3, Qwen3-VL, ...). For models that cannot hear give --skip-audio.

examples:
  ltx-titan caption clips/
  ltx-titan caption clips/scenes.jsonl --output clips/dataset.jsonl --num-workers 8
  ltx-titan caption photos/ --local-model gemma-3-12b-it --skip-audio
  ltx-titan caption clips/ --server https://api.example.com/v1 --model some-model     # key: OPENAI_API_KEY
  torchrun --nproc-per-node 8 -m ltx_titan.cli caption clips/ --local-model Qwen3-Omni-30B-A3B-Instruct
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan caption`."""
    parser.add_argument("input", type=Path, metavar="INPUT", help="a file, a folder, or a table (.csv, .json, .jsonl)")
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        help="table to write: .csv, .json, .jsonl, or .txt for two parallel files of captions and paths (default: the "
        "given table, or dataset.jsonl in the folder)",
    )
    parser.add_argument("--recursive", "-r", action="store_true", help="look into subfolders of INPUT")
    parser.add_argument("--extensions", "-e", type=lambda text: tuple(text.split(",")), help="as in mp4,mov,png")
    parser.add_argument("--overwrite", "--override", action="store_true", help="caption again what has a caption")
    parser.add_argument("--num-workers", "-w", type=int, default=4, help="files at once (default: 4)")
    parser.add_argument("--dry-run", action="store_true", help="list the files and what one request holds, and stop")
    ask = parser.add_argument_group("what the model gets")
    ask.add_argument("--instruction", "-i", help="your own in place of ours")
    ask.add_argument("--skip-audio", action="store_true", help="do not send audio: for models that cannot hear")
    ask.add_argument("--fps", "-f", type=float, default=2.0, help="frames for each second of video (default: 2)")
    ask.add_argument("--max-frames", type=int, default=32, help="at most, spread evenly (default: 32)")
    ask.add_argument("--max-side", type=int, default=768, help="pixels of the frames' longer side (default: 768)")
    ask.add_argument("--max-tokens", type=int, default=4096, help="length of an answer (default: 4096)")
    server = parser.add_argument_group("a server")
    server.add_argument("--server", default=DEFAULT_SERVER, metavar="URL", help=f"default: {DEFAULT_SERVER}")
    server.add_argument("--model", help="name on the server (default: the first that it lists)")
    server.add_argument("--api-key", help="default: the variable OPENAI_API_KEY")
    server.add_argument(
        "--send", choices=("frames", "video"), default="frames", help="frames (any server), or the file (vLLM, SGLang)"
    )
    server.add_argument("--temperature", type=float, default=0.0, help="0 gives the same caption again (default)")
    server.add_argument("--timeout", type=float, default=600.0, help="seconds for one request (default: 600)")
    server.add_argument("--retries", type=int, default=3, help="of a request, with growing pauses (default: 3)")
    server.add_argument(
        "--extra-body",
        metavar="JSON",
        help='further fields of the request, as in \'{"chat_template_kwargs": {"enable_thinking": false}}\'',
    )
    local = parser.add_argument_group("a model here")
    local.add_argument("--local-model", type=Path, metavar="FOLDER", help="run this model with transformers")
    local.add_argument("--load-in-8bit", action="store_true", help="its weights in int8: half the memory")
    local.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cpu, or auto: spread over all GPUs (default: cuda if there is one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan caption`; the exit status is 1 only where nothing at all could be captioned."""
    options = CaptionOptions(**{name: getattr(arguments, name) for name in CaptionOptions.__dataclass_fields__})
    report = caption_files(options)
    report.print("caption")
    return 0 if options.dry_run or report.succeeded() else 1
