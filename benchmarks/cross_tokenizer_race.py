"""kdlm's and TRL's trainers across tokenizers, one step each in turn: for cross_tokenizer_quality.py.

Alike for all: the student's first weights, rows, batch, steps, learning rate and its schedule, AdamW, fp32, one thread;
nothing is drawn from the student (TRL's lmbda is 0). Each trainer runs in a process of its own and waits for its turn,
so that a machine's other work falls on all alike. Teachers are asked in every step. TRL wants prompts and completions:
what is context in a row is the prompt. It puts an end-of-sequence token after each completion and leaves it out of the
distillation; it is taken out of all distributions where bits are counted.

TRL 1.16 aligns byte-level tokenizers only (`use_extended_uld`). For the SentencePiece student it has its fallback,
which pairs positions by their index.
"""

import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from cross_tokenizer_arms import Arm, arguments, initial, trainer_of
from cross_tokenizer_rows import STUDENTS, TEACHER, bits_per_byte, folder, held_out, pieces, tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback

WARM_UP = 3
"""Steps that are not timed."""


@dataclass(frozen=True)
class Racer:
    """A trainer: kdlm's with an arm's way, or TRL's GOLD where `trl` has its options."""

    name: str
    arm: Arm
    trl: tuple[tuple[str, Any], ...] | None = None


def teacher() -> Any:
    return AutoModelForCausalLM.from_pretrained(folder(TEACHER)).eval().requires_grad_(False)


def trl_trainer(racer: Racer, output: str, student: Any) -> Any:
    from datasets import Dataset
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    arm = racer.arm
    texts = [(piece.encode()[:begin].decode(), piece.encode()[begin:].decode()) for piece, begin in pieces(arm.text)]
    given = Dataset.from_list([{"prompt": prompt, "completion": rest} for prompt, rest in texts[: arm.rows]])
    config = GOLDConfig(
        **arguments(output, arm),
        **{"bf16": False, "gradient_checkpointing": False, "max_length": 1024, "lmbda": 0.0, "use_uld_loss": True},
        **{"uld_use_hybrid_loss": True, "teacher_tokenizer_name_or_path": str(folder(TEACHER))},
        **dict(racer.trl or ()),
    )
    return GOLDTrainer(
        student,
        teacher_model=teacher(),
        args=config,
        train_dataset=given,
        processing_class=tokenizer(STUDENTS[arm.student]),
    )


class Turns(TrainerCallback):
    """Takes one step when told to, and says how long it took."""

    def __init__(self, pipe: Any):
        self.pipe, self.began, self.cpu = pipe, 0.0, 0.0

    def _wait(self) -> None:
        self.pipe.recv()
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pipe.send((time.perf_counter() - self.began, time.process_time() - self.cpu))
        self._wait()


def child(racer: Racer, pipe: Any) -> None:
    """Train once, in this process, and say what each step took and what the student is worth."""
    from transformers.utils import logging as hf_logging

    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    name = STUDENTS[racer.arm.student]
    student = initial(name, racer.arm.seed)
    with tempfile.TemporaryDirectory() as output:
        if racer.trl is None:
            trainer: Any = trainer_of(racer.arm, output, student, teacher())
        else:
            trainer = trl_trainer(racer, output, student)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Turns(pipe))
        trainer.train()
    student.eval()
    pipe.send(bits_per_byte(student, held_out(name, racer.arm.scored), without=tokenizer(name).eos_token_id))


def race(racers: list[Racer]) -> list[dict[str, Any]]:
    """Let all take their steps in turn, in an order that moves on; return what each is worth and its pace.

    A trainer whose process ends early has no bits per byte and no seconds: what went wrong is on the standard error.
    """
    context, steps = get_context("spawn"), racers[0].arm.steps
    pipes, running = [], []
    for racer in racers:
        ours, theirs = context.Pipe()
        running.append(context.Process(target=child, args=(racer, theirs), daemon=True))
        running[-1].start()
        theirs.close()  # so that the end of the child is seen here
        pipes.append(ours)
    took: list[list[tuple[float, float]]] = [[] for _ in racers]
    left = dict.fromkeys(range(len(racers)))  # ordered
    for turn in range(steps):
        first = turn % len(left)
        for place in [*left][first:] + [*left][:first]:
            try:
                pipes[place].send("go")
                took[place].append(pipes[place].recv())
            except (EOFError, OSError):
                del left[place]
        if not left:
            break
    return [
        _result(*one, ran=place in left) for place, one in enumerate(zip(racers, pipes, running, took, strict=True))
    ]


def _result(racer: Racer, pipe: Any, process: Any, times: list[tuple[float, float]], ran: bool) -> dict[str, Any]:
    if not ran:
        return {"name": racer.name, "bits_per_byte": None, "seconds": None, "cpu_seconds": None}
    pipe.send("go")
    value = pipe.recv()
    process.join()
    seconds, cpu = (list(column) for column in zip(*times[WARM_UP:], strict=True))
    return {"name": racer.name, "bits_per_byte": value, "seconds": seconds, "cpu_seconds": cpu}


def ratio(one: dict[str, Any], other: dict[str, Any], key: str = "seconds") -> float:
    """Return the pace of one over the other's: the median over the turns of the other's seconds over the one's."""
    return median(b / a for a, b in zip(one[key], other[key], strict=True))
