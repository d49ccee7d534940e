"""`kdlm sparsify`: prune a model without training it, and store a sparse one in fewer bytes."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel

from kdlm.disk import write_text
from kdlm.models import named
from kdlm.packs.new_folder import new_folder
from kdlm.sparsity.bitmask import compress_folder, expand_folder
from kdlm.sparsity.layers import ABOUT, apply, described_sparsity, magnitudes, prunable
from kdlm.sparsity.masks import masks_of
from kdlm.sparsity.section import SparsitySection


def sparsify(model: str, output: Path, section: SparsitySection | None, *, compress: bool = False) -> list[str]:
    """Write a model with its smallest weights set to zero: what a sparse run begins with, and is compared with.

    Args:
        model: a causal language model: folder, hub id, or `sandbox:code-teacher`.
        output: the folder to write, which may not be there.
        section: what is pruned, by magnitude and at once; None takes the model as it is.
        compress: write weights as bits and values (`kdlm.sparsity.bitmask`), for storage.

    Returns lines that say how sparse it is, and its bytes. Raises ValueError where it cannot be pruned.
    """
    lines = []
    with TemporaryDirectory() as scratch, new_folder(output) as folder:
        plain = Path(scratch) if compress else folder
        if section is None:
            source = Path(model)
            if not source.is_dir():
                raise ValueError(f"{model}: not a folder; to prune it first, give --share or --pattern")
        else:
            source, opened = plain, named(model, dtype="auto")
            lines.append(_pruned(opened.load(), section, plain))
            opened.tokenizer().save_pretrained(plain)
        if compress:
            compress_folder(source, folder)
            lines.append(f"weights: {_bytes(source):,} bytes plain, {_bytes(folder):,} as bits and values")
    return [*lines, f"written: {output}"]


def expand(model: str, output: Path) -> list[str]:
    """Write the plain folder of a compressed one. Raises ValueError where it is none."""
    with new_folder(output) as folder:
        expand_folder(Path(model), folder)
    return [f"written: {output}"]


def prune(model: PreTrainedModel, section: SparsitySection) -> None:
    """Prune a model in place, by magnitude and at once, as a run with this section does before its first step."""
    layers = prunable(model, section)
    apply(layers, masks_of(magnitudes(layers), {}, section, section.target))


def _pruned(model: PreTrainedModel, section: SparsitySection, folder: Path) -> str:
    prune(model, section)
    model.save_pretrained(folder)
    about = described_sparsity(model, section)
    write_text(folder / ABOUT, json.dumps(about, indent=1))
    return (
        f"{about['share']:.1%} of {about['weights']['of']:,} weights in {len(about['layers'])} linear layers are zero "
        f"({section.pattern}); {about['share_of_model']:.1%} of the model"
    )


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
