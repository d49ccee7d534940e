"""DSKD: what is compared in which space, who is trained by what, and attention that stays within a sequence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

from kdlm import DistillTrainer
from kdlm.data import Data, DataSection, load_data
from kdlm.losses import JSD, CrossEntropy, ForwardKL
from kdlm.methods import DSKD, DSKDSection, Step
from kdlm.methods.cross_tokenizer.dskd import cross_attention
from kdlm.models import Predictor
from kdlm.sandbox.tokenizer import train_tokenizer
from kdlm.teachers import LocalTeacher

STEP = Step(0, 10)
ROWS = [
    ("add two and three", "the answer is five, five"),
    ("name the fox", "the quick brown fox"),
    ("seven minus four", "three. the answer is three"),
    ("say hello", "hello to the whole wide world"),
    ("nothing", "no"),
]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> tuple[Any, Any]:
    """The student's and the teacher's, which cut the same text in other places."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, size, kind in (("ours", 260, "bytes"), ("theirs", 330, "bpe")):
        train_tokenizer([text for row in ROWS for text in row] * 3, size, folder / name, kind)
    return AutoTokenizer.from_pretrained(folder / "ours"), AutoTokenizer.from_pretrained(folder / "theirs")


@pytest.fixture
def read(tokenizers, tmp_path: Path):
    """Read the rows twice: `read(packing=..., same=True)` for two readings by one tokenizer."""

    def read(*, packing: str = "none", same: bool = False) -> Data:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS))
        section = DataSection(
            train=[{"path": str(file)}], max_length=64, packing=packing, cache=str(tmp_path / "cache")
        )
        ours, theirs = tokenizers
        return load_data(section, ours, ours if same else theirs)

    return read


def model(tokenizer: Any, seed: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).double()


@pytest.fixture
def networks(tokenizers):
    return model(tokenizers[0], 1, 8), model(tokenizers[1], 2, 12)


def nets_of(method: DSKD, student: Any, teacher: Any) -> dict[str, Any]:
    nets = {"student": Predictor(student), "teacher": LocalTeacher(teacher)}
    torch.manual_seed(3)
    projectors = method.roles["projectors"].make(nets["student"], nets["teacher"]).double()
    return nets | {"projectors": projectors}


def terms_of(method: DSKD, nets: dict[str, Any], batch: dict[str, Any]):
    return method.losses(nets, batch, frozenset(), STEP)


def moved(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_attention_sums_to_1_over_the_rows_of_the_same_sequence_and_is_0_elsewhere() -> None:
    lengths, theirs = [3, 0, 2], [2, 3, 4]
    every = torch.eye(9, dtype=torch.float64)
    weights, back = cross_attention(
        double(5, 6), double(9, 6), torch.eye(5, dtype=torch.float64), every, lengths, theirs
    )
    first, last = torch.zeros(9), torch.zeros(9)
    first[:2], last[5:] = 1, 1
    there = torch.stack([first] * 3 + [last] * 2).bool()
    assert (weights[there] > 0).all() and (weights[~there] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(back.sum(-1), torch.tensor([1, 1, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64))
    assert (back[:2, :3] > 0).all() and (back[:2, 3:] == 0).all() and (back[5:, :3] == 0).all()


def test_the_attention_has_the_gradient_of_its_values() -> None:
    def mixed(*tensors: torch.Tensor):
        return cross_attention(*tensors, [3, 1], [2, 2])

    assert torch.autograd.gradcheck(mixed, (double(4, 6), double(4, 6), double(4, 3), double(4, 5)))


@pytest.mark.parametrize("attention", [True, False])
def test_the_terms_are_those_of_the_definition(read, networks, tokenizers, attention: bool) -> None:
    """Everything over again on the whole logits of one sequence."""
    student, teacher = networks if attention else (networks[0], model(tokenizers[0], 2, 12))
    data = read(same=not attention)
    method = DSKD(attention=attention)
    nets = nets_of(method, student, teacher)
    batch = data.collator([data.train[0]])
    _teach(nets, batch, method, steps=20)  # some tokens are right, and some are not
    got = terms_of(method, nets, batch)
    bound, projectors = batch["theirs"], nets["projectors"]

    def said(model, one):
        kept = (one["labels"][0, 1:] != -100).nonzero()[:, 0]
        hidden = model.model(one["input_ids"]).last_hidden_state[0, kept]
        pair = [model.model.embed_tokens(one["input_ids"][0, kept + shift]).detach() for shift in (0, 1)]
        return hidden, pair, one["labels"][0, kept + 1]

    def divided(x):
        return x / x.std(-1, keepdim=True)

    h, pair, labels = said(student, batch)
    t, their_pair, _ = said(teacher, bound)
    if attention:
        scores = projectors["query"](torch.cat(pair, -1)) @ divided(torch.cat(their_pair, -1)).T / 24**0.5
        t2s = scores.softmax(1) @ projectors["t2s"](divided(t) + divided(their_pair[1]))
        s2t = scores.softmax(0).T @ projectors["s2t"](h)
    else:
        t2s, s2t = projectors["t2s"](t), projectors["s2t"](h)
    z_t2s, z_s2t = student.lm_head(t2s), teacher.lm_head(s2t)

    def divergence(z, target):
        z, target = (x.div(2).log_softmax(-1) for x in (z, target))
        return kl_div(z, target, reduction="none", log_target=True).sum(-1)

    right = z_t2s.argmax(-1) == labels
    there = divergence(student.lm_head(h), z_t2s)
    wanted = {
        "t2s_cross_entropy": cross_entropy(z_t2s, labels, reduction="sum"),
        "student_space": there[right].sum() if attention else there.sum(),
        "teacher_space": divergence(z_s2t, teacher.lm_head(t)).sum(),
    }
    torch.testing.assert_close({name: term.sum for name, term in got.terms.items()}, wanted)
    assert got.metrics["t2s_accuracy"][0] == right.sum() and 0 < right.sum() < len(right)


def test_identical_models_with_identity_projectors_have_nothing_to_learn(read, networks) -> None:
    student, data, method = networks[0], read(same=True), DSKD(attention=False, divergence=JSD())
    nets = nets_of(method, student, student)
    for projector in nets["projectors"].values():
        torch.nn.init.eye_(projector.weight)
        torch.nn.init.zeros_(projector.bias)
    terms = terms_of(method, nets, data.collator(list(data.train))).terms
    assert terms["t2s_cross_entropy"].sum > 1
    assert abs(terms["student_space"].sum) < 1e-12 and abs(terms["teacher_space"].sum) < 1e-12


def test_each_term_trains_whom_it_should(read, networks) -> None:
    (student, teacher), data, method = networks, read(), DSKD()
    nets = nets_of(method, student, teacher)
    projectors, batch = nets["projectors"], data.collator(list(data.train))
    sides = {side: {f"{side}.weight", f"{side}.bias"} for side in projectors}
    _teach(nets, batch, method)  # so that some tokens are right, without which the student's space is empty
    reached = {}
    for name in ("t2s_cross_entropy", "student_space", "teacher_space"):
        student.zero_grad(), projectors.zero_grad()
        terms_of(method, nets, batch).terms[name].sum.backward()
        assert not moved(teacher)
        reached[name] = moved(student), moved(projectors)
    # softmax does not see what is added to all of a row's scores: of a bias, backward attention does
    assert reached["t2s_cross_entropy"] == (set(), sides["t2s"] | sides["query"])
    ours, theirs = reached["student_space"]
    assert "lm_head.weight" in ours and "model.norm.weight" in ours and not theirs
    ours, theirs = reached["teacher_space"]
    assert "lm_head.weight" not in ours and "model.norm.weight" in ours
    assert theirs >= sides["s2t"] and not theirs & sides["t2s"]


def _teach(nets: dict[str, Any], batch: dict[str, Any], method: DSKD, steps: int = 60) -> None:
    optimiser = torch.optim.Adam(nets["projectors"].parameters(), lr=0.03)
    for _ in range(steps):
        optimiser.zero_grad()
        terms_of(method, nets, batch).terms["t2s_cross_entropy"].sum.backward()
        optimiser.step()


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "max_steps": 1, "learning_rate": 0.1,
        "per_device_train_batch_size": 5, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(**(defaults | options))


def trainer_of(data: Data, tokenizers, folder: Path, *, rows: Any = None, collator: Any = None, **options: Any):
    torch.manual_seed(4)
    run = DistillTrainer(
        model(tokenizers[0], 1, 8),
        model(tokenizers[1], 2, 12),
        arguments(folder, **options),
        method=DSKD([CrossEntropy(weight=0.5)], projector_learning_rate=0.1),
        train_dataset=data.train if rows is None else rows,
        data_collator=data.collator if collator is None else collator,
    )
    run.networks.double()
    return run


def weights(run: DistillTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.networks.role.named_parameters()}


def after_a_step(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
    run = trainer_of(*args, **options)
    run.train()
    return weights(run)


def test_the_step_does_not_depend_on_how_rows_are_cut_padded_or_packed(read, tokenizers, tmp_path: Path) -> None:
    data = read()
    whole = after_a_step(data, tokenizers, tmp_path)
    start = weights(trainer_of(data, tokenizers, tmp_path))
    assert min((whole[name] - start[name]).abs().max() for name in start if "query.bias" not in name) > 1e-6
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}
    uneven = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    packed = read(packing="pack")
    assert len(packed.train) < len(ROWS)
    wide = data.collator.__class__(
        *(type(one)(one.pad_id, pad_to_multiple_of=64) for one in (data.collator.ours, data.collator.theirs)),
        *tokenizers,
    )
    others = {
        "one by one": after_a_step(data, tokenizers, tmp_path, **small),
        "two by two": after_a_step(data, tokenizers, tmp_path, **uneven),
        "padded more": after_a_step(data, tokenizers, tmp_path, collator=wide),
        "padding free": after_a_step(data, tokenizers, tmp_path, collator=packed.collator),
        "packed": after_a_step(packed, tokenizers, tmp_path),
    }
    for how, other in others.items():
        for name, weight in whole.items():
            torch.testing.assert_close(
                other[name], weight, rtol=1e-7, atol=1e-9, msg=lambda m, n=name, h=how: f"{h}, {n}: {m}"
            )


def test_a_resumed_run_has_its_projectors_back_and_exports_none(read, tokenizers, tmp_path: Path) -> None:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}
    data = read()
    unbroken = trainer_of(data, tokenizers, tmp_path / "run", **options)
    unbroken.train()
    again = trainer_of(data, tokenizers, tmp_path / "run", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    torch.testing.assert_close(weights(again), weights(unbroken), rtol=0, atol=0)
    unbroken.save_model(str(tmp_path / "student"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert {name for name, _ in exported.named_parameters()} == {
        name for name, _ in unbroken.student.named_parameters()
    }


def test_the_projectors_have_a_learning_rate_of_their_own() -> None:
    assert DSKDSection().build([], None).roles["projectors"].learning_rate == 1e-3


def test_nothing_to_train_on_leaves_every_term_at_0_and_in_the_graph(read, networks) -> None:
    data, method = read(), DSKD([CrossEntropy()])
    nets, batch = nets_of(method, *networks), data.collator(list(data.train))
    for one in (batch, batch["theirs"]):
        one["labels"].fill_(-100)
    terms = terms_of(method, nets, batch).terms
    sum(term.sum for term in terms.values()).backward()
    assert all(term.sum == 0 for term in terms.values())
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in nets["projectors"].parameters())


def test_a_sequence_that_one_side_alone_is_trained_on_is_in_no_term(read, networks) -> None:
    data, method = read(), DSKD()
    nets, rows = nets_of(method, *networks), list(data.train)

    def values(rows, blank=()):
        batch = data.collator(rows)
        for side, row in blank:
            (batch if side == "ours" else batch["theirs"])["labels"][row] = -100
        return {name: term.sum for name, term in terms_of(method, nets, batch).terms.items()}

    alone = values(rows[:2])
    torch.testing.assert_close(values(rows[:4], [("ours", 2), ("theirs", 3)]), alone)


def test_two_tokenizers_without_attention_are_refused(read, networks) -> None:
    data, method = read(), DSKD(attention=False)
    with pytest.raises(ValueError, match="set attention: true"):
        terms_of(method, nets_of(method, *networks), data.collator(list(data.train)))


def test_a_teacher_that_gives_logits_only_is_refused(read, networks) -> None:
    data, method = read(), DSKD()
    nets = nets_of(method, *networks) | {"teacher": LocalTeacher(networks[1], "dense")}
    with pytest.raises(ValueError, match="the teacher gives none"):
        terms_of(method, nets, data.collator(list(data.train)))


def test_a_divergence_has_to_look_at_the_teacher() -> None:
    with pytest.raises(ValueError, match="looks at no teacher"):
        DSKDSection(divergence=CrossEntropy())


def test_the_weight_of_the_divergence_is_a_factor_in_both_spaces(read, networks) -> None:
    data, found = read(), []
    for weight in (1.0, 3.0):
        method = DSKD(divergence=ForwardKL(weight=weight))
        nets, batch = nets_of(method, *networks), data.collator(list(data.train))
        _teach(nets, batch, method)
        found.append({name: term.sum.item() for name, term in terms_of(method, nets, batch).terms.items()})
    one, three = found
    assert three == pytest.approx(one | {name: 3 * one[name] for name in ("student_space", "teacher_space")})


def test_a_bf16_student_has_fp32_projectors(read, networks) -> None:
    (student, teacher), data, method = networks, read(), DSKD()
    nets = nets_of(method, student.bfloat16(), teacher.bfloat16())
    nets["projectors"].float()
    terms = terms_of(method, nets, data.collator(list(data.train))).terms
    sum(term.sum for term in terms.values()).backward()
    assert {p.grad.dtype for p in nets["projectors"].parameters()} == {torch.float32}
    assert moved(nets["projectors"]) >= {"t2s.weight", "s2t.weight", "query.weight"} and moved(student)
