"""Text and tables of JSON lines that people wrote: captions, `metadata.jsonl`, files of jobs.

Text is UTF-8 (with or without a byte order mark), or UTF-16 where its mark says so. A line ends at
`\\n` or `\\r\\n` and nowhere else: captions hold U+2028 and the like.
"""

import codecs
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from wanjax.errors import UserError

MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: Path) -> str:
    """The text in a file. Raises `UserError`, with the line, for what is no UTF-8."""
    try:
        data = path.read_bytes()
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the name.") from error
    try:
        text = data.decode(MARKS.get(data[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line} is not UTF-8 text; save the file again as UTF-8."
        ) from error
    if (at := text.find("\0")) >= 0:  # UTF-16 without its mark, or no text at all
        line = text.count("\n", 0, at) + 1
        raise UserError(f"{path}:{line} is not UTF-8 text; save the file again as UTF-8.")
    return text


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one a line, each after its place, `FILE:LINE`; blank lines are
    skipped. Raises `UserError` with that place for what is no object, holds NaN or an infinity,
    half of a surrogate pair, or a key twice."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _object(line, f"{path}:{number}")


def read_object(path: Path) -> dict[str, Any]:
    """The one JSON object that a file holds. Raises `UserError` as `read_objects` does."""
    return _object(read_text(path), str(path), "take the whole file, as it was written")


def whole_characters(text: str) -> str:
    """Halves of characters (lone surrogates) replaced by U+FFFD, two that belong together joined:
    what a command line gives for bytes that are no UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _object(line: str, where: str, remedy: str = "write one object a line") -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{where} has '{key}' twice; keep one.")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise UserError(f"{where} holds {constant[:24]}, which is no number; mend the line.")

    def finite(text: str) -> float:
        return value if math.isfinite(value := float(text)) else refuse(text)

    def whole(text: str) -> int:
        finite(text)
        return int(text)

    try:
        found = json.loads(
            line,
            object_pairs_hook=once,
            parse_constant=refuse,
            parse_float=finite,
            parse_int=whole,
        )
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(
            f"{where} holds half of a character ({half}); write the whole one, or leave it out."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); {remedy}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is not a JSON object; write {{...}} with keys and values.")
    return found
