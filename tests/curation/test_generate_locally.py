"""`generate` with a model of this process: a run that lost answers, wherever, ends as an unbroken one."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from kdlm.curation import Desk, Generate
from kdlm.curation.memory import LINES
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
