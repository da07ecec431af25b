"""Packages that one check needs and the project does not, installed into Tailor's cache the first time."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SKIPPED = 77  # the exit code of a check that needs a package index and reaches none
NO_INDEX = re.compile(
    r"NewConnectionError|ConnectTimeout|NameResolution|name resolution|ProxyError|Max retries"
    r"|Connection refused|connection broken|timed out", re.IGNORECASE)


def cache():
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TAILOR_CACHE") or user_cache / "tailor")


def pip_install(python, what, *arguments):
    """Ends this program where it fails: with SKIPPED where pip reaches no index."""
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True, text=True)
    if done.returncode == 0:
        return
    if NO_INDEX.search(done.stderr):
        print(f"skipped: {what} is not in {cache()}, and pip reaches no index")
        sys.exit(SKIPPED)
    sys.exit(f"{what} cannot be installed:\n{done.stderr}")


def obtain(*packages, flags=(), folder=None):
    """The folder that holds `packages`, NAME==VERSION each; in the cache by the first one's name, or by `folder`."""
    place = cache() / (folder or packages[0].replace("==", "-"))
    if not place.is_dir():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache()) as staging:
            pip_install(sys.executable, packages[0], "--retries", "1", *flags,
                        "--target", f"{staging}/packages", *packages)
            try:
                os.rename(f"{staging}/packages", place)
            except OSError:  # another check was faster
                if not place.is_dir():
                    raise
    return place
