"""Files of this library: written atomically, and read within bounds.

Everything that is saved goes through `write`: plans, models, checkpoints, predictions, plots.
Readers check sizes, depths and checksums before they use a file, and raise `FileError` for any
fault in it, which names the file and says what to do. No reader runs code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from restrain.errors import FileAccessError, FileError, MissingFileError
from restrain.extras import needing

try:
    import fcntl
except ImportError:  # Windows: open files can't be removed
    fcntl = None  # type: ignore[assignment]

MOST, DEEPEST = 1_000_000, 1_000  # bounds on values and levels of nested data
_CHECKSUM = "checksum"  # in the header of a safetensors file
_WAYS_OUT = {
    errno.ENOTDIR: "name a file in a folder",
    errno.ENOSPC: "make room there, or write elsewhere",
    errno.EDQUOT: "make room there, or write elsewhere",
    errno.EACCES: "ask for permission, or name another file",
    errno.EPERM: "ask for permission, or name another file",
    errno.EROFS: "name a file on another disk",
    errno.EISDIR: "name a file in it",
}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}


# ---------------------------------------------------------------- paths


def as_path(path: Any) -> Path:
    """Return a path, given text or an `os.PathLike`.

    Raises:
        FileError: it is neither.
    """
    try:
        text = os.fsdecode(path)
    except (TypeError, ValueError) as error:
        raise FileError(f"a path is text or a pathlib.Path; got {type(path).__name__}") from error
    if "\0" in text:
        raise FileError(f"a path has no null character; got {text!r:.200}")
    return Path(text)


def _denied(path: Path, done: str, error: OSError) -> FileAccessError:
    """Return the error for a path that the system refuses to read or write."""
    way_out, reason = _WAYS_OUT.get(error.errno or 0, ""), str(error.strerror or error).rstrip(".")
    folder = os.path.dirname(path)
    if error.errno == errno.ENOENT and not os.path.isdir(folder):
        reason, way_out = f"the folder {folder} doesn't exist", "create it first"
    found = FileAccessError(f"{path} can't be {done}: {reason}{'; ' * bool(way_out)}{way_out}")
    found.errno = error.errno
    return found


# ---------------------------------------------------------------- writing


def write(path: Any, content: bytes | Callable[[BinaryIO], object], *, synced: bool = True) -> Path:
    """Write a file atomically; return its path.

    The content goes into a temporary file in the same folder, is synced to the disk, and gets the
    file's name last. Temporary files of killed processes for this file are removed.

    Args:
        path: the file; links are followed. A pipe or another irregular file is written to directly.
        content: the bytes, or a function that writes them to an open binary file.
        synced: wait until the disk has it; False for files that go with the process.

    Returns:
        The path without links.

    Raises:
        FileAccessError: no such folder, no space or no permission; the old file is unchanged.
    """
    target = Path(os.path.realpath(as_path(path)))
    try:
        if target.exists() and not target.is_file():
            with open(target, "wb") as file:
                _put(content, file)
        else:
            _replace(target, content, synced)
    except FileError:
        raise
    except OSError as error:
        raise _denied(target, "written", error) from error
    return target


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, unless it exists.

    Raises:
        FileAccessError: the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _denied(folder, "made", error) from error


def _put(content: bytes | Callable[[BinaryIO], object], file: Any) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content)


def _replace(target: Path, content: bytes | Callable[[BinaryIO], object], synced: bool) -> None:
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    if mode is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    _clear(target)
    temporary, file = _temporary(target)
    try:
        with file:
            _put(content, file)
            file.flush()
            if synced:
                os.fsync(file.fileno())
            if mode is not None:
                os.chmod(temporary, mode)
            if fcntl is not None:
                os.replace(temporary, target)  # while locked
        if fcntl is None:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if synced:
        with contextlib.suppress(OSError):  # not supported by every file system
            _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Sync a folder's names to the disk."""
    if fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _stem(target: Path) -> str:
    """Return the prefix of a file's temporaries; names have at most 255 bytes."""
    name = os.fsencode(target.name)
    return f".{target.name if len(name) < 200 else hashlib.sha256(name).hexdigest()}."


def _temporary(target: Path) -> tuple[Path, Any]:
    """Return a new file, open and locked, so that no process takes it for a dead one's."""
    while True:
        path = target.with_name(f"{_stem(target)}{os.urandom(4).hex()}.unfinished")
        file = open(path, "xb")  # noqa: SIM115
        if _is_locked(file) is not False and os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # removed by another process's cleaning


def _is_locked(file: Any) -> bool | None:
    """Lock a file; False if another process holds the lock, None without support for locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _clear(target: Path) -> None:
    """Remove temporaries of a file whose processes are dead: locks end with their process."""
    name = re.compile(re.escape(_stem(target)) + r"[0-9a-f]{8}\.unfinished")
    with os.scandir(target.parent) as entries:
        left = [entry.path for entry in entries if name.fullmatch(entry.name)]
    for path in left:
        with contextlib.suppress(OSError):  # removed by another process; open on Windows
            if fcntl is None:
                os.unlink(path)
                continue
            with open(path, "rb") as file:
                if _is_locked(file):
                    os.unlink(path)


# ---------------------------------------------------------------- reading


@contextlib.contextmanager
def opened(path: Any) -> Iterator[BinaryIO]:
    """Return a context with the file open for reading.

    Raises:
        MissingFileError: there is no such file.
        FileError: it can't be opened or read, or needs more memory than there is.
    """
    found = as_path(path)
    try:
        with open(found, "rb") as file:
            yield file
    except FileError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"no file {found}: expected one that was saved there") from error
    except OSError as error:
        raise _denied(found, "read", error) from error
    except MemoryError as error:
        raise FileError(f"{found} needs more memory than there is") from error


def written_at(path: Any) -> int:
    """Return the time of the last change, in nanoseconds.

    Raises:
        MissingFileError, FileAccessError: there is no such file, or it can't be opened.
    """
    with opened(path) as file:
        return os.fstat(file.fileno()).st_mtime_ns


def read(path: Any, most: int | None = None) -> bytes:
    """Return the content of a file of at most `most` bytes.

    Raises:
        MissingFileError: there is no such file.
        FileError: it can't be read, or is larger.
    """
    with opened(path) as file:
        content = file.read() if most is None else file.read(most + 1)
    if most is not None and len(content) > most:
        raise FileError(f"{path} has more than {most:,} bytes, which no such file has: name another")
    return content


def check_tree(data: Any, where: str, most: int = MOST, deepest: int = DEEPEST) -> None:
    """Check the numbers of values and levels of nested data; repeated lists count each time.

    Raises:
        FileError: there are too many.
    """
    waiting, count = [(data, 0)], 1
    while waiting:
        value, depth = waiting.pop()
        members = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        count += len(members)
        if count > most:
            raise FileError(f"{where} holds more than {most:,} values, lists that are repeated counted each time")
        if depth > deepest:
            raise FileError(f"{where} is nested more than {deepest:,} levels deep")
        waiting += [(member, depth + 1) for member in members]


def damaged(path: object, why: object) -> FileError:
    """Return the error for a file whose content was changed."""
    return FileError(f"{path} is damaged: {why}; write it anew, or fetch it again")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# ---------------------------------------------------------------- torch.save


def write_torch(path: Any, data: Any, *, synced: bool = True) -> Path:
    """Write plain data and tensors by torch.save, with a CRC-32 of each part; return the path.

    `synced` is that of `write`.

    Raises:
        FileAccessError: see `write`.
    """
    buffer = io.BytesIO()
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(data, buffer)
    finally:
        torch.serialization.set_crc32_options(checked)
    return write(path, buffer.getvalue(), synced=synced)


def read_torch(path: Any) -> Any:
    """Return plain data and tensors written by torch.save, on the CPU; classes are refused.

    No code in the file is run.

    Raises:
        MissingFileError: there is no such file.
        FileError: it is cut off, damaged or foreign, or holds something else.
    """
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        _check_zip(file, size, path)
        file.seek(0)
        try:
            data = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # any error of pickle, zip and torch
            raise FileError(f"{path} isn't a file of data and tensors by torch.save: {_said(error)}") from error
    check_tree(data, str(path))
    _check_storages(data, size, path)
    return data


def _said(error: Exception) -> str:
    """Return torch.load's message without its advice to run the code in the file."""
    _, mark, rest = str(error).partition("WeightsUnpickler error: ")
    return rest.splitlines()[0][:300] if mark and rest.strip() else first_line(error)


def _check_zip(file: BinaryIO, size: int, path: Any) -> None:
    """Check sizes and CRC-32 of an archive's parts, which torch doesn't."""
    try:
        if not zipfile.is_zipfile(file):
            return  # torch before 1.6, or truncated, which torch reports
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) < len(members):
                raise damaged(path, "two parts of it have one name")
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
                raise FileError(f"{path} isn't a file by torch.save, which compresses nothing; name another file")
            wrong = archive.testzip()
    except FileError:
        raise
    except Exception as error:  # any error of zipfile
        raise damaged(path, first_line(error)) from error
    if wrong is not None:
        raise damaged(path, f"its part {wrong!r} isn't what was written, by the CRC-32")


def _check_storages(data: Any, size: int, path: Any) -> None:
    """Check that no tensor is larger than the file: torch accepts any declared size."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if dense and value.untyped_storage().nbytes() > size:
            raise damaged(path, f"it says that a tensor has the shape {tuple(value.shape)}, more than it holds")


# ---------------------------------------------------------------- safetensors


def write_safetensors(path: Any, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Path:
    """Write tensors and text as a safetensors file with a SHA-256 checksum; return the path.

    The checksum is in the header and covers the whole file.

    Raises:
        FileAccessError: see `write`.
    """
    with needing("models", "a safetensors file"):
        from safetensors import torch as safetensors

    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = safetensors.save(own, {**notes, _CHECKSUM: "0" * 64})
    end = 8 + int.from_bytes(content[:8], "little")
    head = content[:end].replace(_as_written("0" * 64), _as_written(_digest(content, end, "0" * 64)))
    return write(path, head + content[end:])


def read_safetensors(path: Any, kind: str = "a safetensors file") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return texts and tensors of a safetensors file of any origin; `kind` names it in errors.

    Raises:
        MissingFileError: there is no such file.
        FileError: it is cut off, damaged, or no safetensors file.
    """
    with needing("models", str(path)):
        from safetensors import torch as safetensors

    content = read(path)
    notes = _notes(path, content, kind)
    checksum = notes.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _digest(content, 8 + int.from_bytes(content[:8], "little"), checksum):
        raise damaged(path, "its content isn't what was written, by its checksum")
    try:
        return notes, safetensors.load(content)
    except MemoryError as error:
        raise FileError(f"{path} needs more memory than there is") from error
    except Exception as error:  # any error of safetensors and torch
        raise damaged(path, first_line(error)) from error


def _as_written(checksum: str) -> bytes:
    return f'"{_CHECKSUM}":"{checksum}"'.encode(errors="replace")


def _digest(content: bytes, end: int, checksum: str) -> str:
    """Return the SHA-256 of a safetensors file, with zeros in place of its checksum."""
    found = hashlib.sha256(content[:end].replace(_as_written(checksum), _as_written("0" * 64)))
    found.update(memoryview(content)[end:])
    return found.hexdigest()


def _notes(path: Any, content: bytes, kind: str) -> dict[str, str]:
    """Return the texts in a safetensors header, after checking the file's length."""
    length = int.from_bytes(content[:8], "little")
    # the format's bound; else a length may look like a magic
    if content[8:9] != b"{" or length > 100_000_000:
        for magic, what in _FOREIGN.items():
            if content.startswith(magic):
                raise FileError(f"{path} isn't {kind} but {what}; name another file")
        if len(content) < 9:
            raise _cut(path, len(content), "at least 9")
        raise FileError(f"{path} isn't {kind} but no safetensors file; name another file")
    if len(content) < 8 + length:
        raise _cut(path, len(content), f"at least {8 + length:,}")
    try:
        header = json.loads(content[8 : 8 + length])
        notes = header.get("__metadata__") or {}
        ends = [value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
        texts = {str(key): value for key, value in notes.items() if isinstance(value, str)}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header can't be read ({first_line(error)})") from error
    if len(content) < whole:
        raise _cut(path, len(content), f"{whole:,}")
    return texts


def _cut(path: Any, size: int, whole: str) -> FileError:
    return FileError(f"{path} is cut off: it has {size:,} bytes of {whole}; copy or download it again")
