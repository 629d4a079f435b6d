"""What a captioning model is asked, and how its answer is read.

The question says what the model is given: a caption that describes sounds nobody sent teaches the trained model that
captions mean nothing, and one that leaves audible speech out wastes the sound track.
"""

import json
import re
from typing import Literal

Heard = Literal["sound", "silence", "unknown"]
"""Whether the sound is sent along, there is none, or nothing is known of it because it is not sent."""

_KEY = "caption"

_VIDEO = """\
Describe this video clip in one exhaustive paragraph for training a model that generates video and sound from text.

Go through it in the order of events. Say who and what is there (looks, clothes, age, materials, colours), where it is
and in what light, and what happens, movement by movement. Say how it is filmed: the kind of shot, the angle, how the
camera moves, and the look (live action, animation, film grain, colours). Quote text that can be read.
"""
_IMAGE = """\
Describe this image in one exhaustive paragraph for training a model that generates pictures from text.

Say who and what is there (looks, clothes, age, materials, colours), where it is and in what light, what goes on, how
it is framed and at what angle, and the look (photograph, drawing, film grain, colours). Quote text that can be read.
"""
_SOUND_ALONE = """\
Describe this sound recording in one exhaustive paragraph for training a model that generates sound from text, in the
order of events.
"""
_HEARD: dict[Heard, str] = {
    "sound": """
The clip's sound is attached. Describe all of it where it happens: speech word for word in quotation marks, with its
language, voice and tone; music with its instruments, tempo and mood; noises and the sound of the room. If there is no
speech, or no music, say so.
""",
    "silence": """
The clip has no sound. End with: "There is no sound." Do not describe any.
""",
    "unknown": """
Describe only what can be seen; say nothing about sounds.
""",
}
_FORM = f"""
State only what is certain. Do not begin with "The video shows" or the like. Answer with JSON of this form and nothing
else: {{"{_KEY}": "..."}}
"""

_THOUGHT = re.compile(r"^.*?</think(?:ing)?>", re.DOTALL)
_FENCE = re.compile(r"^```[a-z]*\s*|\s*```$")
_CUT_OFF = re.compile(r'^\{\s*"[a-z_ ]+"\s*:\s*"(?P<text>.*)$', re.DOTALL | re.IGNORECASE)


def instruction(kind: Literal["video", "image", "sound"], heard: Heard, own: str | None = None) -> str:
    """The question for one file.

    Args:
        kind: what the file is.
        heard: what the model gets of its sound.
        own: the user's own instruction in place of ours; what is known of the sound is added to it.
    """
    if own is not None:
        return own.strip() + ("" if kind == "image" else "\n" + _HEARD[heard])
    if kind == "image":
        return _IMAGE + _FORM
    return (_VIDEO if kind == "video" else _SOUND_ALONE) + _HEARD[heard] + _FORM


def read_answer(answer: str | None) -> str:
    """The caption in a model's answer: reasoning, code fences and JSON around it are taken off, also if cut off.

    Raises:
        ValueError: there is no caption in it.
    """
    text = _THOUGHT.sub("", answer or "").strip()
    if text.startswith("<think"):
        raise ValueError("the model used up its tokens on reasoning; raise --max-tokens, or turn thinking off")
    text = _FENCE.sub("", text).strip()
    if text.startswith("{"):
        text = _from_json(text)
    caption = " ".join(text.split())
    if not caption:
        raise ValueError("the model's answer holds no caption")
    return caption


def _from_json(text: str) -> str:
    try:
        found = json.loads(text, strict=False)
    except json.JSONDecodeError:
        cut_off = _CUT_OFF.match(text)
        if cut_off is None:
            return text
        # The closing quote is missing, or something follows it that is no JSON.
        return cut_off["text"].rstrip('`}\n\t "\\').replace('\\"', '"').replace("\\n", " ")
    values = [value for value in found.values() if isinstance(value, str)]
    return found[_KEY] if isinstance(found.get(_KEY), str) else " ".join(values)
