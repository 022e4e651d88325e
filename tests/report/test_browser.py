"""The page in a browser: what a reader does with it, and what names must not do to it."""

import math
import re

import pytest
import workdirs

from kdq.report.page import read, write

EVIL = {
    "teacher": {"kind": "teacher"},
    "<img src=x onerror=alert(1)>": {"kind": "KD"},
    "</script><script>alert(2)</script>": {},
    "{{ 7 * 7 }} a.b[0]\\'\"": {"kind": "</style><b>", "bits": "W<2>"},
    "студент_ünï_日本": {"kind": "PTQ", "bits": "W4A4"},
}


def report(out, *folders):
    return write.write(read.folders([str(folder) for folder in folders]), out)


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
    assert "ece='much' is left out, as it is no number" in text
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
