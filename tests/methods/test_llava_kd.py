"""LLaVA-KD: its terms are 0 where they must be, and look where they should."""

import pytest
import torch
from tiny_vlm import rendered, tiny_vlm
from torch.nn.functional import cosine_similarity, cross_entropy

from kdlm.data import ImageTextCollator
from kdlm.losses import CrossEntropy, ForwardKL, ReverseKL, correlation_distance, forward_kl, kept_rows
from kdlm.methods import LlavaKD, LlavaKDSection, Step
from kdlm.methods.llava_kd import by_image, visual_rows
from kdlm.models import Predictor
from kdlm.sandbox.vision_language import processor
from kdlm.signal import Hidden
from kdlm.teachers import LocalTeacher

STEP = Step(0, 10)
READS = processor(4)


def batch_of(count: int = 3, images: int = 2) -> dict[str, torch.Tensor]:
    batch = ImageTextCollator(READS, 200)(rendered(count, images=images))
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.fixture
def nets() -> dict:
    """A student, and a teacher that is wider and deeper."""
    student, teacher = tiny_vlm(1).double(), tiny_vlm(2, width=24, layers=2).double()
    return {"student": Predictor(student), "teacher": LocalTeacher(teacher)}


def parts(method: LlavaKD, nets: dict, batch: dict) -> dict[str, torch.Tensor]:
    return {name: term.sum for name, term in method.losses(nets, batch, frozenset(), STEP).terms.items()}


def hidden(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_relations_are_equal_for_a_student_turned_and_scaled(distance) -> None:
    teacher, there = hidden(3, 7, 12), torch.ones(3, 7, dtype=torch.bool)
    turn = torch.linalg.qr(hidden(12, 12))[0]
    torch.testing.assert_close(
        correlation_distance(1.7 * teacher @ turn, teacher, there, distance),
        torch.zeros(3, dtype=torch.float64),
        atol=1e-14,
        rtol=0,
    )
    assert (correlation_distance(hidden(3, 7, 5), teacher, there, distance) > 1e-3).all()


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_padding_of_an_image_is_inert(distance) -> None:
    student, teacher = hidden(2, 7, 12), hidden(2, 7, 9)
    there = torch.arange(7) < torch.tensor([[7], [4]])
    found = correlation_distance(student, teacher, there, distance)
    for image, size in enumerate((7, 4)):
        one = slice(image, image + 1)
        whole = torch.ones(1, size, dtype=torch.bool)
        alone = correlation_distance(student[one, :size], teacher[one, :size], whole, distance)
        torch.testing.assert_close(found[one], alone)


def test_the_relations_are_those_of_the_definition() -> None:
    student, teacher = hidden(1, 5, 4), hidden(1, 5, 6)
    ours, theirs = (cosine_similarity(x[0, :, None], x[0, None], dim=-1) for x in (student, teacher))
    there = torch.ones(1, 5, dtype=torch.bool)
    cosine = (ours * theirs).sum() / (ours.norm() * theirs.norm())
    torch.testing.assert_close(correlation_distance(student, teacher, there)[0], 1 - cosine)
    torch.testing.assert_close(correlation_distance(student, teacher, there, "mse")[0], (ours - theirs).square().mean())


def test_the_relations_send_no_gradient_to_the_teacher() -> None:
    student, teacher = hidden(1, 5, 4).requires_grad_(), hidden(1, 5, 4).requires_grad_()
    correlation_distance(student, teacher, torch.ones(1, 5, dtype=torch.bool)).sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


def test_every_term_is_0_where_the_student_is_the_teacher() -> None:
    model = tiny_vlm(1).double()
    nets = {"student": Predictor(model), "teacher": LocalTeacher(tiny_vlm(1).double())}
    for term in parts(LlavaKD([ForwardKL(), ReverseKL()]), nets, batch_of()).values():
        torch.testing.assert_close(term, torch.zeros_like(term), atol=1e-12, rtol=0)


def test_the_visual_term_is_the_divergence_at_every_image_token(nets) -> None:
    batch = batch_of()
    found = parts(LlavaKD([ForwardKL(weight=0.5), CrossEntropy()]), nets, batch)
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        student, teacher = (net(**inputs).logits for net in (nets["student"].module, nets["teacher"].model))
    seen = batch["visual"] >= 0
    torch.testing.assert_close(found["visual"], 0.5 * forward_kl(student[seen], teacher[seen]).sum())
    rows = kept_rows(batch["labels"])
    expected = 0.5 * forward_kl(rows.select(student), rows.select(teacher)).sum()
    expected = expected + cross_entropy(rows.select(student), rows.labels, reduction="sum")
    torch.testing.assert_close(found["token_loss"], expected)


def test_the_relation_is_summed_over_images_one_by_one(nets) -> None:
    batch = batch_of()
    found = parts(LlavaKD([ForwardKL()]), nets, batch)["relation"]
    rows = visual_rows(batch["visual"])
    ours, theirs = (nets[name](batch, rows) for name in ("student", "teacher"))
    assert isinstance(ours, Hidden) and isinstance(theirs, Hidden)
    image, whole = batch["visual"].flatten()[rows.index], torch.ones(1, 4, dtype=torch.bool)
    alone = [
        correlation_distance(ours.hidden[image == number][None], theirs.hidden[image == number][None], whole)
        for number in range(6)
    ]
    torch.testing.assert_close(found, torch.cat(alone).sum())
    counts = LlavaKD([ForwardKL()]).counts(batch)
    assert (counts["images"], counts["visual"]) == (6, 24)


def test_labels_and_text_leave_the_visual_terms_alone(nets) -> None:
    """They see what stands before and in an image: another answer to the same question changes nothing."""
    batch, method = batch_of(), LlavaKD([ForwardKL()])
    first = parts(method, nets, batch)
    other = {**batch, "labels": batch["labels"].clone(), "input_ids": batch["input_ids"].clone()}
    answers = batch["labels"] != -100
    other["input_ids"][answers] = other["labels"][answers] = 7
    second = parts(method, nets, other)
    torch.testing.assert_close(first["visual"], second["visual"])
    torch.testing.assert_close(first["relation"], second["relation"])
    assert not torch.isclose(first["token_loss"], second["token_loss"])


def test_terms_of_weight_0_are_not_computed(nets) -> None:
    assert set(parts(LlavaKD([ForwardKL()], visual=0.0, relation=0.0), nets, batch_of())) == {"token_loss"}


def test_a_batch_without_images_has_terms_that_are_0(nets) -> None:
    batch = {name: value for name, value in batch_of().items() if name != "pixel_values"}
    batch["visual"] = torch.full_like(batch["visual"], -1)
    found = parts(LlavaKD([ForwardKL()]), nets, batch)
    assert found["visual"] == found["relation"] == 0 and found["token_loss"] > 0
    assert LlavaKD([ForwardKL()]).counts(batch)["images"] == 0


def test_a_student_that_matches_closes_every_term(nets) -> None:
    batch, method = batch_of(), LlavaKD([ForwardKL()])
    optimizer = torch.optim.Adam(nets["student"].module.parameters(), lr=0.01)
    first = {name: value.item() for name, value in parts(method, nets, batch).items()}
    for _ in range(40):
        optimizer.zero_grad()
        torch.stack(list(parts(method, nets, batch).values())).sum().backward()
        optimizer.step()
    for name, value in parts(method, nets, batch).items():
        assert value < 0.5 * first[name], name


def test_relations_need_hidden_states(nets) -> None:
    nets["teacher"] = LocalTeacher(nets["teacher"].model, "dense")
    with pytest.raises(ValueError, match=r"method.relation: the teacher gives no hidden states"):
        parts(LlavaKD([ForwardKL()]), nets, batch_of())
    assert parts(LlavaKD([ForwardKL()], relation=0.0), nets, batch_of())["visual"].isfinite()


def test_images_of_different_sizes_are_padded_apart() -> None:
    states, there = by_image(hidden(5, 3), torch.tensor([0, 0, 0, 4, 4]))
    assert states.shape == (2, 3, 3) and there.tolist() == [[True, True, True], [True, True, False]]


def test_the_section_wants_a_loss_that_images_can_have() -> None:
    with pytest.raises(ValueError, match="compares distributions at images"):
        LlavaKDSection().build([CrossEntropy()], None)
    assert LlavaKDSection(visual=0.0).build([CrossEntropy()], None).visual == 0


def test_a_teacher_of_another_patch_is_asked_at_the_same_words(nets) -> None:
    """Its answers are those that it gives to its own reading alone, in the order of the labels."""
    rows, own = rendered(3, images=2), processor(2)
    teacher = LocalTeacher(tiny_vlm(2, width=24, patch=2))
    batch, theirs = ImageTextCollator(READS, 200, own)(rows), ImageTextCollator(own, 200)(rows)
    assert batch["input_ids"].shape[1] + 2 * 12 == theirs["input_ids"].shape[1]
    ours, alone = kept_rows(batch["labels"]), kept_rows(theirs["labels"])
    assert torch.equal(ours.labels, alone.labels)
    found, expected = teacher(batch, ours), teacher(theirs, alone)
    assert isinstance(found, Hidden) and isinstance(expected, Hidden)
    torch.testing.assert_close(found.hidden, expected.hidden)
    student = {"student": Predictor(tiny_vlm(1)), "teacher": teacher}
    answers = LlavaKD([ForwardKL()], visual=0.0, relation=0.0).losses(student, batch, frozenset(), STEP)
    assert answers.terms["token_loss"].sum > 0
    with pytest.raises(ValueError, match="the student reads an image as 4 tokens, the teacher as 16"):
        LlavaKD([ForwardKL()]).losses(student, batch, frozenset(), STEP)


def test_two_readings_of_equal_grids_are_matched_at_images_too() -> None:
    rows = rendered(3, images=2)
    batch = ImageTextCollator(READS, 200, processor(4))(rows)
    there = batch["attention_mask"].bool()
    places = torch.arange(there.numel()).view_as(there)
    assert torch.equal(batch["theirs"]["at"][there], places[there])
