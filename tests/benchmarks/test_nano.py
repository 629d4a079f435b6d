import torch

from ltx_titan.benchmarks.nano.transformer import Latents, StepLoss, encode_captions, known_captions, training_clips
from ltx_titan.nano.trained_config import MAX_TOKENS
from ltx_titan.nano.trained_pack import (
    build_mono_vocoder,
    build_text_modules,
    build_transformer,
    stereo_vocoder,
    write_trained_text_encoder,
)


def test_short_contexts_are_the_full_ones_to_the_transformer(tmp_path, generator):
    clips = training_clips(2)
    write_trained_text_encoder(tmp_path / "text", known_captions(), 0)
    contexts = encode_captions(tmp_path / "text", build_text_modules(0), "cpu", clips.captions)
    latents = Latents(
        torch.randn(2, 128, 4, 2, 2, generator=generator),
        torch.randn(2, 8, 25, 16, generator=generator),
        contexts.of(clips.captions, "cpu"),
    )
    step = StepLoss(build_transformer(0), latents, contexts, 2)
    *inputs, _, _, _ = step.inputs(0)
    rows = latents.captions
    full = contexts.fields(rows)
    assert full["video_prompt_embeds"].shape[1] == MAX_TOKENS
    with torch.no_grad():
        short = step.loss(*inputs, contexts.video[rows], contexts.audio[rows], contexts.mask[rows])["loss"]
        long = step.loss(*inputs, full["video_prompt_embeds"], full["audio_prompt_embeds"], torch.zeros(2, MAX_TOKENS))
        other = step.loss(*inputs, *(x.flip(0)[rows.flip(0)] for x in (contexts.video, contexts.audio, contexts.mask)))
    torch.testing.assert_close(short, long["loss"], rtol=2e-6, atol=0)
    # Words matter from the first step on.
    assert abs(other["loss"] - short) > 5e-5


def test_the_stereo_vocoder_does_for_each_channel_what_the_trained_one_does(generator):
    mono = build_mono_vocoder().eval()
    mel = torch.randn(1, 2, 8, 64, generator=generator)
    with torch.no_grad():
        expected = mono(mel[0, :, None])[:, 0]
        found = stereo_vocoder(mono).eval().vocoder(mel)[0]
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
