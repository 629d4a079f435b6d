"""Options of the `process-*` commands, in three groups: the dataset, its media, its captions."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from ltx_titan.codecs import TextPrecision
from ltx_titan.common.options import Flag, Maybe, Positional, default_device, placeholder
from ltx_titan.encode.clips import Reshape
from ltx_titan.tables.samples import table_folder


@dataclass(frozen=True)
class DataOptions:
    """Options of every process command."""

    dataset_path: Annotated[Positional[Path], placeholder("DATASET")]
    """Dataset table (.csv, .json or .jsonl), or a folder of clips with a caption NAME.txt beside each."""

    model_path: Path
    """Checkpoint (.safetensors) to be trained; with the text projection, and the VAEs unless they have own files."""

    output_dir: Maybe[Path] = None
    """Root of the prepared data. Default: .precomputed next to the table, or in the folder."""

    video_column: Annotated[Maybe[str], placeholder("NAME")] = None
    """Column of videos, which samples are named after. Default: video or media_path."""

    shard_size: Annotated[Maybe[int], placeholder("N")] = None
    """Put N samples into each file instead of one, for datasets of 100,000 clips and more; 64 is a good number.
    Training reads both formats. GPUs share whole shards."""

    num_workers: int = 2
    """Threads that decode files ahead of the encoder."""

    overwrite: Flag = False
    """Make samples again that exist already, all of them. Without it, those whose files or captions changed."""

    overwrite_changed: Flag = False
    """Make those samples again that were made with other options or another model, instead of refusing to mix them."""

    prune: Flag = False
    """Remove stored samples that no row asks for; with --dry-run, list them. Without it they are kept, out of
    training. Samples of other tables stay as long as their table exists."""

    dry_run: Flag = False
    """Load no model, write nothing: report what would be done, and what would be skipped and why."""

    strict: Flag = False
    """Exit with status 1 if any row or file was skipped; otherwise only if nothing could be prepared."""

    device: str = field(default_factory=default_device)
    """Device of the encoders. Under torchrun each process takes its own GPU."""

    @property
    def root(self) -> Path:
        """Root of the prepared data."""
        return self.output_dir or table_folder(self.dataset_path) / ".precomputed"


@dataclass(frozen=True)
class MediaOptions:
    """Options for videos and audio."""

    resolution_buckets: Annotated[Maybe[str], placeholder("WxHxF;...|auto")] = None
    """Shapes in pixels and frames; width and height are multiples of 32, frames 1, 9, 17, 25, ...; one frame for still
    images. `auto` proposes buckets from the clips and explains them; they change with the clips, so pass what it prints
    when clips are added. Needed for datasets with videos. Each additional bucket makes batches harder to fill."""

    fps: Annotated[Maybe[str], placeholder("RATE")] = None
    """Read every video at this rate (24, 23.976, 24000/1001), by dropping or repeating frames; needed for phone videos
    of varying rate. Default: the rate of each video, which the model receives."""

    reshape_mode: Reshape = "center"
    """Position of the crop if a clip does not match its bucket; random: one that differs between samples."""

    max_enlargement: Annotated[Maybe[float], placeholder("FACTOR")] = None
    """Reject clips that their bucket would enlarge more than this, for example 1.5. Default: report them."""

    max_crop: Annotated[Maybe[float], placeholder("SHARE")] = None
    """Reject clips of whose area cropping would remove more than this, for example 0.33. Default: report them."""

    windows: Annotated[str, placeholder("all|N|random")] = "1"
    """Samples made of a video that is longer than its bucket: 1, its start; all, one after the other; N, at most N of
    all, evenly spread; random, one at a start that differs between videos and is the same in every run."""

    window_stride: Annotated[Maybe[str], placeholder("FRAMES|SECONDSs")] = None
    """Distance between the starts of windows, in frames (48) or seconds (2.5s); windows overlap if it is shorter than
    their bucket. Default: the length of the bucket; for random, any frame."""

    skip_audio: Flag = False
    """Do not encode the audio of videos."""

    reference_layout: Flag = False
    """Write audio latents for Lightricks' trainer: none for clips without audio, which it skips, else all steps of the
    encoder, not padded. By default, clips without audio get a placeholder, which it takes for audio."""

    audio_durations: Annotated[Maybe[str], placeholder("S;...")] = None
    """Without videos: cut each audio file to the longest of these seconds that it reaches, for example '2.0;4.0;8.0';
    equal durations can share a batch. Default: encode each as long as it is."""

    reference_downscale_factor: Annotated[int, placeholder("N")] = 1
    """Make reference videos N times smaller."""

    reference_temporal_scale_factor: Annotated[int, placeholder("N")] = 1
    """Keep every N-th frame of reference videos, after the first."""

    video_vae_path: Maybe[Path] = None
    """Video VAE file of a split pack. Default: the checkpoint."""

    audio_vae_path: Maybe[Path] = None
    """Audio VAE file of a split pack. Default: the checkpoint."""

    vae_tiling: Flag = False
    """Encode large frames in tiles: less memory, faint seams."""


@dataclass(frozen=True)
class CaptionOptions:
    """Options for captions."""

    text_encoder_path: Path
    """Local folder of Gemma 3, or the packed text encoder file of LTX-2.5."""

    caption_column: Annotated[Maybe[str], placeholder("NAME")] = None
    """Column of captions. Default: caption."""

    lora_trigger: Annotated[Maybe[str], placeholder("WORD")] = None
    """Put this word in front of every caption."""

    remove_llm_prefixes: Flag = False
    """Remove 'The video shows', 'Caption:' and similar phrases from captions."""

    contexts: Flag = False
    """Store the outputs of the text connectors instead of their inputs, so that training needs no connectors in memory
    (4 GB for LTX-2.3). Other trainers do not read them."""

    text_encoder_precision: TextPrecision = "full"
    """Format of the text encoder's weights: full 24 GB, int8 or float8 13 GB, int4 8 GB of GPU memory; less memory is
    less exact."""

    load_text_encoder_in_8bit: Flag = False
    """Same as --text-encoder-precision int8."""

    @property
    def precision(self) -> TextPrecision:
        """Format of the text encoder's weights."""
        return "int8" if self.load_text_encoder_in_8bit else self.text_encoder_precision


def parse_fps(text: str | None) -> Fraction | None:
    """Parses a frame rate: `24`, `23.976` or `24000/1001`; None for None.

    Raises:
        ValueError: the text has another form, or is not positive.
    """
    if text is None:
        return None
    try:
        fps = Fraction(text)
    except (ValueError, ZeroDivisionError):
        fps = Fraction(0)
    if fps <= 0:
        raise ValueError(f"--fps = {text!r}: expected a positive number or fraction, as 24, 23.976 or 24000/1001")
    return fps


def parse_durations(text: str | None) -> tuple[float, ...]:
    """Parses seconds, `2.0;4.0;8.0`; empty for None.

    Raises:
        ValueError: the text has another form, or a number is not positive.
    """
    if text is None:
        return ()
    try:
        seconds = tuple(float(part) for part in text.split(";") if part.strip())
    except ValueError:
        seconds = ()
    if not seconds or not all(0 < duration < float("inf") for duration in seconds):
        raise ValueError(f"--audio-durations = {text!r}: expected positive seconds, as in '2.0;4.0;8.0'")
    return seconds
