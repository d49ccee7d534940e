"""Templates: text with columns of a row in braces; everything else, other braces too, stands for itself."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

COLUMN = re.compile(r"\{([A-Za-z_]\w*)\}")


def columns_of(template: str) -> list[str]:
    """Return the columns that a template names."""
    return list(dict.fromkeys(COLUMN.findall(template)))


def filled(template: str, row: Mapping[str, Any]) -> str | None:
    """Return a template with the row's values in it; None where one of them is null."""
    if any(row[name] is None for name in columns_of(template)):
        return None
    return COLUMN.sub(lambda found: str(row[found[1]]), template)


def check_template(template: str, have: Sequence[str], place: str) -> None:
    """Raise ValueError, naming the key `place`, where rows have no column that a template names."""
    for name in columns_of(template):
        if name not in have:
            raise ValueError(
                f"{place}: {{{name}}} is no column of its rows, which have {', '.join(have)}; to write these letters, "
                f"put a space in: {{ {name} }}"
            )
