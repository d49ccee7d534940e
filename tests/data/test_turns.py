"""Between two turns: the tokens that a whole conversation, rendered at once, has there."""

import copy
from typing import Any

import chat_templates
import pytest
from loopback import source

from kdlm.data.turns import Between
from kdlm.sandbox import build

LLAMA = (
    "{{ '<|im_start|>' }}{% for m in messages %}"
    "{{ '[' + m.role + ']\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
NO_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen3 with a user's message: earlier turns lose what they thought, and no generation prompt shows it
SILENT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ (m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content) }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ["12", "  spaced ", "two\nlines", "naïve 🙂", "", "{{ braces }}"]


def tokenizer(template: str | None = None, name: str = "code-tokenizer-tiny") -> Any:
    from transformers import AutoTokenizer

    found = copy.deepcopy(source().tokenizer()) if name == "code-tokenizer-tiny" else None
    found = found or AutoTokenizer.from_pretrained(build(name, progress=None))
    if template is not None:
        found.chat_template = template
    return found


def ends(found: Any) -> set[int]:
    known = found.added_tokens_encoder
    return {known[token] for token in ("<|im_end|>", "</s>") if token in known}


def rendered(found: Any, messages: list[dict[str, str]]) -> list[int]:
    text = found.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return found(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "code-tokenizer-tiny"),
        (chat_templates.CHATML, "code-tokenizer-tiny"),
        (chat_templates.MARKED, "code-tokenizer-tiny"),
        (LLAMA, "code-tokenizer-tiny"),
        (NO_TOOLS, "code-tokenizer-tiny"),
        (None, "code-tokenizer-bytes"),
        (None, "code-tokenizer-unigram-tiny"),
    ],
)
@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_conversation_that_is_continued_is_the_one_rendered_at_once(template, name, role, words) -> None:
    found = tokenizer(template, name)
    between = Between(found, ends(found), role)
    says = "user" if template == NO_TOOLS else role
    talk: list[dict[str, str]] = [{"role": "user", "content": "def f(x):"}]
    prompt = rendered(found, talk)
    ids = list(prompt)
    for turn in ("return x", "return 12"):
        drawn = found(turn, add_special_tokens=False)["input_ids"]
        end = next(token for token in ends(found) if found.decode([token]) in found.chat_template)
        ids += [*drawn, end, *between(prompt, words)]
        talk += [{"role": "assistant", "content": turn}, {"role": says, "content": words}]
    if template != LLAMA or words == words.strip():
        assert found.decode(ids) == found.decode(rendered(found, talk))
    if template != LLAMA:  # it has no special token before a turn, and turns are tokenised apart from what precedes
        assert ids == rendered(found, talk)


@pytest.mark.parametrize(("template", "variables"), [(chat_templates.FORGETFUL, {"thinking": False}), (SILENT, {})])
def test_a_template_that_rewrites_earlier_turns_is_refused(template: str, variables: Any) -> None:
    found = tokenizer(template)
    between = Between(found, ends(found), variables=variables)
    with pytest.raises(ValueError, match=r"rollouts\.environment: the chat template writes an earlier turn otherwise"):
        between(between.opening, "12")


def test_a_student_that_does_not_end_where_the_templates_turns_do_is_refused() -> None:
    found = tokenizer()
    between = Between(found, {found.eos_token_id})
    with pytest.raises(ValueError, match=r"ends a turn with '<\|im_end\|>'.*eos_token_id"):
        between(rendered(found, [{"role": "user", "content": "So"}]), "12")


@pytest.mark.parametrize("template", [None, chat_templates.FORGETFUL, ""])
def test_plain_text_goes_on_after_a_line_break_whatever_the_template(template: str | None) -> None:
    found = tokenizer(template)
    between = Between(found, {found.eos_token_id})
    prompt = found("def f(x):\n")["input_ids"]
    assert found.decode(between(prompt, "12")) == "\n12\n"


def test_words_cannot_spell_a_special_token() -> None:
    found = tokenizer()
    for prompt in (found("x")["input_ids"], rendered(found, [{"role": "user", "content": "x"}])):
        between = Between(found, ends(found))
        assert between(prompt, "a<|im_end|>b<eos>") == between(prompt, "ab")
