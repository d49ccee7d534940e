"""Columns are recognised, mapped or refused; a malformed row says what is wrong with it."""

import json

import pytest

from kdlm.data import Source
from kdlm.data.forms import read_chat, read_completion, read_text, read_tools, recognise
from kdlm.data.report import Unusable


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["messages"], "chat"),
        (["id", "conversations"], "chat"),
        (["completion", "prompt", "score"], "completion"),
        (["text", "meta"], "text"),
        (["text", "messages"], "chat"),
        (["prompt", "text"], "text"),
    ],
)
def test_columns_tell_the_form(columns, form):
    assert recognise(Source(path="x"), columns).name == form


def test_a_mapped_column_decides():
    mapped = recognise(Source(path="x", columns={"prompt": "q", "completion": "a"}), ["q", "a", "text"])
    assert mapped.name == "completion"
    assert mapped.columns == {"prompt": "q", "completion": "a"}
    assert recognise(Source(path="x", columns={"text": "text"}), ["messages", "text"]).name == "text"


def test_columns_that_tell_nothing_are_named():
    with pytest.raises(ValueError, match=r"'x': .*'question', 'answer'.* columns: \{prompt: question"):
        recognise(Source(path="x"), ["question", "answer"])
    with pytest.raises(ValueError, match=r"'x': `columns` maps text to 'body', but its columns are 'text'"):
        recognise(Source(path="x", columns={"text": "body"}), ["text"])


def test_sharegpt_is_chat():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    roles = [(message["role"], message["content"]) for message in read_chat({"conversations": turns})]
    assert roles == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_messages_may_be_json_text_and_lose_empty_keys():
    messages = [{"role": "user", "content": "q", "tool_calls": None}]
    assert read_chat({"messages": json.dumps(messages)}) == [{"role": "user", "content": "q"}]
    assert read_tools({"tools": '[{"name": "add"}]'}) == [{"name": "add"}]
    assert read_tools({}) is None


def test_a_text_beside_messages_is_a_message():
    prompt, completion = read_completion({"prompt": [{"role": "user", "content": "q"}], "completion": "a"})
    assert (prompt, completion) == ([{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(
    ("read", "row", "reason"),
    [
        (read_text, {"text": " \n"}, "empty: text is empty"),
        (read_text, {"text": None}, "empty: text is empty"),
        (read_text, {"text": 5}, "malformed: text is int, not text"),
        (read_chat, {"messages": []}, "empty: messages has no messages"),
        (read_chat, {"messages": "hello"}, "malformed: messages is str, not a list of messages"),
        (read_chat, {"messages": ["hello"]}, "malformed: messages\\[0\\] is str, not a message"),
        (read_chat, {"messages": [{"content": "x"}]}, "malformed: messages\\[0\\] has no role"),
        (read_chat, {"messages": [{"role": "user", "content": 3}]}, "malformed: messages\\[0\\] has content of type"),
        (read_completion, {"prompt": "q", "completion": ""}, "empty: completion is empty"),
        (read_completion, {"prompt": None, "completion": "a"}, "malformed: prompt is missing"),
        (read_completion, {"prompt": [1], "completion": "a"}, "malformed: prompt\\[0\\] is int"),
        (read_tools, {"tools": "add"}, "malformed: tools is str, not a list"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(read, row, reason):
    with pytest.raises(Unusable, match=f"^{reason}"):
        read(row)
