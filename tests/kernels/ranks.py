"""One of two ranks that hold heads in pieces; started by torchrun for `test_sharding.py`, writes down what fails."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from kdlm_kernels import MEASURES, OPTIONS, Head, Term, linear_divergence, linear_logprobs, linear_topk_divergence
from kdlm_kernels import chunks as chunk_plans
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

FAILED: list[str] = []


@contextmanager
def case(name: str) -> Iterator[None]:
    """Go on after a failure: the next cases may say more."""

    try:
        yield
    except Exception:
        FAILED.append(f"{name}:\n{traceback.format_exc()}")


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --- slices of the vocabulary ---------------------------------------------------------------------------------------

CUT, STUDENT, TEACHER = 300, 700, 640
"""The second slices are longer than the first, and the student's is longer than the teacher's."""
SHARED, FEW = 600, 290
"""Compared ids: some of the second slice, and none of it."""
ROWS = 7
DIVERGENCES = [
    *((name, {"t": 0.3} if name == "taid_kl" else {}) for name in OPTIONS),
    ("alpha_mixture", {"alpha": 1.0}),
    ("alpha_mixture", {"alpha": 3.0, "share": 0.4}),
]
MIXED = [
    Term("forward_kl", 0.7, temperature=2.0),
    Term("reverse_kl", 0.2, temperature=2.0),
    Term("cross_entropy", 0.3),
    Term("generalised_jsd", 0.0),
    Term("taid_kl", 0.5, options={"t": torch.tensor(0.4)}),
]


class Slices:
    """Hidden states that all ranks share, both heads whole, and this rank's slices of them."""

    def __init__(self, rank: int, rows: int = ROWS):
        def normal(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.float64)

        torch.manual_seed(0)
        self.at = slice(0, CUT) if rank == 0 else slice(CUT, None)
        self.hidden, self.theirs = 2 * normal(rows, 5), 2 * normal(rows, 6)
        self.weight, self.bias, self.teacher = normal(STUDENT, 5), normal(STUDENT), normal(TEACHER, 6)
        self.labels = torch.tensor([0, -100, CUT - 1, CUT, TEACHER - 1, STUDENT - 1, 8] * (rows // ROWS))
        self.factors = torch.rand(rows, dtype=torch.float64) + 0.5

    def run(
        self, call: Callable, *, sliced: bool, factors: Tensor | None, **shape
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what `call` does, and the gradients of its results' sum to hidden states, head and bias."""
        at = self.at if sliced else slice(None)
        inputs = [x.clone().requires_grad_() for x in (self.hidden, self.weight[at], self.bias[at])]
        group = {"group": dist.group.WORLD} if sliced else {}
        found = call(inputs[0], Head(inputs[1], inputs[2], **shape), self.teacher[at], **group)
        found = [found] if isinstance(found, Tensor) else [*found]
        if isinstance(found[-1], dict):
            found[-1:] = found[-1].values()
        rows = [x if x.ndim == 1 else x.sum(1) for x in found if x.requires_grad]
        total = sum(row.sum() if factors is None else (row * factors).sum() for row in rows)
        return found, list(torch.autograd.grad(total, inputs))

    def compare(self, name: str, call: Callable, *, factors: Tensor | None = None, **shape) -> None:
        """Fail where slices and whole heads differ, in results or gradients."""
        with case(name):
            expected, (to_hidden, to_weight, to_bias) = self.run(call, sliced=False, factors=factors, **shape)
            found, gradients = self.run(call, sliced=True, factors=factors, **shape)
            elsewhere = [torch.empty_like(gradients[0]) for _ in range(dist.get_world_size())]
            dist.all_gather(elsewhere, gradients[0])  # before the first check, which may fail on one rank
            for ours, theirs in zip(found, expected, strict=True):
                same(ours, theirs)
            for ours, theirs in zip(gradients, (to_hidden, to_weight[self.at], to_bias[self.at]), strict=True):
                same(ours, theirs)
            assert torch.equal(*elsewhere)


def slices(rank: int) -> None:
    """`group=`: results and gradients are those of whole heads."""
    data = Slices(rank)
    topk = torch.stack([torch.randperm(STUDENT)[:4] for _ in range(ROWS)])
    topk[0] = torch.tensor([CUT - 1, CUT, STUDENT - 1, STUDENT + 3])  # the last one is beyond the vocabulary
    logs = torch.log_softmax(torch.randn(ROWS, 6, dtype=torch.float64), -1)[:, :4]
    counts = torch.tensor([[2.0, 1.0, 1.0, 0.0]] * ROWS)

    def divergence(**options) -> Callable:
        def call(hidden: Tensor, head: Head, teacher: Tensor, **group):
            return linear_divergence(
                hidden, head, data.theirs, teacher, labels=data.labels, chunk_rows=3, **options, **group
            )

        return call

    def sparse(function: Callable, ids: Tensor, *rest: Tensor, **options) -> Callable:
        def call(hidden: Tensor, head: Head, teacher: Tensor, **group):
            return function(hidden, head, ids, *rest, chunk_rows=3, **options, **group)

        return call

    for vocab in (SHARED, FEW):
        for name, options in DIVERGENCES:
            data.compare(f"{name} {options}, {vocab=}", divergence(divergence=name, vocab=vocab, **options))
    for vocab in (SHARED, CUT, FEW):
        call = divergence(divergence=MIXED, vocab=vocab, measures=MEASURES)
        data.compare(f"mixed, {vocab=}", call, logit_scale=0.7, softcap=3.0)
        data.compare(f"mixed, {vocab=}, gradient by row", call, factors=data.factors)
    call = divergence(divergence=MIXED, vocab=SHARED, measures=MEASURES, impl="triton")
    data.compare("mixed, triton", call, logit_scale=0.7, softcap=3.0)
    terms = [Term("adaptive_kl"), Term("alpha_mixture", options={"alpha": 0.0}), Term("skew_reverse_kl")]
    call = divergence(divergence=terms, vocab=FEW, impl="triton")
    data.compare(f"sums over the vocabulary, vocab={FEW}, triton", call)

    ids = topk.clamp(max=STUDENT - 1)
    watched = {"labels": data.labels, "measures": ["student_entropy", "accuracy"]}
    terms = [Term("forward_kl"), Term("cross_entropy", 0.2)]
    drawn = sparse(linear_topk_divergence, ids, None, counts, divergence=terms, **watched)
    data.compare("samples, gradient by row", drawn, factors=data.factors, logit_scale=0.7, softcap=3.0)
    terms = [Term("reverse_kl", 0.6), Term("total_variation"), Term("cross_entropy", 0.2)]
    for impl in ("torch", "triton"):
        compared = sparse(linear_topk_divergence, topk, logs, divergence=terms, impl=impl, **watched)
        data.compare(f"top-k, {impl}", compared)
        logprobs = sparse(linear_logprobs, ids, temperature=1.5, impl=impl)
        data.compare(f"log-probabilities, {impl}", logprobs, factors=data.factors, softcap=3.0)

    with case("slices of logits"):
        student, teacher = data.hidden @ data.weight.t(), data.theirs @ data.teacher.t()
        found = []
        for at, group in ((slice(None), {}), (data.at, {"group": dist.group.WORLD})):
            z = student[:, at].clone().requires_grad_()
            values = linear_divergence(z, None, teacher[:, at], vocab=SHARED, divergence="reverse_kl", **group)
            found.append((values, torch.autograd.grad(values.sum(), z)[0]))
        same(found[1][0], found[0][0])
        same(found[1][1], found[0][1][:, data.at])

    with case("the ranks take chunks of the same rows, whatever fits into the memory of each"):
        many = Slices(rank, rows=10 * ROWS)
        chunk_plans.LIMIT["cpu"] = 40 * 2 * 8 * CUT  # 40 rows on the first rank, fewer on the second
        found = linear_divergence(
            many.hidden, many.weight[many.at], many.theirs, many.teacher[many.at], vocab=SHARED, group=dist.group.WORLD
        )
        expected = linear_divergence(many.hidden, many.weight, many.theirs, many.teacher, vocab=SHARED)
        same(found, expected)

    refused(data)


def refused(data: Slices) -> None:
    """Fail where vocabularies that cannot be compared are not refused, on every rank."""
    theirs = data.teacher[data.at]
    elsewhere = data.teacher[: CUT - 9] if data.at.start == 0 else data.teacher[CUT - 9 :]
    for name, teacher, vocab, message in (
        ("slices that begin at different ids", elsewhere, None, "begin at the same ids"),
        ("vocabularies of different lengths", theirs, None, f"{STUDENT} ids and the teacher {TEACHER}: pass vocab="),
        ("vocab beyond the teacher's", theirs, TEACHER + 1, f"the teacher scores {TEACHER} ids"),
    ):
        with case(f"refused: {name}"):
            weight, group = data.weight[data.at], dist.group.WORLD
            try:
                linear_divergence(data.hidden, weight, data.theirs, teacher, vocab=vocab, group=group)
            except ValueError as error:
                assert message in str(error), error
            else:
                raise AssertionError("not refused")


# --- FSDP2 ----------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Tokens to hidden states, and a head; 11 ids do not divide by two ranks."""

    def __init__(self, seed: int, width: int, *, tied: bool = False):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.body = nn.Embedding(11, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 11)
        if tied:
            self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor, *, logits: bool) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(ids)))
        return self.head(hidden) if logits else hidden


def sharded(model: Tiny, mesh, *, head_alone: bool, reshard: bool | None) -> Tiny:
    if head_alone:
        fully_shard(model.head, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def fsdp2(rank: int) -> None:
    """DTensor heads outside of the forward of their module: the step is FSDP2's own."""
    for layout, options in {
        "head alone": {"head_alone": True, "reshard": None},
        "head in the root, gathered until backward": {"head_alone": False, "reshard": None},
        "head in the root, sharded again": {"head_alone": False, "reshard": True},
        "head tied to the embedding": {"head_alone": False, "reshard": True, "tied": True},
    }.items():
        for mesh in (
            init_device_mesh("cpu", (2,)),
            init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts")),
        ):
            with case(f"{layout}, {mesh.ndim} dimensions of the mesh"):
                same_step(rank, mesh, **options)


def same_step(rank: int, mesh, *, tied: bool = False, **options) -> None:
    """Fail where gradients, or what is gathered for them, are not those of logits that the model itself computes."""
    models = [sharded(Tiny(1, 5, tied=tied), mesh, **options) for _ in range(2)]
    teacher = sharded(Tiny(2, 6).requires_grad_(False), mesh, **options)
    torch.manual_seed(rank)  # every rank has its own rows
    count = 6
    for ids in torch.randint(11, (2, 3 + rank)):  # two steps add up
        p, q = teacher(ids, logits=True).log_softmax(-1), models[0](ids, logits=True).log_softmax(-1)
        ((p.exp() * (p - q)).sum() / count).backward()

        student, theirs = models[1](ids, logits=False), teacher(ids, logits=False)
        heads = [Head(model.head.weight, model.head.bias) for model in (models[1], teacher)]
        sharded_now = sum(isinstance(x, DTensor) for head in heads for x in head[:2])
        with CommDebugMode() as communication:
            values = linear_divergence(student, heads[0], theirs, heads[1], chunk_rows=2)
        if mesh.ndim == 1:  # where there are only copies, nothing is gathered
            assert communication.get_total_counts() == sharded_now
        with torch.no_grad():
            again = linear_divergence(student, heads[0], theirs, heads[1], chunk_rows=2)
        same(again, (p.exp() * (p - q)).sum(-1).detach())
        (values.sum() / count).backward()
    for (name, expected), found in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert isinstance(found.grad, DTensor) and found.grad.placements == found.placements, name
        same(found.grad.full_tensor(), expected.grad.full_tensor())
    assert all(x.grad is None for x in teacher.parameters())


# --- ZeRO-3 ---------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """A student whose loss is computed in the forward of the module around it."""

    def __init__(self, student: Tiny, teacher: Tiny):
        super().__init__()
        self.student, self.fixed = student, [teacher]  # the list hides the teacher from DeepSpeed

    def forward(self, ids: Tensor, factors: Tensor | None) -> Tensor:
        (teacher,) = self.fixed
        with torch.no_grad():
            theirs = teacher(ids, logits=False)
        heads = [Head(model.head.weight, model.head.bias) for model in (self.student, teacher)]
        values = linear_divergence(self.student(ids, logits=False), heads[0], theirs, heads[1], chunk_rows=2)
        return values.sum() if factors is None else (values * factors).sum()


def zero3(rank: int) -> None:
    """Partitions of DeepSpeed: frozen heads are gathered, a trained one where the module says so."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
    }
    trained = {**settings, "optimizer": {"type": "Adam", "params": {"lr": 0.0, "torch_adam": True}}}
    for factors in (None, torch.tensor([1.0, 0.5, 2.0])):
        with case(f"step, {factors=}"):
            plain = Loss(Tiny(1, 5).float(), Tiny(2, 6).float().requires_grad_(False))
            ids = torch.randint(11, (3,), generator=torch.Generator().manual_seed(rank))
            plain(ids, factors).backward()
            expected = {name: x.grad / 2 for name, x in plain.named_parameters()}
            for gradient in expected.values():
                dist.all_reduce(gradient)

            teacher = partitioned(Tiny(2, 6).float().requires_grad_(False), settings)
            loss = Loss(Tiny(1, 5).float(), teacher)
            for x in (loss.student.head.weight, loss.student.head.bias):
                deepspeed.zero.register_external_parameter(loss, x)
            engine = deepspeed.initialize(model=loss, model_parameters=loss.parameters(), config=trained)[0]
            value = engine(ids, factors)
            engine.backward(value)
            torch.testing.assert_close(value, plain(ids, factors))
            for name, x in loss.named_parameters():
                found = deepspeed.utils.safe_get_full_grad(x)
                torch.testing.assert_close(
                    found, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
            assert not loss.student.head.weight.numel() and not teacher.head.weight.numel()

            student = loss.student
            heads = [Head(model.head.weight, model.head.bias) for model in (student, teacher)]
            hidden, theirs = torch.randn(3, 5), torch.randn(3, 6)
            with torch.no_grad():
                found = linear_divergence(hidden, heads[0], theirs, heads[1])
                dense = [Head(x.head.weight, x.head.bias) for x in (plain.student, plain.fixed[0])]
                torch.testing.assert_close(found, linear_divergence(hidden, dense[0], theirs, dense[1]))
            try:
                linear_divergence(hidden, heads[0], theirs, heads[1])
            except ValueError as error:
                assert "register_external_parameter" in str(error)
            else:
                raise AssertionError("not refused")
    for factors in (torch.ones(3), torch.tensor([1.0, 0.5, 2.0])):
        with case(f"one frozen head for student and teacher, {factors=}"):
            plain = Tiny(2, 6).float().requires_grad_(False)
            model = partitioned(Tiny(2, 6).float().requires_grad_(False), settings)
            inputs, theirs = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
            found, expected = (
                torch.autograd.grad((linear_divergence(inputs, head, theirs, head) * factors).sum(), inputs)[0]
                for head in (Head(x.head.weight, x.head.bias) for x in (model, plain))
            )
            torch.testing.assert_close(found, expected)
            assert not model.head.weight.numel()


def partitioned(model: Tiny, settings: dict) -> Tiny:
    """Let DeepSpeed share out the parameters of a frozen model."""
    import deepspeed

    deepspeed.initialize(model=model, config=settings)
    assert not model.head.weight.numel()
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    folder, *parts = sys.argv[1:]
    for part in parts:
        {"slices": slices, "fsdp2": fsdp2, "zero3": zero3}[part](dist.get_rank())
        Path(folder, f"{part}.{dist.get_rank()}").write_text("\n".join(FAILED))
        FAILED.clear()
    dist.destroy_process_group()
