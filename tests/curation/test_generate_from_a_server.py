"""`generate` with a server: what is asked, what is kept of it, and what becomes of answers that are none."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset
from openai_server import Server, body, completion, openai_server, refusal

from kdlm.curation import Desk, Generate
from kdlm.curation.generate import OWN
from kdlm.remote import ServerUnavailable
from kdlm.rollouts import Sampling
from kdlm.writers import OpenAISection


@pytest.fixture
def server() -> Iterator[Server]:
    with openai_server() as server:
        yield server


def desk(server: Server, folder: Any = None, **options: Any) -> Desk:
    given = {"url": server.url, "model": "tiny", "patience": 2.0, "concurrency": 2, **options}
    return Desk({"it": OpenAISection(**given)}, folder)


def prompts(count: int = 5) -> Dataset:
    return Dataset.from_list([{"prompt": f"question {n}", "answer": str(n)} for n in range(count)])


def made(server: Server, rows: Dataset, folder: Any = None, desk_: Desk | None = None, **step: Any) -> list[Any]:
    given = {"by": "it", "sampling": {"samples_per_prompt": 3}, **step}
    at = desk_ or desk(server, folder)
    try:
        return Generate.model_validate(given).run(rows, at).to_list()
    finally:
        at.close()


def test_every_row_has_the_seed_that_its_own_request_had(server: Server) -> None:
    rows = made(server, prompts())
    assert len(rows) == 15 == len(server.asked)
    texts = {(data["prompt"], data["seed"]): completion(data)["choices"][0]["text"] for data in server.asked}
    assert all(data["n"] == 1 for data in server.asked)
    assert {(row["prompt"], row["seed"]): row["completion"] for row in rows} == texts
    assert [row["sample"] for row in rows] == [0, 1, 2] * 5
    assert all(row["tokens"] == 4 and row["model"] == "tiny" and row["stop"] == "end" for row in rows)


def test_columns_have_types_where_nothing_is_known(server: Server) -> None:
    at = desk(server)
    table = Generate(by="it").run(prompts(1), at).with_format("arrow")[:]
    at.close()
    assert {field.name: field.type for field in table.schema if field.name in OWN.names} == {
        field.name: field.type for field in OWN
    }


def test_a_sweep_asks_each_temperature_by_seeds_of_its_own(server: Server) -> None:
    sweep = [{"temperature": heat, "samples_per_prompt": 2} for heat in (0.6, 1.2)]
    rows = made(server, prompts(2), sampling=sweep)
    assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 2
    assert [json.loads(row["sampling"])["temperature"] for row in rows] == [0.6, 0.6, 1.2, 1.2] * 2
    assert len({row["seed"] for row in rows}) == 8


def test_more_samples_ask_for_the_others_alone_and_are_as_if_asked_at_once(server: Server, tmp_path: Any) -> None:
    first = made(server, prompts(), tmp_path)
    more = made(server, prompts(), tmp_path, sampling={"samples_per_prompt": 6})
    assert len(server.asked) == 30
    assert [row for row in more if row["sample"] < 3] == first
    assert more == made(server, prompts(), tmp_path / "other", sampling={"samples_per_prompt": 6})


def test_rows_added_later_ask_for_what_is_not_there(server: Server, tmp_path: Any) -> None:
    made(server, prompts(3), tmp_path)
    made(server, prompts(5), tmp_path)
    assert len(server.asked) == 15


def test_a_server_that_gives_fewer_choices_is_asked_for_the_rest(server: Server, tmp_path: Any) -> None:
    server.every = lambda data: completion({**data, "n": min(2, data["n"])})
    rows = made(server, prompts(2), desk_=desk(server, tmp_path, choices=3))
    assert [data["n"] for data in server.asked] == [3, 3, 1, 1]
    assert len(rows) == 6
    assert [row["tokens"] for row in rows if row["sample"] == 2] == [4, 4], "an answer of one choice says its tokens"
    assert {row["tokens"] for row in rows if row["sample"] < 2} == {None}, "a sum of two says nothing of each"


def test_log_probabilities_count_the_tokens_of_each_choice(server: Server) -> None:
    rows = made(server, prompts(2), desk_=desk(server, choices=3), log_probs=True)
    assert all(row["tokens"] == len(row["log_probs"]) == len(row["completion"].split()) for row in rows)
    assert all(row["log_prob"] == pytest.approx(sum(row["log_probs"]), abs=1e-4) for row in rows)


def test_text_is_asked_as_a_conversation_where_that_is_said(server: Server) -> None:
    made(server, prompts(1), system="Be brief.", prompt="Q: {prompt} ({answer}) \\frac{1}{2}", sampling={})
    made(server, prompts(1), chat=True, sampling={})
    asked = [data["messages"] for data in server.asked]
    said = {"role": "user", "content": "Q: question 0 (0) \\frac{1}{2}"}
    assert asked[0] == [{"role": "system", "content": "Be brief."}, said]
    assert asked[1] == [{"role": "user", "content": "question 0"}]


def test_a_thought_that_comes_apart_stands_before_the_answer(server: Server) -> None:
    def thinks(key: str, content: str | None, stop: str) -> Any:
        message = {"role": "assistant", "content": content, key: "hm\n"}
        return lambda data: completion(data, True, message=message, finish_reason=stop)

    server.script = [
        thinks("reasoning_content", "\n\n4", "stop"),
        thinks("reasoning", "5", "length"),
        thinks("reasoning", None, "length"),
    ]
    rows = made(server, prompts(3), desk_=desk(server, concurrency=1), chat=True, sampling={})
    assert [row["completion"] for row in rows] == [
        "<think>\nhm\n</think>\n\n4",
        "<think>\nhm\n</think>\n\n5",
        "<think>\nhm\n",
    ]


def test_keys_may_be_added_to_a_request_and_taken_out(server: Server) -> None:
    at = desk(server, extra={"min_p": 0.1, "max_tokens": None, "max_completion_tokens": 9})
    made(server, prompts(1), desk_=at, sampling={})
    assert "max_tokens" not in server.asked[0]
    assert (server.asked[0]["min_p"], server.asked[0]["max_completion_tokens"]) == (0.1, 9)


def test_what_has_no_text_is_named_and_counted_and_the_others_are_kept(server: Server) -> None:
    def ends(reason: str | None, content: str | None) -> Any:
        message = {"role": "assistant", "content": content}
        return lambda data: completion(data, True, message=message, finish_reason=reason)

    server.script = [
        ends("content_filter", None),
        ends("tool_calls", None),
        refusal(400, "maximum context length is 16 tokens"),
        ends("stop", None),
        ends("abort", "broken o"),
        refusal(429, **{"Retry-After": "0"}),
    ]
    at = desk(server, concurrency=1)
    rows = made(server, prompts(7), desk_=at, chat=True, sampling={})
    kinds = {kind: found.count for kind, found in at.counts.kinds.items()}
    assert kinds == {
        "completion held back by the server's content filter": 1,
        "tool call instead of a text": 1,
        "prompt refused by the writer": 1,
        "empty completion": 1,
    }
    assert "maximum context length" in at.counts.kinds["prompt refused by the writer"].examples[0]
    assert [row["answer"] for row in rows] == ["3", "4", "5", "6"]
    assert rows[0]["completion"] == ""
    assert rows[1]["completion"] != "broken o", "it was asked for again"


def test_an_answer_without_choices_is_asked_for_again_and_then_counted(server: Server) -> None:
    server.every = lambda data: {"choices": []} if data["prompt"].endswith("1") else None
    at = desk(server)
    rows = made(server, prompts(3), desk_=at, sampling={})
    assert [row["answer"] for row in rows] == ["0", "2"]
    assert at.counts.kinds["no completion in the answer"].count == 1
    assert 2 <= len([data for data in server.asked if data["prompt"].endswith("1")]) <= 3


def test_an_answer_that_is_none_ends_the_run_and_loses_nothing(server: Server, tmp_path: Any) -> None:
    server.script = [lambda data: None, body(b'{"choices": [{"index": 0}]}')]
    with pytest.raises(ServerUnavailable, match="not an answer as expected"):
        made(server, prompts(), desk_=desk(server, tmp_path, concurrency=1))
    asked = len(server.asked)
    made(server, prompts(), tmp_path)
    assert len(server.asked) == 15 + 1
    assert asked <= 4


def test_a_server_that_fails_mid_way_loses_nothing(server: Server, tmp_path: Any) -> None:
    calls = iter(range(1000))
    server.every = lambda data: refusal(503)(data) if next(calls) >= 7 else None
    with pytest.raises(ServerUnavailable, match=r"no answer within 1 s"):
        made(server, prompts(), desk_=desk(server, tmp_path, patience=1.0))
    (lines,) = tmp_path.glob("answers/*/lines.jsonl")
    kept = lines.read_bytes().count(b"\n")
    assert 0 < kept <= 7
    server.every = lambda data: None
    server.asked.clear()
    rows = made(server, prompts(), tmp_path)
    assert len(rows) == 15
    assert len(server.asked) == 15 - kept


def test_a_server_that_comes_back_in_time_is_waited_for(server: Server) -> None:
    server.script = [refusal(503)] * 3
    assert len(made(server, prompts())) == 15


def test_no_more_is_under_way_than_was_said_and_prompts_are_taken_as_there_is_room(server: Server) -> None:
    server.seconds = 0.01
    made(server, prompts(20), desk_=desk(server, concurrency=3), sampling={})
    assert server.most_under_way == 3


def test_requests_are_spaced(server: Server) -> None:
    began = time.monotonic()
    made(server, prompts(6), desk_=desk(server, requests_per_minute=1200, concurrency=4), sampling={})
    assert time.monotonic() - began >= 5 * 60 / 1200


def test_tokens_are_spaced_by_what_answers_took(server: Server) -> None:
    # 7 tokens an answer, 70 a second
    began = time.monotonic()
    at = desk(server, tokens_per_minute=4200, concurrency=1)
    made(server, prompts(5), desk_=at, sampling={"max_new_tokens": 7})
    assert time.monotonic() - began >= 4 * 7 / 70


def test_a_budget_ends_the_run_before_it_is_exceeded_and_a_higher_one_goes_on(server: Server, tmp_path: Any) -> None:
    # a request costs 3 + 2 * 4 = 11
    given = {"prices": {"prompt": 1e6, "completion": 2e6}, "concurrency": 1}
    with pytest.raises(ValueError, match=r"budget: 33 of 40 is spent, and 12 completions of it are missing: raise it"):
        made(server, prompts(), desk_=desk(server, tmp_path, **given), budget=40)
    assert len(server.asked) == 3
    at = desk(server, tmp_path, **given)
    assert len(made(server, prompts(), desk_=at, budget=1000)) == 15
    assert len(server.asked) == 15
    assert at.counts.figures["cost"] == 165


def test_a_budget_needs_prices(server: Server) -> None:
    with pytest.raises(ValueError, match=r"generate\.budget: writers\.it has no `prices`"):
        made(server, prompts(), budget=1)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sampling": [{}, {"samples_per_prompt": 2}]}, "as an entry before it"),
        ({"sampling": {"temperature": 0, "samples_per_prompt": 2}}, "all alike"),
        ({"sampling": {"teacher_share": 0.1}}, "teacher_share"),
        ({"into": "rationale", "sampling": {"samples_per_prompt": 2}}, "one text for each row"),
    ],
)
def test_what_means_nothing_is_refused(said: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generate.model_validate({"by": "it", **said})


def test_a_template_names_the_key_and_the_column_that_is_missing(server: Server) -> None:
    with pytest.raises(ValueError, match=r"generate\.prompt: \{question\} is no column.*prompt, answer"):
        made(server, prompts(), prompt="{question}")
    assert not server.asked


def test_a_row_whose_column_is_null_is_named_and_not_asked(server: Server) -> None:
    rows = Dataset.from_list([{"prompt": "a", "hint": "x"}, {"prompt": "b", "hint": None}, {"prompt": "", "hint": "y"}])
    at = desk(server)
    assert len(made(server, rows, desk_=at, prompt="{prompt} {hint}", sampling={})) == 1
    assert at.counts.kinds["not asked, no hint"].examples == [
        "row 1: its column 'hint' is null, and the prompt has {hint}"
    ]
    assert at.counts.kinds["not asked, no prompt"].count == 1


def test_the_same_prompt_is_asked_once(server: Server) -> None:
    rows = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])
    at = desk(server)
    assert len(made(server, rows, desk_=at)) == 6
    assert at.counts.kinds["the same prompt again"].count == 1
    assert len(made(server, rows, into="said", sampling={})) == 3


def test_a_text_beside_says_who_wrote_it(server: Server) -> None:
    rows = made(server, prompts(2), into="said", sampling={})
    by = json.loads(rows[0]["said_by"])
    assert by["writer"]["model"] == "tiny"
    assert by["seed"] in {data["seed"] for data in server.asked}
    assert "completion" not in rows[0]


def test_sampling_says_what_is_drawn(server: Server) -> None:
    made(server, prompts(1), sampling=Sampling(temperature=0.5, top_p=0.9, top_k=5, max_new_tokens=7).model_dump())
    said = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_tokens": 7}
    assert said.items() <= server.asked[0].items()


def test_no_rows_give_no_rows_of_the_same_columns(server: Server) -> None:
    at = desk(server)
    none = Generate(by="it").run(prompts(2).select([]), at)
    assert (len(none), none.column_names) == (0, ["prompt", "answer", *OWN.names])
    assert not server.asked
    at.close()
