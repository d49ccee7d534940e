"""How to run it again: commands, recipes, environment; and which rows of the data were not used."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from kdlm.report.groups import flat
from kdlm.report.markup import Html, element, joined, table
from kdlm.report.run import Run
from kdlm.yaml_document import dump


def reproduce(runs: Sequence[Run]) -> Html:
    """Return the command of every run, the first one's recipe in full, and what the runs ran on."""
    first = runs[0]
    said = (
        f"Save the recipe of {first.name}, which spells out every default, as recipe.yaml; the commands train each run."
    )
    commands = "\n".join(command(run, first) for run in runs)
    parts = [element("p", said, class_="said"), element("pre", element("code", commands))]
    for run in runs:
        text = element("pre", element("code", dump(run.recipe)))
        parts.append(element("details", element("summary", f"Recipe of {run.name}"), text))
    return joined([*parts, *_environments(runs)])


def command(run: Run, first: Run) -> str:
    """Return the `kdlm train` command that makes `run` of the recipe of `first`, by overrides of what differs."""
    words = overrides(first.recipe, run.recipe)
    return shlex.join(["kdlm", "train", "recipe.yaml", *words])


def overrides(base: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the overrides that turn one recipe into the other.

    A key is set by itself where both recipes have the same keys in that part, else the part is given whole.
    """
    words = []
    for part, value in wanted.items():
        before = base.get(part)
        if before == value:
            continue
        ours, theirs = flat(value, part), flat(before, part)
        if part in base and isinstance(value, dict) and ours.keys() == theirs.keys():
            words += [f"{key}={_flow(leaf)}" for key, leaf in ours.items() if leaf != theirs[key]]
        else:
            words.append(f"{part}={_flow(value)}")
    return words + [f"{part}=null" for part in base if part not in wanted]


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    import yaml

    from kdlm.yaml_document import CoreDumper

    text = yaml.dump(
        value, Dumper=CoreDumper, default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _environments(runs: Sequence[Run]) -> list[Html]:
    there = [run for run in runs if run.environment]
    if not there:
        return [element("p", "environment.json is missing: what the runs ran on is not known.", class_="said")]
    flats = [flat(run.environment) for run in there]
    names = dict.fromkeys(name for each in flats for name in each)
    if all(each == flats[0] for each in flats):
        rows = [[name, str(flats[0][name])] for name in names if flats[0][name] is not None]
        head = ["", "all runs" if len(there) > 1 else there[0].name]
    else:
        rows = [[name, *(str(each.get(name, "")) for each in flats)] for name in names]
        head = ["", *(run.name for run in there)]
    rows = [[name.removeprefix("packages."), *cells] for name, *cells in rows]
    return [element("details", element("summary", "Environment"), table(head, rows, "Environment", class_="words"))]


def dropped(runs: Sequence[Run]) -> Html:
    """Return a table of the rows that were not used or cut, and why; one line where there is none."""
    rows: list[list[Any]] = []
    seen: set[str] = set()
    for run in runs:
        for split in ("train", "eval"):
            for source in run.data.get(split) or []:
                if (text := repr((split, source))) in seen:
                    continue
                seen.add(text)
                rows += [
                    [source["source"], split, reason, f"{unused['count']:,}", "; ".join(unused["examples"])]
                    for reason, unused in source.get("unused", {}).items()
                ]
                rows += [
                    [source["source"], split, what, f"{source[name]:,}", ""]
                    for name, what in (("truncated", "cut at max_length"), ("split", "split into pieces"))
                    if source.get(name)
                ]
    if not any(run.data for run in runs):
        return Html("")
    if not rows:
        return element("p", "Every row was used whole.", class_="said")
    return table(["source", "split", "what", "rows", "examples"], rows, "Rows not used, cut or split", class_="words")
