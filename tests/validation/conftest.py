from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ltx_titan
from ltx_titan.codecs import load_audio_codec, load_video_codec
from ltx_titan.model import LTXTransformer
from ltx_titan.weights import load_parameters, read_metadata

CLIP = Path(ltx_titan.__file__).parent / "assets" / "big_buck_bunny_5s.mp4"


@dataclass(frozen=True)
class Pack:
    """The miniature checkpoint, what its metadata says, and its transformer."""

    path: Path
    config: dict
    model: LTXTransformer

    @property
    def text_encoder_path(self):
        return str(self.path.parent / "text_encoder")


@pytest.fixture(scope="session")
def pack(nano):
    config = read_metadata(nano).config
    model = LTXTransformer.from_config(config["transformer"])
    load_parameters(model, nano)
    return Pack(nano, config, model.eval())


@pytest.fixture(scope="session")
def video_codec(pack):
    return load_video_codec(pack.path, "cpu", torch.float32, part="encoder")


@pytest.fixture(scope="session")
def audio_codec(pack):
    return load_audio_codec(pack.path, "cpu", part="encoder")
