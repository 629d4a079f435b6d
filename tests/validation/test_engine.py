"""Every condition on the miniature pack: conditioned tokens survive, and the files have the requested form."""

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import Gemma3TextModel

from ltx_titan.config import ValidationSection
from ltx_titan.media import (
    Audio,
    MediaError,
    fit_frames,
    probe_video,
    read_audio,
    read_clip,
    read_image,
    to_duration,
    to_stereo,
    to_uint8,
    write_wav,
)
from ltx_titan.model import TextConnectors
from ltx_titan.validation.engine import Validation, prepare_validation
from tests.validation.conftest import CLIP

WIDTH, HEIGHT, FRAMES, FPS = 64, 64, 17, 24.0
VIDEO, AUDIO = {"video": str(CLIP)}, {"audio": str(CLIP)}
CONDITIONS = {
    "none": [],
    "first_frame": [
        {"type": "first_frame", "image_or_video": str(CLIP)},
        {"type": "keyframe", "at": "last", "image_or_video": "mask.png"},
        {"type": "keyframe", "at": 1, "image_or_video": str(CLIP)},
    ],
    "prefix": [{"type": "prefix", "num_frames": 9, **VIDEO}, {"type": "prefix", "duration": 0.2, **AUDIO}],
    "suffix": [{"type": "suffix", "num_frames": 8, **VIDEO}, {"type": "suffix", "duration": 0.2, **AUDIO}],
    "spatial_crop": [{"type": "spatial_crop", "spatial_region": [0, 32, 64, 64], **VIDEO}],
    "mask": [{"type": "mask", "mask": "mask.png", **VIDEO}, {"type": "mask", "mask": "mask.pt", **AUDIO}],
    "reference": [{"type": "reference", "include_in_output": True, **VIDEO}, {"type": "reference", **AUDIO}],
    "smaller_reference": [
        {"type": "reference", "downscale_factor": 2, "temporal_scale_factor": 2, "include_in_output": True, **VIDEO}
    ],
    "video_to_audio": [{"type": "video_to_audio", **VIDEO}],
    "audio_to_video": [{"type": "audio_to_video", **AUDIO}],
}


@dataclass
class Run:
    """One validation of all conditions."""

    validation: Validation
    latents: dict
    files: dict
    folder: object


def section_of(pack, samples, **fields):
    settings = {
        "video_dims": [WIDTH, HEIGHT, FRAMES],
        "frame_rate": FPS,
        "inference_steps": 2,
        "video_stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "video_modality_guidance_scale": 1.0,
        "audio_modality_guidance_scale": 1.0,
        "video_cfg_scale": 2.0,
        "audio_cfg_scale": 1.0,
        "negative_prompt": "blur",
        "text_encoder_path": pack.text_encoder_path,
    }
    return ValidationSection.model_validate({"samples": samples, **settings, **fields})


def prepare(pack, section, folder, **options):
    return prepare_validation(
        section,
        checkpoint_path=pack.path,
        config=pack.config,
        modalities="av",
        device="cpu",
        cache_folder=folder / "contexts",
        **options,
    )


@pytest.fixture(scope="module")
def run(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    mask = Image.new("RGB", (WIDTH, HEIGHT))
    mask.paste((255, 255, 255), (0, 0, WIDTH, 32))
    mask.save(folder / "mask.png")
    torch.save(torch.tensor([1.0, 0.0]), folder / "mask.pt")
    samples = []
    for conditions in CONDITIONS.values():
        made = [
            {key: str(folder / value) if str(value).startswith("mask.") else value for key, value in c.items()}
            for c in conditions
        ]
        samples.append({"prompt": "a rabbit", "conditions": made})
    validation = prepare(pack, section_of(pack, samples), folder)
    latents = validation.sample(pack.model)
    files = validation.write(latents, folder / "samples")
    return Run(
        validation,
        dict(zip(CONDITIONS, latents.values(), strict=True)),
        {name: file.path for name, file in zip(CONDITIONS, files, strict=True)},
        folder,
    )


@pytest.fixture(scope="module")
def clip_latents(video_codec):
    pixels = read_clip(CLIP, FRAMES, WIDTH, HEIGHT)
    return video_codec.encode(pixels[None])


@pytest.fixture(scope="module")
def audio_latents(audio_codec):
    """Of the first `seconds` of the clip's audio, or of another part of it."""

    def encode(seconds, start_s=0.0):
        audio = read_audio(CLIP)
        first = round(start_s * audio.sample_rate)
        part = to_duration(Audio(to_stereo(audio.waveform[:, first:]), audio.sample_rate), seconds)
        return audio_codec.encode(part.waveform[None], audio.sample_rate)[:, :, : audio_codec.steps_for(seconds)]

    return encode


DURATION = FRAMES / FPS


def same(found, expected):
    return torch.equal(found, expected)


def test_a_first_frame_survives(run, video_codec):
    encoded = video_codec.encode(read_clip(CLIP, 1, WIDTH, HEIGHT)[None])
    assert same(run.latents["first_frame"].video[:, :, :1], encoded)


def test_keyframes_are_encoded_with_a_past_and_survive(run, video_codec):
    found = run.latents["first_frame"].video
    clip = video_codec.encode(read_clip(CLIP, 9, WIDTH, HEIGHT)[None])
    image = fit_frames(read_image(run.folder / "mask.png"), WIDTH, HEIGHT).expand(-1, 9, -1, -1)
    assert same(found[:, :, 1:2], clip[:, :, 1:])
    assert same(found[:, :, 2:], video_codec.encode(image[None])[:, :, 1:])


def test_a_prefix_survives_in_both_streams(run, video_codec, audio_latents):
    encoded = video_codec.encode(read_clip(CLIP, 9, WIDTH, HEIGHT)[None])
    assert same(run.latents["prefix"].video[:, :, :2], encoded)
    assert same(run.latents["prefix"].audio[:, :, :5], audio_latents(0.2))


def test_a_suffix_survives_in_both_streams(run, clip_latents, audio_latents):
    assert same(run.latents["suffix"].video[:, :, -1:], clip_latents[:, :, -1:])
    whole = read_audio(CLIP)
    start_s = whole.duration_s - 0.2
    assert same(run.latents["suffix"].audio[:, :, -5:], audio_latents(0.2, start_s))


def test_a_crop_survives(run, clip_latents):
    assert same(run.latents["spatial_crop"].video[..., 1:], clip_latents[..., 1:])
    assert not same(run.latents["spatial_crop"].video[..., :1], clip_latents[..., :1])


def test_masked_parts_survive_in_both_streams(run, clip_latents, audio_latents):
    assert same(run.latents["mask"].video[:, :, :, :1], clip_latents[:, :, :, :1])
    assert not same(run.latents["mask"].video[:, :, :, 1:], clip_latents[:, :, :, 1:])
    audio, encoded = run.latents["mask"].audio, audio_latents(DURATION)
    half = audio.shape[2] // 2
    assert same(audio[:, :, :half], encoded[:, :, :half])
    assert not same(audio[:, :, half:], encoded[:, :, half:])


def test_a_frozen_stream_survives_and_the_other_is_generated(run, clip_latents, audio_latents):
    assert same(run.latents["video_to_audio"].video, clip_latents)
    assert same(run.latents["audio_to_video"].audio, audio_latents(DURATION))
    assert not same(run.latents["video_to_audio"].audio, run.latents["none"].audio)


def test_a_reference_changes_the_result_and_is_no_part_of_it(run):
    plain, with_reference = run.latents["none"], run.latents["reference"]
    assert plain.video.shape == with_reference.video.shape
    assert plain.audio.shape == with_reference.audio.shape
    assert not same(plain.video, with_reference.video)
    assert not same(plain.audio, with_reference.audio)


def test_a_reference_may_be_smaller_and_have_fewer_frames_as_in_training(run, video_codec):
    index = list(CONDITIONS).index("smaller_reference")
    start = run.validation.samples[index].video
    # Frames 0, 1, 3, ... 15 at half the size: 9 frames of 32 x 32, one latent cell each.
    pixels = read_clip(CLIP, FRAMES, WIDTH // 2, HEIGHT // 2)
    encoded = video_codec.encode(torch.cat([pixels[:, :1], pixels[:, 1::2]], dim=1)[None])
    assert same(start.references[0].tokens, encoded.flatten(2).mT)
    assert not same(run.latents["smaller_reference"].video, run.latents["none"].video)


@pytest.mark.parametrize("name", CONDITIONS)
def test_files_have_the_length_size_and_rates_that_were_asked_for(run, name):
    info = probe_video(run.files[name])
    assert info.frames == FRAMES
    assert info.fps == Fraction(24)
    assert (info.width, info.height) == (2 * WIDTH if "reference" in name else WIDTH, HEIGHT)
    audio = read_audio(run.files[name])
    assert audio.sample_rate == 48000
    # 18 latent steps are 69 spectrogram frames of 10 ms; AAC works in blocks of 1,024 samples.
    assert abs(audio.duration_s - 0.69) < 2 * 1024 / 48000


def test_a_reference_is_shown_next_to_the_result(run):
    shown = to_uint8(read_clip(run.files["reference"], 1, 2 * WIDTH, HEIGHT))[0, :, :WIDTH].float()
    frame = to_uint8(read_clip(CLIP, 1, WIDTH, HEIGHT))[0].float()
    # H.264 changes colors a little; the generated half of random weights is nothing like it.
    assert (shown - frame).abs().mean() < 12


def test_audio_alone_is_a_wav_and_a_single_frame_a_picture(pack, tmp_path, run):
    contexts = run.validation.samples[0].contexts
    known = {"a rabbit": (contexts.video, contexts.audio)}
    section = section_of(pack, [{"prompt": "a rabbit"}], generate_video=False, video_cfg_scale=1.0)
    (file,) = prepare(pack, section, tmp_path, contexts=known).run(pack.model, tmp_path, 1)
    assert file.path.name == "sample-01.wav"
    assert read_audio(file.path).sample_rate == 48000
    section = section_of(pack, [{"prompt": "a rabbit"}], video_dims=[64, 96, 1], video_cfg_scale=1.0)
    (file,) = prepare(pack, section, tmp_path, contexts=known).run(pack.model, tmp_path, 1)
    assert file.path.name == "sample-01.png"


def test_prompts_are_encoded_once_and_need_no_encoder_afterwards(pack, run):
    section = run.validation.section.model_copy(update={"text_encoder_path": None})
    again = prepare(pack, section, run.folder)
    assert same(again.samples[0].contexts.video, run.validation.samples[0].contexts.video)
    unknown = section.model_copy(update={"negative_prompt": "noise"})
    with pytest.raises(ValueError, match=r"text_encoder_path is unset, but prompt 'noise'"):
        prepare(pack, unknown, run.folder)
    before = text_encoders_in_memory()
    prepare(pack, unknown.model_copy(update={"text_encoder_path": pack.text_encoder_path}), run.folder)
    assert text_encoders_in_memory() <= before


def text_encoders_in_memory():
    gc.collect()
    return sum(type(thing) in (Gemma3TextModel, TextConnectors) for thing in gc.get_objects())


def test_a_run_is_in_tensorboard_under_its_step_and_prompt(pack, run, tmp_path):
    only = run.validation.section.model_copy(update={"samples": run.validation.section.samples[:1]})
    writer = SummaryWriter(tmp_path / "tensorboard")
    (file,) = prepare(pack, only, run.folder).run(pack.model, tmp_path, 40, writer=writer)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for part in ("video", "frames", "audio"):
        assert events.Tensors(f"sample-01/{part}")[0].step == 40
        assert events.SummaryMetadata(f"sample-01/{part}").display_name == "a rabbit"
    assert file.prompt == "a rabbit"


def test_averaged_weights_are_used_where_asked_for(pack, run, tmp_path):
    only = run.validation.section.model_copy(update={"samples": run.validation.section.samples[:1], "use_ema": True})
    validation = prepare(pack, only, run.folder)
    with pytest.raises(ValueError, match="has no averaged weights"):
        validation.run(pack.model, tmp_path, 1)

    @contextmanager
    def averaged():
        weight = pack.model.proj_out.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(20)
            yield
            weight.copy_(kept)

    (file,) = validation.run(pack.model, tmp_path, 1, averaged_weights=averaged)
    own, other = (read_clip(path, FRAMES, WIDTH, HEIGHT) for path in (run.files["none"], file.path))
    assert (own - other).abs().mean() > 0.08


def test_media_that_is_too_short_is_named_before_training(pack, run, tmp_path):
    write_wav(tmp_path / "short.wav", to_duration(read_audio(CLIP), 0.1))
    mask = {"type": "mask", "audio": str(tmp_path / "short.wav"), "mask": str(run.folder / "mask.pt")}
    section = section_of(pack, [{"prompt": "a rabbit", "conditions": [mask]}])
    with pytest.raises(MediaError, match=r"short\.wav: lasts 0\.10 s, the sample 0\.71 s"):
        prepare(pack, section, run.folder)
    crop = {"type": "video_to_audio", "video": str(CLIP)}
    section = section_of(pack, [{"prompt": "a rabbit", "conditions": [crop]}], video_dims=[64, 64, 137])
    with pytest.raises(MediaError, match=r"has 132 frames, 137 are needed"):
        prepare(pack, section, run.folder)


def test_videos_of_another_rate_than_their_sample_are_named(pack, run, caplog):
    condition = {"type": "video_to_audio", "video": str(CLIP)}
    section = section_of(pack, [{"prompt": "a rabbit", "conditions": [condition]}])
    prepare(pack, section.model_copy(update={"frame_rate": 25.0}), run.folder)
    assert "times as fast" not in caplog.text
    prepare(pack, section.model_copy(update={"frame_rate": 12.5}), run.folder)
    text = f"{CLIP.name} has 25 frames per second, of which the sample shows 12.5: its motion is 0.5 times as fast"
    assert text in caplog.text
