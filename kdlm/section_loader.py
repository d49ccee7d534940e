"""From a YAML file to a Section: every error at once, each with its place and what was meant.

`r.yaml:4: losses.0.temprature: unknown key, did you mean temperature?`
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from kdlm.section import Section
from kdlm.yaml_document import Document, KeyPath, Problem, RecipeError, dotted

S = TypeVar("S", bound=Section)

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "none": "nothing",
}
"""What a field takes, by the first word of pydantic's error type."""


@dataclass(frozen=True)
class Origin:
    """Where the values of a section stand: in a document, below some key of it, and what was put over them.

    Attributes:
        document: the file.
        under: the key of the document that the section hangs from.
        places: of keys that were changed, where the change is said: `override 'losses.0.temperature=2'`.
    """

    document: Document
    under: KeyPath = ()
    places: Mapping[KeyPath, str] = field(default_factory=dict)

    def problem(self, path: KeyPath, message: str, at: KeyPath | None = None) -> Problem:
        """Return the problem of the value at `path` of the section, shown at the place of `at` (None: its own)."""
        at = path if at is None else at
        for changed, place in self.places.items():
            if at[: len(changed)] == changed:
                return Problem(place, message if path == changed else f"{dotted(path)}: {message}")
        line = self.document.line((*self.under, *at))
        return Problem(f"{self.document.name}:{line}", f"{dotted(path)}: {message}" if path else message, line)

    def placed(self, cls: type[Section], message: str) -> list[Problem | str]:
        """Return each line of a message: as a problem with its place, if it begins with a key of `cls`."""
        return [self._placed(cls, line) for line in message.splitlines()]

    def _placed(self, cls: type[Section], line: str) -> Problem | str:
        found = re.match(r"([\w-]+(?:\.[\w-]+)*): ", line)
        keys = found[1].split(".") if found else [""]
        if found is None or keys[0] not in cls.model_fields:
            return line
        return self.problem(tuple(int(key) if key.isdecimal() else key for key in keys), line[found.end() :])


def load_section(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a Section from a YAML file.

    Args:
        cls: the Section class to read.
        path: the file.
        overrides: `dotted.path=value`, the value in YAML: `losses.0.temperature=2`. Later ones win.

    Raises:
        RecipeError: a ValueError that holds everything that is wrong with the file and the overrides.
    """
    document = read_mapping(path)
    problems = list(document.problems)
    data: Any = document.data
    places: dict[KeyPath, str] = {}
    for text in overrides:
        try:
            key_path, value = parse_override(text)
            data, key_path = replaced(data, key_path, value)
            places[key_path] = f"override {text!r}"
        except ValueError as error:
            problems.append(Problem(f"override {text!r}", str(error)))
    return validated(cls, data, Origin(document, places=places), problems)


def read_mapping(path: str | Path) -> Document:
    """Read a YAML file that holds keys and values. Raises RecipeError where it holds something else."""
    document = Document.read(path)
    if not isinstance(document.data, dict):
        raise RecipeError([Problem(f"{path}:1", f"expected keys and values, got {shown(document.data)}", 1)])
    return document


def validated(cls: type[S], data: Any, origin: Origin, problems: Sequence[Problem] = ()) -> S:
    """Return the Section of some data.

    Raises:
        RecipeError: a ValueError with the `problems` that are known, and with every one of the data, each in its place.
    """
    found, lost = list(problems), origin.document.lost
    try:
        section = cls.model_validate(data)
    except ValidationError as error:
        for path, message, at in Explainer(cls, data).explain(error):
            if not any((*origin.under, *path)[: len(one)] == one for one in lost):
                found.append(origin.problem(path, message, at))
    else:
        if not found:
            return section
    raise RecipeError(sorted(found, key=lambda problem: problem.line or 10**9))


def placed(cls: type[Section], path: str | Path, message: str) -> str:
    """Put `file:line` in front of every line of a message that begins with a key: `data.train.0: no such file`.

    For what is only found out after loading. Lines that name no key of `cls` stay as they are.
    """
    return "\n".join(map(str, Origin(Document.read(path)).placed(cls, message)))


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Split `losses.0.temperature=2` into keys and value. Raises ValueError when it is malformed."""
    key, equals, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise ValueError("expected key=value with a dotted key, as in training.max_steps=10")
    try:
        document = Document(value, "value")
    except RecipeError as error:
        raise ValueError(f"the value is not yaml: {error.problems[0].message}") from error
    if document.problems:
        raise ValueError(document.problems[0].message)
    return keys, document.data


def replaced(data: Any, keys: tuple[str, ...], value: Any, done: KeyPath = ()) -> tuple[Any, KeyPath]:
    """Return `data` with the value at `keys` replaced, copying what is on the way, and the path that was meant.

    A missing mapping on the way is made; a list is never made longer. Raises ValueError when `keys` lead nowhere.
    """
    if not keys:
        return value, done
    here = dotted(done) or "the recipe"
    copy: Any
    if isinstance(data, list):
        if not keys[0].isdecimal() or int(keys[0]) >= len(data):
            entries = f"entries 0 to {len(data) - 1}" if data else "no entries"
            raise ValueError(f"{here} has {entries}, not {keys[0]!r}")
        key: Any = int(keys[0])
        copy, child = list(data), data[key]
    elif isinstance(data, dict) or data is None:
        copy = dict(data or {})
        key = next((known for known in copy if str(known) == keys[0]), keys[0])
        child = copy.get(key)
    else:
        raise ValueError(f"{here} is {shown(data)}, which has no {keys[0]!r} inside")
    copy[key], path = replaced(child, keys[1:], value, (*done, key))
    return copy, path


class Explainer:
    """Turns pydantic's errors about `data` into paths as the YAML has them and messages as people write them."""

    def __init__(self, cls: type[Section], data: Any):
        self.data = data
        self.schema = cls.model_json_schema()

    def explain(self, error: ValidationError) -> Iterable[tuple[KeyPath, str, KeyPath]]:
        """Yield (path, message, path whose line is shown), one per path.

        A union reports each of its members' complaints. Those about the type are merged ("a number or a mapping"),
        or dropped when a member got further than that.
        """
        wrong_types: dict[KeyPath, list[str]] = defaultdict(list)
        specific: dict[KeyPath, tuple[str, KeyPath]] = {}
        values: dict[KeyPath, Any] = {}
        for item in error.errors(include_url=False):
            kind = item["type"]
            path = self._path(item["loc"], kind)
            values[path] = item["input"]
            expected = EXPECTED.get(kind.split("_")[0])
            if expected and kind.endswith(("_type", "_parsing", "_from_float", "_required")):
                wrong_types[path].append(expected)
            elif kind == "literal_error":
                wrong_types[path].append(_options(str(item.get("ctx", {})["expected"]), item["input"]))
            else:
                path, message, at = self._specific(path, item)
                specific.setdefault(path, (message, at))
        for path, expected in wrong_types.items():
            deeper = any(other[: len(path)] == path for other in [*specific, *(set(wrong_types) - {path})])
            if not deeper:
                alternatives = " or ".join(dict.fromkeys(expected))
                quote = " (quote it to make it text)" if is_word(values[path]) and "text" in expected else ""
                specific[path] = (f"expected {alternatives}, got {shown(values[path])}{quote}", path)
        for path, (message, at) in specific.items():
            yield path, message, at

    def _specific(self, path: KeyPath, item: Any) -> tuple[KeyPath, str, KeyPath]:
        kind, value, context = item["type"], item["input"], item.get("ctx", {})
        if kind == "extra_forbidden":
            known = [key for node in self._nodes(path[:-1]) for key in node.get("properties", {})]
            listed = f"; known here: {', '.join(known)}" if 0 < len(known) <= 15 else ""
            return path, f"unknown key{suggestion(str(path[-1]), known) or listed}", path
        if kind == "missing":
            return path, "missing", path[:-1]
        if kind == "union_tag_invalid":
            options = re.findall(r"'([^']*)'", context["expected_tags"])
            noun = singular(self._declared(path))
            meant = suggestion(context["tag"], options) or "."
            message = f"unknown {noun} {context['tag']!r}{meant} One of: {', '.join(options)}"
            return (*path, "name"), message, (*path, "name")
        if kind == "union_tag_not_found":
            options = [choice for node in self._nodes(path) for choice in node.get("choices", [])]
            return path, f"`name` is missing. One of: {', '.join(options)}", path
        if kind in ("value_error", "assertion_error"):
            return path, str(context["error"]), path
        message = re.sub(r"^\w+ should ", "must ", item["msg"])
        return path, f"{message}, got {shown(value)}", path

    def _path(self, loc: tuple[Any, ...], kind: str) -> KeyPath:
        """Strip from pydantic's location what it adds for union members, leaving keys and indices of the YAML."""
        path: list[Any] = []
        data, tag_was_read = self.data, False
        for place, part in enumerate(loc):
            last = place == len(loc) - 1
            if isinstance(data, dict) and data.get("name") == part and not last and not tag_was_read:
                tag_was_read = True
            elif (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
                path.append(part)
                data, tag_was_read = data[part], False
            elif last and kind == "missing":
                path.append(part)
        return tuple(path)

    def _declared(self, path: KeyPath) -> str:
        """Return the last key of a path that a section declares, and neither counts nor was chosen by the user."""
        for place in reversed(range(len(path))):
            if any(path[place] in node.get("properties", {}) for node in self._nodes(path[:place])):
                return str(path[place])
        return "name"

    def _nodes(self, path: KeyPath) -> list[dict[str, Any]]:
        """Return the schemas that may apply to the value at `path`, unions resolved by the `name` in the data."""
        data = self.data
        nodes = self._members(self.schema, data)
        for part in path:
            data = data[part]
            children = [
                node.get("properties", {}).get(part) or node.get("additionalProperties") or node.get("items")
                for node in nodes
            ]
            nodes = [member for child in children if isinstance(child, dict) for member in self._members(child, data)]
        return nodes

    def _members(self, node: dict[str, Any], data: Any) -> list[dict[str, Any]]:
        if "$ref" in node:
            return self._members(self.schema["$defs"][node["$ref"].rsplit("/", 1)[1]], data)
        members = node.get("anyOf") or node.get("oneOf")
        if not members:
            return [node]
        if "discriminator" in node:
            tags = node["discriminator"]["mapping"]
            name = data.get("name") if isinstance(data, dict) else None
            if name not in tags:
                return [{"choices": list(tags)}]
            members = [{"$ref": tags[name]}]
        return [found for member in members for found in self._members(member, data)]


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return `, did you mean forward_kl?` when one of `known` is close to `word`, else nothing."""
    close = get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _options(expected: str, value: Any) -> str:
    close = get_close_matches(str(value), re.findall(r"'([^']*)'", expected), n=1)
    return f"{expected}{f' (did you mean {close[0]}?)' if close else ''}"


def singular(word: str) -> str:
    """Return one of what a key names: losses -> loss, sources -> source."""
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def is_word(value: Any) -> bool:
    """Tell whether a value that is not text would be text in quotes: 3, true."""
    return isinstance(value, bool | int | float)


def shown(value: Any) -> str:
    """Describe a value of the YAML in a few words."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
