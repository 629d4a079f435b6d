"""The page of a run: complete, without anything to load from elsewhere, and harmless whatever users write."""

import base64
import json
import logging
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ltx_titan.config import load_job
from ltx_titan.validation import report
from ltx_titan.validation.report import RunReport, render

HOSTILE = '<script src="http://evil.example/x.js">alert(1)</script> & "quoted"'
VOID = {"meta", "img", "line", "polyline", "circle", "rect"}


class Page(HTMLParser):
    """Elements of a page with their attributes, and its text; checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def sources(self, *tags: str) -> list[str]:
        return [attributes["src"] for tag, attributes in self.elements if tag in tags and "src" in attributes]

    def loaded(self) -> list[str]:
        """Everything that a browser would fetch."""
        names = ("src", "href", "poster", "data", "srcset", "xlink:href", "action")
        return [values[name] for _, values in self.elements for name in names if name in values]


def write_run(folder: Path, steps: int = 30, *, mode: str = "lora", extra: str = "") -> Path:
    """Files of a run that validated before training and every 10 steps: the job as resolved, metrics and clips."""
    folder.mkdir(parents=True)
    base, data = folder.parent / "base.safetensors", folder.parent / "clips"
    base.touch()
    data.mkdir()
    job = folder / "job.toml"
    job.write_text(
        f"""
[job]
dump_folder = {json.dumps(str(folder))}
description = {json.dumps(HOSTILE)}
[model]
checkpoint_path = {json.dumps(str(base))}
mode = "{mode}"
[data]
root = {json.dumps(str(data))}
[video]
is_generated = true
latents_dir = "latents"
{extra}
"""
    )
    lines = [
        {"step": step, "loss": 1 / step, "loss_video": 1 / step, "loss_audio": None, "step_time_s": 2.0, "lr": 1e-4}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(0, steps + 1, 10):
        clips = folder / "samples" / f"step-{step}"
        clips.mkdir(parents=True)
        for name in ("sample-01.mp4", "sample-02.wav", "sample-03.png"):
            (clips / name).write_bytes(f"{name} of step {step}".encode())
        (clips / "contact-sheet.png").write_bytes(b"sheet")
    return job


def test_the_page_embeds_every_clip_in_order_and_loads_nothing(tmp_path):
    job = load_job(write_run(tmp_path / "run"), [])
    page = Page(render(tmp_path / "run", job, 30, 30, ["a rabbit", "a hill", "a tree"]))
    for tag, kind, name in (
        ("video", "video/mp4", "sample-01.mp4"),
        ("audio", "audio/wav", "sample-02.wav"),
        ("img", "image/png", "sample-03.png"),
    ):
        encoded = [source.removeprefix(f"data:{kind};base64,") for source in page.sources(tag)]
        assert [base64.b64decode(e).decode() for e in encoded] == [f"{name} of step {s}" for s in (0, 10, 20, 30)]
    assert all(source.startswith("data:") for source in page.loaded())
    for shown in ("before training", "step 10", "step 20", "step 30", "a rabbit", "a hill", "a tree", "1 min"):
        assert shown in page.text
    assert sum(tag == "svg" for tag, _ in page.elements) == 3  # loss, learning rate, step time


def test_clips_beyond_the_size_of_the_page_are_links_to_their_files(tmp_path, monkeypatch):
    job = load_job(write_run(tmp_path / "a run #1"), [])
    monkeypatch.setattr(report, "EMBEDDED_BYTES", 3 * len("sample-01.mp4 of step 30"))
    page = Page(render(tmp_path / "a run #1", job, 30, 30))
    assert [source.startswith("data:") for source in page.sources("video")] == [False, False, False, True]
    assert page.sources("video")[0] == "samples/step-0/sample-01.mp4"
    assert "newest 3 of 12 clips" in page.text
    assert not any("//" in source for source in page.loaded() if not source.startswith("data:"))


def test_text_of_users_is_text_on_the_page(tmp_path):
    job = load_job(write_run(tmp_path / "run"), [])
    page = Page(render(tmp_path / "run", job, 30, 30, [HOSTILE]))
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{}]
    assert page.text.count(HOSTILE) == 3  # heading, title of the window, prompt


def test_a_page_during_the_run_shows_no_steps_of_an_earlier_run_and_no_result(tmp_path):
    job = load_job(write_run(tmp_path / "run"), [])
    page = Page(render(tmp_path / "run", job, 10, 30))
    assert "step 10 of 30" in page.text
    assert "step 20" not in page.text
    assert "ComfyUI" not in page.text


@pytest.mark.parametrize(
    ("mode", "extra", "shown"),
    [
        ("lora", "", ["LoraLoaderModelOnly", "load_lora_weights", "--lora", "ltx_pipelines.ti2vid_two_stages"]),
        (
            "lora",
            'conditions = [{ type = "reference", latents_dir = "reference_latents" }]',
            ["LTX IC-LoRA Loader Model Only", "LTX2InContextPipeline", "ltx_pipelines.ic_lora"],
        ),
        ("full", "", ["UNETLoader", "--transformer-path", "from_single_file", 'export_layout = "complete"']),
        (
            "full",
            '[checkpoint]\nexport_layout = "complete"',
            ["CheckpointLoaderSimple", "--checkpoint-path", "from_single_file"],
        ),
    ],
)
def test_the_page_says_how_to_use_what_was_exported(tmp_path, mode, extra, shown):
    job = load_job(write_run(tmp_path / "run", 2, mode=mode, extra=extra), [])
    page = Page(render(tmp_path / "run", job, 2, 2, export=tmp_path / "run/export/result.safetensors"))
    for words in (*shown, "result.safetensors", "diffusers"):
        assert words in page.text


def test_an_error_is_logged_once_and_ends_nothing(tmp_path, caplog):
    job = load_job(write_run(tmp_path / "run"), [])
    (tmp_path / "run/metrics.jsonl").write_text("damaged\n{}\n")
    writer = RunReport(job, 30)
    with caplog.at_level(logging.WARNING):
        writer.write(10)
        writer.write(20)
    (record,) = caplog.records
    assert "report.html" in record.getMessage()
    assert not (tmp_path / "run/report.html").exists()
