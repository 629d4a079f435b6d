import logging

import torch

from ltx_titan.memory.live_bytes import LiveBytes
from ltx_titan.validation import room
from ltx_titan.validation.decode import load_decoders
from ltx_titan.validation.room import TILES, decoding_bytes, fitting_tiles, memory_left, with_tiles


def test_memory_of_decoding_is_that_of_the_real_decoder(pack):
    codec = load_decoders(pack.path, None, "cpu").video
    latents = torch.zeros(1, 128, 3, 2, 3)
    with LiveBytes() as live:
        live.add(latents)
        codec.decode(latents)
    assert decoding_bytes(codec, latents.shape, TILES[0]) == live.peak


def test_tiles_shrink_with_the_memory_that_is_left(pack, caplog, monkeypatch):
    codec = load_decoders(pack.path, None, "cpu").video
    assert memory_left("cpu") == float("inf")
    # The miniature's frames take more memory than its tiles.
    monkeypatch.setattr(room, "decoding_bytes", lambda _, shape, tiles: shape[4] * tiles.size)
    shapes = [torch.Size((1, 128, 1, 2, 2)), torch.Size((1, 128, 12, 1, 10))]
    limits = [float("inf"), 1.3 * 7680, 1.2 * 7680, 1.3 * 5120, 1.3 * 3840]
    assert [fitting_tiles(codec, shapes, limit) for limit in limits] == [TILES[i] for i in (0, 0, 1, 1, 2)]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert fitting_tiles(codec, shapes, 3840) is TILES[-1]
    assert "validation.offload_optimizer" in caplog.text
    assert with_tiles(codec, TILES[-1]).time_tiles == TILES[-1].time
