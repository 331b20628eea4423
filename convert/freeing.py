"""`convert pipeline --delete-source`: each file of the source goes once its tensors are written.

The native folder grows in `DST.converting/out`. The files of the source are taken one after
another: a file's tensors are written to their places and synced to the disk, then a stand-in for
it goes to `DST.converting/freed` (a sparse file with its header and without its numbers, which
takes no room), then the file is deleted. So at every moment each tensor lies in the source or in
`out`, and the stand-ins say which: after a kill the same command plans from the headers as before,
leaves out what was freed, and goes on. Nothing is deleted before the whole plan has been made.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from convert.stream import Advance, Planned
from wanjax.errors import UserError
from wanjax.outputs import LOCK, alone, require_space, whole_file
from wanjax.tensor_files import (
    MappedFile,
    SafetensorsWriter,
    drop_pages,
    mapped_file,
    pieces,
    span,
)
from wanjax.weights import METADATA

_COPIED = 16 << 20  # bytes of a file at once


def unfinished(dst: Path) -> Path:
    """Where the work lies until it is whole."""
    return dst.with_name(f"{dst.name}.converting")


def refuse_unfinished(dst: Path) -> None:
    """Refuse to begin anew what was begun with --delete-source: its source is not whole."""
    if (found := unfinished(dst)).exists():
        raise UserError(
            f"{found} holds a conversion with --delete-source that has not ended; run the same "
            "command again, or choose another DST."
        )


@dataclass(frozen=True)
class Part:
    """One layer of a leaf, or all of it, and where in the leaf it begins."""

    network: str
    tensor: Planned
    view: np.ndarray
    at: int


class Freeing:
    """A conversion that frees its source; see the module."""

    def __init__(self, src: Path, dst: Path, settings: Mapping[str, object]):
        self.folder = unfinished(dst)
        self.out, self._freed = self.folder / "out", self.folder / "freed"
        self._note = self.folder / "command.json"
        self._links = self.folder / "links"
        self._wanted = {"source": str(src.absolute()), **settings}
        self._is_folder = src.is_dir()
        self._read_note()
        self._root = src if self._is_folder else src.parent
        self._src = src

    def _read_note(self) -> None:
        if not self._note.exists():
            return
        note = json.loads(self._note.read_text())
        self._is_folder = note.pop("is_folder")
        for name, value in note.items():
            if self._wanted.get(name) != value:
                raise UserError(
                    f"{self.folder} was begun with {name} {value} and not "
                    f"{self._wanted.get(name)}; run the command as it was."
                )

    @contextmanager
    def begun(self) -> Iterator[Path]:
        """While this is open no other process does the same; gives the source to read."""
        with alone(self.folder, "converting"):
            try:
                self._begin()
                yield self._source()
            except OSError as error:
                self._leave()
                raise UserError(
                    f"{self.folder} could not be written ({error.strerror or error}); make room "
                    "and run the same command again."
                ) from error
            except BaseException:
                self._leave()
                raise
            self._clear()

    def _begin(self) -> None:
        self._resumed = bool(self._stand_ins())
        if self._resumed:
            return
        self._clear()
        self.out.mkdir()
        with whole_file(self._note, replace=True) as partial:
            note = self._wanted | {"is_folder": self._is_folder}
            partial.write_text(json.dumps(note, indent=1))

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _leave(self) -> None:
        """After an error nothing remains, unless something was freed."""
        freed = self._stand_ins()
        if not freed:
            self._clear()
            return
        files = f"{len(freed)} file{'s' * (len(freed) > 1)}"
        sys.stderr.write(
            f"{files} of {self._src} converted and deleted, whose tensors are safe in "
            f"{self.folder}: the same command goes on from there\n"
        )

    def _stand_ins(self) -> list[Path]:
        return [p for p in self._freed.rglob("*") if p.is_file() and ".partial-" not in p.name]

    def _source(self) -> Path:
        """The source as it was, of links to what there is and to stand-ins."""
        if not self._resumed:
            return self._src
        shutil.rmtree(self._links, ignore_errors=True)
        files = self._src.rglob("*") if self._is_folder else [self._src]
        places = {file.relative_to(self._root): file for file in files if file.is_file()}
        places |= {file.relative_to(self._freed): file for file in self._stand_ins()}
        for place, file in places.items():
            link = self._links / place
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.absolute())
        self._root = self._links
        return self._links if self._is_folder else self._links / self._src.name

    def write(
        self,
        plans: Mapping[str, Sequence[Planned]],
        sources: Sequence[np.ndarray],
        advance: Advance,
    ) -> None:
        """Write all networks into `out`, and free every file of `sources`, the tensors read."""
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    SafetensorsWriter(
                        self.out / f"{name}.safetensors",
                        {t.name: (t.dtype, t.shape) for t in plan},
                        METADATA,
                        resume=self._resumed,
                    )
                )
                for name, plan in plans.items()
            }
            _sync(self.out)
            _sync(self.folder)
            for file, parts in parts_by_file(plans).items():
                done = file is not None and self._stand_in(file).exists()
                for part in parts:
                    _write(part, writers[part.network], advance, done)
                if file is None:
                    continue
                if not done:
                    for name in {part.network for part in parts}:
                        writers[name].sync()
                    self._leave_stand_in(file, sources)
                _free(self._original(file))

    def finish(self, dst: Path) -> None:
        """The native folder takes its place."""
        _sync(self.out)
        self.out.rename(dst)
        _sync(dst.parent)

    def check(self, plans: Mapping[str, Sequence[Planned]]) -> int:
        """Refuse, before anything is written, files whose deletion would free nothing or take what
        is not the source's own, and a disk without the room; the bytes of that."""
        files = [file for file in parts_by_file(plans) if file is not None]
        todo = [file for file in files if not self._stand_in(file).exists()]
        for file in todo:
            _refuse_links(self._original(file), self._src)
        needed = self._needed(plans)
        require_space(self.folder, needed)
        return needed

    def _needed(self, plans: Mapping[str, Sequence[Planned]]) -> int:
        """The most bytes that there will be more of than now."""
        grown = most = 0
        for file, parts in parts_by_file(plans).items():
            if file is not None and self._stand_in(file).exists():
                continue
            grown += sum(part.view.size * part.tensor.dtype.itemsize for part in parts)
            most = max(most, grown)
            if file is not None and self._original(file).stat().st_dev == _device(self.folder):
                grown -= self._original(file).stat().st_size
        return most

    def _place(self, file: MappedFile) -> Path:
        return file.path.relative_to(self._root)

    def _stand_in(self, file: MappedFile) -> Path:
        return self._freed / self._place(file)

    def _original(self, file: MappedFile) -> Path:
        return (self._src if self._is_folder else self._src.parent) / self._place(file)

    def _leave_stand_in(self, file: MappedFile, sources: Sequence[np.ndarray]) -> None:
        """A file of the same size with all but the numbers."""
        spans = sorted(span(a, file) for a in sources if a.size and mapped_file(a) is file)
        ends = [0, *(last for _, last in spans)]
        starts = [*(first for first, _ in spans), len(file)]
        with whole_file(self._stand_in(file)) as partial, partial.open("wb") as out:
            out.truncate(len(file))
            for first, last in zip(ends, starts):
                for at in range(first, last, _COPIED):
                    out.seek(at)
                    out.write(file[at : min(last, at + _COPIED)])
            out.flush()
            os.fsync(out.fileno())
        _sync(self._stand_in(file).parent)


def parts_by_file(plans: Mapping[str, Sequence[Planned]]) -> dict[MappedFile | None, list[Part]]:
    """All that is to be written, by the file that it lies in (None: in no file), in the order of
    the files' names."""
    found: dict[MappedFile | None, list[Part]] = {}
    for network, plan in plans.items():
        for tensor in plan:
            at = 0
            for view in tensor.parts:
                part = Part(network, tensor, view, at)
                found.setdefault(mapped_file(view), []).append(part)
                at += view.size
    return dict(sorted(found.items(), key=lambda item: str(item[0] and item[0].path)))


def _write(part: Part, writer: SafetensorsWriter, advance: Advance, done: bool) -> None:
    """One part to its place, or nothing where it lies there already."""
    dtype, at = part.tensor.dtype, part.at
    if done:
        writer.skip(part.view.size * dtype.itemsize)
        advance(part.view.size * dtype.itemsize)
        return
    for piece in pieces(part.view, dtype):
        writer.write(part.tensor.name, piece.view(dtype), at)
        at += piece.nbytes // dtype.itemsize
        advance(piece.nbytes)
        del piece  # or it would live on beside the next
    drop_pages(part.view)


def _free(file: Path) -> None:
    """Delete a file, and give back its room now: it is mapped, and would keep it till the end."""
    with suppress(FileNotFoundError), file.open("r+b") as opened:
        file.unlink()
        opened.truncate(0)


def _refuse_links(file: Path, src: Path) -> None:
    links = [p for p in (file, *file.parents) if p.is_symlink() and p != src and src in p.parents]
    if file.is_symlink() or links or file.stat().st_nlink > 1:
        raise UserError(
            f"{file} is a link, as in a cache of Hugging Face: deleting it frees nothing, and what "
            "it points to may be others'; leave --delete-source out, or use a folder of files of "
            "its own (hf download --local-dir)."
        )
    if not (os.access(file.parent, os.W_OK | os.X_OK) and os.access(file, os.W_OK)):
        raise UserError(
            f"{file} may not be deleted, as it or its folder may not be written to; leave "
            "--delete-source out, or change the permissions."
        )


def _device(folder: Path) -> int:
    return folder.stat().st_dev


def _sync(folder: Path) -> None:
    """The names in a folder outlive a loss of power."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def freed(sources: Sequence[np.ndarray]) -> str:
    """How much the files of these tensors have."""
    files = {file for a in sources if (file := mapped_file(a)) is not None}
    return decimal(sum(len(file) for file in files))
