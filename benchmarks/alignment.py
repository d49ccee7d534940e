"""Alignment across tokenizers: whether any text is misaligned, and what aligning costs.

    python benchmarks/alignment.py [--quick] [--check] [--save]

Right: random texts (words, code, white space of all kinds, combining marks, emoji sequences, scripts of both
directions, control characters, any code point, names of special tokens) are read by eight tokenizers and aligned in the
pairs of which one at least gives back what it reads, each text in three of them, in turn. `tests/alignment_laws.py`
says what must hold, without the code that is measured. Cost: rows of code of a training's length, on one thread;
`tokenise` is reading a text with both tokenizers, `align` what comes on top; the collator makes batches of 16 rows that
bring both readings, or only the student's and then are read for the teacher there. Each is the best of some rounds, in
turn, in seconds of the processor, so that what else runs on the machine matters little.

--check exits 1 unless no text is misaligned and aligning two exact tokenizers takes less than half of the time that
reading the text with both takes.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

KINDS = ("tiny", "4k", "bytes", "unigram-1k", "spbpe-1k", "wordpiece-1k", "nfkc-1k", "byt5")
COST = (("4k", "unigram-1k"), ("4k", "spbpe-1k"), ("4k", "bytes"), ("4k", "wordpiece-1k"), ("4k", "nfkc-1k"))
BATCH, ROW, GATE = 16, 2000, 0.5
TURNS = 11
"""Of so many pairs, a text is aligned in one."""


def misaligned(count: int, seed: int) -> dict[str, Any]:
    """Align so many random texts in every pair, and return how many were, and what went wrong with which."""
    from alignment_laws import faults, random_text
    from readers import reader

    from kdlm.data.alignment import Aligner
    from kdlm.spelling import spelling_of

    spellings = {kind: spelling_of(reader(kind)) for kind in KINDS}
    pairs = [
        (ours, theirs, Aligner(spellings[ours], spellings[theirs]))
        for ours, theirs in combinations_with_replacement(KINDS, 2)
        if spellings[ours].exact or spellings[theirs].exact
    ]
    source, wrong, aligned, whole = random.Random(seed), [], 0, 0
    for number in range(count):
        text = random_text(source, special=number % 4 == 0)
        for ours, theirs, align in pairs[number % TURNS :: TURNS]:
            ids, their_ids = spellings[ours].ids(text), spellings[theirs].ids(text)
            chunks, their_chunks = align(ids, ids, their_ids, their_ids)
            found = faults(spellings[ours], ids, chunks, spellings[theirs], their_ids, their_chunks, text)
            wrong += [{"pair": [ours, theirs], "text": text, "fault": fault} for fault in found]
            aligned += bool(chunks.max(initial=-1) >= 0 or not len(ids) or not len(their_ids))
            whole += 1
        if (number + 1) % 10_000 == 0:
            print(f"  {number + 1:,} texts, {len(wrong)} misaligned", flush=True)
    return {
        "texts": count,
        "pairs": len(pairs),
        "alignments": whole,
        "aligned_share": aligned / whole,
        "misaligned": wrong[:20],
    }


def cost(ours: str, theirs: str, rows: int, rounds: int) -> dict[str, float]:
    """Return tokens of both readings per second, of each part of the work."""
    from readers import reader

    from kdlm.data.alignment import Aligner
    from kdlm.data.load import text_collator
    from kdlm.sandbox import build
    from kdlm.sandbox.jsonl import read_jsonl
    from kdlm.spelling import spelling_of

    tokenizer, teacher = reader(ours), reader(theirs)
    documents = (row["text"] for row in read_jsonl(build("code", progress=None) / "train.jsonl"))
    texts = [text[:ROW] for text, _ in zip(documents, range(rows), strict=False)]
    read: dict[str, Any] = {}

    def tokenise() -> None:
        for name, one in (("ours", tokenizer), ("theirs", teacher)):
            read[name] = one(texts, add_special_tokens=False, verbose=False)["input_ids"]

    align, columns = Aligner(spelling_of(tokenizer), spelling_of(teacher)), ("chunks", "their_chunks")
    read["rows"] = []

    def aligning() -> None:
        read["rows"] = []
        for ids, their_ids in zip(read["ours"], read["theirs"], strict=True):
            labels, their_labels = [-100, *ids[1:]], [-100, *their_ids[1:]]
            numbers = dict(zip(columns, align(ids, labels, their_ids, their_labels), strict=True))
            row = {"input_ids": ids, "labels": labels, "their_ids": their_ids, "their_labels": their_labels, **numbers}
            read["rows"].append(row)

    collate = text_collator("padded", tokenizer, teacher)

    def collating(names: tuple[str, ...] | None = None) -> None:
        some = [row if names is None else {name: row[name] for name in names} for row in read["rows"]]
        for start in range(0, len(some), BATCH):
            collate(some[start : start + BATCH])

    parts: dict[str, Callable[[], None]] = {"tokenise": tokenise, "align": aligning, "collate_stored": collating}
    if spelling_of(tokenizer).exact:
        parts["collate_read_here"] = lambda: collating(("input_ids", "labels"))
    seconds = dict.fromkeys(parts, float("inf"))
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.process_time()
            part()
            seconds[name] = min(seconds[name], time.process_time() - start)
    tokens = sum(map(len, read["ours"])) + sum(map(len, read["theirs"]))
    speeds = {f"{name}_tokens_per_second": tokens / value for name, value in seconds.items()}
    return {"tokens": tokens, "align_to_tokenise": seconds["align"] / seconds["tokenise"], **speeds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 texts, few rows; a smoke test")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 when a text is misaligned or aligning costs too much"
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/alignment.json")
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    speeds = {}
    print(f"{'pair':<22}{'tokenise':>12}{'align':>12}{'align/tok.':>12}{'stored':>12}{'read here':>12}   tokens/s")
    for pair in COST[:2] if args.quick else COST:
        row = speeds["+".join(pair)] = cost(*pair, rows=32 if args.quick else 64, rounds=3 if args.quick else 7)
        columns = ("tokenise_tokens_per_second", "align_tokens_per_second", "align_to_tokenise")
        columns += ("collate_stored_tokens_per_second", "collate_read_here_tokens_per_second")
        figures = [f"{row[name]:>12,.2f}" if row[name] < 100 else f"{row[name]:>12,.0f}" for name in columns]
        print(f"{' and '.join(pair):<22}{''.join(figures)}", flush=True)
    right = misaligned(500 if args.quick else args.texts, args.seed)
    for fault in right["misaligned"]:
        print(fault)
    if args.save:
        from machine import described

        path = ROOT / "benchmarks" / "results" / "alignment.json"
        shape = {"row_characters": ROW, "batch": BATCH, "threads": 1}
        path.write_text(
            json.dumps({"machine": described(), "shape": shape, "right": right, "cost": speeds}, indent=1) + "\n"
        )
    exact = [row["align_to_tokenise"] for pair, row in speeds.items() if not pair.endswith(("wordpiece-1k", "nfkc-1k"))]
    print(f"{right['texts']:,} texts, {right['alignments']:,} times in {right['pairs']} pairs, ", end="")
    print(f"{right['aligned_share']:.1%} aligned")
    print(f"misaligned, and aligning to tokenising (gates: 0 and {GATE}): {len(right['misaligned'])} {max(exact):.3f}")
    return int(args.check and (bool(right["misaligned"]) or max(exact) >= GATE))


if __name__ == "__main__":
    sys.exit(main())
