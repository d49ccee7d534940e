"""The teacher `served`: what comes over the line is what a local teacher says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from loopback import served, source
from scripted import running
from torch import Tensor

from kdlm.data import Collator, ContextCollator, ContextSection, Prefetched, Reprompt
from kdlm.losses import kept_rows
from kdlm.remote import Endpoint, Remote, ServerUnavailable
from kdlm.signal import IGNORE_INDEX, Head
from kdlm.teachers import Ensemble, LocalTeacher, ServedTeacher
from kdlm.teachers.sequences import question_of
from kdlm.teachers.wire import read_head, write_head


@pytest.fixture(scope="module")
def model() -> Any:
    return source().load()


@pytest.fixture(scope="module")
def server(model: Any) -> Iterator[Any]:
    with served(model) as running:
        yield running


def teacher_at(url: str, **options: Any) -> ServedTeacher:
    return ServedTeacher(Remote(Endpoint(url, **options)))


def padded(*lengths: int, prompt: int = 0) -> dict[str, Tensor]:
    """Return a padded batch of sequences with random ids; the first `prompt` tokens are not trained on."""
    ids = torch.randint(3, 512, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, : max(1, prompt)] = IGNORE_INDEX
    return {"input_ids": ids.masked_fill(~mask, 0), "labels": labels, "attention_mask": mask.long()}


def padding_free(*lengths: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 512, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, IGNORE_INDEX), "position_ids": positions}


BATCHES = {
    "one token trained on": lambda: padded(2),
    "odd lengths": lambda: padded(1, 17, 5, 33, 2),
    "a sequence without a row": lambda: padded(3, 40, prompt=7),
    "no row at all": lambda: padded(3, 4, prompt=4),
    "longer than the server's batch": lambda: padded(*[100] * 9),
    "padding-free": lambda: padding_free(5, 1, 31, 2, 64),
}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES.keys())
def test_a_served_teacher_says_what_the_local_one_says(server: Any, model: Any, make: Any) -> None:
    batch = make()
    rows = kept_rows(batch["labels"])
    local = LocalTeacher(model)(batch, rows)
    teacher = teacher_at(server.url)
    for way in (batch, batch | {"teacher": teacher.prefetch(batch)}):
        signal = teacher(way, rows)
        torch.testing.assert_close(signal.hidden, local.hidden, rtol=1e-5, atol=1e-5)
        assert torch.equal(signal.head.weight, local.head.weight)
    teacher.close()


@pytest.mark.parametrize("kind", ["alone", "in an ensemble"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_served_teacher_is_told_what_a_local_one_is_told(server: Any, model: Any, kind: str, ahead: bool) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "context_prompt": [9, 11, 12, 13]}]
    remote = teacher_at(server.url)
    teacher: Any = remote if kind == "alone" else Ensemble([remote])
    collator: Any = ContextCollator(Collator(0), Reprompt(None, ContextSection()))  # pyright: ignore[reportArgumentType]
    batch = (Prefetched(collator, teacher.prefetch) if ahead else collator)(rows)
    kept = kept_rows(batch["labels"])
    told, untold = (LocalTeacher(model)(one, kept).hidden for one in (collator(rows), Collator(0)(rows)))
    signal = teacher(batch, kept)
    hidden = signal.hidden if kind == "alone" else signal.members[0].hidden
    torch.testing.assert_close(hidden, told, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(untold, told, atol=1e-2)
    remote.close()


def test_no_row_is_dropped_silently(server: Any) -> None:
    batch = padded(9, 5)
    rows = kept_rows(batch["labels"])
    teacher = teacher_at(server.url)
    answers = teacher.prefetch(padded(9, 4))
    with pytest.raises(ValueError, match="asked for 11 rows of a batch that has 12"):
        teacher(batch | {"teacher": answers}, rows)
    teacher.close()


def test_values_that_are_not_finite_are_refused(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = server.scorer._read
    monkeypatch.setattr(server.scorer, "_read", lambda asked: [h * float("inf") for h in read(asked)])
    batch = padded(4)
    teacher = teacher_at(server.url)
    with pytest.raises(ServerUnavailable, match="hidden has values that are not finite"):
        teacher(batch, kept_rows(batch["labels"]))
    teacher.close()


def test_another_model_behind_the_same_address_is_noticed(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = padded(4)
    teacher = teacher_at(server.url)
    monkeypatch.setattr(server.scorer, "digest", "0123456789abcdef")
    with pytest.raises(ServerUnavailable, match="serves another model than when this run began"):
        teacher(batch, kept_rows(batch["labels"]))
    teacher.close()


def test_a_server_that_is_no_kdlm_serve_is_said_to_be_none() -> None:
    with running(FastAPI()) as url, pytest.raises(ServerUnavailable, match="/v1/info: refused, 404"):
        teacher_at(url)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_keeps_its_bias_scale_and_softcap(bias: bool, tmp_path: Path) -> None:
    head = Head(torch.randn(7, 3, dtype=torch.bfloat16), torch.randn(7) if bias else None, 0.0625, 30.0)
    digest = write_head(head, tmp_path / "head")
    again = read_head(tmp_path / "head", torch.device("cpu"))
    assert torch.equal(again.weight, head.weight) and (again.logit_scale, again.softcap) == (0.0625, 30.0)
    assert (again.bias is None) == (not bias) and (again.bias is None or torch.equal(again.bias, head.bias))
    assert digest == write_head(again, tmp_path / "again")


def test_a_batch_that_is_padded_on_the_left_is_refused() -> None:
    batch = padded(3, 5)
    batch["attention_mask"] = batch["attention_mask"].flip(-1)
    with pytest.raises(ValueError, match="padded on the right"):
        question_of(batch)


def test_a_question_cut_into_parts_keeps_every_row_in_its_order() -> None:
    whole = question_of(padded(1, 17, 5, 33, 2, 9))
    for tokens in (1, 20, 40, 1000):
        parts = whole.split(tokens)
        assert torch.cat([part.ids[part.rows] for part in parts]).equal(whole.ids[whole.rows])
        assert all(part.tokens <= tokens or len(part.lengths) == 1 for part in parts)
        assert all(int(part.lengths.sum()) == part.tokens for part in parts)
