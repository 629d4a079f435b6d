"""Rules between the fields of `[data]` and those of other sections; see rules.py."""

from collections.abc import Iterator
from pathlib import Path

from ltx_titan.config.errors import MISSING, Problem, must_be_file
from ltx_titan.config.job import JobConfig


def data_rules(job: JobConfig) -> Iterator[Problem]:
    """Rules of `[data]`, its sources and its media."""
    data = job.data
    if data.sources:
        yield from _source_rules(job)
        return
    if data.source == "precomputed":
        if data.root is None:
            yield Problem(
                "data.root",
                MISSING,
                "the folder of a preprocessed dataset",
                'set it, or set data.source = "synthetic" for a benchmark',
            )
        elif not Path(data.root).is_dir():
            yield Problem("data.root", data.root, "a folder that exists", "correct the path, or preprocess the data")
        return
    if data.source == "media":
        yield from _media_rules(job)
    for name, block in (("video", job.video), ("audio", job.audio)):
        if block is not None and block.loss_mask_dir is not None:
            yield Problem(
                f"{name}.loss_mask_dir",
                block.loss_mask_dir,
                f'unset with data.source = "{data.source}", which does not provide masks',
                'remove it, or set data.source = "precomputed"',
            )
        for index, condition in enumerate(block.conditions if block is not None else ()):
            # Both are read from folders of prepared samples.
            if condition.type in ("mask", "reference"):
                yield Problem(
                    f"{name}.conditions[{index}].type",
                    condition.type,
                    f'a condition without files, which data.source = "{data.source}" does not provide',
                    'remove the condition, or set data.source = "precomputed"',
                )


def _source_rules(job: JobConfig) -> Iterator[Problem]:
    data = job.data
    for key, value, expected in (
        ("source", data.source, '"precomputed" with data.sources, which are prepared datasets'),
        ("root", data.root, "unset with data.sources, which have a root each"),
    ):
        if value not in (None, "precomputed"):
            yield Problem(f"data.{key}", value, expected, "remove it, or remove data.sources")
    streams = {name: block for name, block in (("video", job.video), ("audio", job.audio)) if block is not None}
    labels: dict[str, int] = {}
    for number, source in enumerate(data.sources):
        key = f"data.sources[{number}]"
        if not Path(source.root).is_dir():
            yield Problem(
                f"{key}.root", source.root, "a folder that exists", "correct the path, or preprocess the data"
            )
        if source.weight is not None and source.repeats is not None:
            yield Problem(f"{key}.repeats", source.repeats, f"unset with weight = {source.weight}", "keep one of them")
        elif source.weight is None and any(other.weight is not None for other in data.sources):
            what = "a weight, because other sources have one"
            yield Problem(f"{key}.weight", MISSING, what, "set it, or use repeats for all sources")
        if (other_number := labels.setdefault(source.label, number)) != number:
            what = f"another name than that of data.sources[{other_number}]"
            yield Problem(f"{key}.name", source.label, what, "set name in one of them")
        trained = [n for n, block in streams.items() if block.is_generated and source.modality in ("all", n)]
        if streams and not trained:
            what = "a stream that the job generates, or the source trains nothing"
            yield Problem(f"{key}.modality", source.modality, what, "change it, or remove the source")
        for name, conditions in (("video", source.video_conditions), ("audio", source.audio_conditions)):
            if not conditions:
                continue
            reason = ""
            if name not in streams:
                reason = f"the job has no [{name}]"
            elif source.modality not in ("all", name):
                reason = f'the source has modality = "{source.modality}"'
            elif not streams[name].is_generated and any(c.type != "reference" for c in conditions):
                reason = f"[{name}] has is_generated = false, so all of its tokens are clean already"
            if reason:
                kinds = ", ".join(condition.type for condition in conditions)
                yield Problem(f"{key}.{name}_conditions", kinds, f"unset, because {reason}", "remove them")


def _media_rules(job: JobConfig) -> Iterator[Problem]:
    media = job.data.media
    for key, remedy in (
        ("dataset_path", "set it to the table of clips and captions"),
        ("text_encoder_path", "set it to a folder of Gemma 3, or to the packed text encoder of LTX-2.5"),
        ("resolution_buckets", 'set it to the shapes that clips are resized and cropped to, for example "768x448x89"'),
    ):
        if getattr(media, key) is None:
            yield Problem(f"data.media.{key}", MISSING, 'a value, because data.source = "media"', remedy)
    for key in ("dataset_path", "video_vae_path", "audio_vae_path"):
        if (path := getattr(media, key)) is not None:
            yield from must_be_file(f"data.media.{key}", path)
    if media.text_encoder_path is not None and not Path(media.text_encoder_path).exists():
        yield Problem("data.media.text_encoder_path", media.text_encoder_path, "a path that exists", "correct it")
    if job.model.init == "random":
        yield Problem(
            "model.init",
            "random",
            '"checkpoint" with data.source = "media", which loads the encoders of a checkpoint',
            'set model.checkpoint_path, or set data.source = "synthetic"',
        )
    if job.video is None:
        yield Problem(
            "data.source",
            "media",
            '"precomputed" for a job without [video], because audio latents are small',
            "prepare the data with ltx-titan process-dataset",
        )
