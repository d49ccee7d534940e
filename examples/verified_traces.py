"""What a student is fine-tuned on after RL: the stage between the two of Metis-RISE, arXiv 2506.13056.

    python examples/verified_traces.py recipes/sandbox/metis_rise/rl.yaml --student ./runs/sandbox-metis-rl/student \\
        --expert ./runs/sandbox-sums-teacher/student --samples 8 --out runs/sandbox-metis-traces.jsonl

The recipe of the RL stage names data, verifier and sampling. The student attempts each prompt K times. Prompts that it
solves sometimes give its own verified attempts, prompts that it never solves one attempt of the expert each, if that is
right; prompts that it always solves are left out. Writes rows {"prompt", "completion", "by", "solved", "attempts"} for
`data.train`, and beside them, as the last lines say, what the bands are and what K attempts can know.

Prompts are read and written as plain text: of a chat template the model's own tokens would be lost.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kdlm.data import load_data
from kdlm.data.encoding import leading_tokens
from kdlm.disk import write_text
from kdlm.models import named
from kdlm.recipe import Recipe, load, reference_column
from kdlm.rollouts import Bands, Completion, GenerateSection, PassRate, Row, Sampling, Written, banded, prompt_of
from kdlm.verifiers import Judge


def prompts_of(recipe: Recipe, tokenizer: Any, limit: int | None) -> list[tuple[Row, str]]:
    """Return the rows of the recipe's training data and their prompts as text."""
    data: Any = recipe.data
    rows: Any = load_data(data.with_reference(reference_column(recipe)), tokenizer, seed=recipe.seed).train
    first = len(leading_tokens(tokenizer))
    taken = [rows[place] for place in range(min(limit or len(rows), len(rows)))]
    return [(row, tokenizer.decode(prompt_of(row, None)[first:])) for row in taken]


class Attempts:
    """Lets a model attempt prompts and the recipe's verifier judge them; `calls` counts its prompts."""

    def __init__(self, name: str, judge: Judge, sampling: Sampling, seed: int):
        self.judge, self.sampling, self.seed, self.calls = judge, sampling, seed, 0
        self.tokenizer: Any = named(name).tokenizer()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = named(name).load().to(device=device)
        self.engine = GenerateSection().build(model, self.tokenizer, device, copied=False)
        self.engine.take(model, 0)

    def __call__(self, asked: Sequence[tuple[Row, str]], samples: int) -> list[Written]:
        if not asked:
            return []
        self.calls += len(asked)
        leading = leading_tokens(self.tokenizer)
        prompts = [[*leading, *self.tokenizer(text, add_special_tokens=False)["input_ids"]] for _, text in asked]
        sampling = self.sampling.model_copy(update={"samples_per_prompt": samples})
        drawn: list[Completion] = self.engine.generate(prompts, sampling, self.seed)
        texts = self.tokenizer.batch_decode([one.ids for one in drawn], skip_special_tokens=True)
        references = [asked[one.group][0].get("reference") for one in drawn]
        verdicts = self.judge.judge(texts, references)
        return [
            Written(asked[one.group][0], prompts[one.group], one, text, verdict.score)
            for one, text, verdict in zip(drawn, texts, verdicts, strict=True)
        ]


def traces(bands: Bands, asked: Sequence[tuple[Row, str]], experts: Sequence[Written], success: float) -> list[Any]:
    """Return the rows of the fine-tuning, in the order of the prompts."""
    own = [(one.completion.group, one, "student") for one in bands.own]
    right = [one for one in experts if one.reward is not None and one.reward >= success]
    taught = [(bands.never[one.completion.group], one, "expert") for one in right if one.completion.stop == "end"]
    return [
        {"prompt": asked[n][1], "completion": one.text, "by": by, **asdict(bands.rates[n])}
        for n, one, by in sorted([*own, *taught], key=lambda found: found[0])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="of the RL stage")
    parser.add_argument("--student", required=True, help="what that stage trained: folder, hub id, sandbox:NAME")
    parser.add_argument("--expert", required=True, help="who is asked where the student never succeeds")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--samples", type=int, default=8, help="attempts at each prompt, K")
    parser.add_argument("--most", type=int, default=4, help="verified attempts kept of a prompt")
    parser.add_argument("--success", type=float, default=1.0, help="score from which on an attempt is right")
    parser.add_argument("--limit", type=int, help="prompts, the first ones; by default all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = load(args.recipe, [])
    if recipe.verifier is None or recipe.rollouts is None:
        parser.error(f"{args.recipe}: expected sections verifier and rollouts, as an RL stage has them")
    sampling = recipe.rollouts.sampling
    with Judge(recipe.verifier) as judge:
        student = Attempts(args.student, judge, sampling, args.seed)
        asked = prompts_of(recipe, student.tokenizer, args.limit)
        bands = banded(student(asked, args.samples), success=args.success, most=args.most)
        expert = Attempts(args.expert, judge, sampling, args.seed)
        rows = traces(bands, asked, expert([asked[number] for number in bands.never], 1), args.success)
    write_text(args.out, "".join(f"{json.dumps(row)}\n" for row in rows))
    for name in ("always", "sometimes", "never"):
        found = [rate for rate in bands.rates if rate.band == name]
        by = [row["by"] for row in rows]
        kept = {"sometimes": f", {by.count('student')} traces of the student", "never": f", {by.count('expert')} right"}
        print(f"{name}: {len(found)} prompts{kept.get(name, '')}")
    known = PassRate(0, args.samples).interval()[1]
    print(f"{args.out}: {len(rows)} rows; {expert.calls} calls of the expert; never means p < {known:.2f} (95 %)")


if __name__ == "__main__":
    main()
