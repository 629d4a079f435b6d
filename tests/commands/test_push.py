"""`ltx-titan push` against a local server that speaks the Hub's protocol."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
import yaml

from ltx_titan.cli import main
from ltx_titan.commands.push import push_finished
from ltx_titan.config import dump_job, load_job
from ltx_titan.weights import save_safetensors
from tests.jobs import small_validation, write_job

TOKEN = "hf_secretSecretSECRET"


class Hub(ThreadingHTTPServer):
    """A Hub with one repository; `status` other than 200 refuses what comes after the repository was created."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.files, self.objects, self.created, self.tokens = 200, {}, {}, [], set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer({"url": f"{hub.url}/me/film"})
        elif hub.status != 200:
            self.answer({"error": f"no access for {self.headers.get('Authorization')}"}, hub.status)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            # Large files as LFS objects, as the Hub does.
            modes = {True: "lfs", False: "regular"}
            files = json.loads(body)["files"]
            self.answer({"files": [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith((".safetensors", ".mp4"))],
                 "shouldIgnore": False} for f in files]})  # fmt: skip
        elif self.path.endswith("/objects/batch"):
            self.answer({"transfer": "basic", "objects": [
                {**entry, "actions": {"upload": {"href": f"{hub.url}/object/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]]})  # fmt: skip
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            self.answer({"commitOid": "0" * 40, "commitUrl": f"{hub.url}/me/film/commit/{'0' * 40}"})
        else:
            self.answer({"error": self.path}, 404)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer({})

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def finished(tmp_path, nano_path, data_root):
    """The dump folder of a finished LoRA job with two validations, and its job."""
    samples = [{"prompt": "A dog <b>barks"}, {"prompt": "Rain"}]
    job = load_job(write_job(
        tmp_path, nano_path, data_root, model__mode="lora", hub__repo="me/film", job__license="apache-2.0",
        job__trigger="SKSDOG", training__steps=4, **small_validation(nano_path, samples=samples)))  # fmt: skip
    folder = tmp_path / "run"
    (folder / "export").mkdir(parents=True)
    save_safetensors(folder / "export" / "lora-step-4.safetensors", {"a": torch.ones(2)}, {})
    for step in (2, 10):
        (folder / "samples" / f"step-{step}").mkdir(parents=True)
        (folder / "samples" / f"step-{step}" / "sample-01.mp4").write_bytes(b"clip %d" % step)
        (folder / "samples" / f"step-{step}" / "contact-sheet.png").write_bytes(b"sheet")
    (folder / "job.toml").write_text(dump_job(job))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 4, "loss": 1.25, "loss_audio": null}\n')
    return folder, job


def test_weights_card_clips_job_and_metrics_are_uploaded(hub, finished, capsys):
    folder, _ = finished
    assert main(["push", str(folder)]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{hub.url}/me/film")
    expected = {"README.md", "lora-step-4.safetensors", "job.toml", "metrics.jsonl", "clips/sample-01.mp4"}
    assert set(hub.files) == expected
    assert hub.files["clips/sample-01.mp4"] == b"clip 10"
    weights = (folder / "export" / "lora-step-4.safetensors").read_bytes()
    assert hub.files["lora-step-4.safetensors"] == weights
    (created,) = hub.created
    # Older and newer versions of the protocol.
    assert created.get("private") or created["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in hub.files.values())

    _, header, text = hub.files["README.md"].decode().split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert (metadata["license"], metadata["instance_prompt"]) == ("apache-2.0", "SKSDOG")
    assert metadata["pipeline_tag"] == "text-to-video"
    assert metadata["widget"] == [{"text": "A dog <b>barks", "output": {"url": "clips/sample-01.mp4"}}]
    assert "1.2500 at the last step" in text
    assert "A dog &lt;b>barks" in text


@pytest.mark.parametrize("fault", ["no token", "refused", "no server", "no weights"])
def test_a_failed_upload_is_one_line_without_the_token(fault, hub, finished, monkeypatch, capsys):
    folder, job = finished
    expected = {"no token": "HF_TOKEN is not set", "refused": "403", "no server": "failed", "no weights": "found none"}
    if fault == "no token":
        monkeypatch.delenv("HF_TOKEN")
    if fault == "refused":
        hub.status = 403
    if fault == "no server":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if fault == "no weights":
        (folder / "export" / "lora-step-4.safetensors").unlink()
    assert main(["push", str(folder)]) == 1
    error = capsys.readouterr().err
    assert expected[fault] in error
    assert TOKEN not in error
    assert "Traceback" not in error
    # At the end of a run it is a message: the run is complete.
    push_finished(job)
    error = capsys.readouterr().err
    if fault == "no weights":
        assert "nothing is uploaded to me/film" in error
    else:
        assert "the run is complete" in error
        assert f"ltx-titan push {folder}" in error
    assert TOKEN not in error
    assert not hub.files


def test_the_end_of_a_run_uploads_if_the_job_asks_for_it(hub, finished, capsys):
    folder, job = finished
    push_finished(job.model_copy(update={"hub": job.hub.model_copy(update={"repo": None})}))
    assert not hub.created
    push_finished(job)
    assert "lora-step-4.safetensors" in hub.files
    assert "uploaded to" in capsys.readouterr().err


def test_a_run_that_was_stopped_uploads_no_export_of_an_earlier_step(hub, finished, capsys):
    _, job = finished
    push_finished(job.model_copy(update={"training": job.training.model_copy(update={"steps": 8})}))
    assert not hub.created
    assert "export/lora-step-8.safetensors does not exist" in capsys.readouterr().err


def test_a_dry_run_uploads_nothing_and_needs_no_token(finished, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    folder, _ = finished
    assert main(["push", str(folder), "--repo", "me/other", "--dry-run", "--hub.base_model=Lightricks/LTX-2"]) == 0
    printed = capsys.readouterr().out
    assert "lora-step-4.safetensors" in printed
    assert "base_model: Lightricks/LTX-2" in printed
    assert main(["push", str(folder), "--repo", "other", "--dry-run"]) == 1
    assert "expected OWNER/NAME" in capsys.readouterr().err


def test_license_that_the_hub_does_not_know_is_named(finished, capsys):
    folder, _ = finished
    assert main(["push", str(folder), "--dry-run", "--job.license=LTX-2 Community"]) == 0
    printed = capsys.readouterr().out
    assert "license: other" in printed
    assert "license_name: LTX-2 Community" in printed
