import tomllib
import warnings

import pytest
import tomli_w

from ltx_titan.cli import main
from ltx_titan.config import ConfigError, build_job, check_world, dump_job
from ltx_titan.estimate.placeholders import add_placeholders
from ltx_titan.plan import plan_job

BASE = {
    "model": {"init": "random", "shape": "ltx-2.3-22b"},
    "data": {"source": "synthetic"},
    "video": {"is_generated": True, "latents_dir": "latents"},
}
STREAMED = {"model": BASE["model"] | {"mode": "lora"}, "parallelism": {"stream_blocks": 4}}
FRAME = {"type": "first_frame"}
FROZEN_AUDIO = {"is_generated": False, "latents_dir": "audio_latents"}


def best(interval=250, **keys):
    return {"checkpoint": {"interval": interval, "keep_best": keys}}


def build(**sections):
    return build_job(BASE | sections, "job.toml")


def error_of(**sections):
    with pytest.raises(ConfigError) as caught:
        build(**sections)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {}}, ["model.checkpoint_path is missing", 'model.init = "random"']),
        ({"model": {"checkpoint_path": "none.safetensors"}}, ['model.checkpoint_path = "none.safetensors"', "exists"]),
        ({"model": {"init": "random"}}, ["model.shape is missing", "ltx-2.3-22b"]),
        ({"model": {"init": "random", "shape": "ltx-3"}}, ['model.shape = "ltx-3"', "JSON file"]),
        ({"model": BASE["model"] | {"connectors_path": "none"}}, ["model.connectors_path"]),
        ({"data": {}}, ["data.root is missing", "synthetic"]),
        ({"data": {"root": "no/such/folder"}}, ['data.root = "no/such/folder"', "preprocess"]),
        ({"video": None}, ["video is missing", "is_generated = true"]),
        ({"video": BASE["video"] | {"is_generated": False}, "audio": FROZEN_AUDIO}, ["video.is_generated = false"]),
        ({"model": BASE["model"] | {"modalities": "audio"}}, ["model.modalities", "remove [video]"]),
        (
            {"video": BASE["video"] | {"conditions": [{"type": "mask", "mask_dir": "video_masks"}]}},
            ["video.conditions[0].type", "synthetic"],
        ),
        ({"sigma": {"name": "uniform", "std": 1.0}}, ["sigma.std = 1.0", "shifted_logit_normal"]),
        ({"sigma": {"min_value": 0.1}}, ["sigma.min_value", "uniform"]),
        ({"sigma": {"name": "uniform", "min_value": 0.5, "max_value": 0.5}}, ["less than sigma.max_value = 0.5"]),
        ({"sigma": {"video_min": 0.5, "video_max": 0.5}}, ["sigma.video_min = 0.5", "raise sigma.video_max"]),
        ({"loss": {"huber_delta": 0.1}}, ["loss.huber_delta = 0.1", "huber"]),
        ({"loss": {"snr_gamma": 3.0}}, ["loss.snr_gamma = 3.0", 'loss.weighting = "min_snr"']),
        ({"loss": {"weighting": "sigma_sqrt"}}, ["sigma.video_min = 0.0", "at least 0.05"]),
        ({"video": BASE["video"] | {"loss_mask_dir": "video_masks"}}, ["video.loss_mask_dir", "synthetic"]),
        (
            {"optimizer": {"name": "adamw_schedulefree"}, "scheduler": {"name": "cosine"}},
            ['scheduler.name = "cosine"', '"constant"'],
        ),
        ({"optimizer": {"d_coef": 2.0}}, ["optimizer.d_coef = 2.0", "prodigy"]),
        ({"scheduler": {"name": "step", "power": 2.0}}, ["scheduler.power = 2.0", "polynomial"]),
        ({"scheduler": {"warmup_steps": 2000}}, ["scheduler.warmup_steps = 2000", "training.steps = 2000"]),
        ({"scheduler": {"name": "wsd", "warmup_steps": 1500, "decay_steps": 501}}, ["decay_steps = 501"]),
        ({"training": {"steps": 5, "stop_at": 6}}, ["training.stop_at = 6", "training.steps = 5"]),
        ({"training": {"global_batch_size": 3, "local_batch_size": 2}}, ["2 x 1 = 2", "set it to 4"]),
        ({"parallelism": {"dp_replicate": 2, "dp_shard": 3}}, ["1 x 6 = 6", "set it to 6"]),
        ({"parallelism": {"dp_shard": 0}}, ["parallelism.dp_shard = 0"]),
        ({"activation_checkpoint": {"mode": "full", "k": 2}}, ["activation_checkpoint.k = 2", "every_k"]),
        ({"activation_checkpoint": {"mode": "every_k"}}, ["activation_checkpoint.k is missing"]),
        ({"checkpoint": {"keep_last": 0}}, ["checkpoint.keep_last = 0"]),
        (best(count=2), ["checkpoint.keep_best.count = 2", "set checkpoint.keep_best.metric"]),
        (best(metric="loss", interval=0), ['checkpoint.keep_best.metric = "loss"', "interval = 0"]),
        (best(metric="held_out/total"), ['metric = "held_out/total"', "validation.held_out_root"]),
        (best(metric="quality/text_video"), ['metric = "quality/text_video"', "validation.quality"]),
        (
            {**best(metric="held_out/total"), "validation": {"held_out_root": "data", "interval": 100}},
            ["checkpoint.interval = 250", "a multiple of validation.interval = 100"],
        ),
        ({"validation": {"loras": [{"path": "none"}]}}, ['validation.loras[0].path = "none"', "exists"]),
        (
            {**STREAMED, "validation": {"loras": [{"path": __file__}]}},
            ["parallelism.stream_blocks", "plain weights", "set parallelism.stream_blocks = 0"],
        ),
        ({"validation": {"quality": {"clip_path": "none"}}}, ["clip_path", "validation.samples", "config.json"]),
        ({"validation": {"quality": {"clap_path": "none"}}}, ["clap_path", "clips with audio"]),
        ({"profiling": {"trace_start": 2001}}, ["profiling.trace_start = 2001"]),
        ({"validation": {"dataset_samples": 2}}, ["validation.dataset_samples = 2", "synthetic", "held_out_root"]),
        ({"validation": {"use_ema": True}}, ["validation.use_ema = true", "optimizer.ema_decay"]),
        ({"lora": {"algo": "LoKr"}}, ['algo = "LoKr"', "Kronecker", "remove the key to train a LoRA"]),
        ({"lora": {"type": "loha"}}, ['type = "loha"', "LoHa is not supported"]),
        (
            {"model": BASE["model"] | {"mode": "lora"}, "lora": {"dora": True}},
            ["checkpoint.export = true", "lora.dora = true", "set it to false"],
        ),
        ({"training": {"weight_dtype": "bfloat16"}}, ['weight_dtype = "bfloat16"', "stochastic_rounding = true"]),
        ({**STREAMED, "training": {"weight_dtype": "bfloat16"}}, ["float32 with model.mode", "lora.base_dtype"]),
        ({"parallelism": {"stream_blocks": 4}}, ['model.mode = "lora"', "parallelism.cpu_offload"]),
        ({**STREAMED, "parallelism": {"stream_blocks": 4, "tp": 2}}, ["parallelism.tp = 1", "found 2"]),
        ({**STREAMED, "parallelism": {"stream_blocks": "auto", "cp": 2}}, ["parallelism.cp = 1", "found 2"]),
        ({**STREAMED, "parallelism": {"stream_blocks": 4, "cpu_offload": True}}, ["cpu_offload = false"]),
        ({**STREAMED, "training": {"dtype": "float32"}}, ['training.dtype = "bfloat16"', "a base in bfloat16"]),
        ({"metrics": {"wandb_project": "films"}}, ['metrics.wandb_project = "films"', 'metrics.wandb = "off"']),
    ],
)
def test_contradiction_is_refused_by_name_with_a_remedy(sections, words):
    message = error_of(**sections)
    assert all(word in message for word in words), message


def test_weights_and_biases_online_needs_credentials_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "run `wandb login`" in error_of(metrics={"wandb": "online"})
    assert build(metrics={"wandb": "offline"}).metrics.wandb == "offline"


def test_checkpoint_job_takes_existing_files_and_no_shape(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    model = {"checkpoint_path": str(file), "connectors_path": str(file)}
    assert build(model=model, data={"root": str(tmp_path)}).data.root == str(tmp_path)
    assert "model.num_layers" in error_of(model=model | {"num_layers": 2})
    assert "not a folder" in error_of(model={"checkpoint_path": str(tmp_path)})


def test_condition_on_a_frozen_block_warns_once_each_unless_it_is_a_reference(tmp_path):
    reference = {"type": "reference", "latents_dir": "reference_latents"}
    frozen = BASE["video"] | {"is_generated": False, "conditions": [reference, FRAME]}
    generated = {"is_generated": True, "latents_dir": "audio_latents"}
    with pytest.warns(UserWarning, match=r"video\.conditions\[1\] \(first_frame\) has no effect") as caught:
        build(video=frozen, audio=generated, data={"root": str(tmp_path)})
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"audio\.loss_mask_dir has no effect: \[audio\] has is_generated = false"):
        build(audio=FROZEN_AUDIO | {"loss_mask_dir": "masks"}, data={"root": str(tmp_path)})
    (tmp_path / ".precomputed").mkdir()
    held_out = {"held_out_root": str(tmp_path / ".precomputed"), "interval": 1}
    with pytest.warns(UserWarning, match=r"validation\.held_out_root = .* is trained on"):
        build(validation=held_out, data={"root": str(tmp_path)})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"lora": {"rank": 32}}, ['model.mode = "full"', '"lora", because the job has a section [lora] (rank)']),
        ({"video": BASE["video"] | {"unmasked_weight": 0.3}}, ["video.unmasked_weight = 0.3", "video.loss_mask_dir"]),
        ({"optimizer": {"momentum": 0.9}}, ["optimizer.momentum = 0.9", "muon"]),
        ({"optimizer": {"name": "adafactor", "betas": [0.9, 0.99]}}, ["optimizer.betas", "prodigy"]),
    ],
)
def test_keys_without_effect_are_refused_where_the_job_is_not_what_it_seems(sections, words):
    message = error_of(**sections)
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {"audio": FROZEN_AUDIO, "loss": {"audio_weight": 2.0}},
            r"loss\.audio_weight has no effect: \[audio\]",
        ),
        ({"sigma": {"audio_max": 0.5}}, r"sigma\.audio_max has no effect: the job has no \[audio\]"),
        (
            {"data": {"source": "synthetic", "media": {"lora_trigger": "DOG"}}},
            r"data\.media\.lora_trigger has no",
        ),
        # Said by the job itself, as `--model.mode=full` after a job that trains adapters does.
        ({"lora": {"rank": 64}, "model": BASE["model"] | {"mode": "full"}}, r"\[lora\] has no effect with model\.mode"),
        ({"optimizer": {"stochastic_rounding": True}}, r"optimizer\.stochastic_rounding has no effect .* float32"),
        (
            {"validation": {"samples": [{"prompt": "a"}], "interval": 50}, "training": {"steps": 10}},
            r"validation\.interval = 50 is above training\.steps = 10",
        ),
        ({"validation": {"samples": [{"prompt": "a"}]}}, r"validation\.samples has no effect .* validation\.interval"),
    ],
)
def test_other_keys_without_effect_are_warned_of_once(sections, text):
    with pytest.warns(UserWarning, match=text) as caught:
        job = build(**sections)
    assert len(caught) == 1
    # Defaults that are spelled out are not named.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_job(tomllib.loads(dump_job(build())), "again.toml")
    assert job.model.mode == "full"


def test_world_takes_the_rest_as_shards():
    job = build(
        parallelism={"dp_replicate": 2},
        training={"global_batch_size": 16, "local_batch_size": 2},
    )
    degrees = check_world(job, 8)
    assert (degrees.dp_replicate, degrees.dp_shard, degrees.cp, degrees.tp) == (2, 4, 1, 1)
    assert degrees.dp == 8


@pytest.mark.parametrize(
    ("parallelism", "batch", "world", "words"),
    [
        ({"dp_replicate": 3}, 3, 8, ["3 x 1 x 1 = 3", "8 ranks"]),
        ({"dp_shard": 2}, 2, 4, ["2 x 1 = 2", "4 ranks", "dp_shard = -1"]),
        ({}, 6, 4, ["training.global_batch_size = 6", "1 x 4 = 4", "set it to 8"]),
    ],
)
def test_world_that_does_not_fit_is_refused_with_the_arithmetic(parallelism, batch, world, words):
    job = build(parallelism=parallelism, training={"global_batch_size": batch})
    with pytest.raises(ConfigError) as caught:
        check_world(job, world)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_update_in_backward_refuses_clipping_and_accumulation_before_anything_starts():
    optimizer = {"in_backward": True}
    message = error_of(optimizer=optimizer)  # training.max_grad_norm = 1.0 by default
    assert "training.max_grad_norm = 1.0: expected 0 with optimizer.in_backward = true" in message
    training = {"max_grad_norm": 0.0, "global_batch_size": 8, "local_batch_size": 2}
    message = error_of(optimizer=optimizer, training=training, parallelism={"dp_shard": 2})
    assert "optimizer.in_backward = true: expected one micro-batch per step" in message
    assert "8 / (2 x 2) = 2; set training.local_batch_size = 4" in message
    job = build(optimizer=optimizer, training=training)
    assert check_world(job, 4).dp == 4
    with pytest.raises(ConfigError, match=r"8 / \(2 x 1\) = 4"):
        check_world(job, 1)
    with pytest.raises(ConfigError, match="one micro-batch per step"):
        plan_job(job, 2)


@pytest.mark.parametrize("overrides", [[], ["--training.max_grad_norm=0", "--training.global_batch_size=8"]])
def test_estimate_refuses_an_update_in_backward_that_training_would(overrides, tmp_path, capsys):
    job = tmp_path / "job.toml"
    job.write_text(tomli_w.dumps(BASE))
    assert main(["estimate", str(job), "--optimizer.in_backward=true", *overrides]) == 1
    assert "optimizer.in_backward = true" in capsys.readouterr().err


def test_dora_on_random_weights_trains_without_an_export_and_is_estimated_for_a_missing_checkpoint(tmp_path):
    sections = {"model": BASE["model"] | {"mode": "lora"}, "lora": {"dora": True}}
    assert not build(**sections, checkpoint={"export": False}).checkpoint.export
    assert not build(**sections, checkpoint={"enable": False}).checkpoint.enable
    tables = BASE | sections | {"model": {"mode": "lora", "checkpoint_path": "ltx-2.3-22b-dev.safetensors"}}
    notes = add_placeholders(tables, tmp_path)
    assert "assuming ltx-2.3-22b" in notes[0]
    assert build_job(tables, "job.toml").lora.dora


def test_sigma_floor_that_the_sampler_would_refuse_is_refused_by_the_section():
    assert "sigma.eps = 0.7: expected less than 0.5" in error_of(sigma={"eps": 0.7})
