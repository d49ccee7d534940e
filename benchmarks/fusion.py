"""Fusion: are two models with different tokenizers better together, once one has the other's tokenizer?

    python benchmarks/fusion.py [--check] [--quick] [--save]

The sandbox's `code-teacher` (2,048 ids) learns from itself to read with the tokenizer of `code-teacher-4k`, on text
that both were trained on (recipes/sandbox/fusion/move.yaml). Then each of the two, and the mean of their probabilities,
reads held-out code; and each teaches a student of its own, at equal steps and text (recipes/sandbox/fusion/fuse.yaml).

The move is also training, which both models could have more of. So its partner is read once more after as many steps of
cross-entropy on the same text, alone and together with the moved one.

The figures are bits per byte, which can be compared across tokenizers, on the same pieces of text: windows that begin
and end where both tokenizers have a boundary. Teachers of one seed, students of two, which differ in the order of text.

--check exits 1 unless the two together need no more bits per byte than the better one alone. (That they need no more
than their mean is Jensen's inequality.) Of the students nothing is gated. --quick takes tiny models and few steps: a
smoke test, which gates the inequality alone. --save writes benchmarks/results/fusion.json.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOVE, FUSE = (ROOT / "recipes" / "sandbox" / "fusion" / f"{name}.yaml" for name in ("move", "fuse"))
BRIEF = ["data.eval=null", "training.eval_strategy='no'", "training.save_strategy='no'", "training.logging_steps=50"]


class Sizes(NamedTuple):
    """Who is moved to whose tokenizer, who learns from both, for how many steps, and how much is read in the end."""

    source: str
    tokenizer: str
    partner: str
    student: str
    move_steps: int
    student_steps: int
    held_out: int
    seeds: int
    length: int = 128


WHOLE = Sizes("code-teacher", "code-tokenizer-4k", "code-teacher-4k", "code-student-4k", 150, 150, 20, 2)
QUICK = Sizes(
    "code-student-tiny-unigram", "code-tokenizer-tiny", "code-teacher-tiny", "code-student-tiny", 4, 4, 1, 1, 32
)


class HeldOut:
    """Windows of held-out text, each read with the new and with the old tokenizer."""

    def __init__(self, sizes: Sizes):
        from kdlm.data import DataSection, Source, load_data
        from kdlm.models import named

        source = Source(path="sandbox:code/eval", limit=sizes.held_out)
        section = DataSection(train=[source], max_length=sizes.length, teacher_max_length=4 * sizes.length)
        new, old = (named(f"sandbox:{name}").tokenizer() for name in (sizes.partner, sizes.source))
        data = load_data(section, new, old)
        rows: Any = data.train
        every = range(0, len(rows), 16)
        self.batches: list[Any] = [data.collator([rows[i] for i in range(at, min(at + 16, len(rows)))]) for at in every]
        self.bytes = sum(int(batch["bytes"].sum()) for batch in self.batches)

    def log_probs(self, model: Any, reading: str = "new") -> Any:
        """Return what the model says of each token of the text that is predicted, read with either tokenizer."""
        import torch

        found = []
        for batch in self.batches:
            own = batch if reading == "new" else batch["theirs"]
            labels = own["labels"][:, 1:]
            with torch.no_grad():
                logits = model(input_ids=own["input_ids"], attention_mask=own["attention_mask"]).logits[:, :-1]
            of_labels = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            found.append(of_labels[labels != -100])
        return torch.cat(found)

    def bits(self, log_probs: Any) -> float:
        """Return bits per byte."""
        return -log_probs.sum().item() / math.log(2) / self.bytes


def opened(folder: Path | str) -> Any:
    """Open a folder as anyone would, without kdlm."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def trained(recipe: Path, changes: list[str], folder: Path) -> Path:
    """Run a recipe without evaluation and return where its student is."""
    from kdlm.recipe import load
    from kdlm.train import train

    return train(load(recipe, [*BRIEF, *changes, f"run_dir={folder}"])) / "student"


def moved_and_trained(sizes: Sizes, folder: Path) -> tuple[Path, Path]:
    """Move the source; and train its partner as long, on the same text, by cross-entropy."""
    brief = [f"training.max_steps={sizes.move_steps}", f"data.max_length={sizes.length}"]
    move = [f"student.source.model={sizes.source}", f"student.tokenizer_from=sandbox:{sizes.tokenizer}"]
    moved = trained(MOVE, [*brief, *move, f"teacher.model={sizes.source}"], folder / "moved")
    alone = [f"student={{name: sandbox, model: {sizes.partner}}}", "teacher=null", "method={name: sequence_kd}"]
    return moved, trained(MOVE, [*brief, *alone], folder / "trained")


def together(sizes: Sizes, moved: Path, longer: Path, text: HeldOut) -> dict[str, float]:
    """Return the bits per byte of the source before and after its move, of its partner, and of the two averaged."""
    import torch

    from kdlm.sandbox import build

    before = text.log_probs(opened(build(sizes.source)), "old")
    partner, after, trained_on = (text.log_probs(opened(folder)) for folder in (build(sizes.partner), moved, longer))
    said = {
        f"{sizes.source}, its own tokenizer": before,
        f"{sizes.source}, moved": after,
        sizes.partner: partner,
        "both": torch.logaddexp(partner, after) - math.log(2),
        f"{sizes.partner}, trained as long": trained_on,
        "both, the partner trained as long": torch.logaddexp(trained_on, after) - math.log(2),
    }
    return {name: text.bits(log_probs) for name, log_probs in said.items()}


def students(sizes: Sizes, moved: Path, text: HeldOut, folder: Path) -> dict[str, list[float]]:
    """Return the bits per byte of students of each teacher and of both, one for each seed."""
    members = [f"{{name: sandbox, model: {sizes.partner}}}", f"{{name: local, path: {moved}}}"]
    teachers = {sizes.partner: members[0], f"{sizes.source}, moved": members[1]}
    teachers["both"] = f"{{name: ensemble, members: [{', '.join(members)}]}}"
    changes = [f"student.model={sizes.student}", f"training.max_steps={sizes.student_steps}"]
    found: dict[str, list[float]] = {}
    for name, teacher in teachers.items():
        found[name] = []
        for seed in range(sizes.seeds):
            own = [f"teacher={teacher}", f"seed={seed}", f"data.max_length={sizes.length}"]
            student = trained(FUSE, [*changes, *own], folder / f"student-{len(found)}-{seed}")
            found[name].append(text.bits(text.log_probs(opened(student))))
    return found


def run(sizes: Sizes, folder: Path) -> dict[str, dict[str, Any]]:
    moved, longer = moved_and_trained(sizes, folder)
    text = HeldOut(sizes)
    return {"teachers": together(sizes, moved, longer, text), "students": students(sizes, moved, text, folder)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the gate is missed")
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps: a smoke test")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/fusion.json")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    sizes = QUICK if args.quick else WHOLE
    with tempfile.TemporaryDirectory() as folder:
        found = run(sizes, Path(folder))
    for what, rows in found.items():
        print(f"{what}, bits per byte")
        for name, bits in rows.items():
            each = bits if isinstance(bits, list) else [bits]
            print(f"  {name:<48}{'  '.join(f'{one:.3f}' for one in each)}")
    members = [found["teachers"][name] for name in (sizes.partner, f"{sizes.source}, moved")]
    both, best, cpu_seconds = found["teachers"]["both"], min(members), sum(os.times()[:4])
    met = both <= (sum(members) / 2 if args.quick else best)
    if args.save:
        from machine import described

        about = {"machine": described(), "settings": sizes._asdict(), "cpu_seconds": cpu_seconds, "met": met}
        path = ROOT / "benchmarks" / "results" / "fusion.json"
        path.write_text(json.dumps({**about, **found}, indent=1) + "\n")
    print(f"{cpu_seconds:.0f} s of one core")
    print(f"both teachers together need {both:.3f} bits per byte, the better one alone {best:.3f}")
    return 1 if args.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
