"""Where to write the labels of a scatter plot so that they cover nothing."""

from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top; points (1/72 inch)

# Beside, above, below, the corners; then the same again, farther out.
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
GAPS = (5.0, 13.0, 22.0)


def place(
    points: Sequence[tuple[float, float]],
    errors: Sequence[float],
    texts: Sequence[str],
    bounds: Box,
    font_size: float,
    marker_size: float,
) -> list[tuple[float, float] | None]:
    """Chooses one place a label, greedily from the top of the plot down.

    Args:
      points: positions of the markers.
      errors: half the heights of their error bars.
      texts: one a marker.
      bounds: the box that labels must stay in.
      font_size: of the labels.
      marker_size: side of a marker.

    All lengths are in points.

    Returns:
      The centre of each label relative to its marker; None where every place covers something.
    """
    half = marker_size / 2
    taken = [(x - half, y - half, x + half, y + half) for x, y in points]
    bars = [(x - 0.5, y - e, x + 0.5, y + e) for (x, y), e in zip(points, errors, strict=True)]
    taken += bars
    offsets: list[tuple[float, float] | None] = [None] * len(points)
    for i in sorted(range(len(points)), key=lambda i: -points[i][1]):
        # A digit of the usual sans-serif fonts is 0.6 em wide and a W 1 em; a line is 1.1 em high.
        width, height = 0.7 * font_size * len(texts[i]), 1.1 * font_size
        for dx, dy in _candidates(width, height):
            x, y = points[i][0] + dx, points[i][1] + dy
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            if _inside(box, bounds) and not any(_overlap(box, other) for other in taken):
                offsets[i] = (dx, dy)
                taken.append(box)
                break
    return offsets


def _candidates(width: float, height: float) -> list[tuple[float, float]]:
    return [
        (sx * (width / 2 + gap), sy * (height / 2 + gap)) for gap in GAPS for sx, sy in DIRECTIONS
    ]


def _inside(box: Box, bounds: Box) -> bool:
    return (
        box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
    )


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
