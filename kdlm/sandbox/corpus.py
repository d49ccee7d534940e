"""The code corpus: the standard library of the running interpreter, as text.

Every machine has it, it is real text with structure at every scale, and nobody has to download it.
"""

import hashlib
import os
import sysconfig
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")  # written when the interpreter was built: paths of one machine

SMALL_FILE = range(1_000, 40_000)  # characters: one large file would decide what the small splits are about


@dataclass(frozen=True)
class Document:
    """One source file: its path below the standard library, with forward slashes, and its text."""

    path: str
    text: str


@cache
def stdlib_documents() -> tuple[Document, ...]:
    """Return the standard library's sources without its test suites, in the order of their paths.

    Raises FileNotFoundError when the interpreter ships without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _is_skipped(name)]  # site-packages can be huge
        for name in files:
            if name.endswith(".py") and not _is_skipped(name):
                path = Path(folder, name)
                documents.append(Document(path.relative_to(root).as_posix(), _read(path)))
    documents = sorted((document for document in documents if document.text.strip()), key=lambda found: found.path)
    if not documents:
        raise FileNotFoundError(f"no Python sources below {root}: the sandbox needs an interpreter with its .py files")
    return tuple(documents)


@cache
def stdlib_digest() -> str:
    """Return a digest of every path and text of the corpus: what is built from it depends on nothing else of it."""
    digest = hashlib.sha256()
    for document in stdlib_documents():
        for part in (document.path, document.text):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def _is_skipped(name: str) -> bool:
    return name in SKIPPED_FOLDERS or name.startswith(SKIPPED_PREFIXES)


def split_documents(documents: tuple[Document, ...], *, train_chars: int, eval_chars: int) -> dict[str, list[Document]]:
    """Split by file into `teacher`, `train` and `eval`.

    No file of `eval` is in the others. `train`, the student's data, is a small part of `teacher`, as it is for
    people who distill a model that has read far more than they have. The draw goes by the digest of the path, so a
    file keeps its split when others come and go.
    """
    drawn = sorted(documents, key=lambda document: hashlib.sha256(document.path.encode()).digest())
    small = [document for document in drawn if len(document.text) in SMALL_FILE and _is_prose(document)]
    held_out = _take(small, eval_chars)
    kept_back = set(held_out)
    teacher = [document for document in drawn if document not in kept_back]
    train = _take(small[len(held_out) :], train_chars)
    return {"teacher": teacher, "train": train, "eval": held_out}


def _is_prose(document: Document) -> bool:
    """Tables of code points are a ninth of the library and say nothing of how well a model knows Python."""
    return not document.path.startswith(("encodings/", "pydoc_data/"))


def _take(documents: list[Document], chars: int) -> list[Document]:
    taken, total = [], 0
    for document in documents:
        if total >= chars:
            break
        taken.append(document)
        total += len(document.text)
    return taken


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:  # honours a coding cookie
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""  # a handful of files are broken on purpose, for tests of tools that read them
