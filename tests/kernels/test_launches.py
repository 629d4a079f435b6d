from itertools import product

import torch
from triton import cdiv

from ltx_titan_kernels.launches import divide_tokens_of_two

MULTIPROCESSORS = 3  # as a CPU counts


def test_programs_of_two_tensors_take_every_token_and_all_run_at_once():
    lengths = (1, 2, 5, 16, 126, 127, 1000, 8064)
    for batch, x_tokens, y_tokens, at_once, slower in product((1, 2), lengths, lengths, (1, 4, 32), (False, True)):
        x, y = (torch.empty(batch, tokens, 1) for tokens in (x_tokens, y_tokens))
        walks = divide_tokens_of_two(x, y, at_once, is_shorter_slower=slower)
        case = (batch, x_tokens, y_tokens, at_once, slower, walks)
        assert [cdiv(x_tokens, walks[0].tokens), cdiv(y_tokens, walks[1].tokens)] == [w.programs for w in walks], case
        # Two tensors need two programs, even where fewer than that run at once.
        assert sum(walk.programs for walk in walks) <= max(2, MULTIPROCESSORS * at_once // batch), case


def test_a_shorter_tensor_whose_tokens_are_slower_is_done_first():
    sound, video = torch.empty(1, 126, 1), torch.empty(1, 8064, 1)
    equal = divide_tokens_of_two(sound, video, 64)
    of_sound, of_video = divide_tokens_of_two(sound, video, 64, is_shorter_slower=True)
    assert equal[0].tokens == equal[1].tokens == 43
    assert of_sound.tokens == 4
    # What the sound's many programs take away makes the video's a little longer.
    assert of_video.tokens == 51
    assert divide_tokens_of_two(video, sound, 64, is_shorter_slower=True) == (of_video, of_sound)
