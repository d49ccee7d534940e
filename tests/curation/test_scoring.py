"""Scoring a completion gives what the model itself says of its tokens, wherever prompts end and batches break."""

import json

import pytest
import torch
from datasets import Dataset
from fastapi import FastAPI, Request
from scripted import running

from kdlm.curation import Desk
from kdlm.curation.score import Score
from kdlm.writers import LocalSection, OpenAISection, Refused, Scored, Text
from kdlm.writers.local import LocalWriter
from kdlm.writers.openai import CONTINUED

TEACHER = LocalSection(path="sandbox:code-teacher-tiny", batch_tokens=64)
PAIRS = [
    ("def add(a, b):\n", "    return a + b\n"),
    ("x = ", "1"),
    ("import o", "s.path as path\n"),
    ("a", ""),
    ("", "b"),
]


@pytest.fixture(scope="module")
def teacher() -> LocalWriter:
    return TEACHER.open("writers.teacher")


def whole(writer: LocalWriter, ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each token but the first."""
    with torch.no_grad():
        logits = writer.network(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_scores_are_the_models_own_on_the_tokens_after_the_prompt(teacher):
    tokenizer = teacher.tokenizer
    for place, scored in teacher.score(PAIRS[:3]):
        prompt, completion = PAIRS[place]
        first = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + completion)["input_ids"]
        if ids[: len(first)] != first:
            ids = [*first, *tokenizer(completion)["input_ids"]]
        assert scored.log_probs == pytest.approx(whole(teacher, ids)[len(first) - 1 :].tolist(), abs=1e-5)
        assert [completion[a:b] for a, b in zip(scored.offsets, [*scored.offsets[1:], None], strict=True)] == [
            tokenizer.decode([token]) for token in ids[len(first) :]
        ]


def test_a_pair_scores_alike_in_any_batch(teacher):
    together = dict(teacher.score(PAIRS))
    for place, pair in enumerate(PAIRS):
        alone = dict(teacher.score([pair]))[0]
        if isinstance(alone, Scored):
            assert together[place].log_probs == pytest.approx(alone.log_probs, abs=1e-5)
    assert together[3] == Scored([], [])
    assert isinstance(together[4], Refused) or teacher.leading


def test_what_is_longer_than_the_context_is_refused_and_the_rest_scored(teacher):
    answers = dict(teacher.score([("x = ", "1 + " * 5000), ("x = ", "1")]))
    assert isinstance(answers[0], Refused)
    assert isinstance(answers[1], Scored)


def test_the_step_remembers_what_was_scored_before_a_kill(tmp_path, teacher, monkeypatch):
    rows = Dataset.from_list([{"prompt": "x = ", "completion": f"{n} + {n}\n"} for n in range(6)])
    step, asked, own = Score(by="it", into="teacher", log_probs=True), [], LocalWriter.score

    def dies(self, pairs):
        asked.append(len(pairs))
        for number, answer in enumerate(own(self, pairs)):
            if number == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(LocalWriter, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        step.run(rows, Desk({"it": TEACHER}, tmp_path, opened={"it": teacher}))
    scored = step.run(rows, Desk({"it": TEACHER}, tmp_path, opened={"it": teacher}))
    assert asked == [6, 4]
    assert [sum(row["teacher_log_probs"]) for row in scored] == scored["teacher_log_prob"]
    assert [len(row["teacher_offsets"]) for row in scored] == scored["teacher_tokens"]
    again = step.run(rows, Desk({"it": TEACHER}, None, opened={"it": teacher}))
    assert again["teacher_log_prob"] == pytest.approx(scored["teacher_log_prob"], abs=1e-4)


def echo_server(writer: LocalWriter, asked: list) -> FastAPI:
    """A server that echoes prompts with log-probabilities, and says of a chat what it was asked."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request):
        said = await request.json()
        ids = writer.tokenizer(said["prompt"])["input_ids"]
        values = [None, *whole(writer, ids).tolist(), -1.0]
        tokens = [writer.tokenizer.decode([token]) for token in [*ids, ids[0]]]
        choice = {"text": "", "logprobs": {"tokens": tokens, "token_logprobs": values}}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        asked.append(await request.json())
        choice = {"index": 0, "message": {"content": " two"}, "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}

    return app


def test_a_server_that_echoes_scores_as_the_model_does_and_refuses_what_it_cannot_place(teacher):
    pairs = [("import", " os\n"), ("x =", " 1\n"), ("impo", "rt os\n"), ("x = '", "é'\n")]
    own = dict(teacher.score(pairs))
    with running(echo_server(teacher, [])) as url:
        writer = OpenAISection(url=url, model="tiny").open("writers.it")
        served = dict(writer.score([*pairs, ([{"role": "user", "content": "x"}], "y")]))
        writer.close()
    for place in (0, 1):
        assert served[place].log_probs == pytest.approx(own[place].log_probs, abs=1e-5)
        assert served[place].offsets == own[place].offsets
    for place, reason in {2: "over the border", 3: "do not spell", 4: "conversation"}.items():
        assert isinstance(served[place], Refused) and reason in served[place].reason


def test_a_server_is_asked_to_go_on_with_the_assistants_message_only_where_there_is_one(teacher):
    from kdlm.curation import Generate
    from kdlm.rollouts import Sampling

    asked: list = []
    rows = Dataset.from_list(
        [{"prompt": json.dumps([{"role": "user", "content": "count"}]), "prefix": text} for text in ("one", "")]
    )
    with running(echo_server(teacher, asked)) as url:
        desk = Desk({"it": OpenAISection(url=url, model="tiny", concurrency=1)})
        made = Generate(by="it", sampling=[Sampling()], prefix="prefix").run(rows, desk)
        desk.close()
    assert made["completion"] == ["one two", " two"]
    assert [one["messages"][-1]["role"] for one in asked] == ["assistant", "user"]
    assert [CONTINUED.items() <= one.items() for one in asked] == [True, False]
    assert len(set(made["prompt_id"])) == 1


def test_a_text_is_gone_on_with_where_the_prefix_ends(teacher):
    from kdlm.curation import Generate
    from kdlm.rollouts import Sampling
    from kdlm.writers import Answered

    rows = Dataset.from_list([{"prompt": "x", "prefix": " = 1"}, {"prompt": "x = 1", "prefix": ""}])
    step = Generate(by="it", sampling=[Sampling(temperature=0, max_new_tokens=4)], prefix="prefix")
    asked = [step._prompts(row)[1] for row in rows]
    assert asked == ["x = 1", "x = 1"]
    made = step.run(rows.select([0]), Desk({"it": TEACHER}, opened={"it": teacher}))
    plain = step.run(rows.select([1]), Desk({"it": TEACHER}, opened={"it": teacher}))
    assert made["completion"][0] == " = 1" + plain["completion"][0]
    assert isinstance(Answered([Text("", "end", 0)], 1), Answered)


def test_a_conversation_is_gone_on_with_inside_the_assistants_last_message(teacher, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    end = "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(teacher.tokenizer, "chat_template", template + end)
    asked = [{"role": "user", "content": "count"}]
    begun = [*asked, {"role": "assistant", "content": "one"}]
    scores = dict(teacher.score([(begun, " two"), ("<user>count<assistant>one", " two"), (asked, "one two")]))
    assert scores[0].log_probs == pytest.approx(scores[1].log_probs, abs=1e-5)
    count = len(scores[0].log_probs)
    assert scores[2].log_probs[-count:] == pytest.approx(scores[0].log_probs, abs=1e-5)
