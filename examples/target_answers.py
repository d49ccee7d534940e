"""The target answers prompts at several temperatures: text to train its draft on, stage 2 of arXiv 2403.00858.

    python examples/target_answers.py --target Qwen/Qwen3-8B --prompts prompts.jsonl --out answers.jsonl
    python examples/target_answers.py --target sandbox:code-teacher --prompts sandbox:code/train --out answers.jsonl

Writes rows {"prompt", "completion", "temperature"} for `data.train` of a recipe. A recipe reads them as text, which a
tokenizer may cut into other tokens than the target drew. So an answer ends where it would be read otherwise, and a row
of which nothing is left is dropped; both are counted. An answer that did not end by itself is still read with an end
token after it: losses between distributions do not look at that label, cross-entropy would learn it.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kdlm.data import DataSection, Source, load_data
from kdlm.data.encoding import Encoded, Encoder, leading_tokens
from kdlm.data.forms import Form
from kdlm.disk import write_text
from kdlm.models import named
from kdlm.rollouts import GenerateSection, Sampling, prompt_of


def read_prompts(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, leading: int) -> list[list[int]]:
    """Return the prompts of a source, of any form that a recipe reads; of plain text the beginning of each piece."""
    rows: Any = load_data(DataSection(train=[Source(path=path)], max_length=max_length), tokenizer).train
    prompts = [prompt_of(row, leading) for row in rows]
    return [prompt for prompt in prompts if len(prompt) < max_length]


class Writer:
    """Makes a row of a prompt and its completion, as far as a recipe will read the tokens that were drawn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        form = Form("completion", {"prompt": "prompt", "completion": "completion"})
        section = DataSection(train=[Source(path="answers")], max_length=2**31)
        self.tokenizer, self.encode, self.leading = (
            tokenizer,
            Encoder(tokenizer, section, form),
            leading_tokens(tokenizer),
        )

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def row(self, prompt: list[int], drawn: list[int]) -> tuple[dict[str, Any], int]:
        """Return the row and how many tokens of the completion it keeps, none of it: an empty row."""
        kept = len(drawn)
        while kept:
            row = {"prompt": self.text(prompt[len(self.leading) :]), "completion": self.text(drawn[:kept])}
            same = self.same(row, [*prompt, *drawn[:kept]]) - len(prompt)
            if same >= kept:
                return row, kept
            kept = max(0, min(same, kept - 1))  # what is left may be cut otherwise at its new end
        return {}, 0

    def same(self, row: dict[str, Any], ids: list[int]) -> int:
        """Return how many leading tokens a recipe reads as they were drawn: 0 for a row that it would refuse."""
        read: Any = self.encode([("", row)])[0]
        if not isinstance(read, Encoded):
            return 0
        pairs = zip(read.sequences[0].ids, ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def answers(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[float, list[int], list[int]]]:
    """Yield temperature, prompt and what the target wrote, for every temperature and prompt."""
    prompts = read_prompts(args.prompts, tokenizer, args.max_length, args.prompt_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = named(args.target, dtype=args.dtype).load().to(device=device)
    engine = GenerateSection(batch_size=args.batch_size).build(target, tokenizer, device, copied=False)
    engine.take(target, 0)
    room = args.max_length - min(map(len, prompts))
    for number, temperature in enumerate(args.temperatures):
        sampling = Sampling(temperature=temperature, max_new_tokens=room)
        for completion in engine.generate(prompts, sampling, args.seed + number):
            prompt = prompts[completion.group]
            yield temperature, prompt, completion.ids[: args.max_length - len(prompt)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="hub id, folder, or sandbox:code-teacher")
    parser.add_argument("--prompts", required=True, help="file, folder, hub id, or sandbox:code/train")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.3, 0.7, 1.0])
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and answer together")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of plain text, what is the prompt")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = named(args.target).tokenizer()
    writer, rows, counts = Writer(tokenizer), [], Counter()
    for temperature, prompt, drawn in answers(args, tokenizer):
        row, kept = writer.row(prompt, drawn)
        if row:
            rows.append({**row, "temperature": temperature})
        counts.update(answers=1, tokens=len(drawn), kept=kept, cut=0 < kept < len(drawn))
    write_text(args.out, "".join(f"{json.dumps(row)}\n" for row in rows))
    print(
        f"{args.out}: {len(rows)} of {counts['answers']} answers, {counts['kept']} of {counts['tokens']} tokens; "
        f"{counts['answers'] - len(rows)} dropped and {counts['cut']} cut where they would be read otherwise"
    )


if __name__ == "__main__":
    main()
