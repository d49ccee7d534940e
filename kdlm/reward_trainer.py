"""TeacherGRPOTrainer: TRL's GRPOTrainer with a teacher, in the ratio that it clips (RLAD) or as what its KL is to.

Rollouts, rewards, advantages and losses are TRL's. What is added is the teacher's log-probability of the drawn tokens,
put where TRL reads that of the old student or of the reference, and checkpoints from which a run goes on as it was.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Sampler
from trl import GRPOTrainer

from kdlm import checkpoints
from kdlm.data import Collator
from kdlm.losses import IGNORE_INDEX, kept_rows, teacher_log_probs
from kdlm.matching import common_vocab
from kdlm.models import view
from kdlm.progress import memory_gib
from kdlm.role_checkpoints import SealedCheckpoints
from kdlm.teachers import freeze
from kdlm.verifiers import Judge

logger = logging.getLogger(__name__)

LEAST = -50.0
"""Smallest log-probability of a teacher that is reckoned with: it may not know a token, and TRL exponentiates."""

ALSO = {"reward": "reward", "completions/mean_length": "length", "completions/clipped_ratio": "truncated"}
"""TRL's name of a figure -> ours."""


class TeacherGRPOTrainer(SealedCheckpoints, GRPOTrainer):
    """TRL's GRPOTrainer, with the teacher in its ratio or its KL.

    RLAD (arXiv 2602.22495) replaces GRPO's ratio by `r = (q / q_old)^a (q / p)^(1 - a) = q / (q_old^a p^(1 - a))`, so
    all of it is in what TRL takes for the old student's log-probabilities: `a log q_old + (1 - a) log p`. The log-ratio
    of old student and teacher is bounded, and not that of the student of now, whose gradient stays whole.

    Args:
        model, reward_funcs, args, **options: as of `trl.GRPOTrainer`. A `Judge` is a reward function too, and compares
            with the column `reference`; a column `prompt` may also hold token ids, which are then what the student is
            asked.
        teacher: a `kdlm.teachers.Teacher` that has the log-probability of any token, or a model to freeze.
        ratio: a: 1 leaves TRL's own ratio untouched, bit for bit.
        bound: largest size of `log(q_old / p)`.
        kl: weight of TRL's KL term, in place of `args.beta`, which is that to a copy which TRL itself loads.
        reference: what the KL is to; by default the teacher.
        vocab: the ids that student and teacher share, where not all do.

    The teacher's logits are divided by `args.temperature`, as TRL divides the student's and a reference's.

    Raises ValueError where settings contradict each other, or the teacher cannot serve here.
    """

    guards = None
    """What watches a `DistillTrainer` for collapse; nothing here."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *,
        teacher: Any = None,
        ratio: float = 1.0,
        bound: float = 3.0,
        kl: float = 0.0,
        reference: Any = None,
        vocab: int | Tensor | None = None,
        **options: Any,
    ):
        teacher = freeze(teacher) if isinstance(teacher, nn.Module) else teacher
        reference = freeze(reference) if isinstance(reference, nn.Module) else reference
        reference = teacher if reference is None else reference
        _check(args, teacher, ratio, bound, kl, reference)
        if vocab is None and teacher is not None and not isinstance(model, str):
            vocab = common_vocab({"student": view(model), "teacher": teacher}, options.get("processing_class"))
        self.teacher, self.ratio, self.bound, self.vocab = teacher, ratio, bound, vocab
        given = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
        self.judges = [one for one in given if isinstance(one, Judge)]
        funcs: list[Any] = [reward_of(one) if isinstance(one, Judge) else one for one in given]
        super().__init__(model, funcs or None, args, **options)
        if kl:
            self.beta, self.ref_model = kl, reference  # from here on: TRL would have loaded a model of its own
        asked: list[Any] = [teacher, reference]
        for one in asked:
            if hasattr(one, "to"):
                one.to(self.args.device)

    @property
    def exported(self) -> Any:
        """The network that a finished run hands out."""
        return self.student

    def close(self) -> None:
        """Let go of the lines to a server, and of the verifiers' workers."""
        held: list[Any] = [self.teacher, *self.judges]
        for one in held:
            if hasattr(one, "close"):
                one.close()

    # The teacher's log-probabilities, where TRL reads others

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Take token ids as they are: the data have been tokenised as the student is asked at use."""
        if prompts and isinstance(prompts[0], list) and isinstance(prompts[0][0], int):
            return prompts, None, {}
        return super()._tokenize_prompts(prompts)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **others: Any,
    ) -> Any:
        """Let a teacher answer where TRL asks it in a reference model's place."""
        if isinstance(model, nn.Module):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **others
            )
        size = batch_size or len(input_ids)
        parts = zip(input_ids.split(size), attention_mask.split(size), strict=True)
        return torch.cat([self.scored(model, ids, mask, logits_to_keep) for ids, mask in parts]), None, None

    @torch.no_grad()
    def scored(
        self, teacher: Any, ids: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"], last: int
    ) -> Float[Tensor, "batch last"]:
        """Return a teacher's log-probabilities of the last tokens of sequences, in nats; 0 where `mask` is 0.

        Args:
            teacher: a `kdlm.teachers.Teacher`.
            ids, mask: prompts, padded on the left, and completions, padded on the right.
            last: width of the completions.
        """
        rows = []
        for row, there in zip(ids.cpu(), mask.bool().cpu(), strict=True):
            labels = row.clone()
            labels[:-last] = IGNORE_INDEX
            rows.append({"input_ids": row[there].numpy(), "labels": labels[there].numpy()})
        batch = {key: value.to(ids.device) for key, value in Collator(pad_id=0)(rows).items()}
        asked = kept_rows(batch["labels"])
        found = torch.zeros(len(ids), last, device=ids.device)
        if len(asked):
            with self.accelerator.autocast():
                signal = teacher(batch, asked)
            log_p = teacher_log_probs(signal, asked.labels, vocab=self.vocab, temperature=self.temperature)
            found[mask[:, -last:].bool()] = log_p.float().clamp(min=LEAST)
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As TRL's; and with a ratio to the teacher, put it into the old student's log-probabilities."""
        batch = super()._generate_and_score_completions(inputs)
        if self.ratio == 1.0:
            return batch
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        train = self.student.training
        size = self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size
        call = (ids, mask, batch["completion_ids"].shape[1], size)
        with torch.no_grad():
            old = batch.get("old_per_token_logps")
            if old is None:  # TRL leaves it out where it is that of the student of the step, which is not enough here
                old = self._get_per_token_logps_and_entropies(self.model, *call)[0]
            apart = old - self._get_per_token_logps_and_entropies(self.teacher, *call)[0]
        batch["old_per_token_logps"] = old - (1 - self.ratio) * apart.clamp(-self.bound, self.bound)
        there = batch["completion_mask"].to(apart)
        sums = torch.stack([(apart * there).sum(), ((apart.abs() > self.bound) * there).sum(), there.sum()])
        apart_by, bounded, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics["train" if train else "eval"]
        metrics["teacher/reverse_kl"].append(apart_by / max(1.0, count))
        metrics["teacher/bounded"].append(bounded / max(1.0, count))
        return batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what every run on the student's own text logs, by the names that it has there, and the memory in use."""
        metrics = self._metrics["train" if self.student.training else "eval"]
        place = "rollout/" if self.student.training else "rollout_"
        metrics |= {place + name: list(metrics[theirs]) for theirs, name in ALSO.items() if theirs in metrics}
        if "loss" in logs:
            logs["memory_gib"] = memory_gib()
        super().log(logs, start_time)

    # Checkpoints

    def _get_train_sampler(self, dataset: Any = None) -> "EpochOrder":
        return EpochOrder(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write into a checkpoint also, of each rank, the completions that are still to be trained on."""
        super().save_model(output_dir, _internal_call)
        if _internal_call:
            waiting = {"step": self._step, "inputs": self._buffered_inputs, "metrics": dict(self._metrics["train"])}
            file = self._waiting(Path(output_dir or str(self.args.output_dir)))
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(waiting, file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.verify(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = self._waiting(Path(resume_from_checkpoint))
        if not file.is_file():
            logger.warning("%s: no completions of rank %d: they are made anew", file.parent, self.args.process_index)
            return
        waiting = torch.load(file, map_location=self.args.device, weights_only=True)
        self._step, self._buffered_inputs = waiting["step"], waiting["inputs"]
        self._metrics["train"].update(waiting["metrics"])

    def _waiting(self, folder: Path) -> Path:
        return folder / f"rollouts_{self.args.process_index}.pt"

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write none: a run folder is no repository of TRL's, and a student gets kdlm's own card."""

    def _send_telemetry(self) -> None:
        """Send none."""


class EpochOrder(Sampler[int]):
    """TRL's order of prompts, of which a resumed run finds that of its epoch: TRL's own begins anew with the first.

    Args:
        order: a `RepeatSampler`, whose generator goes on from epoch to epoch.
        epoch: gives the number of whole passes that are done.
    """

    def __init__(self, order: Any, epoch: Callable[[], int]):
        self.order, self.epoch = order, epoch

    def __iter__(self) -> Iterator[int]:
        if self.order.shuffle:
            self.order.generator.manual_seed(self.order.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.order.num_samples, generator=self.order.generator)
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def reward_of(judge: Judge) -> Callable[..., list[float]]:
    """Return a verifier as TRL calls a reward function; it compares with what rows hold as `reference`."""

    def verifier(completions: Sequence[str], reference: Sequence[Any] | None = None, **_: Any) -> list[float]:
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        return [verdict.score for verdict in judge.judge(texts, reference)]

    return verifier


def _check(args: Any, teacher: Any, ratio: float, bound: float, kl: float, reference: Any) -> None:
    """Raise ValueError where settings contradict each other, or the teacher cannot serve."""
    if not 0 <= ratio <= 1 or bound <= 0 or kl < 0:
        raise ValueError(f"ratio {ratio}, bound {bound}, kl {kl}: expected 0 to 1, above 0, and not below 0")
    if (ratio < 1 and teacher is None) or (kl and reference is None):
        raise ValueError("teacher: a ratio below 1 and a KL take one")
    if kl and getattr(args, "beta", 0.0):
        raise ValueError("args.beta: TRL has one KL, and `kl` says its weight here: leave beta at 0")
    if ratio < 1 and (kl or getattr(args, "beta", 0.0)) and getattr(args, "use_bias_correction_kl", True):
        raise ValueError("args.use_bias_correction_kl: it would multiply the KL by a ratio with the teacher: set False")
    if ratio < 1 and getattr(args, "off_policy_mask_threshold", None) is not None:
        raise ValueError("args.off_policy_mask_threshold: it takes the old student's log-probabilities as they are")
    for one in (teacher, reference):
        if getattr(one, "known_text_only", False):
            raise ValueError(f"{type(one).__name__} knows given text only, and the student writes new text")
        if getattr(one, "needs_fit", False) or hasattr(one, "roles_beside"):
            raise ValueError(f"{type(one).__name__} takes a DistillTrainer, which keeps what it learns or copies")
