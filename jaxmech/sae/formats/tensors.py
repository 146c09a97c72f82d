"""From the tensors of a file to canonical parameters: names, orientation, shapes and finite values, checked at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Rules = Mapping[str, tuple[str, bool]]
"""A name in the file -> (canonical name, whether the file has it transposed). Several may mean the same."""


def assemble(
    where: str | Path,
    tensors: Mapping[str, np.ndarray],
    rules: Rules,
    shapes: Mapping[str, tuple[int, ...]],
    ignore: Collection[str] = (),
    hints: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Canonical name -> float32 array.

    Args:
      where: the file, for messages.
      tensors: as the file has them.
      rules: how they are called there.
      shapes: canonical name -> shape of each parameter expected, as `param_shapes(config)` after transposing.
      ignore: names in the file that carry nothing and are passed over.
      hints: canonical name -> what to say when it is missing.

    Raises:
      ValueError: naming every unknown, missing, double and mis-shaped tensor, and every one with values that are not
        finite (a threshold of +inf is a feature that never fires, which some trainers write on purpose).
    """
    params: dict[str, Any] = {}
    faults = []
    for name, value in tensors.items():
        if name in ignore:
            continue
        canonical, transposed = rules.get(name, ("", False))
        if canonical not in shapes:
            faults.append(f"{name}: unknown tensor")
        elif canonical in params:
            faults.append(f"{name}: {canonical} is also stored under another name")
        else:
            expected = shapes[canonical][::-1] if transposed else shapes[canonical]
            fault = _fault(value, expected, infinite=canonical == "threshold")
            if fault:
                faults.append(f"{name}: {fault}")
            params[canonical] = None if fault else as_float32(value.T if transposed else value)
    for canonical in shapes:
        if canonical not in params:
            names = [name for name, (target, _) in rules.items() if target == canonical]
            hint = (hints or {}).get(canonical)
            faults.append(f"{' or '.join(names) or canonical}: missing{f' ({hint})' if hint else ''}")
    if faults:
        raise ValueError(f"{where}: {'; '.join(faults)}")
    return {canonical: params[canonical] for canonical in shapes}


def matrix_shape(where: str | Path, tensors: Mapping[str, np.ndarray], *names: str) -> tuple[int, int]:
    """The shape of the first of `names` that is there, for files whose configuration does not give the widths.

    Raises:
      ValueError: none is there, or it is not a matrix.
    """
    for name in names:
        if name in tensors:
            if np.ndim(tensors[name]) != 2:
                raise ValueError(f"{where}: {name}: expected a matrix, got shape {np.shape(tensors[name])}")
            return tensors[name].shape
    raise ValueError(f"{where}: {' or '.join(names)}: missing; it holds {', '.join(tensors) or 'nothing'}")


def as_float32(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        return np.asarray(value).astype(np.float32, copy=False)


def _fault(value: np.ndarray, expected: tuple[int, ...], infinite: bool) -> str | None:
    # bfloat16 is an extension type of kind "V"; in an .npz nothing but its bytes remain, a plain "V2".
    if value.dtype.kind not in "fV" or value.dtype.type is np.void:
        return f"expected floating-point numbers, got {value.dtype}"
    if value.shape != expected:
        return f"expected {expected}, got {value.shape}"
    value = as_float32(value)
    bad = np.isnan(value) | (value == -np.inf) if infinite else ~np.isfinite(value)
    return f"{int(bad.sum())} values are NaN or infinite" if bad.any() else None
