"""The reports of a run and a sweep in headless Chromium: phone, desktop and paper widths, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from helpers.made_run import make_run
from helpers.made_sweep import make_sweep
from raydiv.commands.label import Labelling
from raydiv.experiments.sweep.page import write_sweep_report
from raydiv.runs.directory import RunDirectory
from raydiv.runs.report.drawing import AMBER, BLUE, GREY, RAMP, RED, TEAL
from raydiv.runs.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="no browser: chromium, chromium-browser and google-chrome are not in PATH"
    ),
]

PHONE, DESK, PAPER = 390, 1280, 688
"""Widths in CSS pixels; PAPER is A4 without its margins."""

PICTURES = {"phone": 10, "desk": 10, "paper": 10, "bare": 6, "sweep, phone": 8, "sweep, desk": 8, "sweep, paper": 8}
"""The number of pictures in each page, by its medium."""

DARK = "--blink-settings=preferredColorScheme=0"

# a window is at least 500 pixels wide; a frame may be narrower
FRAME = '<iframe style="border: 0" width="{width}" height="844" srcdoc="{page}"></iframe>'
LOOK = """
const look = (page) => {
  const root = page.documentElement, view = page.defaultView, all = (some) => [...page.querySelectorAll(some)];
  const box = (one) => { const b = one.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const colour = (some, name) => view.getComputedStyle(page.querySelector(some))[name];
  return {
    title: page.title, width: root.clientWidth, scrolls: root.scrollWidth,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    pictures: all("figure").map((figure) => ({
      name: figure.querySelector("svg").getAttribute("aria-label"), box: box(figure.querySelector("svg")),
      texts: [...figure.querySelectorAll("text")].map((text) => [text.textContent, ...box(text)]),
    })),
    rows: all(".measured tbody tr").map((row) => [...row.cells].map((cell) => cell.innerText)),
    measured: box(page.querySelector(".measured") ?? page.body),
    page: colour("body", "backgroundColor"), ink: colour("body", "color"), soft: colour("figcaption", "color"),
    drawn: colour("figure text", "fill"), recipe: page.querySelector("pre").innerText,
  };
};
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map((frame) => look(frame.contentDocument));
  document.body.replaceChildren(Object.assign(document.createElement("pre"), {textContent: JSON.stringify(seen)}));
});
"""


def chromium(*arguments: str, profile: Path) -> str:
    """The output of a browser with a separate profile and without a network."""
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    isolation = [f"--user-data-dir={profile}", "--proxy-server=127.0.0.1:9", "--hide-scrollbars"]
    done = subprocess.run([*command, *isolation, *arguments], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def inspect(folder: Path, pages: list[tuple[str, int]], *arguments: str) -> list[dict[str, Any]]:
    """Boxes, texts and colours of each page in a frame of its width."""
    frames = "".join(FRAME.format(width=width, page=html.escape(page)) for page, width in pages)
    wrapper = folder / "wrapper.html"
    style = "<style>:root { color-scheme: light dark; }</style>"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8>{style}<script>{LOOK}</script><body>{frames}")
    dom = chromium("--dump-dom", *arguments, wrapper.as_uri(), profile=folder / "profile")
    pages_seen: list[dict[str, Any]] = json.loads(html.unescape(re.findall(r"<pre>(.*)</pre>", dom)[0]))
    return pages_seen


def on_paper(page: str) -> str:
    """The page with its print rules in force, whatever the colour scheme of the screen."""
    return page.replace("@media print", "@media all").replace("@media screen", "@media not all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def run(folder: Path) -> RunDirectory:
    made = make_run(folder)
    write_report(made)
    return made


@pytest.fixture(scope="module")
def sweep(folder: Path) -> Path:
    path = folder / "sweep.html"
    write_sweep_report(path, folder / "pictures", make_sweep())
    return path


@pytest.fixture(scope="module")
def light(run: RunDirectory, sweep: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The report on each medium, and the report of a run that measured nothing but its updates."""
    bare = make_run(folder, measured=False, name="bare")
    write_report(bare)
    full, search = run.report.read_text(), sweep.read_text()
    pages = {"phone": (full, PHONE), "desk": (full, DESK), "paper": (on_paper(full), PAPER)}
    pages["bare"] = (bare.report.read_text(), PHONE)
    pages |= {"sweep, phone": (search, PHONE), "sweep, desk": (search, DESK), "sweep, paper": (on_paper(search), PAPER)}
    return dict(zip(pages, inspect(folder, list(pages.values())), strict=True))


@pytest.fixture(scope="module")
def dark(run: RunDirectory, sweep: Path, folder: Path) -> dict[str, dict[str, Any]]:
    full, search = run.report.read_text(), sweep.read_text()
    pages = {"desk": (full, DESK), "paper": (on_paper(full), PAPER), "sweep, desk": (search, DESK)}
    return dict(zip(pages, inspect(folder, list(pages.values()), DARK), strict=True))


@pytest.mark.parametrize("medium", PICTURES)
def test_nothing_is_wider_than_the_page(light: dict[str, dict[str, Any]], medium: str) -> None:
    page = light[medium]
    assert page["scrolls"] <= page["width"]
    assert page["measured"][2] <= page["width"]
    assert page["requests"] == []


@pytest.mark.parametrize("medium", PICTURES)
def test_pictures_are_whole_and_their_text_is_large_enough(light: dict[str, dict[str, Any]], medium: str) -> None:
    page = light[medium]
    assert len(page["pictures"]) == PICTURES[medium]
    for picture in page["pictures"]:
        left, top, right, bottom = picture["box"]
        assert right - left > 250
        assert bottom - top > 170
        assert picture["texts"]
        for text, *(x, y, beyond, below) in picture["texts"]:
            # across or up: its height is the smaller extent
            assert min(beyond - x, below - y) > min(3 * len(text), 9), text
            assert left - 1 <= x <= beyond <= right + 1, f"{picture['name']}: {text} is cut"
            assert top - 1 <= y <= below <= bottom + 1, f"{picture['name']}: {text} is cut"


def test_pictures_are_in_one_column_on_a_phone_and_in_two_elsewhere(light: dict[str, dict[str, Any]]) -> None:
    columns = {medium: {picture["box"][0] for picture in light[medium]["pictures"]} for medium in light}
    assert {medium: len(lefts) for medium, lefts in columns.items()} == {
        medium: 1 if medium == "bare" or medium.endswith("phone") else 2 for medium in PICTURES
    }


def test_the_table_shows_the_measured_values(light: dict[str, dict[str, Any]]) -> None:
    for medium in ("phone", "desk", "paper"):
        rows = {row[0].split("\n")[0]: [" ".join(cell.split()) for cell in row[1:]] for row in light[medium]["rows"]}
        rows = {label.split(" of ")[0]: cells for label, cells in rows.items()}
        assert rows["refused: harmful"] == ["1% 0% to 4%", "82% 73% to 91%"]
        assert rows["odd rate: some kind"] == ["0.25 0.00 to 0.68", "0.25 0.00 to 0.68"]
        assert rows["answers' log-prob per token under the base"] == ["−0.83", "−1.83"]
        assert rows["separation D_B (paper protocol)"] == ["0.02 0.01 to 0.03", "0.32 0.19 to 0.48"]
    assert light["desk"]["title"] == "raydiv: made"
    assert light["bare"]["rows"] == []


def test_the_recipe_is_shown_whole(light: dict[str, dict[str, Any]], run: RunDirectory) -> None:
    assert light["phone"]["recipe"].split() == run.recipe.read_text().split()


def test_light_and_dark_are_legible(light: dict[str, dict[str, Any]], dark: dict[str, dict[str, Any]]) -> None:
    for page in (light["desk"], dark["desk"], light["sweep, desk"], dark["sweep, desk"]):
        background = rgb(page["page"])
        assert contrast(background, rgb(page["ink"])) > 10
        assert contrast(background, rgb(page["soft"])) > 4.5
        assert page["drawn"] == page["ink"]
        for colour in (BLUE, RED, AMBER, TEAL, GREY, *RAMP):
            assert contrast(background, hexadecimal(colour)) > 3
    assert luminance(rgb(light["desk"]["page"])) > 0.9
    assert luminance(rgb(dark["desk"]["page"])) < 0.02


def test_paper_is_white_also_from_a_dark_screen(dark: dict[str, dict[str, Any]]) -> None:
    assert rgb(dark["paper"]["page"]) == (255, 255, 255)
    assert luminance(rgb(dark["paper"]["drawn"])) < 0.02


def test_pixels_are_dark_under_a_dark_colour_scheme(run: RunDirectory, folder: Path) -> None:
    picture = folder / "dark.png"
    chromium(
        DARK, "--window-size=1280,3000", f"--screenshot={picture}", run.report.as_uri(), profile=folder / "profile"
    )
    pixels = imread(picture)[..., :3]
    assert pixels[5, 5].max() < 0.15
    assert (pixels.min(-1) > 0.8).any()


def test_it_prints_on_a_few_pages(run: RunDirectory, folder: Path) -> None:
    paper = folder / "report.pdf"
    chromium("--no-pdf-header-footer", f"--print-to-pdf={paper}", run.report.as_uri(), profile=folder / "profile")
    content = paper.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", content)) <= 8


Colour = tuple[int, int, int]


def rgb(css: str) -> Colour:
    red, green, blue = map(int, re.findall(r"\d+", css)[:3])
    return red, green, blue


def hexadecimal(colour: str) -> Colour:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def luminance(colour: Colour) -> float:
    """Relative luminance (WCAG 2)."""
    parts = [part / 255 for part in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Colour, other: Colour) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


KEYS = """<script>
const press = (key, repeat) => document.dispatchEvent(new KeyboardEvent("keydown", { key, repeat: Boolean(repeat) }));
["1", "3", "b", "2", "x", "4"].forEach((key) => press(key));
press("1", true);
element("choices").querySelector("button").click();
document.title = JSON.stringify([labels, at, element("where").textContent, element("answer").textContent]);
</script></body>"""


def test_answers_are_labelled_by_keys(tmp_path: Path) -> None:
    """A key labels and goes on, b goes back; other keys and a key that is held down do nothing."""
    records = [
        {"id": f"f:{n}", "set": "f", "kind": "k", "harmful": True, "attack": "direct", "verdict": "unsafe"}
        | {"prompt": f"q{n}", "asked": f"q{n}", "answer": f"</script> answer {n}"}
        for n in range(6)
    ]
    (tmp_path / "after.answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    labelling = Labelling(tmp_path, "ann", 60)
    page = tmp_path / "page.html"
    labelling.write_page(page, "raydiv label")
    order = [answer.key for answer in labelling.to_label()]
    page.write_text(page.read_text().replace("</body>", KEYS))
    dom = chromium("--dump-dom", "--virtual-time-budget=2000", page.as_uri(), profile=tmp_path / "profile")
    labels, at, where, answer = json.loads(html.unescape(re.findall(r"<title>(.*)</title>", dom)[0]))
    assert labels == dict(zip(order, ("unsafe", "refused", "degenerate", "unsafe"), strict=False))
    assert at == 4
    assert where == "Answer 5 of 6; 4 labelled"
    assert answer == next(one.answer for one in labelling.to_label() if one.key == order[4])
