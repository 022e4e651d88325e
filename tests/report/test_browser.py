"""The page in a browser: what a reader does with it, and what names must not do to it."""

import json
import math
import re

import pytest
import workdirs

from kdq.report.page import publish
from kdq.report.workdirs import read_workdirs

EVIL = {
    "teacher": {"kind": "teacher"},
    "<img src=x onerror=alert(1)>": {"kind": "KD"},
    "</script><script>alert(2)</script>": {},
    "{{ 7 * 7 }} a.b[0]\\'\"": {"kind": "</style><b>", "bits": "W<2>"},
    "студент_ünï_日本": {"kind": "PTQ", "bits": "W4A4"},
}


def report(out, *folders):
    return publish.write(read_workdirs([str(folder) for folder in folders]), out)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    return report(folder / "out", workdirs.write(folder / "run", workdirs.records()))


def column(page, table, place):
    cells = page.locator(f"#{table} tbody tr:not([hidden]) > :nth-child({place})")
    return [text.strip() for text in cells.all_text_contents()]


def test_rows_are_sorted_by_what_they_mean(visit, page_file):
    page = visit(page_file)
    place = workdirs_column(page, "Size (smaller)")
    head = page.locator(f"#results-table-0 thead th:nth-child({place})")
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    # By bytes: as texts 390.6 KiB would come before 4.3 KiB.
    arms = ["qad_w4a4", "qat_w4a4", "ptq_w8a8", "student", "kd", "teacher"]
    assert column(page, "results-table-0", 1) == arms
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "results-table-0", 1)[0] == "teacher"


def workdirs_column(page, name):
    heads = page.locator("#results-table-0 thead th").all_text_contents()
    return 1 + [head.strip() for head in heads].index(name)


def test_a_filter_keeps_the_rows_with_every_word(visit, page_file):
    page = visit(page_file)
    page.get_by_label("Filter rows").first.fill("w4a4 QAD")
    assert column(page, "results-table-0", 1) == ["qad_w4a4"]
    assert page.locator("#results-table-0-count").text_content() == "1 of 6 rows"
    page.get_by_label("Filter rows").first.fill("")
    assert len(column(page, "results-table-0", 1)) == 6


def test_pointing_at_an_arm_shows_its_record(visit, page_file):
    page = visit(page_file)
    for arm in ("qad_w4a4", "qat_w4a4", "teacher"):
        point = page.locator(f"#chart-0-fronts-0-0 path[aria-label*='Arm: {arm};']")
        point.scroll_into_view_if_needed()
        box = point.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tip = page.locator("#vg-tooltip-element")
        tip.get_by_text(arm, exact=True).wait_for(state="visible")
        text = tip.text_content()
        assert "d" * 16 in text  # the config digest
        assert workdirs.DEVICE in text
        assert "0, 1, 2" in text  # seeds


def test_the_name_of_an_arm_opens_its_records_and_its_command(visit, page_file):
    page = visit(page_file)
    page.locator("#results-table-0 button.record", has_text="qad_w4a4").click()
    page.locator("dialog[open]").wait_for()
    text = page.locator("#record-text").text_content()
    assert text.count('"arm": "qad_w4a4"') == 3
    assert '"arm_digest": "digest of qad_w4a4"' in text
    command = page.locator("#record-command").text_content()
    assert command.startswith("python launch/train.py --config=configs/saved/workdir.py:")
    assert "--arm=qad_w4a4 --config.seeds=0,1,2" in command
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only_and_ink_differs_from_paper(visit, page_file, scheme):
    page = visit(page_file, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('.chart .role-axis-label text')).fill,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(float, re.findall(r"[\d.]+", color)[:3])) for color in (ink, paper)]
    assert (bright[0] > bright[1] + 380) == (scheme == "dark")
    assert (bright[1] > bright[0] + 380) == (scheme == "light")


def test_names_are_text_and_what_is_missing_is_said(visit, tmp_path):
    found = [workdirs.record(arm, **fields) for arm, fields in EVIL.items()]
    found += [workdirs.failed("broken", error="<b>bold</b> {{ 1 }}")]
    found += [workdirs.record("hollow", accuracy=math.nan, size_bytes=None, ece="much")]
    arms = {**EVIL, "broken": {}, "hollow": {}}
    folder = workdirs.write(tmp_path / "evil", found, arms=arms, with_details=False)
    cut = folder / "cut" / "0" / "result.json"
    cut.parent.mkdir(parents=True)
    cut.write_text('{"arm": "cut", ')
    page = visit(report(tmp_path / "out", folder))
    names = column(page, "results-table-0", 1)
    assert names == [*EVIL, "broken", "hollow"]
    assert page.locator("main b").count() == 0
    assert page.locator("script").count() == 4
    assert page.locator("main img").count() == 0  # no details: no maps
    text = page.locator("main").inner_text()
    assert "broken, seed 0: <b>bold</b> {{ 1 }}" in text
    assert "evil/cut/0/result.json can't be read as JSON" in text
    assert "left out ece='much': expected float" in text
    assert "No quantized arm has details by layer." in text
    assert "details.json is not there" in text
    assert page.locator(".chart svg.marks").count() > 0


@pytest.mark.slow
def test_two_hundred_arms_fit(visit, tmp_path):
    arms = {"teacher": {"kind": "teacher", "size_bytes": 400_000}}
    for i in range(200):
        kind = ("PTQ", "QAT", "QAD", "KD")[i % 4]
        fields = {"kind": kind, "bits": f"W{1 + i % 8}A8", "size_bytes": 1000 + 37 * i}
        arms[f"arm_{i:03d}"] = {**fields, "accuracy": 0.3 + 0.003 * i}
    found = workdirs.records((0,), arms)
    path = report(tmp_path / "out", workdirs.write(tmp_path / "many", found, arms=arms))
    assert path.stat().st_size < 3_000_000
    page = visit(path)
    assert len(column(page, "results-table-0", 1)) == 201


def test_what_can_not_be_compared_has_tables_of_its_own(visit, tmp_path):
    one = workdirs.write(tmp_path / "one", workdirs.records())
    other = [{**r, "data": {"test": "f" * 16}} for r in workdirs.records((0,))]
    page = visit(report(tmp_path / "out", one, workdirs.write(tmp_path / "other", other)))
    assert page.locator("section.experiment h2").all_text_contents() == ["one", "other"]
    assert "2 experiments are kept apart" in page.locator("header").inner_text()
    assert page.locator("table.grid[id^=results]").count() == 2


@pytest.fixture(scope="module")
def wide_file(tmp_path_factory):
    """Names, seeds and columns as shipped configs make them: as wide as it gets."""
    arms = {"teacher": workdirs.ARMS["teacher"], "student": {}, "kd": {"kind": "KD"}}
    for i, bits in enumerate(("W8A8", "W4A4", "W3A3", "W2A2")):
        for kind in ("PTQ", "QAT", "QAD"):
            for start in ("student_absmax", "kd"):
                accuracy = 0.95 - 0.02 * i + 0.01 * (kind == "QAD") + 0.004 * (start == "kd")
                arms[f"{kind.lower()}_{bits.lower()}_{start}"] = {
                    **{"kind": kind, "bits": bits, "reference": "student"},
                    **{"accuracy": accuracy, "size_bytes": 6000 - 900 * i + 9 * len(arms)},
                }
    found = workdirs.records((0, 1, 2), arms)
    for one in found:
        times = {b: {"milliseconds": ms, "ratio": 1.5} for b, ms in (("1", 0.123), ("64", 12.3))}
        conditions = {"device": workdirs.DEVICE}
        latency = {"conditions": conditions, **times}
        told = {"accuracy": 0.9, "argmax_agreement": 1.0, "size_bytes": 5000}
        one["exports"] = {"onnx": {**told, "latency": latency}}
    folder = tmp_path_factory.mktemp("wide")
    return report(folder / "out", workdirs.write(folder / "run", found, arms=arms))


def test_no_column_is_cut_off_at_a_laptop_s_width(visit, wide_file):
    page = visit(wide_file)
    page.evaluate("document.querySelectorAll('details').forEach(one => (one.open = true))")
    wide = page.locator(".scroll").evaluate_all(
        "all => all.filter(one => one.scrollWidth > one.clientWidth)"
        ".map(one => one.getAttribute('aria-label'))"
    )
    assert wide == []


LINES = """cell => {
  const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), letters = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode())
    for (let i = 0; i < node.data.length; i++) {
      const range = document.createRange();
      range.setStart(node, i); range.setEnd(node, i + 1);
      letters.push([node.data[i], range.getBoundingClientRect().top]);
    }
  const ends = [];
  for (let i = 1; i < letters.length; i++)
    if (letters[i][1] > letters[i - 1][1] + 4) ends.push(letters[i - 1][0]);
  return ends.join("");
}"""


def test_names_break_at_underscores(visit, wide_file):
    page = visit(wide_file, viewport={"width": 390, "height": 844})
    name = page.locator("#results-table-0 button.record", has_text="ptq_w8a8_student_absmax")
    ends = name.evaluate(LINES)
    assert ends  # it does not fit in a line
    assert set(ends) == {"_"}


@pytest.mark.parametrize("width", [1280, 390])
def test_labels_in_the_trade_off_do_not_cover_each_other(visit, wide_file, width):
    page = visit(wide_file, viewport={"width": width, "height": 844})
    said = set()
    for chart in page.locator("[id^=chart-0-fronts-0-]").all():
        boxes = chart.locator(".mark-text.role-mark text").evaluate_all(
            "all => all.map(one => [one.textContent, one.getBoundingClientRect()])"
            ".map(([text, box]) => [text, box.left, box.top, box.right, box.bottom])"
        )
        said |= {box[0] for box in boxes}
        for i, (text, *a) in enumerate(boxes):
            for other, *b in boxes[i + 1 :]:
                apart = a[2] <= b[0] + 2 or b[2] <= a[0] + 2 or a[3] <= b[1] + 3 or b[3] <= a[1] + 3
                assert apart, (text, other)
    # On a phone not in each of the two charts.
    assert {"frontier", "qad_w2a2_kd", "qad_w4a4_kd", "W2A2", "W4A4"} <= said


def test_confusions_share_one_scale_that_stands_once(visit, page_file):
    page = visit(page_file)
    charts = json.loads(page.locator("#charts").text_content())
    colors = [c["encoding"]["color"] for i, c in charts.items() if "confusions" in i]
    assert len(colors) > 1
    assert len({tuple(color["scale"]["domain"]) for color in colors}) == 1
    assert {color["legend"] for color in colors} == {None}
    assert page.locator(".scale").count() == 1


def test_one_seed_is_said_once_and_a_quick_run_says_so(visit, tmp_path):
    found = [{**r, "quick": True} for r in workdirs.records((0,))]
    page = visit(report(tmp_path / "out", workdirs.write(tmp_path / "run", found)))
    page.evaluate("document.querySelectorAll('details').forEach(one => (one.open = true))")
    text = page.locator("main").inner_text()
    assert text.count("One seed of each arm: no spread") == 1
    assert "(one seed)" not in text
    assert "(n=1)" not in text
    assert page.locator(".warning").first.inner_text() == "A quick run: these numbers mean nothing."
    assert workdirs_column(page, "Accuracy %")
    with pytest.raises(ValueError, match="Seeds"):
        workdirs_column(page, "Seeds")
    lines = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert all(line.split(",")[lines[0].split(",").index("quick")] == "yes" for line in lines[1:])
    assert (
        "A quick run: these numbers mean nothing." in (tmp_path / "out" / "table.tex").read_text()
    )
