"""A recipe of tiny models, and comparisons of it."""

from pathlib import Path

import yaml

from kdlm.compare import Comparison
from kdlm.section_loader import load_section

RECIPE = """
student: {name: fresh, config_from: "sandbox:code-student-tiny"}
teacher: {name: sandbox, model: code-teacher-tiny}
data: {train: [{path: "sandbox:code/train", limit: 2}], max_length: 32, eval_rows: 1}
method: {name: logit_kd}
losses: [{name: forward_kl}]
training: {max_steps: 4, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 1, save_steps: 2,
           use_cpu: true}
run_dir: runs/never
"""
PLAIN = ["method={name: sequence_kd}", "losses=[]"]


def comparison(folder: Path, **changes: object) -> Comparison:
    """Write the recipe and a comparison of it into a folder, and read the latter."""
    (folder / "recipe.yaml").write_text(RECIPE)
    runs = {"kd": {"recipe": str(folder / "recipe.yaml")}}
    whole = {"runs": runs, "seeds": [3], "workers": 1, "threads": 1, "output": str(folder / "out"), **changes}
    (folder / "comparison.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return load_section(Comparison, folder / "comparison.yaml")
