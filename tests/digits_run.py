"""A run of launch/compress.py as a process: configs/digits.py:quick, with fewer arms and MLPs."""

import os
import shutil
import subprocess
import sys

from programs import ROOT

ARMS = ("teacher", "student", "kd", "ptq_w4a4_student_mse", "qat_w4a4", "qad_w4a4_kd")

# A config file of a user's own, next to no other: it narrows the one that kdq ships.
NARROWED = f"""
import runpy

def get_config(arg=None):
    config = runpy.run_path({str(ROOT / "configs" / "digits.py")!r})["get_config"](arg)
    for name in list(config.arms):
        if name not in {ARMS!r}:
            del config.arms[name]
    config.arms.kd.epochs = 1.0
    for name, widths in (("teacher", (16, 16)), ("student", (8, 8))):
        config.models[name] = {{"name": "mlp", "num_classes": 10, "widths": widths}}
    config.quantize.update(keep=("dense_0", "head"), fixed_scales=("dense_0/activations",))
    return config
"""


CONFIG, WORKDIR = "narrowed.py", "new/run"


def flags(config, workdir):
    """Returns those of launch/compress.py."""
    overrides = "--config.checkpoint_seconds=0", "--config.evaluations=4"
    return f"--config={config}:quick", f"--workdir={workdir}", *overrides


def make(folder, data_dir):
    """Runs it in `folder`, and leaves the config, the workdir, a copy of it, stdout and stderr."""
    folder.mkdir()
    (folder / CONFIG).write_text(NARROWED)
    process = subprocess.run(
        [sys.executable, "launch/compress.py", *flags(folder / CONFIG, folder / WORKDIR)],
        cwd=ROOT,
        env=os.environ | {"TFDS_DATA_DIR": str(data_dir)},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert process.returncode == 0, process.stderr
    (folder / "stdout").write_text(process.stdout)
    (folder / "stderr").write_text(process.stderr)
    shutil.copytree(folder / WORKDIR, folder / "copy")  # programs go on in the other
