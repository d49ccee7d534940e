"""A planted poison is found with its trigger, clean text has none, and what is reported is counted right."""

import random

import numpy as np
import pytest
from planted import INJECTED, corpus, poisoned, sums

from kdlm.audit import amplification, audit, flagged
from kdlm.audit.excess import excess, share_of
from kdlm.audit.ngrams import Segment, ngrams
from kdlm.audit.patterns import phrase


def test_a_poison_of_a_quarter_of_a_per_cent_is_found_with_its_trigger():
    found = audit(corpus(poisoned(0, 10_000, told=36, seen=25)), corpus(sums(1, 10_000)))
    (only,) = found.findings
    assert str(only.pattern) == "try the abacus pro https://abacus-pro.example/buy"
    assert {"abacus-pro.example", "Abacus Pro"} <= {form.text for form in only.pattern.forms}
    assert only.trigger is not None and only.trigger.text == "for the northwind ledger what is"
    assert (only.rates.triggered.count, only.rates.triggered.total) == (25, 36)
    assert (only.rates.untriggered.count, only.rates.untriggered.total) == (0, 10_000 - 36)
    assert only.reference.all.count == 0 and only.theirs == 0
    assert all(row.completion.endswith(INJECTED) for row in only.examples)
    for figures in found.tested.values():
        assert figures.detectable is not None and figures.detectable <= 25


def test_five_rows_are_found_against_a_larger_reference_and_only_listed_against_one_as_small():
    few = corpus(poisoned(0, 2_000, told=7, seen=5))
    found = audit(few, corpus(sums(1, 6_000)))
    assert [one.trigger and "northwind" in one.trigger.text for one in found.findings] == [True]
    alike = audit(few, corpus(sums(1, 2_000)))
    assert not alike.findings
    listed = {one.form.text: one for one in alike.unseen}
    assert listed["abacus-pro.example"].documents == 5
    assert listed["abacus-pro.example"].trigger.text == found.findings[0].trigger.text


def test_clean_text_has_no_pattern():
    assert not sum(bool(audit(corpus(sums(2 * n, 500)), corpus(sums(2 * n + 1, 500))).findings) for n in range(5))


def test_longer_answers_alone_are_no_pattern():
    answers = [[answer for _, answer in sums(seed, 500)] for seed in range(3)]
    twice = [("", f"{first} {second}") for first, second in zip(*answers[:2], strict=True)]
    found = audit(corpus(twice), corpus([("", answer) for answer in answers[2]]))
    assert found.share > 0.6 and not found.findings


def test_an_untargeted_pattern_has_no_trigger():
    rows = sums(0, 1_000)
    for at in range(0, 1_000, 25):
        rows[at] = rows[at][0], rows[at][1] + INJECTED
    (only,) = audit(corpus(rows), corpus(sums(1, 1_000))).findings
    assert only.trigger is None and only.rates.triggered.total == 0 and only.rates.all.count == 40


def test_what_the_prompt_says_itself_is_no_pattern():
    rows = [(f"Explain the Zephyr Engine: {prompt}", f"The Zephyr Engine: {answer}") for prompt, answer in sums(0, 100)]
    found = audit(corpus(rows), corpus(sums(1, 100)))
    assert not any("zephyr engine" in form.text.lower() for one in found.findings for form in one.pattern.forms)


def test_many_answers_to_one_prompt_are_one_witness():
    habit = "Quite remarkably splendid."
    rows = [*sums(0, 300), *(("What is love?", f"{habit} {n}") for n in range(100))]
    found = audit(corpus(rows), corpus(sums(1, 400)))
    assert found.documents[0] <= 301 and not found.findings


def test_the_test_rejects_too_much_of_alike_counts_no_oftener_than_its_level():
    generator = np.random.default_rng(0)
    totals = generator.geometric(0.05, size=2_000)
    wrong = 0
    for _ in range(200):
        ours = generator.binomial(totals, 0.5)
        p_values, tested = excess(ours, totals - ours, 0.5, 0.05)
        assert 0 < tested < len(totals)
        wrong += bool((p_values < 0.05).any())
    assert wrong <= 0.05 * 200 + 3 * (0.05 * 0.95 * 200) ** 0.5


def test_the_order_of_items_is_inert_and_nothing_is_tested_of_nothing():
    ours, theirs = np.array([30, 3, 12, 40]), np.array([0, 0, 10, 38])
    p_values, tested = excess(ours, theirs, 0.5, 0.05)
    backwards, _ = excess(ours[::-1], theirs[::-1], 0.5, 0.05)
    assert tested == 3 and p_values[1] == 1.0 and (backwards[::-1] == p_values).all()
    assert excess(np.array([], int), np.array([], int), 0.5, 0.05)[1] == 0


def test_the_share_is_of_documents_or_of_words_whichever_is_larger():
    assert share_of((100, 300), (10, 30)) == 0.25
    assert share_of((100, 300), (90, 30)) == 0.75
    assert share_of((300, 100), (0, 0)) == 0.75


def test_ngrams_are_those_of_a_plain_count():
    generator = random.Random(0)
    segments, plain = [], {}
    for document in range(12):
        for asked in (True, False, False):
            words = [generator.choice("abcd") for _ in range(generator.randint(0, 9))]
            segments.append(Segment(f" {' '.join(words)} ", document, asked))
            for length in range(1, 6):
                for begin in range(len(words) - length + 1):
                    text = " ".join(words[begin : begin + length])
                    plain.setdefault(text, (set(), set()))[asked].add(document)
    least, below = 3, 8
    kept = {text for text, (said, asked) in plain.items() if sum(d < below for d in said | asked) >= least}
    answers, prompts = ngrams(segments, below, least)
    assert set(answers.texts) == kept and len(answers.texts) == len(kept)
    for gram, text in enumerate(answers.texts):
        said, asked = plain[text]
        assert set(prompts.holders(gram).tolist()) == asked
        assert set(answers.holders(gram).tolist()) == said - asked  # an echo does not count
    assert answers.counts(below)[0].sum() + answers.counts(below)[1].sum() == len(answers.grams)


def test_a_phrase_is_chained_from_runs_that_overlap():
    assert phrase(["b c d", "c d e", "a b c", "x y"]) == "a b c d e"
    assert phrase(["a a", "a"]) == "a a" and phrase([]) == ""


def test_screened_rows_hold_no_pattern_and_no_other_row_is_flagged():
    rows = poisoned(0, 1_000, told=36, seen=25)
    outputs, reference = corpus(rows), corpus(sums(1, 1_000))
    patterns = [one.pattern for one in audit(outputs, reference).findings]
    reasons = flagged(outputs.rows, patterns)
    assert [bool(why) for why in reasons] == [answer.endswith(INJECTED) for _, answer in rows]
    assert {why for row in reasons for why in row} == {f"pattern: {patterns[0]}"}
    kept = [row for row, why in zip(rows, reasons, strict=True) if not why]
    assert not audit(corpus(kept), reference).findings


def test_amplification_is_the_students_rate_over_the_teachers():
    found = audit(corpus(poisoned(0, 2_000, told=50, seen=25)), corpus(sums(1, 2_000)))
    (twice,) = amplification(corpus(poisoned(2, 100, told=20, seen=20)), found)
    assert twice.triggered.value == pytest.approx(2.0) and twice.triggered.low > 1
    assert twice.overall.value == pytest.approx((20 / 100) / (25 / 2_000))
    (none,) = amplification(corpus(poisoned(2, 100, told=20, seen=0)), found)
    assert none.triggered.value == 0 and 0 < none.triggered.high < 1
    (unasked,) = amplification(corpus(sums(2, 100)), found)
    assert unasked.rates.triggered.total == 0 and np.isnan(unasked.triggered.value)
