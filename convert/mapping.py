"""A table at work: the tensors of a network in their layout planned as ours, and the reverse.

Nothing is read here but shapes and types; the plans are carried out by `convert.stream`.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from rich.filesize import decimal

from convert.networks import TABLES, layers
from convert.stream import Planned
from convert.table import Entry, check_names, expand
from wanjax.errors import UserError
from wanjax.models import Config
from wanjax.weights import abstract_network, parameters


@functools.cache  # tracing a network takes a second
def leaf_shapes(network: str, config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of all our tensors."""
    return {k: v.shape for k, v in parameters(abstract_network(network, config, "float32")).items()}


@functools.cache
def leaf_types(network: str, config: Config, asked: np.dtype) -> dict[str, np.dtype]:
    """The types of all our tensors where `asked` is asked for (`wanjax.precision`)."""
    return {k: v.dtype for k, v in parameters(abstract_network(network, config, asked)).items()}


def native_plan(
    network: str,
    config: Config,
    layout: str,
    tensors: Mapping[str, np.ndarray],
    where: str,
    dtype: np.dtype | None = None,
) -> list[Planned]:
    """Our leaves out of their tensors, in the type that these have, or as `dtype` asks for.

    Raises `UserError` for a missing, stray or misshapen tensor, and where layers that become one
    leaf differ in type and no `dtype` is given.
    """
    entries = expand(TABLES[network].rows(config), layout, layers(config))
    check_names(tensors, (e.theirs for e in entries), where=where)
    leaves: dict[str, list[Entry]] = {}
    for entry in entries:
        leaves.setdefault(entry.ours, []).append(entry)
    planned = []
    for name, shape in leaf_shapes(network, config).items():
        stacked = leaves[name][0].layer is not None
        layer_shape = shape[1:] if stacked else shape
        parts = tuple(_ours(e, tensors[e.theirs], layer_shape, where) for e in leaves[name])
        found = [(e.theirs, tensors[e.theirs].dtype) for e in leaves[name]]
        kind = leaf_types(network, config, dtype)[name] if dtype else _one_type(found, where)
        planned.append(Planned(name, kind, shape, parts))
    return planned


def _ours(entry: Entry, tensor: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """The view of a tensor (or of its part) that is one layer of our leaf, of the right shape."""
    try:
        part = np.split(tensor, entry.parts)[entry.part] if entry.parts > 1 else tensor
        view = entry.op.to_ours(part)
        fits = view.shape == shape and entry.op.to_theirs(view).shape == part.shape
    except (ValueError, IndexError):  # an axis too few, or one that does not divide
        fits = False
    if not fits:
        wanted = entry.op.to_theirs(np.broadcast_to(np.float32(0), shape)).shape
        wanted = (wanted[0] * entry.parts, *wanted[1:])
        raise UserError(
            f"{where} has the tensor '{entry.theirs}' of shape {tensor.shape}, where this model "
            f"has {wanted}; its config is another model's, or the file is damaged."
        )
    return view


def _one_type(types: list[tuple[str, np.dtype]], where: str) -> np.dtype:
    name, first = types[0]
    for other, dtype in types:
        if dtype != first:
            raise UserError(
                f"{where} has '{other}' in {dtype} and '{name}' in {first}, which become one "
                "tensor; give both one type with --dtype float32 or --dtype bfloat16."
            )
    return first


def foreign_plan(
    network: str, config: Config, layout: str, leaves: Mapping[str, np.ndarray], where: str
) -> list[Planned]:
    """Their tensors out of our leaves, ordered by name and layer number."""
    tensors: dict[str, list[Entry]] = {}
    for entry in expand(TABLES[network].rows(config), layout, layers(config)):
        tensors.setdefault(entry.theirs, []).append(entry)
    planned = []
    for name in sorted(tensors, key=_natural):
        entries = sorted(tensors[name], key=lambda e: e.part)
        parts = tuple(
            e.op.to_theirs(leaves[e.ours] if e.layer is None else leaves[e.ours][e.layer])
            for e in entries
        )
        kind = _one_type([(e.ours, leaves[e.ours].dtype) for e in entries], where)
        shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:]) if parts[0].shape else ()
        planned.append(Planned(name, kind, shape, parts))
    return planned


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A sorting key by which block 10 comes after block 9."""
    return [(not s.isdigit(), int(s) if s.isdigit() else 0, s) for s in re.split(r"(\d+)", name)]


def summary(network: str, planned: Sequence[Planned], tensors: str) -> str:
    """One line of a report: what a network's tensors amount to."""
    parameters = sum(math.prod(t.shape) for t in planned)
    types = ", ".join(sorted({str(t.dtype) for t in planned}))
    size = decimal(sum(t.nbytes for t in planned))
    return f"  {network:14} {tensors}, {parameters:,} parameters, {types}, {size}"
