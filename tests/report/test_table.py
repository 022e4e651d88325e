"""Rows by hand, and what Markdown and the terminal make of them."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from kdq.record import ArmRecord
from kdq.report.aggregate import difference
from kdq.report.cells import standard_output
from kdq.report.page import tables
from kdq.report.page.combine import Experiment
from kdq.report.table import markdown, print_table, rows
from kdq.report.workdirs import Run


def record(arm, seed, accuracy, **fields):
    """A finished run; accuracy in percent, because the expected numbers are."""
    return {
        "arm": arm,
        "seed": seed,
        "status": "ok",
        "kind": "QAT",
        "bits": "W4A4",
        "params": 4000,
        "accuracy": accuracy / 100,
        "accuracy_last": (accuracy - 1) / 100,
        "size_bytes": 2000,
        "selected_on": "validation accuracy",
        "reference": None,
        "config_digest": "d1",
        "commit": "c0ffee",
        "versions": {"jax": "0.10.2"},
        "device": "cpu",
    } | fields


def failed(arm, seed, error, **fields):
    return {"arm": arm, "seed": seed, "status": "failed", "error": error, "kind": "QAT"} | fields


def lines_of(table, records):
    return markdown(table, records).splitlines()


STUDENT = [record("student", s, a, kind="student") for s, a in enumerate([90.0, 92.0, 94.0])]


def test_difference_is_paired_by_seed_whatever_the_order():
    arm = [record("qat", s, a, reference="student") for s, a in [(2, 97.0), (0, 91.0), (1, 94.0)]]
    row = rows(STUDENT + arm)[1]
    # Differences 1, 2, 3: mean 2, std 1, t(0.975; 2) = 4.302653, so 2 ± 2.484138.
    assert row.difference.mean == pytest.approx(2)
    assert row.difference.low == pytest.approx(-0.484138, abs=1e-6)
    assert row.difference.high == pytest.approx(4.484138, abs=1e-6)
    assert (row.score.mean, row.score.std) == pytest.approx((94, 3))
    assert row.mean_of(row.metric, "test_last").mean == pytest.approx(93)
    assert row.seeds == (0, 1, 2)
    line = lines_of(rows(STUDENT + arm), STUDENT + arm)[3]
    assert "| 94.00 ± 3.00 | +2.00 [-0.48, +4.48] | student |" in line


def test_an_interval_without_zero_is_marked():
    arm = [record("qat", s, a, reference="student") for s, a in enumerate([91.0, 93.1, 94.9])]
    text = markdown(rows(STUDENT + arm), STUDENT + arm)
    assert r"+1.00 [+0.75, +1.25]\* |" in text


def test_difference_is_over_the_seeds_that_both_arms_finished():
    arm = [
        failed("qat", 0, "loss is nan", reference="student"),
        record("qat", 1, 93.0, reference="student"),
        record("qat", 2, 96.0, reference="student"),
        record("qat", 3, 50.0, reference="student"),
    ]
    row = rows(STUDENT + arm)[1]
    assert row.difference.n == 2
    assert row.difference.mean == pytest.approx(1.5)
    assert row.failures == [(0, "loss is nan")]
    line = lines_of(rows(STUDENT + arm), STUDENT + arm)[3]
    assert "failed (1 of 4 seeds): loss is nan" in line
    assert "(n=2)" in line


def test_an_arm_that_never_finished_says_why_and_gives_no_number():
    arm = [
        failed("qat", 0, "loss is nan\n  at step 3", reference="student"),
        failed("qat", 1, "loss is nan\n  at step 9", reference="student"),
        failed("qat", 2, "x" * 200, reference="student"),
    ]
    table = rows(STUDENT + arm)
    assert math.isnan(table[1].score.mean)
    text = markdown(table, STUDENT + arm)
    assert f"failed (3 of 3 seeds): loss is nan; {'x' * 79}… |" in text
    assert "nan" not in text.replace("loss is nan", "")
    assert "No difference for: qat (against student: failed)." in text


def test_one_seed_has_no_spread_and_no_interval():
    records = [STUDENT[0], record("qat", 0, 91.0, reference="student")]
    text = markdown(rows(records), records)
    assert "| 91.00 | +1.00 | student |" in text
    said = "One seed of each arm: no spread or interval is known, and small differences are chance."
    assert text.count(said) == 1
    console = Console(width=80, file=io.StringIO())
    print_table(rows(records), console)
    assert " ".join(console.file.getvalue().split()).count(said) == 1
    # Beside an arm of several seeds it is said of each number.
    text = markdown(rows([*records, *STUDENT[1:]]), [*records, *STUDENT[1:]])
    assert "| 91.00 (n=1) | +1.00 (n=1) | student |" in text
    assert said not in text


@pytest.mark.parametrize(
    ("others", "qat", "why"),
    [
        ([], None, "reference not run"),
        ([failed("student", 0, "loss is nan")], None, "reference failed"),
        ([record("student", 1, 90.0)], None, "no seed in common"),
        ([record("student", 0, 90.0)], failed("qat", 0, "nan", reference="student"), "failed"),
    ],
)
def test_a_difference_that_there_is_not_says_why_in_every_table(others, qat, why):
    records = [qat or record("qat", 0, 91.0, reference="student"), *others]
    table = rows(records)
    assert table[0].difference is None
    text = markdown(table, records)
    assert f"| {why} | student |" in lines_of(table, records)[2]
    assert f"No difference for: qat (against student: {why})." in text
    out = io.StringIO()
    print_table(table, Console(file=out, width=240))
    assert why in next(line for line in out.getvalue().splitlines() if "qat" in line)
    runs = tuple(Run(record=ArmRecord.from_json(one), folder=Path("unused")) for one in records)
    page = Experiment(name="page", path="", config=None, data={}, folders=(), runs=runs)
    grid = tables.results_grid(page)
    cell = grid.rows[0][grid.head.index("Δ [95%]")]
    assert (cell.text, cell.sort) == (why, None)


def test_a_difference_of_nothing_has_one_sign():
    records = [record("kd", seed, 90.0 + seed / 10, reference="student") for seed in (0, 1, 2)]
    others = [record("student", seed, 90.0 + seed / 10 + 1e-9) for seed in (0, 1, 2)]
    assert "| +0.00 [+0.00, +0.00]" in lines_of(rows([*records, *others]), [*records, *others])[2]


def test_an_arm_that_is_compared_with_no_other_has_a_dash():
    line = lines_of(rows(STUDENT), STUDENT)[2]
    assert "| — | — |" in line


def test_what_was_transferred_is_a_table_of_its_own_where_it_was_measured():
    plain = [record("kd", 0, 91.0, ece=0.02)]
    assert "What was transferred" not in markdown(rows(plain), plain)
    records = [
        record("kd", 0, 91.0, ece=0.02, attribution_cosine=0.5, path_agreement=None),
        record("kd", 1, 92.0, ece=0.04, attribution_cosine=0.7, path_agreement=None),
        record("labels", 0, 90.0, ece=0.05),
    ]
    text = markdown(rows(records), records).split("What was transferred:")[1]
    assert "| Arm | ECE % | Attribution cosine |" in text
    assert "| kd | 3.00 ± 1.41 | 0.600 ± 0.141 |" in text
    assert "| labels | 5.00 (n=1) | — |" in text


def test_names_cannot_break_the_table():
    records = [
        record("a|b <script>&_x_ *y* `z` [l](u)", 0, 91.0, kind="k\nk"),
        failed("broken", 0, "shape (1|2)\ntraceback"),
    ]
    lines = lines_of(rows(records), records)
    assert len(lines[2].replace(r"\|", "").split("|")) == len(lines[0].split("|"))
    assert r"| a\|b &lt;script&gt;&amp;\_x\_ \*y\* \`z\` [l\](u) | k k |" in lines[2]
    assert r"shape (1\|2) |" in lines[3]


def test_size_ratio_is_of_the_teacher_or_of_the_arm_named():
    teacher = record("big", 0, 99.0, kind="teacher", size_bytes=64_000)
    small = record("qat", 0, 95.0)
    other = record("student", 0, 96.0, size_bytes=16_000)
    assert [r.size_ratio for r in rows([teacher, small, other])] == [1, 32, 4]
    assert [r.size_ratio for r in rows([teacher, small, other], "student")] == [0.25, 8, 1]
    assert all(math.isnan(r.size_ratio) for r in rows([small, other]))
    two = record("bigger", 0, 99.0, kind="teacher", size_bytes=128_000)
    assert all(math.isnan(r.size_ratio) for r in rows([teacher, two, small]))
    with pytest.raises(ValueError, match="baseline 'x' is no arm; valid: big, qat"):
        rows([teacher, small], "x")


def test_a_number_that_was_not_measured_is_not_averaged_as_zero():
    records = [
        record("qat", 0, 90.0, kl_to_teacher=0.5, agreement=None, size_bytes=None),
        record("qat", 1, 92.0, kl_to_teacher=math.nan, agreement=None, size_bytes=None),
    ]
    row = rows(records)[0]
    assert (row.values("kl_to_teacher"), row.values("agreement")) == ({0: 0.5}, {})
    line = lines_of(rows(records), records)[2]
    assert "| W4A4 | 4,000 | — | — | 91.00 ± 1.41 |" in line


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no records"),
        ([STUDENT[0], STUDENT[0]], "two records of arm 'student' seed 0"),
        (
            [record("a", 0, 1, reference="b"), record("a", 1, 1, reference="c")],
            r"arm 'a' disagree about 'reference': \['b', 'c'\]",
        ),
    ],
)
def test_records_that_contradict_each_other_are_refused(records, message):
    with pytest.raises(ValueError, match=message):
        rows(records)


def test_seeds_of_a_search_may_choose_different_bits():
    records = [record("search", 0, 90.0, bits="W3.1A8"), record("search", 1, 90.0, bits="W3.4A8")]
    assert rows(records)[0].bits == "W3.1A8, W3.4A8"


def test_notes_say_where_the_numbers_come_from():
    records = [
        *STUDENT,
        record("ptq", 5, 80.0, selected_on="nothing to select", versions={"jax": "0.11.0"}),
        record("odd", 5, 80.0, config_digest="d2"),
    ]
    text = markdown(rows(records), records)
    assert "| validation accuracy |" in text
    assert "| nothing to select |" in text
    record_line = text.splitlines()[-1]
    assert record_line == (
        "- Record: config digest d1, but d2 for odd; commit c0ffee; versions jax 0.10.2 and 0.11.0"
        "; device cpu; seeds 0, 1, 2, 5."
    )


def note_of_times(records):
    notes = markdown(rows(records), records).splitlines()
    return next(note for note in notes if note.startswith("- Train s"))


def test_compiling_stands_apart_and_old_records_are_said_to_contain_it():
    new = [record("new", s, 90, train_seconds=0.5, compile_seconds=3.0 + s) for s in (0, 1)]
    old = [record("old", s, 90, train_seconds=3.9) for s in (0, 1)]
    calibrated = [record("calibrated", 0, 90, train_seconds=0.0)]
    head, _, *body = (line.split("|") for line in lines_of(rows(new + old), new + old)[:4])
    by_head = lambda line: {k.strip(): v.strip() for k, v in zip(head, line, strict=True)}
    cells = {line[1].strip(): by_head(line) for line in body}
    assert (cells["new"]["Train s"], cells["new"]["Compile s"]) == ("0.5", "3.5")
    assert (cells["old"]["Train s"], cells["old"]["Compile s"]) == ("3.9", "—")
    assert "contains" not in note_of_times(new + calibrated)
    assert "not in Train s" in note_of_times(new + calibrated)
    assert "The Train s of old contains it" in note_of_times(new + old + calibrated)
    assert "not in Train s" not in note_of_times(old + calibrated)
    within = "Train s contains compiling, which old records do not tell apart."
    assert within in note_of_times(old + calibrated)
    half = [old[0], {**old[1], "compile_seconds": 1.0}]  # a mean of both would be of neither
    assert "The Train s of old contains it" in note_of_times(new + half)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_terminal_table_fits_and_keeps_what_matters(width):
    arm = [record("[red]qat", s, a, reference="student") for s, a in enumerate([91, 93, 95.5])]
    arm.append(failed("[red]qat", 3, "loss is nan"))
    console = Console(width=width, file=io.StringIO())
    print_table(rows(STUDENT + arm), console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "[red]qat" in words
    assert "+1.17 [+0.45, +1.88]*" in words
    assert ("Not shown at this width" in words) == (width < 130)


RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(
    ("width", "shown", "left_out"),
    [
        (80, {"Bits", "Δ [95%]"}, {"Size", "KL", "Selected on", "BOPs"}),
        (120, {"Bits", "Δ [95%]", "Size", "Smaller", "Δ against"}, {"KL", "Selected on", "BOPs"}),
        (240, {"Size", "KL", "Selected on", "BOPs", "Train s"}, set()),
    ],
)
def test_a_real_table_fits_with_its_names_whole_and_the_important_columns(width, shown, left_out):
    records = json.loads((RESULTS / "digits.json").read_text())
    console = Console(width=width, file=io.StringIO())
    print_table(rows(records), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    first = [line.split()[0] for line in lines[3:] if line.strip()]
    arms = list(dict.fromkeys(r["arm"] for r in records))
    assert first[: len(arms)] == arms
    assert all(name in lines[1] for name in (*shown, "Arm", "Accuracy %"))
    said = console.file.getvalue().partition("Not shown at this width:")[2]
    assert all(name in " ".join(said.split()) and name not in lines[1] for name in left_out)
    # Nobody measured these: they are neither shown nor missed.
    assert "Energy" not in console.file.getvalue()


@pytest.mark.parametrize(("columns", "width"), [(None, 120), ("77", 77)])
def test_without_a_terminal_tables_are_as_wide_as_columns_says(monkeypatch, capsys, columns, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert standard_output().width == width


def test_a_quick_run_says_that_its_numbers_mean_nothing():
    quick = [record("a", 0, 90.0, quick=True), record("b", 0, 91.0, quick=True)]
    said = "A quick run: these numbers mean nothing."
    assert markdown(rows(quick), quick).startswith(f"**{said}**\n\n| Arm |")
    console = Console(width=80, file=io.StringIO())
    print_table(rows(quick), console)
    assert console.file.getvalue().endswith(f"{said}\n")
    mixed = [quick[0], record("c", 0, 95.0)]
    said = "Of a quick run, so that their numbers mean nothing: a."
    assert markdown(rows(mixed), mixed).startswith(f"**{said}**")
    assert markdown(rows(mixed[1:]), mixed[1:]).startswith("| Arm |")


def test_any_two_arms_can_be_compared_by_any_number():
    records = [
        record("a", 0, 90.0, nll=0.5),
        record("a", 1, 92.0, nll=0.3),
        record("a", 2, 99.0),
        record("b", 1, 90.0, nll=0.2),
        record("b", 0, 80.0, nll=0.1),
        failed("b", 2, "NaN"),
    ]
    found = difference(records, "a", "b")
    assert found.mean == pytest.approx(6)
    assert found.n == 2
    assert difference(records, "a", "b", "nll").mean == pytest.approx(0.25)
    with pytest.raises(ValueError, match="of both 'a' and 'c'; the arms are a, b"):
        difference(records, "a", "c")
