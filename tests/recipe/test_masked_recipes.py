"""Recipes of masked language models: what `kdlm check` and `kdlm plan` say where the parts do not fit."""

from pathlib import Path

import pytest

from kdlm.check import check
from kdlm.plan import predict
from kdlm.plan.devices import device
from kdlm.recipe import load

FOLDER = Path(__file__).parents[2] / "recipes" / "sandbox"

WRONG = {
    "a causal method": (
        "masked_kd",
        ["method={name: logit_kd}"],
        "student: logit_kd is not for masked language models, and this is one: use masked_kd or gdsd",
    ),
    "a causal student": (
        "masked_kd",
        ["student={name: sandbox, model: code-student-tiny}"],
        "student: masked_kd is for masked language models: use name: masked_lm",
    ),
    "a causal teacher": (
        "masked_kd",
        ["teacher={name: sandbox, model: code-teacher-tiny}"],
        "teacher: sandbox does not provide teacher.unmasking, which masked_kd needs",
    ),
    "no loss": ("masked_kd", ["losses=[]"], "losses: masked_kd needs at least one"),
    "an unknown model": (
        "masked_kd",
        ["student.path=sandbox:masked-studnt"],
        "student: the sandbox has no 'masked-studnt', did you mean 'masked-student'?",
    ),
    "a causal engine": (
        "gdsd",
        ["rollouts.engine={name: generate}"],
        "rollouts.engine: a masked language model does not write by generate: use unmask",
    ),
    "other inner steps": (
        "gdsd",
        ["method.inner_steps=8"],
        "method.inner_steps: 8, and a generation is trained on for 2 steps (rollouts.every * reuse): set the same",
    ),
    "no reward": ("gdsd", ["verifier="], "verifier: missing; gdsd learns from rewards"),
    "nothing to compare a reward with": (
        "gdsd",
        ["rollouts.sampling.samples_per_prompt=1", "rollouts.sampling.temperature=0"],
        "rollouts.sampling.samples_per_prompt: rewards are compared within a prompt's completions: set 2 or more",
    ),
    "guards": (
        "gdsd",
        ["guards={length: {stop: {below: 1}}}"],
        "guards: they watch causal language models, and the student is a masked one",
    ),
    "the engine of masked models for a causal one in TRL": (
        "rlad",
        ["rollouts.engine={name: unmask}"],
        "rollouts.engine: a causal language model does not write by unmask",
    ),
    "a list of all that there is": (
        "masked_kd",
        ["student.path=sandbox:foo"],
        "the sandbox has no 'foo'. It has: code,",
    ),
    "measures of causal models": (
        "masked_kd",
        ["evaluation={start: true}"],
        "evaluation: beside rows and best it asks for what only a causal language model has",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_with_what_does(name: str) -> None:
    recipe, overrides, said = WRONG[name]
    with pytest.raises(ValueError) as raised:
        check(load(FOLDER / f"{recipe}.yaml", overrides))
    assert said in str(raised.value)


@pytest.mark.parametrize("recipe", ["masked_kd", "gdsd"])
def test_plan_says_that_it_does_not_know_them(recipe: str) -> None:
    with pytest.raises(ValueError, match="plan knows causal language models, and this is a masked one"):
        predict(load(FOLDER / f"{recipe}.yaml"), device("24 GiB"))
