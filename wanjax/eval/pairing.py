"""Which video belongs to which: by name, or by a table; and the prompts of videos."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from wanjax.errors import UserError, nearest, some
from wanjax.eval.significance import REAL
from wanjax.eval.videos import ClipFile
from wanjax.text_files import read_objects

FILE_KEYS, TEXT_KEYS = ("file", "out", "name"), ("prompt", "caption")


def read_prompts(path: Path) -> dict[str, str]:
    """Prompts by the name of their video, from JSON lines: {"file": "a.mp4", "prompt": "..."}.

    A data set's metadata.jsonl ("file", "caption") and the jobs of sample.py ("out", "prompt") are
    such files, too. Raises `UserError`, with the line, for one that lacks either, and for a video
    that has another prompt already.
    """
    found: dict[str, str] = {}
    for where, entry in read_objects(path):
        file = next((entry[key] for key in FILE_KEYS if isinstance(entry.get(key), str)), None)
        text = next((entry[key] for key in TEXT_KEYS if isinstance(entry.get(key), str)), "")
        if not file or not text.strip():
            raise UserError(
                f'{where} lacks a video or its prompt; write {{"file": "a.mp4", "prompt": "..."}}.'
            )
        if found.setdefault(_name(file), text) != text:
            raise UserError(f"{where} gives {file} a second prompt; keep one.")
    return found


def prompts_of(
    prompts: Mapping[str, str], sets: Mapping[str, Mapping[str, ClipFile]], path: Path
) -> dict[str, str]:
    """The prompt of every video in the sets, by its name; of one that lies in no folder below its
    set's also by the last part of the names in the file. Raises `UserError` that names the videos
    that have none, or one of several."""
    names = sorted({name for clips in sets.values() for name in clips})
    by_last: dict[str, set[str]] = {}
    for name, text in prompts.items():
        by_last.setdefault(PurePosixPath(name).name, set()).add(text)
    # A name with a folder has no such last part, so that no video gets that of another folder.
    found = {n: {prompts[n]} if n in prompts else by_last.get(n, set()) for n in names}
    missing = [name for name, texts in found.items() if not texts]
    doubtful = [name for name, texts in found.items() if len(texts) > 1]
    if missing:
        raise UserError(f"{path} has no prompt for {some(missing)}; add a line for each.")
    if doubtful:
        raise UserError(
            f"{path} has several prompts, of files in several folders, for {some(doubtful)}; give "
            "each a line with its name alone."
        )
    return {name: texts.pop() for name, texts in found.items()}


def paired_by(
    path: Path, sets: Mapping[str, Mapping[str, ClipFile]]
) -> dict[str, dict[str, ClipFile]]:
    """The sets with every video under the name of its real one, by a table of JSON lines:
    {"real": "a.mp4", "A": "x.mp4"}. Raises `UserError` for a line that names what is not there, or
    what another line pairs otherwise, and for a video whose name another one would take."""
    given: dict[str, dict[str, str]] = {label: {} for label in sets}  # new names by the old ones
    for where, entry in read_objects(path):
        if not isinstance(entry.get(REAL), str) or len(entry) < 2:
            raise UserError(f'{where} is no pair; write {{"real": "a.mp4", "A": "b.mp4"}}.')
        real = _found(entry[REAL], REAL, sets, where)
        for label, file in entry.items():
            if label == REAL:
                continue
            if label not in sets or not isinstance(file, str):
                raise UserError(f"{where} names the set '{label}'{nearest(label, sets)}")
            name = _found(file, label, sets, where)
            if name in given[label] or real in given[label].values():
                raise UserError(
                    f"{where} pairs {entry[REAL]} with {file} of {label}, and a line before has "
                    "paired one of the two; keep one line for each."
                )
            given[label][name] = real
    return {label: _renamed(label, clips, given[label], path) for label, clips in sets.items()}


def _renamed(
    label: str, clips: Mapping[str, ClipFile], given: Mapping[str, str], path: Path
) -> dict[str, ClipFile]:
    """The clips under the names given; the others keep theirs."""
    displaced = sorted((set(given.values()) & set(clips)) - set(given))
    if displaced:
        raise UserError(
            f"{path} gives other videos of {label} the names of {some(displaced)}, which it does "
            "not pair; add a line for each, or take them out of the folder."
        )
    names = {name: given.get(name, name) for name in clips}
    return {new: replace(clips[old], name=new) for old, new in names.items()}


def unpaired(sets: Mapping[str, Mapping[str, ClipFile]]) -> list[str]:
    """Sentences that name the videos of each set that have no real one, and the real ones that have
    none in the set."""
    said = []
    for label, clips in sets.items():
        strays, lacking = sorted(set(clips) - set(sets[REAL])), sorted(set(sets[REAL]) - set(clips))
        if strays:
            said.append(f"{label}: no real video has the name of {some(strays)}.")
        if lacking:
            said.append(f"{label}: no video has the name of the real {some(lacking)}.")
    return said


def _found(file: str, label: str, sets: Mapping[str, Mapping[str, ClipFile]], where: str) -> str:
    name = _name(file)
    if name not in sets[label]:
        raise UserError(f"{where} names {file}, which is not in {label}; mend the line.")
    return name


def _name(file: str) -> str:
    return PurePosixPath(file).with_suffix("").as_posix()
