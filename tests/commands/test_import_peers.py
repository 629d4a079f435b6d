import shlex
from pathlib import Path

import pytest
import yaml

from ltx_titan.cli import main
from ltx_titan.commands.import_ltx import import_job
from ltx_titan.commands.process.command import DatasetOptions
from ltx_titan.common.options import parse_options
from ltx_titan.config import ConfigError, JobConfig, load_job

AI_TOOLKIT = """
job: extension
config:
  name: fox
  process:
    - type: diffusion_trainer
      training_folder: runs
      trigger_word: f0x
      network: {type: lora, linear: 16, linear_alpha: 8}
      save: {dtype: float16, save_every: 200, max_step_saves_to_keep: 3}
      datasets:
        - {folder_path: videos/fox, caption_ext: txt, caption_dropout_rate: 0.1, num_frames: 50, resolution: [512, 640],
           num_repeats: 2, do_audio: true, flip_x: true}
        - {folder_path: stills/fox, num_frames: 1, resolution: 512}
      train:
        batch_size: 2
        steps: 1500
        gradient_accumulation: 3
        gradient_checkpointing: true
        optimizer: adamw8bit
        lr: 1e-4
        optimizer_params: {weight_decay: 1e-3}
        timestep_type: sigmoid
        loss_type: mse
        dtype: bf16
        ema_config: {use_ema: true, ema_decay: 0.99}
        blank_prompt_preservation: true
        blank_prompt_preservation_multiplier: 0.5
        skip_first_sample: true
        wobble: 7
      model: {name_or_path: Lightricks/LTX-2, arch: ltx2, quantize: true, qtype: "uint4|ara.bin", low_vram: true}
      sample:
        sampler: flowmatch
        sample_every: 300
        width: 700
        height: 512
        num_frames: 49
        fps: 25
        samples: [{prompt: "[trigger] runs"}, {prompt: a tree, seed: 5}]
        neg: blurry
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 25
"""
MUSUBI_DATASET = """
[general]
resolution = [768, 512]
batch_size = 2
enable_bucket = false
[[datasets]]
video_directory = "a/clips"
cache_directory = "a/cache"
target_frames = [1, 30]
frame_extraction = "slide"
frame_stride = 10
num_repeats = 3
[[datasets]]
image_directory = "b/stills"
[[datasets]]
video_jsonl_file = "c/meta.jsonl"
target_frames = [25]
caption_extension = ".cap"
"""
MUSUBI = """
dit = "models/ltx-2.3-22b-dev.safetensors"
dataset_config = "data.toml"
output_dir = "out"
output_name = "lora"
sdpa = true
[network]
network_module = "networks.lora_ltx2"
network_dim = 8
network_alpha = 4
[training]
learning_rate = 3e-5
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.95"]
lr_scheduler = "cosine_with_min_lr"
lr_scheduler_min_lr_ratio = 0.2
lr_warmup_steps = 0.1
max_train_steps = 1000
gradient_accumulation_steps = 4
timestep_sampling = "shift"
discrete_flow_shift = 5.0
sigmoid_scale = 0.8
weighting_scheme = "cosmap"
min_timestep = 100
blocks_to_swap = 12
save_every_n_steps = 100
sample_prompts = "prompts.txt"
sample_every_n_steps = 50
wobble = 1
"""
DIFFUSION_PIPE = """
output_dir = "runs/dp"
dataset = "data.toml"
epochs = 100
max_steps = 900
micro_batch_size_per_gpu = 2
gradient_accumulation_steps = 3
pipeline_stages = 2
gradient_clipping = 0.5
warmup_steps = 20
lr_scheduler = "linear"
activation_checkpointing = "unsloth"
wobble = 1
[model]
type = "wan"
ckpt_path = "models/wan"
transformer_dtype = "float8"
timestep_sample_method = "logit_normal"
[adapter]
type = "lora"
rank = 24
dtype = "bfloat16"
[optimizer]
type = "adamw_optimi"
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.02
stabilize = true
"""
DIFFUSION_PIPE_DATASET = """
resolutions = [512]
frame_buckets = [1, 33]
[[directory]]
path = "a"
num_repeats = 5
[[directory]]
path = "b"
size_buckets = [[512, 320, 20]]
"""


def imported(text, origin="job.yaml", ranks=1):
    found = import_job(text, str(origin), ranks)
    return JobConfig.model_validate(found.job), "\n".join(found.notes), found


def prepared(found):
    arguments = [shlex.split(line) for line in found.commands]
    assert all(words[:2] == ["ltx-titan", "process-dataset"] for words in arguments)
    return [words[2:] for words in arguments]


def option(words, name):
    return words[words.index(name) + 1]


def test_an_ai_toolkit_job():
    job, notes, found = imported(AI_TOOLKIT, ranks=2)
    assert (job.job.dump_folder, job.job.trigger, job.model.mode) == ("runs/fox", "f0x", "lora")
    # Its transformers are trained with alpha = rank, whatever linear_alpha is.
    assert (job.lora.rank, job.lora.alpha, job.lora.base_dtype) == (16, 16.0, "int4")
    assert job.lora.targets == ("all_attention", "video_ffn", "audio_ffn")
    assert (job.training.steps, job.training.global_batch_size, job.training.local_batch_size) == (1500, 12, 2)
    assert (job.optimizer.name, job.optimizer.lr, job.optimizer.weight_decay) == ("adamw8bit", 1e-4, 1e-3)
    assert (job.optimizer.ema_decay, job.validation.use_ema, job.preservation.blank_prompt_weight) == (0.99, True, 0.5)
    assert (job.sigma.name, job.sigma.shift, job.sigma.uniform_prob) == ("shifted_logit_normal", 1.0, 0.0)
    assert (job.checkpoint.interval, job.checkpoint.export_interval, job.checkpoint.keep_last) == (200, 200, 3)
    assert (job.activation_checkpoint.mode, job.audio.is_generated) == ("full", True)
    videos, stills = job.data.sources
    assert (videos.root, videos.repeats, videos.caption_dropout, videos.name) == ("videos/fox", 2, 0.1, None)
    # Both folders are named fox, which would be one name in metrics; stills have no audio to train on.
    assert (stills.root, stills.name, stills.repeats, stills.modality) == ("stills/fox", "fox_1", None, "video")
    validation = job.validation
    assert (validation.interval, validation.video_dims, validation.frame_rate) == (300, (704, 512, 49), 25)
    assert [(sample.prompt, sample.seed) for sample in validation.samples] == [("f0x runs", 42), ("a tree", 5)]
    assert (validation.video_cfg_scale, validation.inference_steps, validation.negative_prompt) == (4, 25, "blurry")
    assert validation.skip_initial_validation
    first, second = prepared(found)
    # Landscape of the area of 640 x 640 is 853 x 480, in multiples of 32; 50 frames are 49.
    assert option(first, "--resolution-buckets") == "640x640x49;864x480x49;480x864x49"
    assert option(first, "--lora-trigger") == "f0x"
    assert ("--skip-audio" in first, "--skip-audio" in second) == (False, True)
    assert "sigma: close" in notes
    for part in ("linear_alpha = 8", "low_vram", "flip_x", "resolution", "num_frames", "name_or_path", "qtype"):
        assert part in notes
    assert "config.process[0].train.wobble = 7: not converted" in notes


@pytest.mark.parametrize(
    ("old", "new", "expected", "named"),
    [
        ("adamw8bit", "automagic", {"optimizer": {"name": "adamw", "lr": 1e-4}}, ("train.optimizer", "train.lr")),
        ("adamw8bit", "prodigy", {"optimizer": {"name": "prodigy", "lr": 1.0}}, ("train.lr",)),
        (
            "adamw8bit",
            "adamwschedulefree",
            {"optimizer": {"name": "adamw_schedulefree", "ema_decay": None, "weight_decay": 1e-3}},
            ("train.ema_config",),
        ),
        ("type: lora", "type: lokr", {"model": {"mode": "lora"}}, ("network.type", "LoKr is not supported")),
        ("arch: ltx2", "arch: wan22_14b", {"training": {"steps": 1500}}, ("is another model",)),
        ("timestep_type: sigmoid", "timestep_type: weighted", {"sigma": {"name": "uniform"}}, ("timestep_type",)),
        ("loss_type: mse", "loss_type: wavelet", {"loss": {"name": "mse"}}, ("loss_type",)),
    ],
)
def test_what_ltx_titan_lacks_is_named(old, new, expected, named):
    job, notes, _ = imported(AI_TOOLKIT.replace(old, new))
    for section, keys in expected.items():
        assert {key: getattr(getattr(job, section), key) for key in keys} == keys
    assert all(part in notes for part in named)


def test_a_value_of_the_wrong_type_is_an_error_with_its_key():
    with pytest.raises(ConfigError, match=r"config.process\[0\].train.steps = .many.: expected a number"):
        imported(AI_TOOLKIT.replace("steps: 1500", "steps: many"))


@pytest.mark.parametrize("key", ["train", "optimizer_params", "ema_config", "datasets", "sample", "model"])
def test_a_value_instead_of_a_table_is_an_error_with_its_key(key):
    data = yaml.safe_load(AI_TOOLKIT)
    process = data["config"]["process"][0]
    (process if key in process else process["train"])[key] = 7
    with pytest.raises(ConfigError, match=rf"{key} = 7: expected"):
        imported(yaml.safe_dump(data))


def test_musubi_arguments_with_dataset_and_prompts(tmp_path):
    (tmp_path / "data.toml").write_text(MUSUBI_DATASET)
    prompts = "# comment\nA fox. --w 640 --h 480 --f 26 --d 1 --s 20 --l 5.0 --fs 3\nA cat.\n"
    (tmp_path / "prompts.txt").write_text(prompts)
    job, notes, found = imported(MUSUBI, tmp_path / "config.toml", ranks=2)
    assert (job.model.checkpoint_path, job.job.dump_folder) == ("models/ltx-2.3-22b-dev.safetensors", "out/lora")
    assert (job.lora.rank, job.lora.alpha, job.loss.weighting) == (8, 4.0, "cosmap")
    assert (job.optimizer.name, job.optimizer.lr, job.optimizer.betas) == ("adamw8bit", 3e-5, (0.9, 0.95))
    assert (job.scheduler.name, job.scheduler.min_factor, job.scheduler.warmup_steps) == ("cosine", 0.2, 100)
    assert (job.training.steps, job.training.global_batch_size, job.training.local_batch_size) == (1000, 16, 2)
    assert (job.sigma.shift, job.sigma.std, job.sigma.video_min) == (5.0, 0.8, 0.1)
    assert (job.activation_checkpoint.mode, job.checkpoint.export_interval) == ("none", 100)
    assert [source.root for source in job.data.sources] == ["a/clips", "b/stills", "c"]
    assert [source.repeats for source in job.data.sources] == [3, None, None]
    fox, cat = job.validation.samples
    assert (fox.prompt, fox.video_dims, fox.seed) == ("A fox.", (640, 480, 25), 1)
    assert (cat.prompt, cat.video_dims) == ("A cat.", (256, 256, 1))
    assert (job.validation.interval, job.validation.video_cfg_scale, job.validation.inference_steps) == (50, 5.0, 20)
    videos, stills, table = prepared(found)
    assert option(videos, "--resolution-buckets") == "768x512x25"
    assert (option(videos, "--windows"), option(videos, "--window-stride")) == ("all", "10")
    assert option(stills, "--resolution-buckets") == "768x512x1"
    assert option(table, "--video-column") == "video_path"
    for part in ("sdpa", "blocks_to_swap = 12", "cache_directory", "sample_prompts.fs", "caption_extension"):
        assert part in notes
    assert "wobble = 1: not converted" in notes


def test_optimizers_without_a_schedule_or_a_rate_of_their_own():
    text = MUSUBI.replace('"AdamW8bit"', '"schedulefree.AdamWScheduleFree"')
    job, notes, _ = imported(text, "config.toml")
    assert (job.optimizer.name, job.optimizer.betas, job.scheduler.name) == (
        "adamw_schedulefree",
        (0.9, 0.95),
        "constant",
    )
    assert "lr_scheduler = " in notes
    text = MUSUBI.replace('"AdamW8bit"', '"prodigyopt.Prodigy"').replace("3e-5", "1.0")
    options = '["d_coef=2", "decouple=True", "use_bias_correction=False"]'
    job, notes, _ = imported(text.replace('["weight_decay=0.1", "betas=0.9,0.95"]', options), "config.toml")
    found = job.optimizer.name, job.optimizer.lr, job.optimizer.d_coef, job.optimizer.weight_decay
    assert found == ("prodigy", 1.0, 2.0, 0.0)
    assert "use_bias_correction" in notes
    assert "decouple" not in notes


def test_a_musubi_dataset_alone():
    job, notes, _ = imported(MUSUBI_DATASET, "data.toml")
    assert len(job.data.sources) == 3
    assert job.training.local_batch_size == 2
    assert "--config_file" in notes


def test_a_diffusion_pipe_job_of_another_model(tmp_path):
    (tmp_path / "data.toml").write_text(DIFFUSION_PIPE_DATASET)
    job, notes, found = imported(DIFFUSION_PIPE, tmp_path / "job.toml", ranks=4)
    # Two stages share a batch: 4 processes are 2 pipelines.
    assert (job.training.steps, job.training.global_batch_size, job.training.max_grad_norm) == (900, 12, 0.5)
    assert (job.lora.rank, job.lora.alpha, job.lora.base_dtype) == (24, 24.0, "float8")
    assert (job.optimizer.name, job.optimizer.lr, job.optimizer.betas) == ("adamw", 2e-5, (0.9, 0.99))
    assert (job.optimizer.weight_decay, job.job.dump_folder) == (0.02, "runs/dp")
    assert (job.scheduler.name, job.scheduler.end_factor, job.scheduler.warmup_steps) == ("linear", 0.0, 20)
    assert (job.activation_checkpoint.mode, job.activation_checkpoint.offload) == ("full", True)
    assert [(source.root, source.repeats) for source in job.data.sources] == [("a", 5), ("b", None)]
    first, second = prepared(found)
    assert option(first, "--resolution-buckets").startswith("512x512x1;512x512x33;")
    assert option(second, "--resolution-buckets") == "512x320x17"
    for part in ("epochs = 100", "pipeline_stages = 2", "model.type", "is another model", "optimizer.stabilize"):
        assert part in notes
    assert "wobble = 1: not converted" in notes


def test_without_its_dataset_file_the_data_is_named():
    job, notes, _ = imported(DIFFUSION_PIPE, "job.toml")
    assert job.data.root == "clips"
    assert 'dataset = "data.toml": not on this machine' in notes


def test_toml_of_no_known_trainer_is_an_error():
    with pytest.raises(ConfigError, match=r"musubi-tuner .* or diffusion-pipe"):
        imported("[job]\ndump_folder = 'out'\n", "job.toml")


def test_the_command_writes_a_job_that_loads_below_the_commands_that_prepare_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text(AI_TOOLKIT)
    assert main(["import-config", "old.yaml", "-o", "job.toml"]) == 0
    assert "wobble" in capsys.readouterr().err
    text = (tmp_path / "job.toml").read_text()
    lines = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line)[2:]
        Path(words[0]).mkdir(parents=True)
        options = parse_options(DatasetOptions, words, prog="process-dataset", description="")
        assert options.data.root == Path(words[0], ".precomputed")
        options.data.model_path.touch()
    assert load_job("job.toml").training.steps == 1500
