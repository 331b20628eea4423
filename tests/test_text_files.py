"""Text and tables: where lines end, what encodings are read, and errors that name the line."""

import pytest

from wanjax.errors import UserError
from wanjax.text_files import read_objects, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_only(tmp_path, encoding, end):
    odd = ["a\u2028b", "a\x85b", "a\x0bb\x0cc", "骑手"]
    lines = [f'{{"caption": "{text}"}}' for text in odd[:2]] + ["", '{"caption": "骑手"}']
    (tmp_path / "t.jsonl").write_bytes(end.join(lines).encode(encoding))
    read = list(read_objects(tmp_path / "t.jsonl"))
    assert [row["caption"] for _, row in read] == [odd[0], odd[1], odd[3]]
    assert [place.rpartition(":")[2] for place, _ in read] == ["1", "2", "4"]


@pytest.mark.parametrize(
    "data",
    [
        "骑手过河".encode("gbk"),
        "café".encode("cp1252"),
        "rider".encode("utf-16-le"),
        b"\xff\xfe\xff",
    ],
)
def test_other_encodings_are_named_with_the_line(tmp_path, data):
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"t\.txt:1 is not UTF-8 text; save"):
        read_text(tmp_path / "t.txt")
    if not data.startswith(b"\xff"):
        (tmp_path / "t.txt").write_bytes(b"good\n" + data)
        with pytest.raises(UserError, match=r"t\.txt:2 is not UTF-8 text"):
            read_text(tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2 is not JSON"),
        ("[1]", r":2 is not a JSON object"),
        ("[" * 100_000, r":2 is not JSON"),
        ('{"start": NaN}', r":2 holds NaN, which is no number"),
        ('{"start": [-Infinity]}', r":2 holds -Infinity"),
        ('{"start": 1e999}', r":2 holds 1e999"),
        ('{"start": 1' + "0" * 400 + "}", r":2 holds 10+, which is no number"),
        ('{"start": 1' + "0" * 9000 + "}", r":2 holds 10+, which is no number"),
        ('{"caption": "a \\ud83d smile"}', r":2 holds half of a character \(\\ud83d\)"),
        ('{"a": 1, "a": 2}', r":2 has 'a' twice"),
    ],
)
def test_faulty_lines_are_named(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_text('{"whole": "\\ud83d\\ude00"}\n' + line)
    with pytest.raises(UserError, match=message):
        list(read_objects(tmp_path / "t.jsonl"))


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"absent cannot be read \(No such file"):
        read_text(tmp_path / "absent")
    with pytest.raises(UserError, match="Is a directory"):
        read_text(tmp_path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match="may not be read; change its permissions"):
        read_text(tmp_path / "closed")
