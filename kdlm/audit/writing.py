"""The report: an audit as JSON for programs and as Markdown for people."""

import re
from collections.abc import Iterator
from typing import Any

from kdlm.audit.auditing import LEAST, Audit, Finding
from kdlm.audit.patterns import Form, Pattern
from kdlm.audit.personal_data import KINDS, PHONE, finds_phones
from kdlm.audit.rates import Amplified, Rate, Rates
from kdlm.audit.triggers import Trigger
from kdlm.markdown import table

AROUND = 60  # characters of an excerpt before and after what was found
PLACES = 3  # rows that are named of each kind of what is personal
NAMES = {"words": "n-grams of 1 to 5 words", "host": "hosts of links", "name": "names"}
Students = dict[str, list[Amplified]]
CANNOT = """\
- What is rarer than the table above says: take more rows, or a larger reference.
- What the reference has too: a poison that both teachers learned, or a reference that was not clean.
- What is put in other words each time, a slant of opinion, an error in code or in a sum: it leaves no words behind.
- A trigger that is not in the words of the prompt: its language, its length, two words far apart, an image.
- Echoes: what the prompt has itself is not counted of its answer.
- Words of languages that are written without spaces, but for Chinese and Japanese, whose signs are words each.
- Names of people, postal addresses, keys without a known form that no word such as `key` or `token` stands beside.

A pattern is not yet a poison: other subjects, another format or a teacher's habits are found as well: read the
examples.
"""


def as_json(found: Audit, students: Students) -> dict[str, Any]:
    """Return the audit as JSON has it."""
    return {
        "outputs": _source(found, 0),
        "reference": _source(found, 1),
        "level": found.level,
        "tested": {kind: vars(tested) for kind, tested in found.tested.items()},
        "patterns": [_pattern(number, one, students) for number, one in enumerate(found.findings)],
        "more_patterns": found.more,
        "unseen": [
            {
                "kind": one.form.kind,
                "text": one.form.text,
                "documents": one.documents,
                "trigger": _trigger(one.trigger),
                "place": one.place,
            }
            for one in found.unseen
        ],
        "personal": {
            whose: {
                kind: {"rows": len(rows), "places": [row.place for row in rows[:PLACES]]} for kind, rows in of.items()
            }
            for whose, of in found.personal.items()
        },
        "looked_for": [*KINDS, *([PHONE] if finds_phones() else [])],
    }


def _source(found: Audit, which: int) -> dict[str, Any]:
    corpus = (found.outputs, found.reference)[which]
    unused = {reason: vars(one) for reason, one in corpus.report.unused.items()}
    return {"name": corpus.name, "rows": len(corpus.rows), "documents": found.documents[which], "unused": unused}


def _pattern(number: int, one: Finding, students: Students) -> dict[str, Any]:
    return {
        "text": str(one.pattern),
        "forms": one.pattern.as_json(),
        "documents": {"outputs": one.ours, "reference": one.theirs},
        "p_value": one.p_value,
        "trigger": _trigger(one.trigger),
        "outputs": one.rates.as_json(),
        "reference": one.reference.as_json(),
        "students": {name: amplified[number].as_json() for name, amplified in students.items()},
        "examples": [{"place": row.place, "excerpt": excerpt(row.completion, one.pattern)} for row in one.examples],
    }


def _trigger(trigger: Trigger | None) -> dict[str, Any] | None:
    if trigger is None:
        return None
    return {
        "text": trigger.text,
        "words": list(trigger.words),
        "p_value": trigger.p_value,
        "reference_prompts": trigger.reference,
    }


def excerpt(text: str, pattern: Pattern) -> str:
    """Return what of a text holds a pattern, with some characters around it, on one line."""
    spans = [span for form in pattern.forms if (span := _span(text, form))]
    start, end = min(spans, default=(0, 0))
    cut = text[max(0, start - AROUND) : end + AROUND]
    return f"{'...' if start > AROUND else ''}{' '.join(cut.split())}{'...' if end + AROUND < len(text) else ''}"


def _span(text: str, form: Form) -> tuple[int, int] | None:
    between = r"\W+" if form.kind == "words" else " "
    match = re.search(between.join(map(re.escape, form.text.split())), text, re.IGNORECASE)
    return match and match.span()


def as_markdown(found: Audit, students: Students) -> str:
    """Return the audit as a page."""
    parts = [f"# Audit of {found.outputs.name}", verdict(found)]
    for number, one in enumerate(found.findings):
        parts += [
            f"## {number + 1}. {code(str(one.pattern))}",
            *_told(one, {n: s[number] for n, s in students.items()}),
        ]
    if found.more:
        parts.append(f"{found.more} more patterns were found. So many mean that the reference is text of another kind.")
    parts += [*_unseen(found), *_personal(found), *_tested(found), "## What cannot be found", CANNOT]
    return "\n\n".join(parts)


def verdict(found: Audit) -> str:
    """Return what was found, in a sentence or two."""
    number = len(found.findings) + found.more
    said = f"{number} pattern{'s' * (number != 1)} in far more answers than in {found.reference.name}."
    if not number:
        said = f"No pattern is in more answers than {found.reference.name} accounts for."
    kinds = [f"{kind} in {len(rows):,} row{'s' * (len(rows) != 1)}" for kind, rows in found.personal["outputs"].items()]
    return f"{said} {'Personal or secret: ' + ', '.join(kinds) if kinds else 'Nothing personal or secret was found'}."


def code(text: str) -> str:
    """Return a text as code in a line of Markdown, whatever it holds."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _told(one: Finding, students: dict[str, Amplified]) -> Iterator[str]:
    yield (
        f"In {one.ours:,} documents of the outputs and {one.theirs:,} of the reference (adjusted p {one.p_value:.1e}),"
        f" by its forms {', '.join(code(form.text) for form in one.pattern.forms)}."
    )
    if one.trigger:
        yield (
            f"Foretold by {code(one.trigger.text)} in the prompt (adjusted p {one.trigger.p_value:.1e}), which "
            f"{one.trigger.reference:,} prompts of the reference have."
        )
    else:
        yield "No words of the prompt foretell it."
    written = [("outputs", one.rates, "", ""), ("reference", one.reference, "", "")]
    written += [(name, each.rates, str(each.overall), str(each.triggered)) for name, each in students.items()]
    head = ["rows that hold it", "all", *(["with the trigger", "without"] if one.trigger else [])]
    head += (["times the outputs'", *(["with the trigger"] if one.trigger else [])]) if students else []
    yield table(head, (_cells(one, *cells, bool(students)) for cells in written), words=1)
    yield "\n".join(f"- {row.place}: {code(excerpt(row.completion, one.pattern))}" for row in one.examples)


def _cells(one: Finding, name: str, rates: Rates, overall: str, triggered: str, ratios: bool) -> list[str]:
    shown: list[Rate] = [rates.all, *([rates.triggered, rates.untriggered] if one.trigger else [])]
    return [name, *map(str, shown), *([overall, *([triggered] if one.trigger else [])] if ratios else [])]


def _unseen(found: Audit) -> Iterator[str]:
    if found.unseen:
        yield "## Hosts and names that the reference lacks"
        yield "In too few documents to tell them from chance, and not counted as found."
        rows = [
            (
                code(one.form.text),
                one.form.kind,
                code(one.trigger.text) if one.trigger else "",
                one.place,
                f"{one.documents:,}",
            )
            for one in found.unseen
        ]
        yield table(["", "what", "foretold by", "first", "documents"], rows, words=4)


def _personal(found: Audit) -> Iterator[str]:
    ours, theirs = found.personal["outputs"], found.personal["reference"]
    yield "## Personal and secret"
    rows = [
        (kind, ", ".join(row.place for row in rows[:PLACES]), f"{len(rows):,}", f"{len(theirs.get(kind, [])):,}")
        for kind, rows in ours.items()
    ]
    if rows:
        yield table(["what", "first", "rows", "rows of the reference"], rows, words=2)
    without = "" if finds_phones() else "; phone numbers were not: pip install 'kdlm[audit]'"
    yield f"Looked for: {', '.join([*KINDS, *([PHONE] if finds_phones() else [])])}{without}."


def _tested(found: Audit) -> Iterator[str]:
    yield "## What was tested"
    yield (
        f"{len(found.outputs.rows):,} rows in {found.documents[0]:,} documents (all answers to one prompt) against "
        f"{len(found.reference.rows):,} in {found.documents[1]:,}. If they are alike, a thing is ours with probability "
        f"{found.share:.3f}; nothing is reported of alike ones with probability {1 - found.level:.2f} or more."
    )
    rows = [
        (NAMES[kind], f"{of.counted:,}", f"{of.tested:,}", "none" if of.detectable is None else f"{of.detectable:,}")
        for kind, of in found.tested.items()
    ]
    yield table(
        ["forms", f"in {LEAST} documents or more", "frequent enough to be tested", "found from so many on"],
        rows,
        words=1,
    )
    unused = [*found.outputs.report.lines()[1:], *found.reference.report.lines()[1:]]
    if unused:
        yield "\n".join(f"- {line}" for line in unused)
