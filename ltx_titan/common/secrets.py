"""Keeps secrets out of messages, logs and saved files: credentials in URLs, and values of environment variables."""

import logging
import os
import re
from typing import Any

HIDDEN = "***"

# Names whose values are credentials, such as HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY or ALERT_WEBHOOK.
_NAMES = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|WEBHOOK)(_|$|URL)", re.IGNORECASE)
# A shorter value is no credential, and would hide ordinary words.
_SHORTEST = 8
_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
_PARAMETER = re.compile(r"(?i)([?&](?:[\w-]*(?:token|key|secret|password|signature|sig|credential)))=[^&\s'\"#]+")
# Services whose path is the credential.
_WEBHOOK = re.compile(r"(https?://(?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks)/)[^\s'\"]+")


def redacted(text: str) -> str:
    """Replaces every secret in a text by `***`."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _NAMES.search(name):
            text = text.replace(value, HIDDEN)
    text = _USER.sub(f"{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\1={HIDDEN}", text)
    return _WEBHOOK.sub(rf"\1{HIDDEN}", text)


def redacted_values(value: Any) -> Any:
    """Replaces secrets in all texts of nested tables and lists."""
    match value:
        case str():
            return redacted(value)
        case dict():
            return {key: redacted_values(item) for key, item in value.items()}
        case list() | tuple():
            return [redacted_values(item) for item in value]
    return value


class RedactingFilter(logging.Filter):
    """Replaces secrets in the messages of a logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the record in place; keeps every one."""
        record.msg, record.args = redacted(record.getMessage()), None
        return True
