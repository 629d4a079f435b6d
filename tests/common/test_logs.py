"""What users see of warnings."""

import warnings

from ltx_titan.common.logs import quiet_libraries
from ltx_titan.config import load_job


def test_a_warning_about_a_job_is_printed_without_the_code_that_raises_it(tmp_path, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    quiet_libraries()
    job = tmp_path / "job.toml"
    job.write_text(
        '[model]\ninit = "random"\nshape = "ltx-2.3-22b"\nmode = "full"\n[data]\nsource = "synthetic"\n'
        '[video]\nis_generated = true\nlatents_dir = "latents"\n[lora]\nrank = 4\n'
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load_job(job)
    (one,) = [w for w in found if "[lora] has no effect" in str(w.message)]
    text = warnings.formatwarning(one.message, one.category, one.filename, one.lineno)
    assert text.startswith("warning: [lora] has no effect with model.mode")
    assert text.count("\n") == 1
    # Those of libraries keep the place that they come from.
    assert "torch/x.py:3" in warnings.formatwarning("old", UserWarning, "torch/x.py", 3, "")
