"""The front, the zoom, the places of points and labels, and the file."""

import itertools

import numpy as np
import pytest
from matplotlib.image import imread

from kdq.report import labels, plot


def _record(arm, kind, bits, accuracy, size, seed=0):
    return {
        "arm": arm,
        "seed": seed,
        "status": "ok",
        "kind": kind,
        "bits": bits,
        "accuracy": accuracy,
        "size_bytes": size,
    }


def test_pareto_front_keeps_what_no_smaller_arm_beats():
    points = [(8, 99.0), (4, 97.0), (4, 98.0), (2, 90.0), (6, 98.0), (1, 90.0)]
    assert plot.pareto_front(points) == [5, 2, 0]


def test_a_collapsed_arm_opens_a_second_panel_and_a_close_field_does_not():
    field = [95.0, 96.0, 97.0, 97.5, 98.0, 98.5]
    assert plot.zoom_floor(field) is None
    assert 60 < plot.zoom_floor([60.0, *field]) < 95
    assert 61 < plot.zoom_floor([10.0, 61.0, *field]) < 95
    # No gap, but most are as close to each other.
    assert 60 < plot.zoom_floor([10.0, 29.0, 40.0, 50.0, 60.0, *field]) < 95
    assert plot.zoom_floor([10.0, 29.0, 40.0, 50.0, 60.0, 62.0, 64.0, *field]) is None
    assert plot.zoom_floor([]) is None
    assert plot.zoom_floor([97.0] * 5) is None
    assert plot.zoom_floor([60.0, 98.0]) is None


def test_arms_of_one_size_stand_apart_without_passing_their_neighbours():
    sizes = [1000, 2000, 2000, 2010, 2000, 4000]
    places = plot.side_by_side(sizes)
    assert places[0] == pytest.approx(1000)
    assert places[5] == pytest.approx(4000)
    assert np.all(np.diff(places) > 0)
    assert np.prod(places[1:5]) ** 0.25 == pytest.approx(2002.5, rel=1e-3)


def test_labels_cover_neither_markers_nor_bars_nor_each_other():
    points = [(50.0 + 9 * (i % 3), 50.0 + 8 * (i // 3)) for i in range(9)]
    texts = ["W4A4"] * 9
    places = labels.place(points, [3.0] * 9, texts, (0, 0, 200, 200), 6.0, 6.0)
    boxes = [
        (x + dx - 0.7 * 6 * 2, y + dy - 3.3, x + dx + 0.7 * 6 * 2, y + dy + 3.3)
        for (x, y), (dx, dy) in (
            (p, d) for p, d in zip(points, places, strict=True) if d is not None
        )
    ]
    assert len(boxes) >= 6
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for (left, bottom, right, top), (x, y) in itertools.product(boxes, points):
        assert not (left < x < right and bottom < y < top)


def test_a_label_without_room_is_left_out():
    assert labels.place([(5.0, 5.0)], [0.0], ["W4A4"], (0, 0, 10, 10), 6.0, 6.0) == [None]


def test_the_picture_is_replaced_whole(tmp_path):
    path = tmp_path / "made" / "plot.png"
    few = [_record("a", "teacher", "fp32", 0.99, 4000)]
    plot.accuracy_vs_size(few, path)
    single = imread(path)
    assert single.std() > 0.01
    collapsed = [_record(f"q{i}", "mine", f"W{i}", 0.9 + i / 100, 1000 * i) for i in range(1, 6)]
    plot.accuracy_vs_size([*few, *collapsed, _record("z", "PTQ", "W1", 0.1, 100)], path)
    # The second panel makes the picture wider.
    assert imread(path).shape[1] > single.shape[1]
    assert [p.name for p in path.parent.iterdir()] == ["plot.png"]


def test_arms_without_a_number_or_a_file_are_left_out(tmp_path):
    records = [
        {"arm": "a", "seed": 0, "status": "failed", "error": "x"},
        _record("b", "QAT", "W4", None, 100),
        _record("c", "QAT", "W4", 0.9, None),
    ]
    plot.accuracy_vs_size(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
