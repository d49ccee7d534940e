"""The verbs of the command line: one function each, heavy imports inside."""

import argparse
import signal
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdlm.section import Section


RECIPE = "kdlm.recipe:Recipe"
STAGED = ("train", "check", "plan")
"""Verbs that take a run of several stages in place of a recipe."""


def section_read(reads: str) -> "type[Section]":
    """Return the class of what a verb's file holds, named as `module:class`."""
    module, _, name = reads.partition(":")
    return getattr(import_module(module), name)


def load(args: argparse.Namespace) -> Any:
    """Read the file that the command names, as what the verb reads: a Recipe, a Job, a Comparison.

    Where a recipe is read, a file with the key `stages` is a run of several.
    """
    from kdlm.yaml_document import Document

    document = Document.read(args.recipe)  # missing or no YAML is said before the seconds of the next import
    if args.reads == RECIPE and isinstance(document.data, dict) and "stages" in document.data:
        if args.verb not in STAGED:
            raise ValueError(
                f"{args.recipe} holds several stages: kdlm {args.verb} takes one, as RUN_DIR/NAME/recipe.yaml has it"
            )
        from kdlm.stages import load

        args.reads = "kdlm.stages:Stages"
        return load(args.recipe, args.overrides)
    from kdlm.section_loader import load_section

    return load_section(section_read(args.reads), args.recipe, args.overrides)


def train(args: argparse.Namespace) -> int:
    recipe = load(args)
    from kdlm.plan import settled
    from kdlm.report import pictures

    if _staged(args):
        from kdlm import stages

        return int(stages.train(recipe, resume=args.resume, figures=pictures))
    from kdlm.run_folder import RunFolder
    from kdlm.train import train

    recipe, placement = settled(recipe)
    return int(RunFolder(train(recipe, resume=args.resume, figures=pictures, placement=placement)).stopped)


def _staged(args: argparse.Namespace) -> bool:
    """Whether what was loaded is a run of several stages."""
    return args.reads != RECIPE


def report(args: argparse.Namespace) -> int:
    from kdlm.report import report

    for line in report(args.runs, args.output, pngs=args.png, inspect=not args.no_inspect):
        print(line)
    return 0


def check(args: argparse.Namespace) -> int:
    recipe = load(args)
    if _staged(args):
        from kdlm.stages import check
    else:
        from kdlm.check import check

    for line in check(recipe):
        print(line)
    return 0


def compare(args: argparse.Namespace) -> int:
    comparison = load(args)
    from kdlm.compare import compare

    rows = compare(comparison)
    return int(any(row.failed for row in rows))


def mix(args: argparse.Namespace) -> int:
    mixture = load(args)
    from kdlm.mix import mix

    mix(mixture)
    return 0


def plan(args: argparse.Namespace) -> int:
    recipe = load(args)
    if args.gpus is None and (args.per_node or args.strategy) is not None:
        raise ValueError("--per-node and --strategy are of many GPUs: say how many, --gpus 64")
    if _staged(args):
        if args.gpus is not None:
            raise ValueError("--gpus is for one recipe: plan the stages one by one")
        from kdlm.stages import plan as plan_stages

        return plan_stages(recipe, args.gpu, as_json=args.json)
    from kdlm.plan import Cluster, plan

    cluster = None if args.gpus is None else Cluster(args.gpus, args.per_node or 8)
    return plan(recipe, args.gpu, cluster=cluster, strategy=args.strategy, as_json=args.json)


def capture(args: argparse.Namespace) -> int:
    recipe = load(args)
    from kdlm.capture import capture

    capture(recipe)
    return 0


def sample(args: argparse.Namespace) -> int:
    recipe = load(args)
    from kdlm.sample import sample

    for line in sample(recipe, args.output):
        print(line)
    return 0


def init(args: argparse.Namespace) -> int:
    from kdlm.starter import write_recipe

    for line in write_recipe(args.teacher, args.student, args.data, Path(args.output), force=args.force):
        print(line)
    return 0


def methods(args: argparse.Namespace) -> int:
    from kdlm.catalogue import show

    show()
    return 0


def doctor(args: argparse.Namespace) -> int:
    from kdlm.doctor import show

    return show(as_json=args.json)


def serve(args: argparse.Namespace) -> int:
    import yaml

    from kdlm.serve import serve

    options = {}
    for option in args.engine_option:
        name, found, value = option.partition("=")
        if not found:
            raise ValueError(f"--engine-option {option}: expected KEY=VALUE, e.g. max_model_len=2048")
        options[name] = yaml.safe_load(value)
    given = ("dtype", "device", "engine", "host", "port", "key_env", "max_batch_tokens", "max_queue")
    return serve(args.model, engine_options=options, **{name: getattr(args, name) for name in given})


def speculate(args: argparse.Namespace) -> int:
    from kdlm.speculate import speculate

    given = ("limit", "prompt_tokens", "drafted", "temperature", "max_new_tokens", "repeats", "seed", "dtype", "device")
    options = {name: getattr(args, name) for name in given}
    return speculate(args.target, args.draft, args.prompts, as_json=args.json, **options)


def pack(args: argparse.Namespace) -> int:
    from kdlm.packs import pack

    for line in pack(args.base, args.tuned, args.output, share=args.share, rank=args.rank, device=args.device):
        print(line)
    return 0


def merge(args: argparse.Namespace) -> int:
    from kdlm.packs import merge

    given = {"weights": args.weights, "minus": args.minus, "any_base": args.any_base}
    for line in merge(args.base, args.parts, args.output, **given):
        print(line)
    return 0


def sparsify(args: argparse.Namespace) -> int:
    from kdlm.sparsity import SparsitySection
    from kdlm.sparsity.verb import expand, sparsify

    asked = {name: getattr(args, name) for name in ("share", "pattern", "scope") if getattr(args, name) is not None}
    if args.expand and (asked or args.compress):
        raise ValueError("--expand gives back the plain folder of a compressed one, and takes nothing beside it")
    if not (asked or args.compress or args.expand):
        raise ValueError("nothing to do: give --share or --pattern, --compress or --expand")
    section = SparsitySection(**asked) if asked else None
    lines = (
        expand(args.model, args.output)
        if args.expand
        else sparsify(args.model, args.output, section, compress=args.compress)
    )
    for line in lines:
        print(line)
    return 0


def eval_(args: argparse.Namespace) -> int:
    job = load(args)
    from kdlm.jobs.verb import run

    run(job)
    return 0


def generate(args: argparse.Namespace) -> int:
    pipeline = load(args)
    from kdlm.curation import check, run

    if args.check:
        for line in check(pipeline):
            print(line)
        return 0
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # leave as after Ctrl-C
    try:
        run(pipeline)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def audit(args: argparse.Namespace) -> int:
    from kdlm.audit.verb import run

    given = {name: getattr(args, name) for name in ("students", "level", "region", "check")}
    return run(args.outputs, args.reference, args.output, **given)


def schema(args: argparse.Namespace) -> int:
    from kdlm.schema import write

    return write(Path(args.root), check=args.check)


VERBS = tuple(
    verb.__name__.rstrip("_")  # `eval_`: not to hide Python's own
    for verb in (
        train,
        check,
        plan,
        sample,
        capture,
        generate,
        compare,
        mix,
        serve,
        speculate,
        pack,
        merge,
        sparsify,
        eval_,
        report,
        audit,
        init,
        methods,
        doctor,
        schema,
    )
)
