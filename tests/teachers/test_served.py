"""The teacher `served`: what comes over the line is what a local teacher says."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loopback import served, source
from torch import Tensor

from kdlm.losses import kept_rows
from kdlm.signal import IGNORE_INDEX
from kdlm.teachers import LocalTeacher, ServedTeacher
from kdlm.teachers.remote import Endpoint, Remote


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
