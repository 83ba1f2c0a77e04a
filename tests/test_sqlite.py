"""SQLite files: opened, synced and written alike, with errors that name the file."""

import sqlite3

import pytest

from lib.errors import InputError
from lib.sqlite import Database, create


def refused(error: sqlite3.Error) -> InputError:
    return InputError(f"the file: {error}")


@pytest.fixture
def database(tmp_path):
    create(tmp_path / "file", "CREATE TABLE numbers(number INTEGER UNIQUE);")
    database = Database(tmp_path / "file", "rw", refused)
    yield database
    database.close()


def test_a_commit_is_synced_unless_it_may_be_lost(database):
    assert database.rows("PRAGMA journal_mode") == [("wal",)]
    assert database.rows("PRAGMA synchronous") == [(2,)]
    careless = Database(database.path, "rwc", refused, synchronous="NORMAL")
    assert careless.rows("PRAGMA synchronous") == [(1,)]
    careless.close()


def test_a_transaction_is_written_whole_or_not_at_all(database):
    def write(*values: object) -> None:
        with database.transaction() as connection:
            for value in values:
                if value is None:
                    raise KeyError
                connection.execute("INSERT INTO numbers VALUES(?)", (value,))

    write(1)
    with pytest.raises(sqlite3.IntegrityError):
        write(2, 1)
    with pytest.raises(KeyError):
        write(3, None)
    write(4)
    assert database.rows("SELECT number FROM numbers") == [(1,), (4,)]


def test_errors_are_those_of_the_owner(database, tmp_path):
    with pytest.raises(InputError, match="the file: no such table"):
        database.rows("SELECT * FROM absent")
    with pytest.raises(InputError, match="the file: unable to open"):
        Database(tmp_path / "absent", "rw", refused)
    assert not (tmp_path / "absent").exists()
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(InputError, match="the file: file is not a database"):
        Database(tmp_path / "text", "rw", refused)
    assert database.damage() is None


def test_a_file_that_cannot_be_made_is_not_there(tmp_path):
    with pytest.raises(sqlite3.Error):
        create(tmp_path / "file", "CREATE TABLE numbers(number INTEGER); no statement;")
    assert not (tmp_path / "file").exists()
    create(tmp_path / "file", "CREATE TABLE numbers(number INTEGER);")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
