"""The audit: what a teacher wrote, against text that is trusted."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdlm.audit.excess import excess, share_of
from kdlm.audit.ngrams import Segment, ngrams
from kdlm.audit.patterns import Form, Kind, Pattern, Sighting, echoed, gathered, pattern_of
from kdlm.audit.rates import Amplified, Rates, rates
from kdlm.audit.rows import Corpus, Row
from kdlm.audit.triggers import Trigger, trigger_of
from kdlm.audit.words import Reading, read

LEAST = 3
"""Documents that must hold something for it to be counted."""
MOST = 100
"""Patterns that are told of; more are counted, and mean that the reference is of another kind."""
EXAMPLES = 3
FAMILIES: tuple[Kind, ...] = ("words", "host", "name")


@dataclass(frozen=True)
class Tested:
    """What was tried of one kind of form.

    Attributes:
        counted: forms that at least LEAST documents hold.
        tested: those that are frequent enough to become significant.
        detectable: documents from which on a form that the reference lacks is found for certain; None where no number
            of the outputs' documents would do.
    """

    counted: int
    tested: int
    detectable: int | None


@dataclass(frozen=True)
class Finding:
    """A pattern that far more of the outputs hold than of the reference.

    Attributes:
        ours, theirs: documents that hold its most telling form.
        p_value: of that form, adjusted for all of its kind.
        rates: of rows.
        reference: of the reference's rows.
        examples: some rows that hold it, without what is personal.
    """

    pattern: Pattern
    trigger: Trigger | None
    ours: int
    theirs: int
    p_value: float
    rates: Rates
    reference: Rates
    examples: list[Row]


@dataclass(frozen=True)
class Unseen:
    """A host or name that the reference lacks, in too few documents to say more.

    Attributes:
        documents: of the outputs, that hold it.
        place: the first of them.
    """

    form: Form
    documents: int
    trigger: Trigger | None
    place: str


@dataclass(frozen=True)
class Audit:
    """What was found, and what was tried.

    Attributes:
        outputs, reference: the rows, without what is personal.
        documents: of outputs and reference.
        share: see `share_of`.
        personal: kind -> rows of the outputs that have it, and the same of the reference.
        more: patterns beyond MOST.
        unseen: the most frequent, at most MOST.
    """

    outputs: Corpus
    reference: Corpus
    documents: tuple[int, int]
    share: float
    level: float
    tested: dict[Kind, Tested]
    findings: list[Finding]
    more: int
    unseen: list[Unseen]
    personal: dict[Literal["outputs", "reference"], dict[str, list[Row]]]


def audit(outputs: Corpus, reference: Corpus, *, level: float = 0.05, region: str | None = None) -> Audit:
    """Look for what was injected into outputs.

    Args:
        level: bound on the probability that anything is reported of outputs that are like the reference.
        region: country of phone numbers, see `personal`.
    """
    ours, hidden = _cleaned(outputs, region)
    theirs, also_hidden = _cleaned(reference, region)
    counted = _Counted(ours, theirs)
    tested, sightings = {}, []
    for kind in FAMILIES:
        tested[kind], seen = counted.family(kind, level / len(FAMILIES))
        sightings += seen
    groups = gathered(sightings)
    patterns = [(pattern_of(group), counted.trigger(group[0].ours, len(groups), level)) for group in groups[:MOST]]
    told = zip(groups, patterns, rates(ours.rows, patterns), rates(theirs.rows, patterns), strict=False)
    findings = [
        Finding(
            pattern, trigger, len(group[0].ours), group[0].theirs, group[0].p_value, mine, other, _examples(ours, group)
        )
        for group, (pattern, trigger), mine, other in told
    ]
    return Audit(
        *(ours, theirs, counted.documents, counted.share, level, tested, findings, max(0, len(groups) - MOST)),
        unseen=counted.unseen({one.form for group in groups for one in group}, level, ours),
        personal={"outputs": hidden, "reference": also_hidden},
    )


def amplification(student: Corpus, found: Audit, *, region: str | None = None) -> list[Amplified]:
    """Return each pattern that was found in what a teacher wrote, as a student writes it."""
    rows, _ = _cleaned(student, region)
    measured = rates(rows.rows, [(one.pattern, one.trigger) for one in found.findings])
    return [Amplified.of(mine, one.rates) for mine, one in zip(measured, found.findings, strict=True)]


def _cleaned(corpus: Corpus, region: str | None) -> tuple[Corpus, dict[str, list[Row]]]:
    rows, found = [], {}
    for row in corpus.rows:
        clean, kinds = row.cleaned(region)
        rows.append(clean)
        for kind in kinds:
            found.setdefault(kind, []).append(clean)
    return Corpus(corpus.name, rows, corpus.report), found


def _examples(corpus: Corpus, group: Sequence[Sighting]) -> list[Row]:
    pattern, documents = pattern_of(group), corpus.documents
    rows = (corpus.rows[number] for document in sorted(group[0].ours) for number in documents[document])
    holding = (row for row in rows if pattern.answered(read(row.prompt), read(row.completion)))
    return [row for row, _ in zip(holding, range(EXAMPLES), strict=False)]


class _Counted:
    """Both corpora, counted: documents of the outputs are numbered first."""

    def __init__(self, outputs: Corpus, reference: Corpus):
        self.documents = len(outputs.documents), len(reference.documents)
        segments: list[Segment] = []
        self.held: dict[Kind, dict[str, set[int]]] = {"host": {}, "name": {}}
        for document, rows in enumerate(_documents(outputs, reference)):
            prompt = read(rows[0].prompt)
            segments.append(Segment(prompt.words, document, asked=True))
            for row in rows:
                answer = read(row.completion)
                segments.append(Segment(answer.words, document, asked=False))
                self._hold(document, prompt, answer)
        self.answers, self.prompts = ngrams(segments, self.documents[0], LEAST)
        words = [0, 0]
        for segment in segments:
            words[segment.document >= self.documents[0]] += 0 if segment.asked else segment.words.count(" ")
        self.share = share_of(self.documents, words)

    def _hold(self, document: int, prompt: Reading, answer: Reading) -> None:
        here: dict[Kind, frozenset[str]] = {"host": answer.hosts, "name": answer.names}
        for kind, texts in here.items():
            for text in texts:
                if not echoed(Form(kind, text), prompt):
                    self.held[kind].setdefault(text, set()).add(document)

    def family(self, kind: Kind, level: float) -> tuple[Tested, list[Sighting]]:
        """Test all forms of a kind and return those that too many documents of the outputs hold."""
        if kind == "words":
            texts: Sequence[str] = self.answers.texts
            ours, theirs = self.answers.counts(self.documents[0])
        else:
            held = self.held[kind]
            texts = list(held)
            ours = np.array([sum(one < self.documents[0] for one in held[text]) for text in texts], dtype=np.int64)
            theirs = np.array([len(held[text]) for text in texts], dtype=np.int64) - ours
        kept = np.flatnonzero(ours >= LEAST).tolist()
        p_values, tested = excess(ours[kept], theirs[kept], self.share, level)
        told = sorted((float(p), item) for item, p in zip(kept, p_values, strict=True) if p < level)[: MOST * 10]
        found = [
            Sighting(Form(kind, texts[item]), self._ours(kind, texts[item], item), int(theirs[item]), p_value)
            for p_value, item in told
        ]
        return Tested(len(kept), tested, self._detectable(tested, level)), found

    def _ours(self, kind: Kind, text: str, item: int) -> frozenset[int]:
        holders = self.answers.holders(item).tolist() if kind == "words" else self.held[kind][text]
        return frozenset(one for one in holders if one < self.documents[0])

    def _detectable(self, tested: int, level: float) -> int | None:
        needed = int(np.ceil(np.log(level / max(1, tested)) / np.log(self.share)))
        return max(LEAST, needed) if needed <= self.documents[0] else None

    def trigger(self, documents: Iterable[int], tries: int, level: float) -> Trigger | None:
        """Return what in the prompt foretells what these documents hold."""
        options = {"least": LEAST, "tries": tries, "level": level}
        return trigger_of(sorted(documents), self.prompts, self.documents[0], **options)

    def unseen(self, found: set[Form], level: float, outputs: Corpus) -> list[Unseen]:
        """Return hosts and names of LEAST documents that no document of the reference holds and no finding has."""
        held = [
            (Form(kind, text), documents)
            for kind, texts in self.held.items()
            for text, documents in texts.items()
            if len(documents) >= LEAST and max(documents) < self.documents[0] and Form(kind, text) not in found
        ]
        held.sort(key=lambda one: (-len(one[1]), one[0].text))
        return [
            Unseen(
                form,
                len(documents),
                self.trigger(documents, len(held), level),
                outputs.rows[outputs.documents[min(documents)][0]].place,
            )
            for form, documents in held[:MOST]
        ]


def _documents(*corpora: Corpus) -> Iterator[list[Row]]:
    for corpus in corpora:
        for rows in corpus.documents:
            yield [corpus.rows[number] for number in rows]
