"""Function source: one function of a module with what it needs of it, cut out of the module's text."""

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A module's text.

    Attributes:
        lines: with their ends.
        binds: for each name the top-level statements that bind it, in their order.
    """

    lines: list[str]
    binds: dict[str, list[ast.stmt]]

    def function(self, name: str) -> ast.FunctionDef | None:
        """Return the function of this name, where nothing else has the name."""
        found = self.binds.get(name, [])
        return found[0] if len(found) == 1 and isinstance(found[0], ast.FunctionDef) else None

    def cut(self, name: str) -> tuple[str, str] | None:
        """Return the text that ends with a function's docstring, and the rest of the function.

        None where it has no docstring or nothing else, or needs another part of its package.
        """
        function = self.function(name)
        if function is None or ast.get_docstring(function) is None or len(function.body) < 2:
            return None
        statements = self._needs(function)
        if any(isinstance(part, ast.ImportFrom) and part.level for each in statements for part in ast.walk(each)):
            return None
        above = [self._text(*_span(each)) for each in statements if each is not function]
        begin, end = _span(function)
        docstring = function.body[0].end_lineno or 0
        if function.body[1].lineno <= docstring:
            return None
        prompt = "\n\n".join([*(text.rstrip("\n") for text in above), self._text(begin, docstring)])
        return prompt, self._text(docstring + 1, end)

    def _needs(self, function: ast.FunctionDef) -> list[ast.stmt]:
        """The statements that bind what it names, and what those name, in their order."""
        needed: dict[int, ast.stmt] = {}
        waiting: list[ast.stmt] = [function]
        while waiting:
            statement = waiting.pop()
            if statement.lineno not in needed:
                needed[statement.lineno] = statement
                waiting += [each for name in _free(statement) for each in self.binds.get(name, [])]
        return [needed[line] for line in sorted(needed)]

    def _text(self, begin: int, end: int) -> str:
        return "".join(self.lines[begin - 1 : end])


@cache
def source_of(module: str) -> Source:
    """Return a module's source; an empty one where the standard library has no such file."""
    place = Path(sysconfig.get_path("stdlib"), *module.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.exists():
            break
    else:
        return Source([], {})
    text = path.read_text(encoding="utf-8")
    binds: dict[str, list[ast.stmt]] = {}
    for statement in ast.parse(text).body:
        for name in _bound(statement):
            if statement not in (found := binds.setdefault(name, [])):
                found.append(statement)
    return Source(text.splitlines(keepends=True), binds)


def _bound(statement: ast.AST) -> Iterator[str]:
    """The names that a statement of a module binds there."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, ast.Name):
        if isinstance(statement.ctx, ast.Store):
            yield statement.id
    elif isinstance(statement, ast.alias):
        yield (statement.asname or statement.name).partition(".")[0]
    else:
        for part in ast.iter_child_nodes(statement):
            yield from _bound(part)


def _free(statement: ast.stmt) -> set[str]:
    """The names that a statement reads; of a function, those that it does not bind itself."""
    parts = list(ast.walk(statement))
    read = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
    if not isinstance(statement, ast.FunctionDef):
        return read
    own = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    own |= {part.arg for part in parts if isinstance(part, ast.arg)}
    return read - own.difference(*(part.names for part in parts if isinstance(part, ast.Global)))


def _span(statement: ast.stmt) -> tuple[int, int]:
    """The first and the last line, decorators included."""
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(each.lineno for each in decorators)]), statement.end_lineno or statement.lineno
