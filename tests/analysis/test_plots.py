import re
import xml.etree.ElementTree as ET

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from qpeft.analysis.plots import (
    GAIN,
    LOSS,
    SERIES,
    cutoff_curves,
    difference_bars,
    reliability_diagram,
    training_curves,
)

SVG = "{http://www.w3.org/2000/svg}"


def filled(svg, colour):
    """Bounding boxes (x and y values) of what is filled with a colour."""
    boxes = []
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        if f"fill: {colour.lower()}" in path.get("style", ""):
            numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.get("d"))]
            boxes.append((numbers[::2], numbers[1::2]))
    return boxes


def test_bars_show_gains_up_and_losses_down_in_proportion():
    svg = difference_bars([0.5, -1.0, 0.0, 1.0, 0.0], "RR@10", "one")
    ((_, up),) = filled(svg, GAIN)
    ((_, down),) = filled(svg, LOSS)
    assert max(up) == min(down)  # both stand on the zero line
    assert max(up) - min(up) == pytest.approx(max(down) - min(down))
    assert "difference in RR@10" in svg


def test_a_large_collection_of_ties_is_a_small_picture():
    assert len(difference_bars([0.0] * 100_000 + [1.0, -0.5], "RR@10", "many")) < 30_000


def test_degenerate_differences_can_be_drawn():
    for differences in ([], [0.0, 0.0], [1.0]):
        ET.fromstring(difference_bars(differences, "RR@10", "x"))


def test_a_panel_per_measure_and_a_line_per_run():
    panels = {"R": {"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, None]}, "Success": {"a": [0.2, 0.4, 0.6], "b": [0.1] * 3}}
    svg = cutoff_curves(panels, [5, 10, 15], "c")
    for colour, _, _ in SERIES[:2]:
        lines = re.findall(rf'<path d="[^"]*"[^>]*style="fill: none; stroke: {colour.lower()}', svg)
        assert len(lines) == 2
    assert "R@k" in svg
    assert "Success@k" in svg


def test_figures_are_reproducible_and_leave_matplotlib_alone():
    matplotlib.use("agg")
    before = matplotlib.rcParams.copy()
    first = difference_bars([0.1, -0.2], "AP", "n")
    assert first == difference_bars([0.1, -0.2], "AP", "n")
    assert matplotlib.rcParams == before


HISTORY = [
    {"loss": 6.0, "grad_norm": 0.3, "learning_rate": 0.001, "epoch": 0.5, "step": 1},
    {"eval_RR@10": 0.5, "epoch": 0.5, "step": 1},
    {"loss": 5.0, "grad_norm": 0.3, "learning_rate": 0.0005, "epoch": 1.0, "step": 2},
    {"eval_RR@10": 0.75, "epoch": 1.0, "step": 2},
    {"train_runtime": 5.2, "train_loss": 5.5, "epoch": 1.0, "step": 2},
]


@pytest.mark.parametrize(
    ("history", "dev"),
    [
        (HISTORY, {"zero_shot": 0.6, "untrained": 0.55, "trained": 0.75}),
        (HISTORY, {"zero_shot": None, "untrained": None, "trained": 0.75}),
        ([entry for entry in HISTORY if "loss" in entry], {"zero_shot": None, "untrained": None, "trained": None}),
        ([], {"zero_shot": 0.6, "untrained": 0.55, "trained": None}),
        ([], {}),
    ],
)
def test_training_curves_are_a_picture(history, dev, tmp_path):
    path = tmp_path / "new" / "training.png"
    training_curves(history, "RR@10", dev, path)
    assert [file.name for file in path.parent.iterdir()] == ["training.png"]
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 300
    assert picture.shape[1] > 800
    assert len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[2])[::7].tolist()}) > 10


@pytest.mark.parametrize(
    ("probabilities", "relevant"),
    [
        (np.linspace(0, 1, 300), np.arange(300) % 7 == 0),
        (np.full(20, 0.25), np.arange(20) == 3),
        (np.array([0.0, 0.5]), np.array([False, True])),
    ],
)
def test_a_reliability_diagram_is_a_picture(probabilities, relevant, tmp_path):
    reliability_diagram(probabilities, relevant, tmp_path / "new" / "plot.png")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["plot.png"]
    picture = matplotlib.image.imread(tmp_path / "new" / "plot.png")
    assert len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[2])[::7].tolist()}) > 10
