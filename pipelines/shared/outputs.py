# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What programs write: unique names planned first, folders that are whole or absent, and only their own replaced.

A folder that a program has written holds a marker, `.gpstoken.json`:

    {"program": "pipelines.reconstruct", "format": 1, "files": ["panel.png", ...]}

The program is the one that may replace the folder, the files are those that it wrote there. Whatever is not listed
belongs to somebody else and is never deleted.

Everything is written in a staging folder beside its target, `.gpstoken-<hash of the target's name>`, and moved into
place when it is whole. A process that writes holds a lock on the marker of its staging folder. The lock of a killed
process is gone, so the next process that writes the same target knows that the folder is left over and removes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from safetensors import SafetensorError

from .programs import ProgramError

try:
    import fcntl
except ImportError:  # Windows: what a killed run leaves behind has to be removed by hand
    fcntl = None  # type: ignore[assignment]

MARKER = ".gpstoken.json"
FORMAT = 1
STAGING_PREFIX = ".gpstoken-"
MAX_NAME_BYTES = 255

# Errors of the disk, not of one file: nothing else could be written either.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class OutputError(ProgramError):
    """The output cannot be written: the disk is full or read-only. Every other file of a batch would fail too."""


class BusyError(ProgramError):
    """Another run is writing the output at this moment."""


# ---------------------------------------------------------------------------------------------------- planning names


def plan_names(
    candidates: Mapping[str, Sequence[str]], reserved: Iterable[str] = (), suffixes: Sequence[str] = ("",)
) -> dict[str, str]:
    """A name for the result of each input, before any work is done.

    No two names are equal, not even where case is ignored, and none lies inside another. Names do not depend on the
    order of the inputs. An input takes its first candidate that does not clash with another input, and after its last
    one a name made unique by a hash of its key.

    Args:
        candidates (`Mapping[str, Sequence[str]]`):
            For the key of each input (its absolute path) relative paths with `/`, in order of preference.
        reserved (`Iterable[str]`, *optional*, defaults to none):
            Relative paths of files that no result may replace, contain or lie in.
        suffixes (`Sequence[str]`, *optional*, defaults to `("",)`):
            Each result is one file or folder for each of these suffixes, all of them with its name.

    Returns:
        `dict[str, str]`: For each key the name of its result.
    """
    longest = max(len(os.fsencode(suffix)) for suffix in suffixes)
    choices = {key: [*names, _hashed_name(names[-1], key, longest)] for key, names in candidates.items()}
    levels = dict.fromkeys(choices, 0)
    taken = {_comparable(name) for name in (*reserved, MARKER)}
    taken_parents = {path[:length] for path in taken for length in range(1, len(path))}
    while True:
        names = {key: [choices[key][level] + suffix for suffix in suffixes] for key, level in levels.items()}
        used = Counter(_comparable(name) for group in names.values() for name in group)
        parents = {path[:length] for path in used for length in range(1, len(path))}

        clashing = {
            key
            for key, group in names.items()
            for name, path in zip(group, map(_comparable, group))
            if used[path] > 1
            or path in parents
            or path in taken_parents
            or any(path[:length] in taken for length in range(1, len(path) + 1))
            or any(path[:length] in used for length in range(1, len(path)))
            or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in name.split("/"))
        }
        clashing = {key for key in clashing if levels[key] + 1 < len(choices[key])}
        if not clashing:
            return {key: choices[key][level] for key, level in levels.items()}
        for key in clashing:
            levels[key] += 1


def _comparable(name: str) -> tuple[str, ...]:
    """Equal for names that some file system takes for one."""
    return tuple(unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).split("/"))


def _hashed_name(name: str, key: str, room: int) -> str:
    """A name made of another, with `room` bytes left for a suffix."""
    suffix = "-" + _name_hash(key)
    flat = name.replace("/", "-")
    while len(os.fsencode(flat)) > MAX_NAME_BYTES - len(suffix) - room:
        flat = flat[:-1]
    return flat + suffix


def _name_hash(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:12]


# ----------------------------------------------------------------------------------------------------------- markers


@dataclass(frozen=True)
class Marker:
    """Who has written a folder, and which of its files, as relative paths with `/`. Empty folders end in `/`."""

    program: str
    files: frozenset[str]


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder; `None` where there is none that this module has written."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return None
        program, files = content["program"], content["files"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(program, str) or not isinstance(files, list) or not all(isinstance(f, str) for f in files):
        return None
    return Marker(program, frozenset(files))


def is_staged(path: Path) -> bool:
    """True if `path` is, or lies in, a staging folder."""
    return any(part.startswith(STAGING_PREFIX) for part in path.parts)


def _write_marker(folder: Path, marker: Marker, staging: Path) -> None:
    content = {"program": marker.program, "format": FORMAT, "files": sorted(marker.files)}
    whole = staging / MARKER
    whole.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    whole.replace(folder / MARKER)


def _entries(folder: Path) -> Iterator[str]:
    """Every file, symbolic link and empty folder below `folder`, but neither its marker nor left-over staging."""
    for parent, folders, files in os.walk(folder, onerror=_raise_unless_gone):
        place = Path(parent)
        links = [name for name in folders if (place / name).is_symlink()]
        folders[:] = [name for name in folders if name not in links and not _is_staging(place / name)]
        if not files and not folders and not links and place != folder:
            yield place.relative_to(folder).as_posix() + "/"
        for name in (*files, *links):
            relative = (place / name).relative_to(folder).as_posix()
            if relative != MARKER:
                yield relative


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # another run may remove a folder
        raise error


def _first_foreign(folder: Path, program: str) -> str | None:
    """An entry of `folder` that `program` has not written, if there is any."""
    marker = read_marker(folder)
    files = marker.files if marker is not None and marker.program == program else frozenset()
    # A folder that was to hold one of the files may be empty after a killed run.
    written = files.union(f"{parent.as_posix()}/" for file in files for parent in PurePosixPath(file).parents)
    foreign = next((entry for entry in _entries(folder) if entry not in written), None)
    return MARKER if foreign is None and marker is None and os.path.lexists(folder / MARKER) else foreign


def _check_replaceable(folder: Path, program: str, shown: Path) -> None:
    foreign = _first_foreign(folder, program)
    if foreign is not None:
        raise ProgramError(
            f"the output {shown} must be written by {program} to be replaced, got a folder that also holds {foreign}"
        )


# ------------------------------------------------------------------------------------------- whole folders and files


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], overwrite: bool = False, program: str = "gpstoken_hf"
) -> Iterator[Path]:
    """A new folder that appears at `path`, with a marker, only when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`): Where the folder appears. Its parents are created.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace a folder of which `program` has written every file.
        program (`str`, *optional*, defaults to `"gpstoken_hf"`): Module name of the program, for the marker.

    Raises:
        ProgramError: If `path` exists and is not an empty folder, unless it may be replaced; if another run is
            writing it (`BusyError`); if the disk is full or read-only (`OutputError`).
    """
    path = Path(os.path.realpath(path))
    with _staging(path) as staging:
        check_free(path, overwrite, program)
        content = staging / "new" / path.name
        with _disk_errors(path):
            content.mkdir()
            yield content
            entries = frozenset(_entries(content))
            for entry in entries:
                _make_readable(content / entry)
            _write_marker(content, Marker(program, entries), staging / "new")
        _move_into_place(content, path, staging, overwrite, program)


def check_free(path: Path, overwrite: bool, program: str) -> None:
    """Check that `atomic_directory` may write the folder, before any work is done; arguments and errors as there."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ProgramError(f"the output {path} must not exist or be an empty folder, got a file")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise ProgramError(f"the output {path} must not exist or be an empty folder, got one that is not empty")
    _check_replaceable(path, program, path)


def _move_into_place(content: Path, path: Path, staging: Path, overwrite: bool, program: str) -> None:
    if overwrite and path.exists():
        # Checked again where nobody adds to it any more. `_discard` moves it back if anything fails from here on.
        path.rename(staging / "old")
        _check_replaceable(staging / "old", program, path)
    content.rename(path)


@contextmanager
def atomic_file(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """A temporary path, of the same name, that takes the place of `path` only when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`): Where the file appears. Its parents are created.
        overwrite (`bool`, *optional*, defaults to `True`):
            Replace a file. Pass `False` for a file that the user names: nothing says who has written the one there.

    Raises:
        ProgramError: If `path` exists and must not be replaced; if another run is writing it; if the disk is full or
            read-only.
    """
    path = Path(path)
    if not overwrite and os.path.lexists(path):
        raise ProgramError(f"the output {path} must not exist yet, got a file or folder")
    with _staging(path) as staging:
        content = staging / "new" / path.name
        with _disk_errors(path):
            yield content
            _make_readable(content)
            content.replace(path)


def _make_readable(file: Path) -> None:
    """Give a file the usual permissions. Some savers write files that only their owner may read."""
    if file.is_file() and not file.is_symlink():
        mask = os.umask(0)
        os.umask(mask)
        file.chmod(0o666 & ~mask)


# ---------------------------------------------------------------------------------------- folders that grow


class OwnDirectory:
    """A folder that one run of a program fills file by file; see `own_directory`.

    Attributes:
        path (`Path`): The folder.
        is_temporary (`bool`): Whether the folder goes when the run ends and it is empty.
    """

    def __init__(self, path: Path, program: str, staging: Path, is_temporary: bool):
        self.path, self._program, self._staging, self.is_temporary = path, program, staging, is_temporary

    @property
    def files(self) -> frozenset[str]:
        """The files that the program has written or is going to write, as relative paths with `/`."""
        marker = read_marker(self.path)
        return marker.files if marker is not None and marker.program == self._program else frozenset()

    def expect(self, files: Iterable[str]) -> None:
        """Add to the list of files that the program writes. To be called before they are written.

        Raises:
            ProgramError: If one of them is not free; see `check_free`.
        """
        files = frozenset(files)
        self.check_free(files)
        wanted = Marker(self._program, self.files.union(files))
        if wanted != read_marker(self.path):
            with _disk_errors(self.path):
                _write_marker(self.path, wanted, self._staging / "new")

    def check_free(self, files: Iterable[str]) -> None:
        """Raise a ProgramError if one of these files is there and the program has not written it."""
        foreign = next((name for name in sorted({*files} - self.files) if os.path.lexists(self.path / name)), None)
        if foreign is not None:
            raise ProgramError(
                f"the output {self.path / foreign} must not exist or be written by {self._program}, got another file"
            )

    def clear(self) -> None:
        """Put aside every file that the program has written here. They go when the run ends.

        If the run ends because the disk is full, what it has written goes instead, and they come back.

        Raises:
            ProgramError: If the folder holds anything else. Nothing is moved then.
        """
        _check_replaceable(self.path, self._program, self.path)
        with _disk_errors(self.path):
            shutil.copyfile(self.path / MARKER, self._staging / "new" / MARKER)
            self._put_aside.mkdir()
            (self._staging / "new" / MARKER).replace(self._put_aside / MARKER)
            _move_listed(self.path, self._put_aside, self.files)
            _delete_listed(self.path, ())  # empty folders, and what killed runs have left
            # A folder stays where a killed run still holds its lock: the process may not be quite gone.
            _write_marker(self.path, Marker(self._program, frozenset(_entries(self.path))), self._staging / "new")

    def _restore(self) -> None:
        if not self._put_aside.exists():
            return
        written = self.files
        (self._put_aside / MARKER).replace(self.path / MARKER)
        _delete_listed(self.path, written)
        _move_listed(self._put_aside, self.path, self.files)

    @property
    def _put_aside(self) -> Path:
        return self._staging / "put_aside"

    def remove(self) -> None:
        """Delete every file that the program has written here, and at the end the folder if nothing else is in it."""
        _delete_listed(self.path, self.files)
        self.is_temporary = True


@contextmanager
def own_directory(path: str | os.PathLike[str], program: str) -> Iterator[OwnDirectory]:
    """Hold a folder for one run of `program`, which resumes where another run of it has stopped.

    Args:
        path (`str` or `os.PathLike`): The folder. It is created, and marked, if need be.
        program (`str`): Module name of the program, for the marker.

    Raises:
        ProgramError: If `path` is not empty and not marked by `program`; if another run holds it; if it cannot be
            written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise ProgramError(f"the output {path} must be a folder, got a file")
    marker = read_marker(path)
    is_marked = marker is not None and marker.program == program
    foreign = _first_foreign(path, program) if path.exists() and not is_marked else None
    if foreign is not None:
        raise ProgramError(
            f"the output {path} must be new, empty or written by {program}, got a folder that holds {foreign}"
        )
    is_new = not path.exists()
    folder = None
    try:
        with _staging(path / MARKER, shown=path) as staging:
            folder = OwnDirectory(path, program, staging, is_temporary=is_new)
            folder.expect(())
            sweep(path)
            try:
                with _disk_errors(path):
                    yield folder
            except OutputError:
                folder._restore()
                raise
            finally:
                shutil.rmtree(staging / "put_aside", ignore_errors=True)
                if folder.is_temporary and next(_entries(path), None) is None:
                    (path / MARKER).unlink(missing_ok=True)
    finally:
        if folder is not None and folder.is_temporary:
            with suppress(OSError):  # not empty
                path.rmdir()


def claim_file(path: Path, program: str) -> None:
    """Make sure that `program` may write the file `path` in a folder that may also hold other things.

    The file is listed in the marker of its folder, so that the program may replace it later.

    Raises:
        ProgramError: If the file exists and `program` has not written it; if the folder is another program's.
    """
    marker = read_marker(path.parent)
    if marker is not None and marker.program == program and path.name in marker.files:
        remove_left_over(path.parent / MARKER)
        return
    if marker is not None and marker.program != program:
        raise ProgramError(f"the output {path.parent} must not be another program's, got one of {marker.program}")
    if os.path.lexists(path):
        raise ProgramError(f"the output {path} must not exist or be written by {program}, got another file")
    with _staging(path.parent / MARKER, shown=path) as staging, _disk_errors(path):
        known = frozenset() if marker is None else marker.files
        _write_marker(path.parent, Marker(program, known | {path.name}), staging / "new")


def _move_listed(source: Path, target: Path, files: Iterable[str]) -> None:
    """Move files by name to another folder of the same file system."""
    listed = frozenset(files)
    for entry in list(_entries(source)):
        if entry in listed and not entry.endswith("/"):
            (target / entry).parent.mkdir(parents=True, exist_ok=True)
            (source / entry).replace(target / entry)


def _delete_listed(folder: Path, files: Iterable[str]) -> None:
    """Delete staging that killed runs have left, files by name, then the folders that this leaves empty."""
    sweep(folder)
    listed = frozenset(files)
    for entry in list(_entries(folder)):  # what is there, so that no name can lead out of the folder
        if entry in listed and not entry.endswith("/"):
            (folder / entry).unlink()
    places = []
    for parent, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not _is_staging(Path(parent) / name)]
        places += [Path(parent) / name for name in folders]
    for place in reversed(places):
        with suppress(OSError):  # not empty, or a symbolic link
            place.rmdir()


# ----------------------------------------------------------------------------------------------------------- staging


def remove_left_over(path: Path) -> None:
    """Remove what a killed run has left beside `path`, for a result that is whole and not written again."""
    path = Path(os.path.realpath(path))
    if _is_staging(staging_folder(path)):
        _remove_left_over(staging_folder(path))


def sweep(folder: Path) -> None:
    """Remove what killed runs have left anywhere in `folder`."""
    for parent, folders, _ in os.walk(folder):
        for name in [name for name in folders if _is_staging(Path(parent) / name)]:
            folders.remove(name)
            _remove_left_over(Path(parent) / name)


def staging_folder(target: Path) -> Path:
    """The folder in which `target` is made, a sibling."""
    return target.parent / f"{STAGING_PREFIX}{_name_hash(target.name)}"


@contextmanager
def _staging(target: Path, shown: Path | None = None) -> Iterator[Path]:
    """Hold the staging folder of `target`, empty but for its marker and a folder `new`; remove it afterwards."""
    shown = target if shown is None else shown
    folder = staging_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _take(folder, target, shown)
    except OSError as error:
        raise OutputError(f"cannot write {shown}: {error.strerror or error}") from error
    if fcntl is None:  # an open file cannot be removed there
        lock.close()
    try:
        with _disk_errors(shown):
            (folder / "new").mkdir()
        yield folder
    finally:
        _discard(folder, target)
        lock.close()


def _take(folder: Path, target: Path, shown: Path) -> IO[bytes]:
    """Create or take over a staging folder; returns its marker, opened and locked."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        if not _is_staging(folder) and os.path.lexists(folder):
            raise ProgramError(f"{folder} must not exist or be left by a killed run, got something else")
        try:
            lock = os.fdopen(os.open(folder / MARKER, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except FileNotFoundError:  # another run was about to remove the folder
            continue
        try:
            is_new = not lock.read(1)
            locked = try_lock(lock)
            if locked is False or (locked is None and not is_new):
                kind = BusyError if locked is False else ProgramError
                raise kind(f"{shown} is being written by another run (if by none, remove {folder})")
            if not _is_at(lock, folder / MARKER):  # removed, and perhaps made anew, before the lock was ours
                lock.close()
                continue
            try:
                _empty(folder, target)
                lock.seek(0)
                lock.truncate()
                lock.write(json.dumps({"staging_of": target.name, "format": FORMAT}).encode())
            except BaseException:
                _discard(folder, target)
                raise
            return lock
        except BaseException:
            lock.close()
            raise


def _remove_left_over(folder: Path) -> None:
    """Remove a staging folder unless a process holds it, this one included."""
    with suppress(OSError), (folder / MARKER).open("r+b") as lock:
        if try_lock(lock) and _is_at(lock, folder / MARKER):
            _discard(folder, _target_of(folder))


def _target_of(staging: Path) -> Path | None:
    """What a staging folder was made for, by its marker."""
    try:
        name = json.loads((staging / MARKER).read_bytes())["staging_of"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    target = staging.parent / name if isinstance(name, str) else None
    return target if target is not None and staging_folder(target) == staging else None


def _is_staging(folder: Path) -> bool:
    """True for a folder with the name of a staging folder that holds nothing but what one holds."""
    if not folder.name.startswith(STAGING_PREFIX) or folder.is_symlink() or not folder.is_dir():
        return False
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:  # another run has just removed the folder
        return True
    if names <= {MARKER}:  # a process can be killed before the marker is whole, but writes nothing else before
        return True
    if MARKER not in names or not names <= {MARKER, "new", "old", "put_aside"}:
        return False
    try:
        return json.loads((folder / MARKER).read_bytes())["format"] == FORMAT
    except FileNotFoundError:  # another run is removing the folder
        return _is_staging(folder)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def try_lock(file: IO[bytes]) -> bool | None:
    """Lock a file without waiting. True: locked. False: another process holds it. None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _empty(folder: Path, target: Path | None) -> None:
    """Remove what a staging folder holds but its marker."""
    old = folder / "old"
    if target is not None and old.exists() and not os.path.lexists(target):
        old.rename(target)  # the run ended between the two moves that replace a folder
    for place in (folder / "new", folder / "put_aside", old):
        if place.exists():
            shutil.rmtree(place)


def _discard(folder: Path, target: Path | None) -> None:
    # The marker goes last: as long as there is anything else, it says whose it is.
    with suppress(OSError):  # what is left is removed by the next run
        _empty(folder, target)
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk, from whichever library, into an OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(match[1])
        if number not in DISK_ERRORS:
            raise
        raise OutputError(f"cannot write {path}: {os.strerror(number)}") from error
