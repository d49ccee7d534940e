"""The completion is JSON that satisfies a schema."""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from kdlm.verifiers.verifier import LimitedSection, Verifier


class JSONSchema(LimitedSection):
    """The whole completion is one JSON document that is valid under a JSON Schema (json-schema.org; the `jsonschema`
    library). Schemas may hold patterns, which can take exponential time. References over a network are not followed.
    """

    name: Literal["json_schema"] = "json_schema"
    column: str | None = None
    """The column of the data that holds the schema, as a mapping or as JSON, where there is no `definition`."""
    definition: dict[str, Any] | str | None = None
    """The schema for every completion: inline, or the path of its file."""

    @model_validator(mode="after")
    def _one_schema(self) -> Self:
        if (self.definition is None) == (self.column is None):
            raise ValueError("json_schema: give either `definition`, or `column` with a schema in every row")
        return self

    def verifier(self) -> Verifier:
        if find_spec("jsonschema") is None:
            raise ValueError("json_schema needs jsonschema: pip install 'kdlm[verify]'")
        if self.definition is not None:
            _validator(_document(self.definition))
        return self._judge

    def _judge(self, completion: str, reference: Any, row: Mapping[str, Any]) -> bool:
        if self.definition is None:
            document = reference if isinstance(reference, str) else json.dumps(reference)
        else:
            document = _document(self.definition)
        try:
            instance = json.loads(completion, parse_constant=_refuse)
        except (ValueError, RecursionError):  # no JSON; nested deeper or with longer integers than Python reads
            return False
        return _validator(document).is_valid(instance)


def _document(definition: dict[str, Any] | str) -> str:
    return _read(definition) if isinstance(definition, str) else json.dumps(definition)


@lru_cache
def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except OSError as error:
        raise ValueError(f"json_schema: definition {path!r}: {error.strerror}") from error


@lru_cache(maxsize=1024)
def _validator(document: str) -> Any:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    try:
        schema = json.loads(document)
        kind = validator_for(schema)
        kind.check_schema(schema)
    except (json.JSONDecodeError, SchemaError) as error:
        raise ValueError(f"json_schema: no schema: {str(error).splitlines()[0]}") from error
    return kind(schema, registry=Registry())


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
