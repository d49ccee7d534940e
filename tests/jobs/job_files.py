"""Small tasks and jobs for tests: texts longer than a tiny model's context, choices, answers."""

import json
from pathlib import Path
from typing import Any

from kdlm.jobs import Job
from kdlm.section_loader import load_section

TEXTS = [f"def scaled_{n}(x, y):\n    return x + y * {n}\n" * (9 * n + 1) for n in range(5)]
TEACHER, STUDENT = "sandbox:code-teacher-tiny", "sandbox:code-student-tiny"
MODELS = {
    "teacher": {"name": "hf", "path": TEACHER, "role": "teacher"},
    "student": {"name": "hf", "path": STUDENT, "role": "student"},
    "plain": {"name": "hf", "path": STUDENT, "role": "baseline", "dtype": "bfloat16"},
}
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
metadata: {{version: 1}}
"""
PERPLEXITY = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: text\n'
CHOICE = """output_type: multiple_choice
doc_to_text: question
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
ANSWER = """output_type: generate_until
doc_to_text: question
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 6, until: ["\\n"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_tasks(folder: Path) -> Path:
    """Write the tasks tiny_perplexity, tiny_choice and tiny_answer."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [
        {"question": f"import {word}\nfrom {word} import", "choices": ["path", "match", word], "answer": place % 3}
        for place, word in enumerate(["os", "re", "sys", "json", "math", "abc", "ast", "cmd", "csv", "dis", "glob"])
    ]
    for name, rows in {"texts": [{"text": text} for text in TEXTS], "questions": questions}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, file, rest in (
        ("tiny_perplexity", "texts", PERPLEXITY),
        ("tiny_choice", "questions", CHOICE),
        ("tiny_answer", "questions", ANSWER),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / f"{file}.jsonl") + rest)
    return folder


def job_in(folder: Path, *overrides: str, models: Any = None, tasks: Any = ("tiny_perplexity", "tiny_choice")) -> Job:
    """Write a job with its tasks into a folder, and read it."""
    tasks = tasks if isinstance(tasks, dict) else dict.fromkeys(tasks)
    said = {
        "models": models or MODELS,
        "tasks": tasks,
        "include_path": [str(write_tasks(folder / "tasks"))],
        "output": str(folder / "out"),
        "cache": str(folder / "cache"),
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(said, indent=1))  # JSON is YAML
    return load_section(Job, path, overrides)
