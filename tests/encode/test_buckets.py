import pytest

from ltx_titan.encode.buckets import Bucket, choose_bucket, parse_buckets

FACTORS = (8, 32, 32)


def test_buckets_are_parsed():
    assert parse_buckets("768x448x89; 960x544x1;", FACTORS) == [Bucket(768, 448, 89), Bucket(960, 544, 1)]
    assert str(Bucket(768, 448, 89)) == "768x448x89"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("768x448", "expected WxHxF"),
        ("axbxc", "expected WxHxF"),
        ("750x448x89", "width must be a multiple of 32"),
        ("768x448x88", "frames 1 more than a multiple of 8"),
        ("768x448x0", "expected WxHxF"),
        (";", "names no bucket"),
    ],
)
def test_unusable_buckets_say_what_is_expected(text, message):
    with pytest.raises(ValueError, match=message):
        parse_buckets(text, FACTORS)


@pytest.mark.parametrize(
    ("size", "frames", "expected"),
    [
        # The aspect ratio decides first, even if that costs frames.
        ((1080, 1920), 200, Bucket(448, 768, 49)),
        # Then frames, then area.
        ((1920, 1080), 200, Bucket(768, 448, 89)),
        ((1920, 1080), 60, Bucket(1536, 896, 49)),
        ((500, 500), 200, Bucket(512, 512, 25)),
        # Too short for the bucket of its aspect ratio.
        ((1080, 1920), 30, Bucket(512, 512, 25)),
        ((1080, 1920), 24, None),
    ],
)
def test_closest_aspect_ratio_is_chosen_then_length_then_area(size, frames, expected):
    buckets = parse_buckets("768x448x89;768x448x49;1536x896x49;448x768x49;512x512x25", FACTORS)
    assert choose_bucket(buckets, *size, frames) == expected
