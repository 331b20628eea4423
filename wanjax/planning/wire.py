"""Bytes that a compiled program puts on the wire, read from its text.

Counted is what one device sends if every collective runs as an ideal ring over `g` devices: of an
array of n bytes, an all-gather (its result), a reduce-scatter (its input) and an all-to-all send
`n (g-1)/g`, an all-reduce twice that, a permute n. A loop's body counts as often as it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

_BITS = {"pred": 8, "s8": 8, "u8": 8, "f8e4m3fn": 8}
_BITS |= {"bf16": 16, "f16": 16, "f32": 32, "s32": 32, "u32": 32}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z][a-z\d]*)\[([\d,]*)\]")
_SENT = {
    "all-gather": lambda n, g: n * (g - 1) / g,
    "reduce-scatter": lambda n, g: n * (g - 1),  # n is the result's, 1/g of the input's
    "all-to-all": lambda n, g: n * (g - 1) / g,
    "all-reduce": lambda n, g: 2 * n * (g - 1) / g,
    "collective-permute": lambda n, g: n,
}
KINDS = tuple(_SENT)


def collectives(text: str) -> Iterator[tuple[str, list[tuple[int, ...]], float, int]]:
    """`(kind, shapes, bytes sent at once, times)` for every collective that the program runs."""
    parts, entry = _computations(text)

    def walk(name: str, times: int) -> Iterator:
        goes_on = _goes_on(name, parts[name])
        for line in parts[name]:
            found = _LINE.match(line)
            if found is None:
                continue
            result, opcode, rest = found.groups()
            kind = opcode.removesuffix("-start")
            if kind in _SENT:
                if goes_on:
                    continue
                sizes = _arrays(result, opcode)
                n = sum(math.prod(shape) * bits // 8 for shape, bits in sizes)
                yield kind, [shape for shape, _ in sizes], _SENT[kind](n, _group(rest)), times
            elif opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", rest).group(1)
                yield from walk(body, times * _trips(rest, parts))
            elif not opcode.endswith(("-done", "-update")):
                for inner in _called(rest):
                    if inner in parts:
                        yield from walk(inner, times)

    yield from walk(entry, 1)


def sent(text: str) -> Counter:
    """Bytes that one device sends, by kind of collective."""
    total = Counter()
    for kind, _, bytes_sent, times in collectives(text):
        total[kind] += bytes_sent * times
    return total


def _goes_on(name: str, lines: list[str]) -> bool:
    """Whether a computation goes on with, or ends, a collective that another one started: so the
    text of a TPU's program has one three times where it overlaps with other work."""
    return name.startswith("async_collective_fusion") or any(
        '"AsyncCollectiveDone"' in line for line in lines
    )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    parts, name, entry = {}, None, None
    for line in text.splitlines():
        if found := _HEAD.match(line):
            name = found.group(1)
            parts[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name is not None:
            parts[name].append(line)
    return parts, entry


def _arrays(result: str, opcode: str) -> list[tuple[tuple[int, ...], int]]:
    """The arrays that a collective results in; one that only starts also names its operands."""
    arrays = [
        (tuple(int(n) for n in dims.split(",") if n), _BITS[kind])
        for kind, dims in _SHAPE.findall(result)
        if kind in _BITS
    ]
    if opcode == "collective-permute-start":
        return arrays[:1]
    if opcode in ("all-gather-start", "all-to-all-start", "reduce-scatter-start"):
        return arrays[len(arrays) // 2 :]
    return arrays


def _group(rest: str) -> int:
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
    return 1


def _trips(rest: str, parts: dict[str, list[str]]) -> int:
    if found := re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', rest):
        return int(found.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", rest).group(1)
    bounds = re.findall(r"constant\((\d+)\)", "\n".join(parts[condition]))
    return int(bounds[0]) if bounds else 1


def _called(rest: str) -> list[str]:
    names = re.findall(r"(?:calls|to_apply|called_computation)=%?([\w.\-]+)", rest)
    if found := re.search(r"branch_computations=\{([^}]*)\}", rest):
        names += re.findall(r"[\w.\-]+", found.group(1))
    return names
