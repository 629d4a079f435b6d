import io
import wave

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ltx_titan.media import Audio
from ltx_titan.validation.decode import DecodedSample
from ltx_titan.validation.preview import make_preview, wandb_media, write_contact_sheet, write_preview


def decoded(count=49, audio=True):
    pixels = torch.randint(0, 255, (count, 64, 480, 3), generator=torch.Generator().manual_seed(0))
    return DecodedSample(pixels.to(torch.uint8), Audio(torch.zeros(2, 4800), 48000) if audio else None)


def test_tensorboard_shows_clip_frames_audio_and_prompt_at_the_step(tmp_path):
    writer = SummaryWriter(tmp_path)
    write_preview(writer, "sample-01", "a river", make_preview(decoded(), 24.0), 30)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (moving,) = events.Tensors("sample-01/video")
    assert moving.step == 30
    width, height, encoded = moving.tensor_proto.string_val
    assert (int(width), int(height)) == (320, 43)
    picture = Image.open(io.BytesIO(encoded))
    assert picture.format == "GIF"
    assert picture.n_frames == 32
    assert max(picture.size) == 320
    (audio,) = events.Tensors("sample-01/audio")
    assert audio.step == 30
    with wave.open(io.BytesIO(audio.tensor_proto.string_val[0])) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 48000, 4800)
    (text,) = events.Tensors("sample-01/prompt/text_summary")
    assert text.tensor_proto.string_val == [b"a river"]
    # Each card of the page is entitled with the prompt; the plugin's name decides on which page it is.
    for part, plugin in (("video", "images"), ("frames", "images"), ("audio", "audio")):
        about = events.SummaryMetadata(f"sample-01/{part}")
        assert (about.display_name, about.plugin_data.plugin_name) == ("a river", plugin)


def test_moving_pictures_last_as_long_as_the_clip():
    picture = Image.open(io.BytesIO(make_preview(decoded(48, audio=False), 24.0).moving))
    durations = []
    for place in range(picture.n_frames):
        picture.seek(place)
        durations.append(picture.info["duration"])
    assert abs(sum(durations) - 2000) <= 10 * picture.n_frames


def test_a_contact_sheet_has_one_row_per_clip_with_pictures(tmp_path):
    clip, still = make_preview(decoded(9), 24.0), make_preview(decoded(1), 24.0)
    audio = make_preview(DecodedSample(None, Audio(torch.zeros(1, 100), 16000)), 24.0)
    path = write_contact_sheet(tmp_path / "sheet.png", [("a river", clip), ("wind", audio), ("a hill " * 40, still)])
    sheet = Image.open(path)
    # First the clip's frames as they are in TensorBoard: eight of nine, in two rows of four.
    frames = Image.open(io.BytesIO(clip.frames))
    assert frames.size == (4 * 320, 2 * 43) == (sheet.width, 2 * 43)
    assert sheet.crop((0, 16, frames.width, 16 + frames.height)).tobytes() == frames.convert("RGB").tobytes()
    assert sheet.height > frames.height + Image.open(io.BytesIO(still.frames)).height
    assert write_contact_sheet(tmp_path / "none.png", [("wind", audio)]) is None


def test_a_clip_on_another_machine_is_stood_in_for_by_its_preview(tmp_path):
    path = tmp_path / "sample-01.mp4"
    with wandb_media([("sample-01", "a river", path, make_preview(decoded(9), 24.0))]) as media:
        assert set(media) == {"sample-01/video", "sample-01/frames", "sample-01/audio"}
        assert media["sample-01/video"]._path.endswith(".gif")
    path.touch()
    with wandb_media([("sample-01", "a river", path, make_preview(decoded(9), 24.0))]) as media:
        assert media["sample-01/video"]._path == str(path)


def test_a_picture_does_not_move_and_audio_alone_has_no_picture():
    still = make_preview(decoded(1, audio=False), 24.0)
    assert still.moving is None
    assert Image.open(io.BytesIO(still.frames)).width == 320
    audio_only = make_preview(DecodedSample(None, Audio(torch.zeros(1, 100), 16000)), 24.0)
    assert audio_only.frames is None
    assert audio_only.audio is not None
