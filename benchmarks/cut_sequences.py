"""The same run on one process and on ranks that have a part of every sequence each: do loss and weights stay?

    python benchmarks/cut_sequences.py [--quick] [--check] [--save]

Rows are case x ZeRO stage x ranks in groups of two (`tests/trainer/cut_runs.py` has the cases): six AdamW steps in fp32
on the same global batch of eight, clipped. Each rank asserts the world, its part, and that its student reads
`length / 2` positions. A row gives the largest relative difference to one process of a step's loss, and of a tensor's
weights at the end; and, on two ranks, what the graph of a micro-batch keeps for the backward pass beside weights, as a
share of what it keeps in one process with the same rows.

--check exits 1 unless every difference of a loss is at most 1e-5; --quick takes two cases, ZeRO-2, two ranks. The
figure is the largest difference of a loss.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
SCRIPT = TESTS / "trainer" / "cut_runs.py"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(TESTS), str(TESTS / "trainer")]
GATE, GROUP = 1e-5, 2


def compared(here: Path, alone: Path, case: str, stage: int, ranks: int) -> dict[str, Any]:
    """Return how far a run is from one process's, and what the graph of a rank keeps beside that one's."""
    import sharded_runs

    curve, weights = sharded_runs.differences(sharded_runs.read(here / case), sharded_runs.read(alone / case))
    kept = [
        max(max(json.loads(file.read_text())["kept"]) for file in (folder / case).glob("seen-*.json"))
        for folder in (here, alone)
    ]
    row = {"case": case, "stage": stage, "ranks": ranks, "sp_size": GROUP, "loss": curve, "weights": weights}
    row |= {"kept": kept[0] / kept[1]} if ranks == GROUP else {}
    print("  ".join(f"{key} {value:.2g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases on two ranks")
    parser.add_argument("--check", action="store_true", help="exit 1 where the gate is missed")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cut_sequences.json")
    args = parser.parse_args()
    from cut_runs import CASES
    from forks import on_ranks

    cases = ["logit_kd", "taid"] if args.quick else list(CASES)
    found = []
    with tempfile.TemporaryDirectory() as name:
        (alone := Path(name, "alone")).mkdir()
        on_ranks(1, SCRIPT, alone, "1", "0", *cases, seconds=900)
        for ranks in (2,) if args.quick else (2, 4):
            for stage in (2,) if args.quick else (1, 2, 3):
                (here := Path(name, f"{ranks}-{stage}")).mkdir()
                on_ranks(ranks, SCRIPT, here, str(GROUP), str(stage), *cases, seconds=900)
                found += [compared(here, alone, case, stage, ranks) for case in cases]
    if args.save:
        from machine import described

        path = ROOT / "benchmarks" / "results" / "cut_sequences.json"
        path.write_text(json.dumps({"machine": described(), "gate": GATE, "rows": found}, indent=1) + "\n")
    worst = max(row["loss"] for row in found)
    print(f"largest relative difference of a loss, {len(found)} rows (gate {GATE:.0e}): {worst:.1e}")
    return int(args.check and worst > GATE)


if __name__ == "__main__":
    sys.exit(main())
