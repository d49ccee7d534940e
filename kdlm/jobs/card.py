"""card: a job's results as a markdown table for a model card."""

from typing import Any

from kdlm.estimates import SIGNIFICANT, finite, written
from kdlm.jobs.speed import READINGS
from kdlm.markdown import table
from kdlm.metrics import metric as described
from kdlm.yaml_document import dump

ARROWS = {True: " ↑", False: " ↓", None: ""}
BESIDE = (
    *("cross_entropy", "bits_per_byte", "kl_to_teacher", "reverse_kl_to_teacher", "top1_agreement", "top5_agreement"),
    *("acceptance_rate", "block_efficiency", "ece", "teacher_ece", "kl_to_start", "gap_closed"),
)
"""What the table shows of `distillation`; results.json has all of it."""


def card(found: dict[str, Any]) -> str:
    """Return results.md: the tables of what was measured, for a model card."""
    parts = [_metrics(found)] if found["tasks"] else []
    if "distillation" in found:
        parts.append(_distillation(found["distillation"]))
    if "speed" in found:
        parts.append(_speed(found["speed"]))
    by = "Made by `kdlm eval` with lm-evaluation-harness.\n" if found["tasks"] else "Made by `kdlm eval`.\n"
    return "\n".join([*parts, by])


def model_index(found: dict[str, Any], model: str) -> str:
    """Return the `model-index` of one model, as the head of a hub's model card has it."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    figures = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=name,
            metric_value=metric["models"][model]["value"],
            metric_name=name,
        )
        for task, name, metric in _rows(found)
        if metric["models"].get(model, {"value": None})["value"] is not None
    ]
    return dump({"model-index": eval_results_to_model_index(model, figures)})


def _metrics(found: dict[str, Any]) -> str:
    """Return a row for each metric, a column for each model, and marks where a student differs from the baseline."""
    models = found["models"]
    heads = [f"{name} ({model['role']})" if model["role"] != "other" else name for name, model in models.items()]
    gaps = any(metric["gap_closed"] for _, _, metric in _rows(found))
    rows = []
    for task, name, metric in _rows(found):
        cells = [_cell(metric, model) for model in models]
        closed = [f"{model}: {shown(gap)}" for model, gap in metric["gap_closed"].items()]
        if len(closed) == 1:
            closed = [closed[0].partition(": ")[2]]
        rows.append([task, name + ARROWS[metric["higher_is_better"]], *cells, *([", ".join(closed)] if gaps else [])])
    head = ["task", "metric", *heads, *(["gap closed"] if gaps else [])]
    return f"{table(head, rows, words=2)}\n\n{_explained(found)}\n"


def _distillation(measured: dict[str, Any]) -> str:
    names = [name for name in BESIDE if any(name in one["metrics"] for one in measured.values())]
    rows = []
    for name in names:
        figures = [one["metrics"].get(name) for one in measured.values()]
        rows.append([described(name).label, *("" if figure is None else shown(figure, name) for figure in figures)])
    counts = ", ".join(f"{one['tokens']} of {name}" for name, one in measured.items())
    notes = dict.fromkeys(note for one in measured.values() for note in one["notes"])
    said = [f"Means over tokens ({counts}) ± standard error over documents.", *(f"{note}." for note in notes)]
    return f"{table(['beside the teacher', *measured], rows, words=1)}\n\n{' '.join(said)}\n"


def _speed(speed: dict[str, Any]) -> str:
    rows = []
    for size in next(iter(speed.values()))["batch"]:
        for key in READINGS:
            cells = []
            for model in speed.values():
                ratio = model["batch"][size].get("against_teacher", {}).get(key, {"value": None})["value"]
                cells.append(shown(model["batch"][size][key], key) + ("" if ratio is None else f" ({ratio:.2f}x)"))
            rows.append([described(key).label, size, *cells])
    disk = ["-" if model["bytes"] is None else f"{model['bytes'] / 2**20:.1f}" for model in speed.values()]
    rows.append(["size on disk, MiB", "", *disk])
    said = "Medians of turns; in brackets the ratio to the teacher in the same turns."
    return f"{table(['speed', 'batch', *speed], rows, words=1)}\n\n{said}\n"


def shown(figure: dict[str, float | None], name: str = "") -> str:
    """Write a figure with as many digits as its error bears, in the unit of the metric that it is."""
    value, error = finite(figure["value"]), finite(figure["error"])
    scale = described(name).scale
    return written(value and value * scale, error and error * scale)


def _rows(found: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (task, name, metric)
        for task, about in found["tasks"].items()
        if about["asked"]
        for name, metric in about["metrics"].items()
    ]


def _cell(metric: dict[str, Any], model: str) -> str:
    figure = metric["models"].get(model)
    if figure is None:
        return ""
    mark = verdict(metric, metric["against_baseline"].get(model))
    return {"better": f"**{shown(figure)}**", "worse": f"{shown(figure)} ▾"}.get(mark, shown(figure))


def verdict(metric: dict[str, Any], pair: dict[str, Any] | None) -> str:
    """Return `better` or `worse` where a difference is significant, else nothing."""
    if pair is None or metric["higher_is_better"] is None:
        return ""
    if pair["p_value"] is None or pair["p_value"] >= SIGNIFICANT:
        return ""
    return "better" if (pair["difference"] > 0) == metric["higher_is_better"] else "worse"


def _explained(found: dict[str, Any]) -> str:
    baseline = next((name for name, model in found["models"].items() if model["role"] == "baseline"), None)
    taken = sorted({name for _, name, metric in _rows(found) if metric["errors_from"] != "documents"})
    parts = [
        "Value ± standard error over documents" + (f" (lm-eval's own for {', '.join(taken)})" if taken else "") + "."
    ]
    if baseline:
        parts.append(
            f"**Bold**: significantly better than {baseline} on the same documents, ▾: significantly worse (paired, "
            f"two-sided, p < {SIGNIFICANT:g} each, not corrected for the number of rows)."
        )
    return " ".join(parts)
