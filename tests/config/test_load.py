import warnings

import pytest

from ltx_titan.config import ConfigError, JobConfig, build_job, dump_job, job_changes, load_job, plain_job
from ltx_titan.config.load import models_in

MINIMAL = """
[model]
init = "random"
shape = "ltx-2.3-22b"
[data]
source = "synthetic"
[video]
is_generated = true
latents_dir = "latents"
"""

RICH = """
[job]
dump_folder = "outputs/rich"
description = 'a "quoted" text'
[model]
init = "random"
shape = "ltx-2-19b"
num_layers = 2
[data]
source = "synthetic"
num_workers = 0
[data.synthetic]
width = 64
fps = 25
contexts = false
[video]
is_generated = true
latents_dir = "latents"
[[video.conditions]]
type = "first_frame"
probability = 0.5
[[video.conditions]]
type = "prefix"
temporal_boundary = 8
[audio]
is_generated = false
latents_dir = "audio_latents"
[sigma]
name = "uniform"
min_value = 0.25
[training]
steps = 100
stop_at = 50
[optimizer]
lr = 3e-5
betas = [0.9, 0.95]
[scheduler]
name = "wsd"
warmup_steps = 5
decay_steps = 20
[checkpoint]
interval = 0
"""


@pytest.fixture
def write(tmp_path):
    def write_job(text, name="job.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_job


def errors_of(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    return str(caught.value).splitlines()


def test_absent_sections_take_their_defaults(write):
    job = load_job(write(MINIMAL))
    assert (job.training.steps, job.optimizer.lr, job.checkpoint.keep_last) == (2000, 1e-4, 2)
    assert job.audio is None
    assert job.video.is_generated


@pytest.mark.parametrize("text", [MINIMAL, RICH])
def test_dumped_job_loads_to_an_equal_job(write, text):
    job = load_job(write(text))
    assert load_job(write(dump_job(job), "again.toml")) == job


def test_integers_are_numbers_but_strings_are_not(write):
    assert load_job(write(MINIMAL + "[training]\nmax_grad_norm = 1")).training.max_grad_norm == 1.0
    (line,) = errors_of(write(MINIMAL + '[training]\nsteps = "5"', "bad.toml"))
    assert "bad.toml" in line
    assert 'training.steps = "5": expected an integer; write it without quotes' in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--training.stepz=5", ["training.stepz = 5", "did you mean steps"]),
        ("--trainnig.steps=5", ["trainnig", "did you mean training"]),
        ("--scheduler.name=linaer", ['scheduler.name = "linaer"', "did you mean linear"]),
        ("--training.steps=0", ["training.steps = 0", "greater than or equal to 1", "default 2000"]),
        ("--training.steps=2.5", ["training.steps = 2.5", "an integer"]),
        ("--training.steps=true", ["training.steps = true", "an integer"]),
        ("--optimizer.lr=nan", ["optimizer.lr = nan", "a finite number"]),
        ("--optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("--job.description=5", ["job.description = 5", "in quotes"]),
        ("--data.synthetic.widht=5", ["data.synthetic.widht", "did you mean width"]),
        ('--video.conditions=[{type="prefix"}]', ["video.conditions[0].temporal_boundary is missing"]),
        ('--video.conditions=[{type="prefx"}]', ['video.conditions[0].type = "prefx"', "did you mean prefix"]),
        ('--video.conditions=[{type="first_frame", p=1}]', ["video.conditions[0].p = 1", "valid: probability, type"]),
        ("--video.is_generated=[]", ["video.is_generated", "true or false"]),
        ("--training=5", ["--training=5", "--section.key=value"]),
        ("training.steps=5", ["training.steps=5", "--section.key=value"]),
        ("--training.steps.more=5", ["training.steps.more"]),
        ("--model.shape.x=5", ["model.shape", "override model.shape as a whole"]),
    ],
)
def test_wrong_override_is_named_with_its_remedy(write, override, words):
    (line,) = errors_of(write(MINIMAL), [override])
    assert all(word in line for word in [*words, f"override {override}"]), line


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ('--lora.targets="video"', 'lora.targets = "video": expected a list of presets or name endings'),
        ("--optimizer.name=muon", "optimizer: in_backward = true: expected name to be one of adamw"),
        ("--validation.stg_blocks=[]", "validation.stg_blocks = []: stg_blocks is empty"),
        (
            '--video.conditions=[{type="spatial_crop", spatial_region=[9, 0, 8, 8]}]',
            "video.conditions[0].spatial_region = [9, 0, 8, 8]: expected [top, left, bottom, right] in pixels",
        ),
        ("--validation.interval=5", "validation: interval is set, but there is nothing to do; add samples"),
    ],
)
def test_message_of_a_validator_is_printed_as_it_is(write, override, line):
    (found,) = errors_of(write(MINIMAL + "[optimizer]\nin_backward = true\n[training]\nmax_grad_norm = 0"), [override])
    assert line in found
    assert "something else" not in found
    assert "Value error" not in found


def test_overrides_take_toml_values_bare_strings_and_flags(write):
    job = load_job(
        write(MINIMAL),
        [
            "--training.steps=10",
            "--training.steps=20",
            "--job.dump_folder=outputs/some run",
            "--job.description=steps = 5",
            "--compile.enable",
            "--optimizer.betas=[0.8, 0.9]",
            '--video.conditions=[{type="first_frame", probability=0.5}]',
            "--audio.is_generated=true",
            "--audio.latents_dir=audio_latents",
        ],
    )
    assert job.training.steps == 20
    assert job.job.dump_folder == "outputs/some run"
    assert job.job.description == "steps = 5"
    assert job.compile.enable
    assert job.optimizer.betas == (0.8, 0.9)
    assert job.video.conditions[0].probability == 0.5
    assert job.audio.latents_dir == "audio_latents"


def test_override_with_a_line_break_sets_one_key_only(write):
    job = load_job(write(MINIMAL), ["--job.description=1\nother = 2"])
    assert job.job.description == "1\nother = 2"


def test_all_problems_are_listed_one_per_line_with_their_place(write):
    lines = errors_of(write(MINIMAL + "[training]\nsteps = 0\nseed = -1"), ["--kernels.backend=cuda"])
    assert len(lines) == 3
    assert sum("job.toml: training." in line for line in lines) == 2
    assert sum("override --kernels.backend=cuda: kernels.backend" in line for line in lines) == 1


@pytest.mark.parametrize("content", ["[model\n", "[model]\nmode = full\n", "a = 1\na = 2\n"])
def test_broken_toml_names_file_and_line(write, content):
    (line,) = errors_of(write(content, "broken.toml"))
    assert "broken.toml" in line
    assert "valid TOML" in line
    assert "line" in line


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_job_files_of_windows_editors_are_read(tmp_path, encoding):
    path = tmp_path / "job.toml"
    path.write_bytes((MINIMAL + '[job]\ndescription = "größer"\n').replace("\n", "\r\n").encode(encoding))
    assert load_job(path).job.description == "größer"


def test_job_files_in_other_encodings_say_how_to_convert_them(tmp_path):
    path = tmp_path / "job.toml"
    path.write_bytes((MINIMAL + '[job]\ndescription = "größer"\n').encode("latin-1"))
    (line,) = errors_of(path)
    assert "job.toml: expected UTF-8" in line
    assert "iconv -f WINDOWS-1252 -t UTF-8 job.toml" in line


def test_absent_job_file_is_named(tmp_path):
    (line,) = errors_of(tmp_path / "none.toml")
    assert "none.toml: expected a file that can be read" in line


def test_paths_expand_the_home_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_job(write(MINIMAL), ["--job.dump_folder=~/runs"]).job.dump_folder == "/home/someone/runs"


def test_job_is_immutable(write):
    job = load_job(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        job.training.steps = 5


def test_changes_between_jobs_are_named(write):
    before = load_job(write(MINIMAL))
    after = load_job(write(MINIMAL), ["--training.steps=5", "--data.synthetic.fps=25.0", "--training.stop_at=3"])
    assert job_changes(plain_job(before), before) == []
    assert job_changes(plain_job(before), after) == [
        "data.synthetic.fps: 24.0 -> 25.0",
        "training.steps: 2000 -> 5",
        "training.stop_at: unset -> 3",
    ]


def test_loading_a_valid_job_warns_of_nothing(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_job(write(MINIMAL))


def test_every_field_is_documented():
    def undocumented(model, prefix=""):
        for name, field in model.model_fields.items():
            if not field.description and name != "type":
                yield prefix + name
            for nested in models_in(field.annotation):
                yield from undocumented(nested, f"{prefix}{name}.")

    assert list(undocumented(JobConfig)) == []


def test_job_can_be_built_from_tables_in_memory():
    tables = {
        "model": {"init": "random", "shape": "ltx-2-19b"},
        "data": {"source": "synthetic"},
        "audio": {"is_generated": True, "latents_dir": "audio_latents"},
    }
    assert build_job(tables, "here").video is None
    with pytest.raises(ConfigError, match=r"here: training\.stepz"):
        build_job(tables | {"training": {"stepz": 1}}, "here")
