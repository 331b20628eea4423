"""What a config may say, whoever wrote it: types, ranges, and the fields that must agree.

It is checked where a config is read, before anything is built or allocated by its numbers.
"""

import dataclasses
import typing

from wanjax.errors import UserError
from wanjax.models import Config
from wanjax.models.dit import DiTConfig
from wanjax.models.umt5 import UMT5Config
from wanjax.models.vae import VAEConfig

LARGEST = 1 << 20  # of a width, a vocabulary, ...
DEEPEST = {"num_layers": 1000, "num_res_blocks": 100}  # of what is repeated; the largest has 40
LONGEST = 64  # of a list


def check_config(config: Config, where: str) -> Config:
    """The config, if it can be built. Raises `UserError`, naming the field, if it cannot."""
    for field in dataclasses.fields(config):
        check_field(type(config), field.name, getattr(config, field.name), where)
    for requirement, is_met in _requirements(config).items():
        if not is_met:
            raise UserError(f"{where} must have {requirement}; use a Wan2.1 checkpoint.")
    return config


def check_runs(config: Config, where: str) -> None:
    """Refuse a diffusion model that can be built and is none of Wan2.1's: it takes 16 channels, or
    36 with a picture. An older wanjax converted such ones."""
    if isinstance(config, DiTConfig):
        channels = (config.in_channels, config.out_channels, config.image_dim is not None)
        if channels not in ((16, 16, False), (36, 16, True)):
            clip = "with" if channels[2] else "without"
            raise UserError(
                f"{where} is a model of {channels[0]} input and {channels[1]} output channels "
                f"{clip} a CLIP branch, which is none of Wan2.1's; use a Wan2.1 checkpoint."
            )


def check_field(kind: type, name: str, value: object, where: str, called: str = "") -> None:
    """Refuse a value that is not of its field's type, or out of all proportion; `called` is what
    the file calls the field."""
    _refuse(called or name, value, _fault(typing.get_type_hints(kind)[name], name, value), where)


def check_whole(name: str, value: object, where: str) -> int:
    """A whole number that is no field of ours, but from which one is computed."""
    _refuse(name, value, _fault(int, name, value), where)
    return value


def _refuse(name: str, value: object, wanted: str | None, where: str) -> None:
    if wanted is not None:
        shown = repr(value)[:60]
        raise UserError(f"{where} has {name}={shown}, which is not {wanted}; fetch it again.")


def _fault(hint: object, name: str, value: object) -> str | None:
    """What the value should have been, where it is something else."""
    if typing.get_origin(hint) is tuple:
        return _list_fault(typing.get_args(hint), name, value)
    if hint is bool:
        return None if isinstance(value, bool) else "true or false"
    if hint is float:
        return _float_fault(name, value)
    if value is None and type(None) in typing.get_args(hint):
        return None
    largest = DEEPEST.get(name, LARGEST)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return None if whole and 1 <= value <= largest else f"a whole number from 1 to {largest:,}"


def _list_fault(items: tuple, name: str, value: object) -> str | None:
    if not isinstance(value, tuple | list) or not 1 <= len(value) <= LONGEST:
        return f"a list of 1 to {LONGEST} values"
    if items[-1] is not Ellipsis and len(value) != len(items):
        return f"a list of {len(items)} values"
    faults = (_fault(items[0], name, item) for item in value)
    return next((f"a list, of {fault} each" for fault in faults if fault), None)


def _float_fault(name: str, value: object) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "latents_mean":
        return None if number and abs(value) < 1e6 else "a number"
    largest = 1 if name == "eps" else 1e6
    return None if number and 0 < value < largest else f"a number from 0 to {largest:,.0f}"


def _requirements(config: Config) -> dict[str, bool]:
    """What must hold between the fields, and whether it does."""
    if isinstance(config, DiTConfig):
        has_image = config.image_dim is not None
        return {
            "heads of an even size, which divide dim": config.dim % (2 * config.num_heads) == 0,
            "an even freq_dim": config.freq_dim % 2 == 0,
            "image_dim, having image_positions": has_image or config.image_positions is None,
        }
    if isinstance(config, VAEConfig):
        sizes = {len(config.latents_mean), len(config.latents_std)}
        return {
            "z_dim values of latents_mean and of latents_std": sizes == {config.z_dim},
            "one value fewer of temporal_downsample than of dim_mult": (
                len(config.temporal_downsample) == len(config.dim_mult) - 1
            ),
        }
    if isinstance(config, UMT5Config):
        return {
            "heads that divide attention_dim": config.attention_dim % config.num_heads == 0,
            "num_buckets that divide by 4, and fewer than 4 x max_distance": (
                config.num_buckets % 4 == 0 and config.num_buckets < 4 * config.max_distance
            ),
        }
    return {
        "heads that divide dim": config.dim % config.num_heads == 0,
        "a patch_size that divides image_size": config.image_size % config.patch_size == 0,
    }
