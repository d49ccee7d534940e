"""Figures hold the numbers of the log, and Vega-Lite can draw every one of them."""

import json
import math
from itertools import pairwise

import pytest
from run_folders import BASELINE, TEACHER, inspection, lines, write_inspected, write_run

from kdlm.report import figures, read_run, read_runs
from kdlm.report.look import DARK, LEVELS, LIGHT, SERIES, config, contrast, palette
from kdlm.report.panel import thinned

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def runs(tmp_path):
    plain = write_run(tmp_path / "ce", lines(3.5, "cross_entropy"), **BASELINE)
    return read_runs([write_inspected(tmp_path / "kl"), plain])


def drawn(spec, **wanted):
    """Return the points of a spec whose rows have these values."""
    rows = [row for row in spec["data"]["values"] if wanted.items() <= row.items()]
    return [(row["step"], row["value"]) for row in rows]


def test_curves_hold_what_was_logged(runs):
    made = figures(runs)
    for run in runs:
        spec = made["curves/kl_to_teacher"]
        assert drawn(spec, name=run.name, kind="held out") == run.points("eval_kl_to_teacher")
        assert drawn(made["curves/learning_rate"], name=run.name) == run.points("learning_rate")
    assert drawn(made["curves/forward_kl"], name="kl", kind="training") == runs[0].points("forward_kl")
    assert drawn(made["resources/memory_gib"], name="kl") == runs[0].points("memory_gib")
    assert drawn(made["resources/tokens_per_second"], name="ce") == runs[1].points("tokens_per_second")


def test_shares_are_drawn_in_percent(runs):
    spec = figures(runs)["curves/top1_agreement"]
    expected = [(step, 100 * value) for step, value in runs[0].points("eval_top1_agreement")]
    assert drawn(spec, name="kl", kind="held out") == expected
    assert spec["title"] == "top-1 agreement, %"


def test_readings_that_are_the_same_numbers_share_a_panel(tmp_path):
    made = figures(
        [
            read_run(
                write_run(tmp_path / "kl", [{k: v for k, v in line.items() if k != "eval_loss"} for line in lines()])
            )
        ]
    )
    assert made["curves/forward_kl"]["title"] == "training objective = forward kl"
    assert "curves/loss" not in made


def test_the_gap_closed_is_zero_at_the_start_and_whole_at_the_teacher(runs):
    points = drawn(figures(runs)["gap_closed"], name="kl")
    assert points == [(0, 0), (20, 40), (40, 80)]  # from 4.5 by way of 3.5 to 2.5; the teacher has 2


def test_the_teachers_own_loss_is_a_level_line(runs):
    layers = figures(runs)["curves/cross_entropy"]["layer"]
    assert [
        layer["encoding"]["y"]["datum"] for layer in layers if layer["mark"] == {"type": "rule", "strokeDash": [3, 3]}
    ] == [TEACHER]


def test_the_reliability_diagram_leaves_out_bins_without_tokens(runs):
    rows = figures(runs)["reliability/kl"]["data"]["values"]
    bins = inspection()["measured"]["reliability"]["student"]
    there = [at for at in range(15) if bins["count"][at]]
    for who in ("student", "teacher"):
        mine = [row for row in rows if row["who"] == who]
        assert [row["count"] for row in mine] == [bins["count"][at] for at in there]
        assert [row["accuracy"] for row in mine] == [bins["accuracy"][at] for at in there]
    assert "reliability/ce" not in figures(runs)


def test_the_mixture_counts_the_tokens_of_each_source_once_for_the_same_data(runs):
    made = figures(runs)
    (name,) = [name for name in made if name.startswith("mixture/")]
    assert [(row["source"], row["count"]) for row in made[name]["data"]["values"]] == [("sandbox:code/train", 9_900)]


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path):
    log = lines()
    log[1]["loss"], log[2]["loss"], log[3]["eval_cross_entropy"] = math.nan, -math.inf, math.inf
    made = figures([read_run(write_run(tmp_path / "kl", log))])
    json.dumps(made, allow_nan=False)
    assert "1 value that is not finite is left out" in made["curves/cross_entropy"]["description"]
    assert "2 values that are not finite are left out" in made["curves/loss"]["description"]
    assert "not finite" not in made["curves/forward_kl"]["description"]


def test_a_long_log_is_thinned_to_values_that_were_logged_with_its_extremes():
    points = [(step, math.sin(step / 50)) for step in range(5000)]
    points[1234] = (1234, 9.0)
    kept = thinned(points, 400)
    assert len(kept) <= 400 and set(kept) <= set(points) and kept == sorted(kept)
    assert {points[0], points[-1], (1234, 9.0)} <= set(kept)
    assert thinned(points[:400], 400) == points[:400]


def test_labels_at_the_ends_of_lines_do_not_overlap(tmp_path):
    logs = [lines(2.5 + 0.001 * number) for number in range(5)]
    runs = read_runs([write_run(tmp_path / f"r{n}", log, training={"max_steps": n}) for n, log in enumerate(logs)])
    spec = figures(runs)["curves/kl_to_teacher"]
    (labels,) = [layer["data"]["values"] for layer in spec["layer"] if "data" in layer]
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    places = sorted(label["at"] for label in labels)
    pixels = [spec["height"] * (after - before) / (high - low) for before, after in pairwise(places)]
    assert len(labels) == 5 and min(pixels) > 12
    assert low <= places[0] and places[-1] <= high


def test_every_figure_can_be_drawn_and_says_what_it_shows(runs):
    pytest.importorskip("vl_convert")
    from kdlm.report import png

    made = figures(runs)
    assert {name.split("/")[0] for name in made} == {"curves", "gap_closed", "reliability", "resources", "mixture"}
    for name, spec in made.items():
        assert spec["description"].startswith(spec["title"].split(",")[0]), name
        assert set(spec["usermeta"]["columns"]) <= set(spec["data"]["values"][0])
    for name in ("curves/cross_entropy", "reliability/kl", "mixture/kl"):
        assert png(made[name], scale=1).startswith(PNG)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_colours_can_be_read_on_their_ground(dark):
    base, colours = (DARK if dark else LIGHT), palette(dark)
    for name in ("ink", "quiet", "focus"):
        assert contrast(base[name], base["paper"]) >= 4.5, name
    for colour in SERIES["dark" if dark else "light"]:
        assert contrast(colour, base["paper"]) >= 4.5, colour
    for level in range(LEVELS):
        assert contrast(base["ink"], colours[f"heat-{level}"]) >= 4.5, level
    assert contrast(config(dark)["axis"]["labelColor"], config(dark)["background"]) >= 4.5
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
