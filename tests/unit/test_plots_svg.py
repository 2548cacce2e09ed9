"""The loss picture is well-formed, inside its frame, and bounded however long a run was."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tuneloop.finetune.plots import Points, write_loss_plot

SVG = "{http://www.w3.org/2000/svg}"


def drawn(points: dict[str, Points], tmp_path: Path) -> ElementTree.Element:
    write_loss_plot(points, tmp_path / "loss.svg")
    return ElementTree.fromstring((tmp_path / "loss.svg").read_text("utf-8"))


def test_curves_have_a_line_and_a_legend(tmp_path: Path) -> None:
    curves: dict[str, Points] = {"train_loss": [(1, 3.0), (2, 2.0), (3, 1.5)], "a<b": [(3, 1.7), (6, 1.2)]}
    picture = drawn(curves, tmp_path)
    assert len(picture.findall(f"{SVG}polyline")) == 2
    texts = [text.text for text in picture.findall(f"{SVG}text")]
    assert "train_loss 1.5" in texts
    assert "a<b 1.2" in texts
    assert "step" in texts
    assert {"1", "6"} <= set(texts)


def test_a_long_curve_is_smoothed_and_thinned(tmp_path: Path) -> None:
    picture = drawn({"train_loss": [(step, 1 + 1 / step) for step in range(1, 50_001)]}, tmp_path)
    raw, smooth = picture.findall(f"{SVG}polyline")
    assert raw.get("opacity") == "0.3"
    assert smooth.get("opacity") == "1"
    assert (tmp_path / "loss.svg").stat().st_size < 100_000


@pytest.mark.parametrize(
    "curve",
    [[(1, 2.0)], [(1, 0.0), (2, 0.0)], [(5, -3.0), (9, 1e9)], [(1, 1e-9), (2, 2e-9)], [(1, 2.0), (2, math.nan)]],
)
def test_everything_lies_inside_the_picture(curve: Points, tmp_path: Path) -> None:
    picture = drawn({"loss": curve}, tmp_path)
    places = [line.get("points", "") for line in picture.findall(f"{SVG}polyline")]
    places += [f"{dot.get('cx')},{dot.get('cy')}" for dot in picture.findall(f"{SVG}circle")]
    assert places
    for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(places)):
        assert 0 <= float(x) <= 720
        assert 0 <= float(y) <= 420


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    assert "No points yet" in "".join(drawn({"loss": [(1, math.nan)]}, tmp_path).itertext())
