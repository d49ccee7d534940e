"""The page in a real headless Chromium: quiet, without network, by keyboard, in light and dark."""

import json
import re
import shutil

import pytest
from run_folders import BASELINE, inspection, lines, write_inspected, write_run

from kdlm.report import read_runs
from kdlm.report.heat_map import marked
from kdlm.report.look import contrast
from kdlm.report.page import page as made

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
SWITCHES = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
EVIL = "</script><img src=x onerror=alert(1)>\u202e"


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The report of a distilled student of two seeds, a baseline, and a run whose name and text attack the page."""
    from kdlm.report.drawing import bundle

    folder = tmp_path_factory.mktemp("runs")
    plain = write_run(folder / "ce", lines(3.0, "cross_entropy"), **BASELINE)
    evil = write_inspected(folder / "x & <b>", student={"name": "pretrained", "path": EVIL})
    found = inspection()
    found["texts"][0]["tokens"][1]["text"] = EVIL
    (evil / "inspection.json").write_text(json.dumps(found))
    runs = read_runs([write_inspected(folder / "kl-0"), write_run(folder / "kl-1", lines(2.6), seed=1), plain, evil])
    target = folder / "report.html"
    target.write_text(made(runs, bundle()), encoding="utf-8")
    return target


@pytest.fixture
def opened(chromium, file):
    """Open the page in a context of its own, and hold at the end that it was quiet and asked for nothing."""
    said, asked, contexts = [], [], []

    def open_(**options):
        context = chromium.new_context(offline=True, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        tab.wait_for_selector("[data-drawn]", state="attached")
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} <= {file.as_uri()}


def colours(tab, selector, ground="body"):
    """Return the text's and the ground's colour as `#rrggbb`."""
    script = """([selector, ground]) => [getComputedStyle(document.querySelector(selector)).color,
        getComputedStyle(document.querySelector(ground)).backgroundColor]"""
    return [as_hex(colour) for colour in tab.evaluate(script, [selector, ground])]


def as_hex(colour):
    return "#" + "".join(f"{int(float(part)):02x}" for part in re.findall(r"[\d.]+", colour)[:3])


def test_every_figure_is_drawn_without_a_word_to_the_console(opened):
    tab = opened()
    drawn, all_ = tab.locator("[data-figure] svg").count(), tab.locator("[data-figure]").count()
    assert drawn == all_ > 10
    assert tab.title() == "code-student, </script><img src=x onerror=alert(1)>⟨202E⟩ from code-teacher: kdlm report"


def test_a_script_that_is_slipped_in_does_not_run(chromium, file):
    context = chromium.new_context(offline=True)
    tab = context.new_page()
    tab.goto(file.as_uri())
    refused = tab.evaluate(
        """() => new Promise(done => {
            document.addEventListener("securitypolicyviolation", event => done(event.violatedDirective));
            const script = document.createElement("script");
            script.textContent = "window.slipped = 1";
            document.body.append(script);
        })"""
    )
    assert refused.startswith("script-src") and tab.evaluate("window.slipped") is None
    assert tab.locator("img").count() == 0
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_axes_can_be_read_in_both_schemes(opened, scheme):
    tab = opened(color_scheme=scheme)
    for selector in ("body", ".quiet", ".said", "nav a", "thead th", "figcaption", "summary", "button"):
        ink, paper = colours(tab, selector)
        assert contrast(ink, paper) >= 4.5, selector
    assert (int(paper[1:3], 16) < 64) == (scheme == "dark")
    label = tab.evaluate("document.querySelector('[data-figure] .role-axis-label text').getAttribute('fill')")
    ground = tab.evaluate("document.querySelector('[data-figure] svg rect, [data-figure] svg').style.backgroundColor")
    assert contrast(label, paper) >= 4.5
    assert ground in ("", None) or as_hex(ground) == paper
    spans = tab.evaluate(
        """() => [...document.querySelectorAll('#texts [data-level]')].map(span =>
            [getComputedStyle(span).color, getComputedStyle(span).backgroundColor])"""
    )
    assert min(contrast(as_hex(ink), as_hex(heat)) for ink, heat in spans) >= 4.5


def test_the_button_turns_the_page_and_its_figures(opened):
    tab = opened(color_scheme="light")
    before = tab.evaluate("document.querySelector('[data-figure] .role-axis-label text').getAttribute('fill')")
    tab.get_by_role("button", name="switch between light and dark").click()
    tab.wait_for_selector("[data-drawn=dark]", state="attached")
    after = tab.evaluate("document.querySelector('[data-figure] .role-axis-label text').getAttribute('fill')")
    _, paper = colours(tab, "body")
    assert contrast(before, paper) < 4.5 <= contrast(after, paper)
    tab.emulate_media(color_scheme="dark")
    assert tab.locator("#scheme").inner_text() == "Light"


def test_the_keyboard_walks_through_the_tokens(opened):
    tab = opened()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the figures"
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.dataset.token"):
            break
    tokens = inspection()["texts"][0]["tokens"]
    for key, place in (("", 1), ("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", 39), ("Home", 1)):
        if key:
            tab.keyboard.press(key)
        token = tokens[place]
        assert tab.evaluate("document.activeElement.dataset.token") == str(place)
        panel, said = tab.locator("#token").inner_text(), tab.locator("#said").inner_text()
        for text in (panel, said):
            assert marked(token["text"]) in text and f"{token['kl_to_teacher']:.3f}" in text
            assert f"{token['cross_entropy']:.3f}" in text and "50.0 %" in text and "40.0 %" in text
    assert tab.locator("#said").get_attribute("aria-live") == "polite"
    tab.keyboard.press("ArrowDown")
    assert int(tab.evaluate("document.activeElement.dataset.token")) > 1
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate("document.activeElement.dataset.token") == "1"
    assert tab.locator("#texts [tabindex='0']").count() == len(inspection()["texts"])


def test_pointing_at_a_token_shows_what_focus_shows(opened):
    tab = opened()
    tab.locator("#texts [data-token='5']").first.hover()
    token = inspection()["texts"][0]["tokens"][5]
    assert f"{token['kl_to_teacher']:.3f} nats" in tab.locator("#token").inner_text()
    assert tab.locator("#said").inner_text() == ""  # a pointer is not spoken to


def test_the_colours_follow_the_measure_and_the_texts_the_run(opened):
    tab = opened()
    levels = "[...document.querySelectorAll('#texts [data-token]')].map(span => span.dataset.level)"
    edges = "[...document.querySelectorAll('#scale li')].map(step => step.textContent)"
    before, scale = tab.evaluate(levels), tab.evaluate(edges)
    tab.get_by_label("cross-entropy of the student").check()
    after = tab.evaluate(edges)
    assert tab.evaluate(levels) != before and after != scale
    ends = [float(end) for end in after[1:]]
    values = [token["cross_entropy"] for token in inspection()["texts"][0]["tokens"] if token["kept"]]
    assert [int(at) for at in tab.evaluate(levels)[: len(values)]] == [sum(v >= end for end in ends) for v in values]
    tab.get_by_label("x & <b>", exact=True).check()
    assert tab.locator("#texts [data-token='1']").first.inner_text() == marked(EVIL)
    tab.locator("#texts [data-token='1']").first.focus()
    assert marked(EVIL) in tab.locator("#token").inner_text()


def test_figures_have_words_numbers_and_a_png(opened, tmp_path):
    tab = opened()
    plot = tab.locator("[data-figure='curves/kl_to_teacher']")
    assert plot.get_attribute("tabindex") == "0" and plot.get_attribute("role") == "img"
    assert "kl-0, held out: from 2.500 at step 0 to 0.500 at step 40" in plot.get_attribute("aria-label")
    figure = tab.locator("figure", has=plot)
    figure.get_by_text("Numbers").click()
    assert "kl-0\theld out\t40\t0.5" in figure.locator("table").inner_text()
    with tab.expect_download() as caught:
        figure.get_by_role("button", name="save KL to the teacher").click()
    assert caught.value.suggested_filename == "curves-kl_to_teacher.png"
    caught.value.save_as(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with tab.expect_download() as caught:
        tab.get_by_role("button", name="save the texts as PNG").click()
    caught.value.save_as(tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").stat().st_size > 5_000
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_narrow_window_scrolls_down_only(opened):
    tab = opened(viewport={"width": 360, "height": 740})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_on_paper_the_page_is_light_and_without_buttons(opened):
    tab = opened(color_scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert int(colours(tab, "body")[1][1:3], 16) > 200
    assert not tab.locator("#scheme").is_visible() and not tab.locator("#token").is_visible()


def test_the_page_is_small(file):
    assert file.stat().st_size < 5_000_000
