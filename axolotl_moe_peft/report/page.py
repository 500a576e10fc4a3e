"""routing.json and the page that shows it, which needs no network and runs no script."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

JSON, PAGE = "routing.json", "routing.html"
_LAYERS_SHOWN = 3  # of the typical tokens: first, middle and last
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1.2rem }
h1 { margin-bottom: .2rem } h2 { margin: 2.4rem 0 .2rem } figure { margin: .6rem 0; overflow-x: auto }
figcaption, .note { color: #333; max-width: 48rem } img { max-width: none; height: auto }
table { border-collapse: collapse; margin: .6rem 0 } th, td { border-bottom: 1px solid #bbb; padding: .25rem .8rem;
  text-align: left; vertical-align: top } td.number { text-align: right } code { background: #eee; padding: 0 .25em;
  white-space: pre-wrap } summary { cursor: pointer; font-weight: 600; margin-top: .6rem }
"""


def check_that_it_can_be_drawn() -> None:
    """Check that the plotting library is there.

    Raises:
        ValueError: it is not.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            "a routing report is drawn with matplotlib, which is not installed here: "
            "pip install 'axolotl-moe-peft[report]', or pip install matplotlib."
        )


def write(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write a report.

    Args:
        report: what `measure` returns, and what the report is of (the schema in this package's README).
        folder: where to; it is made.

    Returns:
        The paths of routing.json and routing.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(json.dumps(report, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page(report), encoding="utf-8")
    return folder / JSON, folder / PAGE


def page(report: dict[str, Any]) -> str:
    """The page of a report, as HTML."""
    from .figures import drawings

    parts = [_head(report)]
    for drawing in drawings(report):
        alt = f"{drawing.title}. {drawing.text}"
        parts.append(
            f'<section id="{drawing.name}"><h2>{_text(drawing.title)}</h2><figure>'
            f'<figcaption>{_text(drawing.text)}</figcaption><img alt="{_text(alt)}" src="{_as_uri(drawing.figure)}">'
            "</figure></section>"
        )
    parts += [_typical(router, report) for router in report["routers"]]
    title = f"Routing of {report['adapter']}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _head(report: dict[str, Any]) -> str:
    rows = sum(dataset["rows"] for dataset in report["datasets"])
    tokens = sum(dataset["tokens"] for dataset in report["datasets"])
    facts = [
        ("adapter", report["adapter"]),
        ("folder", report["folder"]),
        ("base model", report["base_model"]),
        *([("step of training", f"{report['step']:,}")] if report.get("step") is not None else []),
        ("measured on", f"{rows:,} rows of evaluation data, {tokens:,} tokens, without padding"),
    ]
    datasets = [(d["name"], f"{d['rows']:,}", f"{d['tokens']:,}") for d in report["datasets"]]
    return (
        "<h1>Where the routers send what</h1>"
        + _table((), [(f"<b>{name}</b>", _text(str(value))) for name, value in facts], escaped=True)
        + _table(("dataset", "rows", "tokens"), datasets)
        + _who_has_a_router(report)
        + '<p class="note">All numbers of this page are in <code>routing.json</code> beside it.</p>'
    )


def _who_has_a_router(report: dict[str, Any]) -> str:
    notes = []
    if all(router["of"] == "base" for router in report["routers"]):
        notes.append("This adapter has no router of its own: what follows is of the base model's routers.")
    if report["hidden"]:
        notes.append(f"Not to be seen are the choices in {', '.join(report['hidden'])}.")
    return "".join(f'<p class="note">{_text(note)}</p>' for note in notes)


def _typical(router: dict[str, Any], report: dict[str, Any]) -> str:
    if router["unit"] == "prompt":
        datasets = report["datasets"]
        rows = [
            (name, datasets[p["dataset"]]["name"], f"{p['probability']:.3f}", f"<code>{_text(p['text'])}</code>")
            for name, prompts in zip(router["experts"], router["typical_prompts"])
            for p in prompts
        ]
        rows = [(*map(_text, row[:3]), row[3]) for row in rows]
        return (
            '<section id="typical-prompts"><h2>The most typical prompts of each expert</h2><p class="note">Those that '
            "it got with the highest probability, and how they begin, behind what all prompts have in common.</p>"
            + _table(("expert", "dataset", "probability", "prompt"), rows, escaped=True)
            + "</section>"
        )
    layers = [layer for layer in router["layers"] if "typical_tokens" in layer]
    if not layers:
        return ""
    shown = [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})][:_LAYERS_SHOWN]
    return (
        '<section id="typical-tokens"><h2>The most typical tokens of each expert</h2><p class="note">Those that are '
        "frequent and that the router sends to it more than others, with their share of this token's choices. Of "
        f"{len(shown)} of {len(layers)} layers; the rest is in <code>routing.json</code>.</p>"
        + "".join(_tokens_of_layer(layer, is_open=i == 0) for i, layer in enumerate(shown))
        + "</section>"
    )


def _tokens_of_layer(layer: dict[str, Any], is_open: bool) -> str:
    rows = [
        (str(i), " ".join(f"<code>{_visible(t['token'])}</code> {100 * t['share']:.0f} %" for t in tokens) or "none")
        for i, tokens in enumerate(layer["typical_tokens"])
    ]
    opened = " open" if is_open else ""
    return (
        f"<details{opened}><summary>layer {layer['layer']} ({_text(layer['block'])})</summary>"
        + _table(("expert", "tokens"), rows, escaped=True)
        + "</details>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], escaped: bool = False) -> str:
    above = f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>" if head else ""
    lines = ("".join(f"<td>{cell if escaped else _text(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{above}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(text: str) -> str:
    return html.escape(text)


def _visible(token: str) -> str:
    """A token whose white space can be seen."""
    return _text(token.replace("\n", "\u23ce").replace("\t", "\u21e5").replace(" ", "\u2423") or "(nothing)")


def _as_uri(figure: Any) -> str:
    from matplotlib import rc_context

    # an image of its own, so that names inside it are not those of another
    with io.StringIO() as file, rc_context({"svg.hashsalt": JSON}):  # the same report is the same page
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        svg = file.getvalue()
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
