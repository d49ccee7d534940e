"""A source may score its rows, and samplers choose among sequences by that, by domain and by document."""

import numpy as np

from kdlm.samplers import DomainGaps, FixedSubset

ROWS = [
    {"text": f"row number {i} of a few", "forgetting": i * 1.5, "topic": "odd" if i % 2 else "even"} for i in range(12)
]


def test_every_sequence_has_the_score_of_its_row_and_the_best_are_kept(load, tokenizer, jsonl):
    columns = {"score": "forgetting", "domain": "topic"}
    data = load([{"path": jsonl(ROWS, "a.jsonl"), "columns": columns}], tokenizer, max_length=12)
    kept = FixedSubset(fraction=0.5, by="score", balance="domain").kept(data.train)
    best = {float(data.train[int(place)]["score"]) for place in kept}
    assert best == {i * 1.5 for i in range(6, 12)}


def test_a_row_whose_score_is_no_number_is_counted_and_not_used(load, tokenizer, jsonl):
    rows = [{**row, "forgetting": None if i == 3 else row["forgetting"]} for i, row in enumerate(ROWS)]
    data = load([{"path": jsonl(rows, "a.jsonl"), "columns": {"score": "forgetting"}}], tokenizer)
    assert len(data.train) == 11
    assert data.report.train[0].unused["malformed"].count == 1
    assert "a.jsonl:4" in data.report.train[0].unused["malformed"].examples[0]


def test_rows_scored_anew_are_split_as_before(load, tokenizer, jsonl):
    splits = []
    for factor in (1.0, 3.0):
        rows = [{**row, "forgetting": factor * row["forgetting"]} for row in ROWS]
        data = load([{"path": jsonl(rows, "a.jsonl"), "columns": {"score": "forgetting"}}], tokenizer, eval_rows=3)
        splits.append(list(data.eval["index"]))
    assert splits[0] == splits[1]


def test_documents_of_loaded_text_are_measured_or_trained_on_whole(load, tokenizer, jsonl):
    texts = [{"text": " ".join(f"word{i} {j}" for j in range(40))} for i in range(16)]
    sources = [
        {"path": jsonl(texts[:8], "a.jsonl"), "domain": "a"},
        {"path": jsonl(texts[8:], "b.jsonl"), "domain": "b"},
    ]
    data = load(sources, tokenizer, max_length=16, eval_rows=2)
    documents = data.documents["train"]
    drawn = DomainGaps(held_out=3).order(data.train, 0, 4, documents)
    at = np.asarray(data.train["index"][:])
    for number, measured in drawn.slices.items():
        whole = {int(documents[at[place]]) for place in measured}
        assert len(measured) == 3 and not whole & {int(documents[at[place]]) for place in drawn.pools[number]}
        assert all(int(data.train[int(place)]["domain"]) == number for place in measured)
