"""Templates: texts with the columns of a row in braces."""

import re
from collections.abc import Mapping
from typing import Any

from kdlm.data.report import Unusable

FIELD = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")


class Template:
    """A text in which `{name}` stands for a column of a row and `{{name}}` for `{name}` itself.

    Braces around anything else stay as they are: `\\frac{1}{2}`, `{"a": 1}`, `\\boxed{}`.
    """

    def __init__(self, text: str):
        self.text = text
        self.columns = list(dict.fromkeys(found[2] for found in FIELD.finditer(text) if found[2]))

    def written(self, row: Mapping[str, Any]) -> str:
        """Return the text of a row. Raises Unusable where a column of it is null."""
        for name in self.columns:
            if row[name] is None:
                raise Unusable(f"no {name}", f"its column {name!r} is null, and the template has {{{name}}}")
        return FIELD.sub(lambda found: str(row[found[2]]) if found[2] else f"{{{found[1]}}}", self.text)

    def missing(self, columns: list[str], place: str) -> None:
        """Raise ValueError, naming the key `place`, where rows have no such column."""
        for name in self.columns:
            if name not in columns:
                raise ValueError(
                    f"{place}: {{{name}}} is no column of its rows, which have {', '.join(columns)}; for the letters "
                    f"{{{name}}} themselves write {{{{{name}}}}}"
                )
