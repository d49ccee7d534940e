"""The teacher `openai`: what a server with OpenAI's API says becomes the top-k signal of the model behind it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loopback import source
from scripted import openai_api, running

from kdlm.losses import kept_rows, teacher_log_probs
from kdlm.remote import Endpoint, Remote, ServerUnavailable
from kdlm.signal import IGNORE_INDEX, LogProbs
from kdlm.teachers import LocalTeacher, OpenAITeacher
from kdlm.teachers.openai import best_of


@pytest.fixture(scope="module")
def model() -> Any:
    return source().load()


def batch_of(*lengths: int, prompt: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 512, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, :prompt] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("prompt", [1, 6])
def test_it_says_the_top_k_of_the_local_teacher(model: Any, k: int, prompt: int) -> None:
    batch = batch_of(9, 33, 4, 2, prompt=prompt)
    rows = kept_rows(batch["labels"])
    local = LocalTeacher(model)(batch, rows)
    log_probs = local.head.logits(local.hidden).log_softmax(-1)
    with running(openai_api(model)) as url:
        teacher: Any = OpenAITeacher(Remote(Endpoint(url)), "tiny", k, 512)
        for way in (batch, batch | {"teacher": teacher.prefetch(batch)}):
            signal = teacher(way, rows)
            torch.testing.assert_close(signal.log_probs, log_probs.topk(k).values, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(signal.log_probs, log_probs.gather(-1, signal.ids), atol=1e-5, rtol=1e-5)
            assert all(len(set(ids)) == k for ids in signal.ids.tolist())
        teacher.close()


def test_with_k_0_it_says_what_the_local_teacher_gives_the_texts_own_tokens(model: Any) -> None:
    batch = batch_of(9, 33, 4, 2, prompt=6)
    rows = kept_rows(batch["labels"])
    expected = teacher_log_probs(LocalTeacher(model)(batch, rows), rows.labels)
    with running(openai_api(model)) as url:
        teacher: Any = OpenAITeacher(Remote(Endpoint(url)), "tiny", 0, 512)
        for way in (batch, batch | {"teacher": teacher.prefetch(batch)}):
            signal = teacher(way, rows)
            assert isinstance(signal, LogProbs) and teacher.signals == {LogProbs}
            torch.testing.assert_close(signal.log_probs, expected, atol=1e-5, rtol=1e-5)
        teacher.close()


def test_a_server_that_leaves_the_texts_own_token_out_is_refused(model: Any) -> None:
    batch = batch_of(6)
    with running(openai_api(model, change=lambda said: [row and {"1": {"logprob": -1.0}} for row in said])) as url:
        teacher: Any = OpenAITeacher(Remote(Endpoint(url)), "tiny", 0, 512)
        with pytest.raises(ServerUnavailable, match="is not among those at its place"):
            teacher(batch, kept_rows(batch["labels"]))
        teacher.close()


def test_a_batch_without_a_row_asks_nothing(model: Any) -> None:
    batch = batch_of(3, 4, prompt=4)
    with running(openai_api(model)) as url:
        teacher: Any = OpenAITeacher(Remote(Endpoint(url)), "tiny", 5, 512)
        assert teacher(batch, kept_rows(batch["labels"])).ids.shape == (0, 5)
        teacher.close()


def entry(logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank}


def test_the_prompts_own_token_counts_only_where_it_is_one_of_the_best() -> None:
    entries = {"7": entry(-9.0, 300), "4": entry(-0.5, 1), "2": entry(-1.5, 2)}
    assert best_of(entries, 2, 512) == ([4, 2], [-0.5, -1.5])
    tied = {"7": entry(-1.0, 2), "4": entry(-1.0, 1), "2": entry(-1.0, 2)}
    assert set(best_of(tied, 2, 512)[0]) < {7, 4, 2}


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no log-probabilities": (lambda said: None, "TypeError"),
    "a position too few": (lambda said: said[:-1], "5 positions for a prompt of 6 tokens"),
    "a token too few": (lambda said: [dict(list(row.items())[-2:]) if row else row for row in said], "3 were asked"),
    "nan": (
        lambda said: [row and {t: {"logprob": float("nan")} for t in row} for row in said],
        "NoneType",
    ),  # JSON has no nan
    "probabilities": (lambda said: [row and {t: {"logprob": 0.5} for t in row} for row in said], "no log-prob"),
    "an id of another model": (
        lambda said: [row and {str(int(t) + 512): e for t, e in row.items()} for row in said],
        "distinct ones below 512",
    ),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG.keys())
def test_an_answer_that_is_not_sound_is_refused(model: Any, change: Callable, words: str) -> None:
    batch = batch_of(6)
    with running(openai_api(model, change=change)) as url:
        teacher: Any = OpenAITeacher(Remote(Endpoint(url)), "tiny", 3, 512)
        with pytest.raises(ServerUnavailable, match=words):
            teacher(batch, kept_rows(batch["labels"]))
        teacher.close()


def test_a_k_above_the_servers_limit_ends_at_once_with_its_reason(model: Any) -> None:
    batch = batch_of(6)
    with running(openai_api(model, most=20)) as url:
        teacher: Any = OpenAITeacher(Remote(Endpoint(url)), "tiny", 21, 512)
        with pytest.raises(ServerUnavailable, match="refused, 400 Bad Request: Requested prompt logprobs of 21"):
            teacher(batch, kept_rows(batch["labels"]))
        teacher.close()


def test_a_model_that_is_not_served_is_said_with_those_that_are(model: Any) -> None:
    with running(openai_api(model)) as url:
        remote = Remote(Endpoint(url))
        with pytest.raises(ValueError, match=f"{url} serves tiny, not large"):
            OpenAITeacher(remote, "large", 5, 512)
        remote.close()
