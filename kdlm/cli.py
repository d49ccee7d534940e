"""The command line: what each verb takes, and how an error is said.

Exit codes: 0 done, 1 a check said no or a guard ended the run, 2 the input is wrong (said on stderr, without a
traceback), 130 interrupted.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from kdlm import __version__, verbs
from kdlm.argument_types import numbers, rank, share, whole
from kdlm.verbs import VERBS

DESCRIPTION = "Distil a model into a smaller one, from a recipe."
OVERRIDES = "After the recipe, keys may be overridden: losses.0.temperature=2 training.max_steps=10"
STAGES = (
    f"{OVERRIDES}. Of a file with several stages, NAME.training.max_steps=10 changes one, NAME.skip=true leaves it out"
)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="kdlm", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=f"kdlm {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error (also KDLM_DEBUG=1)")
    choices = top.add_subparsers(dest="verb", metavar="verb", required=True)

    def verb(
        run: Callable[[argparse.Namespace], int], summary: str, usage: str = "", reads: str = verbs.RECIPE
    ) -> argparse.ArgumentParser:
        name = run.__name__.rstrip("_")
        made = choices.add_parser(name, help=summary, description=summary, usage=usage or None, parents=[common])
        made.set_defaults(run=run, reads=reads)
        if usage:
            made.epilog = STAGES if name in verbs.STAGED else OVERRIDES
            made.add_argument("recipe", help="YAML file")
        return made

    trained = verb(verbs.train, "train a student", "kdlm train recipe.yaml [--resume [CHECKPOINT]] [key=value ...]")
    trained.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from the newest checkpoint of the run folder, or from this one",
    )
    verb(verbs.check, "validate a recipe without training", "kdlm check recipe.yaml [key=value ...]")
    planned = verb(
        verbs.plan, "predict memory and time of a run", "kdlm plan recipe.yaml [--gpu GPU] [--json] [key=value ...]"
    )
    planned.add_argument("--gpu", help="H100, cpu, '24 GiB, 165 TFLOP/s, 1008 GB/s' ... (default: this machine's)")
    planned.add_argument("--gpus", type=int, help="so many of them: a table of strategies and places of the teacher")
    planned.add_argument("--per-node", type=int, help="of which each machine has so many (default: 8)")
    ways = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    planned.add_argument("--strategy", choices=ways, help="how they share, told in full (default: as the recipe says)")
    planned.add_argument("--json", action="store_true", help="for programs")
    drawn = verb(
        verbs.sample, "sample the student of a finished or running run", "kdlm sample recipe.yaml [key=value ...]"
    )
    drawn.add_argument("--output", metavar="FILE", help="picture to write (default: samples.png in the run folder)")
    verb(verbs.capture, "write a teacher's signals to disk", "kdlm capture recipe.yaml [key=value ...]")
    verb(
        verbs.generate,
        "have a model write, and make training rows of what it wrote",
        "kdlm generate pipeline.yaml [--check] [key=value ...]",
        reads="kdlm.curation:Pipeline",
    ).add_argument("--check", action="store_true", help="read the sources and check every step's columns; ask nobody")
    many = "kdlm compare comparison.yaml [key=value ...]"
    verb(verbs.compare, "run recipes on the same seeds and rank them", many, reads="kdlm.compare:Comparison")
    sources = "kdlm mix mixture.yaml [key=value ...]"
    verb(verbs.mix, "find the weights of a recipe's training sources", sources, reads="kdlm.mix:Mixture")
    starter = verb(verbs.init, "write a recipe for a teacher and a student")
    several = "hub id, folder, or sandbox:code-teacher; of several the one whose size suits the student best"
    starter.add_argument("--teacher", nargs="+", required=True, help=several)
    starter.add_argument("--student", required=True, help="hub id, folder, or sandbox:code-student")
    starter.add_argument("--data", required=True, help="hub id, folder or file, or sandbox:code")
    starter.add_argument("--output", default="recipe.yaml", help="where to write it (default: %(default)s)")
    starter.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    _served(verb(verbs.serve, "serve a teacher's hidden states to students on other machines"))
    _pair(verb(verbs.speculate, "measure what a draft saves a target in speculative decoding"))
    _add_up(
        verb(verbs.pack, "compress what tuning changed in a model"),
        verb(verbs.merge, "add packs or tuned models to a base"),
    )
    _pruned(verb(verbs.sparsify, "prune a model without training it; store a sparse one"))
    verb(
        verbs.eval_,
        "evaluate student, teacher and baselines on the same tasks",
        "kdlm eval job.yaml [key=value ...]",
        reads="kdlm.jobs:Job",
    )
    _pictured(verb(verbs.report, "show runs as one HTML file: curves, tokens, comparison"))
    _audited(verb(verbs.audit, "search what a teacher wrote for injected patterns, and for what is secret"))
    verb(verbs.methods, "list methods, losses, teachers and data")
    verb(verbs.doctor, "say what this machine can run").add_argument("--json", action="store_true", help="for programs")
    written = verb(verbs.schema, "write schemas for editors and the references in docs/")
    written.add_argument("--root", default=".", help="folder that holds recipes/, eval/ and docs/ (default: here)")
    written.add_argument("--check", action="store_true", help="write nothing; exit 1 when the files are out of date")
    return top


def _pictured(shown: argparse.ArgumentParser) -> None:
    """Add what `kdlm report` takes."""
    shown.add_argument("runs", nargs="+", metavar="run", help="run folder, of stages too; or results of kdlm eval")
    shown.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="(default: %(default)s)"
    )
    shown.add_argument("--png", type=Path, metavar="FOLDER", help="write every figure there as PNG too")
    shown.add_argument("--no-inspect", action="store_true", help="load no models: no heat map of a run not seen before")


def _audited(audited: argparse.ArgumentParser) -> None:
    """Add what `kdlm audit` takes."""
    audited.add_argument("outputs", help="what a teacher wrote: file, folder, hub id, or sandbox:arithmetic")
    audited.add_argument("--reference", required=True, help="text of the same kind that is trusted, likewise")
    audited.add_argument(
        "--student", dest="students", action="append", default=[], metavar="FILE", help="its answers; may be repeated"
    )
    audited.add_argument("--level", type=share, default=0.05, help="of false alarms (default: %(default)s)")
    audited.add_argument(
        "--region", metavar="CC", help="find phone numbers as this country writes them, too: US, DE ..."
    )
    audited.add_argument(
        *("-o", "--output"),
        type=Path,
        default=Path("audit.md"),
        metavar="FILE",
        help="beside it .json (default: %(default)s)",
    )
    audited.add_argument("--check", action="store_true", help="exit 1 when anything was found")


def _served(served: argparse.ArgumentParser) -> None:
    """Add what `kdlm serve` takes."""
    served.add_argument("--model", required=True, help="hub id, folder, or sandbox:code-teacher")
    served.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    served.add_argument("--device", default="auto", help="cuda:1, cpu, or auto (default: %(default)s)")
    served.add_argument(
        "--engine", default="transformers", choices=["transformers", "vllm"], help="what runs the model"
    )
    served.add_argument(
        "--engine-option", action="append", default=[], metavar="KEY=VALUE", help="handed to vllm.LLM; may be repeated"
    )
    served.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    served.add_argument("--port", type=whole(0, 65535), default=8100, help="0 takes a free one (default: %(default)s)")
    served.add_argument("--key-env", metavar="NAME", help="environment variable with the key that clients must send")
    served.add_argument(
        "--max-batch-tokens", type=whole(1, 10**9), default=8192, metavar="N", help="read at once, with padding"
    )
    served.add_argument("--max-queue", type=whole(1, 10**6), default=64, metavar="N", help="requests that may wait")


def _pair(paired: argparse.ArgumentParser) -> None:
    """Add what `kdlm speculate` takes."""
    paired.add_argument("--target", required=True, help="hub id, folder, or sandbox:code-teacher")
    paired.add_argument("--draft", required=True, help="hub id, folder, or sandbox:code-student, of the same tokenizer")
    paired.add_argument(
        "--prompts", required=True, help="file, folder or hub id with prompt, messages or text; or sandbox:code/eval"
    )
    paired.add_argument("--limit", type=whole(2, 10**6), default=32, metavar="N", help="prompts (default: %(default)s)")
    paired.add_argument(
        "--prompt-tokens", type=whole(1, 10**6), default=32, metavar="N", help="taken of a text (default: %(default)s)"
    )
    paired.add_argument("--drafted", type=whole(1, 1000), default=5, help="tokens a block (default: %(default)s)")
    paired.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    paired.add_argument(
        "--max-new-tokens", type=whole(1, 10**6), default=64, metavar="N", help="(default: %(default)s)"
    )
    paired.add_argument("--repeats", type=whole(1, 10**6), default=1, metavar="N", help="times that each is decoded")
    paired.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of the sampling (default: %(default)s)")
    paired.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    paired.add_argument("--device", default="auto", help="cuda:1, cpu, or auto (default: %(default)s)")
    paired.add_argument("--json", action="store_true", help="for programs")


def _add_up(packed: argparse.ArgumentParser, merged: argparse.ArgumentParser) -> None:
    """Add what `kdlm pack` and `kdlm merge` take."""
    for each in (packed, merged):
        each.add_argument("base", help="hub id, folder, or sandbox:code-teacher")
    packed.add_argument("tuned", help="the same model, tuned in full or with its adapter merged")
    size = packed.add_mutually_exclusive_group()
    size.add_argument("--share", type=share, help="bytes of the pack over those of the deltas (default: 0.125)")
    size.add_argument("--rank", type=rank, metavar="N", help="instead: rank of every delta, unrounded; or full")
    packed.add_argument("--device", default="auto", help="cuda:1, cpu, or auto (default: %(default)s)")
    merged.add_argument("parts", nargs="+", metavar="part", help="pack, or tuned model")
    merged.add_argument("--weights", type=numbers, metavar="W,W", help="one for each part (default: 1 each)")
    merged.add_argument("--minus", metavar="BASE", help="what tuned models were tuned from (default: the base)")
    merged.add_argument("--any-base", action="store_true", help="put packs on a base that they were not made for")
    for each in (packed, merged):
        each.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where to write")


def _pruned(pruned: argparse.ArgumentParser) -> None:
    """Add what `kdlm sparsify` takes."""
    pruned.add_argument("model", help="hub id, folder, or sandbox:code-teacher")
    pruned.add_argument("--share", type=share, help="share of the weights of linear layers that goes, the smallest")
    pruned.add_argument("--pattern", help="n:m keeps n of m neighbours: 2:4 (default: any weight may go)")
    pruned.add_argument(
        "--scope", choices=["row", "layer", "global"], help="within what weights are ranked (default: layer)"
    )
    pruned.add_argument("--compress", action="store_true", help="write bits and values, for storage alone")
    pruned.add_argument("--expand", action="store_true", help="give back the plain folder of a compressed one")
    pruned.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where to write")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; what argparse cannot place is an override if it has a `=`."""
    top = parser()
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        close = get_close_matches(argv[0], VERBS, n=1)
        meant = f", did you mean {close[0]}?" if close else "."
        top.error(f"no verb {argv[0]!r}{meant} Verbs: {', '.join(VERBS)}")
    args, rest = top.parse_known_args(argv)
    if isinstance(getattr(args, "resume", None), str) and "=" in args.resume and not Path(args.resume).exists():
        rest.insert(0, args.resume)  # `--resume key=value`: the optional checkpoint took an override
        args.resume = True
    if stray := [word for word in rest if word.startswith("-") or not hasattr(args, "recipe")]:
        top.error(f"{args.verb} does not take {' '.join(stray)} (see kdlm {args.verb} --help)")
    args.overrides = rest
    return args


SPEAK_AS_THEY_ARE_IMPORTED = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")
"""Loggers of libraries that transformers imports, which then tell of kernels that this machine lacks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    for library in SPEAK_AS_THEY_ARE_IMPORTED:
        logging.getLogger(library).setLevel(logging.ERROR)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a recipe's own losses and teachers are found beside it, as `python -m` does
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
        print(said(error, getattr(args, "recipe", None), args.reads), file=sys.stderr)
        return 2


def said(error: Exception, path: str | None, reads: str) -> str:
    """Return what to tell the user: lines with `file:line` where the error is about a key of the file that was read.

    `reads` names the Section that the file holds, as `module:class`.
    """
    message = str(error) or type(error).__name__
    if hasattr(error, "problems"):  # a RecipeError has its places already
        return message
    if path is not None and Path(path).is_file():
        from kdlm.section_loader import placed

        if (lines := placed(verbs.section_read(reads), path, message)) != message:
            return lines
    return f"kdlm: error: {message}\nkdlm: --debug shows where"
