"""What does a teacher lose when it is quantised, and what does its student lose by that? Three seeds.

    python benchmarks/quantised_teacher.py [--quick] [--check] [--save]

The sandbox's `code-teacher` is opened in 8 and in 4 bits (bitsandbytes: int8, nf4), and with the weights of its linear
layers but the head rounded to 4, 3 and 2 bits in groups of 64. Loss of the teacher: KL(whole || quantised) on held-out
files, nats a token. Then a student of 0.4M weights learns from each of TEACHERS by forward KL, on the same rows, for
STEPS steps of 4 rows of 128 tokens; loss of the student: its KL(whole teacher || student) less that of the student of
the whole teacher, seed by seed, over the latter.

--check exits 1 unless each teacher loses less with more bits, and no student of a teacher of 8 or 4 bits loses more
than LIMIT on the mean; the figure is on the last line. --quick takes tiny models, one seed and few steps, and gates
nothing. --save writes benchmarks/results/quantised_teacher.json.
"""

import sys
from statistics import mean
from typing import Any

from command import options, save
from few_bits import distilled, kl, rounded, texts

LIMIT = 0.02
STEPS, RATE = 25, 2e-3
QUANTISED = ("8bit", "4bit", "int4", "int3", "int2")
TEACHERS = ("whole", "8bit", "4bit", "int2")


def opened(name: str, kind: str) -> Any:
    """Return the teacher, whole or quantised, on a CPU."""
    from kdlm.models import named

    if kind.endswith("bit"):
        return named(name, dtype="float32", quantization=kind).load(device_map={"": "cpu"})
    source = named(name, dtype="float32")
    return source.load() if kind == "whole" else rounded(source, int(kind.removeprefix("int")))


def main() -> int:
    args = options(__doc__)
    import logging

    from kdlm.losses import ForwardKL
    from kdlm.methods import LogitKD
    from kdlm.models import named

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tiny = "-tiny" if args.quick else ""
    name, seeds, steps = f"sandbox:code-teacher{tiny}", 1 if args.quick else 3, 4 if args.quick else STEPS
    pupil: Any = named(f"sandbox:code-student{tiny}", dtype="float32")
    data, held = texts(pupil.tokenizer())
    whole, rows = opened(name, "whole"), 16 if args.quick else 64
    teachers = {kind: kl(opened(name, kind), whole, held, rows) for kind in QUANTISED}
    for kind, one in teachers.items():
        print(f"teacher in {kind}: KL to itself {one['value']:.5f} ± {one['error']:.5f}", flush=True)
    students: dict[str, list[dict[str, float]]] = {kind: [] for kind in TEACHERS}
    for seed in range(seeds):
        for kind in TEACHERS:
            method = LogitKD([ForwardKL()])
            one = kl(distilled(pupil.load(), opened(name, kind), method, data, seed, steps, RATE), whole, held, rows)
            one["lost"] = one["value"] / students["whole"][seed]["value"] - 1 if kind != "whole" else 0.0
            students[kind].append(one)
            print(f"student of {kind}, seed {seed}: KL to the whole {one['value']:.4f}, {one['lost']:+.2%}", flush=True)
            if args.save:
                settings = {"steps": steps, "learning_rate": RATE, "seeds": seed + 1}
                save("quantised_teacher", {"settings": settings, "teachers": teachers, "students": students})
    lost = {kind: mean(one["lost"] for one in runs) for kind, runs in students.items()}
    order = [teachers[kind]["value"] for kind in ("8bit", "4bit", "int3", "int2")]
    good = order == sorted(order) and max(lost["8bit"], lost["4bit"]) < LIMIT
    print(
        f"a teacher in 4 bits loses {teachers['4bit']['value']:.5f} nats a token, its students {lost['4bit']:+.2%} of "
        f"their KL, over {seeds} seeds"
    )
    return int(args.check and not args.quick and not good)


if __name__ == "__main__":
    sys.exit(main())
