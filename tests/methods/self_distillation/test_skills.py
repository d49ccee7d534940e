"""Skills: what a summary holds and what it never holds, and in which order a bank tries them."""

import json
import math

import pytest

from kdlm.methods.self_distillation.skills import SkillBank, masked, summary
from kdlm.rollouts import Completion, Written
from kdlm.sandbox.tool_tasks import tool_tasks


def written(talk: list[tuple[str, str]], reward: float | None, *, stop="end", **row) -> Written:
    return Written({"index": 0, **row}, [1], Completion([2], [0.0], stop, 0), "t", reward, talk=[list(t) for t in talk])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("calc: 12 * (3 + 4)", "calc: N * (N + N)"),
        ("answer: -5.", "answer: N."),
        ("calc: 3-5 - 2", "calc: N-N - N"),
        ("set a 1,250.75, then 4", "set a N, then N"),
        ("no number", "no number"),
    ],
)
def test_numbers_are_masked_with_their_signs(text, expected):
    assert masked(text) == expected


def test_an_answer_in_words_is_masked_where_it_stands():
    assert masked("answer: hiebg", "hiebg") == "answer: A"
    assert masked("answer: x", None) == masked("answer: x", " ") == "answer: x"


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_no_skill_of_a_tool_task_holds_a_number(level):
    """Nor does one of calls that err, which the environment answers with what it holds."""
    for task in tool_tasks(seed=0, level=level, n=20):
        world = task.world()
        erring = [(call, world.call(call).text) for call in ("get zz", "calc: 3 +", f"answer: {int(task.answer) + 1}")]
        record = summary([written(task.talk(), 1.0), written(erring, 0.0)])
        assert record["workflow"] and record["mistakes"]
        assert not any(letter.isdigit() for letter in json.dumps(record))


def test_a_skill_is_the_shortest_success_and_the_first_different_mistakes():
    long, short = [("get a", "4"), ("get a", "4"), ("answer: 4", "right")], [("get a", "4"), ("answer: 4", "right")]
    bad = [("calc 3", "error: unknown command"), ("calc 7", "error: unknown command"), ("answer: 9", "wrong: no")]
    record = summary([written(bad, 0.0), written(long, 1.0), written(short, 1.0), written([], None, stop="length")])
    assert record == {
        "workflow": ["get a", "answer: N"],
        "mistakes": ["calc N -> error: unknown command", "answer: N -> wrong: no"],
        "tips": ["be short: attempts were cut"],
    }


def test_nothing_to_tell_is_no_skill():
    assert summary([written([("hm", "ok")], 0.0)]) == {} == summary([])
    bank = SkillBank()
    bank.add("t", {})
    assert len(bank) == 0 and bank.choose("t") == "" == bank.choose("never heard of")


def test_one_turn_is_told_by_what_was_said_beside_its_reward():
    one = Written({"index": 0}, [1], Completion([2], [0.0], "end", 0), "41", 0.0, feedback="wrong: 41 is too small")
    assert summary([one])["mistakes"] == ["N -> wrong: N is too small"]


def test_skills_are_tried_unseen_first_and_then_by_their_upper_bound():
    bank = SkillBank(explore=0.5)
    for name in "abc":
        bank.add("t", {"workflow": [name]})
    names, rewards, seen = {json.dumps({"workflow": [n]}): n for n in "abc"}, {"a": 0.2, "b": 0.9, "c": 0.5}, []
    tries, total = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0.0)
    for _ in range(40):
        name = names[bank.choose("t")]
        if 0 in tries.values():
            assert name == next(n for n in "abc" if not tries[n])
        else:
            spent = math.log(sum(tries.values()))
            bounds = {n: total[n] / tries[n] + 0.5 * math.sqrt(spent / tries[n]) for n in "abc"}
            assert name == max(bounds, key=bounds.__getitem__)
        bank.tried("t", bank.choose("t"), rewards[name])
        tries[name], total[name] = tries[name] + 1, total[name] + rewards[name]
        seen.append(name)
    assert set(seen) == set("abc") and seen.count("b") > seen.count("c") > seen.count("a")
    assert SkillBank(explore=0).choose("t") == ""


def test_a_full_bank_drops_the_worst_that_was_tried_and_never_the_best():
    bank = SkillBank(most=2)
    for name, reward in (("a", 0.9), ("b", 0.1)):
        bank.add("t", {"workflow": [name]})
        bank.tried("t", bank.choose("t"), reward)
    bank.add("t", {"workflow": ["a"]})  # it is known
    assert [skill.tries for skill in bank.skills["t"]] == [1, 1]
    for number in range(5):
        bank.add("t", {"workflow": [f"new {number}"]})
    assert [json.loads(skill.text)["workflow"] for skill in bank.skills["t"]] == [["a"], ["new 0"]]
    bank.add("other", {"tips": ["é"]})
    again = SkillBank()
    again.read(bank.written())
    assert again.skills == bank.skills and len(again) == 3
