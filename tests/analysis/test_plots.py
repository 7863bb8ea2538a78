import re
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from qpeft.analysis.plots import GAIN, LOSS, SERIES, cutoff_curves, difference_bars

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
