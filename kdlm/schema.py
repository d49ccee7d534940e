"""What is generated from the files that verbs read: JSON schemas for editors and references for readers."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from kdlm.compare import Comparison
from kdlm.curation import Pipeline
from kdlm.disk import write_text
from kdlm.jobs import Job
from kdlm.markdown import table
from kdlm.mix import Mixture
from kdlm.recipe import Recipe
from kdlm.section import Section
from kdlm.stages import Stages

HEAD = """# Recipe reference

Every key of a recipe, made from the code by `kdlm schema`: mend the code, not this page.
A recipe is YAML 1.2: `1e-3` is a number, `true` and `false` are the only booleans, `no` and `on` are words.
There is no interpolation and no inheritance. Where a key takes one of several things, its `name` says which.
Any key can be set from the command line: `kdlm train r.yaml losses.0.temperature=2 training.max_steps=10`.

"""
JOB_HEAD = """# Job reference

Every key of an evaluation job (`kdlm eval job.yaml`), made from the code by `kdlm schema`: mend the code, not this
page. A job is YAML 1.2, like a recipe. Where a key takes one of several things, its `name` says which.
Any key can be set from the command line: `kdlm eval job.yaml limit=100 tasks.hellaswag.num_fewshot=5`.

"""
COMPARISON_HEAD = """# Comparison reference

Every key of a comparison (`kdlm compare comparison.yaml`), made from the code by `kdlm schema`: mend the code, not this
page. A comparison is YAML 1.2, like a recipe.
Any key can be set from the command line: `kdlm compare c.yaml seeds=[0,1] workers=4`.

"""
MIXTURE_HEAD = """# Mixture reference

Every key of a mixture (`kdlm mix mixture.yaml`), made from the code by `kdlm schema`: mend the code, not this page. A
mixture is YAML 1.2, like a recipe.
Any key can be set from the command line: `kdlm mix m.yaml evaluations=32 candidates.most=2`.

"""
PIPELINE_HEAD = """# Pipeline reference

Every key of a pipeline (`kdlm generate pipeline.yaml`), made from the code by `kdlm schema`: mend the code, not this
page. A pipeline is YAML 1.2, like a recipe. Where a key takes one of several things, its `name` says which.
Any key can be set from the command line: `kdlm generate p.yaml seed=1 steps.0.sampling.0.temperature=0.6`.

"""
STAGES_HEAD = """# Stages reference

Every key of a run of several stages (`kdlm train stages.yaml`), made from the code by `kdlm schema`: mend the code, not
this page. The file is YAML 1.2, like a recipe; the keys of the recipes are in [theirs](recipe_reference.md).
From the command line: `kdlm train stages.yaml NAME.training.max_steps=10 NAME.skip=true` change one stage, by its name,
and `training.max_steps=10` all of them.

"""
TRAINING = '## <a id="training">'  # the last heading of the reference
VERSION = re.compile(r"transformers [0-9][\w.+]*")
WORDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "nothing"}
LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minItems": "at least {} entries",
    "maxItems": "at most {} entries",
    "minLength": "at least {} characters",
    "pattern": "matches `{}`",
}

Node = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of YAML file: the Section it holds, where its schema and its reference are, and how the latter begins."""

    section: type[Section]
    schema: Path
    reference: Path
    head: str


KINDS = (
    Kind(Recipe, Path("recipes/schema.json"), Path("docs/recipe_reference.md"), HEAD),
    Kind(Stages, Path("recipes/stages_schema.json"), Path("docs/stages_reference.md"), STAGES_HEAD),
    Kind(Job, Path("eval/schema.json"), Path("docs/job_reference.md"), JOB_HEAD),
    Kind(Comparison, Path("eval/comparison_schema.json"), Path("docs/comparison_reference.md"), COMPARISON_HEAD),
    Kind(Mixture, Path("eval/mixture_schema.json"), Path("docs/mixture_reference.md"), MIXTURE_HEAD),
    Kind(Pipeline, Path("recipes/pipelines/schema.json"), Path("docs/pipeline_reference.md"), PIPELINE_HEAD),
)


def write(root: Path, *, check: bool = False) -> int:
    """Write both files of each kind below `root`, or with `check` only compare. Returns the exit code.

    The keys of `training` are those of the installed transformers; files made with another version are compared
    without them.
    """
    if not (root / KINDS[0].schema).parent.is_dir():
        raise ValueError(f"{root / KINDS[0].schema.parent}: no such folder; start in the checkout or give --root")
    stale = []
    made = [((kind.schema, json_schema(kind)), (kind.reference, reference(kind))) for kind in KINDS]
    for path, text in (file for files in made for file in files):
        old = (root / path).read_text(encoding="utf-8") if (root / path).is_file() else ""
        if not check:
            write_text(root / path, text)
            print(f"{root / path}: {'unchanged' if old == text else 'written'}")
        elif not _agree(path, old, text):
            stale.append(path)
            print(f"{root / path}: out of date, run kdlm schema")
    return 1 if stale else 0


def json_schema(kind: Kind = KINDS[0]) -> str:
    """Return the JSON schema of a kind of file, keys sorted, with the `name` of every choice required."""
    schema = kind.section.model_json_schema()
    mappings = [
        node["discriminator"]["mapping"] for node in _walk(schema) if "mapping" in node.get("discriminator", ())
    ]
    for name in {_name(ref) for mapping in mappings for ref in mapping.values()}:
        node = schema["$defs"][name]
        if not node["properties"]["name"].pop("optional", False):
            node["required"] = ["name", *(key for key in node.get("required", []) if key != "name")]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    if kind.section is Recipe:
        schema["$comment"] = f"training: the arguments of transformers {transformers.__version__}"
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def reference(kind: Kind = KINDS[0]) -> str:
    """Return the reference as markdown: one table per section, grouped by the key that it hangs from."""
    schema = kind.section.model_json_schema()
    definitions = schema["$defs"]
    made = f"`training` is that of transformers {transformers.__version__}.\n\n" if kind.section is Recipe else ""
    parts = [kind.head, made, "## Top level\n\n", _table(schema, definitions)]
    done: set[str] = set()
    for key, node in schema["properties"].items():
        pending = [(name, key) for name in _references(node) if name not in done]
        if not pending:
            continue
        parts.append(f'## <a id="{key}"></a>`{key}`\n\n{node.get("description", "")}\n\n')
        while pending:
            name, path = pending.pop(0)
            definition = definitions[name]
            if name in done or "properties" not in definition:
                continue
            done.add(name)
            tag = definition["properties"].get("name", {}).get("const")
            title = f"`{path}`, `name: {tag}`" if tag else f"`{path}`"
            heading = f'<a id="{name}"></a>' if title == f"`{key}`" else f'### <a id="{name}"></a>{title}\n\n'
            about = definition.get("description", "").split("\n\n")[0].replace("\n", " ")
            parts.append(f"{heading}{about}\n\n{_table(definition, definitions)}")
            for inner, value in definition["properties"].items():
                pending += [(found, f"{path}.{inner}") for found in _references(value)]
    return "".join(parts).rstrip() + "\n"


def _table(section: Node, definitions: Node) -> str:
    rows = []
    required = section.get("required", [])
    for key, node in sorted(section["properties"].items(), key=lambda item: item[0] not in required):
        if "const" in node and key == "name":
            continue
        default = "**required**" if key in required else _value(node.get("default"))
        description = " ".join(node.get("description", "").split())
        rows.append([f"`{key}`", _type(node, definitions), default, description])
    return f"{table(['key', 'takes', 'default', 'what it does'], rows)}\n\n" if rows else "Nothing to set.\n\n"


def _value(default: Any) -> str:
    if isinstance(default, dict) and default:
        return "its defaults"
    return "" if default is None else f"`{json.dumps(default, ensure_ascii=False)}`"


def _type(node: Node, definitions: Node) -> str:
    """Say in words what a value may be, with its limits."""
    if "$ref" in node:
        return _link(_name(node["$ref"]), definitions)
    if "const" in node:
        return f"`{json.dumps(node['const'])}`"
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if members := node.get("anyOf") or node.get("oneOf"):
        words = [_type(member, definitions) for member in members if member.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    kind = node.get("type")
    if kind == "array":
        words = f"list of {_type(node.get('items', {}), definitions)}"
        if inner := node.get("prefixItems"):
            words = f"[{', '.join(_type(item, definitions) for item in inner)}]"
    elif kind == "object":
        values = node.get("additionalProperties")
        words = f"mapping to {_type(values, definitions)}" if isinstance(values, dict) else "mapping"
    else:
        words = "path" if node.get("format") == "path" else WORDS.get(str(kind), "anything")
    limits = [text.format(node[limit]) for limit, text in LIMITS.items() if limit in node and kind != "array"]
    return f"{words} ({', '.join(limits)})" if limits else words


def _link(name: str, definitions: Node) -> str:
    definition = definitions[name]
    if "properties" not in definition:
        return _type(definition, definitions)
    return f"[{definition['properties'].get('name', {}).get('const', name)}](#{name})"


def _references(node: Node) -> list[str]:
    """Return the names of the sections that a value may hold, in order."""
    return list(dict.fromkeys(_name(found["$ref"]) for found in _walk(node) if "$ref" in found))


def _walk(node: Any) -> Iterator[Node]:
    """Yield every mapping in a schema, outermost first."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _walk(child)


def _name(ref: str) -> str:
    return ref.rsplit("/", 1)[1]


def _agree(path: Path, old: str, new: str) -> bool:
    """Tell whether two versions of a file say the same; `training` is left out when transformers is another one."""
    versions = [found[0] for text in (old, new) if (found := VERSION.search(text))]
    if len(set(versions)) > 1:
        old, new = (_without_training(path, VERSION.sub("", text)) for text in (old, new))
    return old == new


def _without_training(path: Path, text: str) -> str:
    if path.suffix == ".json":
        schema = json.loads(text)
        schema["$defs"].pop("Training", None)
        return json.dumps(schema)
    return text.partition(TRAINING)[0]
