"""Your own Linen model on your own NumPy arrays: distilled, quantized, both, and compared.

A config of the usual kind is made and run; what is more than these arguments wants a config file.
"""

import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kdq import config, data, deploy, experiment, lock, models, quantize, tasks
from kdq.arms import recipe
from kdq.data.sources.arrays import Split
from kdq.distill.methods import list_methods
from kdq.experiment.store import read_config
from kdq.fields import expand_user
from kdq.quantize.network import Weights
from kdq.report import progress, write
from kdq.types import Variables


@lock.hold_workdir
def compress(
    teacher: nn.Module,
    student: nn.Module | None = None,
    *,
    train: Split,
    validation: Split,
    test: Split,
    workdir: str | os.PathLike[str],
    teacher_variables: Variables | None = None,
    bits: str | Sequence[str] = "W4A8",
    epochs: float = 40.0,
    learning_rate: float = 5e-3,
    batch_size: int = 64,
    seeds: Sequence[int] = (0,),
    alpha: float = 0.9,
    temperature: float = 4.0,
    task: str = "classification",
) -> list[experiment.ArmRecord]:
    """Trains, distills and quantizes; prints the table of what each gave, on `test`.

    The arms: `teacher`; `student` (by labels) and `kd` (by the teacher); `ptq`, which is `kd`
    calibrated at `bits`; `qad`, trained on from `kd` with the quantizers and the teacher for half
    the epochs. Of several bits these are `ptq_w8a8`, `qad_w8a8`, `ptq_w4a4`, .... Without a student
    the teacher itself is calibrated, and taught by itself in float.
    `WORKDIR/ARM/SEED/model.safetensors` is the packed file of each.

    Another call in the same workdir, with other bits or seeds, keeps what is done and adds to it;
    arms keep the names that they have there.

    Args:
      teacher: logits [batch, classes] of `model.apply(variables, inputs, train=False)`; of other
        tasks outputs [batch, outputs].
      student: a smaller one, or None.
      train: (inputs [n, ...], labels [n] or [n, outputs]), see `kdq.data.save_arrays`. Models see
        floats as they are, and uint8 over 255. Inputs and labels are kept in WORKDIR/data.npz.
      validation: every choice is made on these.
      test: measured once, at the end.
      workdir: made if need be. A run that was killed goes on where it was.
      teacher_variables: of a teacher that is trained already; None trains it.
      bits: "W4A8", of weights and inputs of layers, or several: ("W8A8", "W4A4"). Where a network
        has more than two layers, its first and its last have 8.
      epochs: passes over `train`, for every arm that is trained from fresh weights.
      learning_rate: peak, of Adam.
      batch_size: of training; at most the examples there are.
      seeds: the whole is repeated for each.
      alpha: weight of the teacher's outputs; the labels have the rest.
      temperature: at which these are compared; not used for real targets.
      task: "classification", "multilabel" (labels [n, labels] float, 0 or 1) or "regression" (real
        targets [n] or [n, targets]; outputs are of standardized targets).

    Returns:
      The record of each arm and seed that `workdir` has, of earlier calls too, with `arm`,
      `metrics["test"]` (of the file, loaded back), `size_bytes`, ....

    Raises:
      DataError: arrays that don't fit, or others than the workdir's.
      ConfigError: labels of another task, a model that can't be named or does not fit the arrays,
        or other arguments than what the workdir holds was made with; the message says which. Or
        another program writes in the workdir.
    """
    workdir = Path(expand_user(workdir, "workdir"))
    widths = (bits,) if isinstance(bits, str) else tuple(dict.fromkeys(bits))
    if not widths or not all(widths):
        raise config.ConfigError(f"bits={bits!r}: expected 'W4A8', or several such")
    data.save_arrays(workdir / "data.npz", train=train, validation=validation, test=test)
    inputs = np.asarray(train[0])
    described = {"teacher": models.describe(teacher)}
    if student is not None:
        described["student"] = models.describe(student)
    load = ""
    if teacher_variables is not None:
        example = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), np.float32)
        path = workdir / "teacher.safetensors"
        load = _save_teacher(path, teacher, teacher_variables, example)
    last = read_config(workdir)
    there = last.arms if last else {}
    names = _names(there, widths)
    trained = {"epochs": float(epochs), "learning_rate": learning_rate}
    made = {
        "seeds": tuple(seeds),
        "task": {"name": task},
        "data": {
            "name": "data.npz",
            "data_dir": str(workdir),
            "batch_size": min(batch_size, len(inputs)),
            "std": 255.0 if inputs.dtype == np.uint8 else 1.0,
        },
        "models": described,
        "quantize": _quantize(student or teacher, inputs),
        "distill": {"kd": _make_recipe(task, alpha, temperature)},
        "arms": {
            "teacher": {"model": "teacher", **({"load": load} if load else trained)},
            **_arms(names, trained, student is not None),
        },
    }
    checked = config.freeze(made)
    if others := sorted(there.keys() - checked.arms.keys()):
        raise config.ConfigError(
            f"{workdir} has arms that this call does not make, {', '.join(others)}: choose another "
            "workdir"
        )
    whole = dataclasses.replace(checked, seeds=_seeds(workdir, checked))
    experiment.finished(whole, workdir)  # raises where it can't be gone on with
    to_run = [name for name, arm in checked.arms.items() if not arm.bits or arm.bits in widths]
    with progress.reporter() as reporter:
        experiment.run(checked, workdir, arms=to_run, progress=reporter)
    records = experiment.finished(whole, workdir)
    write.write_report(records, workdir)
    return records


def _make_recipe(task: str, alpha: float, temperature: float) -> dict[str, Any]:
    """Returns the recipe of the loss by which a teacher of the task is followed."""
    built = tasks.build(task)
    loss = built.natural_distillation
    if "temperature" not in list_methods(built)[loss].options():  # as of real targets
        return recipe(loss, alpha)
    return recipe(loss, alpha, temperature=temperature)


def _save_teacher(
    path: Path, teacher: nn.Module, variables: Variables, example: jax.ShapeDtypeStruct
) -> str:
    """Returns the path of the teacher's packed file, which stays as it is if it is there.

    Raises ConfigError if that has other variables.
    """
    model, weights = models.describe(teacher), Weights(variables=variables, qparams={})
    if not path.exists():
        deploy.save_packed(path, weights, model=model, inputs=example)
        return str(path)
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / path.name
        deploy.save_packed(again, weights, model=model, inputs=example)
        there, here = (deploy.load_packed(file, teacher).variables for file in (path, again))
    same = jax.tree.structure(there) == jax.tree.structure(here)
    if not (same and jax.tree.all(jax.tree.map(np.array_equal, there, here))):
        raise config.ConfigError(
            f"{path} holds other teacher_variables: choose another workdir, or delete {path.parent}"
        )
    return str(path)


def _names(there: Mapping[str, config.Arm], widths: Sequence[str]) -> dict[str, str]:
    """Returns by bits what their arms' names end in; arms that are there keep theirs."""
    names = {arm.bits: name.removeprefix("ptq") for name, arm in there.items() if name[:3] == "ptq"}
    alone = not names and len(widths) == 1
    return names | {w: "" if alone else f"_{w.lower()}" for w in widths if w not in names}


def _seeds(workdir: Path, made: config.Experiment) -> tuple[int, ...]:
    """Returns those of this call, and those that arms in the workdir have been run with."""
    folders = [path.parent for name in made.arms for path in workdir.glob(f"{name}/*/result.json")]
    there = {int(folder.name) for folder in folders if folder.name.isdigit()}
    return tuple(sorted({*there, *made.seeds}))


def _arms(
    names: Mapping[str, str], trained: Mapping[str, Any], smaller: bool
) -> dict[str, Mapping[str, Any]]:
    """Returns those after the teacher; `names` has bits, and what names of arms end in."""
    taught = {"teacher": "teacher", "distill": "kd"}
    model, start = ("student", "kd") if smaller else ("teacher", "teacher")
    further = {**trained, "epochs": trained["epochs"] / 2}
    floats = {
        "student": {"model": model, **trained},
        "kd": {"model": model, "reference": "student", **trained, **taught},
    }
    arms = floats if smaller else {}
    for bits, end in names.items():
        quantized = {"model": model, "init": start, "bits": bits}
        arms[f"ptq{end}"] = {**quantized, "reference": start}
        arms[f"qad{end}"] = {**quantized, "reference": f"ptq{end}", **further, **taught}
    return arms


def _quantize(model: nn.Module, inputs: np.ndarray) -> dict[str, Any]:
    """The first and the last layer keep 8 bits where there are others, the inputs their scale."""
    example = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), np.float32)
    try:
        shapes = jax.eval_shape(quantize.as_network(model).init, jax.random.key(0), example)
    except Exception as error:  # whatever a module of anybody's raises
        raise config.ConfigError(
            f"{type(model).__name__} can't take inputs {example.shape}: "
            f"{type(error).__name__}: {error}"
        ) from error
    layers = [re.escape(path) for path in quantize.list_layers(model, shapes, example)]
    if not layers:
        raise config.ConfigError(f"{type(model).__name__} has no layer that can be quantized")
    return {
        "keep": (layers[0], layers[-1]) if len(layers) > 2 else (),
        "fixed_scales": (f"{layers[0]}/activations",),
    }
