"""When a completion ended where the prompts beside it left no room, which a private run refuses."""

import pytest

from kdlm.privacy.rows import lacked_room
from kdlm.rollouts import SAID, Completion, Written

END, MOST = 1, 4


def written(stop: str, ids: list[int], turns: list[int] | None = None) -> Written:
    return Written({}, [7, 8], Completion(ids, [-1.0] * len(ids), stop, 0, 0), turns=turns)  # pyright: ignore


@pytest.mark.parametrize(
    ("one", "lacked"),
    [
        (written("end", [5, END]), False),
        (written("length", [5, 6, 5, 6]), False),
        (written("length", [5, 6, 5]), True),
        (written("length", []), True),
        (written("length", [5, END, 9, 9, 5, 6], [0, 0, SAID, SAID, 1, 1]), True),
        (written("length", [5, END, 9, 9, 5, 6, 5, 6], [0, 0, SAID, SAID, 1, 1, 1, 1]), False),
        (written("length", [5, END, 9, 9, 5, END], [0, 0, SAID, SAID, 1, 1]), False),
    ],
    ids=["ended", "as long as asked", "cut", "no room at all", "last turn cut", "last turn whole", "no third turn"],
)
def test_only_a_last_turn_that_was_cut_before_its_length_lacked_room(one: Written, lacked: bool) -> None:
    assert lacked_room(one, MOST, {END}) is lacked
