"""Labels of points in a chart, placed so that they cover neither each other nor other points."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

# Of a chart: its width beside another one on a page, and on a phone; its height; in pixels.
WIDE, NARROW, HEIGHT, PADDING = 490, 260, 340, 17
CHAR, LINE = 6.8, 12  # of a letter and of a line of text
MARKER = 5  # half of a point's
GAP = 8  # between a point and its label
NEAR = 60  # pixels within which the same text is not written twice
LAST = 2  # rank of a label that may be missing

Box = tuple[float, float, float, float]  # left, top, right, bottom


def place_labels(
    places: Sequence[tuple[float, float]],
    texts: Sequence[str],
    ranks: Sequence[int],
    width: float,
) -> list[dict[str, Any]]:
    """Returns the text of each point, "" where it has no room, and where it stands.

    Args:
      places: of the points, as shares of the chart's width and of its height from above.
      texts: what to write beside them.
      ranks: those of the least are placed first, and those of LAST only close by and not twice.
      width: of the chart.

    Returns:
      {"label", "dx", "dy", "align"} a point, in pixels from it.
    """
    across, down = width - 2 * PADDING, HEIGHT - 2 * PADDING
    centers = [(PADDING + x * across, PADDING + y * down) for x, y in places]
    taken = [(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in centers]
    written: list[tuple[str, float, float]] = []
    labels = [{"label": "", "dx": 0, "dy": 0, "align": "center"} for _ in places]
    for i in sorted(range(len(places)), key=lambda i: (ranks[i], centers[i])):
        x, y = centers[i]
        again = any(t == texts[i] and math.dist((x, y), at) < NEAR for t, *at in written)
        if again and ranks[i] == LAST:
            continue
        others = taken[:i] + taken[i + 1 :]
        for dx, dy, align in _around(lines=1 if ranks[i] == LAST else 3):
            box = _box(x + dx, y + dy, len(texts[i]) * CHAR, align)
            if _is_inside(box, width) and not any(_overlap(box, other) for other in others):
                labels[i] = {"label": texts[i], "dx": dx, "dy": dy, "align": align}
                taken.append(box)
                written.append((texts[i], x, y))
                break
    return labels


def _around(lines: int) -> Iterator[tuple[int, int, str]]:
    """Yields shifts and alignments, the best first: close by, then so many lines away."""
    for away in range(1, lines + 1):
        up = round(GAP + (away - 0.5) * LINE)
        yield from ((0, -up, "center"), (0, up, "center"))
        yield from ((GAP, -up + LINE, "left"), (-GAP, -up + LINE, "right"))
        yield from ((GAP, up - LINE, "left"), (-GAP, up - LINE, "right"))


def _box(x: float, y: float, width: float, align: str) -> Box:
    left = {"left": x, "center": x - width / 2, "right": x - width}[align]
    return left, y - LINE / 2, left + width, y + LINE / 2


def _is_inside(box: Box, width: float) -> bool:
    return box[0] >= 0 and box[2] <= width and box[1] >= -LINE / 2 and box[3] <= HEIGHT


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
