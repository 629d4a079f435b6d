"""`ltx-titan decode-latents`: prepared latents back to pictures and audio, to see and hear what a job trains on.

A clip and its audio become one mp4. That is what makes a shift between them, a wrong frame rate, a bad crop or a
missing audio track show at once, which separate files do not.
"""

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console

from ltx_titan.commands.report import Report
from ltx_titan.commands.stored import Stored, stored_samples
from ltx_titan.common.ranks import own_device, own_share
from ltx_titan.data import resolve_root
from ltx_titan.media import MediaError
from ltx_titan.validation.decode import Decoders, decode_sample, load_decoders, write_sample
from ltx_titan.validation.sampling import SampledLatents

# Folder of latents -> folder of the audio that goes with it in one file.
_AUDIO_OF = {"latents": "audio_latents", "reference_latents": "reference_audio_latents"}
_STAGE = "decode"


@dataclass(frozen=True)
class DecodeOptions:
    """What `decode_latents` is told; the command line has the same names.

    Attributes:
        latents: root of prepared data, a folder of latents, or one file.
        output_dir: where to write.
        model_path: checkpoint with the VAEs and the vocoder, unless they are given.
        video_vae_path: file of the video VAE; None: the checkpoint.
        audio_vae_path: file of the audio VAE and the vocoder; None: the checkpoint.
        audio_latents_dir: audio to go with the clips; None: `audio_latents` beside their folder.
        skip_audio: leave audio away.
        vae_tiling: decode frames in tiles.
        seed: of the noise that some decoders add.
        limit: number of samples, spread over all of them; None: all.
        device: where the decoders run.
        overwrite: decode again what is there.
        dry_run: only say what would be done.
    """

    latents: Path
    output_dir: Path
    model_path: Path
    video_vae_path: Path | None = None
    audio_vae_path: Path | None = None
    audio_latents_dir: Path | None = None
    skip_audio: bool = False
    vae_tiling: bool = True
    seed: int = 0
    limit: int | None = None
    device: str = "cpu"
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class _Clip:
    """One output file.

    Attributes:
        target: the output without its suffix, which the contents decide.
        latents: the clip, or an audio without one.
        audio: the audio that goes with a clip; None where there is none.
    """

    target: Path
    latents: Stored
    audio: Stored | None


class _Loaded:
    """The decoders, each loaded when the first file needs it: many data sets have one stream only."""

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        self._device = own_device(options.device)

    @cached_property
    def video(self) -> Decoders:
        """Decoder of pictures."""
        path = self._options.video_vae_path or self._options.model_path
        return load_decoders(path, None, self._device, self._options.vae_tiling)

    @cached_property
    def audio(self) -> Decoders:
        """Decoder and vocoder of audio."""
        return load_decoders(None, self._options.audio_vae_path or self._options.model_path, self._device)

    def of(self, latents: SampledLatents) -> Decoders:
        """What a sample needs."""
        video = None if latents.video is None else self.video.video
        audio = None if latents.audio is None else self.audio
        return Decoders(video, audio and audio.audio, audio and audio.vocoder)


def decode_latents(options: DecodeOptions, console: Console | None = None) -> Report:
    """Decode a folder of latents; files that cannot be read are named in the report and left out.

    Raises:
        ValueError: there are no latents, or a checkpoint cannot be used.
    """
    report = Report(console or Console())
    clips = own_share(_spread(_find(options), options.limit))
    todo = []
    for clip in clips:
        if not options.overwrite and _done(clip.target):
            report.add(_STAGE, "skipped")
        else:
            todo.append(clip)
    if options.dry_run:
        for clip in todo:
            report.console.print(f"{clip.latents} -> {clip.target}.*", markup=False, highlight=False, soft_wrap=True)
        report.notes["would be decoded"] = len(todo)
        return report
    decoders = _Loaded(options)
    with report.progress(_STAGE, len(todo)) as bar:
        for clip in todo:
            try:
                _decode(clip, decoders, options.seed, report)
            except MediaError as error:
                report.fail(_STAGE, str(clip.latents), error.reason)
            bar.advance()
    return report


def _find(options: DecodeOptions) -> list[_Clip]:
    """Every clip and every audio without a clip, in order of their names."""
    place = options.latents
    if place.is_file():
        audios = {} if options.skip_audio else stored_samples(_audio_folder(place.parent, options))
        return [_Clip(options.output_dir / place.stem, Stored(place), audios.get(place.name))]
    if not place.is_dir():
        raise ValueError(f"{place}: no such file or folder; expected prepared data, or a folder of latents")
    root = resolve_root(place)
    names = [name for name in (*_AUDIO_OF, *_AUDIO_OF.values()) if (root / name).is_dir()]
    clips: list[_Clip] = []
    heard: set[Stored] = set()
    for name in names or [""]:
        folder = root / name
        is_audio = folder.name in _AUDIO_OF.values()
        if is_audio and options.skip_audio:
            continue
        audios = {} if is_audio or options.skip_audio else stored_samples(_audio_folder(folder, options))
        for key, stored in stored_samples(folder).items():
            if stored in heard:
                continue
            clip = _Clip(options.output_dir / name / Path(key).with_suffix(""), stored, audios.get(key))
            clips.append(clip)
            if clip.audio is not None:
                heard.add(clip.audio)
    if not clips:
        raise ValueError(f"{place}: holds no latents (.pt); expected prepared data, or a folder of latents")
    return clips


def _audio_folder(folder: Path, options: DecodeOptions) -> Path:
    """Where the audio of a folder's clips is."""
    return options.audio_latents_dir or folder.parent / _AUDIO_OF.get(folder.name, "audio_latents")


def _spread(clips: list[_Clip], limit: int | None) -> list[_Clip]:
    if limit is None or limit >= len(clips):
        return clips
    return [clips[int(place)] for place in torch.linspace(0, len(clips) - 1, limit).round()]


def _done(target: Path) -> bool:
    return any(target.with_name(target.name + suffix).is_file() for suffix in (".mp4", ".png", ".wav"))


def _decode(clip: _Clip, decoders: _Loaded, seed: int, report: Report) -> None:
    try:
        fields = clip.latents.read("latents")
        audio = None if clip.audio is None else clip.audio.read("audio")
    except ValueError as error:
        raise MediaError(clip.latents.path, str(error).removeprefix(f"{clip.latents}: ")) from error
    is_video = "num_frames" in fields
    if not is_video:
        fields, audio = {}, fields
    if audio is not None and not audio.get("present", True):
        report.notes["without audio (marked as absent)"] += 1
        audio = None
    if not is_video and audio is None:
        report.add(_STAGE, "done")
        return
    latents = SampledLatents(
        fields["latents"][None] if is_video else None, None if audio is None else audio["latents"][None]
    )
    decoded = decode_sample(latents, decoders.of(latents), seed)
    write_sample(clip.target.parent, clip.target.name, decoded, float(fields.get("fps", 1.0)))
    report.add(_STAGE, "done")


DESCRIPTION = """\
Decode prepared latents to files to look at and listen to: mp4 with audio for clips, png for stills, wav for audio
alone. Look at some before you train on all of them: a wrong crop, frame rate or audio track shows here.

LATENTS is the root of prepared data (the folder that has latents/, audio_latents/, reference_latents/, ...), one folder
of .pt files, or one file. Clips get their audio from audio_latents/ beside their folder. What is decoded already is
skipped; files that cannot be read are named at the end.

examples:
  ltx-titan decode-latents clips/.precomputed look/ --model-path ltx-2.3-22b-dev.safetensors --limit 20
  ltx-titan decode-latents clips/.precomputed/reference_latents look/ --model-path ltx-2.3-22b-dev.safetensors
  torchrun --nproc-per-node 8 -m ltx_titan.cli decode-latents clips/.precomputed look/ --model-path ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan decode-latents`."""
    parser.add_argument("latents", type=Path, metavar="LATENTS", help="prepared data, a folder of latents, or a file")
    parser.add_argument("output_dir", type=Path, metavar="OUT", help="where to write; made if it does not exist")
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint (.safetensors) with the VAEs")
    parser.add_argument("--video-vae-path", type=Path, help="video VAE file of a split pack (default: the checkpoint)")
    parser.add_argument(
        "--audio-vae-path", type=Path, help="file of a split pack with audio VAE and vocoder (default: the checkpoint)"
    )
    parser.add_argument(
        "--audio-latents-dir", type=Path, help="audio for the clips (default: audio_latents beside their folder)"
    )
    parser.add_argument("--skip-audio", action="store_true", help="pictures only; the vocoder is not loaded")
    parser.add_argument(
        "--vae-tiling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode large clips in overlapping tiles: less memory, faint seams (default: on)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise that decoders of some checkpoints add")
    parser.add_argument("--limit", type=int, metavar="N", help="decode N samples, spread over all of them")
    parser.add_argument("--overwrite", action="store_true", help="decode again what is there already")
    parser.add_argument("--dry-run", action="store_true", help="list what would be decoded, and stop")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the decoders run (default: cuda if there is one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan decode-latents`; the exit status is 1 only where nothing at all could be decoded."""
    options = DecodeOptions(**{name: getattr(arguments, name) for name in DecodeOptions.__dataclass_fields__})
    report = decode_latents(options)
    report.print("decode-latents")
    report.console.print(f"decoded: {options.output_dir}", highlight=False, soft_wrap=True)
    return 0 if options.dry_run or report.succeeded() else 1
