"""Reading rows: every way in, and every way in which a file can be wrong."""

import gzip
import json
import sys
import types

import pytest

from gearshift.errors import UserError
from gearshift.rlhf.data.sources import read_source, read_sources

ROWS = [{"prompt": "a"}, {"prompt": "bé"}]


def test_jsonl_rows_carry_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"prompt": "a"}\n\n' + json.dumps(ROWS[1], ensure_ascii=False).encode())
    records = read_source(str(path))
    assert [record.fields for record in records] == ROWS
    assert [record.origin for record in records] == [f"{path}:1", f"{path}:3"]  # the empty line counts


def test_gzip_parquet_and_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, ROWS)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "text.txt").write_text("one\n\ntwo", encoding="utf-8")
    sources = [str(tmp_path / name) for name in ("rows.jsonl.gz", "rows.parquet", "text.txt")]
    records = read_sources(sources)
    assert [record.fields for record in records] == ROWS + ROWS + [{"text": "one\n\ntwo"}]
    assert records[3].origin.endswith("rows.parquet:2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": ', "rows.jsonl:2: is not valid JSON"),
        ("rows.jsonl", b'{"prompt": "a"}\n[1]\n', "rows.jsonl:2: a row must be a JSON object, this is a list"),
        ("rows.jsonl", b'{"prompt": "\xff"}\n', "rows.jsonl:1: is not UTF-8 text"),
        ("rows.jsonl", b"[" * 100_000, "rows.jsonl:1: is JSON that cannot be read"),
        ("rows.jsonl", b"1" * 9999, "rows.jsonl:1: is JSON that cannot be read"),
        ("rows.jsonl", b"\n\n", "rows.jsonl: the data set is empty"),
        ("text.txt", b"  \n", "text.txt: the data set is empty"),
        ("rows.jsonl.gz", b"not gzip", "rows.jsonl.gz: cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-20], "rows.jsonl.gz: cannot be read"),
        ("rows.parquet", b"not parquet", "rows.parquet: is not valid parquet"),
        ("rows.csv", b"a,b", "rows.csv: cannot tell the format"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        [record.fields for record in read_source(str(tmp_path / name))]
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_folder_and_no_source(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_source(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        read_source("data/none.jsonl")  # a relative path, not a hub name
    with pytest.raises(UserError, match="is a folder"):
        read_source(str(tmp_path))
    with pytest.raises(UserError, match="no data source"):
        read_sources([])
    with pytest.raises(UserError, match="must be a list"):
        read_sources("rows.jsonl")


def test_hub_names_go_to_datasets_with_configuration_and_split(monkeypatch):
    calls = []

    def load_dataset(path, configuration, split):
        calls.append((path, configuration, split))
        if path == "owner/gone":
            raise ConnectionError("no route\nto the hub")
        return iter(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert [record.fields for record in read_source("owner/name/main:test[:10%]")] == ROWS
    assert read_source("owner/name")[1].origin == "owner/name:2"
    assert calls == [("owner/name", "main", "test[:10%]"), ("owner/name", None, "train")]
    with pytest.raises(UserError, match=r"owner/gone: neither a local file nor a readable hub data set: no route$"):
        read_source("owner/gone")


def test_a_hub_name_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        read_source("owner/name")
