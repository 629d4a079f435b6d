"""Trains the miniature pack: codecs, transformer, scores, and a LoRA of a concept it has never seen.

    ltx-titan bench nano OUT [--stages video audio vocoder transformer pack score lora] [--seconds 150 150 ...]

Each stage reads what earlier ones wrote to OUT and writes its weights and `<stage>.json`, so stages can run in separate
calls; `pack` writes what the package ships, and `unpack` starts from it: `--stages unpack score` scores the shipped
pack. Everything is rendered and kept on the device; no other files are read.
"""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltx_titan.benchmarks.measure import environment
from ltx_titan.benchmarks.nano import codecs, scores, transformer
from ltx_titan.benchmarks.nano.loop import write_result
from ltx_titan.codecs import AudioCodec, VideoCodec, load_audio_codec, load_video_codec, load_vocoder
from ltx_titan.common.options import Positional, default_device
from ltx_titan.lora import adapter_weights
from ltx_titan.model import LTXTransformer
from ltx_titan.nano.archive import TEXT_ENCODER_NAME, TRAINED_NAME, archive_pack, unpack_trained_nano
from ltx_titan.nano.trained_pack import (
    CODEC_MANTISSA_BITS,
    audio_codec,
    build_audio_vae,
    build_mono_vocoder,
    build_text_modules,
    build_transformer,
    build_video_vae,
    mono_vocoder,
    save_pack,
    stereo_vocoder,
    stored,
    video_codec,
    vocoder_of,
    write_trained_text_encoder,
)
from ltx_titan.weights import export_lora, load_parameters

DESCRIPTION = __doc__

_STAGES = ("video", "audio", "vocoder", "transformer", "pack", "score", "lora")
_SEED = 0
_VOCODER = "vocoder_of_one_channel.safetensors"


@dataclass(frozen=True)
class NanoTrainingOptions:
    """Options of `ltx-titan bench nano`."""

    out: Positional[Path]
    """Folder of weights and figures."""

    stages: tuple[str, ...] = _STAGES
    """Stages to run, in this order: these, or `unpack` instead of those that train weights."""

    seconds: tuple[float, ...] = (180.0, 150.0, 240.0, 480.0, 0.0, 0.0, 0.0)
    """Training time of each of these stages; `pack` and `score` train nothing, `lora` a number of steps."""

    batches: tuple[int, ...] = (64, 64, 16, 512, 0, 0, 8)
    """Clips per step of each of these stages."""

    rates: tuple[float, ...] = (1e-3, 1e-3, 1e-3, 1e-3, 0.0, 0.0, 4e-3)
    """Highest learning rate of each of these stages."""

    clips: int = 40000
    """Training clips of the transformer."""

    concept_clips: int = 48
    """Training clips of the concept."""

    known_clips: int = 48
    """Further clips of known shapes, lest they are forgotten."""

    concept_steps: int = 150
    """Training steps on the concept."""

    rank: int = 16
    """Rank of a LoRA of the concept."""

    targets: tuple[str, ...] = transformer.LORA_TARGETS
    """Layers that it adapts, as `lora.targets`."""

    methods: tuple[str, ...] = ("lora",)
    """Ways to learn the concept, each with an optional seed (`lora:1`): lora, lora_float8, lora_adamw8bit, full,
    full_float8, full_native, full_adamw8bit."""

    scored: int = 288
    """Clips of each score."""

    steps: int = 30
    """Sampling steps of scores."""

    compiled: bool = True
    """Compile the transformer's blocks (GPU)."""

    device: str = field(default_factory=default_device)
    """Device of everything."""


def run(options: NanoTrainingOptions) -> int:
    """Runs the stages; the exit status is 0."""
    # bf16 matmuls come from autocast; what stays in float32 may use TF32.
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(_SEED)
    options.out.mkdir(parents=True, exist_ok=True)
    given = zip(options.stages, options.seconds, options.batches, options.rates, strict=False)
    for stage, seconds, batch, lr in given:
        started = time.monotonic()
        # In training shapes never change, and the fastest 3-D convolutions are not those of the heuristics. Scores take
        # less time than the search.
        torch.backends.cudnn.benchmark = stage in ("video", "audio", "vocoder", "transformer")
        found = _RUNNERS[stage](options, seconds, batch, lr)
        found["stage_seconds"] = round(time.monotonic() - started, 1)
        write_result(options.out, stage, {**_facts(options, batch, lr), **found})
    return 0


def _facts(options: NanoTrainingOptions, batch: int, lr: float) -> dict[str, Any]:
    return {**environment(torch.device(options.device)), "commit": _commit(), "batch": batch, "lr": lr}


def _video(options: NanoTrainingOptions, seconds: float, batch: int, lr: float) -> dict[str, Any]:
    path = options.out / "video.safetensors"
    vae = _resumed(build_video_vae(), path)
    figures = codecs.train_video_vae(vae, options.device, seconds, batch, lr, save=lambda: _save(path, vae, {}))
    codec = codecs.measured_video_codec(vae, options.device)
    _save(path, vae, {"mean": codec.mean, "std": codec.std})
    held_out = codecs.held_out_clips(options.scored, options.device)
    return {"training": figures, "held_out": codecs.score_video(codec, held_out)}


def _audio(options: NanoTrainingOptions, seconds: float, batch: int, lr: float) -> dict[str, Any]:
    vae = _resumed(build_audio_vae(), options.out / "audio.safetensors")
    figures = codecs.train_audio_vae(vae, options.device, seconds, batch, lr)
    codec = codecs.measured_audio_codec(vae, options.device)
    _save(options.out / "audio.safetensors", vae, {"mean": codec.mean, "std": codec.std})
    return {"training": figures}


def _vocoder(options: NanoTrainingOptions, seconds: float, batch: int, lr: float) -> dict[str, Any]:
    generator = _resumed(build_mono_vocoder(), options.out / _VOCODER)
    codec = _load_audio(options)
    figures = codecs.train_vocoder(generator, codec, options.device, seconds, batch, lr)
    _save(options.out / _VOCODER, generator, {})
    held_out = codecs.held_out_clips(options.scored, options.device)
    return {"training": figures, "held_out": codecs.score_audio(codec, _load_vocoder(options), held_out)}


def _transformer(options: NanoTrainingOptions, seconds: float, batch: int, lr: float) -> dict[str, Any]:
    video, audio = _load_video(options), _load_audio(options)
    started = time.monotonic()
    contexts = _contexts(options)
    clips = transformer.training_clips(options.clips)
    latents = transformer.encode_clips(clips, contexts, video, audio, options.device)
    prepared = time.monotonic() - started
    print(f"transformer  {len(clips)} clips and {len(contexts.rows)} captions encoded in {prepared:.1f} s", flush=True)
    path = options.out / "transformer.safetensors"
    model = _resumed(build_transformer(_SEED), path)
    compiled = options.compiled and options.device != "cpu"
    figures = transformer.train_transformer(
        model,
        latents,
        contexts,
        seconds=seconds,
        batch=batch,
        lr=lr,
        compiled=compiled,
        save=lambda: _save(path, model, {}, 7),
    )
    _save(path, model, {}, 7)
    return {"encoding_seconds": round(prepared, 1), "clips": len(clips), "training": figures}


def _pack(options: NanoTrainingOptions, seconds: float, batch: int, lr: float) -> dict[str, Any]:
    """Writes the official file of all parts, and the archive that the package ships."""
    path = options.out / TRAINED_NAME
    parts = _load_video(options), _load_audio(options), _load_vocoder(options)
    model = _load(build_transformer(_SEED), options.out / "transformer.safetensors")[0]
    facts = {"recipe": "ltx-titan bench nano", "commit": _commit()}
    save_pack(path, *parts, model, build_text_modules(_SEED), facts)
    archive = options.out / "nano_trained.tar.xz"
    archive_pack(options.out, archive)
    return {"bytes": path.stat().st_size, "archive_bytes": archive.stat().st_size}


def _unpack(options: NanoTrainingOptions, seconds: float, batch: int, lr: float) -> dict[str, Any]:
    """Writes the weights of the pack that the package ships as earlier stages would have."""
    path = unpack_trained_nano(options.out)
    video, audio = load_video_codec(path, dtype=torch.float32), load_audio_codec(path)
    _save(options.out / "video.safetensors", video.vae, {"mean": video.mean, "std": video.std})
    _save(options.out / "audio.safetensors", audio.vae, {"mean": audio.mean, "std": audio.std})
    stereo = load_vocoder(path).model
    assert isinstance(stereo, LTX2VocoderWithBWE)
    _save(options.out / _VOCODER, mono_vocoder(stereo), {})
    model = build_transformer(_SEED)
    load_parameters(model, path)
    _save(options.out / "transformer.safetensors", model, {}, 7)
    return {}


def _score(options: NanoTrainingOptions, seconds: float, batch: int, lr: float) -> dict[str, Any]:
    sampler, model = _sampler(options), _load_transformer(options)
    found: dict[str, Any] = scores.score_model(sampler, model, options.scored, options.device)
    untrained = _for_sampling(build_transformer(_SEED), options)
    found["held_out_untrained"] = scores.score_untrained(sampler, untrained, options.scored, options.device)
    shown = scores.shown_clips()[0].to(options.device)
    scores.save_sheet(options.out / "held_out.png", sampler(model, shown, cfg=scores.CFG_SCALE)[0])
    return found


def _lora(options: NanoTrainingOptions, seconds: float, batch: int, lr: float) -> dict[str, Any]:
    """LoRA and other methods on the concept, scored before and after.

    The first one's clips are shown, and its adapters saved as `concept_lora.safetensors`. Scores are written after each
    method: a call that runs out of time loses the last one only.
    """
    sampler, model = _sampler(options), _load_transformer(options)
    shown = scores.shown_clips()[1].to(options.device)
    found: dict[str, Any] = {"before": scores.score_concept(sampler, model, options.scored, options.device)}
    sheets = [sampler(model, shown, cfg=scores.CFG_SCALE)[0]]
    contexts, clips = _contexts(options), transformer.tuning_clips(options.concept_clips, options.known_clips)
    latents = transformer.encode_clips(clips, contexts, _load_video(options), _load_audio(options), options.device)
    for run in options.methods:
        method, _, seed = run.partition(":")
        model = _load_transformer(options)
        figures = transformer.train_concept(
            model,
            latents,
            contexts,
            method,
            int(seed or 0),
            steps=options.concept_steps,
            batch=batch,
            lr=lr,
            rank=options.rank,
            targets=options.targets,
        )
        found[run] = {"training": figures, **scores.score_concept(sampler, model, options.scored, options.device)}
        if len(sheets) == 1:
            sheets.append(sampler(model, shown, cfg=scores.CFG_SCALE)[0])
            scores.save_sheet(options.out / "concept.png", torch.cat(sheets, dim=4))
            if method.startswith("lora"):
                export_lora(adapter_weights(model), options.out / "concept_lora.safetensors")
        write_result(options.out, "lora", {**_facts(options, batch, lr), **found})
    return found


_Runner = Callable[[NanoTrainingOptions, float, int, float], dict[str, Any]]
_RUNNERS: dict[str, _Runner] = dict(
    zip(_STAGES, (_video, _audio, _vocoder, _transformer, _pack, _score, _lora), strict=True), unpack=_unpack
)


def _contexts(options: NanoTrainingOptions) -> transformer.Contexts:
    """Contexts of the captions of all clips that any stage uses."""
    folder = options.out / TEXT_ENCODER_NAME
    if not folder.exists():
        # The concept's word is spelled in bytes: the tokenizer has never seen it either.
        write_trained_text_encoder(folder, transformer.known_captions(), _SEED)
    used = (
        transformer.training_clips(max(options.clips, options.scored)),
        transformer.tuning_clips(options.concept_clips, options.known_clips),
        *scores.scored_clips(options.scored),
        *scores.shown_clips(),
    )
    captions = sorted({caption for clips in used for caption in clips.captions})
    return transformer.encode_captions(folder, build_text_modules(_SEED), options.device, captions)


def _sampler(options: NanoTrainingOptions) -> scores.Sampler:
    vocoder = _load_vocoder(options).to(options.device).eval()
    codec = _load_video(options), _load_audio(options)
    return scores.Sampler(_contexts(options), *codec, vocoder_of(vocoder), options.device, options.steps)


def _load_transformer(options: NanoTrainingOptions) -> LTXTransformer:
    model = _load(build_transformer(_SEED), options.out / "transformer.safetensors")[0]
    return _for_sampling(model, options)


def _for_sampling(model: LTXTransformer, options: NanoTrainingOptions) -> LTXTransformer:
    return model.requires_grad_(False).eval().to(options.device, transformer.dtype_on(options.device))


def _load_vocoder(options: NanoTrainingOptions) -> LTX2VocoderWithBWE:
    return stereo_vocoder(_load(build_mono_vocoder(), options.out / _VOCODER)[0])


def _load_video(options: NanoTrainingOptions) -> VideoCodec:
    vae, extra = _load(build_video_vae(), options.out / "video.safetensors")
    vae.requires_grad_(False).eval().to(options.device)
    return video_codec(vae, *(extra[name].flatten().to(options.device) for name in ("mean", "std")))


def _load_audio(options: NanoTrainingOptions) -> AudioCodec:
    vae, extra = _load(build_audio_vae(), options.out / "audio.safetensors")
    vae.requires_grad_(False).eval().to(options.device)
    return audio_codec(vae, *(extra[name].flatten().to(options.device) for name in ("mean", "std")))


def _resumed(module: Any, path: Path) -> Any:
    """Continues from the weights of an earlier call."""
    return _load(module, path)[0] if path.exists() else module


def _load(module: Any, path: Path) -> tuple[Any, dict[str, Tensor]]:
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    extra = {name.removeprefix("extra."): tensors.pop(name) for name in list(tensors) if name.startswith("extra.")}
    module.load_state_dict(tensors)
    return module, extra


def _save(path: Path, module: nn.Module, extra: dict[str, Tensor], bits: int = CODEC_MANTISSA_BITS) -> None:
    """Writes parameters with so many mantissa bits, as the pack does, buffers and extra tensors exactly."""
    parameters = {name for name, _ in module.named_parameters()}
    tensors = {
        name: (stored(tensor, bits) if name in parameters else tensor).cpu().contiguous()
        for name, tensor in module.state_dict().items()
    }
    # Copies: a loaded VAE has its statistics as buffers too.
    save_file(tensors | {f"extra.{name}": tensor.cpu().clone() for name, tensor in extra.items()}, path)


def _commit() -> str:
    """Commit of the recipe: of the checkout, or as the environment says where there is none."""
    if "LTX_TITAN_COMMIT" in os.environ:
        return os.environ["LTX_TITAN_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
