"""Instruction for a captioning model, and the caption in its answer.

The instruction states whether audio is attached. A caption that describes audio which the clip does not have teaches
the trained model to ignore captions, and one that omits audible speech wastes the audio track.
"""

import json
import re
from typing import Literal

MediaKind = Literal["video", "image", "audio"]

AudioState = Literal["attached", "absent", "not sent"]
"""Audio of a file as its captioning model receives it: attached, absent from the file, or present but not sent."""

_KEY = "caption"

_VIDEO = """\
Describe this video clip in one exhaustive paragraph for training a model that generates video and audio from text.

Go through it in the order of events. Say who and what is there (looks, clothes, age, materials, colors), where it is
and in what light, and what happens, movement by movement. Say how it is filmed: the kind of shot, the angle, how the
camera moves, and the look (live action, animation, film grain, colors). Quote text that can be read.
"""
_IMAGE = """\
Describe this image in one exhaustive paragraph for training a model that generates images from text.

Say who and what is there (looks, clothes, age, materials, colors), where it is and in what light, what happens, how
it is framed and at what angle, and the look (photograph, drawing, film grain, colors). Quote text that can be read.
"""
_AUDIO_ONLY = """\
Describe this audio recording in one exhaustive paragraph for training a model that generates audio from text, in the
order of events.
"""
_AUDIO: dict[AudioState, str] = {
    "attached": """
The clip's audio is attached. Describe all of it where it happens: speech word for word in quotation marks, with its
language, voice and tone; music with its instruments, tempo and mood; noises and the sound of the room. If there is no
speech, or no music, say so.
""",
    "absent": """
The clip has no sound. End with: "There is no sound." Do not describe any.
""",
    "not sent": """
Describe only what can be seen; say nothing about sounds.
""",
}
_FORM = f"""
State only what is certain. Do not begin with "The video shows" or the like. Answer with JSON of this form and nothing
else: {{"{_KEY}": "..."}}
"""

# Reasoning models answer after a closing tag; some servers strip the opening one.
_REASONING = re.compile(r"^.*?</think(?:ing)?>", re.DOTALL)
_CODE_FENCE = re.compile(r"^```[a-z]*\s*|\s*```$")
# The caption of an answer that reached --max-tokens within the JSON string.
_TRUNCATED = re.compile(r'^\{\s*"[a-z_ ]+"\s*:\s*"(?P<text>.*)$', re.DOTALL | re.IGNORECASE)


def instruction(kind: MediaKind, audio: AudioState, custom: str | None = None) -> str:
    """Builds the instruction for one file.

    Args:
        kind: media type of the file.
        audio: whether its audio is attached.
        custom: instruction of the user that replaces the built-in one; the statement about audio is appended to it.
    """
    if custom is not None:
        return custom.strip() + ("" if kind == "image" else "\n" + _AUDIO[audio])
    if kind == "image":
        return _IMAGE + _FORM
    return (_VIDEO if kind == "video" else _AUDIO_ONLY) + _AUDIO[audio] + _FORM


def read_answer(answer: str | None) -> str:
    """Extracts the caption from a model's answer: removes reasoning, code fences and JSON, also if it is truncated.

    Raises:
        ValueError: the answer contains no caption.
    """
    text = _REASONING.sub("", answer or "").strip()
    if text.startswith("<think"):
        raise ValueError("the model spent all tokens on reasoning; raise --max-tokens, or disable thinking")
    text = _CODE_FENCE.sub("", text).strip()
    if text.startswith("{"):
        text = _from_json(text)
    caption = " ".join(text.split())
    if not caption:
        raise ValueError("the model's answer contains no caption")
    return caption


def _from_json(text: str) -> str:
    try:
        # Not strict: models put raw line breaks into strings.
        found = json.loads(text, strict=False)
    except json.JSONDecodeError:
        truncated = _TRUNCATED.match(text)
        if truncated is None:
            return text
        # The closing quote is missing, or the JSON is followed by other text.
        return truncated["text"].rstrip('`}\n\t "\\').replace('\\"', '"').replace("\\n", " ")
    values = [value for value in found.values() if isinstance(value, str)]
    return found[_KEY] if isinstance(found.get(_KEY), str) else " ".join(values)
