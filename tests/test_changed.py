"""`make test-changed` runs what a change can touch, the tests of processes too, and no more."""

from pathlib import Path

import pytest

from tests.changed import touched

ALL = touched([Path("pyproject.toml")])


def names(*changed: str) -> set[str]:
    return {path.stem.removeprefix("test_") for path in touched(map(Path, changed))}


def test_settings_and_data_touch_every_test_and_pages_none():
    assert len(ALL) > 30 and all(path.name.startswith("test_") for path in ALL)
    for file in ("tests/conftest.py", "constraints.txt", "assets/anything.safetensors"):
        assert touched([Path(file)]) == ALL
    assert not names("README.md", "docs/train.md", "Makefile")


@pytest.mark.parametrize(
    ("changed", "some", "none"),
    [
        ("wanjax/data/video.py", {"video", "clips", "scripts"}, {"dit", "lora", "solvers"}),
        ("wanjax/flow.py", {"training", "sharding", "scripts_resume"}, {"vae", "convert"}),
        ("wanjax/rope.py", {"dit", "lora", "training", "pipeline", "scripts"}, {"video", "loader"}),
        ("wanjax/eval/lpips.py", {"lpips"}, {"bootstrap", "training", "scripts"}),
        ("tests/toy.py", {"training", "lora", "sharding"}, {"scripts", "video"}),
    ],
)
def test_who_imports_it_is_touched_and_others_are_not(changed, some, none):
    found = names(changed)
    assert found >= some | {"structure"} and not found & none


def test_what_is_reached_by_a_process_or_a_fixture_alone_is_touched():
    """train.py is started by its name, or has made the run that a fixture hands over."""
    assert names("train.py") >= {"scripts", "scripts_errors", "scripts_resume", "sharding"}
    assert names("sample.py") >= {"scripts", "scripts_errors"}
    assert "convert_memory" in names("convert/native.py")  # which it only ever starts
    assert "sharding" in names("encode.py")  # by the conftest, which makes its world


def test_a_deleted_file_touches_who_imported_it():
    assert "training" in names("wanjax/training.py") and names("wanjax/no_such.py") == {"structure"}
