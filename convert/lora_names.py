"""Names of the tensors in adapter files: five families, one table out of the model's own layers.

A key is a prefix, a module and a suffix: `diffusion_model.` `blocks.0.self_attn.q`
`.lora_A.weight`. Modules have official or diffusers' names, with dots or with underscores between
their parts; which one a name stands for is looked up, never guessed from its underscores.
"""

import re
from dataclasses import dataclass
from functools import cache

from convert.dit import rows
from convert.networks import TABLES
from convert.table import LINEAR, Row
from wanjax.nn import STACK

# The longest first. Trainers put one of these before every name, or none.
PREFIXES = (
    "model.diffusion_model.",
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet__",
    "lora_unet_",
    "",
)
# What a tensor is to its module, by the end of its name.
SUFFIXES = {
    f"{lead}.weight": part
    for part, leads in {
        "down": (".lora_A", ".lora_A.default", ".lora_down", ".lora.down", "_lora.down"),
        "up": (".lora_B", ".lora_B.default", ".lora_up", ".lora.up", "_lora.up"),
    }.items()
    for lead in leads
} | {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".diff_m": "diff_m",
}
# Kinds of adapters that are not read, by what occurs in their names.
OTHER_KINDS = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".lora_mid.": "a LoRA of three factors (lora_mid)",
    ".oft_": "OFT",
    ".a1.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".set_weight": "a replaced weight (set_weight)",
    ".reshape_weight": "a resized weight (reshape_weight)",
}
_BLOCK = re.compile(r"^blocks([._])(0|[1-9][0-9]{0,8})(?=[._]|$)", re.ASCII)


@dataclass(frozen=True)
class Module:
    """One of their modules: the rows of its weight and its bias, and its name in each layout.

    A table that is a module by itself (`blocks.{i}.modulation`) has a weight and no bias.
    """

    weight: Row
    bias: Row | None
    official: str
    diffusers: str

    @property
    def layer(self) -> str | None:
        """The name of our layer, where an adapter may be put into it."""
        if self.weight.op is not LINEAR:
            return None
        return self.weight.ours.removesuffix(".kernel").removeprefix(f"{STACK}.")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Our names for its weight and its bias."""
        return tuple(row.ours for row in (self.weight, self.bias) if row is not None)


@dataclass(frozen=True)
class Key:
    """What a tensor's name says: `part` is a value of `SUFFIXES`."""

    module: Module
    block: int | None
    part: str
    name: str


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the fullest denoiser that there is."""
    table = rows(TABLES["dit"].fullest)
    biases = {row.official: row for row in table if row.official.endswith(".bias")}
    found = []
    for row in table:
        if row.official not in biases:
            official = row.official.removesuffix(".weight")
            diffusers = row.diffusers.removesuffix(".weight")
            found.append(Module(row, biases.get(f"{official}.bias"), official, diffusers))
    return tuple(found)


@cache
def by_name() -> dict[str, Module]:
    """Modules by all their names, with `{i}` for the number of a block."""
    found = {}
    for module in modules():
        for name in (module.official, module.diffusers):
            found |= {name: module, name.replace(".", "_"): module}
    return found


@cache
def by_layer() -> dict[str, Module]:
    """Modules by the names of our layers, where an adapter may be put into them."""
    return {module.layer: module for module in modules() if module.layer is not None}


@cache
def by_parameter() -> dict[str, Module]:
    """Modules by our names for their weights and biases."""
    return {name: module for module in modules() for name in module.parameters}


def parse(key: str) -> Key | None:
    """What a tensor's name says; None where no layer of Wan2.1 is meant."""
    name = key.removeprefix(next(prefix for prefix in PREFIXES if key.startswith(prefix)))
    suffixes = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    if not suffixes:
        return None
    suffix = max(suffixes, key=len)
    part, name = SUFFIXES[suffix], name.removesuffix(suffix)
    match = _BLOCK.match(name)
    block = int(match[2]) if match else None
    template = f"blocks{match[1]}{{i}}{name[match.end() :]}" if match else name
    if part == "diff_m":  # of the module whose modulation it is, or of the modulation itself
        between = match[1] if match else "."
        template = template.removesuffix(f"{between}modulation") + f"{between}modulation"
    module = by_name().get(template)
    if module is None or ("{i}" in module.official) != (block is not None):
        return None
    return Key(module, block, part, key) if _may_have(module, part) else None


def _may_have(module: Module, part: str) -> bool:
    if part in ("diff_b", "up_bias"):
        return module.bias is not None
    if part in ("down", "up"):
        return module.weight.ours.endswith(".kernel")
    return True


def other_kind(key: str) -> str | None:
    """The kind of adapter that a name is of, where that is none which is read."""
    return next((kind for part, kind in OTHER_KINDS.items() if part in key), None)
