"""The page of a report: every figure, nothing from elsewhere, and in a browser."""

from __future__ import annotations

import base64
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from axolotl_moe_peft.report import figures
from axolotl_moe_peft.report.page import page, write
from tests.report.reports import FIGURES, REPORTS, router_of_tokens

every_report = pytest.mark.parametrize("name", REPORTS)
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# appended to a copy of the page: what the browser made of it
LOOK = """<script>
window.addEventListener("load", () => {
  const images = [...document.images].map(i => [i.closest("section").id, i.naturalWidth, i.naturalHeight]);
  const fetched = performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"));
  const seen = {images, fetched, width: document.body.scrollWidth, text: document.body.innerText};
  document.body.innerHTML = `<pre id=seen>${btoa(unescape(encodeURIComponent(JSON.stringify(seen))))}</pre>`;
});
</script>"""


@functools.cache
def page_of(name: str) -> str:
    return page(REPORTS[name]())


@every_report
def test_every_figure_is_there_and_nothing_from_elsewhere(name: str) -> None:
    html = page_of(name)
    assert re.findall(r'<section id="([\w-]+)"><h2>[^<]+</h2><figure>', html) == FIGURES[name]
    assert html.count("<img ") == html.count('src="data:image/svg+xml;base64,') == len(FIGURES[name])
    # no other way for a page to fetch something
    assert not re.search(r"<script|<link|<iframe|<object|<embed|<base|@import|url\(|href=|srcset=", html)
    assert "<i>olmoe" not in html and "<b>this" not in html and "\u2423the" in html


def test_the_same_report_is_the_same_page() -> None:
    assert page(REPORTS["one layer of 3 experts"]()) == page_of("one layer of 3 experts")


def test_both_files_are_written(tmp_path: Path) -> None:
    report = REPORTS["one layer of 3 experts"]()
    paths = write(report, tmp_path / "new")
    assert [path.name for path in paths] == ["routing.json", "routing.html"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(report))


@functools.cache
def drawn(name: str) -> list[tuple[str, Figure]]:
    drawings = list(figures.drawings(REPORTS[name]()))
    for drawing in drawings:
        FigureCanvasAgg(drawing.figure).draw()
    return [(drawing.name, drawing.figure) for drawing in drawings]


def texts_around(axis: Axes) -> Iterator[tuple[str, Bbox]]:
    """The texts around an axis that is drawn; of the tick labels those that are upright and within its limits."""
    for each, ends in ((axis.xaxis, sorted(axis.get_xlim())), (axis.yaxis, sorted(axis.get_ylim()))):
        ticks = [tick for tick in each.get_major_ticks() if ends[0] <= tick.get_loc() <= ends[1]]
        labels = [label for tick in ticks for label in (tick.label1, tick.label2)]
        for artist in (*labels, each.label):
            if artist.get_visible() and artist.get_text() and not artist.get_rotation() % 90:
                yield artist.get_text(), artist.get_window_extent()
    if axis.get_title():
        yield axis.get_title(), axis.title.get_window_extent()


@every_report
def test_no_text_lies_on_another(name: str) -> None:
    for figure_name, figure in drawn(name):
        texts = [text for axis in figure.axes for text in texts_around(axis)]
        assert texts
        for (one, box), (other, other_box) in combinations(texts, 2):
            overlap = Bbox.intersection(box, other_box)
            assert overlap is None or min(overlap.size) < 1.5, (figure_name, one, other)
        for text, box in texts:
            assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, (figure_name, text)


@every_report
def test_axes_have_labels_and_colours_a_scale(name: str) -> None:
    for figure_name, figure in drawn(name):
        for axis in figure.axes:
            if axis.axison and axis.get_label() != "<colorbar>":
                assert axis.get_xlabel() and axis.get_ylabel(), figure_name
        heat_maps = [axis for axis in figure.axes if axis.images]
        bars = [axis.get_ylabel() for axis in figure.axes if axis.get_label() == "<colorbar>"]
        assert len(bars) == bool(heat_maps) and all(bars)


def test_the_colours_fall_in_lightness() -> None:
    """Greyscale keeps the order: the relative luminance of the map falls from 0 to the largest value."""
    colours = colormaps[figures.COLOURS]([i / 50 for i in range(51)])[:, :3]
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    assert all(light > dark for light, dark in pairwise(luminance))


def test_numbers_of_cells() -> None:
    (drawing,) = [d for d in figures.drawings(REPORTS["one layer of 3 experts"]()) if d.name == "usage"]
    layer = REPORTS["one layer of 3 experts"]()["routers"][0]["layers"][0]["choices"][0]
    texts = [text.get_text() for text in drawing.figure.axes[0].texts]
    assert texts == [f"{100 * count / sum(layer):.0f}" for count in layer]
    values = drawing.figure.axes[0].images[0].get_array().tolist()[0]
    assert values == pytest.approx([3 * count / sum(layer) for count in layer])


def test_layers_with_fewer_experts() -> None:
    router = router_of_tokens("base", 2, 4, 2)
    router["layers"][0] = router_of_tokens("base", 1, 2, 2)["layers"][0]
    for figure in (figures.usage_figure([router]), figures.datasets_figure(router, ["a", "b"])):
        cells = figure.axes[0].images[0].get_array()
        assert cells.mask.tolist() == [[False, False, True, True], [False] * 4]
        assert len(figure.axes[0].texts) == 6
    first = figures.usage_figure([router]).axes[0].images[0].get_array()[0]
    assert first[:2].mean() == pytest.approx(1)  # an equal share of two


def test_names_of_datasets_stay_apart() -> None:
    paths = [f"example_yamls/quickstart/{task}_heldout.jsonl" for task in ("gsm8k", "boolq")]
    assert figures.short_names(paths) == ["gsm8k_heldout.jsonl", "boolq_heldout.jsonl"]
    assert figures.short_names(["a/b/rows.jsonl", "a/c/rows.jsonl"]) == ["b/rows.jsonl", "c/rows.jsonl"]
    assert figures.short_names(["owner/name", "rows"]) == ["owner/name", "rows"]
    assert figures.short_names(["a/b.jsonl"]) == ["b.jsonl"]
    alike = [f"{'x' * 20}{i}{'y' * 20}" for i in range(2)]
    assert [name[:3] for name in figures.short_names(alike)] == ["1: ", "2: "]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)}")
    return found


@every_report
def test_in_a_browser(name: str, browser: str, tmp_path: Path) -> None:
    html, page_with_look = page_of(name), tmp_path / "look.html"
    page_with_look.write_text(html.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    options = ["--no-sandbox", "--disable-gpu", "--window-size=1280,2000", "--enable-logging=stderr"]
    command = [browser, *options, "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, page_with_look.as_uri()], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = _decoded(re.search(r'id="seen">([^<]+)<', done.stdout)[1])
    assert [image[0] for image in seen["images"]] == FIGURES[name]
    assert all(width > 200 and height > 100 for _, width, height in seen["images"])
    assert seen["fetched"] == []
    assert seen["width"] <= 1280  # wide figures scroll by themselves
    assert "Where the routers send what" in seen["text"] and "./outputs/<i>olmoe</i>" in seen["text"]


def _decoded(text: str) -> dict[str, Any]:
    return json.loads(base64.b64decode(text))
