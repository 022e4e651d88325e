"""The networks of `zoo` in every format, and how near what they make is to the simulation."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zoo
from flax.errors import FlaxError

from kdq import deploy, quantize
from kdq.deploy.formats.catalog import Source
from kdq.deploy.measure import parity
from kdq.quantize import QuantizationRule, TensorSpec
from kdq.quantize.network import Weights

WIDTHS = {"float": (None, None), "W8A8": (8, 8), "W4A8": (4, 8)}
# The largest difference from the simulation that is rounding, as a part of the largest output: of
# floats, and where an input between layers may lie so near the middle of two codes that another
# order of additions makes it the other.
EXACT, OF_CODES = 1e-5, 0.05


def cells(
    entry: zoo.Entry, widths: Sequence[str] = tuple(WIDTHS), formats: Sequence[str] = ()
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """`(width, format, cell)` for each file of a network."""
    variables, inputs = entry.variables(), entry.inputs()
    for width in widths:
        # ONNX for TensorRT has codes around 0 only.
        for signed, forms in (
            (None, [f for f in deploy.FORMATS if f != "onnx_int8"]),
            (True, ["onnx_int8"]),
        ):
            forms = [form for form in forms if form in (formats or deploy.FORMATS)]
            if not forms:
                continue
            try:
                made = _sources(entry, variables, inputs, WIDTHS[width], signed)
            except (ValueError, KeyError, TypeError) as error:
                yield from ((width, form, {"refused": _line(error)}) for form in forms)
                continue
            except FlaxError as error:  # a layer that nobody thought of
                reason = f"{type(error).__name__}: {_line(error)}"
                yield from ((width, form, {"failed": reason}) for form in forms)
                continue
            with tempfile.TemporaryDirectory() as folder:
                for form in forms:
                    yield width, form, cell(form, Path(folder), *made)


def rules(bits: tuple[int | None, int | None], signed: bool | None) -> tuple[QuantizationRule, ...]:
    """As `quantize.uniform_rules`, with inputs that are signed or as they come."""
    weights = TensorSpec(bits=bits[0], granularity="per_channel")
    return (
        QuantizationRule(
            path=".*", weights=weights, activations=TensorSpec(bits=bits[1], signed=signed)
        ),
    )


def _sources(
    entry: zoo.Entry, variables: Any, inputs: Any, bits: tuple, signed: bool | None
) -> tuple[Any, Any, Any, Any, Any]:
    """The model, its integer form, its inputs, its simulated outputs and its weights."""
    qparams = {}
    if bits[0] is not None:
        qparams = quantize.calibrate(entry.model, variables, rules(bits, signed), [inputs])
    integer = deploy.lower(entry.model, Weights(variables=variables, qparams=qparams), inputs)
    variables = integer.simulated(variables)
    expected = parity.leaves(quantize.predict(entry.model, variables, qparams, inputs))
    return entry.model, integer, inputs, expected, Weights(variables=variables, qparams=qparams)


def cell(
    form: str, folder: Path, model: Any, integer: Any, inputs: Any, expected: Any, weights: Any
) -> dict[str, Any]:
    """Compares a file: "difference" and "agreement", or "refused"; one that "failed" is a fault."""
    path, packed = folder / form, folder / "model.safetensors"
    if not packed.is_file():
        deploy.save_packed(packed, weights, model={"name": "of the zoo"})
    try:
        deploy.FORMATS[form].save(path, Source(packed, integer, inputs, {}, {}, model))
        run = deploy.FORMATS[form].load(path, None, model)
    except ValueError as error:
        return {"refused": _line(error)}
    try:
        outputs = parity.leaves(run(inputs))
    except Exception as error:  # of any runtime
        return {"failed": f"{type(error).__name__}: {_line(error)}"}
    scale = max(float(np.abs(array).max()) for array in expected)
    measured = parity.compare_all(outputs, expected)
    return {
        "difference": float(f"{measured['max_logit_difference'] / scale:.2g}"),
        "agreement": measured["argmax_agreement"],
    }


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].removesuffix("\\")


def without_parity(figures: dict[str, Any]) -> list[str]:
    """The cells that are neither rounding nor refused."""
    return [
        f"{name}, {which}: {cell.get('difference') or cell['failed']}"
        for name, row in figures.items()
        for which, cell in row.items()
        if "refused" not in cell
        and not cell.get("difference", np.inf) <= (EXACT if which.startswith("float") else OF_CODES)
    ]


def markdown(figures: dict[str, Any]) -> str:
    """A table for each kind of network, and why cells are empty."""
    reasons: dict[str, int] = {}
    lines = []
    for kind, networks in zoo.ZOO.items():
        lines += [f"| {kind} | {' | '.join(f'`{form}`' for form in deploy.FORMATS)} |"]
        lines += ["|---|" + "---|" * len(deploy.FORMATS)]
        for name in networks:
            row = figures[name]
            shown = []
            for form in deploy.FORMATS:
                of_widths = [_shown(row[f"{width} {form}"], reasons) for width in WIDTHS]
                same = len(set(of_widths)) == 1
                shown.append(of_widths[0] if same else " · ".join(of_widths))
            lines.append(f"| {name} | {' | '.join(shown)} |")
        lines.append("")
    lines += [f"[{number}] {reason}  " for reason, number in reasons.items()]
    return "\n".join(lines).rstrip()


def _shown(cell: dict[str, Any], reasons: dict[str, int]) -> str:
    """A difference of float32's rounding is "="."""
    if "failed" in cell:
        return "fails"
    if "refused" in cell:
        return f"[{reasons.setdefault(cell['refused'], len(reasons) + 1)}]"
    difference = "=" if cell["difference"] <= EXACT else f"{cell['difference']:.1g}"
    agreement = cell["agreement"]
    return difference if agreement == 1 else f"{difference} ({agreement:.0%})"
