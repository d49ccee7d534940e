"""`kdlm methods`: everything that a recipe can choose is in the list, described by its own class."""

import io

from rich.console import Console

from kdlm import catalogue


def test_every_choice_has_a_line_with_a_description():
    found = catalogue.entries()
    assert {"method", "loss", "teacher", "student", "data"} == {entry.kind for entry in found}
    assert {"logit_kd", "taid", "sequence_kd", "hidden_kd", "forward_kl", "cross_entropy", "local"} <= {
        entry.name for entry in found
    }
    assert [entry for entry in found if not entry.what] == []


def test_methods_name_their_paper_and_their_needs():
    taid = next(entry for entry in catalogue.entries() if entry.name == "taid")
    assert taid.paper == "arXiv 2501.16937"
    assert "teacher" in taid.needs
    assert "arXiv" not in taid.what


def test_a_pipe_gets_one_tab_separated_line_each():
    out = io.StringIO()
    catalogue.show(Console(file=out, force_terminal=False))
    lines = out.getvalue().splitlines()
    assert len(lines) == len(catalogue.entries())
    assert {line.count("\t") for line in lines} == {4}


def test_a_terminal_gets_a_table_per_kind():
    out = io.StringIO()
    catalogue.show(Console(file=out, force_terminal=True, width=200))
    assert "forward_kl" in out.getvalue()
    assert "arXiv 2501.16937" in out.getvalue()
