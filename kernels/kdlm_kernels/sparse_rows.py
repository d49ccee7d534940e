"""Row parts that look at a few tokens of each row: top-k teachers, samples, and log-probabilities of given tokens.

With `log q` of the tokens at hand the rest is small, and the gradient to the logits is `c q` everywhere, with one
number c per row, and something added at the few tokens. So the kernels only normalise and write `c q`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdlm_kernels import formulas
from kdlm_kernels.distribution import Distribution, blocks, largest
from kdlm_kernels.formulas import Plan
from kdlm_kernels.heads import Shape
from kdlm_kernels.merging import Here, Merge
from kdlm_kernels.row_part import keep_freed_memory
from kdlm_kernels.sweep import RowPart
from kdlm_kernels.terms import Formula, Kind, Term, unique_names

_FLOOR = -1e4
"""A log-probability whose exponential is 0, and which, unlike -inf, can be subtracted from itself."""


class _Student:
    """The student's distribution at one temperature, as far as it is needed: log q of tokens, and the gradient."""

    def __init__(self, z: Tensor, shape: Shape, temperature: float, impl: str, merge: Merge, *, entropy: bool = False):
        self.z, self.shape, self.temperature, self.impl, self.merge = z, shape, temperature, impl, merge
        self.formula = Formula(Kind.ENTROPY, temperature, graded=False)
        self._exponentials: Tensor | None = None  # of the logits beside the largest, where one block holds all rows
        self.lse, self.entropy = self._normalise(entropy)

    @property
    def _plan(self) -> Plan:
        return Plan((self.formula,), ("",), (), self.shape, Shape(), self.z.shape[1])

    def _normalise(self, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Return the log-sum-exp in two parts (see `triton_rows`), and the entropy `[n]` where it is wanted."""
        if self.impl == "triton":
            from kdlm_kernels import triton_rows

            return triton_rows.normalise(self.z, self._plan, self.merge, entropy=entropy)
        keep_freed_memory()
        lse, found = self.z.new_empty(len(self.z), 1, 2), self.z.new_empty(len(self.z)) if entropy else None
        cuts = list(self._blocks())
        for block in cuts:
            x = self._tempered(self.z[block])
            top = lse[block, :, 0] = largest(x, self.merge)
            exponentials = (x - top).exp_()
            lse[block, :, 1] = self.merge.sum(exponentials.sum(-1, keepdim=True)).log()
            if len(cuts) == 1:
                self._exponentials = exponentials
            if found is not None:
                logs = x - top - lse[block, :, 1]
                found[block] = -self.merge.sum(Distribution(logs, logs.exp()).times(logs).sum(-1))
        return lse, found

    def _normalised(self, x: Tensor, rows: slice) -> Tensor:
        return x - self.lse[rows, :, 0] - self.lse[rows, :, 1]

    def _blocks(self):
        return blocks(len(self.z), self.merge.size(self.z.shape[1]), self.z.device)

    def _tempered(self, z: Tensor) -> Tensor:
        logits = self.shape(z)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return which ids lie in this slice of the vocabulary, and where (0 for the others)."""
        local = ids - self.merge.offset
        here = (local >= 0) & (local < self.z.shape[1])
        return here, local.masked_fill(~here, 0)

    def log_probs(self, ids: Tensor) -> Tensor:
        """Return `log q(id)`, `[n, k]`; ids outside the vocabulary give `-lse`, which means nothing."""
        here, local = self.places(ids)
        return self._normalised(
            self.merge.sum(self._tempered(self.z.gather(1, local)).masked_fill(~here, 0.0)), slice(None)
        )

    def write(self, grad: Tensor, c: Tensor, ids: Tensor, at_ids: Tensor, of_entropy: Tensor | None = None) -> None:
        """Fill `grad`: the gradient to `z` of a value with derivative `c q`, plus `at_ids` at the ids.

        With `of_entropy` `[n]` that of `of_entropy * entropy` is added, `-of_entropy q (log q + entropy)`.
        """
        here, local = self.places(ids)
        chained = at_ids.masked_fill(~here, 0.0)
        if self.shape != Shape():  # read before the gradient overwrites the logits
            chained = self.shape.chain(chained, self.shape(self.z.gather(1, local)))
        if self.impl == "triton" and of_entropy is None:
            from kdlm_kernels import triton_rows

            triton_rows.write_scaled(self.z, grad, self.lse, c, self._plan, self.merge)
        elif self._exponentials is not None and of_entropy is None:
            factor = c[:, None] / self.lse[:, :, 1].exp() / self.temperature
            found = self._exponentials.mul_(factor)
            grad.copy_(found if self.shape == Shape() else self.shape.chain(found, self.shape(self.z)))
        else:
            for block in self._blocks():
                logits = self.shape(self.z[block])
                logs = self._normalised(logits / self.temperature, block)
                factor = c[block, None]
                if of_entropy is not None and self.entropy is not None:
                    factor = factor - of_entropy[block, None] * (logs + self.entropy[block, None])
                    found = Distribution(logs, logs.exp()).times(factor)
                else:
                    found = logs.exp().mul_(factor)
                found.div_(self.temperature)
                grad[block] = self.shape.chain(found, logits)
        grad.scatter_add_(1, local, chained.div_(self.temperature).to(grad.dtype))


class SparseRows:
    """Divergences from a top-k or sampled teacher, cross-entropy on labels, and measures, for `sweep`."""

    def __init__(
        self,
        terms: Sequence[Term],
        measures: Sequence[str],
        shape: Shape,
        ids: Tensor,
        log_probs: Tensor | None,
        counts: Tensor | None,
        labels: Tensor | None,
        impl: str,
        merge: Merge,
    ):
        self.terms, self.measures, self.names = terms, measures, unique_names(terms)
        self.shape, self.impl, self.merge = shape, impl, merge
        self.ids, self.labels = ids, labels
        self.log_probs, self.counts = (None if x is None else x.detach() for x in (log_probs, counts))
        self._check()

    @property
    def all_names(self) -> list[str]:
        return [*self.names, *self.measures]

    def _check(self) -> None:
        kind = "sampled" if self.log_probs is None else "top-k"
        for term in self.terms:
            if term.name == "cross_entropy":
                continue
            if term.temperature != 1.0:
                raise ValueError(
                    f"temperature {term.temperature} on a {kind} teacher: what it would say at another temperature "
                    "than 1 is not known; use temperature 1 or a teacher that gives full logits"
                )
            if self.log_probs is None and term.formula.kind != Kind.FORWARD:
                raise ValueError(f"{term.name} on samples: only forward_kl can be estimated from them; use top-k")
        if self.labels is None and any(name in ("cross_entropy", "accuracy") for name in self.all_names):
            raise ValueError("cross_entropy and accuracy need labels=, the next token of each row")
        for name in self.measures:
            if name not in ("student_entropy", "accuracy"):
                raise ValueError(f"measure {name!r} needs the teacher's whole distribution")

    def __call__(
        self, z: Tensor, y: Tensor | None, at: slice, factors: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student = _Student(z, self.shape, 1.0, self.impl, self.merge, entropy="student_entropy" in self.measures)
        parts: dict[str, Tensor] = {}
        if self.labels is not None and "accuracy" in self.measures:
            parts["accuracy"] = (self.merge.argmax(z) == self.labels[at]).to(z.dtype)
        if student.entropy is not None:
            parts["student_entropy"] = student.entropy
        total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        c, ids, at_ids = torch.zeros_like(total), [], []
        for name, term in zip(self.names, self.terms, strict=True):
            value, dense, tokens, extra = self._term(term, student, at)
            parts[name] = value
            if term.weight:
                total = total + term.weight * value
                c = c + term.weight * dense
                ids.append(tokens)
                at_ids.append(term.weight * extra)
        if grad is not None:
            scale = 1.0 if factors is None else factors[:, None]
            none = z.new_zeros(len(z), 0)
            tokens = torch.cat(ids, 1) if ids else none.long()
            extra = torch.cat(at_ids, 1) if at_ids else none
            student.write(grad, c if factors is None else c * factors, tokens, extra * scale)
        return total, {name: parts[name] for name in self.all_names}

    def _term(self, term: Term, student: _Student, at: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a term's value `[n]`, its `c` `[n]`, and tokens `[n, k]` with what is added there."""
        if term.name == "cross_entropy":
            assert self.labels is not None
            tokens = self.labels[at, None]
            kept = (tokens >= 0).to(student.z.dtype)
            value = -student.log_probs(tokens.clamp(min=0)).masked_fill(kept == 0, 0.0)
            return value[:, 0], kept[:, 0], tokens.clamp(min=0), -kept
        tokens = self.ids[at]
        logs = student.log_probs(tokens)
        inside = tokens < self.merge.total(0, student.z.shape[1])
        if self.counts is not None:
            counts = self.counts[at].to(logs.dtype)
            share = counts / counts.sum(-1, keepdim=True).clamp(min=torch.finfo(logs.dtype).tiny)
            return -(share * logs.masked_fill(share == 0, 0.0)).sum(-1), share.sum(-1), tokens, -share
        return self._bucketed(term, logs, inside, tokens, at)

    def _bucketed(self, term: Term, logs: Tensor, inside: Tensor, tokens: Tensor, at: slice):
        """Compare the tokens and the bucket of all others, whose gradient spreads over them as q does."""
        assert self.log_probs is not None
        q = _with_tail(logs.masked_fill(~inside, _FLOOR))
        p = _with_tail(self.log_probs[at].to(logs.dtype).clamp(min=_FLOOR).masked_fill(~inside, _FLOOR))
        plan = Plan((term.formula._replace(graded=True),), (term.name,), (), Shape(), Shape(), q.shape[1])
        numbers = formulas.coefficients([1.0], [term.options.get("t", 0.0)], q)
        gradient = torch.empty_like(q)
        value, _ = formulas.rows(q, p, None, None, numbers, gradient, plan, Here())
        c = gradient[:, -1] / q[:, -1].exp()
        return value, c, tokens, (gradient[:, :-1] - c[:, None] * logs.exp()).masked_fill(~inside, 0.0)


def _with_tail(kept: Tensor) -> Tensor:
    """Append the logarithm of the mass that the kept log-probabilities leave, accurate at both ends (Maechler 2012)."""
    mass = torch.logsumexp(kept, dim=-1, keepdim=True).clamp(max=-torch.finfo(kept.dtype).eps)
    tail = torch.where(mass > -0.6931, torch.log(-torch.expm1(mass)), torch.log1p(-mass.exp()))
    return torch.cat([kept, tail], dim=-1)


class LogProbs:
    """Log-probabilities of given tokens, and the entropy (see `sweep.Results`)."""

    def __init__(self, ids: Tensor, shape: Shape, temperature: float, impl: str, merge: Merge):
        self.ids, self.shape, self.temperature, self.impl, self.merge = ids, shape, temperature, impl, merge

    def empty(self, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.empty(self.ids.shape, dtype=dtype, device=device), torch.empty(rows, dtype=dtype, device=device)

    def _student(self, z: Tensor, *, entropy: bool) -> _Student:
        return _Student(z, self.shape, self.temperature, self.impl, self.merge, entropy=entropy)

    def into(self, results: tuple[Tensor, ...]) -> RowPart:
        log_probs, entropy = results

        def fill(z, y, at, factors, grad):
            student = self._student(z, entropy=True)
            assert student.entropy is not None
            log_probs[at], entropy[at] = student.log_probs(self.ids[at]), student.entropy
            return z.new_zeros(len(z)), {}

        return fill

    def under(self, upstream: tuple[Tensor | None, ...]) -> RowPart:
        of_log_probs, of_entropy = upstream

        def fill(z, y, at, factors, grad):
            student = self._student(z, entropy=of_entropy is not None)
            ids = self.ids[at]
            wanted = z.new_zeros(ids.shape) if of_log_probs is None else of_log_probs[at]
            student.write(grad, -wanted.sum(-1), ids, wanted, None if of_entropy is None else of_entropy[at])
            return z.new_zeros(len(z)), {}

        return fill
