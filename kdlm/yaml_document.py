"""YAML text as plain data that remembers its lines, so that an error can say where it is.

The dialect is the core schema of YAML 1.2 by a safe loader: `1e-3` is a number, only `true` and `false` are booleans
(`no` and `on` are words), dates are words, tags that build objects are refused. Aliases share a value; one that
contains itself is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[Any, ...]
"""Keys and indices from the root to a value: `("losses", 0, "temperature")`."""

HINTS = {
    "mapping values are not allowed here": "quote a value that holds ': ', or mend the indentation",
    "cannot start any token": "indent with spaces; quote a value that begins with a special character",
    "expected <block end>": "the indentation does not match the lines above",
    "could not find expected ':'": "a key needs ': ' after it",
    "found undefined alias": "there is no anchor of this name above",
    "found another document": "keep one document in the file, without a second '---'",
    "found unexpected end of stream": "a quote is not closed",
    "expected ',' or ']'": "a bracket is not closed",
    "expected ',' or '}'": "a brace is not closed",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `place` is `file:line` (or an override), `message` says what and how to mend it.

    Attributes:
        line: the line in the file, to sort by; None for an override and for a file as a whole.
    """

    place: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one line each."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


class CoreLoader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core schema in place of PyYAML's 1.1."""

    yaml_implicit_resolvers = {}


class CoreDumper(yaml.SafeDumper):
    """SafeDumper that quotes every word that YAML 1.1 or 1.2 would take for something else."""


PREFIX = "tag:yaml.org,2002:"
NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", rf"{NUMBER}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
):
    for _class in (CoreLoader, CoreDumper):
        _class.add_implicit_resolver(PREFIX + _name, re.compile(f"^(?:{_pattern})$"), _first)

BUILD = {
    f"{PREFIX}null": lambda text: None,
    f"{PREFIX}bool": lambda text: text.lower() == "true",
    f"{PREFIX}int": lambda text: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
    f"{PREFIX}float": lambda text: float(re.sub(r"\.(?=[inIN])", "", text)),
    f"{PREFIX}str": str,
}


class Document:
    """A parsed YAML text.

    Attributes:
        data: its content.
        problems: what was found wrong while reading it.
        lost: key paths whose value could not be read and stands as None in `data`.
    """

    def __init__(self, text: str, name: str):
        """Parse `text`, called `name` in messages. Raises RecipeError when it is not YAML at all."""
        self.name = name
        self.problems: list[Problem] = []
        self.lost: set[KeyPath] = set()
        self._values: dict[int, Any] = {}
        try:
            self.root: yaml.Node | None = yaml.compose(text, Loader=CoreLoader)
        except yaml.MarkedYAMLError as error:
            raise RecipeError([_syntax_problem(error, name)]) from error
        except (yaml.YAMLError, RecursionError) as error:
            raise RecipeError([Problem(name, f"not yaml: {' '.join(str(error).split())}")]) from error
        self.data: Any = None if self.root is None else self._construct(self.root, (), ())

    @classmethod
    def read(cls, path: str | Path) -> "Document":
        """Read a file. Raises RecipeError when it is missing, not text, empty or not YAML."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError([Problem(str(path), f"not UTF-8 text (byte {error.start})")]) from error
        except OSError as error:
            raise RecipeError([Problem(str(path), f"cannot read the recipe: {error.strerror or error}")]) from error
        document = cls(text, str(path))
        if document.root is None:
            raise RecipeError([Problem(str(path), "the file is empty")])
        return document

    def line(self, path: KeyPath) -> int:
        """Return the line (from 1) of the key or list item at `path`, or of what comes nearest to it."""
        node, mark = self.root, None
        for part in path:
            child = None
            if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                child = node.value[part]
                mark = child.start_mark
            elif isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                        child, mark = value, key.start_mark
                        break
            if child is None:
                break
            node = child
        if mark is None and self.root is not None:
            mark = self.root.start_mark
        return 1 if mark is None else mark.line + 1

    def _report(self, path: KeyPath, message: str, node: yaml.Node | None = None) -> None:
        line = self.line(path) if node is None else node.start_mark.line + 1
        self.problems.append(Problem(f"{self.name}:{line}", f"{dotted(path)}: {message}".removeprefix(": "), line))

    def _lose(self, path: KeyPath, message: str) -> None:
        """Report a value that cannot be read; None takes its place."""
        self._report(path, message)
        self.lost.add(path)

    def _construct(self, node: yaml.Node, path: KeyPath, open_nodes: tuple[yaml.Node, ...]) -> Any:
        if any(node is other for other in open_nodes):
            return self._lose(path, "cyclic alias: the value contains itself; write it out")
        if id(node) not in self._values:  # an alias shares the value: a few lines cannot grow into gigabytes
            self._values[id(node)] = self._build(node, path, open_nodes)
        return self._values[id(node)]

    def _build(self, node: yaml.Node, path: KeyPath, open_nodes: tuple[yaml.Node, ...]) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in (f"{PREFIX}map", f"{PREFIX}seq"):
            return self._lose(path, _bad_tag(node))
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(child, (*path, i), (*open_nodes, node)) for i, child in enumerate(node.value)]
        return self._mapping(node, path, (*open_nodes, node))

    def _mapping(self, node: yaml.Node, path: KeyPath, open_nodes: tuple[yaml.Node, ...]) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._report((*path, "?"), "a key must be a word or a number", key_node)
                continue
            key = self._scalar(key_node, path)
            if key in result:
                first = self.line((*path, key))
                self._report((*path, key), f"duplicate key, first set on line {first}", key_node)
                continue
            result[key] = self._construct(child, (*path, key), open_nodes)
        return result

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        if node.tag not in BUILD:
            return self._lose(path, _bad_tag(node))
        try:
            return BUILD[node.tag](node.value)
        except ValueError:
            return self._lose(path, f"{node.value!r} is not of the type that its tag {_short_tag(node)} names")


def _short_tag(node: yaml.Node) -> str:
    return node.tag.replace(PREFIX, "!!")


def _bad_tag(node: yaml.Node) -> str:
    return f"the tag {_short_tag(node)} is not allowed: recipes hold plain data"


def _syntax_problem(error: yaml.MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"
    what = error.problem or str(error.context)
    hint = next((f" ({text})" for sign, text in HINTS.items() if sign in what), "")
    context = ""
    if error.context and error.context_mark and error.context.startswith("while"):
        context = f" {error.context} that starts on line {error.context_mark.line + 1}"
    return Problem(place, f"yaml syntax: {what}{context}{hint}", None if mark is None else mark.line + 1)


def dotted(path: KeyPath) -> str:
    """Write a key path as an override does: `losses.0.temperature`."""
    return ".".join(map(str, path))


def dump(data: Any) -> str:
    """Write plain data as YAML that `Document` reads back unchanged, keys in their own order."""
    return yaml.dump(data, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=120)
