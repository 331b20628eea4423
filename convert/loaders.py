"""Which programs would take an adapter file, by rules read in their sources.

Sources: ComfyUI `comfy/lora.py`; diffusers `loaders/lora_conversion_utils.py`; diffusion-pipe
`models/base.py`; musubi-tuner `convert_lora.py`.
"""

from collections.abc import Collection

from convert.lora_names import PREFIXES, SUFFIXES, Key, parse
from wanjax.lora import in_a_block

_NOT_OF_COMFYUI = (".diff_m", ".lora_B.bias", ".lora_B.default.bias")
_FUN = "lora_unet__blocks_0_cross_attn_k.lora_down.weight"
_OF_MUSUBI = (".lora_down.weight", ".lora_up.weight", ".alpha")
_OF_EVERY_BLOCK = 10  # matrices that diffusers wants of each, where names have underscores


def takers(names: Collection[str]) -> dict[str, str]:
    """For each program why it would not take a file with these names; an empty text if it would.

    What it would take in part, without a word, counts as not taken.
    """
    rules = {
        "ComfyUI": _comfyui,
        "diffusers": _diffusers,
        "diffusion-pipe": _diffusion_pipe,
        "musubi-tuner": _musubi,
    }
    return {program: rule(names) for program, rule in rules.items()}


def _suffix(name: str) -> str:
    return max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")


def _module(key: Key) -> str:
    return key.module.official.replace("{i}", str(key.block))


def _comfyui(names: Collection[str]) -> str:
    fun = _FUN in names
    for name in names:
        key, suffix = parse(name), _suffix(name)
        if key is None or suffix in _NOT_OF_COMFYUI:
            return f"'{name}' is not loaded"
        module = _module(key)
        known = [f"diffusion_model.{module}", f"lora_unet_{module.replace('.', '_')}"]
        known += [f"lora_unet__{module.replace('.', '_')}"] if fun else []
        if name.removesuffix(suffix) not in known:
            return f"'{name}' is not loaded"
    return ""


def _diffusers(names: Collection[str]) -> str:
    keys = {name: parse(name) for name in names}
    if None in keys.values():
        return f"'{next(name for name, key in keys.items() if key is None)}' is unknown"
    if any(name.startswith("diffusion_model.") for name in names):
        return _diffusers_original(keys)
    if any(name.startswith("lora_unet_") for name in names):
        return _diffusers_underscored(keys)
    for name, key in keys.items():
        module = key.module.diffusers.replace("{i}", str(key.block))
        ends = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
        if name not in (f"transformer.{module}.{end}" for end in ends):
            return f"'{name}' is unexpected"
    return ""


def _diffusers_original(keys: dict[str, Key]) -> str:
    down = ".lora_A." if any(".lora_A." in name for name in keys) else ".lora_down."
    pairs = {key.module.layer: name for name, key in keys.items() if key.part == "down"}
    if all(key.block is None for key in keys.values()):
        return "there is no key of a block"
    for name, key in keys.items():
        if not name.startswith(f"diffusion_model.{_module(key)}."):
            return f"'{name}' has another prefix"
        if key.part == "down" and down not in name:
            return f"'{name}' is of another form than the other pairs"
        if key.part.startswith("diff") and not (key.part == "diff_b" and key.module.layer in pairs):
            return f"'{name}' is left out"
        if key.part == "alpha" and key.block is None:
            return f"'{name}' is no alpha of a block"
    if len({"cross_attn.k_img", "cross_attn.v_img"} & pairs.keys()) == 1:
        return "k_img and v_img are wanted together"
    return ""


def _diffusers_underscored(keys: dict[str, Key]) -> str:
    for name, key in keys.items():
        if key.block is None or not name.startswith(f"lora_unet_{_module(key).replace('.', '_')}."):
            return f"'{name}' is not of that form"
    blocks = {key.block for key in keys.values()}
    for part in ("down", "up", "alpha"):
        found = {(k.block, k.module.layer) for k in keys.values() if k.part == part}
        image = {(b, layer) for b, layer in found if layer.endswith("_img")}
        if len(found - image) < _OF_EVERY_BLOCK * len(blocks) or blocks != set(range(len(blocks))):
            return "all layers of all blocks are wanted, each with its alpha"
        if image and len(image) < 2 * len(blocks):
            return "k_img and v_img are wanted of all blocks, each with its alpha"
    return ""


def _diffusion_pipe(names: Collection[str]) -> str:
    for name in names:
        key = parse(name)
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        sound = key is not None and prefix in ("transformer.", "diffusion_model.", "")
        layer = "" if key is None else _module(key)
        if not sound or name not in (f"{prefix}{layer}.lora_{x}.weight" for x in "AB"):
            return f"'{name}' is unknown"
    return ""


def _musubi(names: Collection[str]) -> str:
    for name in names:
        key = parse(name)
        if key is None or not (key.module.layer and in_a_block(key.module.layer)):
            return f"'{name}' is of no layer that it trains"
        if not name.startswith("lora_unet_blocks_") or _suffix(name) not in _OF_MUSUBI:
            return "its convert_lora.py --target default has to turn the names"
    return ""


def described(names: Collection[str]) -> str:
    """The same in two clauses."""
    found = takers(names)
    yes = [program for program, reason in found.items() if not reason]
    no = [f"{program} ({reason})" for program, reason in found.items() if reason]
    parts = [f"for {', '.join(yes)}"] if yes else []
    return "; ".join(parts + ([f"not for {', '.join(no)}"] if no else []))
