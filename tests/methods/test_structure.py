"""MiniLM and TinyBERT: what must hold, on causal and masked models, however a batch is laid out."""

from typing import Any

import pytest
import torch
from tiny_masked import texts, tiny_masked
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from kdlm.data import Collator
from kdlm.data.text_classes import ClassCollator
from kdlm.losses import Apart, ForwardKL, real_rows, relation_kl, score_mse
from kdlm.methods import MiniLM, Step, Term, TinyBERT
from kdlm.methods.structure.minilm import MiniLMSection
from kdlm.methods.structure.tinybert import TinyBERTSection
from kdlm.models import Ask, Inside, Predictor, view
from kdlm.teachers import AheadTeacher, LocalTeacher, freeze
from kdlm.trainer import DistillTrainer

STEP, ACTIVE = Step(3, 10, seed=3), frozenset({"student"})
LENGTHS = [6, 3, 9, 4]


def llama(seed: int, *, hidden: int = 16, heads: int = 4, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": heads}
    config: Any = {"vocab_size": 13, "num_key_value_heads": heads // 2, "initializer_range": 0.4, **sizes}
    return LlamaForCausalLM(LlamaConfig(**config)).double().eval()


def masked_lm(seed: int, *, hidden: int = 16, layers: int = 2) -> Any:
    return tiny_masked(seed, hidden=hidden, layers=layers)


def bert(seed: int, *, hidden: int = 16, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=13, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
                        intermediate_size=24, initializer_range=0.4, num_labels=3)  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


def nets(student: Any, teacher: Any, method: Any) -> dict[str, Any]:
    answering = freeze(teacher)
    asked = getattr(answering, "view", answering)
    made = {name: role.make(view(student), asked).double() for name, role in method.roles.items()
            if getattr(role, "make", None)}  # fmt: skip
    return {"student": view(student), "teacher": asked, **made}


def batch(rows: list[Any] | None = None, layout: Any = "padded") -> dict[str, Tensor]:
    return Collator(0, layout=layout)(rows or texts(LENGTHS, given=0))


def parts(method: Any, networks: Any, read: Any) -> dict[str, Tensor]:
    return {name: term.sum for name, term in method.losses(networks, read, ACTIVE, STEP).terms.items()}


def total(method: Any, networks: Any, batches: list[Any]) -> Tensor:
    """The loss of an optimiser step of these micro-batches."""
    whole = torch.zeros((), dtype=torch.float64)
    counts = [method.counts(one) for one in batches]
    for one in batches:
        terms: dict[str, Term] = method.losses(networks, one, ACTIVE, STEP).terms
        whole = whole + sum(t.weight * t.sum / sum(c[t.unit] for c in counts) for t in terms.values())
    return whole


METHODS = {
    "v2": lambda: MiniLM(relation_heads=4),
    "v1": lambda: MiniLM(relations=("qk", "vv")),
    "tinybert": lambda: TinyBERT(),
    "with losses": lambda: TinyBERT([ForwardKL()]),
}
MODELS = {"causal": llama, "masked": masked_lm}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Any:
    return METHODS[request.param]()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]


def test_identical_models_give_zero(method: Any, model: Any) -> None:
    """The maps begin as the identity, the widths being equal."""
    found = parts(method, nets(model(1), model(1), method), batch())
    assert len(found) >= 2
    for name, value in found.items():
        assert abs(value.item()) < 1e-9, name
    other = parts(method, nets(model(1), model(2), method), batch())
    assert all(value > 1e-3 for value in other.values())


def test_the_loss_does_not_depend_on_micro_batches_padding_or_packing(method: Any, model: Any) -> None:
    rows = texts(LENGTHS, given=0)
    networks = nets(model(1), model(2), method)
    whole = total(method, networks, [batch(rows)])
    wide = Collator(0, pad_to_multiple_of=16)(rows)
    for cut in ([batch(rows, "padding_free")], [batch(rows[:1]), batch(rows[1:], "padding_free")], [wide]):
        torch.testing.assert_close(total(method, networks, cut), whole, rtol=1e-9, atol=1e-12)


def test_padded_tokens_change_nothing(model: Any) -> None:
    read = batch()
    other = {**read, "input_ids": torch.where(read["attention_mask"].bool(), read["input_ids"], 5)}
    for make in METHODS.values():
        method = make()
        networks = nets(model(1), model(2), method)
        assert total(method, networks, [read]) == total(method, networks, [other])


def test_gradients_reach_the_compared_layers_and_no_further() -> None:
    for method in (MiniLM(layers=(0, -1), relation_heads=4), TinyBERT(layers=[(0, 1)])):
        student = llama(1, layers=3)
        networks = nets(student, llama(2), method)
        total(method, networks, [batch()]).backward()
        reached = [layer.self_attn.q_proj.weight.grad is not None for layer in student.model.layers]
        assert reached == [True, False, False]
        assert student.lm_head.weight.grad is None
        assert not any(p.grad is not None for p in networks["teacher"].model.parameters())
        assert method.leaves_unused


def test_a_student_of_other_width_and_heads_is_compared() -> None:
    """v2 asks for no head count; v1 and TinyBERT's scores do, and say so."""
    narrow, teacher = llama(1, hidden=8, heads=2), llama(2)
    method = MiniLM(relation_heads=2)
    assert total(method, nets(narrow, teacher, method), [batch()]) > 0
    with pytest.raises(ValueError, match=r"the student has 2 heads, the teacher 4: set method\.relation_heads"):
        one = MiniLM(relations=("qk",))
        total(one, nets(narrow, teacher, one), [batch()])
    with pytest.raises(ValueError, match=r"method\.attention: the student has 2 heads, the teacher 4"):
        two = TinyBERT()
        total(two, nets(narrow, teacher, two), [batch()])
    three = TinyBERT(attention=0.0)
    assert set(parts(three, nets(narrow, teacher, three), batch())) == {"hidden", "embeddings"}
    with pytest.raises(ValueError, match="cannot be split into 3 heads"):
        four = MiniLM(relation_heads=3)
        total(four, nets(narrow, teacher, four), [batch()])


def test_relations_do_not_change_when_a_head_is_turned(model: Any) -> None:
    """Both sides of a relation turned alike: an orthogonal matrix within each head cancels."""
    method = MiniLM(relation_heads=4)
    turned, teacher = model(1), model(2)
    attention = turned.model.layers[-1].self_attn
    before = total(method, nets(turned, teacher, method), [batch()]).item()
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        size = projection.weight.shape[0] // 4
        turn = torch.linalg.qr(torch.randn(4, size, size, dtype=torch.float64))[0]
        turned_weight = torch.einsum("hij,hjw->hiw", turn, projection.weight.unflatten(0, (4, size)))
        projection.weight.data.copy_(turned_weight.flatten(0, 1))
    assert total(method, nets(turned, teacher, method), [batch()]).item() == pytest.approx(before, rel=1e-9)


def test_scores_of_rotary_models_know_how_far_apart_tokens_are(model: Any) -> None:
    """The teacher again, but for places twice as far apart: the same tokens, queries and keys, and other scores."""
    for method in (TinyBERT(layers=[(0, 0)], hidden=0.0, embeddings=0.0), MiniLM(layers=(0, 0), relations=("qk",))):
        networks, read = nets(model(1), model(1), method), batch()
        assert all(abs(value) < 1e-9 for value in parts(method, networks, read).values())
        networks["teacher"].model.model.rotary_emb.inv_freq.mul_(2)
        assert all(value > 1e-3 for value in parts(method, networks, read).values())


def test_hidden_states_are_compared_by_direction_not_by_how_large_they_are() -> None:
    """Models that normalise only what their layers read leave tokens of very different size."""
    method = TinyBERT(attention=0.0)
    networks, read = nets(llama(1), llama(2), method), batch()
    before = parts(method, networks, read)
    rows = real_rows(read)
    ours, theirs = (networks[name].inside(read, rows, Ask(layers=(0, 1), embeddings=True))[1] for name in
                    ("student", "teacher"))  # fmt: skip
    scales = torch.rand(len(rows), 1, dtype=torch.float64) * 100 + 1
    louder = Inside([scales * one for one in theirs.hidden], [], scales * theirs.embeddings)
    found = method.compared_inside(networks, read, rows, ours, louder)
    for name, (values, _) in found.items():
        torch.testing.assert_close(values.sum(), before[name], rtol=1e-4, atol=1e-4)


def heads(seed: int, size: int, sequences: int = 2, length: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, 3, length, size)
    return (torch.randn(shape, generator=generator, dtype=torch.float64),
            torch.randn(shape, generator=generator, dtype=torch.float64))  # fmt: skip


REAL = torch.tensor([[True] * 4, [True, True, False, False]])


@pytest.mark.parametrize("compare", [relation_kl, score_mse])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_right_also_when_heads_are_taken_some_at_a_time(compare: Any, causal: bool) -> None:
    x, y = (one.requires_grad_() for one in heads(0, 3))
    teacher = heads(1, 5)

    def value(x: Tensor, y: Tensor, at_once: int) -> Tensor:
        return compare((x, y), teacher, REAL, causal=causal, at_once=at_once)

    torch.testing.assert_close(value(x, y, 2**24), value(x, y, 40))
    assert torch.autograd.gradcheck(lambda x, y: value(x, y, 2**24), (x, y))
    assert torch.autograd.gradcheck(lambda x, y: value(x, y, 40), (x, y))


def test_the_relations_are_the_papers_formula() -> None:
    (x, y), (their_x, their_y) = heads(0, 3, sequences=1), heads(1, 5, sequences=1)
    p, q = ((a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) for a, b in ((their_x, their_y), (x, y)))
    expected = (p * (p / q).log()).sum(-1).mean(1)
    found = relation_kl((x, y), (their_x, their_y), torch.ones(1, 4, dtype=torch.bool), causal=False)
    torch.testing.assert_close(found, expected)
    scores = [a @ b.mT / a.shape[-1] ** 0.5 for a, b in ((x, y), (their_x, their_y))]
    error = score_mse((x, y), (their_x, their_y), torch.ones(1, 4, dtype=torch.bool), causal=False)
    torch.testing.assert_close(error, (scores[0] - scores[1]).square().mean((1, 3)))


def test_rows_are_laid_out_by_sequences_and_come_back() -> None:
    for layout in ("padded", "padding_free"):
        read = batch(layout=layout)
        rows = real_rows(read)
        apart = Apart.of(read, rows)
        assert apart.real.sum(-1).tolist() == LENGTHS
        x = torch.arange(len(rows), dtype=torch.float64)[:, None]
        assert torch.equal(apart.rows(apart.heads(x, 1)[:, 0, :, 0]), x[:, 0])


def test_a_teacher_without_losses_stops_below_its_last_layers() -> None:
    teacher, method = llama(2, layers=3), MiniLM(layers=(-1, 0), relation_heads=4)
    run: list[int] = []
    networks = nets(llama(1), teacher, method)
    for number, layer in enumerate(teacher.model.layers):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    parts(method, networks, batch())
    assert run == [0]


def test_a_classifier_learns_the_inside_of_a_masked_model_and_no_label_reaches_it() -> None:
    """ERNIE-Tiny's stages before the last: latent losses alone, whatever the labels are."""
    method = TinyBERT(attention=0.0)
    student, read = bert(1), batch()
    networks = nets(student, masked_lm(2), method)
    losses = []
    for labels in (read["labels"], read["labels"].roll(1, 1)):
        losses.append(total(method, networks, [{**read, "labels": labels}]))
    assert losses[0] == losses[1]
    losses[0].backward()
    assert student.classifier.weight.grad is None
    classes = {**read, "labels": torch.tensor([0, 1, 2, 1])}
    assert set(parts(method, networks, classes)) == {"hidden", "embeddings"}
    with pytest.raises(ValueError, match="do not predict the same"):
        parts(TinyBERT([ForwardKL()], attention=0.0), networks, classes)


def test_losses_of_a_classifier_on_texts_without_classes_are_not_left_out_in_silence() -> None:
    method = TinyBERT([ForwardKL()], attention=0.0)
    with pytest.raises(ValueError, match="the student tells classes, and these texts have none"):
        parts(method, nets(bert(1), masked_lm(2), method), batch())


@pytest.mark.parametrize("placed", [{"sliced": True}, {"batch_size": 2}])
def test_a_teacher_that_answers_ahead_is_asked_about_texts_with_classes_too(tmp_path: Any, placed: Any) -> None:
    from transformers import TrainingArguments

    rows = [
        {"input_ids": row["input_ids"], "labels": number % 3, "index": number}
        for number, row in enumerate(texts(LENGTHS, given=0))
    ]
    ended = []
    for teacher in (LocalTeacher(masked_lm(2).float()), AheadTeacher(masked_lm(2).float(), **placed)):
        args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", seed=1,
                                 disable_tqdm=True, save_strategy="no", per_device_train_batch_size=2)  # fmt: skip
        trainer = DistillTrainer(bert(1).float(), teacher, args, method=TinyBERT(attention=0.0),
                                 train_dataset=rows, data_collator=ClassCollator(0))  # fmt: skip
        trainer.train()
        ended.append(trainer.student.bert.encoder.layer[1].output.dense.weight)
    assert torch.equal(*ended)


def test_texts_of_a_padding_free_batch_do_not_see_each_other_in_a_classifier() -> None:
    """transformers keeps them apart by their positions in causal models alone."""
    method = TinyBERT()
    networks = nets(bert(1), masked_lm(2, hidden=16), method) | {"teacher": freeze(bert(2)).view}
    whole = total(method, networks, [batch()])
    torch.testing.assert_close(total(method, networks, [batch(layout="padding_free")]), whole, rtol=1e-9, atol=1e-12)


def test_a_classifier_learns_classes_beside_the_inside_and_is_judged() -> None:
    method = TinyBERT([ForwardKL()])
    networks = nets(bert(1), bert(2), method)
    read = {**batch(), "labels": torch.tensor([0, 1, 2, -100])}
    found = method.losses(networks, read, ACTIVE, STEP)
    assert {name: term.unit for name, term in found.terms.items()} == {
        "hidden": "positions", "embeddings": "positions", "attention": "positions", "teacher_loss": "texts"
    }  # fmt: skip
    assert method.counts(read)["positions"] == sum(LENGTHS)
    judged = method.evaluate(networks, read, STEP).metrics
    assert {"accuracy", "kl_to_teacher", "agreement", "hidden"} <= judged.keys()


def test_models_of_two_directions_are_refused() -> None:
    method = MiniLM(relation_heads=2)
    with pytest.raises(ValueError, match="sees only what is before"):
        parts(method, nets(llama(1), masked_lm(2), method), batch())


def test_what_does_not_fit_is_said_by_its_key() -> None:
    with pytest.raises(ValueError, match="nothing is compared"):
        TinyBERTSection(attention=0, hidden=0, embeddings=0)
    assert MiniLMSection(relations=["qk", "vv"]).build([], None).relations == ["qk", "vv"]
    method = MiniLM(layers=(5, -1))
    with pytest.raises(ValueError, match=r"method\.layers: 5 is out of range: the student has 2 layers"):
        parts(method, nets(llama(1), llama(2), method), batch())
    two = TinyBERT(layers=[(0, 4)])
    with pytest.raises(ValueError, match=r"method\.layers: \[0, 4\] is out of range"):
        two.mapped(Predictor(llama(1)), LocalTeacher(llama(2)))


def test_the_trainer_takes_both_kinds_of_student(tmp_path: Any) -> None:
    from transformers import TrainingArguments

    rows = texts(LENGTHS, given=0)
    for number, make in enumerate((llama, masked_lm)):
        args = TrainingArguments(output_dir=str(tmp_path / str(number)), max_steps=2, use_cpu=True, report_to="none",
                                 disable_tqdm=True, save_strategy="no", per_device_train_batch_size=2)  # fmt: skip
        method = TinyBERT([ForwardKL()])
        trainer = DistillTrainer(make(1).float(), make(2).float(), args, method=method, train_dataset=rows,
                                 eval_dataset=rows)  # fmt: skip
        trainer.train()
        assert trainer.evaluate()["eval_kl_to_teacher"] > 0
        assert "projectors" in trainer.networks.auxiliary()


def test_autocast_rounds_what_is_compared_and_not_the_comparison() -> None:
    """Heads and states that differ by less than bfloat16 tells apart are compared as in float32."""
    x, y = (one.float() for one in heads(0, 64))
    near = tuple((one * (1 + 1e-3 * torch.randn(one.shape))) for one in (x, y))
    for compare in (relation_kl, score_mse):
        exact = compare((x, y), near, REAL, causal=True)
        with torch.autocast("cpu", torch.bfloat16):
            found = compare((x, y), near, REAL, causal=True)
        torch.testing.assert_close(found, exact)
    method, rows = TinyBERT(attention=0.0, embeddings=0.0), batch()
    networks = nets(llama(1), llama(1), method)
    with torch.autocast("cpu", torch.bfloat16):
        found = parts(method, {**networks, "projectors": networks["projectors"].float()}, rows)["hidden"]
    assert found.dtype == torch.float32
