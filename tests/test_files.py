"""Files that are there wholly or not at all, also beside other writers; locks that nobody holds by looking."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvlab.files import LockHeld, is_locked, locked, read_regular, write_atomic
from kvlab.interrupt import StopRequest, sweep_stops_together


def test_several_write_one_file_at_once(tmp_path):
    path = tmp_path / "report.html"
    contents = [str(number) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: [write_atomic(path, content) for _ in range(20)], contents))
    assert path.read_text() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert [each.name for each in tmp_path.iterdir()] == ["record.json"]
    assert path.read_text() == "old"


def test_file_and_folder_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    write_atomic(tmp_path / "record.json", "new")
    assert [path.startswith(str(tmp_path / ".record.json.")) for path in synced] == [True, False]
    assert synced[1] == str(tmp_path)


def test_a_link_is_replaced(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "outside").read_text() == "mine"
    assert (tmp_path / "link").read_text() == "new"


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no regular file"):
        read_regular(tmp_path / "pipe", 10)
    (tmp_path / "long").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="of 11 bytes, where at most 10 are read"):
        read_regular(tmp_path / "long", 10)


def test_those_who_look_are_not_taken_for_those_who_hold(tmp_path):
    path, over = tmp_path / "lock", threading.Event()

    def look():
        while not over.is_set():
            is_locked(path)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            with locked(path):
                pass
    finally:
        over.set()
        for thread in threads:
            thread.join()
    with locked(path):
        assert is_locked(path)
        with pytest.raises(LockHeld, match=f"pid {os.getpid()}"), locked(path):
            pass
    assert not is_locked(path)


def test_a_stop_file_of_an_older_sweep_stops_nobody(tmp_path):
    """Of another container, whose process had this id, too."""
    (tmp_path / f".stop-{os.getpid()}").touch()
    with sweep_stops_together(tmp_path) as stop:
        assert stop.reason is None
        (own,) = [os.environ["KVLAB_STOP_FILE"]]
        assert StopRequest().reason is None
        with open(own, "w"):
            assert stop.reason == "the sweep"
