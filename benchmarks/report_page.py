"""How fast the page of `kdlm report` is there: three runs of the quick start on one page, in a headless Chromium.

Trains the three students of the quick start for few steps (forward KL, cross-entropy, TAID), writes their report with
its heat maps, and opens it without a network several times, each in a browser context of its own. Ends with the
figure: the slowest first contentful paint.

    python benchmarks/report_page.py [--loads 10] [--runs FOLDER ...] [--check] [--quick] [--save] [--shots FOLDER]

--runs takes runs that are there instead of training three. --shots writes screenshots in light, dark and narrow.
--check exits 1 unless every first paint takes less than a second, the page is below 5 MB, the browser's console stays
empty and nothing is asked of any network.
--quick trains 20 steps and opens the page twice.
--save writes benchmarks/results/report_page.json.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GATE_MS, GATE_BYTES = 1000, 5_000_000
SWITCHES = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
SCREENS: dict[str, Any] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def trained(folder: Path, steps: int) -> list[Path]:
    """Train the quick start's three students for so many steps and return their folders."""
    from quickstart import VARIANTS, run, run_folder

    every = [f"training.max_steps={steps}", f"training.eval_steps={steps // 4}", "training.logging_steps=5"]
    for variant in VARIANTS:
        run(variant, 0, folder, [*every, "data.eval.0.limit=6", "training.eval_on_start=true"])
    return [run_folder(folder, variant, 0) for variant in VARIANTS]


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        sys.exit("no chromium, chromium-browser or google-chrome on the path")
    return found


def load(browser: Any, page: Path, screen: dict[str, Any], shot: Path | None = None) -> dict[str, Any]:
    """Open the page once, and return its first paint, when all figures were drawn, and what it should not do."""
    context = browser.new_context(offline=True, **screen)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    began = time.perf_counter()
    tab.goto(page.as_uri())
    tab.wait_for_selector("[data-drawn]", state="attached")
    drawn = 1000 * (time.perf_counter() - began)
    if shot is not None:
        tab.screenshot(path=shot, full_page=True)
    found = {"first_paint_ms": tab.evaluate(PAINT), "drawn_ms": drawn, "console": said}
    context.close()
    return found | {"requests": [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=10, help="times that the page is opened (default: 10)")
    parser.add_argument("--runs", type=Path, nargs="+", help="runs to show instead of training three")
    parser.add_argument("--shots", type=Path, metavar="FOLDER", help="write screenshots there")
    parser.add_argument("--check", action="store_true", help="exit 1 if a gate is missed")
    parser.add_argument("--quick", action="store_true", help="20 steps, two loads")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/report_page.json")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    from kdlm.report import report

    with tempfile.TemporaryDirectory() as scratch:
        runs = args.runs or trained(Path(scratch), 20 if args.quick else 120)
        page = Path(scratch) / "report.html"
        began = time.perf_counter()
        print("\n".join(report(runs, page)), f"in {time.perf_counter() - began:.1f} s")
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=chromium(), args=SWITCHES)
            version = browser.version
            load(browser, page, SCREENS["light"])  # the browser's own first page is not the report's
            loads = [load(browser, page, SCREENS["light"]) for _ in range(2 if args.quick else args.loads)]
            if args.shots:
                args.shots.mkdir(parents=True, exist_ok=True)
                loads += [load(browser, page, screen, args.shots / f"{name}.png") for name, screen in SCREENS.items()]
            browser.close()
        size = page.stat().st_size
    paints = [each["first_paint_ms"] for each in loads]
    quiet = not any(each["console"] or each["requests"] for each in loads)
    drawn = statistics.median(each["drawn_ms"] for each in loads)
    print(
        f"{len(runs)} runs, {size / 1e6:.2f} MB, Chromium {version}; console and network: {'quiet' if quiet else loads}"
    )
    print(
        f"first contentful paint: median {statistics.median(paints):.0f} ms; all figures drawn: median {drawn:.0f} ms"
    )
    if args.save:
        from machine import described

        results = {"machine": described() | {"chromium": version}, "runs": len(runs), "bytes": size, "loads": loads}
        path = ROOT / "benchmarks" / "results" / "report_page.json"
        path.write_text(json.dumps(results | {"figure": max(paints)}, indent=1) + "\n")
    print(f"slowest first contentful paint: {max(paints):.0f} ms (gate {GATE_MS} ms)")
    return 1 if args.check and not (quiet and max(paints) < GATE_MS and size < GATE_BYTES) else 0


if __name__ == "__main__":
    sys.exit(main())
