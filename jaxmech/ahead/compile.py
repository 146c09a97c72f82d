"""Compiling for a TPU slice that is not attached: whether a program fits a chip, and what it does.

The `libtpu` package compiles for a named topology on any x86 Linux machine: "v5e:2x4" is eight chips.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from jaxmech.ahead.hlo import cost
from jaxmech.io.tpu import quiet_without_chips

GIB = 2**30
HBM = {"TPU v5 lite": 15.75 * GIB, "TPU v6 lite": 31.25 * GIB, "TPU v5": 95.74 * GIB}
"""Bytes of a chip's main memory that a program may use, as libtpu states them when a program asks for more."""


def topology_mesh(name: str, data: int = 1, model: int = 1) -> Mesh:
    """A mesh like that of `make_mesh`, of the chips of a topology such as "v5e:2x4", "v6e:2x2" or "v5p:2x2x2".

    Programs can be compiled for it, not run.

    Raises:
      ValueError: no libtpu, a name it does not know, or another number of chips than data * model.
    """
    quiet_without_chips()
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # several kinds, as libtpu is missing, too old, or does not know the name
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"topology {name!r}: cannot be described ({why}); names are like v5e:2x4, v6e:2x4 and v5p:2x2x2, "
            "and the compiler is in the package libtpu, which jax[tpu] installs"
        ) from error
    if len(devices) != data * model:
        raise ValueError(f"topology {name!r}: has {len(devices)} chips, expected data * model = {data} * {model}")
    placed = mesh_utils.create_device_mesh((data, model), devices=list(devices), allow_split_physical_axes=True)
    return Mesh(placed, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and what it is called with.

    Attributes:
      args, options: trees of `jax.ShapeDtypeStruct` with shardings, and static arguments; options go by name.
      parameters: name -> a tree among them whose leaves must never be gathered.
      lead: sizes of axes over which parameters are stacked, such as the number of layers.
      trips: how often a loop runs if its length is not a constant in the program.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    parameters: Mapping[str, Any]
    lead: tuple[int, ...]
    trips: int = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one chip needs and does for one run of a program; sizes in bytes.

    Attributes:
      chip: its kind; hbm: of the chip.
      total: of all that the compiler sets aside: arguments, outputs, temporaries and code, less the outputs that
        reuse an argument's buffer, `aliased`. If a program does not fit, what the compiler says it needs; then
        `error` is its message, and nothing else is known.
      flops: of matrix products; hbm_bytes: moved to and from the chip's memory, roughly; collectives: kind -> how many,
        and bytes of their results. Loops are counted as often as they run.
      loops: loops of a length that is not a constant.
      gathered: which whole parameters all-gathers put together, and in which operation.
      compile_seconds: lowering and compiling.
    """

    program: str
    chip: str
    chips: int
    hbm: float
    compile_seconds: float
    total: float
    arguments: float = 0
    outputs: float = 0
    temporaries: float = 0
    aliased: float = 0
    code: float = 0
    flops: float = 0
    hbm_bytes: float = 0
    collectives: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    loops: int = 0
    gathered: tuple[str, ...] = ()
    error: str | None = None

    @property
    def fits(self) -> bool:
        return self.error is None and self.total <= self.hbm

    @property
    def faults(self) -> list[str]:
        """What speaks against running this program on such chips; empty where nothing does."""
        faults = [] if self.fits else [f"needs {self.total / GIB:.2f} GiB of a chip's {self.hbm / GIB:.2f}"]
        return faults + [f"gathers a whole parameter: {what}" for what in self.gathered]


def compile_ahead(program: Program) -> Report:
    """Compiles a program for the devices of its arguments' shardings.

    Raises:
      ValueError: arguments without shardings, or on a chip that `HBM` does not know.
      jax.errors.JaxRuntimeError: the compiler fails for another reason than a lack of memory.
    """
    device, chips = _devices(program)
    if device.device_kind not in HBM:
        raise ValueError(f"{program.name}: expected a chip of {', '.join(HBM)}, got {device.device_kind}")
    report = partial(Report, program.name, device.device_kind, chips, HBM[device.device_kind])
    begun = time.perf_counter()
    lowered = program.function.lower(*program.args, **program.options)
    try:
        with warnings.catch_warnings():
            # JAX's cache on disk keeps programs for devices that are not attached but cannot read them: it recompiles.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report(time.perf_counter() - begun, total=_needed(str(error)), error=str(error).strip())
    seconds, memory = time.perf_counter() - begun, compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    aliased = memory.alias_size_in_bytes
    facts = cost(compiled.as_text(), trips=program.trips)._asdict()
    facts["gathered"] = tuple(_whole_parameters(program, facts["gathered"]))
    return report(seconds, total=sum(sizes.values()) - aliased, aliased=aliased, **sizes, **facts)


def _devices(program: Program) -> tuple[Any, int]:
    for leaf in jax.tree.leaves((program.args, program.options)):
        if getattr(leaf, "sharding", None) is not None:
            devices = leaf.sharding.device_set
            return next(iter(devices)), len(devices)
    raise ValueError(f"{program.name}: expected arguments with shardings, see topology_mesh")


def _needed(message: str) -> float:
    """Bytes that a program needs, as the compiler's complaint says."""
    sizes = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", message)
    if not sizes:
        return math.inf
    number, unit = [part for part in sizes.groups() if part]
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)


def _whole_parameters(program: Program, gathered: Iterable[tuple[int, str]]) -> list[str]:
    """The all-gathers whose result has as many entries as a matrix among the parameters that is spread over chips, or
    as one layer of it. A scan over layers gathers one layer at a time."""
    sizes: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.parameters):
        if leaf.sharding.is_fully_replicated:
            continue
        shape = leaf.shape
        while shape and shape[0] in program.lead:
            shape = shape[1:]
        if len(shape) > 1:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            sizes.setdefault(math.prod(leaf.shape), f"{name} {leaf.shape}")
            sizes.setdefault(math.prod(shape), f"one layer of {name} {shape}")
    return [f"{sizes[size]} in {source}" for size, source in gathered if size in sizes]
