"""KD-AIF: influence ranks rows as leaving them out does, and finds what is wrong among them."""

import json

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import cross_entropy

from kdlm.curation import Desk, Influence
from kdlm.curation.gradients import Sketch, curvature, influences, weights_of_influence
from kdlm.curation.rows import dataset_of
from kdlm.data import Collator
from kdlm.losses import count_kept, kept_rows
from kdlm.signal import Head, Hidden, weights_of
from kdlm.writers import LocalSection

VOCAB = 13


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_on_ridge_regression_it_ranks_rows_as_leaving_each_out_does():
    x, val = normal(400, 5), normal(40, 5, seed=1)
    truth, damping = normal(5, seed=2), 0.05
    y, val_y = x @ truth + 0.5 * normal(400, seed=3), val @ truth + 0.5 * normal(40, seed=4)

    def solved(there: torch.Tensor) -> torch.Tensor:
        kept = x * there[:, None]
        return torch.linalg.solve(kept.T @ x / 400 + damping * torch.eye(5, dtype=x.dtype), kept.T @ y / 400)

    def loss(theta: torch.Tensor) -> float:
        return float((val @ theta - val_y).square().mean() / 2)

    every = torch.ones(400, dtype=torch.float64)
    theta = solved(every)
    gradients = (x @ theta - y)[:, None] * x
    target = ((val @ theta - val_y)[:, None] * val).mean(0)
    found = influences(gradients, target, x.T @ x / 400 + damping * torch.eye(5, dtype=x.dtype))
    gone = [loss(solved(every.index_fill(0, torch.tensor(n), 0.0))) - loss(theta) for n in range(400)]
    assert spearmanr(-found, gone).statistic > 0.99  # a row that helps, I < 0, is missed


def test_rows_with_flipped_labels_get_the_lowest_weights():
    x, val = normal(100, 4), normal(50, 4, seed=1)
    truth = 3 * normal(4, seed=2)
    right, val_y = (x @ truth > 0).double(), (val @ truth > 0).double()
    far = (x @ truth).abs().topk(40).indices[::5]  # clear cases: a flipped one beside the border is hardly wrong
    y = right.index_copy(0, far, 1 - right[far])
    theta = torch.zeros(4, dtype=torch.float64)
    for _ in range(200):
        theta = theta - ((x @ theta).sigmoid() - y) @ x / 100 - 0.01 * theta
    gradients = ((x @ theta).sigmoid() - y)[:, None] * x
    target = (((val @ theta).sigmoid() - val_y)[:, None] * val).mean(0)
    weights = weights_of_influence(influences(gradients, target, curvature(gradients, 0.1)))
    assert set(weights.argsort()[: len(far)].tolist()) == set(far.tolist())


@pytest.mark.parametrize("shape", ["softplus", "linear"])
def test_weights_fall_with_the_influence_and_are_1_in_the_mean(shape):
    found = normal(50)
    weights = weights_of_influence(found, shape, 0.7)
    assert weights.mean() == pytest.approx(1) and (weights >= 0).all()
    ordered = weights[found.argsort()]
    assert (ordered.diff() <= 0).all() and ordered[0] > ordered[-1]
    torch.testing.assert_close(weights_of_influence(3 * found - 5, shape, 0.7), weights)


@pytest.mark.parametrize("shape", ["softplus", "linear"])
def test_equal_influences_or_strength_0_weigh_all_alike_which_is_plain_distillation(shape):
    for weights in (weights_of_influence(torch.full((7,), 0.3), shape), weights_of_influence(normal(7), shape, 0.0)):
        torch.testing.assert_close(weights, torch.ones_like(weights))


def signal_of(rows: int, width: int = 6) -> tuple[Hidden, torch.Tensor]:
    labels = torch.randint(0, VOCAB, (rows,), generator=torch.Generator().manual_seed(5))
    return Hidden(normal(rows, width).float(), Head(normal(VOCAB, width, seed=1).float())), labels


def test_a_sketch_that_is_large_enough_is_the_gradient_of_the_head():
    signal, labels = signal_of(9)
    found = Sketch(VOCAB, 6, 64).gradients(signal, labels, [4, 5])
    for at, row in ((slice(0, 4), found[0]), (slice(4, 9), found[1])):
        weight = signal.head.weight.clone().requires_grad_()
        (want,) = torch.autograd.grad(cross_entropy(signal.hidden[at] @ weight.T, labels[at]), weight)
        torch.testing.assert_close(row, want.flatten(), rtol=1e-5, atol=1e-6)


def test_a_small_sketch_keeps_inner_products_in_the_mean():
    signal, labels = signal_of(9)
    whole = Sketch(VOCAB, 6, 64).gradients(signal, labels, [4, 5])
    drawn = torch.stack([Sketch(VOCAB, 6, 3, seed).gradients(signal, labels, [4, 5]) for seed in range(2000)])
    products = torch.einsum("sap,sbp->sab", drawn, drawn)
    error = products.std(0) / 2000**0.5
    assert ((products.mean(0) - whole @ whole.T).abs() < 4 * error).all()


# A tiny task: a table of next tokens, taught by texts of which 30 % are corrupted


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = (torch.nn.Parameter(0.3 * normal(VOCAB, 6, seed=s)) for s in (8, 9))

    def signal(self, batch, rows):
        return Hidden(rows.select(self.embedding[batch["input_ids"]]), Head(self.head))

    def fit(self, batch, steps: int) -> "Student":
        optimiser = torch.optim.Adam(self.parameters(), lr=0.03)
        rows = kept_rows(batch["labels"], weights_of(batch))
        for _ in range(steps):
            signal = self.signal(batch, rows)
            nats = cross_entropy(signal.head.logits(signal.hidden), rows.labels, reduction="none")
            loss = rows.sum(nats) / count_kept(batch["labels"], weights_of(batch))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return self


def written(table: torch.Tensor, count: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (count, 1), generator=draw)
    for _ in range(12):
        ids = torch.cat([ids, torch.multinomial(table.softmax(-1)[ids[:, -1]], 1, generator=draw)], 1)
    return ids.tolist()


def batch_of(texts: list[list[int]], weights: torch.Tensor | None = None):
    given = [{} if weights is None else {"weight": float(weights[n])} for n in range(len(texts))]
    rows = [{"input_ids": ids, "labels": ids, **own} for ids, own in zip(texts, given, strict=True)]
    return Collator(0)(rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_30_percent_corrupted_answers_the_weighted_student_is_nearer_to_the_teacher(seed):
    teacher, wrong = 2 * normal(VOCAB, VOCAB, seed=20 + seed), 2 * normal(VOCAB, VOCAB, seed=30 + seed)
    texts = written(teacher, 84, seed) + written(wrong, 36, seed)
    clean = batch_of(written(teacher, 20, 50 + seed))
    warm = Student().fit(batch_of(texts), 60)

    def gradients(batch):
        with torch.no_grad():
            rows = kept_rows(batch["labels"])
            signal = warm.signal(batch, rows)
            return Sketch(VOCAB, 6, 64).gradients(signal, rows.labels, [12] * len(batch["labels"])).double()

    own = gradients(batch_of(texts))
    weights = weights_of_influence(influences(own, gradients(clean).mean(0), curvature(own, 0.1)), strength=3.0)
    assert weights[84:].mean() < 0.5 * weights[:84].mean()

    @torch.no_grad()
    def apart(student: Student) -> float:
        log_p, log_q = teacher.log_softmax(-1), (student.embedding @ student.head.T).log_softmax(-1)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    state = warm.state_dict()
    ends = []
    for given in (None, weights):
        student = Student()
        student.load_state_dict(state)
        ends.append(apart(student.fit(batch_of(texts, given), 150)))
    assert ends[1] < 0.9 * ends[0]


@pytest.fixture
def clean(tmp_path):
    rows = [{"prompt": f"x = {n}\n", "completion": f"y = {n + 1}\nprint(x + y)\n"} for n in range(6)]
    file = tmp_path / "clean.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, str(file)


def test_the_step_weighs_what_is_unlike_the_clean_rows_least_and_counts_what_it_cannot_read(clean):
    rows, path = clean
    wrong = [{"prompt": "x = 1\n", "completion": text} for text in (") ) ( = = :", "])]) import import")]
    desk = Desk({"student": LocalSection(path="sandbox:code-student-tiny")})
    step = Influence.model_validate({"by": "student", "validation": [{"path": path}], "size": 8})
    found = step.run(
        dataset_of([*rows, *wrong, {"prompt": "x", "completion": ""}, {"prompt": None, "completion": "y"}]), desk
    )
    desk.close()
    assert found.column_names == ["prompt", "completion", "influence", "weight"] and len(found) == 8
    weights = found["weight"][:]
    assert sum(weights) / 8 == pytest.approx(1) and max(weights[6:]) < min(weights[:6])
    assert desk.counts.kinds["row not read"].count == 2
    assert step.leaves(["prompt", "completion"]) == found.column_names


def test_a_writer_that_is_a_server_is_refused(clean):
    from kdlm.writers import OpenAISection

    desk = Desk({"student": OpenAISection(url="http://127.0.0.1:9", model="m")})
    step = Influence.model_validate({"by": "student", "validation": [{"path": clean[1]}]})
    with pytest.raises(ValueError, match=r"influence\.by: student gives no gradients"):
        step.run(dataset_of(clean[0]), desk)


def test_a_step_of_other_clean_rows_is_another_step(clean):
    rows, path = clean
    step = Influence.model_validate({"by": "student", "validation": [{"path": path}]})
    before = step.settings()
    assert step.settings() == before
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(rows[0]) + "\n")
    assert step.settings() != before, "the file has the same name and other rows"


def test_where_no_row_can_be_read_none_is_left(clean):
    desk = Desk({"student": LocalSection(path="sandbox:code-student-tiny")})
    step = Influence.model_validate({"by": "student", "validation": [{"path": clean[1]}], "size": 8})
    found = step.run(dataset_of([{"prompt": "x", "completion": ""}]), desk)
    desk.close()
    assert len(found) == 0 and "weight" in found.column_names
