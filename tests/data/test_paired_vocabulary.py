"""Which ids of two vocabularies mean the same, by the bytes that they spell."""

from functools import cache

import numpy as np
import pytest
from readers import reader

from kdlm.data.paired_vocabulary import PairedVocabulary
from kdlm.spelling import Spelling

BPE, UNIGRAM, BYTES = "tiny", "unigram-tiny", "bytes"


@cache
def spelling(name: str) -> Spelling:
    return Spelling(reader(name))


def paired(ours: str, theirs: str) -> PairedVocabulary:
    return PairedVocabulary(spelling(ours), spelling(theirs))


@pytest.mark.parametrize("name", [BPE, BYTES])
def test_a_vocabulary_is_matched_with_itself_id_by_id_and_projected_by_the_identity(name: str) -> None:
    pair, size = paired(name, name), len(spelling(name).pieces)
    ids = np.arange(size)
    assert pair.share == 1
    for found in (*pair.matched, *pair.projection(4)[:2]):
        np.testing.assert_array_equal(found, ids)
    assert (pair.projection(4)[2] == 1).all()


@pytest.mark.parametrize(("ours", "theirs"), [(BPE, UNIGRAM), (UNIGRAM, BPE), (BYTES, BPE), (UNIGRAM, BYTES)])
def test_matched_ids_spell_the_same_bytes_one_to_one_and_none_is_forgotten(ours: str, theirs: str) -> None:
    pair = paired(ours, theirs)
    mine, other = pair.matched
    assert (np.diff(mine) > 0).all() and len(set(other)) == len(other)
    text = [(i, j) for i, j in zip(mine, other, strict=True) if i not in pair.ours.control]
    assert all(pair.ours.pieces[i] == pair.theirs.pieces[j] for i, j in text)
    both = {p for i, p in enumerate(pair.ours.pieces) if p and i not in pair.ours.control}
    both &= {p for i, p in enumerate(pair.theirs.pieces) if p and i not in pair.theirs.control}
    assert len(text) == len(both)


def test_the_ends_of_a_sequence_are_paired_whatever_they_are_called() -> None:
    pair = paired(BPE, UNIGRAM)
    ours, theirs = pair.ours.tokenizer, pair.theirs.tokenizer
    assert ours.eos_token != theirs.eos_token
    assert (ours.eos_token_id, theirs.eos_token_id) in set(zip(*pair.matched, strict=True))


def test_a_space_is_a_space_in_whatever_letter_it_is_written() -> None:
    pair = paired(BPE, UNIGRAM)
    ours, theirs = (
        side.tokenizer.convert_ids_to_tokens(ids.tolist())
        for side, ids in zip((pair.ours, pair.theirs), pair.matched, strict=True)
    )
    spaced = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.startswith("Ġ")]
    assert len(spaced) > 20
    assert all(b == a.replace("Ġ", "\u2581") for a, b in spaced)


def test_the_plain_token_counts_before_that_of_byte_fallback() -> None:
    pair = paired(BPE, UNIGRAM)
    at = dict(zip(*(side.tolist() for side in pair.matched), strict=True))
    letter = pair.ours.tokenizer.convert_tokens_to_ids("a")
    assert pair.theirs.tokenizer.convert_ids_to_tokens(at[letter]) == "a"


@pytest.mark.parametrize(("ours", "theirs"), [(BPE, UNIGRAM), (UNIGRAM, BPE), (BYTES, BPE), (BPE, BYTES)])
@pytest.mark.parametrize("k", [1, 4])
def test_projected_tokens_begin_one_another_and_rows_have_at_most_mass_1(ours: str, theirs: str, k: int) -> None:
    pair = paired(ours, theirs)
    rows, columns, weights = pair.projection(k)
    exact = dict(zip(*(side.tolist() for side in pair.matched), strict=True))
    counts, mass = np.bincount(rows), np.bincount(rows, weights=weights)
    assert counts.max() <= k and (weights > 0).all() and mass.max() < 1 + 1e-12
    for v, t, weight in zip(rows.tolist(), columns.tolist(), weights.tolist(), strict=True):
        if v in exact:
            assert (exact[v], 1.0) == (t, weight), "what both have leads there alone"
        else:
            a, b = pair.ours.pieces[v] or b"", pair.theirs.pieces[t] or b""
            assert a.startswith(b) or b.startswith(a)


def test_a_longer_token_leads_to_the_longest_teacher_token_that_begins_it() -> None:
    pair = paired(BPE, BYTES)  # every token of text begins with one of the bytes
    rows, columns, weights = pair.projection(4)
    text = [i for i, piece in enumerate(pair.ours.pieces) if piece and i not in pair.ours.control]
    assert [(pair.ours.pieces[v] or b"")[:1] for v in rows[np.isin(rows, text)]] == [
        pair.theirs.pieces[t] for t in columns[np.isin(rows, text)]
    ]
    assert (weights == 1).all()
