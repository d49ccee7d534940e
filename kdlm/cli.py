"""The command line: one function per verb, heavy imports inside.

Exit codes: 0 done, 1 a check said no, 2 the input is wrong (said on stderr, without a traceback), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from kdlm import __version__

DESCRIPTION = "Distil a language model into a smaller one, from a recipe."
OVERRIDES = "After the recipe, keys may be overridden: losses.0.temperature=2 training.max_steps=10"


def train(args: argparse.Namespace) -> int:
    from kdlm.recipe import load
    from kdlm.train import train

    train(load(args.recipe, args.overrides), resume=args.resume)
    return 0


def check(args: argparse.Namespace) -> int:
    from kdlm.check import check
    from kdlm.recipe import load

    for line in check(load(args.recipe, args.overrides)):
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


def schema(args: argparse.Namespace) -> int:
    from kdlm.schema import write

    return write(Path(args.root), check=args.check)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="kdlm", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=f"kdlm {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error (also KDLM_DEBUG=1)")
    verbs = top.add_subparsers(dest="verb", metavar="verb", required=True)

    def verb(run: Callable[[argparse.Namespace], int], summary: str, **options: str) -> argparse.ArgumentParser:
        name = run.__name__
        made = verbs.add_parser(name, help=summary, description=summary, parents=[common], **options)  # type: ignore
        made.set_defaults(run=run)
        return made

    def recipe_verb(run: Callable[[argparse.Namespace], int], summary: str, usage: str) -> argparse.ArgumentParser:
        made = verb(run, summary, usage=f"kdlm {usage}", epilog=OVERRIDES)
        made.add_argument("recipe", help="YAML file")
        return made

    trained = recipe_verb(train, "train a student", "train recipe.yaml [--resume [CHECKPOINT]] [key=value ...]")
    trained.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint of the run folder, or from this one",
    )
    recipe_verb(check, "validate a recipe without training", "check recipe.yaml [key=value ...]")
    starter = verb(init, "write a recipe for a teacher and a student")
    starter.add_argument("--teacher", required=True, help="hub id, folder, or sandbox:code-teacher")
    starter.add_argument("--student", required=True, help="hub id, folder, or sandbox:code-student")
    starter.add_argument("--data", required=True, help="hub id, folder or file, or sandbox:code")
    starter.add_argument("--output", default="recipe.yaml", help="where to write it (default: %(default)s)")
    starter.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    verb(methods, "list methods, losses, teachers and data")
    verb(doctor, "say what this machine can run").add_argument("--json", action="store_true", help="for programs")
    written = verb(schema, "write recipes/schema.json and docs/recipe_reference.md")
    written.add_argument("--root", default=".", help="folder that holds recipes/ and docs/ (default: here)")
    written.add_argument("--check", action="store_true", help="write nothing; exit 1 when the files are out of date")
    return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; what argparse cannot place is an override if it has a `=`."""
    top = parser()
    verbs = ("train", "check", "init", "methods", "doctor", "schema")
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        close = get_close_matches(argv[0], verbs, n=1)
        top.error(f"no verb {argv[0]!r}{f', did you mean {close[0]}?' if close else ''} Verbs: {', '.join(verbs)}")
    args, rest = top.parse_known_args(argv)
    if isinstance(getattr(args, "resume", None), str) and "=" in args.resume and not Path(args.resume).exists():
        rest.insert(0, args.resume)  # `--resume key=value`: the optional checkpoint took an override
        args.resume = True
    if stray := [word for word in rest if word.startswith("-") or not hasattr(args, "recipe")]:
        top.error(f"{args.verb} does not take {' '.join(stray)} (see kdlm {args.verb} --help)")
    args.overrides = rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    debug = args.debug or os.environ.get("KDLM_DEBUG", "") not in ("", "0")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("kdlm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: `kdlm methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        problems = getattr(error, "problems", None)
        if problems:  # a RecipeError: lines that editors can jump to
            print(*problems, sep="\n", file=sys.stderr)
            print(f"kdlm: error: {len(problems)} problem{'s' * (len(problems) > 1)} in {args.recipe}", file=sys.stderr)
        else:
            print(f"kdlm: error: {error or type(error).__name__}", file=sys.stderr)
            print("kdlm: --debug shows where", file=sys.stderr)
        return 2
