"""Pairs of a prompt's completions: right against wrong, best against worst, one model against another; corruptions."""

import random
from itertools import combinations
from pathlib import Path

import pytest
from datasets import Dataset

from kdlm.curation import Corrupt, Desk, OfModels, Pairs, Pipeline, Ranked, Right, TagForm
from kdlm.curation import run as pipeline_run
from kdlm.curation.step import Counts
from kdlm.data.forms import recognise
from kdlm.data.sections import Source
from kdlm.data.sources import open_source
from kdlm.recipe import Recipe
from kdlm.section_loader import load_section


def rows(prompts: int = 12, samples: int = 6, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    made = []
    for prompt in range(prompts):
        for sample in range(samples):
            tokens = draw.randint(1, 40)
            made.append(
                {
                    "prompt": f"prompt {prompt}",
                    "level": prompt % 3,
                    "prompt_id": f"{prompt:016x}",
                    "sample": sample,
                    "completion": "x" * tokens + f" {sample}",
                    "model": draw.choice(["teacher", "student"]),
                    "stop": draw.choice(["end", "end", "length"]),
                    "tokens": tokens,
                    "log_prob": -draw.random() * 40,
                    "score": float(draw.random() < 0.5),
                    "verdict": draw.choice(["judged", "judged", "judged", "timed_out"]),
                }
            )
    return made


def run(step: Pairs | Corrupt, given: list[dict], seed: int = 0) -> tuple[list[dict], Counts]:
    desk = Desk(seed=seed)
    return step.run(Dataset.from_list(given), desk).to_list(), desk.counts


def sides(given: list[dict], pair: dict) -> tuple[dict, dict]:
    found = [[row for row in given if (row["prompt"], row["completion"]) == (pair["prompt"], pair[s])] for s in SIDES]
    return found[0][0], found[1][0]


SIDES = ("chosen", "rejected")
RULES = [
    Right(),
    Right(match="random", truncated=True),
    Ranked(column="log_prob"),
    Ranked(column="log_prob", per_token=True, margin=0.2),
    OfModels(chosen="teacher", rejected="student"),
]


@pytest.mark.parametrize("prefer", RULES, ids=repr)
@pytest.mark.parametrize("per_prompt", [1, 2, None])
def test_no_completion_is_in_two_pairs_and_no_prompt_has_too_many(prefer, per_prompt):
    given = rows()
    pairs, _ = run(Pairs(prefer=prefer, per_prompt=per_prompt), given)
    assert pairs
    used = [(pair["prompt"], pair[side]) for pair in pairs for side in SIDES]
    assert len(set(used)) == len(used)
    assert set(used) <= {(row["prompt"], row["completion"]) for row in given}
    counts = [sum(pair["prompt"] == prompt for pair in pairs) for prompt in {row["prompt"] for row in given}]
    assert max(counts) <= (per_prompt or 3)


@pytest.mark.parametrize("prefer", RULES, ids=repr)
def test_the_order_of_the_rows_changes_no_pair_and_the_seed_those_that_are_drawn(prefer):
    given, step = rows(), Pairs(prefer=prefer, per_prompt=2)
    pairs, _ = run(step, given)
    turned = random.Random(1).sample(given, len(given))

    def told(some: list[dict]) -> list[tuple]:
        return sorted((pair["prompt"], pair["chosen"], pair["rejected"]) for pair in some)

    assert told(run(step, turned)[0]) == told(pairs)
    if getattr(prefer, "match", None) == "random":
        assert told(run(step, given, seed=1)[0]) != told(pairs)


def test_the_right_are_preferred_to_the_wrong_that_were_judged_and_ended():
    given = rows()
    pairs, counts = run(Pairs(prefer=Right(), per_prompt=None), given)
    for pair in pairs:
        chosen, rejected = sides(given, pair)
        assert (chosen["score"], rejected["score"]) == (1, 0)
        assert chosen["verdict"] == rejected["verdict"] == "judged"
        assert rejected["stop"] == "end" and chosen["stop"] == "end"
    judged = [row for row in given if row["verdict"] == "judged"]
    cut = [row for row in judged if row["score"] == 0 and row["stop"] == "length"]
    assert counts.kinds["completions that were not judged"].count == len(given) - len(judged)
    assert counts.kinds["completions that are wrong because they were cut"].count == len(cut)
    cut_too, _ = run(Pairs(prefer=Right(truncated=True), per_prompt=None), given)
    assert any(sides(given, pair)[1]["stop"] == "length" for pair in cut_too)


def test_the_first_pair_matched_by_length_is_the_nearest_there_is():
    given = rows()
    for pair in run(Pairs(prefer=Right(truncated=True)), given)[0]:
        some = [row for row in given if row["prompt"] == pair["prompt"] and row["verdict"] == "judged"]
        some = [row for row in some if row["score"] == 0 or row["stop"] == "end"]  # what was cut is not preferred
        apart = [abs(a["tokens"] - b["tokens"]) for a, b in combinations(some, 2) if a["score"] != b["score"]]
        assert abs(pair["chosen_tokens"] - pair["rejected_tokens"]) == min(apart)


def test_ranking_sets_the_best_against_the_worst_by_more_than_the_margin():
    given = rows()
    pairs, _ = run(Pairs(prefer=Ranked(column="log_prob", margin=30)), given)
    wide = 0
    for prompt in {row["prompt"] for row in given}:
        values = [row["log_prob"] for row in given if row["prompt"] == prompt]
        wide += max(values) - min(values) > 30
    assert len(pairs) == wide
    for pair in pairs:
        chosen, rejected = sides(given, pair)
        values = [row["log_prob"] for row in given if row["prompt"] == pair["prompt"]]
        assert (chosen["log_prob"], rejected["log_prob"]) == (max(values), min(values))


def test_re_ranking_by_token_does_not_go_by_length():
    given = rows()
    for pair in run(Pairs(prefer=Ranked(column="log_prob", per_token=True)), given)[0]:
        values = [row["log_prob"] / row["tokens"] for row in given if row["prompt"] == pair["prompt"]]
        chosen, rejected = sides(given, pair)
        assert chosen["log_prob"] / chosen["tokens"] == max(values)
        assert rejected["log_prob"] / rejected["tokens"] == min(values)


def test_one_model_is_preferred_to_the_other():
    given = rows()
    for pair in run(Pairs(prefer=OfModels(chosen="teacher", rejected="student")), given)[0]:
        assert (pair["chosen_model"], pair["rejected_model"]) == ("teacher", "student")


def test_a_pair_has_the_prompts_columns_and_those_of_both_sides():
    given = rows()
    pair = run(Pairs(), given)[0][0]
    chosen, rejected = sides(given, pair)
    assert (pair["level"], pair["prompt_id"]) == (chosen["level"], chosen["prompt_id"])
    assert (pair["chosen_sample"], pair["rejected_sample"]) == (chosen["sample"], rejected["sample"])
    assert not {"completion", "sample", "score", "verdict", "stop", "log_prob"} & pair.keys()


def test_empty_completions_and_equal_texts_are_in_no_pair_and_are_counted():
    alike = [{"prompt": "a", "completion": "5", "score": score} for score in (1.0, 0.0)]
    empty = [
        {"prompt": "b", "completion": text, "score": score} for text, score in ((" ", 0.0), ("5", 1.0), ("6", 0.0))
    ]
    lonely = [{"prompt": "c", "completion": None, "score": 0.0}]
    pairs, counts = run(Pairs(), [*alike, *empty, *lonely])
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("5", "6")]
    assert counts.kinds["empty completions"].count == 2
    assert counts.kinds["prompts without a pair"].count == 2
    with pytest.raises(ValueError, match="pairs: no prompt has a pair"):
        run(Pairs(), alike)


@pytest.mark.parametrize(
    "step", [Pairs(), Pairs(prefer=Ranked(column="log_prob", per_token=True)), Corrupt()], ids=repr
)
def test_what_columns_it_leaves_is_known_before_it_runs(step):
    given = rows() if isinstance(step, Pairs) else [{"prompt": "a", "level": 1, "completion": TEXTS[0]}]
    assert run(step, given)[0][0].keys() == set(step.leaves(list(given[0])))
    with pytest.raises(ValueError, match="no column 'completion'"):
        step.leaves(["prompt"])


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="pairs: no column 'score'"):
        run(Pairs(), [{"prompt": "a", "completion": "b"}])


# Corruptions

FORM = TagForm()
TEXTS = [
    "<think>2 + 3 is 5</think><answer>5</answer>",
    "<think>\nfirst this\n\nthen 4 < 5\n</think>\n<answer>\n x = 5 \n</answer>\n",
    "  <think></think> <answer>yes</answer>",
]


@pytest.mark.parametrize("how", Corrupt().corruptions)
@pytest.mark.parametrize("text", TEXTS)
def test_a_corruption_breaks_the_form_and_leaves_the_answer_to_be_found(how, text):
    parts = FORM.parts(text)
    assert parts is not None
    broken = FORM.broken(how, *parts)
    assert FORM.parts(broken) is None
    assert FORM.answer_in(broken) == FORM.answer_in(text) == parts[1].strip()
    for part in parts:
        assert part in broken


def test_every_corruption_is_another_text():
    parts = FORM.parts(TEXTS[0])
    assert parts is not None
    assert len({FORM.broken(how, *parts) for how in Corrupt().corruptions}) == 5


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "<answer>5</answer>",
        "<think>a</think><answer>5</answer> and more",
        "<think>a</think><answer>5</answer><answer>6</answer>",
        "<think>a<think>b</think><answer>5</answer>",
        "<answer>5</answer><think>a</think>",
    ],
)
def test_what_does_not_keep_the_form_has_no_parts(text):
    assert FORM.parts(text) is None


def test_rejected_texts_differ_in_form_alone_and_the_rest_is_counted():
    given = [{"prompt": f"p{n}", "level": n, "completion": text} for n, text in enumerate([*TEXTS, "5"])]
    several = "<think>a</think><answer>1\n2</answer>"  # two lines: without its tag, the last one alone would be found
    given.append({"prompt": "p4", "level": 4, "completion": several})
    pairs, counts = run(Corrupt(per_row=5), given)
    assert counts.kinds["completions that do not keep the form"].count == 1
    assert {kind for kind in counts.kinds if "lost" in kind} == {
        f"completions whose answer is lost when {how}" for how in ("bare_answer", "misnamed")
    }
    for pair in pairs:
        assert FORM.parts(pair["chosen"]) and FORM.parts(pair["rejected"]) is None
        assert FORM.answer_in(pair["chosen"]) == FORM.answer_in(pair["rejected"])
    assert len(pairs) == 18
    assert {"prompt", "level", "chosen", "rejected", "corruption"} == pairs[0].keys()
    assert len(run(Corrupt(), given)[0]) == 4
    assert run(Corrupt(), given)[0] == run(Corrupt(), given)[0]


def test_tags_may_have_other_names():
    form = TagForm(thought="reason", answer="final")
    text = "<reason>a</reason><final>5</final>"
    assert form.parts(text) == ("a", "5")
    assert FORM.parts(text) is None
    assert run(Corrupt(form=form), [{"prompt": "p", "completion": text}])[0][0]["chosen"] == text


def test_the_pipeline_of_specs_writes_pairs_that_training_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    pipeline = load_section(Pipeline, Path("recipes/pipelines/specs.yaml"))
    source = pipeline.sources[0].model_copy(update={"limit": 8})
    kept = pipeline_run(pipeline.model_copy(update={"sources": [source], "output": tmp_path}), lambda line: None)
    assert len(kept) == 16
    rows = open_source(Source(path=str(tmp_path / "rows.parquet")))
    written = load_section(Recipe, Path("recipes/sandbox/specs.yaml")).data.train[0].columns
    assert recognise(Source.model_validate({"path": "x", "columns": written}), rows.columns).name == "preference"


def test_the_columns_of_the_source_do_not_take_the_place_of_a_pair_and_no_score_is_not_judged():
    old = {"prompt": "p", "chosen": "old", "rejected": "older", "id": 7}
    scores = {"good": 1.0, "bad": 0.0, "lost": None}
    rows = Dataset.from_list([old | {"completion": text, "score": score} for text, score in scores.items()])
    (pair,) = Pairs(per_prompt=None)(rows)
    assert (pair["chosen"], pair["rejected"], pair["id"]) == ("good", "bad", 7)
    assert list(pair) == Pairs().leaves(rows.column_names)
