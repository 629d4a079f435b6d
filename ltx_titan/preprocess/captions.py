"""Stage: captions to `conditions/`: the features of both streams, before the connectors, and the token mask."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ltx_titan.codecs import TextEncoder
from ltx_titan.data import write_sample
from ltx_titan.data.layout import Value
from ltx_titan.model import FeatureExtractor
from ltx_titan.preprocess.report import Report
from ltx_titan.preprocess.rows import Sample
from ltx_titan.preprocess.store import is_whole


def caption_is_done(sample: Sample, output: Path) -> bool:
    """Whether the text features of a sample are there."""
    return is_whole(output / "conditions" / sample.key)


def process_captions(
    samples: Sequence[Sample],
    output: Path,
    text_encoder: TextEncoder,
    extractor: FeatureExtractor,
    report: Report,
    trigger: str | None = None,
) -> None:
    """Encode captions one at a time: the states of all of Gemma's layers are 400 MB for one already.

    Args:
        samples: a row without a caption fails, an empty one is encoded as such.
        output: root of the prepared data.
        text_encoder: Gemma.
        extractor: the checkpoint's projection.
        report: told about every caption.
        trigger: word put in front of every caption, with one space.
    """
    with report.progress("captions", len(samples)) as bar:
        for sample in samples:
            if sample.caption is None:
                report.fail("captions", f"row {sample.row} ({sample.media})", "has no caption")
            else:
                caption = with_trigger(sample.caption, trigger)
                write_sample(output / "conditions" / sample.key, text_fields(caption, text_encoder, extractor))
                report.add("captions", "done")
            bar.advance()


def with_trigger(caption: str, trigger: str | None) -> str:
    """Put a LoRA's trigger word in front of a caption."""
    word = (trigger or "").strip()
    return f"{word} {caption.strip()}".strip() if word else caption.strip()


@torch.no_grad()
def text_fields(caption: str, text_encoder: TextEncoder, extractor: FeatureExtractor) -> dict[str, Value]:
    """Fields of a text sample, bfloat16."""
    hidden_states, mask = text_encoder.encode([caption])
    video, audio = extractor(hidden_states, mask)
    return {
        "video_prompt_embeds": video[0].to(torch.bfloat16).cpu().contiguous(),
        "audio_prompt_embeds": audio[0].to(torch.bfloat16).cpu().contiguous(),
        "prompt_attention_mask": mask[0].to(torch.int64).cpu(),
    }
