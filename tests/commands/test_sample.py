import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_titan.commands.sample import NO_GUIDANCE, SampleOptions, sample_clips
from ltx_titan.common.options import parse_options
from ltx_titan.media import probe_video, read_audio, read_clip
from ltx_titan.model import LTXTransformer
from ltx_titan.weights import fuse_lora, fused_loras, load_parameters, read_metadata

LAYER = "diffusion_model.proj_out"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Contexts of prompts, encoded once for all tests."""
    return tmp_path_factory.mktemp("contexts")


def run(nano, cache, folder, *options):
    (folder / ".contexts").symlink_to(cache)
    plain = folder / "plain.toml"
    plain.write_text("[validation]\n" + "".join(f"{key} = {value}\n" for key, value in NO_GUIDANCE.items()))
    base = [
        "--model-path",
        nano,
        "--text-encoder-path",
        nano.parent / "text_encoder",
        "--output-dir",
        folder,
        "--job",
        plain,
    ]
    size = ["--size", "64x64x9", "--steps", "2", "--stg-blocks", "1", "--negative-prompt", "blur", "--device", "cpu"]
    arguments = [str(part) for part in (*base, *size, *options)]
    return sample_clips(parse_options(SampleOptions, arguments, prog="sample", description=""))


def lora(path, scale):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{LAYER}.lora_A.weight": torch.randn(4, 128, generator=generator),
        f"{LAYER}.lora_B.weight": scale * torch.randn(128, 4, generator=generator),
    }
    save_file(tensors, path)
    return path


def pixels(file):
    return read_clip(file.path, 9, 64, 64)


def test_prompts_become_clips(nano, cache, tmp_path):
    first, second = run(nano, cache, tmp_path, "--prompt", "a rabbit", "--prompt", "a hill", "--frame-rate", "12.5")
    assert [file.path.name for file in (first, second)] == ["sample-01.mp4", "sample-02.mp4"]
    info = probe_video(first.path)
    assert (info.frames, info.width, info.height, float(info.fps)) == (9, 64, 64, 12.5)
    assert read_audio(second.path).sample_rate == 48000


def test_a_lora_changes_the_clip_and_an_empty_one_does_not(nano, cache, tmp_path):
    found = {}
    for name, options in (
        ("base", ()),
        ("empty", ("--lora", lora(tmp_path / "empty.safetensors", 0.0))),
        ("full", ("--lora", lora(tmp_path / "full.safetensors", 1.0))),
        # Two LoRAs, whose changes cancel.
        ("off", 2 * ("--lora", tmp_path / "full.safetensors") + ("--lora-strength", "1", "--lora-strength", "-1")),
    ):
        (tmp_path / name).mkdir()
        (file,) = run(nano, cache, tmp_path / name, "--prompt", "a rabbit", *options)
        found[name] = pixels(file)
    # H.264 differs a little from call to call; one of 255 levels is 0.008.
    assert (found["base"] - found["empty"]).abs().mean() < 0.04
    assert (found["base"] - found["off"]).abs().mean() < 0.04
    assert (found["base"] - found["full"]).abs().mean() > 0.1


def test_a_fine_tuned_transformer_replaces_that_of_the_checkpoint(nano, cache, tmp_path):
    tensors = {
        name: tensor * (-1 if name.endswith("diffusion_model.proj_out.weight") else 1)
        for name, tensor in load_file(nano).items()
        if name.startswith("model.diffusion_model.")
    }
    save_file(tensors, tmp_path / "tuned.safetensors", metadata=read_metadata(nano).raw)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (base,) = run(nano, cache, tmp_path / "a", "--prompt", "a rabbit")
    (tuned,) = run(
        nano, cache, tmp_path / "b", "--prompt", "a rabbit", "--transformer-path", tmp_path / "tuned.safetensors"
    )
    assert (pixels(base) - pixels(tuned)).abs().mean() > 0.08


def test_samples_of_a_job_are_overridden_by_options(nano, cache, tmp_path):
    job = tmp_path / "job.toml"
    table = "[validation]\ninterval = 10\nseed = 3\nvideo_dims = [960, 544, 89]\n"
    blocks = '[video]\nis_generated = true\nlatents_dir = "latents"\n'
    job.write_text(blocks + table + '[[validation.samples]]\nprompt = "a hill"\n')
    (file,) = run(nano, cache, tmp_path, "--job", job, "--seed", "4")
    assert file.prompt == "a hill"
    assert probe_video(file.path).frames == 9
    # The job trains no audio, and its model was built without.
    assert read_audio(file.path) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to sample"),
        (("--image", "a.png"), "--image needs --prompt"),
        (("--keyframe", "a.png@last"), "--keyframe needs --prompt"),
        (("--prompt", "a", "--keyframe", "a.png"), "expected FILE@AT"),
        (("--prompt", "a", "--keyframe", "a.png@end"), '"first", "middle", "last", found \'end\''),
        (("--prompt", "a", "--keyframe", "a@b.png@-3"), "at = -3 .* covers latent frames -1 to -1; .* 0 to 1"),
        (("--prompt", "a", "--size", "64x64"), "expected WxHxF"),
        (("--lora", "a", "--lora-strength", "1", "--lora-strength", "2"), "one for each of 1 --lora, .* found 2"),
        (("--prompt", "a", "--distilled", "--steps", "3"), "distilled schedule has 8"),
    ],
)
def test_contradicting_options_are_named(nano, cache, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(nano, cache, tmp_path, *options)


def test_fusing_adds_the_low_rank_update_to_the_weight(nano, tmp_path):
    def fresh():
        made = LTXTransformer.from_config(read_metadata(nano).config["transformer"])
        load_parameters(made, nano)
        return made

    path = lora(tmp_path / "l.safetensors", 1.0)
    plain, fused = fresh(), fresh()
    assert fuse_lora(fused, path, 0.5) == 1
    down, up = (load_file(path)[f"{LAYER}.lora_{end}.weight"] for end in "AB")
    name = LAYER.removeprefix("diffusion_model.") + ".weight"
    torch.testing.assert_close(fused.get_parameter(name), plain.get_parameter(name) + 0.5 * up @ down)
    for other, weight in plain.named_parameters():
        assert other == name or torch.equal(weight, fused.get_parameter(other))


def test_loras_are_in_the_weights_within_the_context_only(nano, tmp_path):
    made = LTXTransformer.from_config(read_metadata(nano).config["transformer"])
    load_parameters(made, nano)
    made.bfloat16()
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    first, second = (lora(tmp_path / f"{size}.safetensors", size) for size in (1.0, 0.3))
    with fused_loras(made, [(first, 0.5), (second, -1.0)]):
        within = {name: weight.clone() for name, weight in made.state_dict().items()}
    assert all(torch.equal(weight, before[name]) for name, weight in made.state_dict().items())
    fuse_lora(made, first, 0.5)
    fuse_lora(made, second, -1.0)
    changed = [name for name, weight in made.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed == [LAYER.removeprefix("diffusion_model.") + ".weight"]
    assert all(torch.equal(weight, within[name]) for name, weight in made.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LAYER}.lora_B.weight": None}, "without the other of A and B"),
        ({f"{LAYER}.dora_scale": torch.ones(1)}, "other than LoRA weights"),
        (
            {
                "diffusion_model.no.such.lora_A.weight": torch.ones(2, 2),
                "diffusion_model.no.such.lora_B.weight": torch.ones(2, 2),
            },
            "that are not in the model",
        ),
        ({f"{LAYER}.lora_B.weight": torch.ones(64, 4)}, "another shape"),
    ],
)
def test_a_lora_of_another_model_is_refused(nano, tmp_path, changes, message):
    tensors = load_file(lora(tmp_path / "l.safetensors", 1.0)) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "m.safetensors")
    model = LTXTransformer.from_config(read_metadata(nano).config["transformer"])
    with pytest.raises(ValueError, match=message):
        fuse_lora(model, tmp_path / "m.safetensors")
