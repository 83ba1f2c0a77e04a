"""The files of a registry on storage: a folder, S3 or GCS, through pyarrow.fs. A file is there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from lib.durable import write_durably
from lib.errors import InputError


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
                raise InputError(f"state: {text} is no storage that can be used: {error}") from error
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

    def unfinished(self, folder: str) -> list[str]:
        """Return the names of files that are being written, or were when their process was killed."""
        return [name for name in self._children(folder, fs.FileType.File) if name.startswith(".")]

    def _children(self, folder: str, kind: fs.FileType) -> list[str]:
        return sorted(Path(info.path).name for info in self._infos(folder) if info.type == kind)

    def _infos(self, folder: str) -> list[fs.FileInfo]:
        return self.fs.get_file_info(fs.FileSelector(self.path(folder), allow_not_found=True))

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
    def downloaded(self, name: str) -> Iterator[Path]:
        """Have a folder on this machine within the block."""
        if self.local:
            yield Path(self.path(name))
            return
        folder = Path(tempfile.mkdtemp())
        try:
            local = fs.LocalFileSystem()
            fs.copy_files(self.path(name), str(folder), source_filesystem=self.fs, destination_filesystem=local)
            yield folder
        finally:
            shutil.rmtree(folder)

    def delete(self, name: str) -> None:
        """Delete a file."""
        self.fs.delete_file(self.path(name))

    def delete_folder(self, name: str, first: str) -> None:
        """Delete a folder, the file `first` before all others: without it the folder does not exist."""
        self.delete(f"{name}/{first}")
        self.fs.delete_dir(self.path(name))

    def _make_folder(self, path: str) -> None:
        if path not in self._made:
            self.fs.create_dir(path, recursive=True)
            self._made.add(path)
