"""What the student writes at an evaluation, and the figures of it."""

from typing import Any

import torch
from accelerate.utils import gather_object

from kdlm.evaluation.section import Generations
from kdlm.quality import text_figures
from kdlm.rollouts import Completion, GenerateSection, Sampling, prompt_of
from kdlm.samples import Sample, SampleLog
from kdlm.verifiers import Judge


class Writer:
    """Completes the same evaluation prompts again and again, on this rank its share of them.

    Args:
        section: how many, how long, how drawn.
        rows: evaluation rows; what comes before their last answer is the prompt.
        student, tokenizer: what writes.
        args: the Trainer's arguments: device, ranks, seed, batch size.
        judge: compares each completion with the row's `reference`; None judges nothing.

    Raises ValueError, naming the key, for plain text without `prompt_tokens`.
    """

    def __init__(self, section: Generations, rows: Any, student: Any, tokenizer: Any, args: Any, judge: Judge | None):
        count, rank, world = min(section.prompts, len(rows)), args.process_index, args.world_size
        own = [rows[number] for number in range(rank, count, world)]
        try:
            self.prompts = [prompt_of(row, section.prompt_tokens) for row in own]
        except ValueError as error:
            raise ValueError(str(error).replace("rollouts.", "evaluation.generations.")) from error
        self.references = [row.get("reference") for row in own]
        self.sampling = Sampling(temperature=section.temperature, max_new_tokens=section.max_new_tokens)
        engine = GenerateSection(batch_size=args.eval_batch_size)
        self.engine = engine.build(student, tokenizer, torch.device(args.device), copied=False)
        self.engine.take(student, 0)
        self.tokenizer, self.judge, self.seed = tokenizer, judge, args.seed

    def figures(self, step: int, log: SampleLog | None = None) -> dict[str, float]:
        """Return the means over all completions of all ranks, and the share of n-grams that are different ones.

        What this rank wrote after `step` optimiser steps goes into the log.
        """
        drawn = self.engine.generate(self.prompts, self.sampling, self.seed)
        written = [{"ids": one.ids, "truncated": one.stop == "length"} for one in drawn]
        if self.judge is not None:
            texts = self.tokenizer.batch_decode([one.ids for one in drawn], skip_special_tokens=True)
            verdicts = self.judge.judge(texts, self.references)
            written = [one | {"score": said.score} for one, said in zip(written, verdicts, strict=True)]
        if log is not None:
            scores = [one.get("score") for one in written]
            log.add([self._shown(step, one, score) for one, score in zip(drawn, scores, strict=True)])
        every: list[dict[str, Any]] = gather_object(written)
        figures = text_figures([one["ids"] for one in every], [one["truncated"] for one in every])
        if self.judge is not None:
            figures["score"] = sum(one["score"] for one in every) / len(every)
        return figures

    def _shown(self, step: int, one: Completion, score: float | None) -> Sample:
        read = self.tokenizer.decode
        tokens = [read([token]) for token in one.ids]
        return Sample(step, read(self.prompts[one.group]), tokens, [], one.log_probs, one.stop, score, step)

    def close(self) -> None:
        """Let go of the student and of the judge's workers."""
        self.engine.close()
        if self.judge is not None:
            self.judge.close()
