"""The front, the zoom, and the places of points."""

import numpy as np
import pytest

from kdq.report import front


def test_pareto_front_keeps_what_no_smaller_arm_beats():
    points = [(8, 99.0), (4, 97.0), (4, 98.0), (2, 90.0), (6, 98.0), (1, 90.0)]
    assert front.pareto_front(points) == [5, 2, 0]


def test_a_collapsed_arm_opens_a_second_panel_and_a_close_field_does_not():
    field = [95.0, 96.0, 97.0, 97.5, 98.0, 98.5]
    assert front.zoom_floor(field) is None
    assert 60 < front.zoom_floor([60.0, *field]) < 95
    assert 61 < front.zoom_floor([10.0, 61.0, *field]) < 95
    # No gap, but most are as close to each other.
    assert 60 < front.zoom_floor([10.0, 29.0, 40.0, 50.0, 60.0, *field]) < 95
    assert front.zoom_floor([10.0, 29.0, 40.0, 50.0, 60.0, 62.0, 64.0, *field]) is None
    assert front.zoom_floor([]) is None
    assert front.zoom_floor([97.0] * 5) is None
    assert front.zoom_floor([60.0, 98.0]) is None


def test_arms_of_one_size_stand_apart_without_passing_their_neighbours():
    sizes = [1000, 2000, 2010, 2000, 2000, 4000]
    places = front.side_by_side(sizes)
    assert places[0] == pytest.approx(1000)
    assert places[5] == pytest.approx(4000)
    order = [0, 1, 3, 4, 2, 5]  # what costs more stays to the right of what costs less
    assert np.all(np.diff(np.array(places)[order]) > 0)
    assert np.prod(places[1:5]) ** 0.25 == pytest.approx(2002.5, rel=1e-3)


def test_arms_of_nearly_one_size_stand_apart_where_the_largest_is_far():
    first, second, _ = front.side_by_side([4400, 4500, 400_000])
    # A marker has about 9 of the 560 units of a chart's width.
    assert np.log(second / first) / np.log(400_000 / 4400) > 9 / 560
    assert front.side_by_side([4400, 4500, 5000]) == pytest.approx([4400, 4500, 5000])
