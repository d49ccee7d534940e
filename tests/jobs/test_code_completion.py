"""The code task: the real body of every function passes, others do not, and lm-eval counts it so."""

from pathlib import Path

import pytest

from kdlm.jail import missing
from kdlm.jobs.tasks.code_completion import completes, documents, passes, share_passed
from kdlm.sandbox.function_calls import CALLS, draw_calls
from kdlm.sandbox.functions import functions_of

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {', '.join(missing())}")

TASKS = Path(__file__).parents[2] / "eval" / "tasks"


@pytest.fixture(scope="module")
def functions():
    return list(documents()["test"])


@pytest.mark.slow
def test_the_real_body_of_every_function_passes_in_the_jail(functions):
    assert len(functions) >= 80
    assert [doc["name"] for doc in functions if share_passed(doc, doc["body"]) != 1] == []


@pytest.mark.slow
def test_a_body_of_nothing_passes_for_no_function(functions):
    assert [doc["name"] for doc in functions if completes(doc, ["    return None\n"])["pass@1"] != 0] == []


@pytest.mark.parametrize(
    "wrong", ["    raise NotImplementedError\n", "    return x +\n", "", "import os; os._exit(0)\n"]
)
def test_what_raises_ends_or_is_no_python_passes_nothing(functions, wrong):
    assert completes(functions[0], [wrong]) == {"pass@1": 0, "tests_passed": 0}


def test_the_body_of_another_function_passes_for_few(functions):
    some = list(zip(functions[::4], functions[1::4], strict=True))
    passed = [doc["name"] for doc, other in some if share_passed(doc, other["body"]) == 1]
    assert len(passed) <= len(some) // 10, passed


def test_some_real_bodies_pass(functions):
    assert [doc["name"] for doc in functions[::20] if share_passed(doc, doc["body"]) != 1] == []


def test_names_are_unique_and_prompts_end_where_the_body_begins(functions):
    assert len({doc["name"] for doc in functions}) == len(functions)
    for doc in functions:
        assert doc["prompt"].rstrip().endswith(('"""', "'''", '"', "'")) and doc["prompt"].endswith("\n")
        compile(doc["prompt"] + doc["body"], doc["name"], "exec")


def test_functions_are_made_the_same_again(functions):
    again = list(functions_of("bisect", CALLS["bisect"], 12, 4_000))
    made = {doc["name"]: doc for doc in functions}
    assert again and all(vars(each) == {k: made[each.name][k] for k in vars(each)} for each in again)


def test_calls_are_different_and_the_same_every_time():
    calls = draw_calls("a", "f({words}, {int})", 12)
    assert len(set(calls)) == 12 and calls == draw_calls("a", "f({words}, {int})", 12)
    assert calls != draw_calls("b", "f({words}, {int})", 12)
    assert draw_calls("a", "f({bool})", 12) in (["f(True)", "f(False)"], ["f(False)", "f(True)"])


def test_passing_counts_samples(functions):
    doc = functions[0]
    figures = passes(doc, [[doc["body"]] * 2 + ["    return None\n"] * 6])
    assert figures["pass@1"] == pytest.approx(2 / 8) and figures["pass@8"] == 1
    assert 2 / 8 <= figures["tests_passed"] < 1
    with pytest.raises(ValueError, match="at least 8 samples"):
        passes(doc, [[doc["body"]] * 7])


class Scribe:
    """Stands for a model: writes the body of every other function, and nothing for the rest."""

    def __init__(self, functions):
        from lm_eval.api.model import LM

        bodies = {doc["prompt"]: doc["body"] for doc in functions[::2]}

        class Model(LM):
            def generate_until(self, requests, disable_tqdm=False):
                return [bodies.get(request.args[0], "    pass\n") for request in requests]

            def loglikelihood(self, requests, disable_tqdm=False):
                raise NotImplementedError

            loglikelihood_rolling = loglikelihood

        self.model = Model()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["kdlm_code_completion", "kdlm_code_completion_pass"])
def test_lm_eval_counts_what_passes_and_asks_for_consent(functions, task):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    def evaluate(**options):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        return simple_evaluate(
            Scribe(functions).model, tasks=[task], task_manager=manager, limit=6, bootstrap_iters=0, **options
        )

    with pytest.raises(ValueError, match="unsafe"):
        evaluate()
    figures = evaluate(confirm_run_unsafe_code=True)["results"][task]
    name = "none" if task == "kdlm_code_completion" else "samples"
    assert figures[f"pass@1,{name}"] == 0.5 and figures[f"tests_passed,{name}"] >= 0.5
