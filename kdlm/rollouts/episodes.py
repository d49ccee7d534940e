"""Episodes: completions of several turns, between which an environment speaks.

All episodes that still go on are completed together, one call of the engine for each turn. The first turn is drawn as
a completion without an environment is, with the same seed; turn t with a seed made of that and t. So the same prompts,
weights and seed give the same episodes. What one episode draws after its first turn may depend on which others still
go on: `generate` draws a whole batch from one generator, and the vLLM engines seed by a prompt's place in the call.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kdlm.rollouts.engine import Completion, Engine, Sampling
from kdlm.rollouts.environment import Environment, EnvironmentSection, Judging, Reply
from kdlm.rollouts.rows import SAID, Row, Written

Between = Callable[[Sequence[int], str], list[int]]
"""Prompt, and what an environment says after a turn that ended by itself -> the tokens up to the next turn."""


@dataclass
class _Episode:
    """One episode as it grows: after the prompt, the tokens of all turns and of what was said between them."""

    row: Row
    prompt: list[int]
    environment: Environment
    first: Completion
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    stop: Literal["end", "length"] = "end"
    feedback: str | None = None
    talk: list[list[str]] = field(default_factory=list)

    def add(self, ids: Sequence[int], log_probs: Sequence[float], turn: int) -> None:
        self.ids += ids
        self.log_probs += log_probs
        self.turns += [turn] * len(ids)


class Episodes:
    """Drives an engine turn by turn.

    Args:
        section: the environment and its limits.
        read: tokens -> text without special tokens.
        between: an environment's words -> the tokens between two turns.
        context: how many tokens the model can read.
        judge: the recipe's verifier; None without one.

    Raises ValueError where the environment asks a verifier and there is none.
    """

    def __init__(
        self,
        section: EnvironmentSection,
        *,
        read: Callable[[Sequence[Sequence[int]]], list[str]],
        between: Between,
        context: int,
        judge: Judging | None = None,
    ):
        if section.judged and judge is None:
            section.start({}, None)
        self.section, self.read, self.between, self.judge = section, read, between, judge
        self.limit = min(context, section.max_tokens or context)

    def __call__(
        self, engine: Engine, rows: Sequence[Row], prompts: Sequence[list[int]], sampling: Sampling, seed: int
    ) -> list[Written]:
        """Return `samples_per_prompt` episodes of every prompt, in the order of the prompts.

        `stop` is `length` where a turn was cut or no token was left for another one: the episode ended there.
        """
        drawn = engine.generate(prompts, sampling, seed)
        episodes = [
            _Episode(rows[one.group], prompts[one.group], self.section.start(rows[one.group], self.judge), one)
            for one in drawn
        ]
        alone = sampling.model_copy(update={"samples_per_prompt": 1})
        live = self._advance(episodes, drawn, 0)
        for turn in range(1, self.section.turns):
            if not live:
                break
            drawn = engine.generate([[*one.prompt, *one.ids] for one in live], alone, seed_of(seed, turn))
            live = self._advance(live, drawn, turn)
        return self._finished(episodes)

    def _advance(self, live: list[_Episode], drawn: Sequence[Completion], turn: int) -> list[_Episode]:
        """Add one turn of each, and return the episodes that go on, ready for the next."""
        texts = self.read([one.ids for one in drawn])
        replies = self.section.replies([one.environment for one in live], texts)
        for episode, done, text, reply in zip(live, drawn, texts, replies, strict=True):
            episode.add(done.ids, done.log_probs, turn)
            episode.rewards.append(float(reply.reward))
            episode.stop, episode.feedback = done.stop, reply.feedback
            episode.talk.append([text, reply.text])
        return [episode for episode, reply in zip(live, replies, strict=True) if self._goes_on(episode, reply, turn)]

    def _goes_on(self, episode: _Episode, reply: Reply, turn: int) -> bool:
        if reply.done or episode.stop == "length" or turn + 1 == self.section.turns:
            return False
        said = self.between(episode.prompt, reply.text)
        if len(episode.prompt) + len(episode.ids) + len(said) >= self.limit:
            episode.stop = "length"
            return False
        episode.add(said, [0.0] * len(said), SAID)
        return True

    def _finished(self, episodes: list[_Episode]) -> list[Written]:
        if self.judge is not None and not self.section.judged:
            verdicts = self.judge([one.talk[-1][0] for one in episodes], [one.row for one in episodes])
            for one, (score, reason) in zip(episodes, verdicts, strict=True):
                one.rewards[-1] += score
                one.feedback = one.feedback if reason is None else reason
        texts = self.read([one.ids for one in episodes])
        return [self._written(one, text) for one, text in zip(episodes, texts, strict=True)]

    def _written(self, one: _Episode, text: str) -> Written:
        several = len(one.rewards) > 1
        return Written(
            one.row,
            one.prompt,
            Completion(one.ids, one.log_probs, one.stop, one.first.group, one.first.version),
            text,
            sum(one.rewards) if self.section.reward == "sum" else one.rewards[-1],
            turns=one.turns if several else None,
            turn_rewards=one.rewards if several else [],
            feedback=one.feedback,
            talk=one.talk if several else [],
        )


def seed_of(seed: int, turn: int) -> int:
    """Return the seed of a turn; the first one's is that of the completion."""
    return seed if turn == 0 else random.Random(f"{seed} turn {turn}").getrandbits(62)
