"""Ahead of time: the programs of a study compiled for TPU slices that are not attached, and what the compiler says."""

from jaxmech.ahead.compile import GIB, HBM, Program, Report, compile_ahead, topology_mesh

__all__ = ["GIB", "HBM", "Program", "Report", "compile_ahead", "topology_mesh"]
