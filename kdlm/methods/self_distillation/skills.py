"""Skills: what finished episodes taught, as short records, and a bank that chooses which of them is tried next."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdlm.rollouts import Written

MISTAKES = ("error", "wrong")
"""How the words of an environment begin where something went wrong."""
MOST_MISTAKES = 3
_NUMBER = re.compile(r"(?<![\w)]\s)(?<![\w)])-?\d[\d.,]*|\d[\d.,]*")


def masked(text: str, answer: str | None = None) -> str:
    """Return text with N for each number and, where `answer` stands in it as it is, A for that."""
    if answer is not None and answer.strip():
        text = text.replace(answer.strip(), "A")
    return _NUMBER.sub(_marked, text)


def _marked(found: re.Match[str]) -> str:
    """Return N, and the full stop or comma that is the sentence's."""
    return "N" + found[0][len(found[0].rstrip(".,")) :]


def summary(attempts: Sequence[Written], success: float = 1.0) -> dict[str, Any]:
    """Return the skill of some episodes of one task: a pure function, no model is asked.

    `workflow`: what was called in the shortest success, the first of them, turn by turn. `mistakes`: calls that got an
    answer which begins with one of MISTAKES, each with that answer, the first MOST_MISTAKES different ones. `tips`: to
    be short, where attempts were cut. What there is nothing of is left out; {} is no skill.

    Numbers, and the row's `reference` where it is text that stands in a call, are masked: a skill is not to hold the
    answer. An answer in other words than the reference's, or in a reference that is JSON, is not found.
    """
    record: dict[str, Any] = {}
    solved = [one for one in attempts if one.reward is not None and one.reward >= success]
    if solved:
        record["workflow"] = [call for call, _ in min(map(_talk, solved), key=len)]
    wrong = [f"{call} -> {said}" for one in attempts for call, said in _talk(one) if said.startswith(MISTAKES)]
    if wrong:
        record["mistakes"] = list(dict.fromkeys(wrong))[:MOST_MISTAKES]
    if any(one.completion.stop == "length" for one in attempts):
        record["tips"] = ["be short: attempts were cut"]
    return record


def _talk(one: Written) -> list[tuple[str, str]]:
    """Return the turns of an episode, masked; of a single turn what was said beside its reward."""
    answer = one.row.get("reference")
    talk = one.talk or [[one.text, one.feedback or ""]]
    return [(masked(call.strip(), answer), masked(said.strip(), answer)) for call, said in talk]


@dataclass
class Skill:
    """A record as the teacher reads it, in how many groups of attempts it was told, and the sum of their rewards."""

    text: str
    tries: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / max(1, self.tries)


class SkillBank:
    """Skills by task, chosen by upper confidence bounds.

    Args:
        explore: c of `mean reward + c sqrt(ln N / n)`, N being the trials of all skills of the task, n of this one.
        most: skills kept of a task. A full bank takes a new one in the place of the worst that was tried, and none
            while fewer than two were: the best is never dropped.
    """

    def __init__(self, explore: float = 1.0, most: int = 16):
        self.explore, self.most = explore, most
        self.skills: dict[str, list[Skill]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.skills.values()))

    def choose(self, task: str) -> str:
        """Return the skill to tell: the oldest that was never tried, else the one of the largest bound; "" is none."""
        known = self.skills.get(task, [])
        unseen = next((skill for skill in known if not skill.tries), None)
        if unseen is not None or not known:
            return "" if unseen is None else unseen.text
        trials = math.log(sum(skill.tries for skill in known))
        return max(known, key=lambda skill: skill.mean + self.explore * math.sqrt(trials / skill.tries)).text

    def tried(self, task: str, text: str, reward: float) -> None:
        """Count a trial, if the skill is still there."""
        for skill in self.skills.get(task, []):
            if skill.text == text:
                skill.tries, skill.total = skill.tries + 1, skill.total + reward

    def add(self, task: str, record: dict[str, Any]) -> None:
        """Take in a record, if it is not empty, new, and there is room for it."""
        text = json.dumps(record, ensure_ascii=False)
        known = self.skills.setdefault(task, [])
        if not record or any(skill.text == text for skill in known):
            return
        if len(known) >= self.most:
            tried = [skill for skill in known if skill.tries]
            if len(tried) < 2:
                return
            known.remove(min(tried, key=lambda skill: skill.mean))
        known.append(Skill(text))

    def written(self) -> bytes:
        """Return the bank as JSON in UTF-8."""
        return json.dumps({task: [asdict(one) for one in known] for task, known in self.skills.items()}).encode()

    def read(self, saved: bytes) -> None:
        """Take back what `written` gave."""
        self.skills = {task: [Skill(**one) for one in known] for task, known in json.loads(saved).items()}
