"""The figures of a report, drawn with matplotlib from what routing.json holds.

A sequential colour map whose lightness falls all the way, so that they can be read in greyscale, and numbers in the
cells where there is room.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure

COLOURS = "viridis_r"
_CELLS_WITH_NUMBERS = 24  # columns at most; more are too narrow
_PAGE = 11.5  # inches
_LONGEST = 28  # characters of a name
# apart in greyscale, too
_STYLES = (
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "0.5", "linestyle": "--", "marker": "s", "markerfacecolor": "white"},
    {"color": "black", "linestyle": ":", "marker": "^", "markerfacecolor": "white"},
    {"color": "0.5", "linestyle": "-.", "marker": "D"},
)
_TRAINING = {
    "expert_entropy": "entropy (1: uniform)",
    "expert_max_share": "largest share",
    "expert_used_fraction": "experts in use",
    "router_accuracy": "router accuracy",
}


class Drawing(NamedTuple):
    """A figure and what stands with it.

    Attributes:
        name: for links and for those who cannot see it.
        title, text: above it, and what was measured.
        figure: of matplotlib.
    """

    name: str
    title: str
    text: str
    figure: Figure


def usage_figure(routers: Sequence[dict[str, Any]]) -> Figure:
    """Layer by expert: each expert's share of its layer's choices, the routers side by side, on one scale."""
    shares = [_shares(router) for router in routers]
    multiples = [share * np.isfinite(share).sum(1, keepdims=True) for share in shares]
    largest = max(1.0, *(float(np.nanmax(multiple)) for multiple in multiples))
    figure = _figure(sum(_width(share) for share in shares), max(_height(share) for share in shares))
    axes = figure.subplots(1, len(routers), squeeze=False, width_ratios=[_width(share) for share in shares])[0]
    for axis, router, share, multiple in zip(axes, routers, shares, multiples):
        image = _heat_map(axis, multiple, largest, [f"{100 * x:.0f}" for x in share.flat])
        axis.set_title(_title(router), fontsize=10)
        _label_experts(axis, router)
        _label_layers(axis, router)
    _bar(figure, image, axes, "times an equal share")
    return figure


def datasets_figure(router: dict[str, Any], datasets: Sequence[str]) -> Figure:
    """A panel for each dataset: what part of an expert's choices is from it, were all datasets of one size."""
    counts = _counts(router)  # (layers, datasets, experts)
    usage = counts / np.maximum(np.nansum(counts, 2, keepdims=True), 1)
    with np.errstate(invalid="ignore"):
        parts = usage / usage.sum(1, keepdims=True)
    width, height = _width(parts[:, 0]), _height(parts[:, 0])
    columns = max(1, min(len(datasets), int(_PAGE / width)))
    rows = math.ceil(len(datasets) / columns)
    figure = _figure(columns * width, rows * height)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(datasets) :]:
        axis.set_axis_off()
    for i, (axis, name) in enumerate(zip(axes.flat, datasets)):
        image = _heat_map(axis, parts[:, i], 1.0, [f"{100 * x:.0f}" for x in parts[:, i].flat])
        axis.set_title(name, fontsize=10)
        _label_experts(axis, router)
        _label_layers(axis, router)
    _bar(figure, image, axes, "part from this dataset")
    return figure


def divergence_figure(routers: Sequence[dict[str, Any]]) -> Figure:
    """By layer, how far apart the datasets are in their use of the experts."""
    figure = _figure(7, 3)
    axis = figure.subplots()
    largest = max(layer["divergence"] for router in routers for layer in router["layers"])
    for router, style in zip(routers, _STYLES):
        values = [layer["divergence"] for layer in router["layers"]]
        axis.plot(range(len(values)), values, markersize=4, label=_title(router), **style)
    axis.set_ylim(0, max(0.05, min(1.02, 1.15 * largest)))
    axis.set_xlabel("MoE layer" if len(routers) == 1 else "MoE layer, in order")
    axis.set_ylabel("divergence (1: disjoint)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    _finish(axis)
    return figure


def prompts_figure(router: dict[str, Any], datasets: Sequence[str]) -> Figure:
    """Dataset by expert: where the prompts of each dataset go, in per cent of them."""
    counts = _counts(router)[0]
    choices = np.maximum(counts.sum(1, keepdims=True), 1)
    return _matrix(
        counts / choices, datasets, router["experts"], "share of the dataset's choices", "dataset", "expert"
    )


def confusion_figure(router: dict[str, Any]) -> Figure:
    """Right expert by chosen expert: in per cent of the rows of the right one, and how many rows these are."""
    counts = np.array(router["confusion"], dtype=float)
    rows = counts.sum(1, keepdims=True)
    names = [f"{_short(name)} ({n:.0f})" for name, n in zip(router["experts"], rows[:, 0])]
    shares = counts / np.maximum(rows, 1)
    return _matrix(shares, names, router["experts"], "share of the rows", "right expert (rows)", "chosen expert")


def confidence_figure(router: dict[str, Any], datasets: Sequence[str]) -> Figure:
    """Dataset by probability of the chosen expert, in per cent of the dataset's prompts."""
    counts = np.array(router["confidence"], dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    bins = counts.shape[1]
    names = [f"{i / bins:.1f}-{(i + 1) / bins:.1f}" for i in range(bins)]
    return _matrix(shares, datasets, names, "share of the prompts", "dataset", "probability of the chosen expert")


def training_figure(history: dict[str, Any]) -> Figure:
    """The routers' figures of the log over the steps of training, all between 0 and 1."""
    figure = _figure(8, 3.4)
    axis = figure.subplots()
    known = [key for key in _TRAINING if key in history]
    for key, style in zip(known, _STYLES):
        steps, values = zip(*history[key])
        every = max(1, len(steps) // 12)
        axis.plot(steps, values, markersize=4, markevery=every, label=_TRAINING[key], **style)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("step of training")
    axis.set_ylabel("figure of the log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    _finish(axis)
    return figure


def drawings(report: dict[str, Any]) -> Iterator[Drawing]:
    """The figures for what a report holds.

    Args:
        report: as routing.json.
    """
    routers, datasets = report["routers"], short_names([dataset["name"] for dataset in report["datasets"]])
    by_token = [router for router in routers if router["unit"] == "token"]
    for router in routers:
        if router["unit"] == "prompt":
            yield from _drawings_of_prompts(router, datasets)
    if by_token:
        yield Drawing(
            "usage",
            "Usage of the experts, by layer",
            "Share of a layer's choices that each expert got over all tokens. Colour: that share by an equal one (1: "
            "all experts alike), on one scale for all routers. Numbers, where there is room: per cent of the layer's "
            "choices.",
            usage_figure(by_token),
        )
    if len(datasets) > 1:
        for router in by_token:
            yield Drawing(
                f"datasets-{router['of']}",
                f"Who goes where: {_title(router)}",
                "What part of the tokens that an expert got is from a dataset, in per cent, as if all datasets had "
                "the same number of tokens. An expert that serves all alike has "
                f"{100 / len(datasets):.0f} everywhere; white: it got none.",
                datasets_figure(router, datasets),
            )
        if by_token:
            yield Drawing(
                "divergence",
                "How far apart the datasets are, by layer",
                "Jensen-Shannon divergence of the datasets' usage of the experts, by its largest value: 0, all use "
                "them alike; 1, no two datasets share an expert.",
                divergence_figure(by_token),
            )
    history = report.get("history") or {}
    if any(key in history for key in _TRAINING):
        yield Drawing(
            "training",
            "Over the steps of training",
            "As the log has it, averaged over layers and the steps between two lines; of the batches that were "
            "trained on.",
            training_figure(history),
        )


def _drawings_of_prompts(router: dict[str, Any], datasets: Sequence[str]) -> Iterator[Drawing]:
    yield Drawing(
        "prompts",
        "Who goes where: prompts of each dataset",
        "The router chooses once for each prompt. Per cent of a dataset's choices that each expert got.",
        prompts_figure(router, datasets),
    )
    if router["confusion"] is not None:
        yield Drawing(
            "confusion",
            "Right and chosen experts",
            "Rows whose dataset names their expert, by it and by the one that the router chose; per cent of a line, "
            "whose number of rows stands behind its name.",
            confusion_figure(router),
        )
    yield Drawing(
        "confidence",
        "Confidence of the router",
        "The probability that the router gave the expert it chose; per cent of a dataset's prompts. With "
        f"{len(router['experts'])} experts it is at least {1 / len(router['experts']):.2f}.",
        confidence_figure(router, datasets),
    )


def _counts(router: dict[str, Any]) -> np.ndarray:
    """(layers, datasets, experts); NaN for experts that a layer does not have."""
    layers = router["layers"]
    counts = np.full((len(layers), len(layers[0]["choices"]), len(router["experts"])), np.nan)
    for i, layer in enumerate(layers):
        choices = np.array(layer["choices"], dtype=float)
        counts[i, :, : choices.shape[1]] = choices
    return counts


def _shares(router: dict[str, Any]) -> np.ndarray:
    """Each expert's share of a layer's choices: (layers, experts); NaN for experts that a layer does not have."""
    counts = _counts(router).sum(1)
    return counts / np.maximum(np.nansum(counts, 1, keepdims=True), 1)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _width(cells: np.ndarray) -> float:
    columns = cells.shape[1]
    return max(3.4, 0.9 + columns * (0.36 if columns <= _CELLS_WITH_NUMBERS else 0.11))


def _height(cells: np.ndarray) -> float:
    return 1.5 + 0.24 * max(len(cells), 2)


def _heat_map(axis: Axes, cells: np.ndarray, largest: float, numbers: Sequence[str]) -> Any:
    image = axis.imshow(cells, cmap=COLOURS, vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    rows, columns = cells.shape
    if columns <= _CELLS_WITH_NUMBERS:
        for i, (number, value) in enumerate(zip(numbers, cells.flat)):
            if np.isfinite(value):
                colour = "white" if value > 0.5 * largest else "black"
                axis.text(i % columns, i // columns, number, ha="center", va="center", fontsize=7, color=colour)
    return image


def _label_experts(axis: Axes, router: dict[str, Any]) -> None:
    axis.set_xlabel("expert")
    _ticks(axis.set_xticks, router["experts"], 16)


def _label_layers(axis: Axes, router: dict[str, Any]) -> None:
    by_prompt = router["unit"] == "prompt"
    axis.set_ylabel("" if by_prompt else "layer")
    _ticks(axis.set_yticks, ["prompts" if by_prompt else str(layer["layer"]) for layer in router["layers"]], 60)


def _ticks(set_ticks: Any, names: Sequence[str], most: int) -> None:
    every = max(1, math.ceil(len(names) / most))
    set_ticks(range(0, len(names), every), names[::every], fontsize=7)


def _matrix(
    shares: np.ndarray, rows: Sequence[str], columns: Sequence[str], colours: str, row_label: str, column_label: str
) -> Figure:
    wide = max(len(_short(name)) for name in columns)
    figure = _figure(2.8 + len(columns) * max(0.6, 0.085 * min(wide, 8)), 1.9 + 0.34 * len(rows) + 0.05 * wide)
    axis = figure.subplots()
    image = _heat_map(axis, shares, 1.0, [f"{100 * x:.0f}" for x in shares.flat])
    axis.set_xticks(range(len(columns)), [_short(name) for name in columns], fontsize=8)
    if wide > 8:
        axis.tick_params(axis="x", rotation=35)
        for label in axis.get_xticklabels():
            label.set_horizontalalignment("right")
    axis.set_yticks(range(len(rows)), [_short(name) for name in rows], fontsize=8)
    axis.set_xlabel(column_label)
    axis.set_ylabel(row_label)
    _bar(figure, image, axis, colours)
    return figure


def _bar(figure: Figure, image: Any, axes: Any, label: str) -> Colorbar:
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return bar


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.figure.legend(loc="outside right upper", fontsize=8, frameon=False)


def _title(router: dict[str, Any]) -> str:
    whose = "the adapter's routers" if router["of"] == "adapter" else "the base model's routers"
    return f"{whose}, {router['experts_per_choice']} of {len(router['experts'])} a {router['unit']}"


def _short(name: str) -> str:
    half = (_LONGEST - 3) // 2
    return name if len(name) <= _LONGEST else f"{name[:half]}...{name[-half:]}"


def short_names(names: Sequence[str]) -> list[str]:
    """Names of datasets that fit beside an axis and differ: without the folders that all have in common."""
    common = len(os.path.commonprefix([f"{os.path.dirname(name)}/" for name in names]).rpartition("/")[0])
    short = [_short(name[common:].lstrip("/") if len(names) > 1 else os.path.basename(name)) for name in names]
    return short if len(set(short)) == len(names) else [f"{i + 1}: {name}" for i, name in enumerate(short)]
