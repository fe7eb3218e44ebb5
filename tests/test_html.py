from html.parser import HTMLParser

import pytest

from dpal_edge import html


class Checker(HTMLParser):
    """Fail on unbalanced elements; collect what a page refers to."""

    VOID = frozenset({"meta", "img", "line", "rect", "polyline"})

    def __init__(self):
        super().__init__()
        self.open = []
        self.sources = []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag


def test_page_is_balanced_and_self_contained():
    sections = [
        html.table(("a", "b"), [("1 < 2", "x & y")]),
        html.line_chart("Loss <total>", [1, 2, 3], [3.0, 1.5, 1.0], x_label="updates"),
        html.bars([("student", 5.5, "5.5 M"), ("teacher", 22.0, "22 M")], accent="student"),
        html.image(b"\xff\xd8", ".jpg", 'a "crop"'),
        html.video(b"\x1a\x45", ".webm", poster=b"\xff\xd8"),
    ]
    checker = Checker()
    checker.feed(html.page("Title & more", sections))
    assert checker.open == []
    assert len(checker.sources) == 3
    assert all(source.startswith("data:") for source in checker.sources)


def test_text_is_escaped():
    assert "&lt;script&gt;" in html.page("<script>", [])
    assert "1 &lt; 2" in html.table(("head",), [("1 < 2",)])


def test_line_chart_maps_values_to_points():
    chart = html.line_chart("loss", [0, 10], [4.0, 0.0], x_label="updates")
    # 340 x 200 with margins 44, 12, 30, 34: the first point is at the top left, the last at the bottom right.
    assert 'points="44.0,30.0 328.0,166.0"' in chart
    assert "4 to 0" in chart


def test_lines_share_axes_that_hold_zero_and_have_names():
    chart = html.lines_chart("Score", {"a<b": ([0, 10], [1.0, -1.0]), "one": ([5], [0.0])}, x_label="updates")
    # Ticks from -1 to 1 in steps of 0.5: zero is half-way between 30 and 166.
    assert 'points="44.0,30.0 328.0,166.0"' in chart
    assert 'points="186.0,98.0 186.0,98.0"' in chart  # a dot
    assert "var(--accent)" in chart
    assert "var(--second)" in chart
    assert "a&lt;b" in chart
    assert "Score: a&lt;b, one" in chart


def test_line_of_zeros_and_a_single_point():
    assert 'points="44.0,166.0 328.0,166.0"' in html.line_chart("lr", [1, 2], [0.0, 0.0], x_label="updates")
    assert "0.3 to 0.3" in html.line_chart("lr", [1], [0.3], x_label="updates")


@pytest.mark.parametrize(
    ("lowest", "highest", "expected"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.0, 9.68, [0, 2.5, 5.0, 7.5, 10.0]),
        (0.0, 0.03, [0, 0.01, 0.02, 0.03]),
        (0.0, 130, [0, 50, 100, 150]),
        (0.0, 3e-14, [0, 1e-14, 2e-14, 3e-14]),
        (-0.1, 0.7, [-0.2, 0, 0.2, 0.4, 0.6, 0.8]),
        (-3.0, 0.0, [-3, -2, -1, 0]),
        (0.0, 0.0, [0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_ticks_are_round_and_reach_lowest_and_highest(lowest, highest, expected):
    assert html.ticks(highest, lowest) == expected


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.00025, "2.5e-4"), (-0.0003, "-3e-4"), (0.0, "0"), (0.0123, "0.0123"), (812.34, "812"), (12000, "12000")],
)
def test_short_numbers(number, text):
    assert html.short(number) == text


def test_bars_are_proportional():
    chart = html.bars([("half", 1.0, "1"), ("whole", 2.0, "2")], accent="half")
    assert 'width="110.0"' in chart
    assert 'width="220.0"' in chart
    assert chart.count("var(--good)") == 1
