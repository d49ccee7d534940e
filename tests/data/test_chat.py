"""What the assistant wrote is trained on, its end-of-turn token with it, and nothing else."""

import re
from importlib.resources import files

import pytest

from kdlm.data.chat import ChatTemplate, find_turn

USER, REPLY = {"role": "user", "content": "what is two and three?"}, {"role": "assistant", "content": "five"}
AGAIN, LAST = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox\nsays é 🙂"}
TWO_TURNS = [{"role": "system", "content": "the answer"}, USER, REPLY, AGAIN, LAST]


def rows_of(data):
    return list(data.train)


def test_the_trained_tokens_are_the_assistants_turns_with_their_end(chat_tokenizer, jsonl, load, trained_text):
    (row,) = rows_of(load(jsonl([{"messages": TWO_TURNS}]), chat_tokenizer))
    assert trained_text(row) == "five<|im_end|>the fox\nsays é 🙂<|im_end|>"
    full = chat_tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert chat_tokenizer.decode(row["input_ids"]) == full
    kept = row["labels"] != -100
    assert (row["labels"][kept] == row["input_ids"][kept]).all()


def test_both_ways_to_find_the_turns_agree_with_the_library(new_tokenizer, chat_tokenizer, jsonl, load):
    (row,) = rows_of(load(jsonl([{"messages": TWO_TURNS}]), chat_tokenizer))
    marked = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}" + (
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    theirs = chat_tokenizer.apply_chat_template(
        TWO_TURNS, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(row["input_ids"]) == theirs["input_ids"]
    assert [int(label != -100) for label in row["labels"]] == theirs["assistant_masks"]


def test_loss_on_all_trains_on_every_token_but_the_first(chat_tokenizer, jsonl, load):
    (row,) = rows_of(load(jsonl([{"messages": TWO_TURNS}]), chat_tokenizer, loss_on="all"))
    assert row["labels"][0] == -100
    assert (row["labels"][1:] == row["input_ids"][1:]).all()


def test_message_lists_as_prompt_and_completion_train_on_the_completion_only(chat_tokenizer, jsonl, load, trained_text):
    (row,) = rows_of(load(jsonl([{"prompt": TWO_TURNS[:4], "completion": [LAST]}]), chat_tokenizer))
    assert trained_text(row) == LAST["content"] + "<|im_end|>"


def test_turns_that_lose_their_reasoning_are_found(forgetful_tokenizer, jsonl, load, trained_text):
    chat = [USER, {**REPLY, "thought": "add"}, AGAIN, {**LAST, "thought": "greet"}]
    (row,) = rows_of(load(jsonl([{"messages": chat}]), forgetful_tokenizer))
    assert trained_text(row) == f"five<|im_end|><think>\ngreet\n</think>\n\n{LAST['content']}<|im_end|>"


def test_reasoning_that_the_prompt_opens_and_closes_is_not_trained_on(forgetful_tokenizer, jsonl, load, trained_text):
    data = load(jsonl([{"messages": TWO_TURNS}]), forgetful_tokenizer, chat_template_args={"thinking": False})
    assert trained_text(rows_of(data)[0]) == f"five<|im_end|>{LAST['content']}<|im_end|>"


def test_without_a_generation_prompt_the_header_of_a_turn_is_not_trained_on(tokenizer, jsonl, load, trained_text):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    (row,) = rows_of(load(jsonl([{"messages": TWO_TURNS}]), tokenizer, chat_template=template))
    assert trained_text(row).replace(" ", "") == f"five<|im_end|>{LAST['content']}<|im_end|>".replace(" ", "")


def test_a_template_whose_turns_cannot_be_told_apart_is_an_error(tokenizer, jsonl, load):
    template = "{% for m in messages %}{{ m.role + loop.revindex|string + m.content + '<|im_end|>' }}{% endfor %}"
    path = jsonl([{"messages": TWO_TURNS}])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: cannot tell which tokens .* message 2: .*\{% generation %\}"):
        load(path, tokenizer, chat_template=template)
    assert len(rows_of(load(path, tokenizer, chat_template=template, loss_on="all"))) == 1


def test_a_tokenizer_without_template_is_an_error_with_its_mend(new_tokenizer, jsonl, load):
    with pytest.raises(ValueError, match=r"rows\.jsonl'.* has none: set data\.chat_template"):
        load(jsonl([{"messages": TWO_TURNS}]), new_tokenizer(template=None))


def test_a_template_may_come_from_the_recipe(new_tokenizer, tokenizer, tmp_path, jsonl, load, trained_text):
    (tmp_path / "chat.jinja").write_text(tokenizer.chat_template)
    path, bare = jsonl([{"messages": TWO_TURNS}]), new_tokenizer(template=None)
    inline = load(path, bare, chat_template=tokenizer.chat_template)
    named = load(path, bare, chat_template=str(tmp_path / "chat.jinja"))
    assert (
        trained_text(rows_of(inline)[0])
        == trained_text(rows_of(named)[0])
        == f"five<|im_end|>{LAST['content']}<|im_end|>"
    )
    with pytest.raises(ValueError, match=r"data\.chat_template: 'nowhere\.jinja' is neither"):
        load(path, bare, chat_template="nowhere.jinja")
    with pytest.raises(ValueError, match=r"not valid Jinja, line 1"):
        load(path, bare, chat_template="{% for m in messages %}")


def test_a_conversation_that_the_template_refuses_is_counted(tokenizer, jsonl, load):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    rows = [{"messages": TWO_TURNS}, {"messages": TWO_TURNS[1:]}, {"messages": [REPLY]}]
    (report,) = load(jsonl(rows), tokenizer, chat_template=template + tokenizer.chat_template).report.train
    assert report.unused["refused by the chat template"].examples[0].endswith("rows.jsonl:1: no system turns")
    assert (
        report.unused["malformed"].examples[0].endswith("rows.jsonl:3: the conversation begins with an assistant turn")
    )
    assert (report.rows, report.kept) == (3, 1)


def test_tools_reach_the_template(tokenizer, jsonl, load):
    template = "{{ tools[0].name if tools else 'none' }}|" + tokenizer.chat_template
    rows = [{"messages": TWO_TURNS, "tools": [{"name": "add"}]}, {"messages": TWO_TURNS}]
    texts = [tokenizer.decode(row["input_ids"]) for row in load(jsonl(rows), tokenizer, chat_template=template).train]
    assert [text.split("|")[0] for text in texts] == ["add", "none"]


def test_a_turn_is_never_guessed():
    full = "U:hi A:B-yes. U:ok A:no."
    assert find_turn(full, "U:hi A:", "U:hi A:B-yes. ", "B-yes.") == (7, 14)
    assert find_turn(full, "U:hi A:", "U:hi A:<t>B-yes. ", "B-yes.") == (7, 14)
    assert find_turn(full, "U:hi A:", "U:hi A:B-maybe. ", "B-maybe.") is None
    assert find_turn(full, "X:hi A:", "X:hi A:B-yes. ", "B-yes.") is None
    assert find_turn(full, "U:hi A:", "U:hi C:B-yes. ", "B-yes.") is None


FAMILIES = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_8": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "gemma3": "<end_of_turn>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "nemotron_3_nano": "<|im_end|>",
    "deepseek_r1_distill": "<\uff5cend\u2581of\u2581sentence\uff5c>",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_public_templates_are_within_those_that_trl_marks_by_hand(tokenizer, family):
    end, turns = FAMILIES[family], [USER, REPLY, AGAIN, LAST]
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.add_tokens(re.findall(r"<.*?>", end), special_tokens=True)
    folder = files("trl") / "chat_templates"
    stock, by_hand = ((folder / f"{family}{kind}.jinja").read_text(encoding="utf-8") for kind in ("", "_training"))
    full, spans = ChatTemplate(tokenizer, stock, {}).render(turns, None)
    for (start, stop), message in zip(spans, (REPLY, LAST), strict=True):
        before, said, after = full[start:stop].partition(message["content"])
        assert said and after.startswith(end) and not after.removeprefix(end).replace(tokenizer.eos_token, "").strip()
        assert not before.strip() or before.rstrip().endswith("</think>")
    theirs_full, theirs = ChatTemplate(tokenizer, by_hand, {}).render(turns, None)
    marked = "".join(theirs_full[start:stop] for start, stop in theirs)
    assert all(full[start:stop] in marked for start, stop in spans)
