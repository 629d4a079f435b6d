"""Converts the `validation` section of the LTX Trainer, whose keys were renamed over time."""

from ltx_titan.commands.ltx_schema import Table
from ltx_titan.config.errors import Problem

OLDER_SAMPLES = (
    "prompts",
    "images",
    "reference_videos",
    "reference_downscale_factor",
    "include_reference_in_output",
)
"""Deprecated keys that `samples` replaced."""

# Deprecated key -> ending of the keys that replaced it.
_DEPRECATED_GUIDANCE = {"guidance_scale": "cfg_scale", "stg_scale": "stg_scale", "stg_mode": "stg_scale"}


def validation_table(section: Table) -> tuple[Table, list[Problem]]:
    """Converts the section, deprecated keys included.

    Returns:
        The keys of our `[validation]` and the problems found.
    """
    table = {key: value for key, value in section.items() if key not in (*OLDER_SAMPLES, *_DEPRECATED_GUIDANCE)}
    problems = []
    for key, ending in _DEPRECATED_GUIDANCE.items():
        newer = [name for name in section if name.endswith(f"_{ending}")]
        if section.get(key) is not None and newer:
            expected = f"unset together with {' and '.join(newer)}"
            problems.append(Problem(f"validation.{key}", section[key], expected, "remove the older key"))
    if (scale := section.get("guidance_scale")) is not None:
        table |= {"video_cfg_scale": scale, "audio_cfg_scale": scale}
    # Either key alone enables the older form, with the default of the other.
    if "stg_scale" in section or "stg_mode" in section:
        scale = section.get("stg_scale", 1.0)
        table |= {"video_stg_scale": scale, "audio_stg_scale": 0.0 if section.get("stg_mode") == "stg_v" else scale}
    if "stg_blocks" in table and table["stg_blocks"] is None:
        table["stg_blocks"] = "all"
    # The older lists count only without `samples`, as in the LTX Trainer.
    if not table.get("samples"):
        samples, wrong = _samples_of_prompts(section)
        problems += wrong
        table["samples"] = samples
    table["samples"] = [_sample(sample) for sample in table["samples"]]
    if not table["samples"]:
        del table["samples"]
    return table, problems


def _samples_of_prompts(section: Table) -> tuple[list[Table], list[Problem]]:
    """Samples from the deprecated lists `prompts`, `images` and `reference_videos`."""
    prompts, problems = section.get("prompts", []), []
    samples: list[Table] = [{"prompt": prompt, "conditions": []} for prompt in prompts]
    for key in ("images", "reference_videos"):
        files = section.get(key)
        if files is None:
            continue
        if len(files) != len(prompts):
            expected = f"one entry for each of the {len(prompts)} prompts"
            problems.append(Problem(f"validation.{key}", files, expected, "make the lists equally long"))
        # Not strict: a difference in length is reported above, with all other problems.
        for sample, file in zip(samples, files, strict=False):
            if key == "images":
                sample["conditions"].append({"type": "first_frame", "image_or_video": file})
            else:
                reference = {"type": "reference", "video": file}
                reference["downscale_factor"] = section.get("reference_downscale_factor", 1)
                reference["include_in_output"] = section.get("include_reference_in_output", False)
                sample["conditions"].append(reference)
    return samples, problems


def _sample(sample: Table) -> Table:
    """Removes unset keys; a seed of 0 means the seed of the section in the LTX Trainer."""
    kept = {key: value for key, value in sample.items() if value is not None}
    if kept.get("seed") == 0:
        del kept["seed"]
    if "conditions" in kept:
        conditions = [{k: v for k, v in c.items() if v is not None} for c in kept.pop("conditions")]
        kept |= {"conditions": conditions} if conditions else {}
    return kept
