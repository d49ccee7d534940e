"""Named entities in short texts: a question asks for all of one type, the answer is a JSON list in their order.

The form is UniversalNER's (arXiv 2308.03279, section 3), in one turn. Every name is made up and no name occurs twice in
a text, so there is one right answer: a person has two words, a place one, an organisation ends with what it is, and no
mention of one type is part of one of another. A level is the number of sentences. Some questions ask for a type that
the text lacks.
"""

import json
import random
import re
from collections.abc import Callable

from kdlm.sandbox.tasks import Split, Task, generate

_STEMS = "Al Bren Cor Dal El Fen Gor Hal Is Jor Kel Lor Mar Nor Os Per Quen Ros Sel Tam Ul Ver Wil Yor".split()
_MONTHS = "January February March April May June July August September October November December".split()
_SENTENCES = (
    "<person> was born in <place> on <date>.",
    "On <date>, <person> joined <organisation>.",
    "<person> and <person> founded <organisation> in <place>.",
    "<organisation> paid <money> to <person>.",
    "<organisation> opened an office in <place> on <date>.",
    "The road from <place> to <place> cost <money>.",
    "<person> sold the house in <place> to <person> for <money>.",
    "Since <date>, <organisation> has belonged to <organisation>.",
    "<person> wrote to <person> from <place>.",
    "The bridge at <place> was finished on <date>.",
    "<organisation> lent <money> to <organisation>.",
    "After the fire of <date>, <person> left <place> for <place>.",
    "On <date>, <person> won <money>.",
    "<person> worked for <organisation> and later for <organisation>.",
)
_SLOT = re.compile(r"<(\w+)>")
_ABSENT = 0.15  # of the questions, where the text leaves a type out


def entities(*, seed: int, level: int, n: int, split: Split = "train") -> list[Task]:
    """Return `n` different tasks of a level (1 to 5, the sentences of the text); see `tasks.generate`.

    `kind` is the type asked for, `answer` and `completion` are the JSON list of its mentions.
    """
    return generate(_problem, seed=seed, level=level, n=n, split=split)


def _problem(generator: random.Random, level: int) -> Task:
    mentions: dict[str, list[str]] = {kind: [] for kind in _MAKERS}

    def mention(slot: re.Match[str]) -> str:
        seen = mentions[slot[1]]
        while (made := _MAKERS[slot[1]](generator)) in seen:
            pass
        seen.append(made)
        return made

    text = " ".join(_SLOT.sub(mention, sentence) for sentence in generator.sample(_SENTENCES, level))
    absent = [kind for kind, found in mentions.items() if not found]
    present = [kind for kind, found in mentions.items() if found]
    kind = generator.choice(absent if absent and generator.random() < _ABSENT else present)
    answer = json.dumps(mentions[kind])
    return Task(
        f"Text: {text}\nWhat describes {kind} in the text? Answer with a JSON list.", answer, answer, level, kind
    )


def _name(*endings: str) -> Callable[[random.Random], str]:
    return lambda generator: generator.choice(_STEMS) + generator.choice(endings)


_first, _last = (
    _name("a", "an", "ia", "in", "is", "o", "wyn"),
    _name("berg", "dane", "feld", "kin", "lund", "man", "sen"),
)
_place, _firm = _name("bury", "ford", "ham", "haven", "mere", "stad", "vale"), _name("ax", "ex", "ix", "ora", "um")
_FORMS = ("Bank", "Institute", "Mills", "Press", "Trading Company", "Works")
_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "person": lambda generator: f"{_first(generator)} {_last(generator)}",
    "place": _place,
    "organisation": lambda generator: f"{_firm(generator)} {generator.choice(_FORMS)}",
    "date": lambda generator: f"{generator.randint(1, 28)} {generator.choice(_MONTHS)} {generator.randint(1900, 2039)}",
    "money": lambda generator: f"{generator.randint(2, 999) * 10} {generator.choice(('crowns', 'marks'))}",
}
TYPES = tuple(_MAKERS)
