"""The documentation is true: its code runs, its commands parse, its links lead somewhere.

A code block after `<!-- test -->` is run; the blocks of a page share their names. One after `<!-- test: name -->` is
first written to a file of that name, in the folder that the page's code runs in.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

from kdlm.catalogue import members, name_of
from kdlm.cli import VERBS, parse
from kdlm.methods import AnyMethod

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "kdlm").glob("*/README.md")),
]
TESTED = re.compile(r"^<!-- test(?:: (\S+))? -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
KDLM = re.compile(r"(?:^|\s)(?:\S*python -m |torchrun .*-m |accelerate launch .*-m )?kdlm (?P<arguments>.*)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str, str, int]]:
    """Return file name, language, code and the line of the page on which the code begins."""
    text = page.read_text()
    return [(m[1], m[2], m[3], text[: m.start(3)].count("\n")) for m in TESTED.finditer(text)]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # the Trainer's default, on a machine without a GPU
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {"__name__": "__docs__"}
    for file, language, code, line in blocks(page):
        if file:
            (tmp_path / file).write_text(code)
            monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)
        if language == "python":
            exec(compile("\n" * line + code, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_commands_of_a_page_parse(page):
    text = page.read_text()
    for line in "\n".join(SHELL.findall(text)).replace("\\\n", " ").splitlines():
        words = " ".join(shlex.quote(word) for word in shlex.split(line, comments=True))
        if found := KDLM.match(words):
            parse(shlex.split(found["arguments"]))
    for verb in re.findall(r"`kdlm ([a-z]\w*)(?:`| \S+\.yaml| \.\.\.)", text):
        assert verb in VERBS


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)):
        path, _, anchor = target.partition("#")
        if "://" not in target and path:
            assert (page.parent / path).exists(), target
        if anchor and not path:
            assert f'id="{anchor}"' in page.read_text(), target


def test_every_page_of_the_docs_is_in_their_index():
    docs = ROOT / "docs"
    listed = LINK.findall((docs / "README.md").read_text())
    assert {page.name for page in docs.glob("*.md")} - {"README.md"} <= set(listed)


def test_every_method_has_a_row_in_the_table_of_its_room():
    rows = re.findall(r"^\| `(\w+)` \| ", (ROOT / "kdlm" / "methods" / "README.md").read_text(), re.MULTILINE)
    names = [name_of(section) for section in members(AnyMethod)]
    assert sorted(names) == sorted(row for row in rows if row in names)
