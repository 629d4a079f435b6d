"""Command lines of `ltx-titan process-dataset` and its two halves, `process-videos` and `process-captions`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ltx_titan.commands.process.options import CaptionOptions, DataOptions, MediaOptions
from ltx_titan.commands.process.pipeline import process, report_and_status
from ltx_titan.common.options import Group

_DATASET_DESCRIPTION = """\
Prepare a dataset for training: encode videos (or still images), their audio and their captions once, so that training
reads latents and text features instead of running the encoders in every step.

The table has one row per sample (.csv, .json: a list of objects, .jsonl). Paths are relative to its folder. In its
place, a folder of clips with a caption NAME.txt beside each can be given.
  video or media_path   a video or image                                          -> latents/, audio_latents/
  caption               description of the images and the audio                    -> conditions/
  audio                 an audio file, used instead of the video's own             -> audio_latents/
  reference_video       for in-context training: an edge video, a sketch          -> reference_latents/
  reference_audio       likewise, a voice                                         -> reference_audio_latents/
  video_mask            image or video, white = conditioned, black = generated    -> video_masks/
  audio_mask            audio (loud = conditioned) or .pt tensor                  -> audio_masks/
A dataset of audio only needs audio and caption; all other columns are optional.

Each clip is assigned to the bucket with the closest aspect ratio that it has enough frames for; it is scaled to cover
it and cropped around the center, and its first frames are taken at its own frame rate. Of clips that are longer,
--windows makes several samples. Files that cannot be read are reported at the end and skipped; with --strict the exit
status then is 1.

An interrupted run resumes where it stopped when it is started again. With several GPUs, start the same command under
torchrun: each process then has its own GPU and does its share.

examples:
  # what would happen, per bucket, and what would be skipped and why; loads no model
  ltx-titan process-dataset clips/dataset.jsonl --resolution-buckets "768x448x89;448x768x89" --dry-run \\
      --model-path ltx-2.3-22b-dev.safetensors --text-encoder-path gemma-3-12b-it-qat-q4_0-unquantized
  # on all eight GPUs of a machine
  torchrun --nproc-per-node 8 -m ltx_titan.cli process-dataset clips/dataset.jsonl ...
  # still images for a LoRA with a trigger word
  ltx-titan process-dataset photos/dataset.csv --resolution-buckets "960x544x1" --lora-trigger "SKSDOG" ...
  # phone videos of varying frame rate; a 24 GB GPU
  ltx-titan process-dataset phone/dataset.csv --resolution-buckets "768x448x89" --fps 24 \\
      --text-encoder-precision int8 --vae-tiling ...
  # long takes: at most 8 samples of each, evenly spread
  ltx-titan process-dataset takes --resolution-buckets "768x448x89" --windows 8 ...
  # half a million clips: few large files, finished contexts
  torchrun ... process-dataset big/dataset.jsonl --shard-size 64 --contexts ...
"""

_VIDEOS_DESCRIPTION = """\
Encode the videos, images, audio, references and masks of a dataset, and no captions: the media half of process-dataset,
for when captions are still being written or the text encoder runs on another machine. Captions may be missing. Columns,
buckets and outputs are those of process-dataset; process-captions does the rest, with the same table and --output-dir.

examples:
  ltx-titan process-videos clips/dataset.jsonl --resolution-buckets "768x448x89" \\
      --model-path ltx-2.3-22b-dev.safetensors
  # in-context training: edge videos of half the size and half the frames as references
  ltx-titan process-videos edges/dataset.csv --resolution-buckets "768x512x97" \\
      --reference-downscale-factor 2 --reference-temporal-scale-factor 2 ...
  # audio only, in durations that can share a batch
  ltx-titan process-videos audio/dataset.csv --audio-durations "2.0;4.0;8.0" ...
  torchrun --nproc-per-node 8 -m ltx_titan.cli process-videos clips/dataset.jsonl ...
"""

_CAPTIONS_DESCRIPTION = """\
Encode the captions of a dataset to conditions/, and nothing else: the text half of process-dataset, for after captions
were rewritten (with --overwrite), or for a machine whose memory holds the text encoder. Media files are not opened; a
sample is named after its video, or its audio without videos.

Captions are truncated to 1,024 tokens. The stored features are inputs of the checkpoint's text connectors, which
training runs in every step; with --contexts the outputs of the connectors are stored.

examples:
  ltx-titan process-captions clips/dataset.jsonl --model-path ltx-2.3-22b-dev.safetensors \\
      --text-encoder-path gemma-3-12b-it-qat-q4_0-unquantized
  # new captions, with a trigger word, for videos that are encoded already
  ltx-titan process-captions clips/dataset.jsonl --overwrite --lora-trigger "SKSDOG" --remove-llm-prefixes ...
  torchrun --nproc-per-node 8 -m ltx_titan.cli process-captions clips/dataset.jsonl ...
"""


@dataclass(frozen=True)
class DatasetOptions:
    """Options of `ltx-titan process-dataset`."""

    data: Group[DataOptions]
    media: Group[MediaOptions]
    captions: Group[CaptionOptions]


@dataclass(frozen=True)
class VideosOptions:
    """Options of `ltx-titan process-videos`."""

    data: Group[DataOptions]
    media: Group[MediaOptions]


@dataclass(frozen=True)
class CaptionsOptions:
    """Options of `ltx-titan process-captions`."""

    data: Group[DataOptions]
    captions: Group[CaptionOptions]


def process_dataset(options: DatasetOptions) -> int:
    """Runs `ltx-titan process-dataset`; the exit status is that of `report_and_status`."""
    report = process(options.data, options.media, options.captions)
    return report_and_status(report, "process-dataset", options.data)


def process_videos(options: VideosOptions) -> int:
    """Runs `ltx-titan process-videos`; the exit status is that of `report_and_status`."""
    return report_and_status(process(options.data, options.media), "process-videos", options.data)


def process_captions(options: CaptionsOptions) -> int:
    """Runs `ltx-titan process-captions`; the exit status is that of `report_and_status`."""
    report = process(options.data, captions=options.captions)
    return report_and_status(report, "process-captions", options.data)


class Command(NamedTuple):
    """One command of this module, with the names that `ltx_titan.cli` expects of a module with a single command."""

    DESCRIPTION: str
    run: Callable[[Any], int]


DATASET = Command(_DATASET_DESCRIPTION, process_dataset)
VIDEOS = Command(_VIDEOS_DESCRIPTION, process_videos)
CAPTIONS = Command(_CAPTIONS_DESCRIPTION, process_captions)
