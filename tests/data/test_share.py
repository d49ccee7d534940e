"""A rank's share of evaluation rows: every row once, and ranks of text in step."""

import pytest

from kdlm.data.share import Share
from kdlm.signal import IGNORE_INDEX


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [0, 1, 5, 8])
def test_every_image_is_in_one_share(size, world):
    images = [{"pixel_values": number, "labels": number % 3} for number in range(size)]
    shares = [Share(images, rank, world) for rank in range(world)]
    given = [share[place]["pixel_values"] for share in shares for place in range(len(share))]
    assert sorted(given) == list(range(size))


def test_ranks_of_text_have_equally_many_rows_and_the_last_may_count_nothing():
    texts = [{"input_ids": [number, 7], "labels": [IGNORE_INDEX, number]} for number in range(5)]
    shares = [Share(texts, rank, 2) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    assert shares[1][2]["labels"] == [IGNORE_INDEX, IGNORE_INDEX]
