"""The trained pack generates what its captions say: codecs, text, sampler, cross-modal attention and LoRA, by score.

Broken once by hand: without the output of cross-modal attention (a closed gate) both scores fail, with a schedule
shifted the wrong way (by 1/6) shapes do. A shift by 3 of the timesteps alone fails no score: the miniature sees from
its input how noisy it is. Without the adapters of a LoRA file, or with their sign or scale wrong, the concept's score
fails; without their gradients the loss does.
"""

import json
from pathlib import Path

import pytest
import torch

from ltx_titan.benchmarks.nano.scores import Sampler
from ltx_titan.benchmarks.nano.transformer import Contexts, StepLoss, concept_clips, encode_clips, short_contexts
from ltx_titan.codecs import load_audio_codec, load_text_encoder, load_video_codec, load_vocoder
from ltx_titan.commands.sample import NO_GUIDANCE
from ltx_titan.conditioning import Grid, audio_steps
from ltx_titan.config import LoRASection, ValidationSection
from ltx_titan.diffusion import Guidance
from ltx_titan.lora import adapters, apply_lora, init_lora_
from ltx_titan.model import LTXTransformer
from ltx_titan.nano.archive import unpack_trained_nano
from ltx_titan.nano.clip_score import adherence, agreement
from ltx_titan.nano.clips import FPS, FRAMES, SECONDS, Clips, combinations, draw_clips
from ltx_titan.validation import Contexts as PromptContexts
from ltx_titan.validation import PreparedSample, audio_start, begin, sample_all, schedule_of, video_start
from ltx_titan.validation.prompts import prompt_contexts
from ltx_titan.weights import fused_loras, load_parameters, read_metadata
from tests.golden_cases import assert_close_to_max
from tests.validation.diffusers_pack import diffusers_pipeline

STEPS = 5
# LoRA of the concept, of rank 4 on the video's layers; docs/benchmarks/log.md has the command that trains it.
LORA = Path(__file__).parent / "concept_lora.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return unpack_trained_nano(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def clips():
    """Two held-out combinations, one horizontal and one vertical."""
    among = [c for c in combinations(held_out=True) if c.background == 0 and c.shape in (0, 1)]
    drawn = draw_clips(12, 3, among)
    chosen = [next(i for i, motion in enumerate(drawn.motion.tolist()) if motion // 2 == axis) for axis in (0, 1)]
    return drawn[torch.tensor(chosen)]


@pytest.fixture(scope="module")
def rings():
    """Two clips of the concept, which the pack has never seen."""
    # The LoRA is trained so little that it draws three of eight: two of these.
    return concept_clips(8, seed=11)[torch.tensor([0, 2])]


@pytest.fixture(scope="module")
def model(trained):
    model = LTXTransformer.from_config(read_metadata(trained).config["transformer"])
    load_parameters(model, trained)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def captions(clips, rings):
    return [*clips.captions, *rings.captions, ""]


@pytest.fixture(scope="module")
def texts(trained, captions, tmp_path_factory):
    return prompt_contexts(
        captions,
        checkpoint_path=trained,
        text_encoder_path=trained.parent / "text_encoder",
        cache_folder=tmp_path_factory.mktemp("contexts"),
        device="cpu",
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def codecs(trained):
    return load_video_codec(trained, "cpu", torch.float32), load_audio_codec(trained)


@pytest.fixture(scope="module")
def contexts(captions, texts):
    # The last row would be that of no caption, which sampling does not use.
    video, audio = (torch.cat([texts[caption][stream] for caption in [*captions, ""]]) for stream in (0, 1))
    (video, mask), (audio, _) = short_contexts(video), short_contexts(audio)
    return Contexts(video, audio, mask, {caption: i for i, caption in enumerate(captions)})


@pytest.fixture(scope="module")
def sampler(trained, contexts, codecs):
    return Sampler(contexts, *codecs, load_vocoder(trained), "cpu", STEPS)


def test_video_and_audio_follow_held_out_captions(sampler, model, clips):
    found = adherence(sampler.measure(model, clips), clips)
    assert {name: value for name, value in found.items() if value < 1} == {}


def test_audio_follows_the_video_it_is_generated_for_without_a_caption(sampler, model, clips):
    found = agreement(sampler.measure(model, clips, "v2a", captioned=False))
    assert all(flags.all() for flags in found.values()), found


def test_a_lora_file_adds_its_concept_and_keeps_what_the_pack_knows(sampler, model, clips, rings):
    # Video for given audio: none to generate and to decode. The pack alone draws rings for none of 96 captions.
    both = Clips.join([rings, clips])
    with fused_loras(model, [(LORA, 1.0)]):
        found = sampler.measure(model, both, "a2v")
    assert found.shape.tolist() == both.shape.tolist()
    assert found.motion.tolist() == both.motion.tolist()


def test_training_a_lora_teaches_its_concept(trained, contexts, codecs, rings):
    model = LTXTransformer.from_config(read_metadata(trained).config["transformer"])
    load_parameters(model, trained)
    apply_lora(model, LoRASection(rank=4, alpha=4.0, base_dtype="float32", targets=("video", "video_ffn")))
    init_lora_(model, seed=0)
    latents = encode_clips(rings, contexts, *codecs, "cpu")
    step, fixed = StepLoss(model, latents, contexts, 2), StepLoss(model, latents, contexts, 2, seed=1).inputs(0)

    def loss():
        with torch.no_grad():
            return float(step.loss(*fixed)["video"])

    before = loss()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for index in range(4):
        step.loss(*step.inputs(index))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss() < 0.8 * before
    for layer in adapters(model).values():
        layer.is_on = False
    assert loss() == pytest.approx(before, rel=1e-5)


def test_diffusers_generates_the_same_from_the_same_file(trained, model, clips, texts, codecs):
    caption, seed = clips.captions[0], 5
    section = ValidationSection(samples=[{"prompt": caption}], inference_steps=3, **NO_GUIDANCE)
    starts = video_start(Grid(4, 2, 2), float(FPS), (8, 32, 32)), audio_start(audio_steps(SECONDS))
    ours = sample_all(model, [PreparedSample(*starts, PromptContexts(*texts[caption]), seed)], section, "cpu")[0]

    config = read_metadata(trained).config
    pipeline = diffusers_pipeline(trained, config, *codecs)
    pipeline.set_progress_bar_config(disable=True)
    states, mask = load_text_encoder(trained.parent / "text_encoder", "cpu", torch.float32).encode([caption])
    generator = torch.Generator().manual_seed(seed)
    noise = [begin(start, texts[caption][0], None, Guidance(), generator, 1.0, "cpu").latent for start in starts]
    vae = codecs[1].vae
    theirs = pipeline(
        height=64,
        width=64,
        num_frames=FRAMES,
        frame_rate=float(FPS),
        sigmas=schedule_of(section)[:-1].tolist(),
        latents=noise[0],
        # The pipeline normalizes the audio that it receives.
        audio_latents=noise[1] * vae.latents_std + vae.latents_mean,
        prompt_embeds=states.flatten(2, 3),
        prompt_attention_mask=mask,
        guidance_scale=1.0,
        audio_guidance_scale=1.0,
        stg_scale=0.0,
        audio_stg_scale=0.0,
        modality_scale=1.0,
        audio_modality_scale=1.0,
        output_type="latent",
        return_dict=False,
    )
    for found, expected, codec, name in zip((ours.video, ours.audio), theirs, codecs, ("video", "audio"), strict=True):
        assert_close_to_max(found, (expected - codec.mean) / codec.std, 1e-4, name)


@pytest.mark.parametrize("pack", ["trained", "nano"])
def test_the_packs_have_what_loaders_of_the_released_files_require(request, pack):
    path = request.getfixturevalue(pack)
    config = read_metadata(path).config
    audio = config["audio_vae"]["model"]["params"]["ddconfig"]
    # Statistics are sized by this width there.
    assert audio["ch"] == 128
    for part in ("vocoder", "bwe"):
        assert config["vocoder"][part]["stereo"] is True
        assert all(len(dilations) == 3 for dilations in config["vocoder"][part]["resblock_dilation_sizes"])
    folder = path.parent / "text_encoder"
    described = json.loads((folder / "config.json").read_text())
    assert described["model_type"] == "gemma3"
    assert {"text_config", "vision_config"} <= set(described)
    assert json.loads((folder / "processor_config.json").read_text())["processor_class"] == "Gemma3Processor"
    assert (folder / "preprocessor_config.json").is_file()
