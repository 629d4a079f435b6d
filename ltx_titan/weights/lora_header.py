"""Metadata of LoRA files: base model, rank, alpha, trigger word, license and the job that trained the adapter.

The keys are those that model managers read: `modelspec.*` (Stability AI's model specification, version 1.0.1) and the
`ss_*` keys of kohya's scripts. Facts without a common key have the prefix `ltx_titan.`. Inference tools ignore all of
them. Nothing here depends on the time, so that the same adapter gives the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ltx_titan.weights.metadata import ModelSource

JOB_DIGEST = "ltx_titan.job_digest"
_ALPHA = "ltx_titan.alpha"
_BASES = ("ss_sd_model_name", "modelspec.base_model", "ss_base_model_version", "modelspec.architecture")
_TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_phrase", "trigger_word")
_LICENSES = ("modelspec.license", "license")


@dataclass(frozen=True)
class LoRAFacts:
    """Origin of a LoRA file; None for what it does not state.

    Attributes:
        base: file name or generation of the base model.
        alpha: alpha of the training, as stated; the factor that readers apply is `LoRALayer.scale`.
        trigger: trigger word.
        license: license.
        job_digest: digest of the job that trained it.
    """

    base: str | None
    alpha: str | None
    trigger: str | None
    license: str | None
    job_digest: str | None

    @classmethod
    def read(cls, header: Mapping[str, str]) -> "LoRAFacts":
        """Reads the metadata of a file of any trainer."""

        def first(keys: Iterable[str]) -> str | None:
            return next((header[key].strip() for key in keys if header.get(key, "").strip()), None)

        return cls(
            base=first(_BASES),
            alpha=first((_ALPHA, "ss_network_alpha")),
            trigger=first(_TRIGGERS),
            license=first(_LICENSES),
            job_digest=first((JOB_DIGEST,)),
        )


def lora_header(
    source: ModelSource,
    *,
    title: str,
    rank: int | None,
    alpha: float,
    job: Mapping[str, Any] | None = None,
    trigger: str | None = None,
    license_: str | None = None,
) -> dict[str, str]:
    """Metadata entries of a LoRA file.

    Args:
        source: of the base model.
        title: name of the adapter.
        rank: of all layers; None if they have different ones, which kohya's files call Dynamic.
        alpha: of the training, which is multiplied into B: `ss_network_alpha`, from which readers compute the scale of
            what is stored, is therefore the rank.
        job: the job that trained it, for its digest; None for one that was not trained.
        trigger: trigger word of its captions.
        license_: of the adapter; by default that of the base, if its file states one.
    """
    generation = model_generation(source)
    base = generation if source.path is None else source.path.name
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{generation}/lora",
        "modelspec.implementation": "https://github.com/Lightricks/LTX-2",
        "modelspec.title": title,
        "ss_base_model_version": generation,
        "ss_sd_model_name": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic" if rank is None else str(rank),
        "ss_network_alpha": "Dynamic" if rank is None else str(rank),
        "ss_output_name": title,
        _ALPHA: f"{alpha:g}",
    }
    if job is not None:
        header[JOB_DIGEST] = job_digest(job)
    license_ = license_ or source.metadata.get("license")
    if license_:
        header["modelspec.license"] = license_
    if trigger:
        header["modelspec.trigger_phrase"] = trigger
    return header


def model_generation(source: ModelSource) -> str:
    """Generation of a base model, such as `ltx-2.3`, from the version in its metadata; `ltx-2` without one."""
    numbers = source.metadata.get("model_version", "").replace("-", ".").split(".")
    return "ltx-" + ".".join(numbers[:2]) if len(numbers) > 1 and numbers[0].isdecimal() else "ltx-2"


def job_digest(job: Mapping[str, Any]) -> str:
    """Digest of a job's values: equal jobs have equal digests, whatever the order and comments of their files."""
    text = json.dumps(job, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
