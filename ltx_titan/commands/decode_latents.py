"""`ltx-titan decode-latents`: prepared latents back to video and audio, to check what a job trains on.

A clip and its audio become one mp4: an offset between the two, a wrong frame rate, a bad crop or a missing track are
obvious in it, and invisible in separate files.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ltx_titan.commands.report import Report
from ltx_titan.commands.stored import StoredSample, stored_samples
from ltx_titan.common.options import Flag, Maybe, Positional, default_device, placeholder
from ltx_titan.common.ranks import own_device, own_share
from ltx_titan.common.tensors import evenly_spaced
from ltx_titan.data import resolve_root
from ltx_titan.data.layout import latents_of
from ltx_titan.media import MediaError
from ltx_titan.validation.decode import Decoders, decode_sample, load_decoders, write_sample
from ltx_titan.validation.sampling import SampledLatents

DESCRIPTION = """\
Decode prepared latents to files that can be watched: mp4 with audio for clips, png for still images, wav for audio
alone. Check some of them before training on all: wrong crops, frame rates and audio tracks are visible here.

LATENTS is the root of prepared data (the folder with latents/, audio_latents/, reference_latents/, ...), one folder of
.pt files, or one file. The audio of a clip is read from audio_latents/ next to its folder. Existing outputs are
skipped; unreadable files are reported at the end.

examples:
  ltx-titan decode-latents clips/.precomputed look/ --model-path ltx-2.3-22b-dev.safetensors --limit 20
  ltx-titan decode-latents clips/.precomputed/reference_latents look/ --model-path ltx-2.3-22b-dev.safetensors
  torchrun --nproc-per-node 8 -m ltx_titan.cli decode-latents clips/.precomputed look/ --model-path ...
"""

# Folder of latents -> folder of the audio that is muxed with them.
_AUDIO_OF = {"latents": "audio_latents", "reference_latents": "reference_audio_latents"}
_STAGE = "decode"


@dataclass(frozen=True)
class DecodeOptions:
    """Options of `ltx-titan decode-latents`."""

    latents: Positional[Path]
    """Root of prepared data, a folder of latents, or one file."""

    output_dir: Annotated[Positional[Path], placeholder("OUT")]
    """Folder to write to; created if it does not exist."""

    model_path: Path
    """Checkpoint (.safetensors) with the VAEs and the vocoder."""

    video_vae_path: Maybe[Path] = None
    """File of the video VAE, for checkpoints that are split into several files. Default: the checkpoint."""

    audio_vae_path: Maybe[Path] = None
    """File of the audio VAE and the vocoder, likewise. Default: the checkpoint."""

    audio_latents_dir: Maybe[Path] = None
    """Folder of the clips' audio latents. Default: audio_latents next to their folder."""

    skip_audio: Flag = False
    """Decode video only; the vocoder is not loaded."""

    vae_tiling: bool = True
    """Decode large clips in overlapping tiles: less memory, faint seams."""

    seed: int = 0
    """Seed of the noise that the decoders of some checkpoints add."""

    limit: Annotated[Maybe[int], placeholder("N")] = None
    """Number of samples to decode, evenly spaced over all of them. Default: all."""

    overwrite: Flag = False
    """Decode again what is decoded already."""

    dry_run: Flag = False
    """List what would be decoded, and stop."""

    strict: Flag = False
    """Exit with status 1 if any file failed; otherwise only if nothing could be done."""

    device: str = field(default_factory=default_device)
    """Device of the decoders."""


@dataclass(frozen=True)
class _Clip:
    """One output file.

    Attributes:
        target: path of the output without suffix, which depends on the contents.
        latents: the video latents, or the audio latents of a sample without video.
        audio: audio latents that are muxed with video latents; None without.
    """

    target: Path
    latents: StoredSample
    audio: StoredSample | None


class _LazyDecoders:
    """Decoders that are loaded when the first sample needs them: many datasets have only one stream."""

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        self._device = own_device(options.device)

    @cached_property
    def video(self) -> Decoders:
        """Decoder of the video VAE."""
        path = self._options.video_vae_path or self._options.model_path
        return load_decoders(path, None, self._device, self._options.vae_tiling)

    @cached_property
    def audio(self) -> Decoders:
        """Decoder of the audio VAE, and the vocoder."""
        return load_decoders(None, self._options.audio_vae_path or self._options.model_path, self._device)

    def needed_by(self, latents: SampledLatents) -> Decoders:
        """Decoders of the streams that a sample has."""
        video = None if latents.video is None else self.video.video
        if latents.audio is None:
            return Decoders(video, None, None)
        return Decoders(video, self.audio.audio, self.audio.vocoder)


def run(options: DecodeOptions) -> int:
    """Runs the command; the exit status is 1 if nothing is decoded at the end, or if one failed with `--strict`."""
    report = decode_latents(options)
    report.print("decode-latents")
    report.write(f"decoded: {options.output_dir}")
    return report.status(options.strict, options.dry_run)


def decode_latents(options: DecodeOptions, console: Console | None = None) -> Report:
    """Decodes a folder of latents; unreadable files are reported and skipped.

    Raises:
        ValueError: there are no latents, or a checkpoint cannot be used.
    """
    report = Report(console or Console())
    clips = _find(options)
    if options.limit is not None:
        # Before the shares, so that ranks decode N samples in all.
        clips = [clips[index] for index in evenly_spaced(len(clips), options.limit)]
    todo = []
    for clip in own_share(clips):
        if not options.overwrite and _is_decoded(clip.target):
            report.add(_STAGE, "skipped")
        else:
            todo.append(clip)
    if options.dry_run:
        for clip in todo:
            report.write(f"{clip.latents} -> {clip.target}.*")
        report.notes["would be decoded"] = len(todo)
        return report
    decoders = _LazyDecoders(options)
    with report.progress(_STAGE, len(todo)) as bar:
        for clip in todo:
            try:
                _decode(clip, decoders, options.seed, report)
            except MediaError as error:
                report.fail(_STAGE, str(clip.latents), error.reason)
            bar.advance()
    return report


def _find(options: DecodeOptions) -> list[_Clip]:
    """Every clip, and every audio that belongs to no clip, sorted by path."""
    source = options.latents
    if source.is_file():
        audio = {} if options.skip_audio else stored_samples(_audio_folder(source.parent, options))
        return [_Clip(options.output_dir / source.stem, StoredSample(source), audio.get(source.name))]
    if not source.is_dir():
        raise ValueError(f"{source}: no such file or folder; expected prepared data, or a folder of latents")
    root = resolve_root(source)
    names = [name for name in (*_AUDIO_OF, *_AUDIO_OF.values()) if (root / name).is_dir()]
    clips: list[_Clip] = []
    muxed: set[StoredSample] = set()
    # [""]: a bare folder of latents, as well as a data root.
    for name in names or [""]:
        folder = root / name
        is_audio = folder.name in _AUDIO_OF.values()
        if is_audio and options.skip_audio:
            continue
        audio = {} if is_audio or options.skip_audio else stored_samples(_audio_folder(folder, options))
        for key, stored in stored_samples(folder).items():
            # Audio that is in its clip's mp4 gets no wav of its own; video folders therefore come first in `names`.
            if stored in muxed:
                continue
            clip = _Clip(options.output_dir / name / Path(key).with_suffix(""), stored, audio.get(key))
            clips.append(clip)
            if clip.audio is not None:
                muxed.add(clip.audio)
    if not clips:
        raise ValueError(f"{source}: contains no latents (.pt); expected prepared data, or a folder of latents")
    return clips


def _audio_folder(folder: Path, options: DecodeOptions) -> Path:
    """Folder of the audio latents that belong to a folder of video latents."""
    return options.audio_latents_dir or folder.parent / _AUDIO_OF.get(folder.name, "audio_latents")


def _is_decoded(target: Path) -> bool:
    # Not `with_suffix`, which would cut a name such as `clip.v2` at its dot.
    return any(target.with_name(target.name + suffix).is_file() for suffix in (".mp4", ".png", ".wav"))


def _decode(clip: _Clip, decoders: _LazyDecoders, seed: int, report: Report) -> None:
    try:
        fields = clip.latents.read("latents")
        audio = None if clip.audio is None else clip.audio.read("audio")
    except ValueError as error:
        raise MediaError(clip.latents.path, str(error).removeprefix(f"{clip.latents}: ")) from error
    # By content, not by folder name: a folder of latents may have any name.
    is_video = "num_frames" in fields
    if not is_video:
        fields, audio = {}, fields
    if audio is not None and not audio.get("present", True):
        # Placeholders are zeros in latent space, which is not silence.
        report.notes["without audio (marked as absent)"] += 1
        audio = None
    if is_video or audio is not None:
        latents = SampledLatents(
            latents_of(fields)[None] if is_video else None, None if audio is None else latents_of(audio)[None]
        )
        decoded = decode_sample(latents, decoders.needed_by(latents), seed)
        write_sample(clip.target.parent, clip.target.name, decoded, float(fields.get("fps", 1.0)))
    report.add(_STAGE, "done")
