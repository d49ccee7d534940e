"""DeepSpeed ZeRO-1, 2 and 3 on gloo ranks: the same run as one process's, really shared out, saved and resumed."""

import json
from pathlib import Path

import pytest
from forks import on_ranks
from zero_cases import METHODS, STAGES, curve, made

pytest.importorskip("deepspeed")
SCRIPT = Path(__file__).with_name("ranks_zero.py")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    on_ranks(2, SCRIPT, folder, "curves", "2", *METHODS)
    return folder


@pytest.mark.parametrize("case", METHODS)
def test_every_zero_stage_gives_the_loss_curve_of_one_process(tmp_path: Path, by_two: Path, case: str) -> None:
    alone = made(tmp_path, case, 1)
    alone.train()
    for stage in STAGES:
        if (found := by_two / f"{stage}-{case}.json").exists():
            assert json.loads(found.read_text()) == pytest.approx(curve(alone), rel=1e-5), stage
