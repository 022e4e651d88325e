"""Studies of searches, by hand."""

import io

import pytest
from rich.console import Console

from kdq.report import searches, table
from kdq.search.cost import CostTable, Metric


def told(name, **fields):
    return {
        "name": name,
        "method": "random",
        "chosen": {"student": "kd", "conv_0": "W2A8", "head": ""},
        "objective": "kl",
        "scores": {"kl": 0.5, "error": 0.25},
        "costs": {"average_bits": 2.75, "size": 900.0, "activation_memory": 64.0},
        "measured": {},
        "limits": {"average_bits": 3.0},
        "sensitivity_evaluations": 0,
        "evaluations": 40,
        "prepare_seconds": 2.0,
        "seconds": 3.0,
        **fields,
    }


def record(arm, seed, accuracy, search=None, **fields):
    return {
        "arm": arm,
        "seed": seed,
        "status": "ok",
        "kind": "PTQ",
        "bits": arm,
        "accuracy": accuracy / 100,
        "size_bytes": 2048,
        "reference": None,
        **({"search": search} if search else {}),
        **fields,
    }


def arms(name, accuracies, reference="", **fields):
    """Both arms of a search, a seed each of `(calibrated, trained)`."""
    found = []
    for stage, column in (("ptq", 0), ("qad", 1)):
        other = {"reference": f"{reference}_{stage}"} if reference else {}
        for seed, pair in enumerate(accuracies):
            search = told(name, **{k: v[seed] for k, v in fields.items()})
            found.append(record(f"{name}_{stage}", seed, pair[column], search, **other))
    return found


BASE = arms("uniform", [(50.0, 80.0), (52.0, 82.0), (54.0, 84.0)], evaluations=[2, 2, 2])


def study(records):
    return searches.markdown(records, table.rows(records)).splitlines()


def test_a_study_by_hand():
    found = arms(
        "learned",
        [(51.0, 83.0), (54.0, 84.0), (57.0, 85.0)],
        reference="uniform",
        evaluations=[40, 40, 40],
        sensitivity_evaluations=[10, 10, 10],
        scores=[{"kl": 0.1}, {"kl": 0.2}, {"kl": 0.3}],
        seconds=[1.0, 2.0, 6.0],
    )
    lines = study(BASE + found)
    assert "(uniform_ptq, ...)" in lines[0]
    assert lines[2] == "**average_bits ≤ 3**"
    assert lines[4].startswith(
        "| Search | Evaluations | Seconds | Objective | Size | PTQ | Δ PTQ |"
    )
    assert lines[6] == (
        "| uniform | 2 | 5.0 | 0.5000 ± 0.0000 | 2.0 KiB | 52.00 ± 2.00 | — | 82.00 ± 2.00 | — |"
    )
    # Differences 1, 2, 3 and 3, 2, 1: mean 2, and t(0.975; 2) / √3 = 2.484 about it.
    assert lines[7] == (
        "| learned | 50 | 5.0 | 0.2000 ± 0.1000 | 2.0 KiB | 54.00 ± 3.00 | +2.00 [-0.48, +4.48] | "
        "84.00 ± 1.00 | +2.00 [-0.48, +4.48] |"
    )


def test_budgets_are_apart_and_one_search_alone_is_no_study():
    limits = [{"average_bits": 2.5, "size": 12345.0}] * 3
    tight = arms("tight", [(1.0, 2.0)] * 3, limits=limits)
    tighter = arms("tighter", [(1.0, 2.0)] * 3, limits=limits)
    lone = arms("lone", [(1.0, 2.0)] * 3, limits=[{"average_bits": 2.0}] * 3)
    lines = study(BASE + arms("learned", [(50.0, 80.0)] * 3) + tight + lone + tighter)
    heads = [line for line in lines if line.startswith("**")]
    assert heads == ["**average_bits ≤ 3**",
                     "**average_bits ≤ 2.5, size ≤ 1.234e+04**"]  # fmt: skip
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert names == ["Search", "uniform", "learned", "Search", "tight", "tighter"]
    assert study(lone) == []


@pytest.mark.parametrize("missing", ["ptq", "qad"])
def test_a_search_without_both_arms_is_no_part_of_a_study(missing):
    other = [r for r in arms("other", [(1.0, 2.0)] * 3) if not r["arm"].endswith(missing)]
    lines = study(BASE + arms("learned", [(50.0, 80.0)] * 3) + other)
    assert not any("other" in line for line in lines)
    assert any(line.startswith("| learned") for line in lines)


def test_records_without_searches_are_no_study():
    assert study([record("a", 0, 50.0)]) == []


def test_names_are_literal_in_markdown():
    name = "a|b<img src=x>*c*`d`"
    lines = study(BASE + arms(name, [(50.0, 80.0)] * 3))
    (line,) = [line for line in lines if "img" in line]
    assert r"| a\|b&lt;img src=x&gt;\*c\*\`d\` |" in line
    assert "<img" not in "\n".join(lines)


def printed(monkeypatch, show):
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(searches, "standard_output", lambda: console)
    show()
    return [line.split("  ") for line in console.file.getvalue().splitlines() if line.strip()]


def cells(lines):
    return [[cell.strip() for cell in line if cell.strip()] for line in lines]


def test_policies_are_printed_a_column_a_seed(monkeypatch):
    limits = {"average_bits": 3.0, "activation_memory": 100.0, "size": 1000.0}
    found = [
        record("s_ptq", 1, 50.0, told("s", limits=limits, measured={"size": 950.0})),
        record("s_ptq", 0, 50.0, told("s", limits=limits, chosen={"student": "kd", "head": "W4"})),
    ]
    rows = cells(printed(monkeypatch, lambda: searches.print_policies(found)))
    assert rows[0] == ["s", "seed 0", "seed 1"]
    assert ["student", "kd", "kd"] in rows
    assert ["head", "W4", "float"] in rows
    assert ["conv_0", "—", "W2A8"] in rows
    assert ["average_bits", "2.75 of 3", "2.75 of 3"] in rows
    assert ["activation_memory", "64 of 100", "64 of 100"] in rows
    assert ["size", "900 of 1000", "950 of 1000"] in rows  # what was measured, if it was
    assert ["kl, held out", "0.5", "0.5"] in rows
    assert ["evaluations", "40", "40"] in rows
    assert ["seconds", "5.0", "5.0"] in rows


def uniform(same, **layers):
    return {
        "name": "uniform",
        "chosen": {"student": "kd", **layers, "distill/kl": "on"},
        "scores": {"kl": 0.75},
        "same": same,
    }


def test_what_was_found_stands_beside_uniform_bits(monkeypatch):
    same = uniform(True, conv_0="W2A8", conv_1="W2A8", head="")
    other = uniform(False, conv_0="W2A8", conv_1="W2A8", head="W2A8")
    found = [
        record("s_ptq", 0, 50.0, told("s", uniform=same)),
        record("s_ptq", 1, 50.0, told("s", uniform=other)),
        record("s_ptq", 2, 50.0, told("s")),  # no uniform policy keeps the budgets
        record("s_ptq", 3, 50.0, told("s", uniform=same)),
        *(record("uniform_ptq", seed, 50.0, told("uniform")) for seed in range(2)),
    ]
    rows = cells(printed(monkeypatch, lambda: searches.print_policies(found)))
    assert [row for row in rows if "seed 0" in row] == [["s", *(f"seed {i}" for i in range(4))]]
    assert ["kl, held out", "0.5", "0.5", "0.5", "0.5"] in rows
    assert ["kl, uniform bits", "0.75", "0.75", "—", "0.75"] in rows
    equal = "W2A8, but head float: the same policy"
    assert ["uniform bits", equal, "W2A8", "—", equal] in rows
    said = (
        "s found the same policy as uniform with seeds 0, 3; s found another policy than uniform "
        "with seed 1."
    )
    assert rows[-1] == [said]
    text = table.markdown(table.rows(found), found)
    assert f"- Against uniform bits: {said}" in text.splitlines()


def test_a_study_says_which_searches_found_uniform_bits():
    found = arms(
        "learned",
        [(50.0, 80.0), (52.0, 82.0), (54.0, 84.0)],
        reference="uniform",
        uniform=[uniform(True), uniform(True), uniform(True)],
    )
    lines = study(BASE + found)
    assert lines[-1] == "learned found the same policy as uniform with seeds 0, 1, 2."
    assert "+0.00 [+0.00, +0.00]" in lines[7]


def test_costs_are_printed_a_grid_a_metric(monkeypatch):
    costs = CostTable(
        model={},
        image_shape=(8, 8, 1),
        metrics={
            "size": Metric(layers={"a": {"W2": 1.5, "": 9.0}, "b": {"": 123456.0}}, constant=7.0)
        },
        conditions={"device": "here", "batch": 3},
    )
    rows = cells(printed(monkeypatch, lambda: searches.print_costs(costs)))
    assert rows[0] == ["size", "W2", "float"]
    assert ["a", "1.5", "9"] in rows
    assert ["b", "—", "1.2346e+05"] in rows
    assert ["beside layers", "7"] in rows
    assert "device here, batch 3" in " ".join(rows[-1])
