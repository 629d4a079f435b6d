"""Metadata of LoRA files, as model managers read it."""

import json

import torch

from ltx_titan.build import export_adapters
from ltx_titan.config import load_job
from ltx_titan.data.fingerprints import Fingerprint, FingerprintFile
from ltx_titan.lora import adapter_weights
from ltx_titan.weights import LoRAFacts, read_metadata, read_source
from tests.jobs import write_job
from tests.lora.adapted import adapted, settings, write_checkpoint


def header(tmp_path, job_path, scale=None, **metadata):
    base = write_checkpoint(tmp_path / "base-dev.safetensors")
    source = read_source(str(base), None, None)
    source.metadata.update(metadata)
    job = load_job(job_path)
    out = tmp_path / "lora-step-2.safetensors"
    export_adapters(adapter_weights(adapted(settings())), out, job, source, scale, torch.bfloat16, "with_connectors")
    return read_metadata(out).raw, job


def lora_job(tmp_path, nano_path, data_root, **fields):
    return write_job(tmp_path, nano_path, data_root, model__mode="lora", lora__rank=4, lora__alpha=8.0, **fields)


def test_the_header_states_base_rank_alpha_job_trigger_and_license(tmp_path, nano_path, data_root):
    path = lora_job(tmp_path, nano_path, data_root, job__trigger="SKSDOG", job__license="apache-2.0")
    raw, job = header(tmp_path, path, (2, 1))
    assert raw["ss_sd_model_name"] == "base-dev.safetensors"
    assert raw["ss_base_model_version"] == "ltx-2.3"
    assert raw["modelspec.architecture"] == "ltx-2.3/lora"
    # B holds alpha / rank, so that whoever computes alpha / rank from these gets 1.
    assert (raw["ss_network_dim"], raw["ss_network_alpha"]) == ("4", "4")
    assert raw["reference_downscale_factor"] == "2"
    facts = LoRAFacts.read(raw)
    assert (facts.base, facts.alpha, facts.trigger) == ("base-dev.safetensors", "8", "SKSDOG")
    assert facts.license == "apache-2.0"
    again, _ = header(tmp_path, path)
    assert LoRAFacts.read(again).job_digest == facts.job_digest
    changed, _ = header(tmp_path, lora_job(tmp_path, nano_path, data_root, training__seed=7))
    assert LoRAFacts.read(changed).job_digest != facts.job_digest


def test_trigger_and_license_default_to_those_of_data_and_base(tmp_path, nano_path, data_root):
    root = tmp_path / "data"
    file = FingerprintFile(root / "conditions")
    options = file.intern({"lora_trigger": "MYCAT", "model": "x"})
    file.set({"a.pt": Fingerprint({}, None, options, file.intern({"path": "t.csv"}))})
    file.close()
    path = lora_job(tmp_path, nano_path, root)
    raw, _ = header(tmp_path, path, license="LTX-2 Community License")
    facts = LoRAFacts.read(raw)
    assert (facts.trigger, facts.license) == ("MYCAT", "LTX-2 Community License")


def test_nothing_is_claimed_that_nobody_stated(tmp_path, nano_path, data_root):
    raw, _ = header(tmp_path, lora_job(tmp_path, nano_path, data_root))
    facts = LoRAFacts.read(raw)
    assert facts.trigger is None
    assert facts.license is None
    assert not any("null" in value or "None" in value for value in raw.values())
    assert json.dumps(raw)
