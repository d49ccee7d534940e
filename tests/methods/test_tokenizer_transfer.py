"""Tokenizer transfer: likelihoods of chunks, and hidden states wherever both have read the same text."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from kdlm.data import load_data
from kdlm.data.sections import DataSection
from kdlm.losses import CrossEntropy
from kdlm.methods import ALM, Step, TokenizerTransfer
from kdlm.methods.cross_tokenizer.tokenizer_transfer import state_distance
from kdlm.models import Predictor
from kdlm.models.retokenised import open_tokenizer, retokenise
from kdlm.models.token_rows import token_rows
from kdlm.spelling import Spelling
from kdlm.teachers import LocalTeacher

OLD, BYTES, UNIGRAM = (f"sandbox:code-tokenizer-{kind}" for kind in ("tiny", "bytes", "unigram-tiny"))
TEXTS = ["def add(a, b):\n    return a + b\n", "import os  # naïve 🙂\n", "for i in range(10):\n    print(i)\n"]
STEP = Step(0, 1)


def network(vocab_size: int = 512, width: int = 32, seed: int = 0):
    set_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "hidden_size": width}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).eval()


def batch_of(tmp_path, ours: str, theirs: str = OLD, count: int = 3):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:count]))
    section = DataSection.model_validate({"train": [{"path": str(file)}], "max_length": 64, "cache": str(tmp_path)})
    data = load_data(section, open_tokenizer(ours), open_tokenizer(theirs))
    return data.collator([data.train[i] for i in range(len(data.train))])  # pyright: ignore


def nets(student, teacher) -> dict:
    return {"student": Predictor(student), "teacher": LocalTeacher(teacher)}


@pytest.mark.parametrize("layers", [None, [[0, 0], [1, 1]]])
def test_a_model_agrees_with_itself(tmp_path, layers):
    batch = batch_of(tmp_path, OLD)
    terms = TokenizerTransfer(layers=layers).losses(nets(network(), network()), batch, frozenset(), STEP)
    assert terms.terms["hidden"].sum == 0
    other = TokenizerTransfer(layers=layers).losses(nets(network(seed=1), network()), batch, frozenset(), STEP)
    assert other.terms["hidden"].sum > 0.1


@pytest.mark.parametrize("given", [BYTES, UNIGRAM])
def test_states_are_compared_where_both_have_read_the_same_bytes(tmp_path, given):
    """What either has read there spells the same text; with bytes it is every boundary of the teacher's tokens."""
    batch = batch_of(tmp_path, given)
    ours, theirs = Spelling(open_tokenizer(given)), Spelling(open_tokenizer(OLD))
    readings = TokenizerTransfer().read(nets(retokenised(given), network()), batch)
    starts, their_starts = readings.starts()
    read = texts_up_to(batch, readings.rows, starts, ours)
    assert len(read) == batch["chunks"].max() + 1
    assert read == texts_up_to(batch["theirs"], readings.their_rows, their_starts, theirs)
    if given == BYTES:
        ends = [(row, end) for row, text in enumerate(TEXTS) for end in theirs.ends(theirs.ids(text))]
        assert read == [(row, TEXTS[row].encode()[:end]) for row, end in ends]


def texts_up_to(batch, rows, starts, spelling) -> list[tuple[int, bytes]]:
    length, found = batch["input_ids"].shape[1], []
    for place in rows.index[starts].tolist():
        row, position = divmod(place, length)
        spelt = spelling.text(batch["input_ids"][row, : position + 1].tolist())
        text = TEXTS[row].encode()
        found.append((row, spelt if text.startswith(spelt) else spelt[1:]))  # SentencePiece puts a space before it
    return found


def retokenised(given: str):
    tokenizer, model = open_tokenizer(given), network()
    return retokenise(model, token_rows(tokenizer, open_tokenizer(OLD), 512), tokenizer)


def test_the_states_are_the_last_ones_or_the_layers_that_are_named(tmp_path):
    batch, student, teacher = batch_of(tmp_path, BYTES), retokenised(BYTES), network(seed=1)
    last, first = (TokenizerTransfer(layers=layers) for layers in (None, [[0, 0]]))
    for method, number in ((last, -1), (first, 1)):
        value = method.losses(nets(student, teacher), batch, frozenset(), STEP).terms["hidden"].sum
        readings = method.read(nets(student, teacher), batch)
        starts, their_starts = readings.starts()
        ours = readings.rows.select(states(student, batch)[number])[starts]
        theirs = readings.their_rows.select(states(teacher, batch["theirs"])[number])[their_starts]
        torch.testing.assert_close(value, state_distance(ours, theirs).sum())


def states(model, batch) -> tuple[torch.Tensor, ...]:
    """Return the embeddings, what each layer but the last puts out, and the last states after the final norm."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return model(**inputs, output_hidden_states=True).hidden_states


def test_alm_and_cross_entropy_are_what_they_are_without_it(tmp_path):
    batch, both = batch_of(tmp_path, BYTES), nets(retokenised(BYTES), network())
    plain = ALM([CrossEntropy()]).losses(both, batch, frozenset(), STEP).terms
    terms = TokenizerTransfer([CrossEntropy()], hidden_weight=3.0).losses(both, batch, frozenset(), STEP).terms
    assert set(terms) == {*plain, "hidden"} and terms["hidden"].weight == 3.0
    for name in plain:
        assert torch.equal(plain[name].sum, terms[name].sum)


def test_no_gradient_reaches_the_teacher_and_padding_has_none(tmp_path):
    student, teacher = retokenised(BYTES), network(seed=1)

    def gradient(batch) -> list[torch.Tensor]:
        student.zero_grad()
        TokenizerTransfer().losses(nets(student, teacher), batch, frozenset(), STEP).terms["hidden"].sum.backward()
        return [parameter.grad.clone() for parameter in student.model.parameters()]

    whole, alone = batch_of(tmp_path, BYTES), batch_of(tmp_path, BYTES, count=1)
    assert whole["input_ids"].shape[1] > alone["input_ids"].shape[1]
    first = {key: value[:1] for key, value in whole.items() if isinstance(value, torch.Tensor)}
    first["theirs"] = {key: value[:1] for key, value in whole["theirs"].items()}
    for one, other in zip(gradient(alone), gradient(first), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_distance_is_relative_and_of_each_position_alone():
    teacher = torch.randn(5, 8)
    torch.testing.assert_close(state_distance(torch.zeros(5, 8), teacher), torch.ones(5))
    student = torch.randn(5, 8)
    torch.testing.assert_close(state_distance(3 * student, 3 * teacher), state_distance(student, teacher))
    torch.testing.assert_close(state_distance(student[:2], teacher[:2]), state_distance(student, teacher)[:2])


def test_a_teacher_of_another_width_is_refused(tmp_path):
    batch = batch_of(tmp_path, BYTES)
    with pytest.raises(ValueError, match="compares a model with itself: the student's states have 16 channels"):
        TokenizerTransfer().losses(nets(network(260, width=16), network()), batch, frozenset(), STEP)


def test_a_layer_that_there_is_not_is_named(tmp_path):
    both = nets(retokenised(BYTES), network())
    with pytest.raises(ValueError, match=r"method\.layers: the teacher has 2 layers, and no 2"):
        TokenizerTransfer(layers=[[0, 2]]).losses(both, batch_of(tmp_path, BYTES), frozenset(), STEP)


def test_layers_are_asked_of_a_teacher_that_has_them():
    assert "teacher.layers" in TokenizerTransfer(layers=[[0, 0]]).needs
    assert "teacher.layers" not in TokenizerTransfer().needs
