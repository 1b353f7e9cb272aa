import json
import math
import os

import pytest

from normlab.bench import records
from normlab.bench.records import Store, StoreError, write_text

START = {"event": "start", "spec": {"seed": 0}, "environment": {"cpu": "x"}}
POINT = {"event": "point", "step": 1, "valid_accuracy": 0.5}
END = {"event": "end", "outcome": "finished", "test_accuracy": 0.75}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out")


def test_lines_come_back_in_order(store):
    for line in (START, POINT, END):
        store.append("a", line)
    record = store.read("a")
    assert record.spec == {"seed": 0}
    assert record.points == [POINT]
    assert record.outcome == "finished"
    assert record.final("test_accuracy") == 0.75


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_last_line_is_ignored_and_the_next_append_stands_alone(store, cut):
    for line in (START, POINT, END):
        store.append("a", line)
    path = store.path("a")
    path.write_bytes(path.read_bytes()[:-cut])
    record = store.read("a")
    assert record.outcome == ("finished" if cut == 1 else None)
    assert record.points == [POINT]
    store.append("a", {**END, "test_accuracy": 0.5})
    assert store.read("a").final("test_accuracy") == 0.5


def test_numbers_that_json_lacks_become_null(store):
    store.append("a", START)
    store.append("a", {**END, "test_accuracy": math.nan, "test_loss": math.inf})
    assert "NaN" not in store.path("a").read_text()
    assert store.read("a").final("test_accuracy") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        '{"event": "point"}',
        '{"event": "start"}',
        '{"event": "start", "spec": 3}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_malformed_records_are_named_and_left_out(store, text):
    store.append("good", START)
    store.path("bad").write_text(text)
    assert [record.id for record in store] == ["good"]
    assert store.unreadable() == ["bad.jsonl"]


@pytest.mark.parametrize("value", ["0.9", True, None, [0.9], {"a": 1}])
def test_a_number_that_is_none_is_not_trusted(store, value):
    store.append("a", START)
    store.append("a", {**END, "test_accuracy": value})
    assert store.read("a").final("test_accuracy") is None


def test_an_unknown_outcome_is_no_end(store):
    store.append("a", START)
    store.append("a", {"event": "end", "outcome": "<script>"})
    assert store.read("a").outcome is None


def test_a_full_disk_is_a_clear_error_and_keeps_what_was_written(store, monkeypatch):
    store.append("a", START)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left on device.*same command"):
        store.append("a", POINT)
    monkeypatch.undo()
    assert store.read("a").spec == {"seed": 0}


def test_replacing_a_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_text(path, "old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(StoreError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the record folder"):
        Store(tmp_path / "file" / "out")


def test_every_line_is_json_on_its_own(store):
    for line in (START, POINT, END):
        store.append("a", line)
    assert [json.loads(x)["event"] for x in store.path("a").read_text().splitlines()] == [
        "start",
        "point",
        "end",
    ]
