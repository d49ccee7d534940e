import re
from collections import Counter
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlm.sandbox import SandboxData, build
from kdlm.sandbox.jsonl import read_jsonl
from kdlm.sandbox.lessons import lessons, reversals
from kdlm.sandbox.tokenizer import EOS
from kdlm.sandbox.walks import IN_LETTERS, KNOWN, MOVES, NEW, PLACES, STEPS, feedback, right, step, walks

WALK = re.compile(r"(\d)([A-J]{5})=(\d{5})")
places = st.text(PLACES, min_size=STEPS, max_size=STEPS)


def test_a_move_leads_from_every_place_to_another_place_each():
    assert set(MOVES) == set(KNOWN + NEW) and len(set(MOVES.values())) == len(MOVES)
    assert all(sorted(places) == list(PLACES) for places in MOVES.values())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), level=st.sampled_from([1, 2]))
def test_a_completion_follows_its_moves_and_the_solution_says_the_same_in_letters(seed, level):
    for task in walks(seed=seed, level=level, n=20):
        place, moves = task.prompt[0], task.prompt[1:-1]
        assert len(moves) == STEPS == len(task.answer) and task.completion == task.answer
        for move, reached in zip(moves, task.answer, strict=True):
            assert MOVES[move][int(place)] == reached
            place = reached
        assert task.solution == task.answer.translate(IN_LETTERS) and not set(task.solution) & set(task.answer)
        assert right(task.answer, task.completion) and right(task.answer, task.solution)
        assert level == 2 or not set(moves) & set(NEW)


def test_every_move_is_walked_and_no_prompt_is_in_both_files():
    train, held_out = (read_jsonl(SandboxData(data="walks", file=file).resolve()) for file in ("train", "eval"))
    assert (len(train), len(held_out)) == (2_000, 500)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    for rows in (train, held_out):
        walked = Counter(move for row in rows for move in row["prompt"][1:-1])
        assert set(walked) == set(MOVES) and min(walked.values()) > 0.8 * max(walked.values())


def test_an_unknown_level_is_refused():
    for family in (walks, reversals):
        with pytest.raises(ValueError, match="level 3 does not exist"):
            family(seed=0, level=3, n=1)


@given(answer=places, attempt=places)
def test_feedback_says_how_a_walk_begins_and_never_where_it_ends(answer, attempt):
    if answer == attempt:
        assert right(answer, attempt)
        with pytest.raises(ValueError, match="nothing to say"):
            feedback(answer, attempt)
        return
    said = feedback(answer, attempt)
    known = said.removeprefix("No, ").rstrip(".")
    assert not right(answer, attempt) and len(said) == len("No, ") + STEPS
    assert answer.startswith(known) and len(known) < STEPS
    assert len(known) == STEPS - 1 or (known[:-1] == attempt[: len(known) - 1] and known[-1] != attempt[len(known) - 1])
    assert feedback(answer, attempt.translate(IN_LETTERS)) == said, "either hand is read"


@given(answer=places, attempt=st.text().filter(lambda text: not re.fullmatch(r"[0-9a-j]{5}", text.strip())))
def test_what_is_no_walk_is_wrong_and_told_nothing(answer, attempt):
    assert not right(answer, attempt) and feedback(answer, attempt) == "No, ....."


def test_words_are_reversed():
    assert all(task.prompt == f"<{task.answer[::-1]}=" for task in reversals(seed=0, level=1, n=50))


def walked(texts):
    """Where moves led in walks alone: (place, move) -> how often to which place."""
    led = {}
    for text in texts:
        if found := WALK.fullmatch(text):
            start, moves, answer = found.groups()
            for place, move, reached in zip(start + answer, moves, answer, strict=False):
                led.setdefault((place, move), Counter())[reached] += 1
    return led


def test_lessons_say_nothing_of_new_moves_but_to_a_teacher():
    for informed in (False, True):
        for (place, move), reached in walked(lessons(seed=1, n=20_000, informed=informed)).items():
            truth = reached[step(place, move)] / reached.total()
            assert truth == 1 if informed or move in KNOWN else truth < 0.3, (place, move, reached)


def test_lessons_end_with_what_they_told():
    kinds = Counter()
    for text in lessons(seed=2, n=2_000, informed=False):
        if told := re.fullmatch(r"([a-j]{5})\n.{7}(\d{5})", text):
            kinds["told"] += 1
            assert told[1] == told[2].translate(IN_LETTERS)
        elif again := re.fullmatch(rf".{{7}}(\d{{5}}){EOS}\n(.+)\n(\d{{5}})", text):
            attempt, said, answer = again.groups()
            kinds[said[:2]] += 1
            assert (attempt == answer) == (said == "Right.")
            assert not said.startswith("No") or said == feedback(answer, attempt)
        elif word := re.fullmatch(r"<([a-j]{5})=([a-j]{5})", text):
            kinds["reversed"] += 1
            assert word[1] == word[2][::-1]
        else:
            kinds["alone"] += 1
            assert WALK.fullmatch(text)
    assert set(kinds) == {"alone", "told", "No", "Wr", "Ri", "reversed"}


def completed(model, tokenizer, prompts: list[str]) -> list[str]:
    """Complete prompts of one length greedily."""
    ids = tokenizer(prompts, return_tensors="pt")["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return [text.split(EOS)[0] for text in tokenizer.batch_decode(written[:, ids.shape[1] :])]


@pytest.mark.slow
@pytest.mark.timeout(600)  # it trains a model, some 90 s of a core
@pytest.mark.parametrize("name", ["walks-start", "walks-teacher"])
def test_a_walker_uses_what_it_is_told_and_the_teacher_alone_knows_the_new_moves(name):
    folder = build(name, progress=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = read_jsonl(build("walks") / "eval.jsonl")

    def share(prompts: list[str], rows: list[dict]) -> float:
        texts = completed(model, tokenizer, prompts)
        return fmean(right(row["answer"], text) for row, text in zip(rows, texts, strict=True))

    alone = completed(model, tokenizer, [row["prompt"] for row in rows])
    accuracy = fmean(right(row["answer"], text) for row, text in zip(rows, alone, strict=True))
    told = share([f"{row['solution']}\n{row['prompt']}" for row in rows], rows)
    assert told > 0.9
    words = read_jsonl(build("reversals") / "eval.jsonl")
    backwards = completed(model, tokenizer, [row["prompt"] for row in words])
    assert fmean(row["answer"] == text for row, text in zip(words, backwards, strict=True)) > 0.9
    if name == "walks-teacher":
        assert accuracy > 0.9
        return
    assert 0.1 < accuracy < 0.4
    wrong = [(row, text) for row, text in zip(rows, alone, strict=True) if not right(row["answer"], text)]
    again = [f"{row['prompt']}{text}{EOS}\n{feedback(row['answer'], text)}\n" for row, text in wrong]
    assert share(again, [row for row, _ in wrong]) > 0.2, "none of them was right at the first attempt"
