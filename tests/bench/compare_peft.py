#!/usr/bin/env python3
"""Tailor against transformers + PEFT on this machine: same model, same documents, rank, dtype and threads, runs interleaved.

Prints tokens per second, peak resident memory and the ratios, and Tailor's share of what a bare bfloat16 matrix product
reaches in the same minutes. Tokens are real ones: padding never counts, on either side.

usage: compare_peft.py MODEL_DIR TRAIN.jsonl [--rounds 3] [--steps 12] [--program build/release/bin/tailor]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEQUENCE, ROWS, RANK, ALPHA, WARM_UP = 256, 4, 8, 16, 3


def run(command: list[str], environment: dict) -> tuple[str, float]:
    """Standard output and peak resident memory in MB of a child process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        out.seek(0), err.seek(0)
        if status != 0:
            sys.exit(f"error: {command[0]} ended with status {status}\n{err.read()[-2000:]}")
        return out.read(), usage.ru_maxrss / 1024


def documents_of(rows: Path, to: Path) -> None:
    """One line a document, from the peer's packed rows: positions begin at 0 in each."""
    with open(to, "w") as out:
        for line in open(rows):
            row = json.loads(line)
            starts = [i for i, p in enumerate(row["position_ids"]) if p == 0] + [len(row["input_ids"])]
            for begin, end in zip(starts, starts[1:]):
                ids, labels = row["input_ids"][begin:end], row["labels"][begin:end]
                if any(label != -100 for label in labels[1:]):
                    out.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def flops_per_token(config: dict, label_share: float) -> float:
    """Matrix products of forward and input gradients of one token, LoRA's own left out."""
    c = config.get("text_config", config)
    d, q = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    layers = c["num_hidden_layers"]
    moe = len(c.get("moe_layers") or [])
    dense_width = c.get("intermediate_size_mlp", c["intermediate_size"])
    per_token = layers * d * (2 * q + 2 * kv) + (layers - moe) * 3 * d * dense_width
    per_token += moe * (1 + c.get("num_experts_per_tok", 0)) * 3 * d * c["intermediate_size"]
    return 4 * (per_token + label_share * d * c["vocab_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--program", default="build/release/bin/tailor")
    parser.add_argument("--peer-factors", choices=["fp32", "bf16"], default="bf16")
    arguments = parser.parse_args()
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    moe = config["model_type"].startswith("llama4")

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = dict(os.environ, TAILOR_CACHE=str(work / "cache"), TAILOR_DATA=str(work / "data"))
        peer = [sys.executable, str(HERE / "peer_peft.py"), arguments.model, "--dtype", "bf16",
                "--rank", str(RANK), "--alpha", str(ALPHA), "--seq-len", str(SEQUENCE), "--batch", str(ROWS),
                "--threads", str(arguments.threads), "--untimed", str(WARM_UP)]
        if arguments.peer_factors == "bf16":
            peer.append("--bf16-adapter")
        targets = "attention, experts" if moe else "attention, dense_mlp"
        if moe:
            peer += ["--targets", "q_proj,k_proj,v_proj,o_proj", "--target-params",
                     "feed_forward.experts.gate_up_proj,feed_forward.experts.down_proj"]
        run(peer + ["--data", arguments.data, "--dump-tokenized", str(work / "rows.jsonl"),
                    "--steps", str(arguments.steps), "--time-limit", "1"], environment)
        documents_of(work / "rows.jsonl", work / "documents.jsonl")

        results = {"tailor": [], "peer": [], "gemm": []}
        for number in range(arguments.rounds):
            (work / "recipe.yaml").write_text(
                f"name: bench\nbase_model: {Path(arguments.model).resolve()}\noutput_dir: {work}/run{number}\n"
                f"lora: {{rank: {RANK}, alpha: {ALPHA}, targets: [{targets}]}}\n"
                f"data: {{train: [{work}/documents.jsonl], sequence_len: {SEQUENCE}}}\n"
                f"training: {{micro_batch_size: {ROWS}, num_epochs: 9, max_steps: {arguments.steps}, "
                "learning_rate: 1.0e-3, lr_scheduler: constant, warmup_ratio: 0.0, shuffle: false, eval_every_steps: 0}\n"
                f"compute: {{dtype: bfloat16, threads: {arguments.threads}}}\n"
                f"cost: {{price: {{usd_per_gpu_hour: 0.1}}, ledger: {work}/ledger.db}}\n")
            _, memory = run([arguments.program, "train", str(work / "recipe.yaml"), "--json"], environment)
            steps = [json.loads(line) for line in open(work / f"run{number}/metrics.jsonl")]
            steps = [step for step in steps if "loss" in step][WARM_UP:]
            speed = sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)
            share = sum(s["trained_tokens"] for s in steps) / sum(s["tokens"] for s in steps)
            results["tailor"].append((speed, memory, steps[-1]["loss"]))
            text, memory = run(peer + ["--tokenized", str(work / "rows.jsonl"), "--steps", str(arguments.steps)], environment)
            answer = json.loads(text)
            results["peer"].append((answer["tokens_per_second"], memory))
            text, _ = run([str(Path(arguments.program).with_name("tailor-compute")), "calibrate", "--json"], environment)
            results["gemm"].append(json.loads(text)["matmul_gflops_bfloat16"])
            print(f"round {number + 1}: tailor {speed:.0f} tokens/s {results['tailor'][-1][1]:.0f} MB, "
                  f"peer {results['peer'][-1][0]:.0f} tokens/s {memory:.0f} MB, "
                  f"bare bf16 product {results['gemm'][-1]:.0f} GFLOP/s", flush=True)

    ours = statistics.median(r[0] for r in results["tailor"])
    theirs = statistics.median(r[0] for r in results["peer"])
    memory = max(r[1] for r in results["tailor"]) / max(r[1] for r in results["peer"])
    gflops = ours * flops_per_token(config, share) / 1e9
    print(json.dumps({
        "model": Path(arguments.model).name, "rounds": arguments.rounds, "steps_timed": arguments.steps - WARM_UP,
        "peer_factors": arguments.peer_factors, "tailor_tokens_per_second": round(ours, 1),
        "peer_tokens_per_second": round(theirs, 1), "speed_ratio": round(ours / theirs, 2),
        "peak_memory_ratio": round(memory, 2), "tailor_gflops": round(gflops, 1),
        "share_of_bare_product": round(gflops / statistics.median(results["gemm"]), 2),
        "load_average": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
