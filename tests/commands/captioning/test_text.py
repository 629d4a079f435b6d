import pytest

from ltx_titan.commands.captioning.text import instruction, read_answer


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("A rabbit wakes up.", "A rabbit wakes up."),
        ('{"caption": "A rabbit\\nwakes up."}', "A rabbit wakes up."),
        ('```json\n{"caption": "A rabbit."}\n```', "A rabbit."),
        ('<think>Is it a {hare}?</think>\n\n{"caption": "A rabbit."}', "A rabbit."),
        ('Hm, a hare?</think>{"description": "A rabbit."}', "A rabbit."),
        # Truncated by the token limit.
        ('{"caption": "A rabbit says \\"no\\" and', 'A rabbit says "no" and'),
        ('{"caption": "Two lines\nin a string"}', "Two lines in a string"),
    ],
)
def test_answers_come_in_many_forms(answer, caption):
    assert read_answer(answer) == caption


@pytest.mark.parametrize(("answer", "message"), [("<think>Is it", "--max-tokens"), ("", "no caption"), (None, "no")])
def test_an_answer_without_a_caption_is_an_error(answer, message):
    with pytest.raises(ValueError, match=message):
        read_answer(answer)


def test_the_instruction_states_whether_there_is_audio():
    assert "word for word" in instruction("video", "attached")
    assert "There is no sound" in instruction("video", "absent")
    assert "nothing about sounds" in instruction("video", "not sent")
    assert "sound" not in instruction("image", "absent")
    custom = instruction("video", "absent", "Say what the dog does.")
    assert custom.startswith("Say what the dog does.")
    assert "There is no sound" in custom
