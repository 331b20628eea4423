"""Checkpoints and adapters of others: `python -m convert`, and `convert.open_lora(path)`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convert.lora import open_lora as open_lora

__all__ = ["open_lora"]


def __getattr__(name: str):
    """`open_lora` is imported when it is asked for: it needs all of JAX."""
    if name == "open_lora":
        from convert.lora import open_lora

        return open_lora
    raise AttributeError(f"module 'convert' has no attribute '{name}'")
