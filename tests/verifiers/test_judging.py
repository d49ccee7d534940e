"""What a Judge promises: a verdict per completion, in order and in time, whatever a verifier does; nothing is left."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import misbehaving
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlm.verifiers import CustomVerifier, Exact, Judge, Verdict, pool
from kdlm.verifiers.judge import KINDS


def judge(**options) -> Judge:
    return Judge(CustomVerifier(**{"target": "misbehaving:judge", "timeout": 0.5, "column": None, **options}))


@pytest.fixture(scope="module")
def patient():
    with judge(timeout=10) as one:
        yield one


def is_running(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition) -> None:
    end = time.monotonic() + 30  # a guard, not a measure
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("hang", sorted(misbehaving.HANGS | {"alarm"}))
def test_a_verifier_that_hangs_is_stopped_counted_and_named_and_the_rest_is_judged(hang, caplog):
    with judge() as one:
        verdicts = one.judge(["right", hang, "half", "wrong"])
        assert [verdict.score for verdict in verdicts] == [1, 0, 0.5, 0]
        assert [verdict.outcome for verdict in verdicts] == ["judged", "timed_out", "judged", "judged"]
        assert one.counts == {"judged": 3, "raised": 0, "timed_out": 1} and one.kinds == {"timed out": 1}
        for said in ("misbehaving:judge", "completion 1", "0.5 s", repr(hang)):
            assert said in caplog.text


@pytest.mark.parametrize(
    "completion, kind",
    [
        ("raise", "KeyError"),
        ("sys.exit", "SystemExit"),
        ("nan", "ValueError"),
        ("infinite", "ValueError"),
        ("no score", "ValueError"),
        ("huge", "OverflowError"),
        ("text", "TypeError"),
        ("nothing", "TypeError"),
        ("function", "TypeError"),
    ],
)
def test_what_raises_or_returns_no_score_is_counted_and_named(patient, completion, kind):
    before = patient.kinds[kind]
    verdicts = patient.judge(["right", completion, "half"])
    assert [verdict.score for verdict in verdicts] == [1, 0, 0.5]
    assert [verdict.outcome for verdict in verdicts] == ["judged", "raised", "judged"]
    assert verdicts[1].reason.startswith(kind) and patient.kinds[kind] == before + 1


@pytest.mark.parametrize("end, said", [("os._exit", "exit code 3"), ("kill", "SIGKILL"), ("segfault", "SIGSEGV")])
def test_a_worker_that_ends_by_itself_costs_one_completion(end, said):
    with judge() as one:
        verdicts = one.judge(["right", end, "right"])
        assert [verdict.outcome for verdict in verdicts] == ["judged", "raised", "judged"]
        assert said in verdicts[1].reason


def test_a_worker_that_ended_between_two_batches_costs_none():
    with judge() as one:
        process = int(one.judge(["pid"])[0].score)
        os.kill(process, signal.SIGKILL)
        wait_until(lambda: not is_running(process))
        assert [verdict.outcome for verdict in one.judge(["right", "right"])] == ["judged", "judged"]


def test_a_verifier_may_print_and_finds_nothing_to_read(patient):
    assert [verdict.score for verdict in patient.judge(["print", "read", "right", "mapping"])] == [1, 1, 1, 0.25]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["right", "wrong", "half", "raise", "nan"]), max_size=150))
def test_verdicts_come_in_the_order_of_the_completions(patient, completions):
    scores = {"right": 1.0, "half": 0.5}
    assert [verdict.score for verdict in patient.judge(completions)] == [scores.get(each, 0.0) for each in completions]


def test_the_number_of_workers_is_inert():
    completions = ["right", "half", "raise", "wrong"] * 50
    with judge(timeout=10) as one, judge(timeout=10, workers=3) as three:
        assert one.judge(completions) == three.judge(completions)
        assert one.counts == three.counts and one.kinds == three.kinds


def test_several_workers_judge_at_once():
    with judge(timeout=10, workers=2) as two:
        assert len({verdict.score for verdict in two.judge(["pid"] * 2 * pool.CHUNK)}) == 2


def test_completions_larger_than_a_pipe_come_through(patient):
    text = "x" * 1_000_000
    verdicts = patient.judge(["right"] * 5, rows=[{"text": text}] * 5)
    assert [verdict.score for verdict in verdicts] == [1] * 5


def test_reference_row_and_arguments_reach_the_verifier():
    with judge(timeout=10, args={"strict": True}, column="answer") as one:
        (verdict,) = one.judge(["echo"], ["42"], [{"prompt": "?"}])
        assert verdict == Verdict(1.0, "judged", "42 {'prompt': '?'} {'strict': True}")


def test_a_class_is_made_once():
    with Judge(CustomVerifier(target="misbehaving:Loaded", args={"words": ["red"]}, column=None)) as one:
        assert [verdict.score for verdict in one.judge(["red", "blue", "calls"])] == [1, 0, 3]


def test_a_worker_starts_without_torch(patient):
    modules = patient.judge(["modules"])[0].reason.split(",")
    assert "kdlm.verifiers" in ",".join(sys.modules) and "torch" in sys.modules and "torch" not in modules


@pytest.mark.parametrize("target, said", [("misbehaving:nobody", "nobody"), ("no_such_module:judge", "no_such_module")])
def test_a_verifier_that_cannot_be_made_is_said_at_once(target, said):
    with pytest.raises(ValueError, match=said):
        judge(target=target)


def test_a_verifier_that_hangs_where_it_is_imported_is_said(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pool, "START_LIMIT", 0.5)
    with pytest.raises(ValueError, match=r"slow_to_import.* not done after 0.5 s while it was imported"):
        judge(target="slow_to_import:judge")


def test_a_module_beside_the_recipe_is_found_in_the_worker(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def judge(completion, reference, row):\n    return len(completion) / 10\n")
    monkeypatch.syspath_prepend(tmp_path)
    with judge(target="my_rewards:judge", timeout=10) as one:
        assert one.judge(["abc"])[0].score == 0.3


def test_a_verifier_that_ends_its_process_again_and_again_ends_the_run(monkeypatch):
    monkeypatch.setattr(pool, "LOST_IN_A_ROW", 3)
    with judge(timeout=0.1) as one:
        with pytest.raises(RuntimeError, match=r"misbehaving:judge\): 3 completions in a row .* `timeout` of 0.1 s"):
            one.judge(["right", "os._exit", "sleep", "os._exit", "right"])
        assert one.counts == {"judged": 1, "raised": 2, "timed_out": 1}
        assert one.judge(["half"]) == [Verdict(0.5)]


def test_one_completion_judged_in_between_forgives_the_lost_ones(monkeypatch):
    monkeypatch.setattr(pool, "LOST_IN_A_ROW", 2)
    with judge() as one:
        one.judge(["os._exit", "right", "os._exit", "right"])
        assert one.counts["judged"] == 2


def test_only_the_first_failure_of_a_kind_is_shown(caplog):
    with judge(timeout=10) as one:
        one.judge(["raise", "raise", "nan", "raise"])
        one.judge(["raise"])
        assert len(caplog.records) == 2 == len(one.examples)
        assert one.kinds == {"KeyError": 4, "ValueError": 1}


def test_kinds_and_their_examples_are_bounded(caplog):
    def fails(completion, reference, row):
        raise type(f"Error{completion}", (Exception,), {})

    one = Judge(Exact())
    one._verifier = fails
    one.judge([str(number) for number in range(100)], ["x"] * 100)
    assert one.counts["raised"] == 100 == sum(one.kinds.values())
    assert len(one.kinds) == len(one.examples) == len(caplog.records) == KINDS


def test_a_message_stays_short_and_shows_both_ends_of_a_long_completion(caplog):
    one = Judge(Exact())
    one.judge(["begin" + "x" * 100_000 + "end"], [None])
    assert len(caplog.text) < 1000 and "'begin" in caplog.text and "end'" in caplog.text


def test_lists_that_do_not_fit_and_missing_references_are_refused():
    one = Judge(Exact())
    with pytest.raises(ValueError, match="2 completions, 1 references and 2 rows"):
        one.judge(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no references, expected those of the column 'answer'"):
        one.judge(["a"])
    assert one.judge([], []) == []


def test_nothing_is_left_after_close():
    with judge(workers=2) as one:
        processes = {int(verdict.score) for verdict in one.judge(["pid"] * 2 * pool.CHUNK)}
        assert all(map(is_running, processes))
    assert not any((Path("/proc") / str(process)).exists() for process in processes), "not even a zombie"


def test_nothing_is_left_of_a_judge_that_was_dropped():
    one = judge()
    process = int(one.judge(["pid"])[0].score)
    del one
    assert not (Path("/proc") / str(process)).exists()


def test_what_a_verifier_started_ends_with_it(tmp_path):
    with judge(timeout=1.0) as one:
        assert one.judge(["child and sleep"], [str(tmp_path / "child")])[0].outcome == "timed_out"
    wait_until(lambda: not is_running(int((tmp_path / "child").read_text())))


PARENT = """
import sys
from kdlm.verifiers import CustomVerifier, Judge
one = Judge(CustomVerifier(target="misbehaving:judge", timeout=0.5, column=None))
process = int(one.judge(["pid"])[0].score)
if sys.argv[1] == "busy":
    one._pool._workers[0].give([0], [__import__("pickle").dumps(("loop", None, {}))])
    one._pool._turn()
print(process, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_workers_do_not_outlive_a_process_that_was_killed(state):
    command = [sys.executable, "-c", "import sys; sys.path[:] = sys.argv[2:]\n" + PARENT, state, *sys.path]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_running(process))


def test_a_judge_may_be_called_from_threads_that_wait_for_each_other(patient):
    found: dict[int, list[float]] = {}

    def work(number: int) -> None:
        found[number] = [verdict.score for verdict in patient.judge(["right", "half", "wrong"][: number % 3 + 1] * 20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [1.0, 0.5, 0.0][: number % 3 + 1] * 20 for number in range(6)}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked_from_this_one_leaves_the_workers_alone(patient):
    process = int(patient.judge(["pid"])[0].score)
    if (child := os.fork()) == 0:
        patient.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert int(patient.judge(["pid"])[0].score) == process


def test_warnings_go_to_the_log_of_this_room(caplog):
    with caplog.at_level(logging.WARNING, logger="kdlm.verifiers"):
        Judge(Exact()).judge(["a"], [None])
    assert [record.name for record in caplog.records] == ["kdlm.verifiers.judge"]
