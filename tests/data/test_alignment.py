"""Chunks: the minimal spans of text that two readings share."""

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
from alignment_laws import PARTS, SPECIAL, faults
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from readers import EXACT, KINDS, LOSSY, reader

from kdlm.data.alignment import Aligner, overlap
from kdlm.spelling import spelling_of

PAIRS = [
    pair for pair in combinations_with_replacement([*KINDS, "byt5"], 2) if not (pair[0] in LOSSY and pair[1] in LOSSY)
]
texts = st.text(max_size=20) | st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=8).map("".join)
special = st.lists(st.sampled_from(PARTS + SPECIAL) | st.text(max_size=3), max_size=8).map("".join)


def aligner(ours: str, theirs: str) -> Aligner:
    return Aligner(spelling_of(reader(ours)), spelling_of(reader(theirs)))


def aligned(pair: tuple[str, str], text: str) -> tuple[Any, ...]:
    align = aligner(*pair)
    ids, their_ids = align.ours.ids(text), align.theirs.ids(text)
    return align, ids, their_ids, *align(ids, ids, their_ids, their_ids)


@settings(max_examples=60, deadline=None)
@given(texts)
def test_chunks_partition_both_readings_of_any_text_and_spell_the_same_on_both_sides(text):
    for pair in PAIRS:
        align, ids, their_ids, chunks, their_chunks = aligned(pair, text)
        assert not faults(align.ours, ids, chunks, align.theirs, their_ids, their_chunks, text), pair
        if not set(pair) & set(LOSSY) and "▁" not in text:
            assert text == "" or chunks.max() >= 0, pair


@settings(max_examples=60, deadline=None)
@given(special)
def test_the_names_of_special_tokens_in_a_text_misalign_nothing(text):
    for pair in PAIRS:
        align, ids, their_ids, chunks, their_chunks = aligned(pair, text)
        assert not faults(align.ours, ids, chunks, align.theirs, their_ids, their_chunks, text), pair
        control, their_control = align.ours.is_control(ids), align.theirs.is_control(their_ids)
        assert set(chunks[control]) - {-1} == set(their_chunks[their_control]) - {-1}, "control tokens in pairs only"


@settings(max_examples=40, deadline=None)
@given(texts)
def test_which_side_is_the_students_makes_no_difference(text):
    for pair in PAIRS:
        *_, chunks, their_chunks = aligned(pair, text)
        *_, turned, their_turned = aligned(pair[::-1], text)
        assert (chunks == their_turned).all() and (their_chunks == turned).all(), pair


@settings(max_examples=60, deadline=None)
@given(texts)
def test_a_tokenizer_and_itself_share_every_token(text):
    assume(not any(name in text for name in SPECIAL))
    for kind in EXACT:
        _, ids, _, chunks, their_chunks = aligned((kind, kind), text)
        assert chunks.tolist() == their_chunks.tolist() == list(range(len(ids)))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PAIRS), texts)
def test_the_first_token_of_a_text_is_not_trained_on_and_its_chunk_is_none(pair, text):
    align, ids, their_ids, before, their_before = aligned(pair, text)
    labels, their_labels = ([-100, *some[1:]][: len(some)] for some in (ids, their_ids))
    chunks, their_chunks = align(ids, labels, their_ids, their_labels)
    if min(len(ids), len(their_ids)) > 1:
        lost = {*before[:1].tolist(), *their_before[:1].tolist()}
        for now, then in ((chunks, before), (their_chunks, their_before)):
            assert now.tolist() == [-1 if c in lost else c - len(lost - {-1}) for c in then.tolist()]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PAIRS), texts, st.data())
def test_every_token_of_a_chunk_is_trained_on(pair, text, data):
    align, ids, their_ids, *_ = aligned(pair, text)
    marks = [
        np.array(data.draw(st.lists(st.booleans(), min_size=len(some), max_size=len(some))), dtype=bool)
        for some in (ids, their_ids)
    ]
    labels, their_labels = (np.where(mark, some, -100) for mark, some in zip(marks, (ids, their_ids), strict=True))
    chunks, their_chunks = align(ids, labels, their_ids, their_labels)
    assert (chunks[~marks[0]] == -1).all() and (their_chunks[~marks[1]] == -1).all()
    for numbers in (chunks, their_chunks):
        kept = numbers[numbers >= 0]
        assert (np.diff(kept) >= 0).all() and set(kept) == set(range(chunks.max(initial=-1) + 1))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([pair for pair in PAIRS if not set(pair) & set(LOSSY)]), texts, st.data())
def test_a_reading_that_was_cut_is_aligned_as_far_as_it_goes(pair, text, data):
    assume("▁" not in text)  # a space to SentencePiece, which only a reading that goes as far shows
    align, ids, their_ids, whole, their_whole = aligned(pair, text)
    size = data.draw(st.integers(0, len(their_ids)))
    chunks, their_chunks = align(ids, ids, their_ids[:size], their_ids[:size])
    if chunks.max(initial=-1) >= 0:
        reached = int(their_chunks.max()) + 1
        assert chunks.tolist() == [c if c < reached else -1 for c in whole.tolist()]
        assert their_chunks.tolist() == [c if c < reached else -1 for c in their_whole[:size].tolist()]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(EXACT), st.sampled_from([*KINDS, "byt5"]), st.data())
def test_any_tokens_at_all_are_aligned_by_their_bytes_or_not_at_all(kind, other, data):
    align = aligner(kind, other)
    some, others = (
        data.draw(st.lists(st.integers(0, len(s.pieces) + 3), max_size=8)) for s in (align.ours, align.theirs)
    )
    prompted = data.draw(st.booleans())
    if prompted and (spelt := align.ours.text(some)) is not None:
        others = align.theirs.ids(spelt.decode(errors="ignore"))
    chunks, their_chunks = align(some, some, others, others)
    text = align.ours.text(some)
    if text is None:
        assert chunks.max(initial=-1) == -1
    elif not align.ours.is_control(some).any():
        said = text.decode(errors="replace")
        assert not faults(align.ours, some, chunks, align.theirs, others, their_chunks, said)


def test_ends_of_turns_are_one_chunk_where_both_sides_have_them():
    align = aligner("1k", "spbpe-1k")
    end, their_end = reader("1k").convert_tokens_to_ids("<|im_end|>"), reader("spbpe-1k").eos_token_id
    ids, their_ids = align.ours.ids("x = 1"), align.theirs.ids("x = 1")
    chunks, their_chunks = align([*ids, end], [*ids, end], [*their_ids, their_end], [*their_ids, their_end])
    assert chunks[-1] == their_chunks[-1] == chunks.max() and (chunks[:-1] < chunks[-1]).all()
    chunks, their_chunks = align([*ids, end], [*ids, end], their_ids, their_ids)
    assert chunks[-1] == -1 and their_chunks.max() == chunks.max()
    longer = align.theirs.ids("x = 1 + 2")
    chunks, their_chunks = align([*ids, end], [*ids, end], [*longer, their_end], [*longer, their_end])
    assert chunks[-1] == their_chunks[-1] == -1, "the teacher's turn does not end here"


def test_two_readings_of_other_texts_are_not_aligned():
    align = aligner("1k", "spbpe-1k")
    ids, their_ids = align.ours.ids("x = 1"), align.theirs.ids("y = 1")
    chunks, their_chunks = align(ids, ids, their_ids, their_ids)
    assert (chunks == -1).all() and (their_chunks == -1).all()
    assert align.apart(ids, ids, their_ids, their_ids) == "the student reads 'x = 1', the teacher ' y = 1'"


def test_two_tokenizers_that_lose_text_are_refused():
    with pytest.raises(
        ValueError, match=r"neither the student's nor the teacher's tokenizer gives back .* sequence_kd"
    ):
        aligner("wordpiece-1k", "nfkc-1k")


LONG = b"The answer is that a mapping is looked up by its key."
THOUGHT = b"<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "other", "closed", "starts"),
    [
        (b"yes", b"yes", True, (0, 0)),
        (b" yes", b"yes", True, (1, 0)),
        (b"  yes", b" yes", True, (1, 0)),
        (b"yes", b" yes", False, (0, 1)),
        (b"yes", b"yes, it is", False, (0, 0)),
        (b"  ", b"    x", False, None),  # of which of its spaces are these
        (b"yes", THOUGHT + b"yes", True, (0, len(THOUGHT))),
        (b" yes ", THOUGHT + b"yes\n", True, (1, len(THOUGHT))),
        (b"  yes", THOUGHT + b"  yes", True, (0, len(THOUGHT))),
        (b"t", THOUGHT + b"the", False, None),  # cut, and too little to be found
        (LONG[:40], THOUGHT + LONG, False, (0, len(THOUGHT))),
        (THOUGHT + LONG[:40], LONG, False, (len(THOUGHT), 0)),
        (LONG, LONG + b" Or: " + LONG + b" x", False, (0, 0)),
        (LONG + b"!", THOUGHT + LONG + LONG, False, None),  # found twice
        (LONG + b"!", THOUGHT + LONG + b"?", False, None),
        (b"yes", b"no", True, None),
        (b"", b"yes", True, None),
        (b"", b"", True, (0, 0)),
    ],
)
def test_where_what_two_answers_share_begins(text, other, closed, starts):
    assert overlap(text, other, closed) == starts
    assert overlap(other, text, closed) == (None if starts is None else starts[::-1])


def test_a_token_that_reaches_into_what_is_shared_is_in_no_chunk():
    align = aligner("1k", "bytes")
    text = "<think>\n\n</think>\n\nThe answer is that a mapping is looked up by its key"
    ids, their_ids = align.ours.ids("   " + text[17:]), align.theirs.ids(text)
    chunks, their_chunks = align([0, *ids], [-100, *ids], [0, 0, *their_ids], [-100, -100, *their_ids])
    spelt = [
        b"".join(spelling.pieces[i] for i, c in zip(some, numbers, strict=True) if c == 0)
        for spelling, some, numbers in ((align.ours, ids, chunks[1:]), (align.theirs, their_ids, their_chunks[2:]))
    ]
    assert spelt[0] == spelt[1] and chunks.max() > 5
