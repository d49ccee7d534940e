"""`generate` with a model of this process: a run that lost answers, wherever, ends as an unbroken one."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from kdlm.curation import Desk, Generate, Score
from kdlm.curation.memory import LINES
from kdlm.curation.rows import dataset_of, with_columns
from kdlm.rollouts import Sampling
from kdlm.writers import LocalSection

PROMPTS = [{"prompt": f"{n} + {n} * {'1' * n} ="} for n in range(1, 6)]


def made(folder: Path, prompts: list[Any] = PROMPTS) -> tuple[list[dict[str, Any]], Desk]:
    desk = Desk({"it": LocalSection(path="sandbox:code-teacher-tiny", batch_size=3)}, folder)
    sampling = [Sampling(temperature=heat, max_new_tokens=6, samples_per_prompt=2) for heat in (0.7, 1.0)]
    try:
        return Generate(by="it", sampling=sampling, log_probs=True).run(
            Dataset.from_list(prompts), desk
        ).to_list(), desk
    finally:
        desk.close()


@pytest.mark.parametrize("kept", [0, 1, 4, 7])
def test_batches_are_the_same_ones_whatever_of_them_is_known(tmp_path: Path, kept: int) -> None:
    whole, _ = made(tmp_path)
    assert len(whole) == 20
    for lines in tmp_path.glob(f"answers/*/{LINES}"):
        lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:kept]))
    assert made(tmp_path)[0] == whole


def test_provenance_names_the_weights_and_the_seed_of_the_batch(tmp_path: Path) -> None:
    rows, _ = made(tmp_path)
    assert len({row["revision"] for row in rows}) == 1 and len(rows[0]["revision"]) == 16
    assert len({row["seed"] for row in rows}) == 8, "two samplings of ten completions, three at once"
    assert all(len(row["log_probs"]) == row["tokens"] <= 6 for row in rows)


def test_a_prompt_that_is_too_long_is_counted_and_the_others_of_its_batch_are_drawn(tmp_path: Path) -> None:
    rows, desk = made(tmp_path, [PROMPTS[0], {"prompt": "1 + 1 " * 2000}, PROMPTS[1]])
    assert {row["prompt"] for row in rows} == {PROMPTS[0]["prompt"], PROMPTS[1]["prompt"]}
    assert desk.counts.kinds["prompt refused by the writer"].count == 4


def test_a_conversation_that_the_template_does_not_take_is_counted_and_so_is_one_with_tools(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi?"}]
    refusing = "{{ raise_exception('two users') if messages | length == 2 else messages[-1]['content'] }}"
    writer: Any = LocalSection(path="sandbox:code-teacher-tiny").open("writers.it")
    writer.tokenizer.chat_template = refusing
    rows = dataset_of(
        [
            {"prompt": json.dumps(talk), "completion": "a"},
            {"prompt": json.dumps(talk[:1]), "completion": "a"},
            {"prompt": json.dumps(talk[1:]), "completion": "a", "tools": [{"name": "search"}]},
        ]
    )
    desk = Desk({"it": LocalSection(path="sandbox:code-teacher-tiny")}, opened={"it": writer})
    made = Generate(by="it", sampling=[Sampling(max_new_tokens=2)]).run(rows, desk)
    assert made["prompt"][:] == [json.dumps(talk[:1])]
    assert desk.counts.kinds["prompt refused by the writer"].count == desk.counts.kinds["not asked, tools"].count == 1
    scored = Score(by="it", into="own").run(rows, desk)
    assert [value is None for value in scored["own_log_prob"]] == [True, False, True]


def test_a_text_that_was_written_as_a_chat_is_scored_as_one() -> None:
    desk = Desk({"it": LocalSection(path="sandbox:code-teacher-tiny")})
    wrote = Generate(by="it", chat=True, log_probs=True, sampling=[Sampling(max_new_tokens=6)])
    rows = wrote.run(Dataset.from_list(PROMPTS[:2]), desk)
    as_chat, as_text = (
        Score(by="it", into="own", chat=chat).run(rows, desk)["own_log_prob"][:] for chat in (True, False)
    )
    desk.close()
    assert as_chat != as_text
    talks = [json.dumps([{"role": "user", "content": prompt}]) for prompt in rows["prompt"]]
    told = Score(by="it", into="own").run(with_columns(rows, {"prompt": talks}), desk)["own_log_prob"][:]
    assert as_chat == pytest.approx(told, abs=1e-5)


def test_rows_keep_what_was_asked_where_that_is_said() -> None:
    desk = Desk({"it": LocalSection(path="sandbox:code-teacher-tiny")})
    given = {"by": "it", "prompt": "Add: {prompt}", "system": "Be short.", "sampling": [Sampling(max_new_tokens=4)]}
    plain, kept = (Generate(**given, keep_asked=keep).run(Dataset.from_list(PROMPTS), desk) for keep in (False, True))
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"Add: {PROMPTS[0]['prompt']}"}]
    assert plain["prompt"][0] == PROMPTS[0]["prompt"] and json.loads(kept["prompt"][0]) == talk
    assert plain.remove_columns("prompt").to_list() == kept.remove_columns("prompt").to_list()
    assert kept.column_names == Generate(**given, keep_asked=True).leaves(["prompt"])
    with pytest.raises(ValueError, match="keep_asked: the prompt stays"):
        Generate(by="it", into="again", keep_asked=True)
