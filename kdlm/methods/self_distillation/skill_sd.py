"""Skill-SD: a reward's policy gradient, and a pull to the same model that has read a skill of earlier episodes."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdlm.losses import importance_weights, k3, kept_rows, teacher_log_probs, token_log_probs
from kdlm.methods.method import Batch, Nets, Step, Term, Terms, Told
from kdlm.methods.rewards import RewardMethod
from kdlm.methods.self_distillation.skills import SkillBank, summary
from kdlm.methods.sequences import over_sequences, rows_of
from kdlm.methods.tokens import TokenOptions
from kdlm.rollouts import Written
from kdlm.signal import weights_of

_BOUND = 50.0
"""Largest size of a token's log-ratio: its exponential is still a float32."""


class SkillSD(RewardMethod):
    """Skill-conditioned self-distillation of episodes (arXiv 2604.10674, known by third-party notes): `L + lam L_SDL`.

    L is the policy gradient of `RewardMethod` with group advantages; the paper's is GRPO's, which this is with one
    update for each rollout. `L_SDL = mean_i rho (exp(-l) - 1 + l)` with `l = log q(y_i|x) - log p(y_i|x, skill)` and
    `rho = q / sg[b]`, b what the token was drawn from: reverse KL in value and, since rho has a gradient, in gradient.
    Drawn tokens alone count, and a sequence whose teacher is told no skill adds nothing, whatever the teacher's
    weights. Both are means over all drawn tokens, to which `weight` is tuned; another mean needs another. Where no
    rewards differ the pull alone is left, and an optimiser that scales gradients takes full steps by it.

    `exp(-l)` leaves the gradient of the product, `rho l grad log q`, which is what is computed: no exponential of a
    large ratio is cancelled against another.

    Finished episodes of a round are summarised into skills, one for each prompt (`skills.summary`, a pure function
    where the paper asks a model), and put into a `SkillBank`. The teacher of later rounds is told one of the same task.
    A skill's reward is the mean reward of the attempts whose teacher was told it: the notes do not say which it is in
    the paper. The bank is the same on every rank, and is part of checkpoints.

    Args:
        weight: lam.
        task: whose skills a prompt's teacher is told: of the same `prompt`, or of its `domain`.
        success: reward from which on an episode is a success.
        explore, most: of the bank.
        importance_cap: largest rho and largest weight of the policy gradient.
    """

    paper = "arXiv 2604.10674 (third-party notes)"
    weighs = True

    def __init__(
        self,
        losses=(),
        *,
        weight: float = 0.001,
        task: Literal["prompt", "domain"] = "prompt",
        success: float = 1.0,
        explore: float = 1.0,
        most: int = 16,
        scaled: bool = True,
        **options: Any,
    ):
        super().__init__(losses, scaled=scaled, **options)
        self.weight, self.task, self.success = weight, task, success
        self.bank = SkillBank(explore, most)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"teacher", "context"}

    def told(self, written: Sequence[Written]) -> Sequence[Told]:
        return [self.bank.choose(self._task(one)) for one in written]

    def trained_on(self, written: Sequence[Written]) -> None:
        groups: dict[int, list[Written]] = {}
        for one in written:
            groups.setdefault(int(one.row["index"]), []).append(one)
        for index in sorted(groups):  # by the data's order, not by the ranks'
            group = groups[index]
            task, rewards = self._task(group[0]), [one.reward for one in group if one.reward is not None]
            if rewards and group[0].context:
                self.bank.tried(task, group[0].context, sum(rewards) / len(rewards))
            self.bank.add(task, summary(group, self.success))

    def _task(self, one: Written) -> str:
        of = "index" if self.task == "prompt" else "domain"
        if of not in one.row:
            raise ValueError(f"method.task: {self.task}, and a row has no {of}")
        return str(one.row[of])

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms:
        rows = kept_rows(batch["labels"], weights_of(batch))
        teacher, student = nets["teacher"](batch, rows), nets["student"](batch, rows)
        call: dict[str, Any] = {"chunk_rows": self.chunk_rows, "impl": self.impl}
        log_q, entropy = token_log_probs(student, rows.labels, **call)
        log_p = teacher_log_probs(teacher, rows.labels, vocab=self.vocab, **call)
        policy, metrics = self.policy_gradient(log_q, rows, batch, rows_of(self.advantages(batch), batch, rows))
        sampled = rows.of_labels(batch["sampled"]).to(log_q)
        counted = sampled * rows_of(batch["informed"], batch, rows).to(log_q)
        gap = (log_q.detach() - log_p.to(log_q)).clamp(-_BOUND, _BOUND) * counted
        weights = counted
        if self.importance_cap is not None:
            log_ratio = (log_q.detach() - rows.of_labels(batch["log_probs"]).to(log_q)) * counted
            weights = importance_weights(log_ratio, self.importance_cap) * counted
        once = (log_q - log_q.detach()).exp()  # 1, with the gradient of log q
        skill = rows.sum(weights * (k3(gap) + gap * (once - 1)))
        watched = {"reverse_kl": weights * gap, "told": counted, "student_entropy": sampled * entropy.detach()}
        metrics |= {name: (rows.sum(value), "sampled") for name, value in watched.items()}
        skills = policy.new_full((len(batch["reward"]),), len(self.bank))
        metrics["skills"] = (over_sequences(skills, batch), "completions")
        return Terms({"policy": Term(policy, "sampled"), "skill": Term(skill, "sampled", self.weight)}, metrics)

    def state_dict(self) -> dict[str, Tensor]:
        return {"skills": torch.frombuffer(bytearray(self.bank.written()), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.bank.read(state["skills"].cpu().numpy().tobytes())


class SkillSDSection(TokenOptions):
    """Learn from the rewards of episodes, and a little from oneself with a skill of earlier ones (`data.context`)."""

    method: ClassVar = SkillSD
    name: Literal["skill_sd"] = "skill_sd"
    weight: float = Field(0.001, ge=0)
    """Factor of the pull to the teacher that has read a skill; the paper finds 0.01 too strong and 0.0005 weak."""
    task: Literal["prompt", "domain"] = "prompt"
    """Whose skills the teacher is told: of earlier attempts at the same `prompt`, or at prompts of the same `domain`
    (a source's `domain`, or the column that it maps to it)."""
    success: float = Field(1.0, allow_inf_nan=False)
    """Reward from which on an episode is a success, whose calls are told."""
    explore: float = Field(1.0, ge=0)
    """How much a skill that was told less often is preferred: c of `mean reward + c sqrt(ln N / n)`."""
    most: int = Field(16, ge=2)
    """Skills kept of a task; the worst that was tried makes room for a new one."""
    scaled: bool = True
    """Divide advantages by the group's standard deviation, as GRPO does."""
    leave_one_out: bool = False
    """Compare an episode with the others of its group, in place of all."""
    importance_cap: float | None = Field(2.0, gt=0)
    """Largest importance weight, the student's probability of a token now over the one it was drawn with; `.inf` cuts
    none, `null` leaves the weights out."""
