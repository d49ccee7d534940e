"""What an ensemble answers, by its definition: averages, routing, cutting, delegation, residence."""

from typing import ClassVar

import datasets
import pytest
import torch
from pydantic import ValidationError

from kdlm.data import Collator
from kdlm.data.packing import packed_row
from kdlm.losses import chunked, forward_kl, kept_rows
from kdlm.signal import Dense, Head, Hidden, Mixture, Rows, TopK, domain_id, sequence_of
from kdlm.teachers import ByDomain, Confidence, CustomTeacher, Ensemble, EnsembleSection, Learned

VOCAB, WIDTH = 13, 4
LENGTHS = [5, 2, 7, 3]
DOMAINS = ["code", "prose", "code", "sums"]
SPACES = ("probability", "log")


class Table:
    """A teacher that reads its hidden state off a table, by token: what it says does not depend on the layout."""

    provides = frozenset({"teacher"})
    signals = frozenset({Hidden})

    def __init__(self, seed: int, vocab: int = VOCAB, scale: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        self.states = scale * torch.randn(50, WIDTH, generator=generator, dtype=torch.float64)
        self.head = Head(torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64))
        self.vocab_size, self.asked = vocab, []

    def __call__(self, batch, rows):
        self.asked.append(batch)
        return Hidden(self.states[batch["input_ids"].flatten()[rows.index]], self.head)


class Whole(Table):
    """The same, as logits."""

    signals = frozenset({Dense})

    def __call__(self, batch, rows):
        signal = super().__call__(batch, rows)
        return Dense(signal.head.logits(signal.hidden))


def sequences():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, (length, domain) in enumerate(zip(LENGTHS, DOMAINS, strict=True)):
        ids = torch.randint(0, 50, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids, "index": number, "domain": domain_id(domain)})
    return rows


def padded():
    return Collator(0)(sequences())


def log_p(signal):
    logits = signal.logits if isinstance(signal, Dense) else signal.head.logits(signal.hidden)
    return logits.log_softmax(-1)


def mixed(signal):
    """The log-probabilities of an ensemble's answer, [rows, vocab], through the losses' own sweep."""
    seen = []

    def keep(student, teacher):
        seen.append(teacher.log_softmax(-1).clone())
        return student.sum(-1)

    chunked(keep, Dense(torch.zeros(len(signal.log_weights), VOCAB, dtype=torch.float64)), signal)
    return torch.cat(seen)


@pytest.fixture
def batch():
    return padded()


@pytest.fixture
def rows(batch):
    return kept_rows(batch["labels"])


@pytest.mark.parametrize("kind", [Table, Whole])
@pytest.mark.parametrize("space", SPACES)
def test_one_member_is_that_member(batch, rows, kind, space):
    member = kind(1)
    torch.testing.assert_close(
        mixed(Ensemble([member], space=space)(batch, rows)), log_p(member(batch, rows)), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("space", SPACES)
def test_equal_members_are_that_member_whatever_the_weights(batch, rows, space):
    ensemble = Ensemble([Table(1), Table(1), Whole(1)], [0.2, 3.0, 0.7], space=space)
    torch.testing.assert_close(mixed(ensemble(batch, rows)), log_p(Table(1)(batch, rows)))


def test_probability_space_is_the_mean_of_softmaxes(batch, rows):
    members = [Table(1), Whole(2), Table(3)]
    expected = sum(w * log_p(m(batch, rows)).exp() for w, m in zip((0.5, 0.3, 0.2), members, strict=True)).log()
    torch.testing.assert_close(mixed(Ensemble(members, [5, 3, 2])(batch, rows)), expected)
    torch.testing.assert_close(mixed(Ensemble(members, (0.5, 0.3, 0.2))(batch, rows)), expected)
    equal = sum(log_p(m(batch, rows)).exp() / 3 for m in members).log()
    torch.testing.assert_close(mixed(Ensemble(members)(batch, rows)), equal)


def test_log_space_is_the_softmax_of_the_mean_of_log_probabilities(batch, rows):
    members = [Table(1), Whole(2), Table(3)]
    mean = sum(w * log_p(m(batch, rows)) for w, m in zip((0.5, 0.3, 0.2), members, strict=True))
    ours = mixed(Ensemble(members, [5, 3, 2], space="log")(batch, rows))
    torch.testing.assert_close(ours, mean.log_softmax(-1))


@pytest.mark.parametrize("space", SPACES)
def test_the_order_of_the_members_is_inert(batch, rows, space):
    members, weights, order = [Table(1), Whole(2), Table(3)], [0.5, 0.1, 0.4], [2, 0, 1]
    one = Ensemble(members, weights, space=space)
    other = Ensemble([members[i] for i in order], [weights[i] for i in order], space=space)
    torch.testing.assert_close(mixed(one(batch, rows)), mixed(other(batch, rows)))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_all_weight_on_one_member_picks_it_and_asks_no_other(batch, rows, space, chosen):
    members = [Table(1), Whole(2), Table(3)]
    ours = mixed(Ensemble(members, [float(i == chosen) for i in range(3)], space=space)(batch, rows))
    assert [len(member.asked) for member in members] == [int(i == chosen) for i in range(3)]
    torch.testing.assert_close(ours, log_p(members[chosen](batch, rows)), rtol=0, atol=1e-14)


# Routing


def layouts():
    rows = sequences()
    packs = [packed_row(rows[:2]), packed_row(rows[2:])]
    return {
        "padded": Collator(0)(rows),
        "free": Collator(0, "padding_free")(rows),
        "packed": Collator(0, "padding_free")(packs),
    }


@pytest.mark.parametrize("layout", ["padded", "free", "packed"])
def test_every_row_knows_its_sequence(layout):
    batch = layouts()[layout]
    rows = kept_rows(batch["labels"])
    expected = [number for number, length in enumerate(LENGTHS) for _ in range(length - 1)]
    assert rows.select(sequence_of(batch)).tolist() == expected


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("layout", ["padded", "free", "packed"])
def test_a_domain_is_routed_to_its_teacher_in_every_layout(layout, space):
    table = {"code": [1, 0], "prose": [0, 1], "sums": [0.25, 0.75]}
    members, batch = [Table(1), Whole(2)], layouts()[layout]
    rows = kept_rows(batch["labels"])
    ours = mixed(Ensemble(members, ByDomain(table=table), space=space)(batch, rows))
    each = [log_p(member(batch, rows)) for member in members]
    at = 0
    for length, domain in zip(LENGTHS, DOMAINS, strict=True):
        first, second = (one[at : at + length - 1] for one in each)
        a, b = table[domain]
        mean = (a * first.exp() + b * second.exp()).log() if space == "probability" else a * first + b * second
        torch.testing.assert_close(ours[at : at + length - 1], mean.log_softmax(-1))
        at += length - 1


def test_a_teacher_of_no_sequence_in_the_batch_is_not_asked():
    members = [Table(1), Table(2)]
    ensemble = Ensemble(members, ByDomain(table={"code": [1, 0], "prose": [0, 1]}))
    batch = Collator(0)(sequences()[:1])
    assert len(ensemble(batch, kept_rows(batch["labels"])).members) == 1
    assert (len(members[0].asked), len(members[1].asked)) == (1, 0)


def test_unknown_domains_take_the_default_or_are_refused(batch, rows):
    table = {"code": [1, 0], "prose": [0, 1]}
    with pytest.raises(ValueError, match=r"teacher.weights.table: .*it names code, prose\): name it, or set"):
        Ensemble([Table(1), Table(2)], ByDomain(table=table))(batch, rows)
    signal = Ensemble([Table(1), Table(2)], ByDomain(table=table, default=[1, 3]))(batch, rows)
    torch.testing.assert_close(signal.log_weights[-1].exp(), torch.tensor([0.25, 0.75], dtype=torch.float64))
    del batch["domain"]
    with pytest.raises(ValueError, match="by_domain needs a batch with `domain`"):
        Ensemble([Table(1), Table(2)], ByDomain(table=table))(batch, rows)


@pytest.mark.parametrize("packed", [False, True])
def test_unknown_domains_are_found_before_the_run(packed):
    rows = [packed_row(sequences()[:2]), packed_row(sequences()[2:])] if packed else sequences()
    data = datasets.Dataset.from_list(
        [{**row, "input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in rows]
    )
    known = {"code": [1, 0], "prose": [0, 1], "sums": [1, 1]}
    Ensemble([Table(1), Table(2)], ByDomain(table=known)).require(data)
    del known["sums"]
    with pytest.raises(ValueError, match="rows of a domain that it does not name"):
        Ensemble([Table(1), Table(2)], ByDomain(table=known)).require(data)
    with pytest.raises(ValueError, match="needs rows with a column `domain`"):
        Ensemble([Table(1), Table(2)], ByDomain(table=known)).require(data.remove_columns("domain"))


# Confidence


def test_confidence_favours_the_member_that_is_sure(batch, rows):
    sure, unsure = Table(1, scale=20.0), Table(2, scale=0.1)
    each = [log_p(member(batch, rows)) for member in (sure, unsure)]
    surest = each[0].exp().amax(-1) > 0.9
    assert surest.any()
    gaps = []
    for temperature in (0.1, 1.0, 100.0):
        ours = mixed(Ensemble([sure, unsure], Confidence(temperature=temperature))(batch, rows))
        gaps.append((ours.exp() - each[0].exp()).abs().amax(-1)[surest].max().item())
    assert gaps[0] < 1e-3 and gaps == sorted(gaps)


def test_confidence_weights_add_up_to_one_and_follow_the_entropy(batch, rows):
    members, tau = [Table(1), Table(2)], 0.5
    each = torch.stack([log_p(member(batch, rows)) for member in members])
    entropy = -(each.exp() * each).sum(-1)
    weights = (-entropy / tau).softmax(0)
    torch.testing.assert_close(weights.sum(0), torch.ones(len(rows), dtype=torch.float64))
    expected = (weights[:, :, None] * each.exp()).sum(0)
    torch.testing.assert_close(expected.sum(-1), torch.ones(len(rows), dtype=torch.float64))
    torch.testing.assert_close(mixed(Ensemble(members, Confidence(temperature=tau))(batch, rows)), expected.log())


# What goes through to the members


def test_heads_of_different_sizes_are_cut_to_the_smallest(batch, rows):
    members = [Table(1, VOCAB + 5), Table(2), Whole(3, VOCAB + 9)]
    ensemble = Ensemble(members)
    assert ensemble.vocab_size == VOCAB
    expected = sum(
        (m(batch, rows).logits if isinstance(m, Whole) else m.head.logits(m(batch, rows).hidden))[:, :VOCAB].softmax(-1)
        / 3
        for m in members
    )
    torch.testing.assert_close(mixed(ensemble(batch, rows)), expected.log())


def test_a_member_without_a_whole_distribution_is_refused(batch, rows):
    def few(batch, rows):
        return TopK(torch.zeros(len(rows), 1, dtype=torch.int64), torch.zeros(len(rows), 1))

    with pytest.raises(ValueError, match=r"teacher.members.1: a TopK signal; an ensemble averages whole distributions"):
        Ensemble([Table(1), few])(batch, rows)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights: 1 weights for 2 members"),
        ([0.0, 0.0], "must not all be 0"),
        ([1.0, -0.1], "none may be negative"),
        (ByDomain(table={"a": [1, 1], "b": [1]}), r"weights.table.b: 1 weights for 2 members"),
        (ByDomain(table={"a": [1, 1]}, default=[1]), r"weights.default: 1 weights for 2 members"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Ensemble([Table(1), Table(2)], weights)


def test_a_section_whose_signal_is_no_whole_distribution_is_refused(monkeypatch):
    monkeypatch.setattr(CustomTeacher, "signals", frozenset({TopK}), raising=False)
    few = {"name": "custom", "target": "somewhere:teacher"}
    with pytest.raises(ValidationError, match=r"members\.0: custom gives no whole distribution to average"):
        EnsembleSection.model_validate({"members": [few]})


def test_an_ensemble_is_no_member_of_an_ensemble():
    inner = {"name": "ensemble", "members": [{"name": "local", "path": "somewhere"}]}
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        EnsembleSection.model_validate({"members": [inner]})


class Asked(Table):
    """A teacher that is asked where the batch is made, minds which rows it gets, and is closed."""

    log: ClassVar[list[str]] = []

    def prefetch(self, batch):
        return {"of": int(batch["input_ids"].sum())}

    def require(self, rows):
        self.log.append(f"require {len(rows)}")

    def close(self):
        self.log.append("close")

    def __call__(self, batch, rows):
        assert batch["teacher"] == {"of": int(batch["input_ids"].sum())}
        return super().__call__(batch, rows)


def test_members_are_prefetched_required_and_closed_each_for_itself(batch, rows):
    Asked.log.clear()
    plain = Table(1)
    ensemble = Ensemble([plain, Asked(2), Asked(3)])
    batch["teacher"] = ensemble.prefetch(batch)
    assert [one is None for one in batch["teacher"]] == [True, False, False]
    ensemble(batch, rows)
    assert "teacher" not in plain.asked[0]
    ensemble.require(sequences())
    ensemble.close()
    assert Asked.log == ["require 4", "require 4", "close", "close"]
    assert not hasattr(Ensemble([plain]), "prefetch")


def test_an_answer_has_no_graph_and_says_what_it_is(batch, rows):
    member = Table(1)
    member.states.requires_grad_()
    ensemble = Ensemble([member, Table(2)])
    signal = ensemble(batch, rows)
    assert ensemble.signals == {Mixture} == {type(signal)}
    assert not signal.members[0].hidden.requires_grad and not signal.log_weights.requires_grad


def test_no_rows_are_no_trouble():
    batch = Collator(0)([{"input_ids": [3, 4], "labels": [-100, -100], "domain": domain_id("code")}])
    rows = kept_rows(batch["labels"])
    for weights in (None, ByDomain(table={"code": [1, 0]})):
        signal = Ensemble([Table(1), Table(2)], weights)(batch, rows)
        assert len(signal.log_weights) == 0
        assert chunked(forward_kl, Dense(torch.zeros(0, VOCAB)), signal).shape == (0,)


# Learned


def held_out(seed: int, members, weights):
    """Batches whose next tokens are drawn from a mixture of what the members say."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(12):
        ids = torch.randint(0, 50, (8, 65), generator=generator)
        rows = Rows(torch.arange(8 * 65), torch.zeros(8 * 65, dtype=torch.int64))
        batch = {"input_ids": ids}
        p = sum(w * log_p(m(batch, rows)).exp() for w, m in zip(weights, members, strict=True))
        yield batch, Rows(rows.index, torch.multinomial(p, 1, generator=generator).squeeze(1))


def test_learned_weights_recover_the_mixture_that_wrote_the_text():
    members, true = [Table(1, scale=2), Table(2, scale=2), Whole(3, scale=2)], [0.6, 0.1, 0.3]
    ensemble = Ensemble(members, Learned(positions=6000))
    assert ensemble.needs_fit
    ensemble.fit(held_out(0, members, true))
    assert not ensemble.needs_fit
    found = ensemble.state_dict()["log_weights"].exp()
    torch.testing.assert_close(found, torch.tensor(true, dtype=torch.float64), rtol=0, atol=0.05)


@pytest.mark.parametrize("space", SPACES)
def test_learned_weights_predict_the_held_out_tokens_better_than_any_others_nearby(space):
    members = [Table(1, scale=2), Table(2, scale=2)]
    ensemble = Ensemble(members, Learned(positions=2000), space=space)
    ensemble.fit(held_out(0, members, [0.7, 0.3]))
    share = ensemble.state_dict()["log_weights"].exp()[0].item()
    losses = []
    for w in (share, share - 0.05, share + 0.05, 0.0, 1.0):
        fixed, total, seen = Ensemble(members, [w, 1 - w], space=space), 0.0, 0
        for batch, rows in held_out(0, members, [0.7, 0.3]):
            rows = Rows(rows.index[: 2000 - seen], rows.labels[: 2000 - seen])
            seen += len(rows)
            if len(rows):
                total -= mixed(fixed(batch, rows)).gather(1, rows.labels[:, None]).sum().item()
        losses.append(total / seen)
    assert min(losses) == losses[0]


@pytest.mark.parametrize("vocab", [None, 9, torch.tensor([0, 2, 3, 7, 8, 11])], ids=["all", "first", "list"])
@pytest.mark.parametrize("space", SPACES)
def test_a_second_fit_finds_the_same_weights_to_the_bit(space, vocab):
    members = [Table(1, scale=2), Table(2, scale=2)]
    found = []
    for _ in range(2):
        ensemble = Ensemble(members, Learned(positions=700), space=space)
        ensemble.fit(held_out(0, members, [0.7, 0.3]), vocab)
        found.append(ensemble.state_dict()["log_weights"])
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_learned_weights_travel_by_their_state(batch, rows):
    members = [Table(1), Table(2)]
    first, second = (Ensemble(members, Learned()) for _ in range(2))
    assert first.state_dict() == {}
    with pytest.raises(ValueError, match="learned, and not fitted yet"):
        first(batch, rows)
    with pytest.raises(ValueError, match="hold no position to fit the weights on"):
        first.fit([])
    first.fit(held_out(0, members, [0.7, 0.3]))
    second.load_state_dict(first.state_dict())
    assert not second.needs_fit and torch.equal(first(batch, rows).log_weights, second(batch, rows).log_weights)
    with pytest.raises(ValueError, match="2 learned weights for 1 members"):
        Ensemble([Table(1)], Learned()).load_state_dict(first.state_dict())
