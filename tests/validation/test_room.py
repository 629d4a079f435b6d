import logging

import torch

from ltx_titan.memory.live_bytes import LiveBytes
from ltx_titan.validation.decode import load_decoders
from ltx_titan.validation.room import TILES, decoding_bytes, fitting_tiles, memory_left, with_tiles


def test_memory_of_decoding_is_that_of_the_real_decoder(pack):
    codec = load_decoders(pack.path, None, "cpu").video
    latents = torch.zeros(1, 128, 3, 2, 3)
    with LiveBytes() as live:
        live.add(latents)
        codec.decode(latents)
    assert decoding_bytes(codec, latents.shape, TILES[0]) == live.peak


def test_tiles_shrink_with_the_memory_that_is_left(pack, caplog):
    codec = load_decoders(pack.path, None, "cpu").video
    shapes = [torch.Size((1, 128, 1, 2, 2)), torch.Size((1, 128, 12, 1, 26))]
    largest, smallest = (decoding_bytes(codec, shapes[1], tiles) for tiles in (TILES[0], TILES[-1]))
    assert smallest < largest
    assert fitting_tiles(codec, shapes, memory_left("cpu")) is TILES[0]
    assert fitting_tiles(codec, shapes, 1.3 * largest) is TILES[0]
    assert fitting_tiles(codec, shapes, 1.3 * smallest) is TILES[-1]
    with caplog.at_level(logging.WARNING):
        assert fitting_tiles(codec, shapes, smallest) is TILES[-1]
    assert "validation.offload_optimizer" in caplog.text
    assert with_tiles(codec, TILES[-1]).time_tiles == TILES[-1].time
