"""`stage:NAME` in the keys of a stage: what lies there in its place, and what may not stand there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlm.section_loader import Origin, replaced, suggestion
from kdlm.stages.kinds import KINDS, Kind, taken_as
from kdlm.stages.sections import WORD
from kdlm.yaml_document import KeyPath, Problem, dotted


@dataclass(frozen=True)
class Left:
    """What a stage leaves to those after it.

    Attributes:
        kind: of the stage.
        path: where it is: of a student that was skipped, that of the stage before it; None where there is nothing.
        begins: the keys of the student that a skipped stage would have begun with, where that is no stage's.
        captured: what the teacher of a capture says of itself: `of` and `format`.
    """

    kind: Kind
    path: Path | None
    begins: Mapping[str, Any] = field(default_factory=dict)
    captured: Mapping[str, Any] = field(default_factory=dict)


def left_by(kind: Kind, folder: Path, teacher: Any = None) -> Left:
    """Return what a stage leaves; `teacher` is that of its keys, with names of stages in them."""
    captured = kind.does == "capture" and isinstance(teacher, Mapping)
    said = {key: teacher[key] for key in ("of", "format") if key in teacher} if captured else {}
    return Left(kind, folder / kind.leaves, captured=said)


def left_by_skipped(kind: Kind, student: Any, before: Path | None) -> Left:
    """Return what a skipped stage leaves: what it would have begun with.

    Args:
        student: its keys.
        before: the student of an earlier stage, where that is one.
    """
    if kind.does != "recipe" or before is not None:
        return Left(kind, before)
    return Left(kind, None, {key: value for key, value in dict(student or {}).items() if key != "lora"})


@dataclass(frozen=True)
class Links:
    """Puts what earlier stages left in the place of their names.

    Attributes:
        left: what each of them left.
        later: names of this stage and of those after it.
        origin: where the values of this stage stand.
        problems: takes what is wrong.
    """

    left: Mapping[str, Left]
    later: Sequence[str]
    origin: Origin
    problems: list[Problem]

    def __call__(self, data: Any) -> tuple[Any, dict[str, str], bool]:
        """Return the data with paths in place of `stage:NAME`, which stage each key is of, and whether the student
        would come from a skipped stage that began with no stage's student."""
        takes: dict[str, str] = {}
        anew = False
        data = self._with_captured(data)
        for path, name in list(named(data)):
            holder = _at(data, path[:-1])
            if why := self._refused(name, holder, path):
                self.problems.append(self.origin.problem(path, why))
                continue
            left = self.left[name]
            if left.path is not None:
                data, _ = replaced(data, tuple(map(str, path)), str(left.path))
                takes[dotted(path)] = left.path.parent.name
            else:
                own = {key: value for key, value in holder.items() if key not in ("name", "path")}
                data, anew = {**data, "student": {**left.begins, **own}}, True
        return data, takes, anew

    def _with_captured(self, data: Any) -> Any:
        """Give every teacher that reads a stage's capture what it does not say itself: of whom that is, and how."""
        for path, name in list(named(data)):
            holder = _at(data, path[:-1])
            if name in self.left and taken_as(holder, path) == "capture":
                for key, value in self.left[name].captured.items():
                    if key not in holder:
                        data, _ = replaced(data, (*map(str, path[:-1]), key), value)
        return data

    def _refused(self, name: str, holder: Any, path: KeyPath) -> str:
        if name not in self.left:
            known = [*self.left]
            meant = suggestion(name, known) or f"; before this one: {', '.join(known) or 'none'}"
            if name not in self.later:
                return f"no stage {name!r}{meant}"
            why = "is this one" if name == self.later[0] else "comes later"
            return f"the stage {name!r} {why}: a stage takes what earlier ones leave"
        left = self.left[name]
        wanted = KINDS[taken_as(holder, path)]
        if wanted is not left.kind:
            theirs = f"{left.kind.called} ({left.kind.taken_as})"
            return f"the stage {name!r} leaves {theirs}, and here is meant {wanted.called}"
        if left.path is None and path != ("student", "path"):
            if left.begins:
                return f"the stage {name!r} is skipped and began with no stage's student: name a model"
            return f"the stage {name!r} is skipped and leaves no {left.kind.leaves}: name a path"
        return ""


def named(data: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the path and the name of every stage that is named in plain data."""
    if isinstance(data, str) and data.startswith(WORD):
        yield path, data.removeprefix(WORD)
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, child in children:
        yield from named(child, (*path, key))


def exchanged(data: Any, words: Mapping[str, str]) -> Any:
    """Return plain data with some strings in place of others."""
    if isinstance(data, Mapping):
        return {key: exchanged(value, words) for key, value in data.items()}
    if isinstance(data, list):
        return [exchanged(value, words) for value in data]
    return words.get(data, data) if isinstance(data, str) else data


def _at(data: Any, path: KeyPath) -> Any:
    for key in path:
        data = data[key]
    return data
