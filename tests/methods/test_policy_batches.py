"""Methods on sampled tokens: how rollouts lie in batches must not show, and given text is not taken for drawn."""

import pytest
import torch
from tabular import COMPLETIONS, Table, batch_of, draw_table, gradient, run

from kdlm.losses import CrossEntropy
from kdlm.methods import MiniLLM, ReverseKLAdvantage, Step
from kdlm.signal import Dense, Head, Hidden

METHODS = {
    "reverse_kl_advantage": ReverseKLAdvantage,
    "prefix_weighting": lambda *losses: ReverseKLAdvantage(*losses, prefix_weighting=0.5),
    "minillm": MiniLLM,
    "minillm_sampled": lambda *losses: MiniLLM(*losses, single_step=False, discount=0.9, length_normalisation=False),
}
STEP = Step(0, 10)


@pytest.fixture(params=list(METHODS))
def make(request):
    return METHODS[request.param]


@pytest.fixture
def models():
    """Student, teacher, and whoever wrote the text."""
    return draw_table(1), draw_table(2), draw_table(3)


def test_padding_packing_order_and_the_split_into_micro_batches_do_not_show(make, models):
    student, teacher, writer = models
    texts = COMPLETIONS[::3]
    whole = run(make(), student, teacher, batch_of(texts, writer))
    expected = gradient(whole, student)
    assert expected.abs().max() > 1e-2
    ways = {
        "packed": [batch_of(texts, writer, packed=True)],
        "reversed": [batch_of(texts[::-1], writer, packed=True)],
        "one by one": [batch_of([text], writer) for text in texts],
        "uneven": [batch_of(texts[:5], writer), batch_of(texts[5:], writer, packed=True)],
    }
    for way, batches in ways.items():
        pieces = [run(make(), student, teacher, batch) for batch in batches]
        found = sum(gradient(piece, student) for piece in pieces)
        torch.testing.assert_close(found, expected, msg=lambda m, way=way: f"{way}: {m}")
        for name, (value, _) in whole.metrics.items():
            torch.testing.assert_close(sum(piece.metrics[name][0] for piece in pieces), value)


def test_hidden_states_in_chunks_give_what_logits_give(make, models):
    student, teacher, writer = models
    mapped = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]

    def as_hidden(logits, labels):
        return Hidden(logits @ mapped, Head(mapped))  # (z Q) Q^T = z

    batch = batch_of(COMPLETIONS, writer)
    expected = gradient(run(make(), student, teacher, batch), student)
    method = make()
    method.chunk_rows = 7
    through_heads = run(method, Table(student.logits, as_hidden), Table(teacher.logits, as_hidden), batch)
    torch.testing.assert_close(gradient(through_heads, student), expected)


def test_a_batch_without_rows_gives_the_names_of_any_other_and_a_gradient_of_0(make, models):
    student, teacher, writer = models
    batch = batch_of(COMPLETIONS[:2], writer)
    empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    some, none = (run(make(), student, teacher, one) for one in (batch, empty))
    assert none.terms.keys() == some.terms.keys() and none.metrics.keys() == some.metrics.keys()
    assert not gradient(none, student).any()


def test_given_text_is_learned_by_cross_entropy_and_drawn_text_by_reward(make, models):
    student, teacher, writer = models
    own, given = COMPLETIONS[::5], COMPLETIONS[1::7]
    together = batch_of([*own, *given], writer, packed=True)
    drawn = together["sequence"] < len(own)
    together["sampled"] &= drawn
    together["log_probs"] = together["log_probs"] * drawn
    method = make([CrossEntropy(weight=0.3)])
    assert method.text(STEP, 0.5) == "both" and make().text(STEP, 0.5) == "student"
    assert method.needs == make().needs | {"labels"} == {"teacher", "rollouts", "labels"}
    terms = run(method, student, teacher, together)
    alone = run(make(), student, teacher, batch_of(own, writer))
    text = sum(-student.log_probs(words).sum() for words in given)
    torch.testing.assert_close(terms.terms["cross_entropy"].sum, text)
    expected = gradient(alone, student) + 0.3 * torch.autograd.grad(text, student.logits)[0]
    torch.testing.assert_close(gradient(terms, student), expected)
    counts = method.counts(together)
    assert counts["sampled"] == sum(map(len, own)) and counts["given"] == sum(map(len, given))
    assert counts["tokens"] == counts["sampled"] + counts["given"]
    assert {term.unit for term in terms.terms.values()} == {"sampled", "given"} <= counts.keys()


def test_no_gradient_flows_through_advantages_or_weights(make, models):
    student, teacher, writer = models
    teacher.logits.requires_grad_()
    terms = run(make(), student, teacher, batch_of(COMPLETIONS, writer))
    total = sum(term.sum for term in terms.terms.values())
    assert torch.autograd.grad(total, teacher.logits, allow_unused=True)[0] is None
    assert all(not value.requires_grad for value, _ in terms.metrics.values())


def test_float32_students_and_engines_of_other_precision_meet(make, models):
    student, teacher, writer = models
    narrow = [Table(x.logits.detach().float().requires_grad_(), lambda z, labels: Dense(z)) for x in (student, teacher)]
    terms = run(make(), *narrow, batch_of(COMPLETIONS, writer))
    assert gradient(terms, narrow[0]).dtype == torch.float32
    wide = gradient(run(make(), student, teacher, batch_of(COMPLETIONS, writer)), student)
    torch.testing.assert_close(gradient(run(make(), *narrow, batch_of(COMPLETIONS, writer)), narrow[0]), wide.float())
