"""The trade-off: what shape, color and label say of an arm, and where labels stand."""

import itertools

import pytest

from kdq.report.page import specs, tradeoff
from kdq.tasks.classification import ACCURACY


def point(arm, size, accuracy, **fields):
    base = {"kind": "PTQ", "bits": "W4A4", "start": "student", "low": None, "high": None}
    return {**base, "tip": {"Arm": arm}, "arm": arm, "size": size, "score": accuracy, **fields}


def layers(spec, name):
    return [layer for layer in spec["layer"] if layer.get("name") == name]


def drawn(points):
    return tradeoff.pareto(points, "size", "size, KiB", ACCURACY)[0]


def test_a_shape_a_start_and_a_color_a_kind():
    points = [
        point("a", 1.0, 90.0),
        point("b", 2.0, 91.0, start="kd", kind="QAT"),
        point("c", 4.0, 92.0, kind="QAD"),
        point("d", 8.0, 93.0, start="kd", kind="QAD"),
    ]
    (encoding,) = (
        layer["encoding"] for layer in drawn(points)["layer"] if "shape" in layer["encoding"]
    )
    assert encoding["shape"]["field"] == "start"
    assert encoding["shape"]["scale"]["domain"] == ["student", "kd"]
    assert len(set(encoding["shape"]["scale"]["range"])) == 2
    assert encoding["color"]["scale"]["domain"] == ["PTQ", "QAT", "QAD"]
    # One start needs no legend.
    assert specs.start_shapes(points[:1])["legend"] is None
    many = [point(str(i), 1.0, 90.0, start=f"start {i}") for i in range(20)]
    assert len(specs.start_shapes(many)["scale"]["range"]) == 20


def test_the_frontier_has_names_others_their_bits_and_the_line_its_own():
    points = [
        point("qad_w2a2_kd", 3.0, 97.0, bits="W2A2"),
        point("qad_w4a4_kd", 5.0, 98.0),
        point("kd", 20.0, 99.0, bits="fp32"),
        point("beaten", 10.0, 90.0, bits="W8A8"),
    ]
    for name in (tradeoff.WIDE_LABELS, tradeoff.NARROW_LABELS):
        (layer,) = layers(drawn(points), name)
        said = {(v["label"], v["weight"]) for v in layer["data"]["values"]}
        assert said == {
            *((arm, "bold") for arm in ("qad_w2a2_kd", "qad_w4a4_kd", "kd")),
            ("W8A8", "normal"),
            ("frontier", "normal"),
        }


def test_labels_of_a_crowd_do_not_cover_each_other_nor_points():
    """Boxes by hand: of letters as wide as they are taken to be, around where each stands."""
    across = [i / 40 for i in range(41)]
    places = [(x, 0.5 + 0.02 * (i % 3)) for i, x in enumerate(across)]
    texts = [f"arm_{i}" for i in range(41)]
    placed = tradeoff.place_labels(places, texts, [1 if i % 5 == 0 else 2 for i in range(41)], 490)
    boxes = []
    for (x, y), label in zip(places, placed, strict=True):
        at = (17 + x * 456 + label["dx"], 17 + y * 306 + label["dy"])
        wide = 6.8 * len(label["label"])
        left = {"left": at[0], "center": at[0] - wide / 2, "right": at[0] - wide}[label["align"]]
        if label["label"]:
            boxes.append((left, at[1] - 6, left + wide, at[1] + 6))
    assert 5 <= len(boxes) < 41
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for left, top, right, bottom in boxes:
        assert left >= 0
        assert right <= 490
        for x, y in places:
            at = (17 + x * 456, 17 + y * 306)
            assert not (left < at[0] < right and top < at[1] < bottom)
    # Those that matter come first.
    assert sum(bool(placed[i]["label"]) for i in range(0, 41, 5)) >= 7


def test_the_same_bits_side_by_side_are_written_once():
    places = [(0.5, 0.5), (0.53, 0.5), (0.9, 0.5)]
    placed = tradeoff.place_labels(places, ["W4A4"] * 3, [2] * 3, 490)
    assert [label["label"] for label in placed] == ["W4A4", "", "W4A4"]


def curve(arm, kind):
    return {"arm": arm, "kind": kind, "step": 1, "score": 90.0}


def test_curves_of_one_kind_are_told_apart_by_shade_and_dashes():
    kinds = {f"qad_{i}": "QAD" for i in range(14)} | {f"qat_{i}": "QAT" for i in range(9)}
    encoding = specs.curves([curve(*one) for one in kinds.items()], "score", "%")["encoding"]
    color, dash = encoding["color"]["scale"], encoding["strokeDash"]["scale"]
    assert color["domain"] == dash["domain"]
    looks = list(zip(color["range"], map(tuple, dash["range"]), strict=True))
    assert len(set(looks)) == len(kinds)
    # Neighbours differ in both, and kinds keep to their color: orange has more red than blue.
    for arm, (shade, _) in zip(color["domain"], looks, strict=True):
        red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
        assert (red > green > blue) if kinds[arm] == "QAD" else (green > blue > red)
    for a, b in itertools.pairwise(looks):
        assert a[0] != b[0]
        assert a[1] != b[1]


def test_more_curves_than_a_legend_can_name_have_the_color_of_their_kind():
    points = [curve(f"arm_{i}", "QAD") for i in range(60)]
    encoding = specs.curves(points, "score", "%")["encoding"]
    assert encoding["color"]["field"] == "kind"
    assert "strokeDash" not in encoding


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ptq_w8a8_student_absmax", ["ptq_w8a8_", "student_absmax"]),
        ("block_0/attention/query", ["block_0/", "attention/query"]),
        ("a_short_name", None),
        ("oneverylongnamewithnoplace", None),
    ],
)
def test_long_names_at_an_axis_break_where_their_words_end(name, expected):
    axis = specs.names_axis([name, "b"])
    if expected is None:
        assert "labelExpr" not in axis
    else:
        first, rest = expected
        assert axis["labelExpr"].startswith(f'({{"{name}": ["{first}", "{rest}"]}})[datum.value]')
