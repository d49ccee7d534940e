"""`kdlm init`: a commented recipe for a teacher, a student and data, with a loss that can work for the three."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlm import capacity_gap
from kdlm.capacity_gap import parameters
from kdlm.data import Source
from kdlm.data.byte_order import is_of_bytes
from kdlm.data.forms import recognise
from kdlm.data.paired_vocabulary import PairedVocabulary
from kdlm.data.sources import open_source
from kdlm.data.vocabulary import shared_vocabulary
from kdlm.disk import write_text
from kdlm.models import named
from kdlm.recipe import load
from kdlm.spelling import spelling_of
from kdlm.yaml_document import dump

WIDE_GAP = 10
"""From this ratio of parameters on, the target starts near the student (TAID) instead of at the teacher."""

OVERLAP = 0.5
"""From this share of the larger vocabulary on, tokens are compared that both have, though under other ids. Single bytes
do not count: every vocabulary has them."""

ACROSS = ("alm", "shared_vocabulary_kd")
"""Methods that have the teacher read the text with its own tokenizer."""

SWAPPED = "the teacher is not larger than the student; are the two swapped?"

COLUMNS = {
    "prompt": ("prompt", "question", "instruction", "input", "query"),
    "completion": ("completion", "answer", "response", "output", "solution"),
    "text": ("text", "content", "document"),
}
"""What people call the columns that kdlm calls prompt, completion and text."""


@dataclass(frozen=True)
class Model:
    """One of the two models: how the recipe names it, its tokenizer, its sizes."""

    given: str
    tokenizer: Any
    vocab_size: int
    parameters: int
    longest: int | None

    @property
    def size(self) -> str:
        scale, unit = (1e9, "B") if self.parameters >= 1e9 else (1e6, "M") if self.parameters >= 1e6 else (1e3, "k")
        return f"{self.parameters / scale:.3g}{unit} parameters"

    def section(self, name: str, **options: Any) -> dict[str, Any]:
        """Return the recipe's section; `name` is that of a model with a path."""
        if self.given.startswith("sandbox:"):
            return {"name": "sandbox", "model": self.given.removeprefix("sandbox:")}
        return {"name": name, "path": self.given, **options}


@dataclass
class Plan:
    """What the recipe will say: the method, its losses, why, and what to be careful about."""

    method: dict[str, Any]
    losses: list[dict[str, Any]]
    why: list[str]
    warnings: list[str] = field(default_factory=list)
    with_teacher: bool = True


def write_recipe(teachers: list[str], student: str, data: str, output: Path, *, force: bool = False) -> list[str]:
    """Write a recipe and return what was found, a line each.

    Args:
        teachers: hub ids, folders, or `sandbox:code-teacher`; of several the one whose size suits the student best.
        student: said likewise.
        data: hub id, folder, file, or `sandbox:code`.
        output: the file to write.
        force: replace it if it is there.

    Raises ValueError when a model or the data cannot be opened, or the file is there already.
    """
    if output.exists() and not force:
        raise ValueError(f"{output}: there already; give another --output, or --force to replace it")
    source, form = look_at_data(data)
    small, candidates = look_at(student), {teacher: look_at(teacher) for teacher in teachers}
    sizes = {name: model.parameters for name, model in candidates.items()}
    teacher = capacity_gap.nearest(small.parameters, sizes)
    large, said = candidates[teacher], capacity_gap.advice(small.parameters, sizes) if len(teachers) > 1 else []
    plan = choose(large, small)
    if careful := capacity_gap.warning(small.parameters, sizes):
        plan.warnings.append(careful)
    if form == "chat" and plan.method["name"] in ACROSS and not getattr(large.tokenizer, "chat_template", None):
        plan.warnings.append(
            "the data is chat but the teacher's tokenizer has no chat template: set data.teacher_chat_template"
        )
    if form == "chat" and not getattr(small.tokenizer, "chat_template", None):
        plan.warnings.append(
            "the data is chat but the student's tokenizer has no chat template: set data.chat_template"
        )
    text = written(large, small, source, form, plan, output)
    with tempfile.TemporaryDirectory() as folder:  # what does not load is not left behind
        draft = Path(folder) / output.name
        draft.write_text(text, encoding="utf-8")
        load(draft)
    write_text(output, text)
    found = [f"teacher: {teacher}, {large.size}", f"student: {student}, {small.size}", f"data: {data}, {form} rows"]
    return [
        *found,
        *said,
        *plan.why,
        *(f"warning: {line}" for line in plan.warnings),
        f"wrote {output}; next: kdlm check {output}",
    ]


def look_at(given: str) -> Model:
    """Open a model's configuration and tokenizer, not its weights."""
    model = named(given)
    config, tokenizer = model.config(), model.tokenizer()
    text = config.get_text_config()
    return Model(given, tokenizer, text.vocab_size, parameters(config), getattr(text, "max_position_embeddings", None))


def look_at_data(given: str) -> tuple[dict[str, Any], str]:
    """Return the recipe's source for `given` and the form of its rows: chat, completion or text."""
    if given.startswith("sandbox:") and "/" not in given:
        given += "/train"
    columns = open_source(Source(path=given)).columns
    guessed = {
        ours: name for ours, names in COLUMNS.items() if (name := next((n for n in names if n in columns), None))
    }
    for wanted in ({}, {key: guessed.get(key) for key in ("prompt", "completion")}, {"text": guessed.get("text")}):
        if None in wanted.values():
            continue
        source = {"path": given} | ({"columns": wanted} if wanted else {})
        try:
            return source, recognise(Source.model_validate(source), columns).name
        except ValueError:
            continue
    return {"path": given}, recognise(Source(path=given), columns).name  # raises, and says what it looked for


def choose(teacher: Model, student: Model) -> Plan:
    """Pick the method and the losses from the two tokenizers and sizes."""
    shared = shared_vocabulary(student.tokenizer, teacher.tokenizer, student.vocab_size, teacher.vocab_size)
    gap = teacher.parameters / student.parameters
    if shared.conflicts:
        plan = across(teacher, student, [f"the tokenizers differ: {line}" for line in shared.conflicts])
        plan.warnings += [SWAPPED] if gap <= 1 else []
        return plan
    why = [f"the tokenizers share {len(shared)} token ids, so losses on logits work"]
    if gap > WIDE_GAP:
        why.append(
            f"method: taid, because the teacher is {gap:.0f} times larger: its target moves away from the student"
        )
        plan = Plan({"name": "taid"}, [{"name": "cross_entropy", "weight": 0.1}], why)
    else:
        why.append(f"method: logit_kd with forward_kl; the teacher is {gap:.1f} times larger")
        losses = [{"name": "forward_kl", "temperature": 1.0}, {"name": "cross_entropy", "weight": 0.1}]
        plan = Plan({"name": "logit_kd"}, losses, why)
    plan.warnings += shared.differences
    plan.warnings += [SWAPPED] if gap <= 1 else []
    return plan


def across(teacher: Model, student: Model, why: list[str]) -> Plan:
    """Pick the method for two tokenizers, by what they make of text and how many tokens they have in common."""
    ours, theirs = spelling_of(student.tokenizer), spelling_of(teacher.tokenizer)
    cross_entropy = {"name": "cross_entropy"}
    if not ours.exact and not theirs.exact:
        why += [
            "both change text before they read it (lower case, normalisation, spaces left out): what their tokens "
            "stand for cannot be compared",
            "method: sequence_kd, which learns from text that the teacher wrote and needs no common tokenizer",
        ]
        careful = ["sequence_kd distils only when the teacher wrote the data: see to that"]
        return Plan({"name": "sequence_kd"}, [cross_entropy], why, careful, with_teacher=False)
    common, sizes = PairedVocabulary(ours, theirs).matched[0], (len(student.tokenizer), len(teacher.tokenizer))
    said = f"{len(common)} tokens spell the same bytes, of the student's {sizes[0]} and the teacher's {sizes[1]}"
    careful = []
    if not ours.exact or not theirs.exact:
        careful.append(
            f"the {'teacher' if ours.exact else 'student'}'s tokenizer changes text before it reads it: where that "
            "shows, rows are left out as not aligned; see the data's report"
        )
    if ours.exact and theirs.exact and is_of_bytes(ours):
        why += ["method: byte_kd, because the student reads bytes: the teacher has a law of the next byte at every one"]
        return Plan({"name": "byte_kd"}, [{"name": "forward_kl"}], why, careful)
    longer, most = (ours.lengths[common] > 1).sum(), max((one.lengths > 1).sum() for one in (ours, theirs))
    if longer >= OVERLAP * most and ours.exact and theirs.exact:
        how = "forward_kl over the tokens that both have, where both have read the same text"
        losses = [{"name": "forward_kl"}, cross_entropy | {"weight": 0.1}]
        why += [said, f"method: shared_vocabulary_kd, {how}"]
        return Plan({"name": "shared_vocabulary_kd"}, losses, why, careful)
    why += [said, "method: alm, which compares how likely both find each piece of text, and no tokens"]
    return Plan({"name": "alm"}, [cross_entropy], why, careful)


def written(teacher: Model, student: Model, source: dict[str, Any], form: str, plan: Plan, output: Path) -> str:
    """Return the recipe as commented YAML."""
    length = min(1024, *(m.longest for m in (teacher, student) if m.longest), 1024)
    data: dict[str, Any] = {"train": [source], "max_length": length}
    if source["path"].startswith("sandbox:"):
        data["eval"] = [{"path": source["path"].replace("/train", "/eval").replace("code-written", "code")}]
        evaluated = "Held-out rows, for the figures that say how close the student came."
    else:
        data["eval_fraction"] = 0.02
        evaluated = "2 % of the rows are held out, for the figures that say how close the student came."
    if form == "text":
        data["packing"] = "pack"
    rate = 2e-3 if student.parameters < 1e7 else 3e-4 if student.parameters < 2e8 else 2e-5
    training = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "eval_strategy": "epoch",
        "save_steps": 500,
        "save_total_limit": 2,
    }
    small = student.section("pretrained", dtype="float32")
    parts = [
        ("\n".join(plan.why + [f"Careful: {line}" for line in plan.warnings]), {}),
        (f"The model that learns: {student.size}.", {"student": small}),
    ]
    if plan.with_teacher:
        about = f"What it learns from: {teacher.size}, frozen. quantization: 4bit saves memory."
        parts.append((about, {"teacher": teacher.section("local", dtype="auto")}))
    else:
        parts.append((f"No teacher while training; {teacher.given} wrote the data.", {}))
    parts += [
        (f"Rows of form {form}. {evaluated}", {"data": data}),
        ("What one training step computes; `kdlm methods` lists the others.", {"method": plan.method}),
        ("The token losses that are summed, each with its weight.", {"losses": plan.losses}),
        ("Arguments of the Hugging Face Trainer. Raise the batch until memory is full.", {"training": training}),
        ("Resolved recipe, metrics, checkpoints and the student go here.", {"run_dir": f"runs/{output.stem}"}),
        ("", {"seed": 0}),
    ]
    return "\n".join(
        "".join(f"# {line}\n" for line in comment.splitlines()) + (dump(section) if section else "")
        for comment, section in parts
    )
