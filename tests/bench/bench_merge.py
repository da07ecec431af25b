#!/usr/bin/env python3
"""`tailor merge` beside `cp`, and beside transformers + PEFT, on this machine, runs interleaved.

Makes random mixture-of-experts checkpoints (Maverick's kind or DeepSeek's) with an adapter on attention and all experts, drops the
page cache before every run, and prints the base's bytes per second: of the merge, of `cp` with a sync, and of PEFT loading, merging and
saving. Every program's files are on disk when its time ends; peak memory is the whole process's.

usage: bench_merge.py [--gb 2] [--kind llama4|deepseek_v3] [--rounds 3] [--peft] [--program build/release/bin/tailor] [--work DIR]
       bench_merge.py --true-shape [--fp8] --work DIR    one layer of 64 experts in Maverick's sizes: a 10.7 GB and a 5.4 GB tensor

--fp8: Maverick's kind with fused experts in fp8, inputs first, a scale for every output.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

RANK, ALPHA = 8, 16
PEFT = """
import os, sys, torch, transformers, peft
torch.set_num_threads(int(sys.argv[4]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3], max_shard_size="500MB")
"""


def run(command: list[str], environment: dict | None = None) -> tuple[float, float]:
    """Seconds until everything is on disk, and peak resident memory in MB."""
    os.sync()
    drop_caches()
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        os.sync()
        seconds = time.perf_counter() - began
        if status != 0:
            err.seek(0)
            sys.exit(f"error: {command[:4]} ended with status {status}\n{err.read()[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


def drop_caches() -> None:
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("note: the page cache could not be dropped (not root): reads may come from it", file=sys.stderr)


class Writer:
    """Safetensors shards of random numbers, a tensor at a time."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.limit = folder, shard_bytes
        self.shards, self.size = [[]], 0
        folder.mkdir(parents=True)
        draws = numpy.random.Generator(numpy.random.Philox(7))
        # Random bfloat16 numbers near N(0, 0.02), made once and shifted from tensor to tensor.
        values = (draws.standard_normal(1 << 24, dtype=numpy.float32) * 0.02).view(numpy.uint32)
        codes = draws.integers(0, 256, 1 << 24, dtype=numpy.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0  # no numbers
        self.blocks = {"BF16": (values >> 16).astype(numpy.uint16), "F8_E4M3": codes,
                       "F32": draws.uniform(5e-5, 2e-4, 1 << 22).astype(numpy.float32)}

    def add(self, name: str, shape: list[int], dtype: str = "BF16") -> None:
        size = self.blocks[dtype].itemsize * int(numpy.prod(shape))
        if self.shards[-1] and self.size + size > self.limit:
            self.shards.append([])
            self.size = 0
        self.shards[-1].append((name, shape, size, dtype))
        self.size += size

    def finish(self) -> int:
        total, weight_map = 0, {}
        for number, shard in enumerate(self.shards, 1):
            file_name = f"model-{number:05}-of-{len(self.shards):05}.safetensors"
            header, at = {"__metadata__": {"format": "pt"}}, 0
            for name, shape, size, dtype in shard:
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
                weight_map[name] = file_name
                at += size
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with open(self.folder / file_name, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for index, (_, _, size, dtype) in enumerate(shard):
                    block = self.blocks[dtype]
                    left, begin = size // block.itemsize, (977 * index) % (len(block) // 2)
                    while left > 0:
                        piece = block[begin:begin + left]
                        piece.tofile(file)
                        left -= len(piece)
                        begin = 0
            total += at
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return total


def make_model(folder: Path, kind: str, gb: float, hidden: int, inner: int, experts: int, layers: int | None,
               fp8: bool = False) -> int:
    llama4 = kind == "llama4"
    per_layer = experts * 3 * hidden * inner * (1 if fp8 else 2)
    moe_layers = layers or max(1, round(gb * 1e9 / (per_layer * 1.15)))
    heads, head_dim, kv_heads, vocab = max(4, hidden // 64), 64, max(1, hidden // 256), 4096
    config = {
        "vocab_size": vocab, "hidden_size": hidden, "num_attention_heads": heads, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_theta": 500000.0,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    }
    writer = Writer(folder, 20_000_000_000 if layers else 500_000_000)
    writer.add("model.embed_tokens.weight", [vocab, hidden])
    if llama4:
        count = 1 if layers else 2 * moe_layers
        config |= {
            "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "intermediate_size": inner,
            "intermediate_size_mlp": 2 * inner, "num_hidden_layers": count, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "num_local_experts": experts, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1 if layers else 2, "use_qk_norm": False, "attention_chunk_size": 4096,
        }
        moe = [True] if layers else [layer % 2 == 1 for layer in range(count)]
    else:
        count = moe_layers + 1
        config |= {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "intermediate_size": 2 * inner,
            "moe_intermediate_size": inner, "num_hidden_layers": count, "num_key_value_heads": heads,
            "n_routed_experts": experts, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
            "first_k_dense_replace": 1, "moe_layer_freq": 1, "q_lora_rank": 256, "kv_lora_rank": 128,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "routed_scaling_factor": 2.5,
            "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0,
        }
        moe = [layer > 0 for layer in range(count)]
    for layer in range(count):
        name = f"model.layers.{layer}."
        writer.add(name + "input_layernorm.weight", [hidden])
        writer.add(name + "post_attention_layernorm.weight", [hidden])
        attention = name + "self_attn."
        if llama4:
            writer.add(attention + "q_proj.weight", [heads * head_dim, hidden])
            writer.add(attention + "k_proj.weight", [kv_heads * head_dim, hidden])
            writer.add(attention + "v_proj.weight", [kv_heads * head_dim, hidden])
            writer.add(attention + "o_proj.weight", [hidden, heads * head_dim])
        else:
            writer.add(attention + "q_a_proj.weight", [256, hidden])
            writer.add(attention + "q_a_layernorm.weight", [256])
            writer.add(attention + "q_b_proj.weight", [heads * 96, 256])
            writer.add(attention + "kv_a_proj_with_mqa.weight", [128 + 32, hidden])
            writer.add(attention + "kv_a_layernorm.weight", [128])
            writer.add(attention + "kv_b_proj.weight", [heads * 128, 128])
            writer.add(attention + "o_proj.weight", [hidden, heads * 64])
        ffn = name + ("feed_forward." if llama4 else "mlp.")
        shared = ffn if not moe[layer] else ffn + ("shared_expert." if llama4 else "shared_experts.")
        width = inner if moe[layer] else 2 * inner
        for projection, shape in (("gate", [width, hidden]), ("up", [width, hidden]), ("down", [hidden, width])):
            writer.add(f"{shared}{projection}_proj.weight", shape)
        if not moe[layer]:
            continue
        writer.add(ffn + ("router.weight" if llama4 else "gate.weight"), [experts, hidden])
        if llama4:
            for part, inputs, outputs in (("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden)):
                writer.add(f"{ffn}experts.{part}", [experts, inputs, outputs], "F8_E4M3" if fp8 else "BF16")
                if fp8:
                    writer.add(f"{ffn}experts.{part}_scale", [experts, 1, outputs], "F32")
            continue
        writer.add(ffn + "gate.e_score_correction_bias", [experts])
        for expert in range(experts):
            writer.add(f"{ffn}experts.{expert}.gate_proj.weight", [inner, hidden])
            writer.add(f"{ffn}experts.{expert}.up_proj.weight", [inner, hidden])
            writer.add(f"{ffn}experts.{expert}.down_proj.weight", [hidden, inner])
    writer.add("model.norm.weight", [hidden])
    writer.add("lm_head.weight", [vocab, hidden])
    total = writer.finish()
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return total


def make_adapter(folder: Path, model: Path) -> None:
    """PEFT 0.21's layout, rank 8, on attention and all experts."""
    config = json.loads((model / "config.json").read_text())
    llama4 = config["model_type"] == "llama4_text"
    hidden = config["hidden_size"]
    experts = config["num_local_experts" if llama4 else "n_routed_experts"]
    inner = config["intermediate_size" if llama4 else "moe_intermediate_size"]
    names = {}
    for file in sorted(model.glob("*.safetensors")):
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        names |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
    factors = {}
    for name, shape in names.items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in modules:
            factors[module] = ((RANK, shape[1]), (shape[0], RANK))
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}." + ("feed_forward.experts" if llama4 else "mlp.experts")
        if not any(name.startswith(place + ".") for name in names):
            continue
        many = RANK * experts
        sides = ((2 * inner, hidden), (hidden, inner)) if llama4 else ((hidden, 2 * inner), (inner, hidden))
        for module, (a, b) in zip((place + ".base_layer", place), sides):
            factors[module] = ((many, a), (b, many))
    folder.mkdir()
    draws = numpy.random.Generator(numpy.random.Philox(3))
    header, at, arrays = {}, 0, []
    for module, shapes in sorted(factors.items()):
        for letter, shape in zip("AB", shapes):
            array = draws.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.01)
            header[f"base_model.model.{module}.lora_{letter}.weight"] = {
                "dtype": "F32", "shape": list(shape), "data_offsets": [at, at + array.nbytes]}
            at += array.nbytes
            arrays.append(array)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            array.tofile(file)
    parameters = "feed_forward.experts." if llama4 else "mlp.experts."
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2", "r": RANK, "lora_alpha": ALPHA,
        "bias": "none", "base_model_name_or_path": str(model), "inference_mode": True, "lora_dropout": 0.0,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in factors if "experts" not in module}),
        "target_parameters": [parameters + "gate_up_proj", parameters + "down_proj"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--kind", choices=("llama4", "deepseek_v3"), default="llama4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft", action="store_true", help="with transformers + PEFT as well")
    parser.add_argument("--true-shape", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--program", type=Path, default=Path("build/release/bin/tailor"))
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench_merge_", dir=arguments.work))
    try:
        if arguments.true_shape:
            bytes_ = make_model(work / "model", "llama4", 0, 5120, 8192, 64, layers=1, fp8=arguments.fp8)
        else:
            bytes_ = make_model(work / "model", arguments.kind, arguments.gb, 1024, 1024, 16, layers=None, fp8=arguments.fp8)
        make_adapter(work / "adapter", work / "model")
        adapter_bytes = (work / "adapter" / "adapter_model.safetensors").stat().st_size
        print(f"base {bytes_ / 1e9:.2f} GB, adapter {adapter_bytes / 1e6:.0f} MB, {len(os.sched_getaffinity(0))} cores")
        merge = [str(arguments.program.resolve()), "merge", "--base", str(work / "model"), "--adapter",
                 str(work / "adapter"), "--out", str(work / "merged"), "--threads", str(arguments.threads)]
        sides = {"tailor merge": merge}
        if not arguments.true_shape:
            sides["cp"] = ["cp", "-r", str(work / "model"), str(work / "merged")]
        if arguments.peft:
            sides["PEFT"] = [sys.executable, "-c", PEFT, str(work / "model"), str(work / "adapter"), str(work / "merged"),
                             str(len(os.sched_getaffinity(0)))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        results = {name: [] for name in sides}
        for _ in range(1 if arguments.true_shape else arguments.rounds):
            for name, command in sides.items():
                seconds, peak = run(command, environment)
                receipt = work / "merged" / "merge_receipt.json"
                if receipt.exists():  # the kernel's figure of a child begins with this program's own
                    peak = json.loads(receipt.read_text())["run"]["peak_rss_bytes"] / 1e6
                results[name].append((seconds, peak))
                shutil.rmtree(work / "merged")
        ours = statistics.median(seconds for seconds, _ in results["tailor merge"])
        for name, runs in results.items():
            seconds = statistics.median(each for each, _ in runs)
            peak = "" if name == "cp" else f"  peak {max(rss for _, rss in runs):6.0f} MB"
            print(f"{name:14} {seconds:7.2f} s  {bytes_ / seconds / 1e9:5.2f} GB/s{peak}  merge is {seconds / ours:.2f} x as fast   runs: {' '.join(f'{each:.2f}' for each, _ in runs)}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
