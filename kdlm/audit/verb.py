"""`kdlm audit`: read, audit, write."""

import json
from collections.abc import Sequence
from pathlib import Path

from kdlm.audit.auditing import amplification, audit
from kdlm.audit.rows import read_rows
from kdlm.audit.writing import as_json, as_markdown, verdict
from kdlm.disk import write_text


def run(
    outputs: str,
    reference: str,
    output: Path,
    *,
    students: Sequence[str] = (),
    level: float = 0.05,
    region: str | None = None,
    check: bool = False,
) -> int:
    """Audit what a teacher wrote, write the report as Markdown and JSON, print what was found; return the exit code.

    Args:
        outputs, reference, students: files, folders, hub ids or `sandbox:NAME`, with prompts and completions, messages
            or text.
        output: where the Markdown goes; the JSON stands beside it, with the suffix `.json`.
        level, region: see `audit`.
        check: return 1 when anything was found, a pattern or what is personal.

    Raises ValueError when something cannot be read, or the output has no name that ends in `.md`.
    """
    if output.suffix != ".md":
        raise ValueError(f"--output {output}: expected a name that ends in .md; audit.json is written beside audit.md")
    written = [read_rows(student) for student in students]  # first: what is not there is said before the work
    found = audit(read_rows(outputs), read_rows(reference), level=level, region=region)
    measured = {student.name: amplification(student, found, region=region) for student in written}
    write_text(output.with_suffix(".json"), json.dumps(as_json(found, measured), indent=1, ensure_ascii=False) + "\n")
    write_text(output, as_markdown(found, measured))
    print(verdict(found))
    for one in found.findings:
        print(f"  {one.pattern}: {one.rates.all}{f'; foretold by: {one.trigger.text}' if one.trigger else ''}")
        for name, amplified in measured.items():
            print(f"    {name}: {amplified[found.findings.index(one)].rates.all}")
    print(f"{output} has examples, {output.with_suffix('.json')} all figures")
    return int(check and bool(found.findings or found.personal["outputs"]))
