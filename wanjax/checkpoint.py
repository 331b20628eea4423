"""What runs write: Orbax checkpoints of a training state, and adapters as files.

A run is a folder: `run.json` (its settings, written first), `checkpoints/STEP/` (trained
parameters, optimizer, step, loader position), logs. The frozen base is never in it. An adapter by
itself is one safetensors file in our names. This is the only module that imports Orbax.
"""

import json
import logging
import math
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from rich.filesize import decimal

from wanjax.errors import UserError
from wanjax.lora import Change, LayerAdapter, LoRA, in_a_block, require_finite
from wanjax.metrics import read_metrics
from wanjax.nn import STACK
from wanjax.outputs import whole_file
from wanjax.remat import parse_remat
from wanjax.tensor_files import SafetensorsWriter, read_safetensors
from wanjax.types import PathLike

RUN_FILE = "run.json"
# Of the settings in it. A file without one is of version 1; 2 brought `residual`; 3 `accumulate`,
# the names of `remat`, which was true or false, and `base`, which had been the name of what is now
# `weights`, the fingerprint of the denoiser.
RUN_VERSION = 3
ADAPTER_FORMAT = "wanjax-lora"
# With changes (norms, biases, ...) or layers outside of the blocks, which 0.1 would have left out.
ADAPTER_FORMATS = (ADAPTER_FORMAT, "wanjax-lora-2")
_OVERHEAD = 256 << 10  # what Orbax writes beside the arrays, some kilobytes


class Checkpoints:
    """The checkpoints of one run, newest last; each appears only when it is whole.

    Opening them removes what a killed process left half written: only the run itself may do that,
    who else reads it uses `latest_step`.
    """

    def __init__(self, run: Path, *, keep: int | None = None):
        _quieten_orbax()
        self.run = run
        gained = lambda found: -found["validation_loss"]  # noqa: E731
        best = BestN(get_metric_fn=gained, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=gained,  # without it metrics are not written
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager((run / "checkpoints").absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        loader: Mapping[str, Any],
        found: Mapping[str, float] | None = None,
    ) -> None:
        """Write one checkpoint; the newest are kept and, of those with a validation loss in
        `found`, the best. Raises `UserError` where the disk is full; older ones survive."""
        if not _finite(state):
            kept = "none is kept yet" if self.latest is None else f"step {self.latest} is kept"
            raise UserError(
                f"After step {step} of {self.run} weights are NaN or infinite, and are not saved "
                f"({kept}); start a new run with a lower --learning-rate."
            )
        needed = sum(x.nbytes for x in jax.tree.leaves(state)) + _OVERHEAD
        free = shutil.disk_usage(self.run).free
        if free < needed:
            reason = f"it needs {decimal(needed)} and the disk has {decimal(free)} free"
            raise self._not_written(step, reason)
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(state), loader=ocp.args.JsonSave(dict(loader))
        )
        try:
            with _one_error():
                self._manager.save(step, args=parts, metrics=found, force=True)
        except Exception as error:  # tensorstore reports a full disk as ValueError or OSError
            self._discard_partial()
            raise self._not_written(step, _first_line(error)) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and loader position of `step`, with the shapes, types and shardings of `like`."""
        parts = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), loader=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=parts)
        except Exception as error:  # Orbax raises many kinds
            raise UserError(
                f"The checkpoint {self.run}/checkpoints/{step} cannot be read "
                f"({_first_line(error)}); delete that folder to go on from an older one."
            ) from error
        return restored.state, restored.loader

    def _not_written(self, step: int, reason: str) -> UserError:
        kept = "none is kept yet" if self.latest is None else f"step {self.latest} is kept"
        return UserError(
            f"The checkpoint of step {step} could not be written to {self.run} ({kept}): "
            f"{reason}; make room and run the same command again."
        )

    def _discard_partial(self) -> None:
        for _ in range(10):  # other threads may be writing into it for a moment yet
            for folder in (self.run / "checkpoints").glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)


@jax.jit
def _finite(state: Any) -> jax.Array:
    """Whether no weight or moment is NaN or infinite."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in floats], jnp.array(True))


def _quieten_orbax() -> None:
    """No remarks on its own doings; its errors are raised as well as logged."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def _one_error() -> Iterator[None]:
    """While Orbax writes with many threads, the first failure is raised; keep the others, which
    arrive when nobody listens any more, from being printed with their tracebacks.

    After a failure they may still arrive until the process ends, which it is about to do. What the
    main thread raises is shown all the same.
    """
    hooks = threading.excepthook, sys.unraisablehook
    threading.excepthook = sys.unraisablehook = lambda *_: None
    yield
    threading.excepthook, sys.unraisablehook = hooks


def kept_steps(run: Path) -> list[int]:
    """The steps of a run's whole checkpoints, in order, though it may be training just now."""
    return sorted(int(p.name) for p in run.glob("checkpoints/*") if p.name.isdecimal())


def latest_step(run: Path) -> int | None:
    """The step of the newest of them."""
    return max(kept_steps(run), default=None)


def validations(run: Path, last: int) -> dict[int, float]:
    """The validation loss of every step up to `last` that had one, by `metrics.jsonl`."""
    found = {}
    for entry in read_metrics(run):
        if entry["step"] <= last and math.isfinite(entry.get("validation_loss", math.nan)):
            found[entry["step"]] = entry["validation_loss"]
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_run(run: PathLike) -> dict[str, Any]:
    """The settings of a run, as `run.json` holds them. One of a newer wanjax is refused."""
    path = Path(run) / RUN_FILE
    try:
        data = json.loads(path.read_text())
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions.") from error
    except OSError as error:
        raise UserError(
            f"{run} is not a run of train.py (no {RUN_FILE}); check the path."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged; restore it from a copy of the run.") from error
    if not isinstance(data, dict) or data.get("format") != "wanjax-run":
        raise UserError(f"{path} was not written by wanjax; check the path.")
    if not isinstance(data.get("version", 1), int) or "train" not in data:
        raise UserError(f"{path} is damaged; restore it from a copy of the run.")
    if data.get("version", 1) > RUN_VERSION:
        raise UserError(
            f"{path} has version {data['version']} and this wanjax reads up to {RUN_VERSION}; "
            "update wanjax."
        )
    if data.get("version", 1) < 3:
        data["weights"] = data.pop("base", None)
    if isinstance(data.get("remat"), bool):
        data["remat"] = parse_remat(data["remat"])
    return data


def load_lora(path: PathLike) -> LoRA:
    """Adapters from a run or from a native adapter file.

    Of a run that is the newest checkpoint, `RUN@STEP` another that is kept, and `RUN@best` the one
    with the least validation loss. Raises `UserError` for anything else, and for NaN or infinity in
    a weight.
    """
    path, which = split_choice(Path(path))
    if not path.exists():
        raise UserError(f"There is no run or adapter file '{path}'; check the path.")
    if path.is_dir():
        lora = _lora_of_run(path, which)
    elif which is None:
        lora = _lora_of_file(path)
    else:
        raise UserError(f"{path} is a file and has no checkpoints; leave '@{which}' out.")
    for name, values in _tensors(lora).items():
        require_finite(values, name, path)
    return lora


def split_choice(path: Path) -> tuple[Path, str | None]:
    """`runs/film@best` as `(runs/film, "best")`, unless something has that very name."""
    name, at, which = path.name.rpartition("@")
    return (path.parent / name, which) if at and name and not path.exists() else (path, None)


def _step_of(run: Path, which: str | None) -> int:
    """The step of the checkpoint that was asked for."""
    kept = kept_steps(run)
    if not kept:
        raise UserError(f"{run} has no checkpoint yet; let it train for longer.")
    if which is None:
        return kept[-1]
    if which == "best":
        losses = {s: loss for s, loss in validations(run, kept[-1]).items() if s in kept}
        if not losses:
            raise UserError(
                f"{run} has no checkpoint with a validation loss; train with --validate-every, or "
                f"choose a step from {', '.join(map(str, kept))}."
            )
        return min(losses, key=losses.get)
    if not (which.isascii() and which.isdecimal()) or int(which) not in kept:
        choice = ", ".join(map(str, kept))
        raise UserError(f"{run} has no checkpoint '{which}'; choose from {choice}, or best.")
    return int(which)


def _lora_of_run(run: Path, which: str | None) -> LoRA:
    settings = read_run(run)
    if settings["train"] != "lora":
        raise UserError(f"{run} trained all weights and has no adapter; use its model/ folder.")
    step = _step_of(run, which)
    _quieten_orbax()
    folder = (run / "checkpoints" / str(step) / "state").absolute()
    try:
        reader = ocp.PyTreeCheckpointer()
        tree = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        params = reader.restore(folder, restore_args=as_numpy)["params"]
    except Exception as error:  # Orbax raises many kinds
        raise UserError(
            f"The checkpoint {folder.parent} cannot be read ({_first_line(error)}); choose another "
            f"as {run}@STEP."
        ) from error
    layers: dict[str, dict[str, np.ndarray]] = {}
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [str(part.key) for part in path]  # blocks, cross_attn, q, lora, down, value
        at = keys.index("lora")
        layers.setdefault(".".join(keys[1:at]), {})[keys[at + 1]] = value
    alpha = float(settings["alpha"])
    return LoRA(
        {role: LayerAdapter(w["down"], w["up"], alpha) for role, w in layers.items()},
        {"step": str(step), "preset": settings["preset"]},
    )


def save_lora(path: PathLike, lora: LoRA) -> None:
    """Write a native adapter file, whole or not at all."""
    tensors = _tensors(lora)
    header = {name: (np.dtype(np.float32), t.shape) for name, t in tensors.items()}
    numbered = {**lora.layers, **lora.changes}
    plain = not lora.changes and all(map(in_a_block, lora.layers))
    metadata = {
        **lora.metadata,
        "format": ADAPTER_FORMATS[0 if plain else 1],
        "alpha": json.dumps({name: adapter.alpha for name, adapter in lora.layers.items()}),
        "blocks": json.dumps({name: x.blocks for name, x in numbered.items() if x.blocks}),
    }
    with whole_file(Path(path)) as partial, SafetensorsWriter(partial, header, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _tensors(lora: LoRA) -> dict[str, np.ndarray]:
    """What a native file holds, by name."""
    pairs = {
        f"{_in_file(name)}.{part}": getattr(adapter, part)
        for name, adapter in lora.layers.items()
        for part in ("down", "up")
    }
    return pairs | {f"{name}.change": change.values for name, change in lora.changes.items()}


def _in_file(name: str) -> str:
    return f"{STACK}.{name}" if in_a_block(name) else name


def is_native_adapter(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is an adapter of ours."""
    return metadata.get("format") in ADAPTER_FORMATS


def _lora_of_file(path: Path) -> LoRA:
    file = read_safetensors(path)
    if not is_native_adapter(file.metadata):
        raise UserError(
            f"{path} is not a native adapter; open it with convert.open_lora({str(path)!r}), or "
            f"convert it: python -m convert lora {path} ADAPTER.safetensors --format native"
        )
    try:
        alphas = json.loads(file.metadata["alpha"])
        blocks = json.loads(file.metadata.get("blocks", "{}"))
        layers = {
            name: _layer_of_file(file.tensors, name, alphas[name], blocks.get(name))
            for name in alphas
        }
        changes = {
            name: _change_of_file(file.tensors[f"{name}.change"], name, blocks.get(name))
            for name in (t.removesuffix(".change") for t in file.tensors if t.endswith(".change"))
        }
        if not layers and not changes:
            raise ValueError("it names no layer")
    except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); export the adapter again.") from error
    except RecursionError as error:
        raise UserError(f"{path} is damaged; export the adapter again.") from error
    keep = {k: v for k, v in file.metadata.items() if k not in ("format", "alpha", "blocks")}
    return LoRA(layers, keep, changes)


def _layer_of_file(
    tensors: Mapping[str, np.ndarray], name: str, alpha: float, blocks: list[int] | None
) -> LayerAdapter:
    """One layer's adapter. Raises what `_lora_of_file` catches where its parts do not agree."""
    down, up = (np.array(tensors[f"{_in_file(name)}.{part}"]) for part in ("down", "up"))
    count, _, rank = down.shape
    if not count or not rank or up.shape[:2] != (count, rank) or not math.isfinite(alpha):
        raise ValueError(f"'{name}' has shapes {down.shape} and {up.shape} and alpha {alpha}")
    return LayerAdapter(down, up, float(alpha), _numbers(name, count, blocks))


def _change_of_file(tensor: np.ndarray, name: str, blocks: list[int] | None) -> Change:
    values = np.array(tensor)
    return Change(values, _numbers(name, len(values), blocks))


def _numbers(name: str, count: int, blocks: list[int] | None) -> tuple[int, ...] | None:
    if blocks is None:
        return None
    if len(blocks) != count or blocks != sorted({int(b) for b in blocks}) or blocks[0] < 0:
        raise ValueError(f"the blocks of '{name}' are not {count} ascending numbers")
    return tuple(blocks)


def check_resumable(
    run: Path,
    settings: Mapping[str, Any],
    saved: Mapping[str, Any],
    free: frozenset[str],
    defaults: Mapping[str, Any],
) -> None:
    """Refuse a resumed run whose settings differ, by name, except for those in `free`. A setting
    that an older run did not know has its default there."""
    saved = {**defaults, **saved}
    names = (settings.keys() | saved.keys()) - {"version"}
    for name in sorted(names, key=lambda name: (name != "train", name)):  # the others hang on it
        if name not in free and settings.get(name) != saved.get(name):
            raise UserError(
                f"{run} was started with {name}={saved.get(name)!r} and this command has "
                f"{settings.get(name)!r}; use the old value, or another --run for a new run."
            )
