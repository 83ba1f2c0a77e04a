"""Every format from small files, what cannot be read, streaming, and the data sets at hand."""

import bz2
import gzip
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.dataset import read_events, read_items, read_rating_scale
from lib.data.events import EVENT_SCHEMA
from lib.data.formats import delimited as delimited_text
from lib.data.formats import tables as source_tables
from lib.data.formats.columns import Converter
from lib.data.formats.files import find_source
from lib.data.guard import CleaningRules
from lib.data.ingest import IngestReport, ingest
from lib.data.ratings import STARS, RatingScale
from lib.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
NOW = 1_700_000_000_000
T = 1_600_000_000_000  # milliseconds; 2020-09-13T12:26:40Z

Row = tuple[str, str, str, float | None, int]


@pytest.fixture
def ingested(tmp_path):
    """Ingests a source and gives the report and the rows (user, item, event, value, timestamp)."""

    def run(source: Path, out: str = "out", **options) -> tuple[IngestReport, list[Row]]:
        report = ingest(source, tmp_path / out, now=NOW, **options)
        table = read_events(tmp_path / out)
        assert table.num_rows == report.kept
        assert report.read == report.kept + sum(report.rejected.values())
        rows = table.select(["user_id", "item_id", "event", "value", "timestamp"]).to_pylist()
        return report, [(r["user_id"], r["item_id"], r["event"], r["value"], r["timestamp"]) for r in rows]

    return run


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", "::"])
def test_csv_with_any_delimiter(tmp_path, ingested, delimiter):
    lines = [["userId", "itemId", "rating", "timestamp"], ["2", "a", "4.5", str(T)], ["1", "b", "", str(T + 1)]]
    source = write(tmp_path / "data.csv", "\n".join(delimiter.join(line) for line in lines))
    report, rows = ingested(source)
    assert rows == [("1", "b", "rating", None, T + 1), ("2", "a", "rating", 4.5, T)]
    assert (report.format, report.users, report.items) == ("csv", 2, 2)
    assert (report.first_timestamp, report.last_timestamp) == (T, T + 1)
    assert report.columns == {"user_id": "userId", "item_id": "itemId", "value": "rating", "timestamp": "timestamp"}


@pytest.mark.parametrize(
    "header",
    [
        "visitorid,itemid,event,timestamp",
        "session_id,product_id,event_type,event_time",
        "USER ID,Item_Id,Type,Time",
        '"user","item","action","ts"',
    ],
)
def test_common_names_are_recognised(tmp_path, ingested, header):
    source = write(tmp_path / "data.csv", f"{header}\n007,a,view,{T}\n")
    assert ingested(source)[1] == [("007", "a", "view", None, T)]


def test_a_user_is_preferred_to_a_session(tmp_path, ingested):
    source = write(tmp_path / "data.csv", f"session_id,user_id,item_id,time\ns,u,i,{T}\n")
    assert ingested(source)[1] == [("u", "i", "click", None, T)]


def test_an_explicit_column_wins(tmp_path, ingested):
    source = write(tmp_path / "data.csv", f"user_id,account,item_id,time\nu,mine,i,{T}\n")
    assert ingested(source, columns={"user_id": "account"})[1] == [("mine", "i", "click", None, T)]


def test_csv_without_a_header_by_numbers(tmp_path, ingested):
    source = write(tmp_path / "clicks.csv", "1,2014-04-07T10:51:09.277Z,214536502,0\n1,2014-04-07T10:54:09Z,2145,0\n")
    _, rows = ingested(source, columns={"user_id": "0", "timestamp": "1", "item_id": "2"})
    assert [row[:2] for row in rows] == [("1", "214536502"), ("1", "2145")]
    assert rows[0][4] == int(datetime(2014, 4, 7, 10, 51, 9, 277000, tzinfo=UTC).timestamp() * 1000)


def test_kinds_by_synonym_by_mapping_and_by_default(tmp_path, ingested):
    words = ["addtocart", "transaction", "Page-View", "FAV", "play", "heart", "zap", ""]
    lines = [f"u,{place},{word},{T + place}" for place, word in enumerate(words)]
    source = write(tmp_path / "data.csv", "user,item,event,time\n" + "\n".join(lines))
    report, rows = ingested(source, kinds={"heart": "like", "play": "view"}, default_kind="skip")
    assert [row[2] for row in rows] == ["cart", "purchase", "view", "like", "view", "like", "skip"]
    assert report.rejected == {"unknown_event": 1}
    assert report.unknown_kinds == {"zap": 1}
    report, rows = ingested(source, "without", kinds={"heart": "like"})
    assert report.rejected == {"unknown_event": 1, "missing_field": 1}


@pytest.mark.parametrize(("extra", "kind"), [("", "click"), (",rating", "rating")])
def test_the_default_kind_follows_the_value(tmp_path, ingested, extra, kind):
    source = write(tmp_path / "data.csv", f"user,item,time{extra}\nu,i,{T}{',3' if extra else ''}\n")
    assert ingested(source)[1][0][2] == kind
    assert ingested(source, "other", default_kind="play")[1][0][2] == "play"


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        (str(T), "ms"),
        (str(T // 1000), "s"),
        (f"{T // 1000}.0", "s"),
        ("1.6e9", "s"),
        (str(T * 1000), "us"),
        (str(T * 1_000_000), "ns"),
        ("2020-09-13T12:26:40Z", None),
        ("2020-09-13 12:26:40", None),
        ("2020-09-13 12:26:40 UTC", None),
        ("2020-09-13T14:26:40.000+02:00", None),
    ],
)
def test_times_of_every_kind(tmp_path, ingested, text, unit):
    source = write(tmp_path / "data.csv", f"user,item,time\nu,i,{text}\n")
    report, rows = ingested(source)
    assert (rows[0][4], report.time_unit) == (T, unit)


def test_a_bad_time_among_good_ones_costs_its_row_only(tmp_path, ingested):
    times = ["2020-09-13T12:26:40Z", "yesterday", "2020-09-13T12:26:41", "", "2020-13-13", "2020-09-13"]
    source = write(tmp_path / "iso.csv", "user,item,time\n" + "".join(f"u,{t or 'none'},{t}\n" for t in times))
    report, rows = ingested(source)
    assert [row[4] for row in rows] == [T - T % 86_400_000, T, T + 1000]
    assert report.rejected == {"wrong_type": 2, "missing_field": 1}
    numbers = [str(T // 1000), "x", str(T // 1000 + 1), "", "nan", "1e400"]
    source = write(tmp_path / "numbers.csv", "user,item,time\n" + "".join(f"u,{t or 'none'},{t}\n" for t in numbers))
    report, rows = ingested(source, "numbers")
    assert [row[4] for row in rows] == [T, T + 1000]
    assert report.rejected == {"wrong_type": 3, "missing_field": 1}


def test_the_unit_of_times_is_settled_once():
    converter = Converter()
    seconds = pa.table({"user_id": ["u"], "item_id": ["i"], "timestamp": [T // 1000]})
    assert converter.convert(seconds)[0]["timestamp"].to_pylist() == [T]
    # A lone value of another magnitude later on is no reason to change it.
    small = pa.table({"user_id": ["u"], "item_id": ["i"], "timestamp": [T]})
    assert converter.convert(small)[0]["timestamp"].to_pylist() == [T * 1000]


def test_json_lines(tmp_path, ingested):
    events = [
        {"user_id": 5, "item_id": "a", "type": "purchase", "time": T, "price": 3},
        {"user_id": "5", "item_id": 12, "type": "view", "time": str(T + 1)},
        {"user_id": "6", "item_id": "a", "type": "view", "time": "2020-09-13T12:26:40Z", "event_id": "e"},
        {"user_id": True, "item_id": "a", "type": "view", "time": T},
        {"user_id": "6", "item_id": ["a"], "type": "view", "time": T},
        {"item_id": "a", "type": "view", "time": T},
        {"user_id": "6", "item_id": "a", "type": "view"},
        ["u", "i"],
    ]
    text = "\n".join(json.dumps(event) for event in events) + "\n{broken\n\n"
    report, rows = ingested(write(tmp_path / "data.jsonl", text))
    assert report.format == "jsonl"
    assert rows == [
        ("5", "a", "purchase", None, T),
        ("5", "12", "view", None, T + 1),
        ("6", "a", "view", None, T),
    ]
    assert report.rejected == {"wrong_type": 2, "missing_field": 2, "malformed_line": 2}


@pytest.mark.parametrize(
    ("times", "milliseconds"),
    [
        (pa.array([T // 1000], pa.int32()), T),
        (pa.array([T / 1000], pa.float64()), T),
        (pa.array([datetime(2020, 9, 13, 12, 26, 40)], pa.timestamp("ns")), T),
        (pa.array([datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC)], pa.timestamp("us", "Europe/Berlin")), T),
        (pa.array([datetime(2020, 9, 13).date()], pa.date32()), T - T % 86_400_000),
        (pa.array(["2020-09-13T12:26:40Z"]), T),
    ],
)
def test_parquet_of_other_types(tmp_path, ingested, times, milliseconds):
    table = pa.table(
        {
            "user": pa.array([7.0]),  # whole numbers, as floats because other rows had none
            "item": pa.array(["i"]).dictionary_encode(),
            "stars": pa.array([4], pa.int8()),
            "time": times,
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    report, rows = ingested(tmp_path / "data.parquet")
    assert (report.format, rows) == ("parquet", [("7", "i", "rating", 4.0, milliseconds)])


def test_parquet_rows_that_cannot_be_ids(tmp_path, ingested):
    table = pa.table({"user": [1.0, 1.5, None], "item": [1, 2, 3], "time": [T, T, T]})
    pq.write_table(table, tmp_path / "data.parquet")
    assert ingested(tmp_path / "data.parquet")[0].rejected == {"wrong_type": 1, "missing_field": 1}
    pq.write_table(pa.table({"user": [True], "item": [1], "time": [T]}), tmp_path / "data.parquet")
    with pytest.raises(InputError, match="'user_id' has type bool"):
        ingest(tmp_path / "data.parquet", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_folder_of_parquet_parts_is_one_source(tmp_path, ingested):
    for part in range(3):
        (tmp_path / "parts").mkdir(exist_ok=True)
        columns = {"user": ["u"], "item": [str(part)], "time": [T + part]}
        names = list(columns)[:: 1 if part else -1]  # columns may come in another order
        pq.write_table(pa.table({name: columns[name] for name in names}), tmp_path / "parts" / f"part-{part}.parquet")
    _, rows = ingested(tmp_path / "parts")
    assert [row[1] for row in rows] == ["0", "1", "2"]


def movielens_100k(folder: Path) -> Path:
    flags = "|".join("1" if place in (3, 4, 5) else "0" for place in range(19))
    write(folder / "u.item", f"7|Misérables, Les (1995)|01-Jan-1995||http://x|{flags}\n".encode("latin-1"))
    write(folder / "u.data", f"1\t7\t5\t{T // 1000}\n2\t7\t1\t{T // 1000 + 1}\n")
    write(folder / "README", "MovieLens")
    return folder


def movielens_1m(folder: Path) -> Path:
    write(
        folder / "movies.dat",
        "7::Misérables, Les (1995)::Animation|Children's|Comedy\n8::No year::Drama\n".encode("latin-1"),
    )
    write(folder / "ratings.dat", f"1::7::5::{T // 1000}\n2::7::1::{T // 1000 + 1}\n")
    return folder


def movielens_20m(folder: Path) -> Path:
    write(
        folder / "movies.csv",
        'movieId,title,genres\n7,"Misérables, Les (1995)",Animation|Children\'s|Comedy\n',
    )
    write(folder / "ratings.csv", f"userId,movieId,rating,timestamp\n1,7,5.0,{T // 1000}\n2,7,1.0,{T // 1000 + 1}\n")
    write(folder / "tags.csv", "userId,movieId,tag,timestamp\n")
    return folder


@pytest.mark.parametrize("make", [movielens_100k, movielens_1m, movielens_20m])
def test_movielens_of_every_age(tmp_path, ingested, make):
    report, rows = ingested(make(tmp_path / "ml"))
    assert report.format == "movielens"
    assert rows == [("1", "7", "rating", 5.0, T), ("2", "7", "rating", 1.0, T + 1000)]
    items = read_items(tmp_path / "out")
    assert items is not None
    assert items.to_pylist()[0] == {
        "item_id": "7",
        "title": "Misérables, Les",
        "release_year": "1995",
        "genres": "Animation Children's Comedy",
    }
    if make is movielens_1m:
        assert items.to_pylist()[1] == {"item_id": "8", "title": "No year", "release_year": None, "genres": "Drama"}


def test_recbole(tmp_path, ingested):
    folder = tmp_path / "ml-100k"
    write(
        folder / "ml-100k.inter",
        f"user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\ta\t3.0\t{T // 1000}\n",
    )
    write(
        folder / "ml-100k.item",
        'item_id:token\tmovie_title:token_seq\tprice:float\tclass:token_seq\na\tThe "best" one\t2.5\tDrama War\n',
    )
    report, rows = ingested(folder)
    assert (report.format, rows) == ("recbole", [("1", "a", "rating", 3.0, T)])
    items = read_items(tmp_path / "out")
    assert items is not None
    assert items.to_pylist() == [{"item_id": "a", "title": 'The "best" one', "price": 2.5, "genres": "Drama War"}]


def test_sequences(tmp_path, ingested):
    source = write(tmp_path / "data" / "train.txt", "1 10 11 12\n2 10\n3\n\n1 10 13\n")
    write(tmp_path / "data" / "README.txt", "Sequences of somebody\nin order\n")
    report, rows = ingested(tmp_path / "data")
    assert report.format == "sequences"
    assert report.rejected == {"malformed_line": 1}
    assert [(row[0], row[1], row[2]) for row in rows if row[0] == "1"] == [
        ("1", item, "click") for item in ("10", "11", "12", "10", "13")
    ]
    times = [row[4] for row in rows if row[0] == "1"]
    assert times == sorted(set(times))
    assert ingested(source, "plays", default_kind="play")[1][0][2] == "play"


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_text(tmp_path, ingested, suffix, compress):
    text = f"user,item,time\nu,i,{T}\n".encode()
    assert ingested(write(tmp_path / f"data.csv{suffix}", compress(text)))[1] == [("u", "i", "click", None, T)]
    many = compress(b"user,item,time\n" + b"".join(b"%d,%d,%d\n" % (n * 7919 % 1009, n, T + n) for n in range(50_000)))
    with pytest.raises(InputError, match="cannot be read to its end"):
        ingest(write(tmp_path / f"cut.csv{suffix}", many[: len(many) - 100]), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read


def test_malformed_lines_are_counted_and_the_rest_kept(tmp_path, ingested):
    lines = [
        b"\xef\xbb\xbfuser,item,rating,time",
        b"u,1,5,%d" % T,
        b"u,2,5",
        b"u,3,5,%d,extra" % T,
        b"u,\xff,5,%d" % T,
        b"u,5,five,%d" % T,
        b",6,5,%d" % T,
        b"u,,5,%d" % T,
        b"u,8,inf,%d" % T,
        b"u,9,5,12345",
        b"u,10,5,%d" % (NOW * 2),
        b"",
        b"u,11,+.5,%d" % T,
    ]
    report, rows = ingested(write(tmp_path / "data.csv", b"\r\n".join(lines)))
    assert report.time_unit == "ms"
    assert [(row[1], row[3]) for row in rows] == [("1", 5.0), ("11", 0.5)]
    assert report.rejected == {
        "malformed_line": 3,
        "wrong_type": 1,
        "empty_id": 2,
        "value_not_finite": 1,
        "time_too_old": 1,
        "time_in_future": 1,
    }
    assert report.read == 11


def quoted_rows() -> tuple[bytes, list[str], int]:
    # Rows whose first column is free text; the second is the item.
    lines = [b"text,item,user,time"]
    items, malformed = [], 0
    for place in range(60):
        rest = b",%d,u,%d" % (place, T + place)
        kind = place % 6
        if kind == 0:
            lines.append(b'"plain, quoted"' + rest)
        elif kind == 1:
            lines.append(b'"two\nlines, and ""quotes"""' + rest)
        elif kind == 2:
            lines.append(b"bare" + rest)
        elif kind == 3 and place % 12 == 3:
            lines.append(b'"stray' + rest)
            malformed += 1
            continue
        elif kind == 4:
            lines.append(b'"' + b"many\n" * 5 + b'"' + rest)
        else:
            lines.append(b"" + rest)
        items.append(str(place))
    return b"\n".join(lines), items, malformed


@pytest.mark.parametrize("block", [64, 200, 1 << 20])
def test_quotes_that_span_lines_and_stray_ones(tmp_path, ingested, monkeypatch, block):
    monkeypatch.setattr(source_tables, "BLOCK_BYTES", block)
    text, items, malformed = quoted_rows()
    report, rows = ingested(write(tmp_path / "data.csv", text))
    assert [row[1] for row in rows] == items
    assert report.rejected == {"malformed_line": malformed}


def test_a_quote_that_never_closes_costs_one_line(tmp_path, ingested, monkeypatch):
    monkeypatch.setattr(source_tables, "BLOCK_BYTES", 256)
    monkeypatch.setattr(delimited_text, "LONGEST_VALUE", 1024)
    lines = [f"{place},u,{T + place * 1000}" for place in range(500)]
    lines[7] = f'"7,u,{T}'
    report, rows = ingested(write(tmp_path / "data.csv", "item,user,time\n" + "\n".join(lines)))
    assert len(rows) == 499
    assert report.rejected == {"malformed_line": 1}


def test_quotes_paired_across_columns_do_not_swallow_lines(tmp_path, ingested):
    # An even number of quotes that still leaves a value open.
    text = f'item,user,time\n1,u,{T}\n"2"x,"u,{T}\n3,u,{T}\n4,"u",{T}\n'
    report, rows = ingested(write(tmp_path / "data.csv", text))
    assert [row[1] for row in rows][-2:] == ["3", "4"]
    assert report.read == 4


def test_missing_columns_are_named(tmp_path):
    source = write(tmp_path / "data.csv", "user,thing,time\nu,i,1\n")
    with pytest.raises(InputError, match=r"'item_id'.*user, thing, time.*--column item_id=NAME"):
        ingest(source, tmp_path / "out")
    with pytest.raises(InputError, match=r"no column 'itm'; found user, thing, time"):
        ingest(source, tmp_path / "out", columns={"item_id": "itm"})
    with pytest.raises(InputError, match=r"unknown field; the fields are user_id"):
        ingest(source, tmp_path / "out", columns={"item": "thing"})
    pq.write_table(pa.table({"user": ["u"], "item": ["i"]}), tmp_path / "data.parquet")
    with pytest.raises(InputError, match=r"'timestamp'.*--column timestamp=NAME"):
        ingest(tmp_path / "data.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.bin", b"\x00\x01\x02", "cannot tell its format"),
        ("data.txt", b"", "is empty"),
        ("data.csv", b"", "is empty"),
        ("data.csv", b"word\nword\n", "cannot tell the delimiter"),
        ("data.json", b'[{"user_id": "u"}]', "cannot tell its format"),
        ("data.dat", b"1,2,3\n1,2,3\n", "choose with --format"),
    ],
)
def test_what_is_no_event_file_is_said(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        ingest(write(tmp_path / name, content), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_told(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        find_source(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no event file recognised among nothing"):
        find_source(tmp_path)
    write(tmp_path / "one.csv", "user,item,time\n")
    pq.write_table(pa.table({"user": ["u"]}), tmp_path / "two.parquet")
    with pytest.raises(InputError, match="csv and parquet files; choose with --format"):
        find_source(tmp_path)
    assert find_source(tmp_path, "csv").files == (tmp_path / "one.csv",)
    with pytest.raises(InputError, match="--format xml"):
        find_source(tmp_path, "xml")
    # A file called events says which are meant.
    write(tmp_path / "events.csv", "user,item,time\n")
    assert find_source(tmp_path).files == (tmp_path / "events.csv",)


def test_wrong_options_are_named(tmp_path):
    source = write(tmp_path / "data.csv", f"user,item,time\nu,i,{T}\n")
    with pytest.raises(InputError, match="--default-kind zap: it must be one of view"):
        ingest(source, tmp_path / "out", default_kind="zap")
    with pytest.raises(InputError, match="--event-kind a=zap: the kind must be one of view"):
        ingest(source, tmp_path / "out", kinds={"a": "zap"})
    with pytest.raises(InputError, match="is no file; give a CSV"):
        ingest(source, tmp_path / "out", items=tmp_path / "nothing.csv")
    with pytest.raises(InputError, match="not a Parquet file"):
        ingest(source, tmp_path / "out", format="parquet")
    assert not (tmp_path / "out").exists()


def test_a_source_of_which_nothing_is_left_is_an_error(tmp_path):
    source = write(tmp_path / "data.csv", f"user,item,event,time\nu,i,zap,{T}\nu,j,zap,{T}\n")
    with pytest.raises(InputError, match=r"none of 2 events could be kept \(2 unknown_event\).*zap.*--event-kind"):
        ingest(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The dataset folder


def test_an_existing_dataset_needs_overwrite(tmp_path, ingested):
    first = write(tmp_path / "first.csv", f"user,item,time\nu,i,{T}\n")
    second = write(tmp_path / "second.csv", f"user,item,time\nu,j,{T}\n")
    items = write(tmp_path / "items.csv", "id,title\ni,One\n")
    ingested(first, items=items)
    write(tmp_path / "out" / "mine.txt", "kept")
    write(tmp_path / "out" / ".ingest-killed" / "0000.arrow", "left behind")
    with pytest.raises(InputError, match=r"not empty.*--overwrite"):
        ingest(second, tmp_path / "out")
    assert ingested(second, overwrite=True)[1] == [("u", "j", "click", None, T)]
    # Items of the old dataset are gone with it, foreign files are not.
    assert read_items(tmp_path / "out") is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["events.parquet", "ingest.json", "mine.txt"]
    with pytest.raises(InputError, match="is a file"):
        ingest(second, first)


def test_a_failed_overwrite_leaves_the_old_dataset(tmp_path, ingested):
    good = write(tmp_path / "good.csv", f"user,item,time\nu,i,{T}\n")
    bad = write(tmp_path / "bad.csv", "user,item,time\nu,i,1\n")
    _, rows = ingested(good)
    with pytest.raises(InputError, match="none of 1 events"):
        ingest(bad, tmp_path / "out", overwrite=True)
    assert [row["item_id"] for row in read_events(tmp_path / "out").to_pylist()] == [row[1] for row in rows]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["events.parquet", "ingest.json"]


def test_a_dataset_can_be_ingested_again(tmp_path, ingested):
    source = write(tmp_path / "data.csv", f"user,item,time,event_id\nu,i,{T},e\nu,j,{T},\n")
    items = write(tmp_path / "items.csv", "id,title\ni,One\n")
    report, rows = ingested(source, items=items)
    again, same = ingested(tmp_path / "out", "again")
    assert same == rows
    assert (again.kept, again.described_items) == (report.kept, 1)
    assert read_events(tmp_path / "again")["event_id"].to_pylist() == ["e", None]


def test_the_report_is_written(tmp_path, ingested):
    report, _ = ingested(write(tmp_path / "data.csv", f"user,item,time\nu,i,{T}\nu,i,{T}\n"))
    written = json.loads((tmp_path / "out" / "ingest.json").read_text())
    assert written == {**vars(report)}
    assert written["rejected"] == {"duplicate": 1}
    assert report.period == "2020-09-13 12:26 to 2020-09-13 12:26 UTC"


def random_events(path: Path, rows: int) -> Path:
    generator = np.random.default_rng(4)
    users, items = generator.integers(0, 400, rows), generator.integers(0, 50, rows)
    times = T + generator.integers(0, 100, rows) * 1000  # many equal times
    lines = [f"user {u},{i},{t}" for u, i, t in zip(users, items, times, strict=True)]
    return write(path, "user,item,time\n" + "\n".join(lines))


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_streaming_gives_what_reading_at_once_gives(tmp_path, ingested, monkeypatch, format):
    source = random_events(tmp_path / "data.csv", 20_000)
    rules = CleaningRules(flood_events=30, flood_window_ms=50_000)
    whole, rows = ingested(source, rules=rules)
    assert whole.rejected["duplicate"] > 100
    assert whole.rejected["flood"] > 100
    monkeypatch.setattr(source_tables, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(source_tables, "PARQUET_ROWS", 700)
    if format == "parquet":
        lines = [line.split(",") for line in source.read_text().splitlines()[1:]]
        columns = [list(column) for column in zip(*lines, strict=True)]
        source = tmp_path / "data.parquet"
        pq.write_table(pa.table(columns, names=["user", "item", "time"]), source)
    stages: list[tuple[str, int, int]] = []
    streamed, parts = ingested(
        source, "streamed", rules=rules, partition_bytes=50_000, progress=lambda *step: stages.append(step)
    )
    cleaned = [step for step in stages if step[0] == "cleaning"]
    assert len(cleaned) >= 20
    assert [step[1] for step in cleaned] == list(range(1, len(cleaned) + 1))
    reading = [step for step in stages if step[0] == "reading"]
    assert len(reading) > 20
    assert reading[-1][1] == reading[-1][2]
    assert parts == rows  # read_events orders users, and within a user the order of the file is kept
    same = ("read", "kept", "users", "items", "first_timestamp", "last_timestamp", "time_unit")
    assert [getattr(streamed, name) for name in same] == [getattr(whole, name) for name in same]
    assert Counter(streamed.rejected) == Counter(whole.rejected)
    # Users are contiguous in the file itself.
    users = pq.read_table(tmp_path / "streamed" / "events.parquet")["user_id"].to_pylist()
    changes = sum(user != before for user, before in zip(users[1:], users, strict=False))
    assert changes == streamed.users - 1
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == ["events.parquet", "ingest.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Ratings


def ratings_file(path: Path, values: list[str]) -> Path:
    lines = [f"u{place % 3},i{place},{value},{T + place}" for place, value in enumerate(values)]
    return write(path, "user,item,rating,time\n" + "\n".join(lines))


def test_the_scale_of_ratings_is_recognised_and_kept_with_the_dataset(tmp_path, ingested):
    source = ratings_file(tmp_path / "data.csv", [*"13479", "10", ""])
    report, rows = ingested(source)
    assert (report.rating_scale, report.ratings, report.dislikes, report.ratings_off_scale) == ("1-10", 6, 3, 0)
    assert read_rating_scale(tmp_path / "out") == RatingScale(1, 10)
    assert {row[3] for row in rows} == {1, 3, 4, 7, 9, 10, None}  # as they came
    streamed, again = ingested(source, "streamed", partition_bytes=100)
    assert again == rows
    assert (streamed.rating_scale, streamed.dislikes) == ("1-10", 3)
    assert read_rating_scale(tmp_path / "streamed") == RatingScale(1, 10)


def test_ratings_that_are_all_alike_are_no_dislikes(tmp_path, ingested):
    report, rows = ingested(ratings_file(tmp_path / "data.csv", ["1"] * 5))
    assert (report.rating_scale, report.dislikes) == ("implicit", 0)
    assert [row[2:4] for row in rows] == [("rating", 1.0)] * 5
    assert read_rating_scale(tmp_path / "out").dislikes_below == -np.inf


def test_a_given_scale_wins_and_what_lies_beyond_it_says_nothing(tmp_path, ingested):
    source = ratings_file(tmp_path / "data.csv", ["0", "0", "2", "5", "11"])
    report, rows = ingested(source, rating_scale=RatingScale(1, 10))
    assert (report.rating_scale, report.ratings, report.dislikes, report.ratings_off_scale) == ("1-10", 2, 1, 3)
    assert [row[3] for row in sorted(rows, key=lambda row: row[4])] == [None, None, 2, 5, None]
    assert read_rating_scale(tmp_path / "out") == RatingScale(1, 10)


def test_the_values_of_other_kinds_are_no_ratings(tmp_path, ingested):
    lines = [f"u,i{place},purchase,{price},{T + place}" for place, price in enumerate([3, 80, 900])]
    source = write(tmp_path / "data.csv", "user,item,event,value,time\n" + "\n".join(lines))
    report, rows = ingested(source, rating_scale=RatingScale(1, 10))
    assert (report.ratings, report.rating_scale) == (0, None)
    assert [row[3] for row in rows] == [3, 80, 900]


def test_a_dataset_that_says_nothing_of_its_ratings_has_stars(tmp_path, ingested):
    ingested(write(tmp_path / "data.csv", f"user,item,time\nu,i,{T}\n"))
    assert read_rating_scale(tmp_path / "out") == STARS


# ---------------------------------------------------------------------------------------------------------------------
# Items


def test_items_of_every_format(tmp_path, ingested):
    source = write(tmp_path / "data.csv", f"user,item,time\nu,1,{T}\n")
    expected = {"item_id": "1", "title": "One, or two", "price": 2.5}
    csv_items = write(tmp_path / "goods.csv", 'title,itemId,price\n"One, or two",1,2.5\nTwo,2,\n')
    json_items = write(
        tmp_path / "goods.jsonl",
        '{"id": 1, "title": "One, or two", "price": 2.5}\n{"id": 2, "title": "Two", "price": null}\n',
    )
    table = pa.table(
        {"item": [1, 2], "title": pa.array(["One, or two", "Two"], pa.large_string()), "price": [2.5, None]}
    )
    pq.write_table(table, tmp_path / "goods.parquet")
    for path in (csv_items, json_items, tmp_path / "goods.parquet"):
        ingested(source, path.suffix, items=path)
        items = read_items(tmp_path / path.suffix)
        assert items is not None
        assert items.to_pylist() == [expected, {"item_id": "2", "title": "Two", "price": None}]
        assert items.column_names[0] == "item_id"
        assert items.schema.field("title").type == pa.string()


def test_bad_items_are_counted(tmp_path, ingested):
    source = write(tmp_path / "data.csv", f"user,item,time\nu,1,{T}\n")
    lines = ["id,code", "1,007", "1,008", ",9", f"{'x' * 257},9", "2", "3,0.5", "\x01,9"]
    report, _ = ingested(source, items=write(tmp_path / "goods.csv", "\n".join(lines)))
    faults = ("malformed_line", "empty_id", "long_id", "control_character", "duplicate")
    assert report.rejected_items == dict.fromkeys(faults, 1)
    assert report.described_items == 2
    items = read_items(tmp_path / "out")
    assert items is not None
    assert items.to_pylist() == [{"item_id": "1", "code": "007"}, {"item_id": "3", "code": "0.5"}]
    no_id = write(tmp_path / "none.csv", "name,price\na,1\n")
    with pytest.raises(InputError, match=r"'item_id' found among name, price.*--column item_id=NAME"):
        ingest(source, tmp_path / "other", items=no_id)


def test_items_with_lists_and_mixed_values(tmp_path, ingested):
    source = write(tmp_path / "data.csv", f"user,item,time\nu,1,{T}\n")
    text = '{"item_id": "1", "tags": ["a", "b"], "size": 4}\n{"item_id": "2", "size": "XL"}\n[]\n'
    report, _ = ingested(source, items=write(tmp_path / "goods.jsonl", text))
    items = read_items(tmp_path / "out")
    assert items is not None
    assert items.to_pylist() == [
        {"item_id": "1", "tags": ["a", "b"], "size": "4"},
        {"item_id": "2", "tags": None, "size": "XL"},
    ]
    assert report.rejected_items == {"malformed_line": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Reading a dataset


def test_read_events_fills_orders_and_casts(tmp_path):
    table = pa.table(
        {
            "user_id": pa.array(["b", "a", "b", "a"], pa.large_string()),
            "item_id": ["1", "2", "3", "4"],
            "event": ["click"] * 4,
            "timestamp": [T + 1, T, T, T],
        }
    )
    pq.write_table(table, tmp_path / "events.parquet")
    for data in (tmp_path, str(tmp_path), tmp_path / "events.parquet"):
        events = read_events(data)
        assert events.schema == EVENT_SCHEMA
        assert events["item_id"].to_pylist() == ["2", "4", "3", "1"]
        assert events["value"].null_count == 4
    assert read_items(tmp_path) is None


def test_read_events_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"does not exist; make it with 'afterclick ingest"):
        read_events(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no events.parquet"):
        read_events(tmp_path)
    path = write(tmp_path / "events.parquet", "no parquet")
    with pytest.raises(InputError, match="not a Parquet file"):
        read_events(tmp_path)
    good = {"user_id": ["u"], "item_id": ["i"], "event": ["click"], "timestamp": [T]}
    for change, message in [
        ({"user_id": [1]}, "'user_id' has type int64"),
        ({"timestamp": pa.array([None], pa.int64())}, "'timestamp' is null in 1 rows"),
        ({"event": ["zap"]}, "unknown event 'zap'"),
    ]:
        pq.write_table(pa.table(good | change), path)
        with pytest.raises(InputError, match=message):
            read_events(tmp_path)
    pq.write_table(pa.table({name: good[name] for name in ("user_id", "event", "timestamp")}), path)
    with pytest.raises(InputError, match="'item_id' is missing"):
        read_events(tmp_path)


def test_read_items_says_what_is_wrong(tmp_path):
    for table, message in [
        (pa.table({"id": ["a"]}), "needs a column 'item_id'"),
        (pa.table({"item_id": [1]}), "needs a column 'item_id'"),
        (pa.table({"item_id": ["a", None]}), "null in 1 rows"),
        (pa.table({"item_id": ["a", "b", "a"]}), "'a' is there more than once"),
    ]:
        pq.write_table(table, tmp_path / "items.parquet")
        with pytest.raises(InputError, match=message):
            read_items(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The data sets at hand


@pytest.mark.parametrize(
    ("source", "format", "read", "rejected", "users", "items", "described"),
    [
        ("ml-100k", "parquet", 100_000, {}, 943, 1682, 1682),
        # One click is there twice.
        ("yoochoose-100k", "parquet", 83_846, {"duplicate": 1}, 21_210, 2933, 0),
        ("amazon-beauty/sequences.txt", "sequences", 198_502, {}, 22_363, 12_101, 0),
        ("amazon-beauty", "sequences", 198_502, {}, 22_363, 12_101, 0),
    ],
)
def test_real_data_keeps_its_rows(ingested, source, format, read, rejected, users, items, described):
    if not (SHARED / source).exists():
        pytest.skip("shared/data is absent")
    report, _ = ingested(SHARED / source)
    assert (report.format, report.read, report.rejected) == (format, read, rejected)
    assert (report.users, report.items, report.described_items) == (users, items, described)
