import pytest

from ltx_titan.config import ConfigError, build_job

BASE = {
    "model": {"init": "random", "shape": "ltx-2.3-22b"},
    "data": {"source": "synthetic"},
    "video": {"is_generated": True, "latents_dir": "latents"},
}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("activation_checkpoint", "mode", "selective"),
        ("parallelism", "cp", 2),
        ("parallelism", "tp", 2),
        ("float8", "recipe", "rowwise"),
    ],
)
def test_request_that_this_version_cannot_fulfil_is_refused(section, key, value):
    with pytest.raises(ConfigError, match=rf"{section}\.{key} = .*it does not do"):
        build_job(BASE | {section: BASE.get(section, {}) | {key: value}}, "job.toml")
