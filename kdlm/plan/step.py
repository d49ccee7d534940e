"""One step of a run on fake tensors: what `kdlm train` would do, in the memory of none."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from transformers import Trainer

from kdlm.losses import plan_chunks
from kdlm.methods import Method, Step, TokenMethod
from kdlm.methods.method import phases
from kdlm.networks import Networks
from kdlm.plan.ledger import Ledger
from kdlm.plan.settings import Settings
from kdlm.plan.skeletons import student_of, teacher_of
from kdlm.recipe import Recipe


def trace(recipe: Recipe, settings: Settings) -> Ledger:
    """Run one optimiser step on fake tensors, as it is once the optimiser has its state, and return what it held.

    Raises ValueError where the method looks at numbers that a plan does not have.
    """
    try:
        with FakeTensorMode(), Ledger() as ledger:
            _Run(recipe, settings, ledger).step()
            return ledger
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ValueError(
            f"method: plan cannot follow {recipe.method.name}, whose shapes depend on numbers: {error}"
        ) from error


class _Run:
    """Networks, method and optimiser of a recipe, without numbers."""

    def __init__(self, recipe: Recipe, settings: Settings, ledger: Ledger):
        self.recipe, self.settings, self.ledger = recipe, settings, ledger
        with ledger.making("weights"):
            student = student_of(recipe.student)
        with ledger.making("teacher weights"):
            teacher = teacher_of(recipe.teacher, settings.rows, settings.accumulation + 1)
        for record in getattr(teacher, "ahead", ()):
            for tensor in record.values():
                ledger.move(tensor, "cache")
        self.method: Method = recipe.method.build(recipe.losses, None)
        self.networks = Networks(student, self.method, teacher)
        if isinstance(self.method, TokenMethod):
            self.method.vocab = self._vocab(student, teacher)
            self.narrow = self._chunked(self.method, student, teacher)
        if settings.checkpointing is not None:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings.checkpointing or None)
        self.networks.train()
        self.trained = [parameter for parameter in self.networks.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradients"))

    def step(self) -> None:
        """Run the step, phase by phase."""
        settings = self.settings
        optimiser = self._primed()
        with self._autocast():
            loss = self._losses(settings.batch, settings.length)
        if loss is not None:
            with self.ledger.phase("backward", "activations"):
                loss.backward()
        del loss
        with self.ledger.phase("optimiser step", "optimiser"):
            if settings.args.max_grad_norm:
                nn.utils.clip_grad_norm_(self.trained, settings.args.max_grad_norm)
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if settings.evaluation:
            self.networks.eval()
            with torch.no_grad(), self._autocast(), self.ledger.phase("evaluation", "loss"):
                batch = self._batch(settings.evaluation, settings.length)
                self.method.evaluate(self._nets("evaluation"), batch, Step(0, 1))

    def _losses(self, batch: int, length: int) -> Tensor | None:
        with self.ledger.phase("loss", "loss"):
            with self.ledger.making("activations"):
                inputs = self._batch(batch, length)
            step, active = Step(0, 1), self.method.active(0)
            advance = phases(partial(self.method.losses, self._nets(), inputs, active, step))
            while True:
                terms = advance()
                loss = sum(term.weight * term.sum for term in terms.terms.values()) / self.settings.rows
                if not terms.more:
                    return loss if isinstance(loss, Tensor) and loss.requires_grad else None
                with self.ledger.phase("backward", "activations"):
                    loss.backward()

    def _primed(self) -> torch.optim.Optimizer:
        """Return the optimiser after a step, and leave gradients where an earlier micro-batch would have."""
        with self.ledger.phase("start", "gradients"):
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)
        with self.ledger.phase("start", "optimiser"):
            made, options = Trainer.get_optimizer_cls_and_kwargs(self.settings.args)
            optimiser = made(self.trained, **options)
            optimiser.step()
        if self.settings.accumulation == 1:
            optimiser.zero_grad(set_to_none=True)
        return optimiser

    def _autocast(self) -> Any:
        dtype = self.settings.autocast
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def _batch(self, batch: int, length: int) -> dict[str, Tensor]:
        """Return a batch of whole sequences; there is a mask where some may be shorter."""
        rows = (1, batch * length) if self.settings.flat else (batch, length)
        ids = torch.ones(rows, dtype=torch.int64)
        made = {"input_ids": ids, "labels": torch.ones_like(ids)}
        if self.settings.masked:
            name = "position_ids" if self.settings.flat else "attention_mask"
            made[name] = torch.ones_like(ids)
        return made

    def _nets(self, phase: str = "") -> dict[str, Any]:
        nets: dict[str, Any] = dict(self.networks.views)
        nets["student"] = _Watched(nets["student"], self.ledger, phase or "student forward", "activations")
        if "teacher" in nets:
            nets["teacher"] = _Watched(nets["teacher"], self.ledger, phase or "teacher forward", "teacher activations")
        return nets

    def _vocab(self, student: Any, teacher: Any) -> int | None:
        """Return how many ids are compared where the heads differ; which ones does not matter here."""
        ours, theirs = student.get_output_embeddings().weight.shape[0], getattr(teacher, "vocab_size", None)
        return None if theirs in (None, ours) else min(ours, theirs)

    def _chunked(self, method: TokenMethod, student: Any, teacher: Any) -> int:
        return 0


class _Watched:
    """A network whose calls are a phase of their own."""

    def __init__(self, net: Any, ledger: Ledger, phase: str, part: str):
        self._net, self._phase = net, partial(ledger.phase, phase, part)

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self._phase():
            return self._net(*args, **options)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._net, name)
        if not callable(found):
            return found

        def watched(*args: Any, **options: Any) -> Any:
            with self._phase():
                return found(*args, **options)

        return watched
