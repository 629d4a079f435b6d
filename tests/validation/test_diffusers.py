"""Sampling against diffusers' LTX2 pipeline, where its maths is the same.

It is the same for text to video and audio with one sigma in both streams and no conditions. Otherwise it differs, on
purpose:

- with conditioned tokens the modulation of cross-modal attention follows other sigmas there, either each
  token's own throughout or the other stream's throughout; here, as in the golden cases, scale and shift follow the
  token's own and the gate the other stream's. The last test shows that this is all that differs;
- the schedule follows the clip's size there (ours, like the released pipelines', does not; here both get the same);
- blocks to skip are one list for both streams; rescaling is per sample (the same for one).
"""

import pytest
import torch

from ltx_titan.codecs import load_text_encoder
from ltx_titan.commands.sample import NO_GUIDANCE
from ltx_titan.conditioning import Grid, audio_steps
from ltx_titan.config import ValidationSection
from ltx_titan.diffusion import Guidance
from ltx_titan.model import Modality, Perturbations
from ltx_titan.validation import (
    Contexts,
    PreparedSample,
    audio_start,
    begin,
    condition_frames,
    guidance_of,
    sample_all,
    schedule_of,
    video_start,
)
from ltx_titan.validation.prompts import prompt_contexts
from tests.golden_cases import assert_close_to_max
from tests.validation.diffusers_pack import diffusers_pipeline

PROMPTS = ("a rabbit in the grass", "blurred")
GRID, FPS, SEED = Grid(3, 2, 3), 24.0, 5


@pytest.fixture(scope="module")
def pipeline(pack, video_codec, audio_codec):
    made = diffusers_pipeline(pack.path, pack.config, video_codec, audio_codec)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def texts(pack, tmp_path_factory):
    """Ours: contexts. Theirs: hidden states of the text encoder, before projection and connectors."""
    contexts = prompt_contexts(
        PROMPTS,
        checkpoint_path=pack.path,
        text_encoder_path=pack.text_encoder_path,
        cache_folder=tmp_path_factory.mktemp("contexts"),
        device="cpu",
        dtype=torch.float32,
    )
    encoder = load_text_encoder(pack.text_encoder_path, "cpu", torch.float32)
    return contexts, [encoder.encode([prompt]) for prompt in PROMPTS]


@pytest.mark.parametrize("changes", [NO_GUIDANCE, {}], ids=["plain", "guided"])
def test_latents_equal_those_of_the_diffusers_pipeline(pack, pipeline, texts, video_codec, audio_codec, changes):
    section = ValidationSection(samples=[{"prompt": PROMPTS[0]}], inference_steps=3, stg_blocks=[1], **changes)
    steps = audio_steps(17 / FPS)
    video, audio = video_start(GRID, FPS, (8, 32, 32)), audio_start(steps)
    contexts, ((states, mask), (negative_states, negative_mask)) = texts
    prompt, negative = (contexts[name] for name in PROMPTS)
    prepared = PreparedSample(video, audio, Contexts(*prompt, *negative), SEED)
    ours = sample_all(pack.model, [prepared], section, "cpu")[0]

    generator = torch.Generator().manual_seed(SEED)
    noises = [
        begin(start, prompt[0], negative[0], guidance_of(section)[0], generator, 1.0, "cpu").latent
        for start in (video, audio)
    ]
    # The pipeline normalizes the audio that it receives.
    vae = audio_codec.vae
    raw_audio_noise = noises[1] * vae.latents_std + vae.latents_mean
    theirs_video, theirs_audio = pipeline(
        height=GRID.height * 32,
        width=GRID.width * 32,
        num_frames=17,
        frame_rate=FPS,
        sigmas=schedule_of(section)[:-1].tolist(),
        latents=noises[0],
        audio_latents=raw_audio_noise,
        prompt_embeds=states.flatten(2, 3),
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative_states.flatten(2, 3),
        negative_prompt_attention_mask=negative_mask,
        guidance_scale=section.video_cfg_scale,
        audio_guidance_scale=section.audio_cfg_scale,
        stg_scale=section.video_stg_scale,
        audio_stg_scale=section.audio_stg_scale,
        modality_scale=section.video_modality_guidance_scale,
        audio_modality_scale=section.audio_modality_guidance_scale,
        guidance_rescale=section.guidance_rescale,
        audio_guidance_rescale=section.guidance_rescale,
        spatio_temporal_guidance_blocks=[1],
        output_type="latent",
        return_dict=False,
    )
    theirs_video = (theirs_video - video_codec.mean) / video_codec.std
    theirs_audio = (theirs_audio - audio_codec.mean) / audio_codec.std
    assert_close_to_max(ours.video, theirs_video, 1e-5, "video")
    assert_close_to_max(ours.audio, theirs_audio, 1e-5, "audio")


@torch.no_grad()
def test_given_tokens_change_the_attention_between_the_streams_and_nothing_else(pack, pipeline, texts):
    sigma, steps = 0.7, audio_steps(17 / FPS)
    frame = torch.randn(1, 128, 1, GRID.height, GRID.width, generator=torch.Generator().manual_seed(0))
    starts = condition_frames(video_start(GRID, FPS, (8, 32, 32)), frame), audio_start(steps)
    generator = torch.Generator().manual_seed(SEED)
    streams = []
    for start, context in zip(starts, texts[0][PROMPTS[0]], strict=True):
        begun = begin(start, context, None, Guidance(), generator, sigma, "cpu")
        timesteps = begun.denoise_mask[..., 0] * sigma
        streams.append(Modality(begun.latent, torch.tensor([sigma]), timesteps, begun.positions, begun.context.float()))
    video, audio = streams

    def theirs(**options):
        return pipeline.transformer(
            hidden_states=video.latent,
            audio_hidden_states=audio.latent,
            encoder_hidden_states=video.context,
            audio_encoder_hidden_states=audio.context,
            timestep=video.timesteps * 1000,
            audio_timestep=audio.timesteps * 1000,
            sigma=video.sigma * 1000,
            audio_sigma=audio.sigma * 1000,
            video_coords=video.positions,
            audio_coords=audio.positions,
            return_dict=False,
            **options,
        )

    apart = [{"type": kind, "blocks": None} for kind in ("skip_a2v_cross_attn", "skip_v2a_cross_attn")]
    alone = pack.model(video, audio, Perturbations.from_lists([apart]))
    for name, found, expected in zip(("video", "audio"), alone, theirs(isolate_modalities=True), strict=True):
        assert_close_to_max(found, expected, 1e-5, f"{name}, streams apart")
    together = pack.model(video, audio, None)
    for use_cross_timestep in (False, True):
        (found, _), (expected, _) = together, theirs(use_cross_timestep=use_cross_timestep)
        assert (found - expected).abs().max() > 1e-4 * expected.abs().max()
