import tomllib

import pytest

from ltx_titan.cli import main
from ltx_titan.commands.import_ltx import import_job
from ltx_titan.config import ConfigError, JobConfig, load_job

MINIMAL = """
model: {model_path: ltx-2.3-22b-dev.safetensors}
lora: {}
data: {preprocessed_data_root: clips}
"""
I2V = """
model:
  model_path: "ltx-2.3-22b-dev.safetensors"
  text_encoder_path: gemma-3-12b-it
  training_mode: "lora"
  load_checkpoint: old/lora_weights_step_00500.safetensors
lora:
  rank: 32
  alpha: 16
  dropout: 0.1
  target_modules: [to_k, to_q, to_v, to_out.0, ff.net.0.proj, ff.net.2, audio_ff.net.2]
training_strategy:
  name: flexible
  video:
    is_generated: true
    latents_dir: latents
    conditions:
      - {type: first_frame, probability: "0.5"}
      - {type: prefix, temporal_boundary: 8}
      - {type: spatial_crop, spatial_region: [0, 0, "288", 576], probability: 0.1}
  audio: {is_generated: false, latents_dir: audio_latents}
optimization:
  learning_rate: 1e-4
  steps: 2000
  batch_size: 2
  gradient_accumulation_steps: "4"
  optimizer_type: adamw8bit
  scheduler_type: cosine
  scheduler_params: {eta_min: 1e-5, T_max: 2000}
  enable_gradient_checkpointing: true
acceleration:
  mixed_precision_mode: bf16
  quantization: int8-quanto
  load_text_encoder_in_8bit: true
data: {preprocessed_data_root: clips, num_dataloader_workers: 4}
validation:
  samples:
    - prompt: A rabbit.
      seed: 0
      video_dims: [512, 320, 49]
      conditions: [{type: first_frame, image_or_video: rabbit.png}]
  interval: 100
  stg_blocks: null
  guidance_scale: 4
checkpoints: {interval: 250, keep_last_n: -1, precision: float32, save_training_state: full}
flow_matching:
  timestep_sampling_mode: uniform
  timestep_sampling_params: {min_value: "1e-2"}
hub: {push_to_hub: false}
wandb: {enabled: true, tags: [ltx]}
seed: 7
output_dir: outputs/i2v
"""


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def imported(text, **arguments):
    return import_job(text, "job.yaml", **arguments)


def error_of(text):
    with pytest.raises(ConfigError) as caught:
        imported(text)
    return str(caught.value)


def test_a_whole_job_is_converted():
    found = imported(I2V, ranks=2)
    job = JobConfig.model_validate(found.job)
    assert job.job.dump_folder == "outputs/i2v"
    assert (job.model.mode, job.model.checkpoint_path) == ("lora", "ltx-2.3-22b-dev.safetensors")
    assert job.model.adapter_path == "old/lora_weights_step_00500.safetensors"
    assert (job.lora.rank, job.lora.alpha, job.lora.dropout, job.lora.base_dtype) == (32, 16.0, 0.1, "int8")
    assert job.lora.targets == ("all_attention", "video_ffn", "audio_ff.net.2")
    assert [(c.type, c.probability) for c in job.video.conditions] == [
        ("first_frame", 0.5),
        ("prefix", 1.0),
        ("spatial_crop", 0.1),
    ]
    assert job.video.conditions[2].spatial_region == (0, 0, 288, 576)
    assert not job.audio.is_generated
    training = job.training
    assert (training.steps, training.local_batch_size, training.global_batch_size, training.seed) == (2000, 2, 16, 7)
    assert (job.optimizer.name, job.optimizer.lr) == ("adamw8bit", 1e-4)
    assert (job.scheduler.name, job.scheduler.min_factor) == ("cosine", pytest.approx(0.1))
    assert job.activation_checkpoint.mode == "full"
    assert (job.data.root, job.data.num_workers) == ("clips", 4)
    assert (job.sigma.name, job.sigma.min_value) == ("uniform", 0.01)
    checkpoint = job.checkpoint
    assert (checkpoint.interval, checkpoint.keep_last, checkpoint.export_dtype) == (250, -1, "float32")
    assert checkpoint.export_interval == 250  # weights to sample with, as the file of each checkpoint is there
    metrics = job.metrics
    assert (metrics.wandb, metrics.wandb_project, metrics.wandb_tags) == ("online", "ltxv-trainer", ("ltx",))


def test_every_key_without_equivalent_is_listed_with_a_reason():
    notes = imported(I2V).notes
    for key, reason in {
        "acceleration.load_text_encoder_in_8bit = true": "text encoder",
        "checkpoints.save_training_state": "exact resume",
        "optimization.scheduler_params.T_max = 2000": "training.steps",
        'metrics.wandb = "online"': "wandb login",
        "model.load_checkpoint": "strength 1",
        "optimization.batch_size = 2": "--ranks",
    }.items():
        (note,) = [note for note in notes if note.startswith(key)]
        assert reason in note


def test_a_schedule_that_ended_early_on_several_processes_is_named():
    key = "optimization.scheduler_type"
    (note,) = [note for note in imported(I2V, ranks=4).notes if note.startswith(key)]
    assert "ended after 1/4 of the steps on 4 processes" in note
    assert not any(note.startswith(key) for note in imported(I2V).notes)


def test_validation_is_converted():
    validation = JobConfig.model_validate(imported(I2V).job).validation
    assert (validation.interval, validation.stg_blocks) == (100, "all")
    assert (validation.video_cfg_scale, validation.audio_cfg_scale) == (4.0, 4.0)
    assert validation.text_encoder_path == "gemma-3-12b-it"
    (sample,) = validation.samples
    assert (sample.prompt, sample.seed, sample.video_dims) == ("A rabbit.", None, (512, 320, 49))
    assert sample.conditions[0].image_or_video == "rabbit.png"


def test_older_validation_keys_become_samples():
    found = imported(
        MINIMAL + "validation: {prompts: [a, b], reference_videos: [a.mp4, b.mp4], reference_downscale_factor: 2, "
        "stg_scale: 0.5, stg_mode: stg_v, generate_audio: true}"
    )
    validation = JobConfig.model_validate(found.job).validation
    assert [(s.prompt, s.conditions[0].video, s.conditions[0].downscale_factor) for s in validation.samples] == [
        ("a", "a.mp4", 2),
        ("b", "b.mp4", 2),
    ]
    assert (validation.interval, validation.video_stg_scale, validation.audio_stg_scale) == (100, 0.5, 0.0)
    # That trainer's model always has both streams; ours has those of the job.
    assert validation.generate_audio is None
    assert any(note.startswith("validation.generate_audio = true") for note in found.notes)


def test_an_interval_without_samples_is_named():
    found = imported(MINIMAL + "validation: {interval: 50}")
    assert JobConfig.model_validate(found.job).validation.interval is None
    assert any(note.startswith("validation.interval = 50") for note in found.notes)


def test_defaults_are_those_of_the_ltx_trainer():
    job = JobConfig.model_validate(imported(MINIMAL).job)
    assert (job.lora.rank, job.lora.alpha, job.lora.targets) == (64, 64.0, ("all_attention",))
    assert (job.training.steps, job.training.local_batch_size, job.optimizer.lr) == (3000, 2, 5e-4)
    assert (job.scheduler.name, job.checkpoint.interval, job.checkpoint.keep_last) == ("linear", 0, 1)
    # The strategy of a job without one is the oldest: video only, some samples from their first frame.
    assert job.audio is None
    assert [(c.type, c.probability) for c in job.video.conditions] == [("first_frame", 0.1)]


def test_the_older_strategies_become_blocks():
    found = imported(MINIMAL + "training_strategy: {name: text_to_video, with_audio: true}")
    assert found.job["audio"] == {"is_generated": True, "latents_dir": "audio_latents"}
    assert any("sigmas independently" in note for note in found.notes)
    found = imported(
        MINIMAL + "training_strategy: {name: video_to_video, first_frame_conditioning_p: 0, reference_latents_dir: r}"
    )
    assert found.job["video"]["conditions"] == [{"type": "reference", "latents_dir": "r"}]
    full = MINIMAL.replace("lora: {}", "").replace("model: {", "model: {training_mode: full, ")
    assert JobConfig.model_validate(imported(full).job).model.mode == "full"
    assert "video_to_video" in error_of(full + "training_strategy: {name: video_to_video}")


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("linear, scheduler_params: {start_factor: 1, end_factor: '0.5'}", {"start_factor": 1.0, "end_factor": 0.5}),
        ("cosine_with_restarts, scheduler_params: {T_0: 100, T_mult: 2}", {"restart_period": 100, "min_factor": 0.1}),
        ("polynomial, scheduler_params: {power: 2}", {"power": 2.0}),
        ("step, scheduler_params: {gamma: 0.5, step_size: 10}", {"gamma": 0.5, "step_size": 10}),
        ("constant", {}),
    ],
)
def test_schedules_keep_their_parameters(scheduler, expected):
    text = f"optimization: {{learning_rate: 5e-4, scheduler_type: {scheduler}}}"
    found = imported(MINIMAL + text).job["scheduler"]
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_targets_on_an_absent_stream_are_skipped_with_a_note():
    text = MINIMAL.replace("lora: {}", "lora: {target_modules: [attn1.to_q, audio_attn1.to_q, ff.net.2]}")
    found = imported(text)
    assert found.job["lora"]["targets"] == ["attn1.to_q", "ff.net.2"]
    assert any("audio_attn1.to_q" in note and "no audio section" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimisation: {steps: 5}", ["optimisation", "did you mean optimization"]),
        ("optimization: {learning_rates: 1}", ["optimization.learning_rates = 1", "did you mean learning_rate"]),
        ("lora: {algo: lokr}", ['lora.algo = "lokr"', "LoKr is not supported"]),
        ("optimization: {steps: many}", ['optimization.steps = "many"', "an integer"]),
        ("optimization: {scheduler_params: {gama: 1}}", ["scheduler_params.gama", 'scheduler_type "linear"']),
        ("flow_matching: {timestep_sampling_params: {stdd: 1}}", ["timestep_sampling_params.stdd", "mean std"]),
        ("acceleration: {quantization: int8}", ["acceleration.quantization", "did you mean int8-quanto"]),
        ("training_strategy: {name: flexibel}", ["training_strategy.name", "did you mean flexible"]),
        (
            "training_strategy: {name: flexible, video: {is_generated: true, latent_dir: x}}",
            ["training_strategy.video.latent_dir", "did you mean latents_dir"],
        ),
        (
            "training_strategy: {name: flexible, audio: {is_generated: true, latents_dir: a, "
            "conditions: [{type: prefxi}]}}",
            ["training_strategy.audio.conditions[0].type", "did you mean prefix"],
        ),
        (
            "training_strategy: {name: flexible, audio: {is_generated: true, latents_dir: a, "
            "conditions: [{type: first_frame}]}}",
            ['audio.conditions[0].type = "first_frame"', "one of prefix, suffix, mask, reference"],
        ),
        ("training_strategy: {name: flexible}", ["is_generated = true"]),
        ("validation: {samples: [{promt: x}]}", ["validation.samples[0].promt", "did you mean prompt"]),
        ("validation: {guidance_scale: 3, video_cfg_scale: 4}", ["validation.guidance_scale", "video_cfg_scale"]),
        ("validation: {prompts: [a, b], images: [x.png]}", ["validation.images", "2 prompts"]),
        ("seed: [", ["valid YAML", "job.yaml"]),
    ],
)
def test_errors_name_the_key_and_the_nearest_valid_names(text, words):
    message = error_of(MINIMAL + text)
    assert all(word in message for word in words), message


def test_all_errors_are_reported_at_once():
    message = error_of("model: {modelpath: x}\noptimization: {step: 5}\nfoo: 1\nlora: null")
    assert len(message.splitlines()) == 4


def test_a_job_saved_by_the_ltx_trainer_is_read():
    text = MINIMAL + "validation: {video_dims: !!python/tuple [960, 544, 89]}"
    assert JobConfig.model_validate(imported(text).job).validation.video_dims == (960, 544, 89)


def test_the_command_writes_a_job_that_loads(tmp_path, capsys):
    for name in ("clips", "model"):
        (tmp_path / name).mkdir() if name == "clips" else (tmp_path / name).touch()
    text = I2V.replace("ltx-2.3-22b-dev.safetensors", str(tmp_path / "model")).replace("clips", str(tmp_path / "clips"))
    (tmp_path / "old.yaml").write_text(text.replace("old/lora_weights_step_00500.safetensors", str(tmp_path / "model")))
    arguments = ["import-config", str(tmp_path / "old.yaml"), "-o", str(tmp_path / "job.toml"), "--ranks", "4"]
    # An adapter is a .safetensors file; this one is not, so it is named instead.
    assert main(arguments) == 0
    # This machine has no credentials of Weights & Biases.
    assert load_job(tmp_path / "job.toml", ["--metrics.wandb=offline"]).training.global_batch_size == 32
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "model.load_checkpoint" in captured.err
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(arguments[:2]) == 0
    assert tomllib.loads(capsys.readouterr().out)["model"]["mode"] == "lora"
