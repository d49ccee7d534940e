"""The code task: real bodies pass, others do not, and lm-eval counts it so."""

from pathlib import Path

import pytest

from kdlm.jail import missing
from kdlm.jobs.tasks.code_completion import completes, documents, passes
from kdlm.sandbox.function_calls import CALLS

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {', '.join(missing())}")

TASKS = Path(__file__).parents[2] / "eval" / "tasks"


@pytest.fixture(scope="module")
def functions():
    """Some of them: `tests/sandbox/test_functions.py` looks at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kdlm.sandbox.functions.CALLS", {each: CALLS[each] for each in ("bisect", "calendar", "operator")}
        )
        yield list(documents()["test"])


def test_real_bodies_pass_and_bodies_of_nothing_do_not(functions):
    for doc in functions[::3]:
        assert completes(doc, [doc["body"]]) == {"pass@1": 1, "tests_passed": 1}
        assert completes(doc, ["    return None\n"])["pass@1"] == 0


@pytest.mark.parametrize(
    "wrong", ["    raise NotImplementedError\n", "    return x +\n", "", "import os; os._exit(0)\n"]
)
def test_what_raises_ends_or_is_no_python_passes_nothing(functions, wrong):
    assert completes(functions[0], [wrong]) == {"pass@1": 0, "tests_passed": 0}


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


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_includes_it_may_do_without_isolation(functions, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    text = f"include: {TASKS}/kdlm_code_completion.yaml\ntask: mine\nmetadata: {{version: 1, isolation: limits_only}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    (task,) = manager.load_task_or_group(["mine"]).values()
    doc = task.dataset["test"][0]
    assert doc["isolation"] == "limits_only"
    monkeypatch.setattr("kdlm.jail.support.missing", lambda: ["Landlock"])
    assert completes(doc, [doc["body"]])["pass@1"] == 1
    with pytest.raises(RuntimeError, match="it lacks Landlock"):
        completes({**doc, "isolation": "full"}, [doc["body"]])
