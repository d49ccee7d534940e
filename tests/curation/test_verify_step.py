"""The step `verify`: verdicts are kept as they come, what failed is counted, and a pass rate says how sure it is."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from kdlm.curation import Desk, Verify
from kdlm.curation.verify import OWN, summary
from kdlm.rollouts import PassRate
from kdlm.verifiers import CustomVerifier, Exact

ASKED: list[str] = []


def counted(completion: str, reference: Any, row: Any) -> float:
    ASKED.append(completion)
    if completion == "stop":
        raise KeyboardInterrupt
    return float(completion == reference)


class Counting(Exact):
    """A verifier in this process that notes what it was asked."""

    def verifier(self) -> Any:
        return counted


@pytest.fixture(autouse=True)
def fresh() -> None:
    ASKED.clear()


def attempts(*texts: str, stop: str = "end", prompt: str = "p") -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": text, "answer": "yes", "stop": stop} for text in texts]


def test_a_rate_says_how_sure_it_is() -> None:
    rows = Dataset.from_list([*attempts("yes", "no", "yes", "yes"), *attempts("no", "no", prompt="q")])
    desk = Desk()
    made = Verify(verifier=Exact()).run(rows, desk)
    assert made["solved"] == [3] * 4 + [0] * 2
    assert made["attempts"] == [4] * 4 + [2] * 2
    low, high = PassRate(3, 4).interval()
    assert made[0]["solved_low"] == pytest.approx(low) and made[0]["solved_high"] == pytest.approx(high)
    assert made[4]["solved_high"] == pytest.approx(1 - 0.05 ** (1 / 2))
    table = made.with_format("arrow")[:]
    assert {field.name: field.type for field in OWN} == {name: table.schema.field(name).type for name in OWN.names}
    assert desk.counts.figures["pass rate"] == "0.375 ± 0.375 (standard error over prompts)"
    assert desk.counts.figures["solved"] == "3 of 6 completions"


def test_completions_that_were_cut_are_attempts_or_none() -> None:
    rows = Dataset.from_list(
        [*attempts("yes"), *attempts("no", stop="length"), *attempts("no", stop="length", prompt="q")]
    )
    assert Verify(verifier=Exact())(rows)["attempts"] == [2, 2, 1]
    left_out = Verify(verifier=Exact(), truncated="leave_out")(rows)
    assert left_out["attempts"] == [1, 1, 0]
    assert (left_out[2]["solved_low"], left_out[2]["solved_high"]) == (0, 1)


def test_what_hangs_or_fails_is_named_and_counted_and_an_attempt() -> None:
    section = CustomVerifier(target="misbehaving:judge", timeout=0.5)
    desk = Desk()
    made = Verify(verifier=section).run(Dataset.from_list(attempts("right", "sleep", "raise", "wrong")), desk)
    assert made["verdict"] == ["judged", "timed_out", "raised", "judged"]
    assert made["score"] == [1, 0, 0, 0]
    assert set(made["attempts"]) == {4}
    assert {kind: found.count for kind, found in desk.counts.kinds.items()} == {
        "verifier timed out": 1,
        "verifier raised": 1,
    }
    assert "not done after 0.5 s" in desk.counts.kinds["verifier timed out"].examples[0]


def test_a_run_that_was_ended_judges_what_it_has_not_yet(tmp_path: Path) -> None:
    step = Verify.model_construct(verifier=Counting(), success=1.0, column="completion", truncated="attempt")
    rows = Dataset.from_list(attempts("a", "yes", "b", "stop", "c"))
    with pytest.raises(KeyboardInterrupt):
        step.run(rows, Desk(folder=tmp_path))
    assert ASKED == ["a", "yes", "b", "stop"]
    ASKED.clear()
    whole = rows.filter(lambda row: row["completion"] != "stop")
    made = step.run(whole, Desk(folder=tmp_path))
    assert ASKED == ["c"]
    assert made["score"] == [0, 1, 0, 0]
    ASKED.clear()
    step.run(Dataset.from_list([{**row, "answer": "b"} for row in whole]), Desk(folder=tmp_path))
    assert ASKED == ["a", "yes", "b", "c"], "another reference is another question"


def test_completions_that_are_alike_are_judged_once() -> None:
    Verify.model_construct(verifier=Counting(), success=1.0, column="completion", truncated="attempt")(
        Dataset.from_list(attempts("yes", "yes", "no"))
    )
    assert ASKED == ["yes", "no"]


def test_a_verifier_that_ends_its_process_every_time_ends_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = CustomVerifier(target="misbehaving:judge", timeout=0.5)
    monkeypatch.setattr("kdlm.verifiers.pool.LOST_IN_A_ROW", 2)
    rows = [*attempts("right"), *attempts("kill"), *attempts("kill", prompt="q")]
    with pytest.raises(ValueError, match=r"verify: verifier custom .* 2 completions in a row .* verdicts are kept"):
        Verify(verifier=section).run(Dataset.from_list(rows), Desk(folder=tmp_path))


def test_a_summary_shows_the_spread() -> None:
    assert summary({"a": PassRate(0, 4), "b": PassRate(4, 4), "c": PassRate(0, 4)}) == {
        "solved": "4 of 12 completions",
        "pass rate": "0.333 ± 0.333 (standard error over prompts)",
        "prompts by pass rate": "0/4: 2, 4/4: 1",
    }
    assert "0.5-0.6: 1" in summary({"a": PassRate(1, 2), "b": PassRate(3, 3)})["prompts by pass rate"]
    assert summary({}) == {"pass rate": "no attempts"}
