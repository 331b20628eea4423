"""The Python in the documentation: it runs, against the signatures that there are."""

import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import convert
import wanjax.pipeline
from convert.lora import open_lora
from wanjax import Pipeline

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = {
    f"{page.name}:{number}": code
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


@pytest.mark.parametrize("code", SNIPPETS.values(), ids=SNIPPETS)
def test_snippets_run(code, monkeypatch):
    """Every name is there, and every call of a pipeline or of `open_lora` is one that it takes."""
    pipeline = mock.create_autospec(Pipeline, instance=True)
    pipeline.sample.return_value = np.zeros((33, 32, 48, 3), np.float32)
    load = mock.create_autospec(Pipeline.load, return_value=pipeline)
    monkeypatch.setattr(wanjax.pipeline.Pipeline, "load", load)
    monkeypatch.setattr(convert, "open_lora", mock.create_autospec(open_lora), raising=False)
    exec(compile(code, "snippet", "exec"), {})
    assert load.called


def test_the_readme_has_one():
    assert any(name.startswith("README") for name in SNIPPETS)
