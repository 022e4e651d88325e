"""Two intervals of a difference: over seeds, and over seeds and test examples where scores are."""

import json
import math

import numpy as np
import pytest
import workdirs
from scipy import stats

from kdq.evaluate.run import Scores
from kdq.evaluate.statistics import BOTH, EXAMPLES, SEEDS
from kdq.report import table
from kdq.report import workdirs as reader
from kdq.report.advise import advise
from kdq.report.advisor.constraints import Constraints
from kdq.report.page import publish
from kdq.report.page.combine import combine

EXAMPLES_OF_TEST = 150
SKILL = {"teacher": 0.97, "student": 0.84, "kd": 0.92, "ptq_w8a8": 0.83, "qat_w4a4": 0.80}


def right_or_wrong(seeds):
    """Returns {(arm, seed): [examples] of 0 and 1}; hard examples are hard for every arm."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(-0.3, 0.15, EXAMPLES_OF_TEST)
    return {
        (arm, seed): (rng.uniform(size=EXAMPLES_OF_TEST) < SKILL.get(arm, 0.9) + hard) * 1.0
        for arm in workdirs.ARMS
        for seed in seeds
    }


def write(folder, seeds=(0, 1, 2, 3), kept=None):
    """A workdir whose accuracies are those of its scores; `kept` are the arms that have a file."""
    correct = right_or_wrong(seeds)
    made = workdirs.records(seeds)
    for record in made:
        accuracy = float(correct[record["arm"], record["seed"]].mean())
        record |= {"accuracy": accuracy, "validation_accuracy": accuracy}
    workdirs.write(folder, made, with_details=False)
    for (arm, seed), values in correct.items():
        if kept is None or arm in kept:
            save(folder / arm / str(seed) / "scores.npz", values)
    return correct


def save(path, values, examples=None):
    arrays = {"correct": values.astype(np.float32), "nll": np.zeros(len(values), np.float32)}
    examples = np.arange(len(values)) if examples is None else examples
    Scores(arrays=arrays, examples=examples).save(path)


def rows_of(folder):
    (experiment,) = combine(reader.read_workdirs([str(folder)]))
    return {row.arm: row for row in experiment.rows}, experiment


def by_hand(differences):
    """Returns the two intervals of points [seeds, examples], from textbook formulas."""
    d = 100 * differences
    seeds, examples = d.shape
    over_seeds = stats.ttest_1samp(d.mean(1), 0.0)
    narrow = over_seeds.confidence_interval(0.95)
    grand = d.mean()
    ms_seed = examples * d.mean(1).var(ddof=1)
    ms_example = seeds * d.mean(0).var(ddof=1)
    rest = d - d.mean(1, keepdims=True) - d.mean(0, keepdims=True) + grand
    freedom = (seeds - 1, examples - 1, (seeds - 1) * (examples - 1))
    ms_rest = (rest**2).sum() / freedom[2]
    variance = ms_seed + max(ms_example - ms_rest, 0.0)
    squares = (ms_seed, ms_example, ms_rest)
    satterthwaite = variance**2 / sum(m**2 / f for m, f in zip(squares, freedom, strict=True))
    error = math.sqrt(variance / d.size)
    half = stats.t.ppf(0.975, satterthwaite) * error
    half = max(half, (narrow.high - narrow.low) / 2)
    p = max(2 * stats.t.sf(abs(grand) / error, satterthwaite), over_seeds.pvalue)
    return (narrow.low, narrow.high), (grand - half, grand + half), p


def test_a_table_has_both_intervals_and_holms_correction_as_by_hand(tmp_path):
    correct = write(tmp_path / "run")
    rows, experiment = rows_of(tmp_path / "run")
    p_values = {}
    for arm, row in rows.items():
        if not row.reference:
            continue
        stacked = [correct[arm, s] - correct[row.reference, s] for s in range(4)]
        over_seeds, both, p_values[arm] = by_hand(np.stack(stacked))
        ends = row.difference_over_seeds
        assert (ends.low, ends.high) == pytest.approx(over_seeds, abs=1e-6)
        assert (row.difference.low, row.difference.high) == pytest.approx(both, abs=1e-6)
        assert row.difference.p_value == pytest.approx(p_values[arm], rel=1e-6)
        assert (row.difference.over, row.difference_over_seeds.over) == (BOTH, SEEDS)
        assert row.difference.low <= ends.low + 1e-6 <= ends.high <= row.difference.high + 1e-6
    assert len(p_values) == 4
    largest = 0.0  # Holm: the smallest p-value counts m times, the next m - 1 times, ...
    for rank, (arm, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (4 - rank) * p))
        assert rows[arm].p_holm == pytest.approx(largest, rel=1e-6)
    assert math.isnan(rows["teacher"].p_holm)
    text = table.markdown(list(rows.values()), experiment.records)
    assert "| Δ [95%] | Δ against | Over seeds alone | p, Holm |" in text
    assert "over seeds and test examples, all of which might have been others" in text
    assert "does not cover" not in text
    d, s = rows["kd"].difference, rows["kd"].difference_over_seeds
    star = lambda interval: r"\*" if interval.low > 0 else ""
    cell = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]{star(d)}"
    assert f"| {cell} | student | [{s.low:+.2f}, {s.high:+.2f}]{star(s)} | " in text


def test_the_star_goes_by_the_wider_interval(tmp_path):
    """Seeds agree on +1.33 points, which two of 150 test examples make: no evidence of a lead."""
    made = workdirs.records((0, 1, 2), {name: workdirs.ARMS[name] for name in ("student", "kd")})
    student = np.arange(150) >= 15
    kd = np.arange(150) >= 13
    for record in made:
        record["accuracy"] = float((kd if record["arm"] == "kd" else student).mean())
    folder = workdirs.write(tmp_path / "run", made, with_details=False)
    alone, _ = rows_of(folder)
    assert alone["kd"].difference.excludes_zero
    for record in made:
        values = kd if record["arm"] == "kd" else student
        save(folder / record["arm"] / str(record["seed"]) / "scores.npz", values)
    rows, _ = rows_of(folder)
    assert rows["kd"].difference_over_seeds.excludes_zero
    assert not rows["kd"].difference.excludes_zero


def test_an_arm_without_scores_has_the_interval_over_seeds_and_the_note_names_it(tmp_path):
    write(tmp_path / "run", kept=[arm for arm in workdirs.ARMS if arm != "qad_w4a4"])
    rows, experiment = rows_of(tmp_path / "run")
    assert rows["qad_w4a4"].difference.over == SEEDS
    assert rows["qat_w4a4"].difference.over == BOTH
    text = table.markdown(list(rows.values()), experiment.records)
    assert "Of qad_w4a4, the 95% Student-t interval of the mean difference over seeds" in text
    assert "no scores of single test examples" in text
    write(tmp_path / "old", kept=[])
    rows, experiment = rows_of(tmp_path / "old")
    text = table.markdown(list(rows.values()), experiment.records)
    assert {row.difference.over for row in rows.values() if row.difference} == {SEEDS}
    assert "Over seeds alone" not in text
    assert "Student-t interval of the mean difference over seeds" in text
    assert "it does not cover that the test examples might have been others" in text


def test_scores_that_cannot_be_used_are_left_out_and_named(tmp_path):
    correct = write(tmp_path / "run")
    files = {seed: tmp_path / "run" / "kd" / str(seed) / "scores.npz" for seed in range(4)}
    files[0].write_bytes(files[0].read_bytes()[:-20])
    save(files[1], 1 - correct["kd", 1])  # of another run
    Scores(arrays={"nll": np.zeros(3, np.float32)}, examples=np.arange(3)).save(files[2])
    rows, experiment = rows_of(tmp_path / "run")
    assert rows["kd"].difference.over == SEEDS
    assert rows["ptq_w8a8"].difference.over == BOTH
    reasons = [why for why in experiment.problems if "scores.npz" in why]
    assert len(reasons) == 3
    assert "can't be read as scores" in reasons[0]
    assert "its record" in reasons[1]
    assert "has no 'correct' for accuracy" in reasons[2]
    evidence = reader.read_evidence([str(tmp_path / "run")], [])
    text = advise(evidence, Constraints()).markdown()
    assert "so that intervals of these arms are over seeds alone" in text
    assert str(files[0]) in text


def test_scores_of_other_examples_are_not_compared(tmp_path):
    correct = write(tmp_path / "run")
    for seed in range(4):
        path = tmp_path / "run" / "kd" / str(seed) / "scores.npz"
        save(path, correct["kd", seed], np.arange(EXAMPLES_OF_TEST) + 1)
    rows, _ = rows_of(tmp_path / "run")
    assert rows["kd"].difference.over == SEEDS


def test_one_seed_has_the_interval_of_its_test_examples_and_says_so(tmp_path):
    correct = write(tmp_path / "run", seeds=(0,))
    rows, experiment = rows_of(tmp_path / "run")
    difference = rows["kd"].difference
    assert difference.over == EXAMPLES
    points = 100 * (correct["kd", 0] - correct["student", 0])
    expected = stats.ttest_1samp(points, 0.0).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx(tuple(expected), abs=1e-6)
    text = table.markdown(list(rows.values()), experiment.records)
    assert "One seed of each arm: no spread is known, and intervals are over test examples" in text
    advice = advise([experiment], Constraints()).markdown()
    assert "Seen, but in too few seeds for a claim" in advice  # no star of one seed is a claim


def test_the_advisor_and_the_page_go_by_the_wider_interval(tmp_path):
    write(tmp_path / "run")
    rows, experiment = rows_of(tmp_path / "run")
    d = rows["kd"].difference
    text = advise([experiment], Constraints()).markdown()
    assert f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}], kd against student" in text
    assert "95% intervals over seeds and test examples that stand each alone" in text
    page = publish.write(reader.read_workdirs([str(tmp_path / "run")]), tmp_path / "out")
    page = page.read_text()
    assert "over seeds and test examples, all of which might have been others" in page
    assert "p, Holm" in page
    head, *lines = (tmp_path / "out" / "table.csv").read_text().splitlines()
    places = {name: place for place, name in enumerate(head.split(","))}
    line = next(line.split(",") for line in lines if ",kd," in line)
    assert float(line[places["difference_low"]]) == pytest.approx(d.low)
    assert float(line[places["p_value_holm"]]) == pytest.approx(rows["kd"].p_holm)
    assert line[places["difference_over"]] == BOTH
    assert "over seeds and test examples" in (tmp_path / "out" / "table.tex").read_text()


def test_lists_of_records_have_no_scores(tmp_path):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(workdirs.records()))
    assert "95% intervals over seeds that stand" in (
        advise(reader.read_evidence([], [str(path)]), Constraints()).markdown()
    )
    rows = table.rows(workdirs.records())
    assert table.markdown_by_width(rows) == ""
    assert all(row.difference is row.difference_over_seeds for row in rows)
