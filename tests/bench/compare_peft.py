#!/usr/bin/env python3
"""Tailor against transformers + PEFT on this machine: same model, same documents, rank, dtype and threads, runs interleaved.

Prints tokens per second, peak resident memory and the ratios against PEFT with float32 factors (its default) and with
bfloat16 factors, and which share of a step Tailor spends as if it did nothing but the step's matrix products, at their
own shapes and at the speed LibTorch's bare mm reaches in the same minutes. Tokens are real ones: padding never counts,
on either side. Times are of steps after the warm-up; memory is the peak of the whole process, loading included.

usage: compare_peft.py MODEL_DIR TRAIN.jsonl [--rounds 3] [--steps 33] [--program build/release/bin/tailor]
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


# Of a model_type: attention's modules, and where the routed experts' parameters are.
MIXTURES = {
    "llama4_text": ("q_proj,k_proj,v_proj,o_proj", "feed_forward.experts"),
    "deepseek_v3": ("q_a_proj,q_b_proj,kv_a_proj_with_mqa,o_proj", "mlp.experts"),
}


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


def products_of(config: dict, tokens: int, label_tokens: int) -> list[tuple[int, int, int, int]]:
    """The matrix products of one training step as (rows, in, out, how often): forward and input gradients of the frozen
    weights, each once. LoRA's own, attention's scores and the lowest layer's input gradient are left out."""
    c = config.get("text_config", config)
    d, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    if c["model_type"] == "deepseek_v3":
        q_rank, kv_rank, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
        nope, value = c["qk_nope_head_dim"], c["v_head_dim"]
        moe = layers - c["first_k_dense_replace"]
        dense_width, width = c["intermediate_size"], c["moe_intermediate_size"]
        shared, experts = width * c["n_shared_experts"], c["n_routed_experts"]
        forward = [(tokens, d, q_rank + kv_rank + rope, layers), (tokens, q_rank, heads * (nope + rope), layers),
                   (tokens, kv_rank, heads * (nope + value), layers), (tokens, heads * value, d, layers)]
    else:
        q, kv = heads * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        moe, experts = len(c.get("moe_layers") or []), c.get("num_local_experts")
        dense_width, width = c.get("intermediate_size_mlp", c["intermediate_size"]), c["intermediate_size"]
        shared = width
        forward = [(tokens, d, q + 2 * kv, layers), (tokens, q, d, layers)]
    forward += [(tokens, d, 2 * dense_width, layers - moe), (tokens, dense_width, d, layers - moe),
                (label_tokens, d, c["vocab_size"], 1)]
    if moe:
        rows = tokens * c["num_experts_per_tok"] // experts  # an even split; a skewed one has some larger products
        forward += [(tokens, d, 2 * shared, moe), (tokens, shared, d, moe),
                    (rows, d, 2 * width, moe * experts), (rows, width, d, moe * experts)]
    return [p for p in forward if p[3]] + [(m, n, k, times) for m, k, n, times in forward if times]


BARE = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
total = 0.0
for shape in sys.argv[2:]:
    m, k, n, times = map(int, shape.split(","))
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    y = torch.empty(m, n, dtype=torch.bfloat16)
    torch.mm(x, w.t(), out=y)
    best = float("inf")
    for _ in range(15):
        began = time.perf_counter()
        torch.mm(x, w.t(), out=y)
        best = min(best, time.perf_counter() - began)
    total += times * best
print(total)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=33)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--program", default="build/release/bin/tailor")
    arguments = parser.parse_args()
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    experts = MIXTURES.get(config["model_type"])

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment = dict(os.environ, TAILOR_CACHE=str(work / "cache"), TAILOR_DATA=str(work / "data"))
        peer = [sys.executable, str(HERE / "peer_peft.py"), arguments.model, "--dtype", "bf16",
                "--rank", str(RANK), "--alpha", str(ALPHA), "--seq-len", str(SEQUENCE), "--batch", str(ROWS),
                "--threads", str(arguments.threads), "--untimed", str(WARM_UP)]
        targets = "attention, experts" if experts else "attention, dense_mlp"
        if experts:
            attention, module = experts
            peer += ["--targets", attention, "--target-params", f"{module}.gate_up_proj,{module}.down_proj"]
        run(peer + ["--data", arguments.data, "--dump-tokenized", str(work / "rows.jsonl"),
                    "--steps", str(arguments.steps), "--time-limit", "1"], environment)
        documents_of(work / "rows.jsonl", work / "documents.jsonl")

        ours, bare = [], []
        theirs = {"float32": [], "bfloat16": []}
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
            seconds = sum(s["seconds"] for s in steps)
            tokens, labels = sum(s["tokens"] for s in steps), sum(s["trained_tokens"] for s in steps)
            ours.append((tokens / seconds, memory))
            shapes = products_of(config, tokens // len(steps), labels // len(steps))
            text, _ = run([sys.executable, "-c", BARE, str(arguments.threads),
                           *(",".join(map(str, shape)) for shape in shapes)], environment)
            gflop = 2e-9 * sum(m * k * n * times for m, k, n, times in shapes)
            bare.append((float(text) * len(steps) / seconds, gflop / float(text)))
            for factors, options in (("float32", []), ("bfloat16", ["--bf16-adapter"])):
                text, memory = run(peer + ["--tokenized", str(work / "rows.jsonl"), "--steps", str(arguments.steps)]
                                   + options, environment)
                theirs[factors].append((json.loads(text)["tokens_per_second"], memory))
            print(f"round {number + 1}: tailor {ours[-1][0]:.0f} tokens/s {ours[-1][1]:.0f} MB; "
                  + "; ".join(f"peer, {name} factors, {r[-1][0]:.0f} tokens/s {r[-1][1]:.0f} MB" for name, r in theirs.items())
                  + f"; bare products {bare[-1][1]:.0f} GFLOP/s, {100 * bare[-1][0]:.0f} % of our step", flush=True)

    def middle(results):
        return statistics.median(r[0] for r in results)

    print(json.dumps({
        "model": Path(arguments.model).name, "rounds": arguments.rounds, "steps_timed": arguments.steps - WARM_UP,
        "tailor_tokens_per_second": round(middle(ours), 1), "tailor_peak_mb": round(max(r[1] for r in ours)),
        "peer": {name: {
            "tokens_per_second": round(middle(results), 1), "peak_mb": round(max(r[1] for r in results)),
            "speed_ratio": round(middle(ours) / middle(results), 2),
            "peak_memory_ratio": round(max(r[1] for r in ours) / max(r[1] for r in results), 2),
        } for name, results in theirs.items()},
        "share_of_bare_products": round(middle(bare), 2),
        "bare_products_gflops": round(statistics.median(r[1] for r in bare)),
        "load_average": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
