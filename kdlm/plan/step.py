"""One optimiser step of a run on fake tensors: what `kdlm train` would do, in the memory of none."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch
from warnings import catch_warnings

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from kdlm.losses import chunked, forward_kl, plan_chunks
from kdlm.methods import Method, Step, TokenMethod
from kdlm.methods.method import phases
from kdlm.networks import Networks
from kdlm.plan.ledger import Fakes, Ledger, Phase
from kdlm.plan.optimisers import optimiser_of
from kdlm.plan.rollouts import Rollouts
from kdlm.plan.settings import Settings
from kdlm.plan.sizes import Weights
from kdlm.plan.skeletons import Elsewhere, student_of, teacher_of
from kdlm.plan.turns import Turns, by_shape
from kdlm.recipe import Recipe
from kdlm.signal import Dense
from kdlm.sparsity.layers import prunable
from kdlm.teachers import AheadTeacher


@dataclass(frozen=True)
class Traced:
    """What was seen of an optimiser step.

    Attributes:
        phases: what each held, and did.
        student: the sizes of all that trains, of which the student is the largest.
        teacher: those of a teacher whose model is here.
        host: bytes of the teacher that rest in the host's memory and go to the device in every step.
        signal: bytes that come from elsewhere, another GPU, a server or disk, for each micro-batch.
        reads: sequences that the teacher reads at once; None: those of a micro-batch.
    """

    phases: dict[str, Phase]
    student: Weights
    teacher: Weights | None
    host: int
    signal: int
    reads: int | None


def trace(recipe: Recipe, settings: Settings) -> Traced:
    """Run one optimiser step on fake tensors, as it is once the optimiser has its state.

    Raises ValueError where the method looks at numbers that a plan does not have.
    """
    _settle()
    try:
        with _as_there(settings), Fakes(), Ledger() as ledger:
            run = _Run(recipe, settings, ledger)
            run.step()
            return run.traced()
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ValueError(
            f"method: plan cannot follow {recipe.method.name}, whose shapes depend on numbers ({error})"
        ) from error


@contextmanager
def _as_there(settings: Settings) -> Iterator[None]:
    """Let code that looks at numbers or devices do as it would in the run."""
    with ExitStack() as stack:
        stack.enter_context(catch_warnings(action="ignore", category=FutureWarning))  # transformers' of its own
        if not settings.masked:  # transformers cannot see that sequences are not packed, and would make a mask for it
            stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda *_, **__: None))
        stack.enter_context(patch("kdlm.teachers.ahead.regrouped", by_shape(settings)))
        if settings.device.kind == "cuda":  # as many rows at once as there; on a CPU they are few, to stay in its cache
            stack.enter_context(patch.dict("kdlm_kernels.distribution.BLOCK", {"cpu": 1 << 24}))
            stack.enter_context(patch("kdlm_kernels.projection._FEW_ROWS", 0))  # a GPU turns no product round
        yield


@functools.cache
def _settle() -> None:
    """Let the losses do what they do once in a process, so that no step's count has it."""
    chunked(forward_kl, Dense(torch.zeros(1, 2)), Dense(torch.zeros(1, 2)))


class _Run:
    """Networks, method and optimiser of a recipe, without numbers."""

    def __init__(self, recipe: Recipe, settings: Settings, ledger: Ledger):
        self.settings, self.ledger = settings, ledger
        with ledger.making("weights"):
            student = student_of(recipe.student)
            if getattr(recipe.evaluation, "start", False) and getattr(recipe.student, "lora", None) is None:
                self.start = student_of(recipe.student).requires_grad_(False)  # adapters need none: they have a base
        with ledger.making("teacher weights"):
            teacher = teacher_of(recipe.teacher, settings.rows, settings.accumulation + 1)
        self.turns = Turns(teacher, settings, ledger) if isinstance(teacher, AheadTeacher) else None
        for record in getattr(teacher, "ahead", ()):
            for tensor in record.values():
                ledger.move(tensor, "cache")
        self.method: Method = recipe.method.build(recipe.losses, None)
        self.chunk = self._fit(self.method, student, teacher) if isinstance(self.method, TokenMethod) else 0
        self.networks = Networks(student, self.method, teacher)
        if settings.checkpointing is not None:
            self._checkpoint(student)
        if recipe.sparsity is not None:
            with ledger.making("weights"):  # a mask of a byte for each weight
                layers = prunable(student, recipe.sparsity).values()
                self.masks = [torch.empty_like(layer.weight, dtype=torch.bool) for layer in layers]
        self.networks.train()
        self.trained = [parameter for parameter in self.networks.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradients"))
        self.rollouts = None if recipe.rollouts is None else Rollouts(recipe.rollouts, student, settings, ledger)
        self.sizes = Weights.of(student, self.networks.parameters()), Weights.of_teacher(teacher)
        self.signal = teacher.size if isinstance(teacher, Elsewhere) else 0

    def traced(self) -> Traced:
        """Return what was seen."""
        student, teacher = self.sizes
        moved, reads = (0, None) if self.turns is None else (self.turns.moved, self.turns.teacher.batch_size)
        return Traced(self.ledger.phases, student, teacher, moved, self.signal, reads)

    def step(self) -> None:
        """Run the step, phase by phase."""
        settings, ledger = self.settings, self.ledger
        ledger.holds = False
        with ledger.making("activations"):
            batches = [self._batch(settings.batch) for _ in range(settings.accumulation)]
        if self.turns is not None:
            self.turns.learn(batches[0], partial(self._ask, batches[0]))
        optimiser = self._primed()
        if self.rollouts is not None:
            self.rollouts.draw()
        if self.turns is not None:
            with self._autocast():
                self.turns.take(batches)
        if settings.accumulation > 1:  # an earlier micro-batch has left its gradients
            self._give_gradients()
        with self._autocast():
            loss = self._losses(batches[-1])
        if loss is not None:
            with ledger.phase("backward", "activations"):
                loss.backward()
        del loss
        with ledger.phase("optimiser step", "optimiser"):
            if settings.args.max_grad_norm:
                nn.utils.clip_grad_norm_(self.trained, settings.args.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if settings.evaluation:
            self.networks.eval()
            at_hand = nullcontext() if self.turns is None else self.turns.teacher.at_hand()
            with torch.no_grad(), self._autocast(), ledger.phase("evaluation", "loss"), at_hand:
                self.method.evaluate(self._nets("evaluation"), self._batch(settings.evaluation), Step(0, 1))

    def _ask(self, inputs: dict[str, Tensor]) -> None:
        """Run the method's losses for what they ask."""
        advance = phases(
            partial(self.method.losses, dict(self.networks.views), inputs, self.method.active(0), Step(0, 1))
        )
        while advance().more:
            pass

    def _losses(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Run the method's losses, and all backward passes but the last; return the loss of that one."""
        self.ledger.fused = self.settings.device.kind == "cuda"
        with self.ledger.phase("loss", "loss"):
            step, active = Step(0, 1), self.method.active(0)
            advance = phases(partial(self.method.losses, self._nets(), inputs, active, step))
            while True:
                terms = advance()
                loss: Any = sum(term.weight * term.sum for term in terms.terms.values()) / self.settings.rows
                if not terms.more:
                    break
                with self.ledger.phase("backward", "activations"):
                    loss.backward()
            self.ledger.add(self.chunk, "loss")
        self.ledger.fused = False
        return loss if isinstance(loss, Tensor) and loss.requires_grad else None

    def _primed(self) -> torch.optim.Optimizer:
        """Return the optimiser with the state that it has after a step."""
        with self.ledger.phase("start", "gradients"):
            self._give_gradients()
        with self.ledger.phase("start", "optimiser"):
            optimiser = optimiser_of(self.settings.args, self.trained, self.settings.device.kind)
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return optimiser

    def _give_gradients(self) -> None:
        with self.ledger.making("gradients"):
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)

    def _checkpoint(self, student: Any) -> None:
        given = dict(self.settings.checkpointing or {})
        if hasattr(student, "activation_checkpointing_enable"):
            every, offload = given.pop("every_n_layers", 1), given.pop("offload", False)
            student.activation_checkpointing_enable(
                activation_checkpointing_kwargs=given or None, every_n_layers=every, offload=offload
            )
        else:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given or None)

    def _autocast(self) -> Any:
        dtype = self.settings.autocast
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def _batch(self, batch: int) -> dict[str, Tensor]:
        """Return so many whole sequences; attention gets a mask where some may be shorter."""
        length, flat = self.settings.length, self.settings.flat
        ids = torch.ones((1, batch * length) if flat else (batch, length), dtype=torch.int64)
        domain = torch.zeros(batch, dtype=torch.int64)
        made = {"input_ids": ids, "labels": torch.ones_like(ids), "domain": domain}
        if self.settings.masked:
            made["position_ids" if flat else "attention_mask"] = torch.ones_like(ids)
        if "preferences" in self.method.needs:
            made["rejected"] = torch.ones(batch, dtype=torch.bool)
        if self.rollouts is not None:
            made |= self.rollouts.beside(ids, batch)
        return made

    def _nets(self, phase: str = "") -> dict[str, Any]:
        nets: dict[str, Any] = dict(self.networks.views)
        nets["student"] = _Watched(nets["student"], self.ledger, phase or "student forward", "activations")
        if "teacher" in nets and (phase or self.turns is None):  # what was answered ahead is only looked up
            nets["teacher"] = _Watched(nets["teacher"], self.ledger, phase or "teacher forward", "teacher activations")
        return nets

    def _fit(self, method: TokenMethod, student: Any, teacher: Any) -> int:
        """Tell the losses which ids are shared and, for a GPU, how many rows its kernels take at once.

        Return the bytes of a chunk's buffers on a GPU: logits of both, and the gradient in half precision.
        """
        head, theirs = student.get_output_embeddings().weight, getattr(teacher, "vocab_size", None)
        ours = head.shape[0]
        if theirs not in (None, ours):
            method.vocab = min(ours, theirs)  # which ids they are does not matter here
        if self.settings.device.kind == "cpu":
            return 0
        item = (self.settings.autocast or head.dtype).itemsize
        projected = getattr(teacher, "hidden_size", 0)
        sizes = {"vocab": ours, "student_width": head.shape[1], "teacher_width": projected, "teacher_vocab": theirs}
        chunks = plan_chunks(self.settings.rows, **sizes, itemsize=item, device="cuda", trained=head.requires_grad)
        method.chunk_rows = min(method.chunk_rows or chunks.rows, self.settings.rows)
        return method.chunk_rows * (chunks.bytes // chunks.rows)


class _Watched:
    """A network whose calls are a phase of their own."""

    def __init__(self, net: Any, ledger: Ledger, phase: str, part: str):
        self._net, self._phase = net, partial(ledger.phase, phase, part)

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self._phase():
            return self._net(*args, **options)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._net, name)
        if not callable(found) or isinstance(found, nn.Module):
            return found

        def watched(*args: Any, **options: Any) -> Any:
            with self._phase():
                return found(*args, **options)

        return watched
