"""Progress bars: one at a time."""

import pytest

from wanjax.progress import progress_bar


def test_a_bar_inside_another_is_not_shown(capsys):
    with progress_bar("outer", 2) as outer, progress_bar("inner", 2) as inner:
        inner.advance(2)
        outer.advance()
    with pytest.raises(ValueError), progress_bar("failed", 1):
        raise ValueError
    with progress_bar("later", 1) as bar:
        bar.advance()
    said = capsys.readouterr().err
    assert "outer" in said and "inner" not in said and "later" in said


def test_a_bar_inside_a_hidden_one_is_shown(capsys):
    with progress_bar("outer", 1, hidden=True), progress_bar("inner", 1) as bar:
        bar.advance()
    said = capsys.readouterr().err
    assert "inner" in said and "outer" not in said


def test_notes_are_shown_as_they_are(capsys):
    """Names of films hold brackets, which rich would take for its markup."""
    with progress_bar("films", 1) as bar:
        bar.advance(note="a [1080p] [/x]@0")
    assert "a [1080p] [/x]@0" in capsys.readouterr().err
