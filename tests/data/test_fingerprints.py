"""What is read from fingerprints whose last line a killed process left incomplete."""

from ltx_titan.data.fingerprints import Fingerprint, FingerprintFile, recorded_options


def test_an_incomplete_line_of_options_is_ignored(tmp_path):
    file = FingerprintFile(tmp_path)
    file.set({"a.pt": Fingerprint({}, None, file.intern({"lora_trigger": "SKS"}), "")})
    file.close()
    path = tmp_path / "fingerprints.jsonl"
    assert recorded_options(tmp_path, "lora_trigger") == {"SKS"}
    path.write_bytes(path.read_bytes() + b'\n{"id":"5d0c","values":{"lora_trigger":"S\xff')
    assert recorded_options(tmp_path, "lora_trigger") == {"SKS"}
    assert FingerprintFile(tmp_path).entries.keys() == {"a.pt"}
