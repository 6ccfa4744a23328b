"""Axes and charts: where values land, and that what is drawn is well-formed and inside of the picture."""

import re
from xml.etree import ElementTree

import pytest

from vivace.report import chart, svg
from vivace.report.figures import figures


def test_values_land_where_the_axis_says():
    plot = svg.Plot(400, 300, svg.log_axis([1, 100], ticks=[1, 10, 100]), svg.axis_from_zero(100))
    assert plot.px(1) == pytest.approx(plot.left) and plot.px(100) == pytest.approx(plot.right)
    assert plot.px(10) == pytest.approx((plot.left + plot.right) / 2, abs=0.1)
    assert plot.py(0) == plot.bottom and plot.py(plot.y.high) == plot.top
    assert plot.py(plot.y.high / 2) == pytest.approx((plot.top + plot.bottom) / 2, abs=0.1)


@pytest.mark.parametrize("highest", [0.37, 1, 4, 9.9, 718, 24.96, 12345])
def test_a_linear_axis_ends_in_a_round_number_above_the_highest(highest):
    axis = svg.axis_from_zero(highest)
    assert axis.low == 0 and highest < axis.high <= 1.5 * highest
    assert 4 <= len(axis.ticks) <= 8 and axis.ticks[-1] == axis.high
    assert all(len(f"{tick:.10g}".rstrip("0")) <= 5 for tick in axis.ticks)


def test_a_logarithmic_axis_has_a_few_ticks_inside():
    for values in ([0.2, 20], [2900, 38000], [4.2, 2147], [3, 3], [401, 613], [1, 1000000]):
        axis = svg.log_axis(values)
        assert axis.low <= min(values) and axis.high >= max(values)
        assert all(axis.low * 0.99 <= tick <= axis.high * 1.01 for tick in axis.ticks)
        assert 2 <= len(axis.ticks) <= 8


def test_numbers_are_written_as_people_do():
    assert [svg.number(v) for v in (512, 1024, 16384, 0.25, 1000, 20000, 3.0)] == [
        "512",
        "1k",
        "16k",
        "0.25",
        "1,000",
        "20,000",
        "3",
    ]


@pytest.mark.parametrize("narrow", [False, True])
def test_every_figure_is_well_formed_and_stays_inside(rows, narrow):
    found = figures(rows)
    assert [figure.name for figure in found] == ["generate", "real-time", "step", "attention", "decode", "overhead"]
    for figure in found:
        root = ElementTree.fromstring(figure.draw(narrow))
        width = float(root.get("width"))
        assert width <= (320 if narrow else 936)
        check_inside(root, 0, width, float(root.get("height")))


def check_inside(element, left, width, height):
    """Markers and the beginnings of texts."""
    for child in element:
        tag = child.tag.rpartition("}")[2]
        if tag == "svg":
            check_inside(child, 0, float(child.get("width")), float(child.get("height")))
        for name, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            if tag in ("text", "circle", "rect") and child.get(name) is not None:
                assert -1 <= float(child.get(name)) <= limit + 1, ElementTree.tostring(child)


def test_a_series_is_drawn_at_its_points_with_its_values():
    plot = svg.Plot(400, 300, svg.log_axis([1, 64], ticks=[1, 64]), svg.axis_from_zero(20), "label")
    plot.add(svg.Series("a & b", [(1, 5), (64, 20)], "own", ["five", "twenty"]))
    plot.level(12, "12 GB card")
    text = plot.svg()
    ElementTree.fromstring(text)
    places = re.findall(r'<circle class="dot own" cx="([\d.]+)" cy="([\d.]+)"', text)
    assert [(float(x), float(y)) for x, y in places] == [(plot.px(1), plot.py(5)), (plot.px(64), plot.py(20))]
    assert "five" in text and "twenty" in text and "12 GB card" in text and "a &amp; b: 5 at 1" in text
    assert f'y1="{plot.py(12):g}"' in text


def test_values_that_would_cover_each_other_are_left_out():
    plot = svg.Plot(400, 300, svg.log_axis([1, 100], ticks=[1, 100]), svg.axis_from_zero(20))
    plot.add(svg.Series("a", [(10, 10), (10.2, 10), (100, 10)], "own", ["first", "second", "third"]))
    text = plot.svg()
    assert "first" not in text and "second" in text and "third" in text  # from the last one on
    plot.add(svg.Series("b", [(10, 9.9)], "own", ["above"]))
    plot.add(svg.Series("c", [(10, 9.9)], "own", ["under"], below=True))
    assert "above" not in plot.svg() and "under" in plot.svg()


def test_ticks_that_would_run_into_each_other_are_left_out():
    ticks = [1, 2, 20, 21, 22, 64]
    text = svg.Plot(300, 300, svg.log_axis(ticks, ticks=ticks), svg.axis_from_zero(1)).svg()
    assert [t for t in ticks if f'text-anchor="middle">{t}<' in text] == [1, 2, 20, 64]


def test_plots_beside_each_other_have_axes_of_one_height():
    made = []

    def plot_of(legend):
        def plot(width, head):
            made.append(
                svg.Plot(width, 300, svg.log_axis([1, 9]), svg.axis_from_zero(1, "unit"), "title", legend, head)
            )
            return made[-1]

        return plot

    chart.grid(False, [plot_of(()), plot_of([svg.Series("a line", [(1, 1)], "own")])])
    first, *_, left, right = made
    assert first.top < right.top  # the legend moves the axes down
    assert (left.top, left.bottom) == (right.top, right.bottom)


def test_lengths_with_another_amount_of_tokens_are_not_on_the_line(rows):
    forward = [row for row in rows if row["op"] == "forward"]
    other = [row | {"s": 500, "s_k": 500, "batch": 2, "tflops": 91.0} for row in forward[:1]]
    assert figures([*forward, *other])[0].draw(False) == figures(forward)[0].draw(False)
    assert any("500" in line for line in figures([*forward, *other])[0].tables[0].lines)  # but in the table


def test_bars_are_as_long_as_their_values():
    text = svg.bars(900, [("one", 10.0, "10 x", "own"), ("two", 5.0, "5 x", "blue")], "", True)
    long, short = (float(w) for w in re.findall(r'<rect class="bar \w+" [^>]*width="([\d.]+)"', text))
    assert long == pytest.approx(2 * short, rel=1e-3)
