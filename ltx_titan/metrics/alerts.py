"""Tells the outside world that a run has finished, failed, skipped a step, or stalled: a webhook, a command, or both.

Every alert is sent by a thread of its own and may fail; training neither waits for it nor ends because of it.
"""

import json
import logging
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ltx_titan.config import AlertsSection

logger = logging.getLogger(__name__)

Event = Literal["finished", "failed", "spiking", "stalled"]

_LIMIT_S = 10.0
# An alert for each of a hundred skipped steps would be muted.
_PAUSE_S = 300.0


class Alerts:
    """Sends the events of one run.

    Args:
        settings: the job's `[alerts]`.
        folder: the dump folder, which names the run.
        is_sender: False on all ranks but 0: every method then does nothing.
    """

    def __init__(self, settings: AlertsSection, folder: Path, *, is_sender: bool) -> None:
        self._settings, self._folder = settings, folder
        self._events = settings.events if is_sender else ()
        self._last: dict[Event, float] = {}
        self._threads: list[threading.Thread] = []

    def send(self, event: Event, text: str, step: int) -> None:
        """Sends an event if the job asks for it, at most one of a kind every five minutes; returns at once."""
        now = time.monotonic()
        if event not in self._events or now - self._last.get(event, -_PAUSE_S) < _PAUSE_S:
            return
        self._last[event] = now
        body = json.dumps(
            {
                "event": event,
                # The field that Slack, Mattermost and Discord-compatible hooks show.
                "text": f"{self._folder} on {socket.gethostname()}: {event} at step {step}. {text}",
                "step": step,
                "run": str(self._folder),
                "time": time.time(),
            }
        )
        if self._settings.webhook_variable is not None:
            self._start(self._post, event, body)
        if self._settings.command:
            self._start(self._execute, event, body)

    def close(self) -> None:
        """Waits for alerts that are being sent, some seconds at most."""
        deadline = time.monotonic() + _LIMIT_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _start(self, send: Callable[[str], None], event: Event, body: str) -> None:
        def run() -> None:
            try:
                send(body)
            except Exception as error:  # of any kind: it must not reach training
                # The type only: the text of an HTTP error may repeat the URL, which is a secret.
                logger.warning("alert %r could not be sent: %s", event, type(error).__name__)

        thread = threading.Thread(target=run, name="alert", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _post(self, body: str) -> None:
        url = os.environ[str(self._settings.webhook_variable)]
        request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_LIMIT_S):
            pass

    def _execute(self, body: str) -> None:
        subprocess.run(
            list(self._settings.command),
            input=body,
            text=True,
            timeout=_LIMIT_S,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
