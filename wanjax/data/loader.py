"""Batches from a features cache, through grain: shuffled anew each epoch, resumable exactly.

What is shuffled and cut into batches are the *indices*; each process then reads only its own rows.
So the global batch of a step depends on the seed and the step alone, not on the number of processes
or devices, and a run may resume on another mesh.
"""

import grain
import numpy as np

from wanjax.data.features import Example, Features
from wanjax.errors import UserError
from wanjax.types import Batch, Condition


def make_loader(
    features: Features,
    split: str = "train",
    *,
    batch: int,
    accumulate: int = 1,
    seed: int,
    repeat: bool = True,
    process: int = 0,
    processes: int = 1,
    data_parallel: int = 1,
) -> grain.DatasetIterator[Batch]:
    """An iterator of `Batch`es of NumPy arrays; `get_state` and `set_state` restore it exactly.

    With `accumulate` each holds so many batches of `batch` windows, one behind the other, and may
    reach over an epoch's end. `batch` is global: process `process` of `processes` gets its `batch /
    processes` consecutive rows of each. `data_parallel` is the number of devices that share a
    batch. With `repeat` it never ends, and epochs run into each other; without, it is one shuffled
    epoch whose last batch may be short. Raises `UserError`, with the numbers, for what does not
    divide or is too large.
    """
    source = features.source(split)
    _check(len(source), batch, repeat, processes, data_parallel, f"{features.path} ({split})")

    def read(indices: np.ndarray) -> Batch:
        rows = indices.reshape(accumulate, -1)
        mine = np.array_split(rows, processes, axis=1)[process]
        return collate([source[int(index)] for index in mine.ravel()])

    order = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    order = order.repeat() if repeat else order
    batches = order.batch(batch * accumulate, drop_remainder=repeat).map(read)
    # A batch is read at once by one thread; a few ahead hide the disk behind the step.
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(batches.to_iter_dataset(reading))


def collate(examples: list[Example]) -> Batch:
    """Examples stacked into one batch; what the model has not stays None."""

    def stack(key: str) -> np.ndarray | None:
        if examples[0][key] is None:
            return None
        return np.stack([example[key] for example in examples])

    return Batch(stack("latents"), Condition(stack("text"), stack("image"), stack("condition")))


def _check(
    count: int, batch: int, repeat: bool, processes: int, data_parallel: int, where: str
) -> None:
    if not 1 <= batch <= count:
        raise UserError(
            f"A batch of {batch} cannot be filled from the {count} windows of {where}; "
            f"choose 1 to {count}, or encode more."
        )
    for number, noun in ((processes, "processes"), (data_parallel, "data-parallel devices")):
        if batch % number:
            near = max(number, batch // number * number)
            raise UserError(
                f"A batch of {batch} does not divide among {number} {noun}; use {near}."
            )
        if not repeat and count % number:
            raise UserError(
                f"One pass over the {count} windows of {where} does not divide among {number} "
                f"{noun}; use a number that divides {count}."
            )
