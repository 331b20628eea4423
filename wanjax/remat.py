"""What of a block is kept for its gradient, and what is computed again when that is due.

| policy | kept of each block | computed again |
|---|---|---|
| `none` | all of it | nothing |
| `save_attention` | its input; output and log-sum-exp of self-attention | all but that attention |
| `full` | its input | all of it |
| `offload` | its input, in the host's memory | all of it |
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from wanjax.errors import UserError, nearest

Remat = Literal["none", "full", "save_attention", "offload"]
# The names under which arrays are known to a policy.
ATTENTION, BLOCK_INPUT = "attention", "block_input"


def parse_remat(value: str | bool) -> Remat:
    """A policy by its name; True is full and False none, as before there were four."""
    if isinstance(value, bool):
        return "full" if value else "none"
    if value not in get_args(Remat):
        raise UserError(f"There is no remat policy '{value}'{nearest(value, get_args(Remat))}")
    return value


def checkpointed(block: Callable, remat: Remat) -> Callable:
    """`block(x, given)` with a gradient that keeps what the policy says."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return block
    if remat == "full":
        return jax.checkpoint(block)
    if remat == "save_attention":
        return jax.checkpoint(block, policy=policies.save_only_these_names(ATTENTION))
    to_host = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
    # Named inside of the checkpoint: its own arguments would be kept where they are.
    inside = lambda x, given: block(named(x, BLOCK_INPUT), given)  # noqa: E731
    return jax.checkpoint(inside, policy=to_host)


def named(arrays: Any, name: str | None) -> Any:
    """Arrays that a policy may save by this name; with None they are as they were."""
    return arrays if name is None else checkpoint_name(arrays, name)


def naming_residuals(function: Callable, name: str) -> Callable:
    """`function(*arrays)`, with `name` on its result and on all that its gradient needs beside its
    arguments: a policy that saves by this name saves running it again. This reaches what functions
    with a gradient of their own keep for it, such as a log-sum-exp that they do not return."""

    def forward(*arrays):
        out, back = jax.vjp(function, *arrays)
        given = {id(x) for x in arrays}
        own = {id(x): x for x in (out, *jax.tree.leaves(back)) if id(x) not in given}
        kept = {key: named(x, name) for key, x in own.items()}
        return kept[id(out)], jax.tree.map(lambda x: kept.get(id(x), x), back)

    result = jax.custom_vjp(function)
    result.defvjp(forward, lambda back, change: back(change))
    return result
