"""Your own Linen model on your own NumPy arrays: distilled, quantized, both, and compared.

A config of the usual kind is made and run; what is more than these arguments wants a config file.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import config, data, deploy, experiment, lock, models, quantize
from kdq.arms import kl
from kdq.data.arrays import Split
from kdq.report import progress, write
from kdq.types import Variables


@lock.of_workdir
def compress(
    teacher: nn.Module,
    student: nn.Module | None = None,
    *,
    train: Split,
    validation: Split,
    test: Split,
    workdir: str | os.PathLike[str],
    teacher_variables: Variables | None = None,
    bits: str = "W4A8",
    epochs: float = 40.0,
    learning_rate: float = 5e-3,
    batch_size: int = 64,
    seeds: Sequence[int] = (0,),
    alpha: float = 0.9,
    temperature: float = 4.0,
) -> list[experiment.Record]:
    """Trains, distills and quantizes; prints the table of what each gave, on `test`.

    The arms: `teacher`; `student` (by labels) and `kd` (by the teacher); `ptq`, which is `kd`
    calibrated at `bits`; `qad`, trained on from `kd` with the quantizers and the teacher for half
    the epochs. Without a student the teacher itself is calibrated, and taught by itself in float.
    `WORKDIR/ARM/SEED/model.safetensors` is the packed file of each.

    Args:
      teacher: logits [batch, classes] of `model.apply(variables, inputs, train=False)`.
      student: a smaller one, or None.
      train: (inputs [n, ...], labels [n]), see `kdq.data.save_arrays`. Models see floats as they
        are, and uint8 over 255. Inputs and labels are kept in WORKDIR/data.npz.
      validation: every choice is made on these.
      test: measured once, at the end.
      workdir: made if need be. A run that was killed goes on where it was.
      teacher_variables: of a teacher that is trained already; None trains it.
      bits: "W4A8", of weights and inputs of layers. Where a network has more than two layers, its
        first and its last have 8.
      epochs: passes over `train`, for every arm that is trained from fresh weights.
      learning_rate: peak, of Adam.
      batch_size: of training; at most the examples there are.
      seeds: the whole is repeated for each.
      alpha: weight of the teacher's outputs; the labels have the rest.
      temperature: at which these are compared.

    Returns:
      A record an arm and seed: "arm", "accuracy" (of the file, loaded back), "size_bytes", ....

    Raises:
      DataError: arrays that don't fit.
      ConfigError: a model that can't be named or does not fit the arrays, or a workdir that was
        made with other arguments, or that another program writes.
    """
    workdir = Path(workdir)
    data.save_arrays(workdir / "data.npz", train=train, validation=validation, test=test)
    inputs = np.asarray(train[0])
    described = {"teacher": models.describe(teacher)}
    if student is not None:
        described["student"] = models.describe(student)
    load = ""
    if teacher_variables is not None:
        load = str(workdir / "teacher.safetensors")
        deploy.save_packed(load, teacher_variables, {}, model=described["teacher"])
    trained = {"epochs": float(epochs), "learning_rate": learning_rate}
    made = {
        "seeds": tuple(seeds),
        "data": {
            "name": "data.npz",
            "data_dir": str(workdir),
            "batch_size": min(batch_size, len(inputs)),
            "std": 255.0 if inputs.dtype == np.uint8 else 1.0,
        },
        "models": described,
        "quantize": _quantize(student or teacher, inputs),
        "distill": {"kd": kl(alpha, temperature)},
        "arms": {
            "teacher": {"model": "teacher", **({"load": load} if load else trained)},
            **_arms(bits, trained, student is not None),
        },
    }
    checked = config.freeze(made)
    with progress.reporter() as reporter:
        records = experiment.run(checked, workdir, progress=reporter)
    write.write_report(records, workdir)
    return records


def _arms(bits: str, trained: Mapping[str, Any], smaller: bool) -> dict[str, Mapping[str, Any]]:
    """Those after the teacher."""
    taught = {"teacher": "teacher", "distill": "kd"}
    model, start = ("student", "kd") if smaller else ("teacher", "teacher")
    quantized = {"model": model, "init": start, "bits": bits}
    further = {**trained, "epochs": trained["epochs"] / 2}
    floats = {
        "student": {"model": model, **trained},
        "kd": {"model": model, "reference": "student", **trained, **taught},
    }
    return {
        **(floats if smaller else {}),
        "ptq": {**quantized, "reference": start},
        "qad": {**quantized, "reference": "ptq", **further, **taught},
    }


def _quantize(model: nn.Module, inputs: np.ndarray) -> dict[str, Any]:
    """The first and the last layer keep 8 bits where there are others, the inputs their scale."""
    one = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), np.float32)
    try:
        shapes = jax.eval_shape(
            lambda key, x: model.init(key, x, train=False), jax.random.key(0), one
        )
    except Exception as error:  # whatever a module of anybody's raises
        raise config.ConfigError(
            f"{type(model).__name__} can't take inputs {one.shape}: {type(error).__name__}: {error}"
        ) from error
    layers = [re.escape(path) for path in quantize.list_layers(model, shapes, one, train=False)]
    if not layers:
        raise config.ConfigError(f"{type(model).__name__} has no layer that can be quantized")
    return {
        "keep": (layers[0], layers[-1]) if len(layers) > 2 else (),
        "fixed_scales": (f"{layers[0]}/activations",),
    }
