"""The step `pairs`: of a prompt's completions, which is to be preferred to which."""

from typing import Any, Literal

from datasets import Dataset
from pydantic import Field

from kdlm.curation.preferring import AnyPreferring, Right, Row
from kdlm.curation.rows import dataset_of
from kdlm.curation.step import Desk, Step, digest, lacks

OF_ONE = {
    "prompt",
    "completion",
    "sample",
    "model",
    "revision",
    "sampling",
    "seed",
    "stop",
    "tokens",
    "log_prob",
    "log_probs",
}
"""Columns of one completion, with `JUDGED`: a pair has two, and says itself what it keeps of them."""
JUDGED = {"score", "verdict", "reason"}
TOLD = ("sample", "model", "score", "tokens")
"""Those that a pair says of both its sides, as `chosen_*` and `rejected_*`."""


class Pairs(Step):
    """Of completions of a prompt, pairs of one to be preferred and one to be avoided: what `redi`, `dpo` and `simpo`
    train on.

    One row for each pair: `prompt`, `chosen`, `rejected`, of both sides `sample`, `model`, `score` and `tokens` (as
    `chosen_tokens`) where they are known, and the prompt's other columns. Empty completions are in no pair, nor are two
    of the same text.
    """

    name: Literal["pairs"] = "pairs"
    prefer: AnyPreferring = Right()
    """What is preferred to what."""
    per_prompt: int | None = Field(1, ge=1)
    """Most pairs of one prompt; null takes all. A completion is in one pair at most."""

    def leaves(self, before: list[str]) -> list[str]:
        lacks(before, "prompt", "completion", *self.prefer.reads(), by="pairs")
        told = [f"{side}_{name}" for name in TOLD for side in ("chosen", "rejected") if name in before]
        ours = ["prompt", "chosen", "rejected", *told]
        return [*ours, *(name for name in before if name not in OF_ONE | JUDGED | set(ours))]

    def run(self, rows: Dataset, desk: Desk) -> Dataset:
        self.leaves(rows.column_names)
        groups: dict[str, list[Row]] = {}
        for row in rows:
            values: Row = dict(row)
            groups.setdefault(values.get("prompt_id") or digest(values["prompt"]), []).append(values)
        made: list[Row] = []
        for key, group in groups.items():
            written = [row for row in group if (row["completion"] or "").strip()]
            if len(written) < len(group):
                desk.counts.note("empty completions", key, len(group) - len(written))
            found = self.prefer.pairs(written, [desk.seed, key], desk.counts) if written else []
            found = [pair for pair in found if pair[0]["completion"] != pair[1]["completion"]]
            if not found:
                desk.counts.note("prompts without a pair", key)
            made.extend(joined(*pair) for pair in found[: self.per_prompt])
        if not made:
            raise ValueError("\n".join(["pairs: no prompt has a pair", *desk.counts.lines()]))
        desk.counts.figures["prompts with pairs"] = f"{len({row['prompt'] for row in made})} of {len(groups)}"
        return dataset_of(made)


def joined(chosen: Row, rejected: Row) -> dict[str, Any]:
    """Return one row of the two sides."""
    sides = {"chosen": chosen, "rejected": rejected}
    texts = {name: side["completion"] for name, side in sides.items()}
    told = {f"{name}_{column}": side[column] for column in TOLD for name, side in sides.items() if column in side}
    pair = {"prompt": chosen["prompt"], **texts, **told}
    return pair | {name: value for name, value in chosen.items() if name not in OF_ONE | JUDGED | set(pair)}
