"""The tools: every solution succeeds, what is wrong fails, and each mistake is told in words."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlm.rollouts.environments import ToolsSection
from kdlm.sandbox import SandboxData, build
from kdlm.sandbox.tasks import LEVELS
from kdlm.sandbox.tool_tasks import conversation, demonstration, tool_tasks, world_of
from kdlm.sandbox.tools import LARGEST, World, value_of

TASKS = [task for level in LEVELS for task in tool_tasks(seed=3, level=level, n=40)]


def play(task, calls):
    """Return what the environment makes of some calls."""
    environment = ToolsSection().start({"reference": task.reference()}, None)
    replies = []
    for call in calls:
        replies.append(environment.step(call))
        if replies[-1].done:
            break
    return replies


def test_every_scripted_solution_succeeds_with_its_last_call_alone():
    for task in TASKS:
        replies = play(task, task.calls)
        assert [reply.done for reply in replies] == [False] * (len(task.calls) - 1) + [True]
        assert [reply.reward for reply in replies] == [0.0] * (len(task.calls) - 1) + [1.0]
        assert len(task.calls) <= ToolsSection().turns and not any("error" in reply.text for reply in replies)


def test_a_solution_with_another_answer_or_store_fails():
    for task in TASKS:
        *before, _ = task.calls
        assert play(task, [*before, f"answer: {int(task.answer) + 1}"])[-1].reward == 0
        if task.goal:
            unstored = [call for call in task.calls if not call.startswith("set")]
            reply = play(task, unstored)[-1]
            assert reply.done and reply.reward == 0 and "is not stored as asked" in reply.text


def test_levels_need_several_calls_and_a_prompt_does_not_say_what_is_stored():
    counts = {level: {len(task.calls) for task in TASKS if task.level == level} for level in LEVELS}
    assert counts == {1: {2}, 2: {3}, 3: {3}, 4: {5}, 5: {5}}
    for task in TASKS:
        if task.level == 4:
            assert not any(character.isdigit() for character in task.prompt)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("", "error: nothing was called"),
        ("open door", "error: unknown command; use calc: EXPRESSION, set KEY NUMBER"),
        ("calc 1 + 2", "error: "),
        ("calc: 1\nset a 2", "error: one call a turn"),
        ("get b", "error: no b in the store, it holds a"),
        ("get B", "error: expected a key of small letters"),
        ("set b x", "error: expected a whole number"),
        ("set b", "error: expected a whole number"),
        ("answer: many", "error: expected a whole number"),
        ("calc: ", "error: the expression lacks a number"),
        ("calc: 1 +", "error: the expression lacks a number"),
        ("calc: (1 + 2", "error: the expression has a parenthesis that does not close"),
        ("calc: 1 2", "error: the expression has a 2 too many"),
        ("calc: 1 / 2", "error: the expression has something else than whole numbers"),
        ("calc: a + 2", "error: the expression has something else than whole numbers"),
        ("calc: __import__('os')", "error: the expression has something else than whole numbers"),
        ("calc: 999999999999 * 999", "error: the number is too large"),
        ("calc: " + "1+" * 60 + "1", "error: the expression is longer than"),
    ],
)
def test_each_mistake_has_its_words_and_the_world_goes_on(call, said):
    world = World(7, store={"a": 1})
    reply = world.call(call)
    assert reply.text.startswith(said) and not reply.done and not reply.right
    assert world.store == {"a": 1} and world.call("answer: 7").right


numbers = st.integers(0, 99).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", " + ", " * "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=8,
)


@given(expressions)
@settings(deadline=None)
def test_an_expression_has_the_value_that_python_gives_it(expression):
    try:
        assert value_of(expression) == eval(expression)
    except ValueError as error:
        assert "large" in str(error) or "longer" in str(error)


@given(
    st.one_of(st.text(), st.text(alphabet="0123456789+-*() ").map("calc: {}".format), st.text().map("set {}".format))
)
@settings(deadline=None, max_examples=300)
def test_no_text_breaks_the_world(text):
    world = World(7)
    reply = world.call(text)
    assert reply.text and len(reply.text) < 200
    assert all(abs(value) <= LARGEST for value in world.store.values())


def test_the_same_seed_gives_the_same_tasks_and_train_and_eval_do_not_meet():
    for level in LEVELS:
        train, again = (tool_tasks(seed=0, level=level, n=60) for _ in range(2))
        other = tool_tasks(seed=0, level=level, n=20, split="eval")
        assert train == again and not {task.prompt for task in train} & {task.prompt for task in other}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"answer": "x", "goal": {}, "store": {}}', '{"answer": 1}'])
def test_a_row_that_describes_no_task_is_refused(text):
    with pytest.raises(ValueError, match="expected JSON with answer, goal and store"):
        world_of(text)


def test_a_row_without_a_task_names_the_key():
    with pytest.raises(ValueError, match=r"rollouts\.environment: a row has no task: map its column 'task'"):
        ToolsSection().start({"input_ids": [1]}, None)


def test_demonstrations_are_the_tokens_that_rollouts_have():
    from loopback import source

    from kdlm.data.turns import Between

    tokenizer = source("code-student-tiny").tokenizer()
    between = Between(tokenizer, {tokenizer.eos_token_id}, "tool")
    task = TASKS[-1]
    ids = tokenizer(task.prompt)["input_ids"]
    prompt = list(ids)
    for turn, (call, reply) in zip(demonstration(task), task.talk(), strict=True):
        assert tokenizer(turn["prompt"])["input_ids"] == ids and turn["completion"] == call
        ids += [*tokenizer(call)["input_ids"], tokenizer.eos_token_id, *between(prompt, reply)]


def test_a_conversation_ends_with_the_answer():
    for task in TASKS[::20]:
        roles = [message["role"] for message in conversation(task)]
        assert roles == ["user", *["assistant", "tool"] * (len(task.calls) - 1), "assistant"]


def test_the_data_set_has_its_four_files():
    folder = build("tools", progress=None)
    files = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in ("train", "eval")}
    assert {name: len(lines) for name, lines in files.items()} == {"train": 2000, "eval": 250}
    row = json.loads(files["train"][0])
    assert world_of(row["task"]).answer is not None and row["prompt"].endswith("?\n")
    for name in ("demonstrations", "conversations"):
        assert SandboxData(data="tools", file=name).resolve().is_file()
    with pytest.raises(ValueError, match="has the files train and eval, not demonstrations"):
        SandboxData(data="strings", file="demonstrations")
