"""Workdirs as runs leave them, made up: records, configs, curves and details."""

import json
from pathlib import Path

DATA = {"train": "a" * 16, "validation": "b" * 16, "test": "c" * 16}
DEVICE = "a machine, 2 cores"


def record(arm, seed=0, **fields):
    return {
        "arm": arm,
        "seed": seed,
        "kind": "labels",
        "bits": "fp32",
        "observer": None,
        "reference": None,
        "config_digest": "d" * 16,
        "arm_digest": f"digest of {arm}",
        "commit": "e" * 40,
        "versions": {"python": "3.11.7", "kdq": "0.1.0"},
        "device": DEVICE,
        "data": DATA,
        "status": "ok",
        "params": 1000,
        "accuracy": 0.9 + 0.01 * seed,
        "nll": 0.3,
        "accuracy_last": 0.9,
        "agreement": 0.95,
        "kl_to_teacher": 0.1,
        "ece": 0.05,
        "validation_accuracy": 0.91 + 0.01 * seed,
        "validation_nll": 0.2,
        "bops": 10_000_000,
        "energy_modelled_nj": 200.0,
        "size_bytes": 16_000,
        "train_seconds": 3.0,
        "compile_seconds": 2.0,
        "steps": 100,
        "selected_on": "validation",
    } | fields


def failed(arm, seed=0, error="NaN or infinity in the loss at step 3", **fields):
    whole = record(arm, seed, **fields)
    known = ("arm", "seed", "kind", "bits", "reference", "config_digest", "arm_digest", "data")
    return {key: whole[key] for key in known} | {"status": "failed", "error": error}


ARMS = {
    "teacher": {"kind": "teacher", "params": 9000, "accuracy": 0.95, "size_bytes": 400_000},
    "student": {},
    "kd": {"kind": "KD", "reference": "student", "accuracy": 0.93},
    "ptq_w8a8": {"kind": "PTQ", "bits": "W8A8", "reference": "student", "size_bytes": 6000},
    "qat_w4a4": {"kind": "QAT", "bits": "W4A4", "reference": "ptq_w8a8", "size_bytes": 4500},
    "qad_w4a4": {"kind": "QAD", "bits": "W4A4", "reference": "qat_w4a4", "size_bytes": 4400},
}


def records(seeds=(0, 1, 2), arms=ARMS):
    return [record(arm, seed, **fields) for arm, fields in arms.items() for seed in seeds]


def config(arms):
    """What a report reads of a config.json."""
    found = {}
    for arm, fields in arms.items():
        quantized = fields.get("bits", "fp32") != "fp32"
        taught = fields.get("kind") in ("KD", "QAD")
        found[arm] = {
            "model": "student",
            "init": "student" if quantized and "student" in arms else "",
            "bits": fields.get("bits", "") if quantized else "",
            "epochs": 0.0 if fields.get("kind") == "PTQ" else 1.0,
            "teacher": "teacher" if taught else "",
            "distill": "kd" if taught else "",
            "observer": "mse",
            "ptq": "",
            "qat": "",
        }
    kd = {"task": 0.1, "terms": {"kl": {"loss": "kl", "weight": 0.9, "temperature": 2.0}}}
    return {
        "teacher": "teacher",
        "arms": found,
        "distill": {"kd": kd},
        "teachers": {},
        "ptq": {},
        "qat": {},
        "data": {"data_dir": ""},
    }


def details(bits=32):
    layer = {"kind": "Dense", "weights": 64, "bytes": 2 * bits, "macs": 64, "bops": 64 * bits**2}
    layer |= {"weight_bits": bits, "input_bits": bits, "energy_modelled_nj": 0.5}
    quantized = {"sqnr_db": 21.5, "range": [-1.0, 2.0], "sensitivity": 0.003}
    nothing = dict.fromkeys(quantized)
    image = [[0.0, 1.0], [0.5, -1.0]]
    return {
        "confusion": [[5, 1], [2, 4]],
        "reliability": {
            "confidence": [0.6, None, 0.9],
            "accuracy": [0.5, None, 0.95],
            "count": [4, 0, 8],
        },
        "layers": [
            {**layer, "path": path, **(quantized if bits < 32 else nothing)}
            for path in ("dense_0", "head")
        ],
        "attributions": {
            "images": [image, image],
            "maps": [image, image],
            "label": [0, 1],
            "predicted": [0, 0],
            "probability": [0.75, 0.5],
        },
    }


def write(workdir, found, *, arms=ARMS, with_details=True):
    """A folder of these records; `arms` are in its config."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config(arms)))
    for one in found:
        folder = workdir / one["arm"].replace("/", "_") / str(one["seed"])
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(one))
        if one["status"] != "ok":
            continue
        if one.get("steps"):
            lines = [{"step": s, "loss": 2.0 / s, "accuracy": 0.5} for s in range(1, 101)]
            lines += [{"step": s, "validation_accuracy": s / 100} for s in (50, 100)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text + '{"step": 10')
        if with_details:
            bits = 32 if one["bits"] == "fp32" else 4
            (folder / "details.json").write_text(json.dumps(details(bits)))
    return workdir
