import base64
import csv
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from ltx_titan.cli import main
from ltx_titan.commands.captioning.caption import CaptionOptions, caption_files
from ltx_titan.commands.captioning.table import CaptionTable
from ltx_titan.media import Audio, write_wav
from ltx_titan.tables.folders import VIDEO_SUFFIXES
from tests.media.clips import tone, write_clip


class Server(ThreadingHTTPServer):
    """OpenAI-compatible server that answers with the parts of a request; `refuses(number, body)` may fail it."""

    daemon_threads = True

    def __init__(self, refuses=lambda number, body: None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuses, self.bodies, self.keys, self.at_once, self.most_at_once = refuses, [], set(), 0, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(200, {"object": "list", "data": [{"id": "audio-visual", "object": "model"}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            number = len(server.bodies)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        refusal = server.refuses(number, body)
        if refusal is None:
            parts = body["messages"][0]["content"]
            frames = sum(part["type"] == "image_url" for part in parts)
            audio = sum(part["type"] == "input_audio" for part in parts)
            caption = f"{frames} frames and {audio} audio"
            text = f'Let me see.</think>\n```json\n{{"caption": "{caption}"}}\n```'
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            answer = (200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        else:
            answer = refusal
        with server.lock:
            server.at_once -= 1
        self._answer(*answer)

    def _answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of typical files; every test writes a table of another name into it."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", frames=25)
    write_clip(folder / "mönö ☃.mp4", frames=50, channels=1)
    write_clip(folder / "silent.mp4", frames=25, channels=0)
    Image.new("RGB", (90, 50), "orange").save(folder / "still.png")
    (folder / "zero.mp4").touch()
    cut = write_clip(folder / "cut.mp4", frames=20)
    cut.write_bytes(cut.read_bytes()[:2000])
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(body):
    return "\n".join(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")


def test_a_folder_is_captioned_and_bad_files_are_named(clips, console):
    output = clips / "first.jsonl"
    with Server() as server:
        report = caption_files(CaptionOptions(clips, output, server=server.url, fps=2, num_workers=2), console)
    assert rows_of(output) == [
        {"video": "a.mp4", "caption": "2 frames and 1 audio"},
        {"video": "mönö ☃.mp4", "caption": "4 frames and 1 audio"},
        {"video": "silent.mp4", "caption": "2 frames and 0 audio"},
        {"video": "still.png", "caption": "1 frames and 0 audio"},
    ]
    assert report.counts["caption"] == {"done": 4, "failed": 2}
    reasons = {Path(item).name: reason for _, item, reason in report.failures}
    assert reasons.keys() == {"zero.mp4", "cut.mp4"}
    assert "0 bytes" in reasons["zero.mp4"]
    asked = {texts(body).count(" s:"): texts(body) for body in server.bodies}
    assert "0.2 s:\n0.7 s:\n1.2 s:" in asked[4]
    assert "audio is attached" in asked[4]
    assert all(body["model"] == "audio-visual" for body in server.bodies)
    silent = next(text for body in server.bodies if "There is no sound" in (text := texts(body)))
    assert "attached" not in silent


def test_failed_requests_are_named_and_a_second_run_repeats_only_them(clips, console):
    output = clips / "second.json"

    def refuses(number, body):
        if texts(body).count(" s:") == 4:
            return 400, {"error": {"message": "this model takes no audio", "type": "BadRequestError"}}
        return (503, {"error": {"message": "busy"}}) if number == 1 else None

    options = CaptionOptions(clips, output, num_workers=1, extensions="mp4,PNG")
    with Server(refuses) as server:
        report = caption_files(CaptionOptions(**{**vars(options), "server": server.url}), console)
    # A busy server is retried, a rejected request is not.
    assert report.counts["caption"] == {"done": 3, "failed": 3}
    assert (
        "caption",
        str(clips / "mönö ☃.mp4"),
        "the server returned 400: this model takes no audio",
    ) in report.failures
    assert len(server.bodies) == 5
    interrupted = output.read_bytes()
    with Server() as server:
        report = caption_files(CaptionOptions(**{**vars(options), "server": server.url}), console)
    assert len(server.bodies) == 1
    assert report.counts["caption"] == {"skipped": 3, "done": 1, "failed": 2}
    again = json.loads(output.read_text())
    assert [row["video"] for row in again] == ["a.mp4", "mönö ☃.mp4", "silent.mp4", "still.png"]
    assert [row for row in again if row["video"] != "mönö ☃.mp4"] == json.loads(interrupted)


def test_captions_of_a_killed_run_are_kept(clips, console):
    output = clips / "killed.jsonl"
    journal = clips / ".killed.jsonl.journal"
    # A killed run leaves a journal whose last line may be incomplete.
    journal.write_text('\n{"media": "a.mp4", "caption": "a tone"}\n\n{"media": "silent.mp4", "capt', encoding="utf-8")
    with Server() as server:
        caption_files(CaptionOptions(clips, output, server=server.url), console)
    assert len(server.bodies) == 3
    assert [row["caption"] for row in rows_of(output)][:2] == ["a tone", "4 frames and 1 audio"]
    assert not journal.exists()


def test_a_clip_whose_name_is_not_utf_8_is_captioned(clips, tmp_path, console):
    name = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / name).symlink_to(clips / "a.mp4")
    with Server() as server:
        report = caption_files(CaptionOptions(tmp_path, server=server.url), console)
        # After a kill: the caption is in the journal alone.
        journal = CaptionTable(tmp_path, None, VIDEO_SUFFIXES, recursive=False)
        journal.add(tmp_path / name, "again")
        again = CaptionTable(tmp_path, None, VIDEO_SUFFIXES, recursive=False)
        again.save()
    assert report.counts["caption"] == {"done": 1}, report.failures
    assert rows_of(tmp_path / "dataset.jsonl") == [{"video": name, "caption": "again"}]


def test_a_server_that_stops_ends_the_run_and_loses_nothing(clips, console):
    output = clips / "gone.jsonl"
    with Server() as server:
        first = CaptionOptions(clips, output, server=server.url, num_workers=1, retries=0)
        # It stops with its first answer.
        server.refuses = lambda number, body: server.close()
        with pytest.raises(ValueError, match=r"stopped answering.*captions so far are saved"):
            caption_files(first, console)
    with Server() as server:
        report = caption_files(CaptionOptions(clips, output, server=server.url), console)
    assert report.counts["caption"]["skipped"] == 1
    assert len(rows_of(output)) == 4


def test_a_table_gets_a_column_and_keeps_the_others(clips, console):
    table = clips / "table.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["media_path", "caption", "split"], ["a.mp4", "", "train"], ["silent.mp4", "kept", "test"]])
    sub = clips / "sub" / "out.csv"
    with Server() as server:
        caption_files(CaptionOptions(table, sub, server=server.url, skip_audio=True), console)
        caption_files(CaptionOptions(table, server=server.url, skip_audio=True), console)
    with table.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [
            {"media_path": "a.mp4", "caption": "2 frames and 0 audio", "split": "train"},
            {"media_path": "silent.mp4", "caption": "kept", "split": "test"},
        ]
    assert "say nothing about sounds" in texts(server.bodies[0])
    with sub.open(newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["media_path"] == str(clips / "a.mp4")


def test_audio_files_and_text_output(tmp_path, console):
    write_wav(tmp_path / "rain.wav", Audio(tone(1.0, 44100), 44100))
    options = CaptionOptions(tmp_path, tmp_path / "out.txt")
    for requests in (1, 0):
        with Server() as server:
            caption_files(CaptionOptions(**{**vars(options), "server": server.url}), console)
        assert len(server.bodies) == requests
    assert (tmp_path / "out_captions.txt").read_text() == "0 frames and 1 audio\n"
    assert (tmp_path / "out_paths.txt").read_text() == "rain.wav\n"


def test_the_file_itself_and_further_fields(clips, console):
    options = CaptionOptions(clips / "a.mp4", clips / "file.json", send="video", extra_body='{"top_k": 1}')
    with Server() as server:
        caption_files(CaptionOptions(**{**vars(options), "server": server.url, "api_key": "secret"}), console)
    (body,) = server.bodies
    sent = next(part["video_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "video_url")
    assert base64.b64decode(sent.removeprefix("data:video/mp4;base64,")) == (clips / "a.mp4").read_bytes()
    assert body["top_k"] == 1
    assert server.keys == {"Bearer secret"}


def test_several_requests_at_once(clips, console):
    meeting = threading.Barrier(2)

    def wait_for_another(number, body):
        if number <= 2:
            meeting.wait(timeout=60)  # a request that stays alone breaks the barrier, and the test

    with Server(wait_for_another) as server:
        caption_files(CaptionOptions(clips, clips / "fast.jsonl", server=server.url, num_workers=3), console)
    assert 2 <= server.most_at_once <= 3


def test_ranks_share_the_work_and_the_table(clips, console, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with Server() as server:
            report = caption_files(CaptionOptions(clips, clips / "ranks.jsonl", server=server.url), console)
        done.append(report.counts["caption"]["done"])
    assert done == [1, 3]
    assert [row["video"] for row in rows_of(clips / "ranks.jsonl")] == [
        "a.mp4",
        "mönö ☃.mp4",
        "silent.mp4",
        "still.png",
    ]


def test_dry_run_sends_nothing_and_shows_the_request(clips, console):
    report = caption_files(CaptionOptions(clips / "a.mp4", server="http://127.0.0.1:9/v1", dry_run=True), console)
    printed = console.file.getvalue()
    assert "2 frame(s) of 96x64, 1.0 s of audio" in printed
    assert "word for word" in printed
    assert report.notes["would be captioned"] == 1
    assert not (clips / "a.dataset.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--server", "http://127.0.0.1:9/v1"], "vllm serve"),
        (["--server", "URL", "--model", "other"], "has no model 'other'"),
        (["--extra-body", "{"], "--extra-body: not valid JSON"),
        (["--output", "x.parquet"], "not a table"),
        (["--local-model", "nowhere"], "no config.json"),
    ],
)
def test_invalid_options_are_refused(clips, capsys, arguments, message):
    with Server() as server:
        arguments = [server.url if argument == "URL" else argument for argument in arguments]
        assert main(["caption", str(clips / "a.mp4"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not server.bodies
