"""Shared by the parity tests: randomise a torch model, and hand its weights to one of ours."""

import numpy as np
import pytest
from flax import nnx

from tests.tables import to_native

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch")


def randomise(module: "torch.nn.Module", seed: int = 0) -> "torch.nn.Module":
    """Give every parameter a random value, zero-initialised ones too, keeping outputs finite."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            noise = torch.randn(p.shape, generator=generator)
            is_scale = p.ndim == 1 and "bias" not in name or name.endswith("gamma")
            p.copy_(1 + 0.2 * noise if is_scale else noise * (fan_in**-0.5 if p.ndim > 1 else 0.2))
    return module.eval()


def load_state(model: nnx.Module, leaves: dict[str, np.ndarray]) -> nnx.Module:
    """Put named arrays into a model; every parameter must be given, with its shape."""
    state = nnx.state(model, nnx.Param)
    flat = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    assert flat.keys() == leaves.keys(), flat.keys() ^ leaves.keys()
    for name, variable in flat.items():
        assert variable.shape == leaves[name].shape, (name, variable.shape, leaves[name].shape)
        variable.set_value(np.asarray(leaves[name], variable.dtype))
    nnx.update(model, state)
    return model


def leaves_of(model: nnx.Module) -> dict[str, np.ndarray]:
    """Every parameter of a model under its native name: the inverse of `load_state`."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


def from_torch(model: nnx.Module, rows, layout: str, layers: int, module) -> nnx.Module:
    """Our `model` with the weights of a torch `module`, through the conversion table."""
    tensors = {k: v.detach().numpy() for k, v in module.state_dict().items()}
    return load_state(model, to_native(rows, layout, layers, tensors, where="the reference"))


def relative_error(ours, reference) -> float:
    """Relative error in the L2 norm."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
