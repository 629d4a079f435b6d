from pathlib import Path

from ltx_titan.config import JobConfig
from ltx_titan.config.reference import configuration_page

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_committed_page_is_current():
    remedy = "run `python -m ltx_titan.config.reference > docs/configuration.md` and commit the page"
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), remedy


def test_page_lists_every_key_with_type_default_and_description():
    page = configuration_page()
    for name, field in JobConfig.model_fields.items():
        assert f"\n## {name}\n" in page
        assert field.description in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(len(row.replace("\\|", "").split("|")) == 6 for row in rows)
    assert not any("|  |" in row for row in rows)
    for row in (
        "| `lr` | number > 0.0, <= 1.0 | `0.0001` | Peak learning rate",
        '| `mode` | `"full"`, `"lora"` | `"full"` |',
        "| `temporal_boundary` | integer >= 1 | required |",
        "| `spatial_region` | list of 4 integers | required |",
        "| `held_out_sigmas` | list of numbers > 0, <= 1 |",
        "| `checkpoint_path` | path | unset |",
    ):
        assert row in page, row


def test_page_documents_conditions_by_type():
    page = configuration_page()
    audio = page[page.index("### audio.conditions[]") : page.index("## sigma")]
    assert 'type = "reference"' in audio
    assert 'type = "first_frame"' not in audio
    assert "#### validation.samples[].conditions[]" in page
