"""A teacher that answers a step's micro-batches in one turn says what it says when it is asked one by one."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdlm.data import Collator
from kdlm.losses import kept_rows, real_rows
from kdlm.models import Ask
from kdlm.signal import Hidden, Rows
from kdlm.teachers import AheadTeacher, LocalTeacher
from kdlm.teachers.local import SandboxTeacherSection
from kdlm.teachers.placement import Shelf, own_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)).double()


def batches(layout="padded", lengths=((5, 11, 3), (17, 8, 2), (13, 9), (4,))):
    generator = torch.Generator().manual_seed(1)
    made = []
    for group in lengths:
        rows = []
        for length in group:
            ids = torch.randint(1, 61, (length,), generator=generator)
            labels = torch.where(torch.rand(length, generator=generator) < 0.3, -100, ids)
            rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        made.append(Collator(0, layout=layout)(rows))
    return made


def copied(batch):
    return {key: value.clone() for key, value in batch.items()}


def announced(model, step, **options):
    teacher = AheadTeacher(model, **options).to(CPU)
    teacher.answer_ahead([(batch, kept_rows(batch["labels"])) for batch in step])
    return teacher


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("size", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("signal", ["hidden", "dense"])
def test_answers_ahead_are_those_of_a_teacher_asked_one_by_one(model, layout, size, signal):
    step, plain = batches(layout), LocalTeacher(model, signal)
    teacher = announced(model, step, sliced=True, batch_size=size, signal=signal)
    assert teacher.turns == 1
    for batch in step:
        rows = kept_rows(batch["labels"])
        ours, theirs = teacher(copied(batch), rows), plain(batch, rows)
        ours, theirs = ((s.hidden if isinstance(s, Hidden) else s.logits) for s in (ours, theirs))
        if size is None:
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert teacher.turns == 1


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("size", [None, 3])
def test_what_was_not_foreseen_is_answered_all_the_same_and_foreseen_in_the_next_step(model, layout, size):
    step, plain = batches(layout), LocalTeacher(model)
    teacher = announced(model, step, sliced=True, batch_size=size)
    for _ in range(2):
        before = teacher.turns
        for batch in step:
            kept = kept_rows(batch["labels"])
            for rows in (kept, real_rows(batch), kept.take(torch.tensor([0]))):
                signal, hidden = teacher.with_layers(batch, rows, [1, 0])
                true, theirs = plain.with_layers(batch, rows, [1, 0])
                torch.testing.assert_close(signal.hidden, true.hidden, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(hidden, theirs, rtol=1e-12, atol=1e-12)
        assert teacher.turns - before <= 2  # for layers, then for rows; nothing in the second step
        teacher.answer_ahead([(batch, kept_rows(batch["labels"])) for batch in step])
    assert teacher.turns == before + 1


def test_a_step_that_asks_nothing_has_nothing_made_ahead_after_it(model):
    step = batches()
    teacher = announced(model, step, sliced=True)
    for _ in range(3):
        teacher.answer_ahead([(batch, kept_rows(batch["labels"])) for batch in step])
    assert teacher.turns == 1  # the first time, when it was not known yet
    for batch in step:
        teacher(batch, kept_rows(batch["labels"]))
    assert teacher.turns == 2


@pytest.mark.parametrize("size", [None, 2])
def test_rows_in_any_order_padding_and_other_texts_are_answered(model, size):
    step, plain = batches(), LocalTeacher(model)
    teacher = announced(model, step, batch_size=size)
    changed = copied(step[1]) | {"input_ids": step[1]["input_ids"].roll(1, 1)}
    for batch, index in ((step[1], [9, 2, 40]), (step[1], [33, 50]), (changed, [41, 0])):
        rows = Rows(torch.tensor(index), torch.tensor(index))
        asked = plain(batch, rows).hidden
        torch.testing.assert_close(teacher(batch, rows).hidden, asked, rtol=1e-12, atol=1e-12)


def test_a_batch_without_rows_gets_an_empty_answer(model):
    step = batches()
    step[1]["labels"] = torch.full_like(step[1]["labels"], -100)
    teacher = announced(model, step, batch_size=2)
    assert teacher(step[1], kept_rows(step[1]["labels"])).hidden.shape == (0, 16)
    assert len(teacher(step[2], kept_rows(step[2]["labels"])).hidden)


def test_a_reading_of_the_teachers_own_is_what_it_answers(model):
    """A batch with `theirs`: as where the teacher is told more than the student."""
    (batch,) = batches(lengths=((5, 7),))
    own = torch.cat([torch.full((2, 3), 7), batch["input_ids"]], 1)
    at = torch.arange(20).view(2, 10)[:, 3:]
    batch |= {"theirs": {"input_ids": own, "attention_mask": torch.ones_like(own), "at": at}}
    rows, plain = kept_rows(batch["labels"]), LocalTeacher(model)
    teacher = announced(model, [batch], sliced=True, batch_size=1)
    torch.testing.assert_close(teacher(batch, rows).hidden, plain(batch, rows).hidden, rtol=1e-12, atol=1e-12)
    assert teacher.turns == 1


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("signal", ["hidden", "dense"])
def test_the_inside_is_read_so_many_sequences_at_a_time_and_is_that_of_the_whole_batch(model, layout, size, signal):
    ask = Ask(layers=(1, 0), attention=(1,), embeddings=True)
    teacher, plain = AheadTeacher(model, signal, sliced=True, batch_size=size).to(CPU), LocalTeacher(model, signal)
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, options: read.append(options["input_ids"].shape), with_kwargs=True
    )
    for batch in batches(layout):
        rows, kept = real_rows(batch), kept_rows(batch["labels"])
        turned = rows.take(torch.arange(len(rows)).flip(0)), kept.take(torch.tensor([1, 0]))
        for positions, heard in ((rows, None), (rows, kept), turned):
            ours, theirs = (one.inside(batch, positions, ask, heard) for one in (teacher, plain))
            torch.testing.assert_close(tensors(*ours), tensors(*theirs), rtol=1e-12, atol=1e-12)
    hook.remove()
    assert size == 100 or len(read) > 2 * 3 * len(batches(layout))  # more readings than the whole ones of both


def tensors(signal, inside):
    """Return all that an answer holds."""
    said = [] if signal is None else [signal.hidden if isinstance(signal, Hidden) else signal.logits]
    attention = [part for one in inside.attention for part in (one.q, one.k, one.v)]
    return [*said, *inside.hidden, *attention, *([] if inside.embeddings is None else [inside.embeddings])]


class Lost(Shelf):
    """A stand-in for a device apart from the host: weights that rest cannot be read, and are copied for a turn."""

    def fetch(self):
        for parameter, weight in self._resting:
            parameter.data = weight.clone()

    def put_back(self):
        for parameter, weight in self._resting:
            parameter.data = torch.full_like(weight, torch.nan)


@pytest.mark.parametrize("tied", [False, True])
def test_no_answer_reads_weights_that_rest(monkeypatch, tied):
    monkeypatch.setattr("kdlm.teachers.ahead.Shelf", Lost)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).double()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    step = batches()
    plain = LlamaForCausalLM(config).double()
    plain.load_state_dict(weights)
    plain, teacher = LocalTeacher(plain), announced(model, step, sliced=True)
    resting = [name for name, p in model.named_parameters() if p.isnan().any()]
    assert len(resting) == len(list(model.parameters())) - 1  # all but the head
    other = batches("padding_free")[0]
    for batch in (*step, other):
        rows = kept_rows(batch["labels"])
        ours, theirs = teacher(batch, rows), plain(batch, rows)
        assert torch.equal(ours.hidden, theirs.hidden)
        assert torch.equal(ours.head.logits(ours.hidden), theirs.head.logits(theirs.hidden))
    assert [name for name, p in model.named_parameters() if p.isnan().any()] == resting


def test_embeddings_and_the_fingerprint_are_read_where_the_weights_rest(model):
    teacher, plain, ids = AheadTeacher(model, sliced=True).to(CPU), LocalTeacher(model), torch.arange(5)
    assert torch.equal(teacher.embed(ids), plain.embed(ids))
    assert teacher.fingerprint() == plain.fingerprint()
    assert teacher.turns == 0


def test_in_evaluation_the_weights_come_once(model):
    step, teacher = batches(), AheadTeacher(model, sliced=True).to(CPU)
    with teacher.at_hand():
        for batch in step:
            teacher(batch, kept_rows(batch["labels"]))
    assert teacher.turns == 1


def test_images_cannot_be_regrouped(model):
    (batch,) = batches(lengths=((3,),))
    teacher = AheadTeacher(model, batch_size=2)
    with pytest.raises(ValueError, match=r"teacher\.batch_size: pixel_values cannot be regrouped"):
        teacher(batch | {"pixel_values": torch.zeros(1, 3, 2, 2)}, kept_rows(batch["labels"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"placement": "sliced", "device": "cuda:1"}, "leave device out"),
        ({"placement": "auto", "device": "cpu"}, "leave device out"),
        ({"placement": "sliced", "quantization": "4bit"}, "leave quantization out"),
    ],
)
def test_a_teacher_has_one_place(options, said):
    with pytest.raises(ValueError, match=said):
        SandboxTeacherSection(model="code-teacher-tiny", **options)


def test_next_is_the_gpu_behind_those_of_the_students(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device("next") == "cuda:1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, device in (("0", "cuda:2"), ("1", "cuda:3")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert own_device("next") == device
    with pytest.raises(ValueError, match=r"cuda:1 would hold the teachers of all 2 ranks.*use next"):
        own_device("cuda:1")
    assert own_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"gives each of 3 ranks a second GPU, and there are 4"):
        own_device("next")


def test_a_teacher_elsewhere_leaves_one_copy_of_its_head_beside_the_student(model):
    """Of a second device, which no test has, only the bookkeeping is seen: `meta` stands in for the student's."""
    teacher, home = LocalTeacher(model), torch.device("meta")
    head = teacher(batches()[0], kept_rows(batches()[0]["labels"])).head
    beside = teacher._head_on(home, head)
    assert beside.weight.device == home and teacher._head_on(home, head) is beside
    assert teacher._head_on(CPU, head) is head
