"""Every sequence knows its domain, in every layout, and naming one costs no tokenising."""

import numpy as np
import pytest
from pydantic import ValidationError

from kdlm.data import Source
from kdlm.data.forms import recognise
from kdlm.signal import domain_id

A = [{"text": f"alpha number {i} and so on"} for i in range(7)]
B = [{"text": f"beta {i}"} for i in range(5)]


def by_index(data):
    found = {}
    for row in data:
        for index, domain in zip(np.ravel(row["index"]), np.ravel(row["domain"]), strict=True):
            found[int(index)] = int(domain)
    return found


@pytest.mark.parametrize("packing", ["none", "padding_free", "pack"])
def test_every_sequence_has_the_domain_of_its_source(load, tokenizer, jsonl, packing):
    sources = [{"path": jsonl(A, "a.jsonl"), "domain": "alpha"}, {"path": jsonl(B, "b.jsonl")}]
    data = load(sources, tokenizer, packing=packing, max_length=40, eval_rows=3)
    found = by_index(data.train)
    assert len(found) == 9 and not found.keys() & by_index(data.eval).keys()
    for index, domain in (found | by_index(data.eval)).items():
        assert domain == domain_id("alpha" if index < 7 else sources[1]["path"])


def test_a_streamed_sequence_has_it_too(load, tokenizer, jsonl):
    sources = [{"path": jsonl(A, "a.jsonl"), "domain": "alpha"}, {"path": jsonl(B, "b.jsonl"), "domain": "beta"}]
    for packing in ("none", "pack"):
        data = load(sources, tokenizer, streaming=True, shuffle_buffer=0, packing=packing, max_length=40)
        assert sorted(by_index(data.train).values()) == sorted([domain_id("alpha")] * 7 + [domain_id("beta")] * 5)


@pytest.mark.parametrize("packing", ["none", "pack"])
def test_a_column_may_say_it_of_every_row(load, tokenizer, jsonl, packing):
    rows = [{**row, "topic": "odd" if i % 2 else "even"} for i, row in enumerate(A)]
    sources = [
        {"path": jsonl(rows, "a.jsonl"), "columns": {"domain": "topic"}},
        {"path": jsonl(B, "b.jsonl"), "domain": "b"},
    ]
    found = by_index(load(sources, tokenizer, packing=packing, max_length=40).train)
    assert [found[i] for i in range(7)] == [domain_id("odd" if i % 2 else "even") for i in range(7)]
    assert {found[i] for i in range(7, 12)} == {domain_id("b")}


def test_a_row_that_names_no_domain_is_counted_and_not_used(load, tokenizer, jsonl):
    rows = [{**row, "topic": None if i == 2 else "t"} for i, row in enumerate(A)]
    data = load([{"path": jsonl(rows, "a.jsonl"), "columns": {"domain": "topic"}}], tokenizer)
    assert len(data.train) == 6
    assert data.report.train[0].unused["malformed"].count == 1


def test_a_domains_name_changes_neither_tokens_nor_what_is_cached(load, tokenizer, jsonl):
    path = jsonl(A, "a.jsonl")
    named, plain = (
        load([{"path": path, **extra}], tokenizer, packing="pack", max_length=40) for extra in ({"domain": "x"}, {})
    )
    assert named.fingerprints == plain.fingerprints
    assert set(by_index(named.train).values()) == {domain_id("x")} != set(by_index(plain.train).values())


def test_a_mapped_domain_stands_beside_the_form_that_is_recognised():
    columns = ["prompt", "completion", "topic"]
    form = recognise(Source(path="x", columns={"domain": "topic"}), columns)
    assert (form.name, form.columns["domain"]) == ("completion", "topic")
    assert "domain" not in recognise(Source(path="x"), [*columns, "domain"]).columns


def test_a_source_with_two_ways_to_its_domain_is_refused():
    with pytest.raises(ValidationError, match="both say what a row's domain is"):
        Source(path="x", domain="a", columns={"domain": "topic"})
