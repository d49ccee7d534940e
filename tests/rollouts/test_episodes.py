"""Episodes: turns, what an environment says between them, and what of it is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from kdlm.rollouts import SAID, Completion, Episodes, Reply, Sampling, Written, as_row
from kdlm.rollouts.environment import EnvironmentSection
from kdlm.rollouts.environments import RetrySection
from kdlm.signal import IGNORE_INDEX

END = 9


class Counting:
    """An engine whose turns hold the number of the call and end by themselves, but for `cut`."""

    lives = True

    def __init__(self, length: int = 2, cut: Sequence[int] = ()):
        self.length, self.cut, self.asked, self.seeds = length, cut, [], []

    def take(self, student: Any, version: int) -> None:
        pass

    def generate(self, prompts: Any, sampling: Sampling, seed: int) -> list[Completion]:
        self.asked.append([list(prompt) for prompt in prompts])
        self.seeds.append(seed)
        call = len(self.asked) - 1
        ids = [*[call] * self.length, *([] if call in self.cut else [END])]
        stop: Any = "length" if call in self.cut else "end"
        places = [place for place in range(len(prompts)) for _ in range(sampling.samples_per_prompt)]
        return [Completion(list(ids), [-0.5] * len(ids), stop, place, 3) for place in places]

    def close(self) -> None:
        pass


@dataclass
class Until:
    """Is done after so many turns; each is worth its number."""

    last: int
    done: int = 0

    def step(self, text: str) -> Reply:
        self.done += 1
        return Reply(f"turn {self.done}", float(self.done), self.done >= self.last, f"read {text}")


class UntilSection(EnvironmentSection):
    """Episodes as long as the row says."""

    def start(self, row: Any, judge: Any) -> Until:
        return Until(row["turns"])


def episodes(section: Any = None, context: int = 100, **options: Any) -> Episodes:
    return Episodes(
        section or UntilSection(turns=5),
        read=lambda many: [" ".join(map(str, ids)) for ids in many],
        between=lambda prompt, words: [50, 51],
        context=context,
        **options,
    )


def written(*turns: int, made: Episodes | None = None, engine: Any = None, samples: int = 1) -> list[Written]:
    rows = [{"turns": number, "input_ids": [40, 41], "labels": [IGNORE_INDEX] * 2} for number in turns]
    drive = episodes() if made is None else made
    return drive(engine or Counting(), rows, [[40, 41]] * len(turns), Sampling(samples_per_prompt=samples), 7)


def test_ids_hold_all_that_follows_the_prompt_and_say_who_wrote_it() -> None:
    one, other = written(3, 1)
    assert one.completion.ids == [0, 0, END, 50, 51, 1, 1, END, 50, 51, 2, 2, END]
    assert one.turns == [0, 0, 0, SAID, SAID, 1, 1, 1, SAID, SAID, 2, 2, 2]
    assert one.completion.log_probs == [0.0 if turn == SAID else -0.5 for turn in one.turns]
    assert one.turn_rewards == [1.0, 2.0, 3.0] and one.reward == 3.0 and one.completion.stop == "end"
    assert (one.completion.group, other.completion.group, one.completion.version) == (0, 1, 3)


def test_an_episode_of_one_turn_is_the_completion_of_that_turn() -> None:
    (one,) = written(1)
    (drawn,) = Counting().generate([[40, 41]], Sampling(), 7)
    row = {"turns": 1, "input_ids": [40, 41], "labels": [IGNORE_INDEX] * 2}
    assert one == Written(row, [40, 41], drawn, f"0 0 {END}", 1.0, feedback=f"read 0 0 {END}")


def test_all_that_go_on_are_asked_in_one_call_for_each_turn() -> None:
    engine = Counting()
    written(3, 1, 2, engine=engine)
    assert [len(asked) for asked in engine.asked] == [3, 2, 1]
    assert engine.asked[2] == [[40, 41, 0, 0, END, 50, 51, 1, 1, END, 50, 51]]
    assert engine.seeds[0] == 7 and len(set(engine.seeds)) == 3


def test_samples_of_a_prompt_stay_a_group() -> None:
    made = written(2, 1, samples=2)
    assert [one.completion.group for one in made] == [0, 0, 1, 1]
    assert [len(one.rewards) for one in made] == [2, 2, 1, 1]


def test_nothing_said_by_an_environment_is_a_label() -> None:
    row = as_row(written(3)[0], masked=False)
    assert [label != IGNORE_INDEX for label in row["labels"]] == [False, False] + [
        turn != SAID for turn in written(3)[0].turn_of
    ]
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_a_cut_turn_is_judged_and_ends_its_episode() -> None:
    (one,) = written(4, engine=Counting(cut=[1]))
    assert one.completion.ids == [0, 0, END, 50, 51, 1, 1] and one.completion.stop == "length"
    assert one.turn_rewards == [1.0, 2.0]


@pytest.mark.parametrize("context", range(4, 16))
def test_no_episode_grows_past_the_context(context: int) -> None:
    (one,) = written(9, made=episodes(context=context))
    size = 2 + len(one.completion.ids)
    assert one.completion.stop == "length"
    assert one.turns is None or one.turns[-1] != SAID
    assert size - 3 < context  # the engine cuts a turn itself


def test_an_episode_has_no_more_turns_than_the_section_allows() -> None:
    (one,) = written(9, made=episodes(UntilSection(turns=2)))
    assert len(one.turn_rewards) == 2 and one.completion.stop == "end"


def test_the_reward_is_the_last_turns_or_the_sum() -> None:
    assert written(3)[0].reward == 3.0
    assert written(3, made=episodes(UntilSection(reward="sum")))[0].reward == 6.0


def test_a_verifier_beside_an_environment_adds_what_it_says_of_the_last_turn() -> None:
    judged: list[str] = []

    def judge(texts: Any, rows: Any) -> list[tuple[float, str | None]]:
        judged.extend(texts)
        return [(0.25, "why")] * len(texts)

    (one,) = written(2, made=episodes(judge=judge))
    assert judged == [f"1 1 {END}"]
    assert (one.reward, one.turn_rewards, one.feedback) == (2.25, [1.0, 2.25], "why")


def retry(judge: Any, **options: Any) -> tuple[Written, list[str]]:
    """Return an episode, and what the environment said in it."""
    row = {"input_ids": [40, 41]}
    said: list[str] = []
    made = Episodes(
        RetrySection(**options),
        read=lambda many: [" ".join(map(str, ids)) for ids in many],
        between=lambda prompt, words: said.append(words) or [50],
        context=100,
        judge=judge,
    )
    (one,) = made(Counting(), [row], [[40, 41]], Sampling(), 7)
    return one, said


def test_a_wrong_attempt_is_asked_for_again_with_the_verifiers_words() -> None:
    one, said = retry(lambda texts, rows: [(float("1" in text), f"not {text}") for text in texts])
    assert said == [f"not 0 0 {END}\nTry again:"]
    assert one.turn_rewards == [0.0, 1.0] and one.reward == 1.0 and one.feedback == f"not 1 1 {END}"


def test_a_right_attempt_is_the_last_unless_all_are_asked_for() -> None:
    def right(texts: Any, rows: Any) -> list[tuple[float, None]]:
        return [(1.0, None)] * len(texts)

    assert retry(right, turns=3)[0].turns is None
    always, said = retry(right, turns=3, until_right=False)
    assert always.turn_rewards == [1.0, 1.0, 1.0]
    assert said == ["That is right.\nTry again:"] * 2


def test_a_fixed_prompt_tells_nothing_of_the_score() -> None:
    for score in (0.0, 1.0):
        _, said = retry(lambda texts, rows, s=score: [(s, "secret")], ask="Look again.", until_right=False)
        assert said == ["Look again."]


def test_retry_wants_a_verifier() -> None:
    with pytest.raises(ValueError, match="add `verifier`"):
        episodes(RetrySection())
