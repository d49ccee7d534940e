"""An ensemble of local models as the teacher of a run."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCAB, rows, tiny_model
from torch import nn

from kdlm import DistillTrainer, checkpoints
from kdlm.data import Collator
from kdlm.losses import JSD, CrossEntropy, ForwardKL, forward_kl, kept_rows, reverse_kl, weighted_sum
from kdlm.methods import LogitKD, Taid
from kdlm.progress import MetricsFile
from kdlm.signal import Dense, Hidden, Mixture, domain_id
from kdlm.teachers import ByDomain, Confidence, Ensemble, Learned, LocalTeacher

LENGTHS = [5, 11, 3, 17, 8, 2, 13, 9]
SPACES = ("probability", "log")


def with_bias(model):
    bare = model.lm_head
    model.lm_head = nn.Linear(bare.in_features, bare.out_features).to(bare.weight.dtype)
    model.lm_head.weight = bare.weight
    return model


def members(**second):
    return [
        LocalTeacher(tiny_model(2, hidden=24, layers=3).double()),
        LocalTeacher(with_bias(tiny_model(3, hidden=12, **second).double())),
    ]


def data(lengths=LENGTHS, seed=0):
    made = rows(lengths, seed)
    return [{**row, "domain": domain_id("ab"[number % 2])} for number, row in enumerate(made)]


def log_p(teacher, batch, kept):
    signal = teacher(batch, kept)
    return (signal.logits if isinstance(signal, Dense) else signal.head.logits(signal.hidden)).log_softmax(-1)


WEIGHTS = {"fixed": [0.7, 0.3], "by_domain": ByDomain(table={"a": [1, 0], "b": [0.4, 0.6]})}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_a_geometric_mean_of_local_models_is_one_head_over_all_hidden_states(weights, layout):
    both, batch = members(), Collator(0, layout)(data())
    kept = kept_rows(batch["labels"])
    ensemble = Ensemble(both, WEIGHTS[weights], space="log")
    signal = ensemble(batch, kept)
    assert ensemble.signals == {Hidden} == {type(signal)}
    assert signal.hidden.shape == (len(kept), 24 + 12 + 1)
    share = torch.tensor([0.7], dtype=torch.float64).expand(len(kept))
    if weights == "by_domain":
        sequence = torch.repeat_interleave(
            torch.arange(8), torch.tensor([(r["labels"][1:] != -100).sum() for r in arrays()])
        )
        share = torch.where(sequence % 2 == 0, 1.0, 0.4).double()
    first, second = (log_p(member, batch, kept) for member in both)
    expected = (share[:, None] * first + (1 - share[:, None]) * second).log_softmax(-1)
    torch.testing.assert_close(signal.head.logits(signal.hidden).log_softmax(-1), expected)
    assert signal.head is ensemble(batch, kept).head, "the heads are joined once"


def arrays():
    return [{"labels": torch.tensor(row["labels"])} for row in data()]


def test_what_is_not_linear_in_hidden_states_stays_a_mixture():
    both = members()
    assert Ensemble(both, Confidence(), space="log").signals == {Mixture}
    assert Ensemble(both, space="probability").signals == {Mixture}
    assert Ensemble([both[0], LocalTeacher(tiny_model(3).double(), "dense")], space="log").signals == {Mixture}


@pytest.mark.parametrize("space", SPACES)
def test_heads_padded_to_different_sizes_agree_on_the_smallest(space):
    first = tiny_model(2, hidden=24).double()
    wide = copy.deepcopy(first)
    wide.resize_token_embeddings(VOCAB + 16)
    batch = Collator(0)(data())
    kept = kept_rows(batch["labels"])
    ensemble = Ensemble([LocalTeacher(first), LocalTeacher(wide)], space=space)
    assert ensemble.vocab_size == VOCAB
    student = Dense(torch.randn(len(kept), VOCAB, dtype=torch.float64))
    terms = [("kl", forward_kl_of_labels, 1.0)]
    ours, _ = weighted_sum(terms, student, ensemble(batch, kept), kept.labels)
    plain, _ = weighted_sum(terms, student, LocalTeacher(first)(batch, kept), kept.labels)
    torch.testing.assert_close(ours, plain)


def forward_kl_of_labels(student, teacher, labels):
    return forward_kl(student, teacher)


class Average:
    """The ensemble by its definition, as logits of the whole vocabulary."""

    provides, signals, vocab_size = frozenset({"teacher"}), frozenset({Dense}), VOCAB

    def __init__(self, members, weights, space):
        self.members, self.weights, self.space = members, weights, space

    @torch.no_grad()
    def __call__(self, batch, kept):
        each = [log_p(member, batch, kept) for member in self.members]
        if self.space == "log":
            return Dense(sum(w * p for w, p in zip(self.weights, each, strict=True)))
        return Dense(sum(w * p.exp() for w, p in zip(self.weights, each, strict=True)).log())


METHODS = {
    "logit_kd": lambda: LogitKD([ForwardKL(temperature=2.0), JSD(weight=0.5), CrossEntropy(weight=0.1)]),
    "taid": Taid,
}


def trained(arguments, teacher, method="logit_kd", **options):
    trainer = DistillTrainer(
        tiny_model(1).double(),
        teacher,
        arguments(**options),
        method=METHODS[method](),
        train_dataset=data(),
        eval_dataset=data([4, 9, 6], seed=7),
        data_collator=Collator(0),
    )
    trainer.train()
    return trainer


def assert_same_weights(one, other, **tolerance):
    for (name, a), b in zip(one.student.named_parameters(), other.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", SPACES)
def test_a_step_towards_an_ensemble_is_the_step_towards_its_average(arguments, space, method):
    options = {"max_steps": 3, "per_device_train_batch_size": 4}
    ours = trained(arguments, Ensemble(members(), [0.7, 0.3], space=space), method, **options)
    expected = trained(arguments, Average(members(), [0.7, 0.3], space), method, **options)
    assert_same_weights(ours, expected, rtol=1e-6, atol=1e-9)
    here, there = ours.evaluate(), expected.evaluate()
    for name in ("eval_loss", "eval_kl_to_teacher", "eval_teacher_cross_entropy", "eval_top1_agreement"):
        assert here[name] == pytest.approx(there[name], rel=1e-6)


def test_micro_batches_are_inert_with_routed_teachers(arguments):
    runs = [
        trained(arguments, Ensemble(members(), WEIGHTS["by_domain"]), **options)
        for options in (
            {"per_device_train_batch_size": 8},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        )
    ]
    for other in runs[1:]:
        assert_same_weights(other, runs[0], rtol=1e-6, atol=1e-9)


class Moving(LocalTeacher):
    """Keeps its weights in a drawer: without them the model says nothing, as where they were on another device."""

    present = 0

    def __init__(self, model):
        super().__init__(model)
        self.drawer = {name: p.data for name, p in self.model.named_parameters()}
        self.here, self.most = True, 0

    def to(self, device):
        self.here = not self.here
        type(self).present += 1 if self.here else -1
        for name, p in self.model.named_parameters():
            p.data = self.drawer[name] if self.here else torch.full_like(self.drawer[name], torch.nan)
        return self

    def __call__(self, batch, kept):
        assert self.here and type(self).present == 1, "another member is on the device too"
        return super().__call__(batch, kept)


@pytest.mark.parametrize("space", SPACES)
def test_one_member_at_a_time_is_on_the_device_and_the_answer_is_the_same(space):
    batch = Collator(0)(data())
    kept = kept_rows(batch["labels"])
    both = [Moving(member.model) for member in members()]
    for member in both:
        member.to(torch.device("cpu"))  # away, where a recipe's members begin
    Moving.present = 0
    moving = Ensemble(both, [0.7, 0.3], space=space, resident="one")
    staying = Ensemble(members(), [0.7, 0.3], space=space)
    student = Dense(torch.randn(len(kept), VOCAB, dtype=torch.float64))
    terms = [("kl", lambda s, t, labels: reverse_kl(s, t), 1.0)]
    for _ in range(2):
        ours, _ = weighted_sum(terms, student, moving(batch, kept), kept.labels)
        assert Moving.present == 0
        torch.testing.assert_close(ours, weighted_sum(terms, student, staying(batch, kept), kept.labels)[0])


@pytest.mark.parametrize("space", SPACES)
def test_weights_are_learned_alike_wherever_the_members_live(space):
    found = []
    for resident in ("all", "one"):
        both = [Moving(member.model) for member in members()] if resident == "one" else members()
        ensemble = Ensemble(both, Learned(), space=space, resident=resident)
        if resident == "one":
            ensemble.to(torch.device("cpu"))
        Moving.present = 0
        batches = [Collator(0)(data([9, 4], seed)) for seed in (5, 6, 7)]
        ensemble.fit((batch, kept_rows(batch["labels"])) for batch in batches)
        found.append(ensemble.state_dict()["log_weights"])
    torch.testing.assert_close(*found)


def test_members_that_cannot_move_are_refused_where_one_is_to_be_resident():
    with pytest.raises(ValueError, match=r"resident: one: members\.1 cannot be moved"):
        Ensemble([*members()[:1], Average([], [], "log")], resident="one")


def learned(arguments, folder: Path, *, space="probability", resume=False, steps=6):
    trainer = DistillTrainer(
        tiny_model(1).double(),
        Ensemble(members(), Learned(), space=space),
        arguments(output_dir=str(folder), max_steps=steps, save_strategy="steps", save_steps=3, optim="adamw_torch"),
        train_dataset=data(),
        eval_dataset=data([4, 9, 6, 30, 25], seed=7),
        data_collator=Collator(0),
    )
    trainer.add_callback(MetricsFile(folder / "metrics.jsonl"))
    folder.mkdir(exist_ok=True)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer


@pytest.mark.parametrize("space", SPACES)
def test_learned_weights_are_fitted_once_logged_saved_and_taken_back_on_resume(arguments, tmp_path, space, monkeypatch):
    whole = learned(arguments, tmp_path / "whole", space=space)
    weights = whole.teacher.state_dict()["log_weights"]
    logged = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert (logged["step"], logged["teacher_weight/0"]) == (0, pytest.approx(weights.exp()[0].item()))
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "kdlm" / "teacher_state.safetensors")
    assert torch.equal(saved["log_weights"], weights)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")

    def fit(*args):
        raise AssertionError("a resumed run has its weights from the checkpoint")

    monkeypatch.setattr(Ensemble, "fit", fit)
    part = learned(arguments, tmp_path / "part", space=space, resume=True)
    assert torch.equal(part.teacher.state_dict()["log_weights"], weights)
    assert_same_weights(part, whole, rtol=0, atol=0)
    assert checkpoints.finished(tmp_path / "part")[-1].name == "checkpoint-6"


def test_learned_weights_do_not_depend_on_the_batches_of_the_fit_or_disturb_the_run(arguments, tmp_path):
    found = {}
    for size in (1, 4):
        trainer = DistillTrainer(
            tiny_model(1).double(),
            Ensemble(members(), Learned(positions=40)),
            arguments(output_dir=str(tmp_path / str(size)), per_device_eval_batch_size=size),
            train_dataset=data(),
            eval_dataset={"one": data([4, 9], seed=7), "two": data([6, 30, 25], seed=8)},
            data_collator=Collator(0),
        )
        before = torch.get_rng_state()
        trainer.fit_teacher()
        assert torch.equal(torch.get_rng_state(), before)
        found[size] = trainer.teacher.state_dict()["log_weights"]
    torch.testing.assert_close(found[1], found[4])


def test_learned_weights_need_evaluation_rows(arguments):
    trainer = DistillTrainer(
        tiny_model(1), Ensemble([LocalTeacher(tiny_model(2))], Learned()), arguments(), train_dataset=data()
    )
    with pytest.raises(ValueError, match="Ensemble is fitted on evaluation rows, and there are none"):
        trainer.train()
