"""The files of a registry on storage: a folder, S3 or GCS, through pyarrow.fs. A file is there whole or not at all."""

import os
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from lib.durable import rename_durably, write_durably
from lib.errors import InputError

SCRATCH = "afterclick-scratch-"  # begins the name of a folder for copies, of one process, beside all temporary files


class Store:
    """Reads, writes and lists files by their names within one location; names of folders end without a slash."""

    def __init__(self, location: str | Path):
        """Open a folder or a URI (s3://, gs://, file://).

        Raises:
            InputError: a URI of an unknown kind.
        """
        text = str(location)
        if "://" in text:
            try:
                self.fs, self.root = fs.FileSystem.from_uri(text)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise InputError(f"versions: {text} is no storage that can be used: {error}") from error
        else:
            self.fs, self.root = fs.LocalFileSystem(), str(Path(text).absolute())
        self.local = isinstance(self.fs, fs.LocalFileSystem)
        self._made: set[str] = set()  # folders

    def path(self, name: str) -> str:
        """Return where a file or folder lies."""
        return f"{self.root}/{name}"

    def is_file(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return self.fs.get_file_info(self.path(name)).type == fs.FileType.File

    def exists(self, name: str) -> bool:
        """Return whether there is a file or a folder of this name."""
        return self.fs.get_file_info(self.path(name)).type != fs.FileType.NotFound

    def files(self, folder: str) -> list[str]:
        """Return the names of a folder's files, ascending, without those that are being written."""
        return [name for name in self._children(folder, fs.FileType.File) if not name.startswith(".")]

    def folders(self, folder: str) -> list[str]:
        """Return the names of a folder's folders, ascending."""
        return self._children(folder, fs.FileType.Directory)

    def sweep(self, folder: str, age: float = 0.0) -> None:
        """Delete what writers that were killed have left in a folder, where it is older than so many seconds."""
        for info in self._infos(folder):
            if not Path(info.path).name.startswith(".") or _age(info) < age:
                continue
            if info.type == fs.FileType.Directory:
                self.fs.delete_dir(info.path)
            else:
                self.fs.delete_file(info.path)

    def _children(self, folder: str, kind: fs.FileType) -> list[str]:
        return sorted(Path(info.path).name for info in self._infos(folder) if info.type == kind)

    def _infos(self, folder: str) -> list[fs.FileInfo]:
        return self.fs.get_file_info(fs.FileSelector(self.path(folder), allow_not_found=True))

    def sizes(self, folder: str) -> Counter[str]:
        """Return the bytes of each file of a folder, and of all files of each folder in it, by name."""
        sizes: Counter[str] = Counter()
        selector = fs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        for info in self.fs.get_file_info(selector):
            if info.type == fs.FileType.File:
                sizes[Path(info.path).relative_to(self.path(folder)).parts[0]] += info.size
        return sizes

    def age(self, name: str) -> float:
        """Return the seconds since a file or folder was changed last."""
        return _age(self.fs.get_file_info(self.path(name)))

    def size(self, name: str) -> int:
        """Return the bytes of a file, or of all files of a folder."""
        info = self.fs.get_file_info(self.path(name))
        if info.type == fs.FileType.Directory:
            return sum(child.size for child in self._infos(name))
        return info.size

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for reading.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.fs.open_input_file(self.path(name))

    def read(self, name: str) -> bytes:
        """Return what a file holds.

        Raises:
            FileNotFoundError: there is none.
        """
        with self.open(name) as file:
            return file.read()

    def write(self, name: str, data: bytes, replace: bool = False) -> None:
        """Write a file in one atomic step.

        Raises:
            FileExistsError: there is one already, and `replace` is False.
            OSError: it could not be written.
        """
        if not replace:
            self.refuse_existing(name)
        if self.local:
            write_durably(Path(self.path(name)), data, replace)
            return
        self._make_folder(self.path(name).rpartition("/")[0])
        with self.fs.open_output_stream(self.path(name)) as stream:  # an object is seen when its upload is complete
            stream.write(data)

    def refuse_existing(self, name: str) -> None:
        """Refuse to write what is there already.

        Raises:
            FileExistsError: it is, so another learner is at work here.
        """
        if self.exists(name):
            raise FileExistsError(f"{self.path(name)} exists: another learner publishes to this registry")

    def upload(self, folder: Path, name: str, last: str, replace_last: bool = True) -> None:
        """Store a folder, the file `last` at the end: it is what makes the folder exist.

        Raises:
            FileExistsError: the last file is there already, and `replace_last` is False.
            OSError: it could not be written.
        """
        for file in sorted((path.name for path in folder.iterdir()), key=lambda file: file == last):
            self.write(f"{name}/{file}", (folder / file).read_bytes(), replace=replace_last or file != last)

    @contextmanager
    def new_folder(self, name: str, last: str) -> Iterator[Path]:
        """Have a folder to write within the block, which then is there whole; the file `last` makes it exist.

        Raises:
            FileExistsError: the last file is there already.
            OSError: it could not be written.
        """
        self.refuse_existing(f"{name}/{last}")
        if not self.local:
            with scratch() as folder:
                yield folder
                self.upload(folder, name, last, replace_last=False)
            return
        path = Path(self.path(name))
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            if not self.is_file(f"{name}/{last}"):
                shutil.rmtree(path, ignore_errors=True)  # a half of it, which a killed process has left
            rename_durably(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @contextmanager
    def downloaded(self, name: str) -> Iterator[Path]:
        """Have a folder on this machine within the block."""
        if self.local:
            yield Path(self.path(name))
            return
        with scratch() as folder:
            local = fs.LocalFileSystem()
            fs.copy_files(self.path(name), str(folder), source_filesystem=self.fs, destination_filesystem=local)
            yield folder

    def delete(self, name: str) -> None:
        """Delete a file."""
        self.fs.delete_file(self.path(name))

    def delete_half(self, name: str) -> None:
        """Delete a folder that does not exist as a whole."""
        self.fs.delete_dir(self.path(name))

    def delete_folder(self, name: str, first: str) -> None:
        """Delete a folder, the file `first` before all others: without it the folder does not exist."""
        self.delete(f"{name}/{first}")
        self.fs.delete_dir(self.path(name))

    def _make_folder(self, path: str) -> None:
        if path not in self._made:
            self.fs.create_dir(path, recursive=True)
            self._made.add(path)


def _age(info: fs.FileInfo) -> float:
    return 0.0 if info.mtime_ns is None else (time.time_ns() - info.mtime_ns) / 1e9


@contextmanager
def scratch() -> Iterator[Path]:
    """Have an empty folder for copies within the block; its name says whose it is, so that it can be swept."""
    folder = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_scratch() -> None:
    """Delete the copies of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}[0-9]*-*"):
        process = int(folder.name.removeprefix(SCRATCH).partition("-")[0])
        try:
            os.kill(process, 0)  # sends nothing
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:  # it is another user's, and alive
            continue
