"""`--resolution-buckets auto`: buckets that fit what is there."""

import pytest

from ltx_titan.encode.buckets import choose_bucket, parse_buckets
from ltx_titan.encode.propose_buckets import Source, propose_buckets

FACTORS = (8, 32, 32)


def proposed(*sources):
    return [str(proposal.bucket) for proposal in propose_buckets(sources, FACTORS)]


def test_films_of_a_screen_and_a_phone_get_a_bucket_each():
    wide, tall = [Source(1920, 1080, 200)] * 6, [Source(1080, 1920, 60)] * 4
    assert proposed(*wide, *tall) == ["768x448x89", "448x768x57"]


def test_a_rare_shape_shares_the_bucket_of_its_neighbor():
    assert proposed(*[Source(1920, 1080, 100)] * 19, Source(1440, 1080, 100)) == ["768x448x89"]


def test_small_clips_are_not_enlarged_and_images_have_one_frame():
    assert proposed(*[Source(320, 192, 33)] * 3) == ["320x192x33"]
    assert proposed(Source(4000, 3000, 1)) == ["672x512x1"]


def test_nine_of_ten_clips_are_long_enough_and_the_reason_counts_the_rest():
    clips = [Source(1280, 720, 50)] * 9 + [Source(1280, 720, 10)]
    (proposal,) = propose_buckets(clips, FACTORS)
    assert proposal.bucket.frames == 49
    assert "10 clips near 16:9" in proposal.reason
    assert "10 to 50 frames, 1 of them too short" in proposal.reason


@pytest.mark.parametrize(
    "size", [(1920, 1080), (640, 360), (1080, 1080), (33, 35), (720, 576), (3840, 1600), (90, 900)]
)
@pytest.mark.parametrize("frames", [1, 2, 9, 300])
def test_every_proposal_fits_the_video_vae_and_takes_the_clip(size, frames):
    (proposal,) = propose_buckets([Source(*size, frames)], FACTORS)
    assert parse_buckets(str(proposal.bucket), FACTORS) == [proposal.bucket]
    assert choose_bucket([proposal.bucket], *size, frames) == proposal.bucket


def test_no_readable_clip_is_an_error():
    with pytest.raises(ValueError, match="found none"):
        propose_buckets([], FACTORS)
