"""The heat map says of every token what the inspection says, and its text in full."""

import html
import json
import re
from dataclasses import replace

import pytest
from run_folders import inspection, token, write_inspected, write_run

from kdlm.report.heat_map import edges, heat_map, level, marked, summary
from kdlm.report.run import read_run


@pytest.fixture
def run(tmp_path):
    return read_run(write_inspected(tmp_path / "kl"))


def data(page):
    return json.loads(re.search(r'id="token-data">(.*?)</script>', page)[1])


def test_every_counted_token_has_the_numbers_of_the_inspection(run):
    found = data(heat_map([run]))
    assert found["measures"] == ["KL(teacher ‖ student)", "KL(student ‖ teacher)", "cross-entropy of the student"]
    for shown, text in zip(found["runs"][0], inspection()["texts"], strict=True):
        for mine, theirs in zip(shown, text["tokens"], strict=True):
            if not theirs["kept"]:
                assert mine is None
                continue
            word, values, teacher, student = mine
            names = ("kl_to_teacher", "reverse_kl_to_teacher", "cross_entropy")
            assert values == pytest.approx([theirs[name] for name in names], rel=1e-5)
            assert word == marked(theirs["text"])
            assert teacher == [[marked(each), share] for each, share in theirs["teacher"]]
            assert student == [[marked(each), share] for each, share in theirs["student"]]


def test_the_mean_of_the_texts_is_the_metric(run):
    found = run.inspection
    kls = [value[0] for text in data(heat_map([run]))["runs"][0] for each in text if each for value in [each[1]]]
    assert sum(kls) / len(kls) == pytest.approx(found["measured"]["metrics"]["kl_to_teacher"]["value"], rel=1e-5)
    mean = sum(0.01 * (at + 1) for at in range(1, 40)) / 39
    assert summary(found["texts"][0]) == f"39 tokens, KL {mean:.3f}, reverse KL {mean / 2:.3f}, loss {1 + mean:.3f}"


def test_a_tokens_colour_is_the_level_of_its_value(run):
    page = heat_map([run])
    ends = data(page)["edges"][0]
    levels = [int(found) for found in re.findall(r'<span data-level="(\d)"', page)]
    values = [each[1][0] for text in data(page)["runs"][0] for each in text if each]
    assert levels[: len(values)] == [level(value, ends) for value in values]
    assert len(set(levels)) > 4


def test_the_scale_grows_and_holds_nearly_all_tokens_below_its_last_level():
    values = [0.001 * number for number in range(1000)]
    ends = edges(values)
    assert ends == sorted(set(ends)) and len(ends) == 7
    assert ends[-1] == pytest.approx(0.98)
    assert [level(value, ends) for value in (0.0, ends[0], ends[-1] + 1, None)] == [0, 1, 7, None]
    assert len(set(edges([0.0, 0.0]))) == 7


def test_white_space_is_seen_and_text_is_whole(run):
    page = heat_map([run])
    text = html.unescape(re.sub(r"<[^>]*>", "", re.search(r'data-text="0" dir="ltr">(.*?)</div>', page)[1]))
    assert text == "".join(marked(each["text"]) for each in inspection()["texts"][0]["tokens"])
    assert "(x):<i>↵</i></span><br><span" in page and "<i>·</i><i>·</i><i>·</i><i>·</i>return" in page


def test_without_a_teacher_only_the_loss_colours(run):
    found = inspection()
    for each in (each for text in found["texts"] for each in text["tokens"]):
        for name in ("kl_to_teacher", "reverse_kl_to_teacher", "teacher"):
            each.pop(name, None)
    page = heat_map([replace(run, inspection=found)])
    assert data(page)["measures"] == ["cross-entropy of the student"] and page.count('name="measure"') == 1


def test_a_token_without_numbers_has_no_colour(run):
    found = inspection()
    found["texts"][0]["tokens"][1] |= {"kl_to_teacher": float("nan"), "cross_entropy": None}
    assert data(heat_map([replace(run, inspection=found)]))["runs"][0][0][1][1] == [None, pytest.approx(0.01), None]


def test_many_long_texts_are_cut_and_it_is_said(tmp_path):
    run = read_run(write_run(tmp_path / "kl"))
    runs = [replace(run, name=f"kl-{number}", inspection=inspection(texts=3, tokens=200)) for number in range(30)]
    page = heat_map(runs)
    assert sum(len(text) for each in data(page)["runs"] for text in each) < 6000
    assert "117 more tokens are not shown" in page and "The first 2 texts of each run are shown." in page


def test_what_a_token_holds_cannot_become_markup(run):
    words = ['</script><script>alert("x")</script>', "&amp;<b>", "\x1b[31m\x00", "\u202eevil", "\u2028", "'\"`"]
    found = inspection()
    found["texts"][0]["tokens"] = [token(word, 0.1) for word in words]
    found["texts"][0]["place"] = '"><img src=x onerror=alert(1)>'
    page = heat_map([replace(run, inspection=found)])
    assert "<script>alert" not in page and "<img" not in page and "<b>" not in page
    assert page.count("</script>") == 1  # that of the data
    assert "\x1b" not in page and "\u202e" not in page and "\u2028" not in page
    assert [each[0] for each in data(page)["runs"][0][0]] == [marked(word) for word in words]
    assert marked("\u202eevil") == "⟨202E⟩evil"
