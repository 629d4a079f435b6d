import json
import logging
from fractions import Fraction

import pytest
import torch

from ltx_titan.config import ConfigError, load_job
from ltx_titan.config.sections import MediaSection
from ltx_titan.data import BatchPlan, PrecomputedDataset, StepLoader, write_sample
from ltx_titan.encode.media_dataset import MediaDataset
from ltx_titan.media import write_video, write_wav
from ltx_titan.media.audio import Audio
from tests.commands.process.helpers import run
from tests.media.clips import tone, write_clip, write_mixed_files

BUCKETS = "64x32x17;32x64x1"
SOURCES = {"latents": "video_latents", "audio_latents": "audio_latents", "conditions": "conditions"}


def write_table(folder, names, **columns):
    rows = [{"video": name, "caption": f"a caption of {name}"} for name in names]
    for name, values in columns.items():
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    path = folder / "dataset.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def section(nano, table, **fields):
    return MediaSection(
        dataset_path=str(table),
        text_encoder_path=str(nano.parent / "text_encoder"),
        resolution_buckets=BUCKETS,
        **fields,
    )


def prepare(nano, table):
    run(nano, table, BUCKETS)
    return PrecomputedDataset(table.parent, SOURCES)


def same(one, two):
    """Compares samples bit for bit, types included."""
    assert one.keys() == two.keys()
    for source, fields in one.items():
        assert fields.keys() == two[source].keys()
        for name, value in fields.items():
            other = two[source][name]
            assert type(value) is type(other), (source, name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype
                assert torch.equal(value, other), (source, name)
            else:
                assert value == other, (source, name)
    return True


@pytest.fixture(scope="module")
def mixed(nano, tmp_path_factory):
    """A table with every kind of file, and the output of process-dataset for it."""
    folder = tmp_path_factory.mktemp("mixed")
    files = write_mixed_files(folder)
    table = write_table(folder, [*files, "missing.mp4"])
    return table, prepare(nano, table)


def test_samples_and_shapes_equal_prepared_data(nano, mixed, caplog):
    table, prepared = mixed
    with caplog.at_level(logging.WARNING):
        media = MediaDataset(section(nano, table), SOURCES, nano)
    assert "3 rows are skipped" in caplog.text
    assert "zero.mp4: is empty" in caplog.text
    assert "missing.mp4: no such file" in caplog.text
    positions = {prepared.name(index): index for index in range(len(prepared))}
    assert {media.name(index) for index in range(len(media))} == positions.keys()
    for index in range(len(media)):
        other = positions[media.name(index)]
        assert media.shape_key(index) == prepared.shape_key(other)
        assert same(media.load(index), prepared.load(other))


def test_threads_of_the_loader_give_the_same_batches(nano, mixed):
    table, _ = mixed
    media = MediaDataset(section(nano, table), SOURCES, nano)
    keys = [media.shape_key(index) for index in range(len(media))]
    plan = BatchPlan(keys, [1.0] * len(keys), 0, 2, media.fingerprint)

    def batches(workers):
        with StepLoader(media, plan, stop_step=2, num_workers=workers) as loader:
            return [part.batch for step in loader for part in step.micro_batches]

    for one, two in zip(batches(0), batches(3), strict=True):
        assert all(torch.equal(one[s][f], two[s][f]) for s in one for f in one[s])


def test_separate_audio_replaces_that_of_the_clip(nano, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, frames=17)
    write_wav(tmp_path / "a.wav", Audio(tone(0.3, 22050, hertz=300.0), 22050))
    table = write_table(tmp_path, ["a.mp4", "b.mp4"], audio=["a.wav", ""])
    prepared = prepare(nano, table)
    media = MediaDataset(section(nano, table), SOURCES, nano)
    assert [media.name(index) for index in range(len(media))] == ["a.pt"]
    assert same(media.load(0), prepared.load(0))


def test_truncated_clip_is_replaced_by_one_of_its_shape(nano, tmp_path, caplog):
    for name in ("good.mp4", "broken.mp4"):
        noise = torch.randint(0, 256, (20, 64, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        write_video(tmp_path / name, noise, Fraction(25))
    broken = tmp_path / "broken.mp4"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])  # the header, at the start, still states 20 frames
    table = write_table(tmp_path, ["broken.mp4", "good.mp4"])
    media = MediaDataset(section(nano, table), SOURCES, nano)
    assert len(media) == 2
    with caplog.at_level(logging.WARNING):
        assert same(media.load(0), media.load(1))
    assert "broken.pt: skipped, another clip of its shape replaces it" in caplog.text
    alone = MediaDataset(section(nano, write_table(tmp_path, ["broken.mp4"])), SOURCES, nano)
    with pytest.raises(ValueError, match=r"broken\.pt and the next 0 clips of its shape cannot be read"):
        alone.load(0)


@pytest.mark.parametrize("cache", [False, True])
def test_a_clip_that_is_deleted_during_a_run_is_replaced(nano, tmp_path, caplog, cache):
    for name in ("gone.mp4", "good.mp4"):
        write_clip(tmp_path / name, frames=17)
    table = write_table(tmp_path, ["gone.mp4", "good.mp4"])
    fields = {"cache_dir": str(tmp_path / "cache")} if cache else {}
    media = MediaDataset(section(nano, table, **fields), SOURCES, nano)
    (tmp_path / "gone.mp4").unlink()
    with caplog.at_level(logging.WARNING):
        assert same(media.load(0), media.load(1))
    assert "gone.pt: skipped, another clip of its shape replaces it" in caplog.text


def test_encoded_samples_are_cached(nano, mixed, tmp_path):
    table, prepared = mixed
    cached = section(nano, table, cache_dir=str(tmp_path / "cache"), lora_trigger="SKS")
    first = MediaDataset(cached, SOURCES, nano).load(0)
    files = list((tmp_path / "cache").glob("*/*.pt"))
    assert len(files) == 3
    again = MediaDataset(cached, SOURCES, nano)
    assert same(again.load(0), first)
    # A cached entry is returned as it is, and depends on the caption with its trigger word.
    changed = {"mask": torch.ones(3)}
    for file in files:
        if "prompt_attention_mask" in torch.load(file, weights_only=True):
            changed = dict(torch.load(file, weights_only=True))
            changed["video_prompt_embeds"] = torch.zeros_like(changed["video_prompt_embeds"])
            write_sample(file, changed)
    assert not again.load(0)["conditions"]["video_prompt_embeds"].any()
    other = MediaDataset(cached.model_copy(update={"lora_trigger": None}), SOURCES, nano)
    assert same(other.load(0), prepared.load(other_index(prepared, other.name(0))))


def other_index(dataset, name):
    return next(index for index in range(len(dataset)) if dataset.name(index) == name)


def test_offloaded_text_encoder_gives_the_same_features(nano, mixed):
    table, _ = mixed
    resident = MediaDataset(section(nano, table), {"conditions": "conditions"}, nano)
    offloaded = MediaDataset(section(nano, table, offload_text_encoder=True), {"conditions": "conditions"}, nano)
    for index in (0, 1):
        assert same(offloaded.load(index), resident.load(index))


def test_missing_settings_are_reported_before_anything_is_loaded(nano, mixed, tmp_path):
    table, _ = mixed
    job = tmp_path / "job.toml"
    conditions = '[{type = "mask", probability = 0.5, mask_dir = "masks"}]'
    job.write_text(
        f'[model]\ncheckpoint_path = "{nano}"\n[data]\nsource = "media"\n[data.media]\ndataset_path = "{table}"\n'
        f'[video]\nis_generated = true\nlatents_dir = "latents"\nconditions = {conditions}\n'
    )
    with pytest.raises(ConfigError) as failure:
        load_job(job)
    for key in ("data.media.text_encoder_path", "data.media.resolution_buckets", "video.conditions[0].type"):
        assert key in str(failure.value)
    with pytest.raises(ValueError, match="audio_vae"):
        MediaDataset(section(nano, table, audio_vae_path=str(write_video_only(nano, tmp_path))), SOURCES, nano)


def write_video_only(nano, folder):
    """Writes a file of a split pack without an audio VAE."""
    from safetensors.torch import save_file

    from ltx_titan.nano.pack_config import CONFIG

    path = folder / "vae.safetensors"
    save_file({"encoder.x": torch.zeros(1)}, path, {"config": json.dumps({"vae": CONFIG["vae"], "audio_vae": None})})
    return path
