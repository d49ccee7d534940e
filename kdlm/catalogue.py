"""`kdlm methods`: what there is, read from the classes themselves."""

import re
import sys
from dataclasses import dataclass
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from kdlm.section import Section

ARXIV = re.compile(r"arXiv \d{4}\.\d{4,5}")


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue: what a recipe calls it, what it is, where it comes from, what it needs."""

    kind: str
    name: str
    what: str
    paper: str
    needs: str


def entries() -> list[Entry]:
    """Return methods, losses, teachers, students and forms of data, in this order."""
    from kdlm.data.forms import FORMS
    from kdlm.losses import AnyLoss
    from kdlm.methods import AnyMethod
    from kdlm.models import AnyStudent
    from kdlm.teachers import AnyTeacher

    found = [_entry("method", section, _described(section)) for section in members(AnyMethod)]
    found += [_entry("loss", section, section) for section in members(AnyLoss)]
    found += [_entry("teacher", section, section) for section in members(AnyTeacher)]
    found += [_entry("student", section, section) for section in members(AnyStudent)]
    for form in dict.fromkeys(FORMS.values()):
        columns = [" and ".join(needed) for needed, name in FORMS.items() if name == form]
        found.append(Entry("data", form, f"rows with {', or with '.join(columns)}", "", ""))
    return found


def members(union: Any) -> list[type[Section]]:
    """Return the Sections of a union tagged by `name`, in its order."""
    inner = get_args(union)[0] if hasattr(union, "__metadata__") else union
    return [member for member in get_args(inner) or (inner,)]


def name_of(section: type[Section]) -> str:
    """Return the `name` that a recipe gives to choose this Section."""
    return section.model_fields["name"].default


def _described(section: type[Section]) -> type:
    """Return what tells of a method: its class, or its Section where several share a class and each has its paper."""
    return section if hasattr(section, "paper") else getattr(section, "method", section)


def _entry(kind: str, section: type[Section], owner: type) -> Entry:
    what = (owner.__doc__ or section.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    return Entry(
        kind, name_of(section), re.sub(r" \([^()]*arXiv[^()]*\)", "", what), _paper(owner), _needs(kind, owner)
    )


def _paper(owner: type) -> str:
    """Return the paper that a class names, or its docstring, its pure function's, or its module's."""
    texts = (owner.__doc__, getattr(owner, "divergence", None).__doc__, sys.modules[owner.__module__].__doc__)
    cited = (found[0] for text in texts if (found := ARXIV.search(text or "")))
    return getattr(owner, "paper", "") or next(cited, "")


def _needs(kind: str, owner: type) -> str:
    if kind == "method":
        needs = getattr(getattr(owner, "method", owner), "needs", frozenset())
        return ", ".join(sorted(needs)) if isinstance(needs, frozenset) else "what its settings need"
    if kind == "loss":
        if not getattr(owner, "needs_teacher", True):
            return "labels"
        return f"teacher: {', '.join(sorted(signal.__name__ for signal in getattr(owner, 'signals', ())))}"
    return ""


def show(console: Console | None = None) -> None:
    """Print the catalogue: a table on a terminal, tab-separated lines where the output goes into a file or a pipe."""
    console = console or Console()
    rows = entries()
    if not console.is_terminal:
        for row in rows:
            console.file.write("\t".join((row.kind, row.name, row.what, row.paper, row.needs)) + "\n")
        return
    for kind in dict.fromkeys(row.kind for row in rows):
        table = Table("name", "what", "paper", "needs", title=kind, title_justify="left", title_style="bold")
        for row in rows:
            if row.kind == kind:
                table.add_row(f"[bold]{row.name}[/]", row.what, row.paper, row.needs)
        console.print(table)
