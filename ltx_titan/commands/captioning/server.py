"""Captioning model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, LM Studio, a commercial one.

Frames are sent as images with their times in between, which every server with a vision model accepts. Only some accept
whole videos, and each samples frames in its own way.
"""

import base64
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from ltx_titan.commands.captioning.parts import ClipParts, jpeg_url, wav_base64

LAUNCH = """\
vllm serve Qwen/Qwen3-Omni-30B-A3B-Instruct --port 8001 --max-model-len 32768 \\
      --limit-mm-per-prompt '{"image": 64, "audio": 1, "video": 1}'"""

Captioner = Callable[[ClipParts, str], str]
"""(parts of a file, instruction) -> answer of the model."""


class CaptionError(Exception):
    """One file could not be captioned; others may succeed."""


class ServerUnreachable(Exception):
    """The server stopped answering, so no further file can be captioned."""


def server_captioner(
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    *,
    max_tokens: int = 4096,
    temperature: float = 0.0,
    timeout_s: float = 600.0,
    retries: int = 3,
    send: Literal["frames", "video"] = "frames",
    extra_body: Mapping[str, Any] | None = None,
) -> Captioner:
    """Connects to a server; the returned function may be called from several threads.

    Args:
        url: base address, for example http://127.0.0.1:8001/v1.
        model: name of the model on the server; None selects the first that it lists.
        api_key: None reads the variable OPENAI_API_KEY.
        max_tokens: maximal length of an answer, reasoning included.
        temperature: sampling temperature; 0 is greedy.
        timeout_s: timeout of one request.
        retries: retries of a failed request, with exponential backoff.
        send: sampled frames with their times, or the video file itself.
        extra_body: further fields of the request that some servers understand.

    Raises:
        ValueError: the server does not answer, or does not serve the model.
    """
    openai = _library()
    _check_url(url)
    # The client retries by itself, with backoff, on connection errors, timeouts and overload.
    client = openai.OpenAI(base_url=url, api_key=api_key or _key(), timeout=timeout_s, max_retries=retries)
    model = _check(client, openai, url, model)
    failures = _FailureCount()

    def caption(parts: ClipParts, instruction: str) -> str:
        content = [*(_file(parts) if send == "video" else _frames(parts)), *_audio(parts)]
        content.append({"type": "text", "text": instruction})
        try:
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": content}],
                max_tokens=max_tokens,
                temperature=temperature,
                extra_body=dict(extra_body or {}),
            )
        # Before APIConnectionError, its base class: a slow answer is not a server that is gone.
        except openai.APITimeoutError as error:
            raise CaptionError(f"no answer within {timeout_s:g} s (--timeout)") from error
        except openai.APIConnectionError as error:
            if failures.add() >= _GIVE_UP_AFTER:
                raise ServerUnreachable(f"{url} stopped answering ({error})") from error
            raise CaptionError(f"the server cannot be reached ({error})") from error
        except openai.APIStatusError as error:
            raise CaptionError(f"the server returned {error.status_code}: {_message(error)}") from error
        except openai.OpenAIError as error:
            raise CaptionError(f"the answer of the server is invalid ({error})") from error
        failures.clear()
        if not answer.choices:
            raise CaptionError("the answer of the server contains no choice")
        return answer.choices[0].message.content or ""

    return caption


# One request can hit a restart of the server; several in a row mean that it is down.
_GIVE_UP_AFTER = 3


class _FailureCount:
    """Consecutive connection failures, counted by several threads."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()

    def add(self) -> int:
        with self._lock:
            self._count += 1
            return self._count

    def clear(self) -> None:
        with self._lock:
            self._count = 0


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_complete = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # an address or a port that is none
        is_complete = False
    if not is_complete:
        raise ValueError(f"--server {url}: expected an address such as http://127.0.0.1:8001/v1; correct it")


def _library() -> Any:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ValueError('--server needs the package openai: pip install "ltx-titan[captioning]"') from error
    return openai


def _key() -> str:
    # The client requires a key; local servers ignore it.
    return os.environ.get("OPENAI_API_KEY") or "none"


def _check(client: Any, openai: Any, url: str, model: str | None) -> str:
    """Checks that the server serves the model; returns its name."""
    try:
        # No retries and a short timeout: a mistyped address should fail in seconds.
        names = [entry.id for entry in client.with_options(timeout=20, max_retries=0).models.list()]
    except openai.APIConnectionError as error:
        raise ValueError(
            f"--server {url}: connection failed ({error}). Start a local server with\n  {LAUNCH}"
        ) from error
    except openai.APIStatusError as error:
        if model is not None and error.status_code == 404:
            return model  # not every server lists its models
        raise ValueError(f"--server {url}: returned {error.status_code}: {_message(error)}") from error
    except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"--server {url}: not an OpenAI-compatible server ({error}); its address usually ends in /v1"
        ) from error
    if model is None and not names:
        raise ValueError(f"--server {url}: lists no model; set --model")
    if model is not None and names and model not in names:
        raise ValueError(f"--server {url}: has no model {model!r}, it serves {names}; correct --model")
    return model or names[0]


def _message(error: Any) -> str:
    # Servers nest the message differently: `error.message`, `error`, or `message` alone.
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        body = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(body or error.message).split())[:500]


def _frames(parts: ClipParts) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for time_s, frame in parts.frames:
        if parts.kind == "video":
            content.append({"type": "text", "text": f"{time_s:.1f} s:"})
        content.append({"type": "image_url", "image_url": {"url": jpeg_url(frame)}})
    return content


def _file(parts: ClipParts) -> list[dict[str, Any]]:
    if parts.kind != "video":
        return _frames(parts)
    # Inline, because the server may run on another machine and cannot read our paths.
    encoded = base64.b64encode(parts.path.read_bytes()).decode()
    kind = {".webm": "webm", ".mov": "quicktime", ".mkv": "x-matroska"}.get(parts.path.suffix.lower(), "mp4")
    return [{"type": "video_url", "video_url": {"url": f"data:video/{kind};base64,{encoded}"}}]


def _audio(parts: ClipParts) -> list[dict[str, Any]]:
    if parts.audio is None:
        return []
    return [{"type": "input_audio", "input_audio": {"data": wav_base64(parts.audio), "format": "wav"}}]
