from itertools import product

import torch
from triton import cdiv

from ltx_titan_kernels.launches import tile_two

MULTIPROCESSORS = 3  # as a CPU counts


def test_programs_of_two_tensors_take_every_token_and_all_run_at_once():
    lengths = (1, 2, 5, 16, 126, 127, 1000, 8064)
    for batch, x_tokens, y_tokens, at_once, slower in product((1, 2), lengths, lengths, (1, 4, 32), (False, True)):
        x, y = (torch.empty(batch, tokens, 1) for tokens in (x_tokens, y_tokens))
        tiles = tile_two(x, y, at_once, is_shorter_slower=slower)
        case = (batch, x_tokens, y_tokens, at_once, slower, tiles)
        assert [cdiv(x_tokens, tiles[0].tokens), cdiv(y_tokens, tiles[1].tokens)] == [t.programs for t in tiles], case
        # Two tensors need two programs, even where fewer than that run at once.
        assert sum(t.programs for t in tiles) <= max(2, MULTIPROCESSORS * at_once // batch), case


def test_a_shorter_tensor_whose_tokens_are_slower_is_done_first():
    audio, video = torch.empty(1, 126, 1), torch.empty(1, 8064, 1)
    equal = tile_two(audio, video, 64)
    audio_tiles, video_tiles = tile_two(audio, video, 64, is_shorter_slower=True)
    assert equal[0].tokens == equal[1].tokens == 43
    assert audio_tiles.tokens == 4
    # Audio has more programs now, so video has fewer, with a few more tokens each.
    assert video_tiles.tokens == 51
    assert tile_two(video, audio, 64, is_shorter_slower=True) == (video_tiles, audio_tiles)
