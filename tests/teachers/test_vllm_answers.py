"""The teacher `vllm`, with an engine that answers as vLLM does; `test_with_vllm.py` asks a real one."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loopback import source
from scripted import prompt_logprobs

from kdlm.losses import kept_rows, teacher_log_probs
from kdlm.signal import IGNORE_INDEX, LogProbs, TopK
from kdlm.teachers import LocalTeacher, VLLMTeacher, VLLMTeacherSection


class Engine:
    """Gives prompt log-probabilities of a model as `vllm.LLM.generate` does: by id, with `logprob` and `rank`."""

    def __init__(self, model: Any):
        self.model = model

    def generate(self, prompts: list[dict[str, list[int]]], asked: Any, use_tqdm: bool) -> list[Any]:
        answers = []
        for prompt in prompts:
            said = prompt_logprobs(self.model, prompt["prompt_token_ids"], asked.prompt_logprobs)
            entries = [row and {int(token): SimpleNamespace(**entry) for token, entry in row.items()} for row in said]
            answers.append(SimpleNamespace(prompt_logprobs=entries))
        return answers


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    return Engine(source().load())


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 512, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}


@pytest.mark.parametrize("k", [0, 5])
def test_it_says_the_k_best_or_the_texts_own_tokens(engine: Engine, k: int) -> None:
    batch = batch_of(7, 3, 5)
    rows = kept_rows(batch["labels"])
    teacher = VLLMTeacher(engine, 512, k=k, name="tiny")
    assert teacher.signals == VLLMTeacherSection(of=source(), k=k).signals == {TopK if k else LogProbs}
    local = LocalTeacher(engine.model)(batch, rows)
    signal: Any = teacher(batch, rows)
    if k:
        best = local.head.logits(local.hidden).log_softmax(-1).topk(k).values
        torch.testing.assert_close(signal.log_probs, best, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(signal.log_probs, teacher_log_probs(local, rows.labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [0, 5])
def test_a_batch_without_a_row_has_an_empty_answer(engine: Engine, k: int) -> None:
    batch = batch_of(3) | {"labels": torch.full((1, 3), IGNORE_INDEX)}
    assert len(VLLMTeacher(engine, 512, k=k)(batch, kept_rows(batch["labels"])).log_probs) == 0
