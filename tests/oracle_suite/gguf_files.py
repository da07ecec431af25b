#!/usr/bin/env python3
"""`tailor model gguf` and GGUF files as models, against PyPI's gguf, transformers and llama.cpp.

llama, qwen2, llama4, deepseek   a tiny model is written as f32, bf16 and q8_0. gguf must read every
    tensor, which must hold what transformers' weights are in llama.cpp's order: bit for bit, of q8_0
    the bytes of gguf.quantize. llama.cpp must compute transformers' logits from the f32 file.
written   gguf writes a Llama in F16, BF16, Q8_0, Q5_0 and Q4_0; `tailor eval` must give transformers'
    losses with the weights that gguf.dequantize makes of it.
demo   the demo's dense model as GGUF: llama.cpp must read the prompt as the same ids and answer
    greedily as `tailor generate` does. (Its mixture llama.cpp cannot run: tests/data/gguf.)

llama.cpp is PyPI's cyllama, a wheel with llama.cpp built in, installed into the cache the first time;
without a package index what needs it is skipped (exit code 77).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import extra_packages

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
RUN_LLAMA_CPP = ROOT / "tests" / "oracle" / "llama_cpp_run.py"
PACKAGE = "cyllama==0.2.18"
LOGIT = 5e-5  # of logits up to 5, both in float32
EXACT_LOSS, ROUNDED_LOSS = 1e-5, 3e-4  # relative; quantised weights are read as float16

MODELS = {"llama": "llama_tiny", "qwen2": "qwen2_tiny", "llama4": "llama4_maverick_tiny",
          "deepseek": "deepseek_v3_tiny"}
# What llama.cpp takes for granted of Llama 4.
LLAMA4 = {"use_qk_norm": True, "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1,
          "attn_temperature_tuning": True, "no_rope_layer_interval": 4}


def run_llama_cpp(*arguments):
    folder = extra_packages.obtain(PACKAGE, flags=["--no-deps", "--only-binary", ":all:"])
    done = subprocess.run([sys.executable, str(RUN_LLAMA_CPP), *map(str, arguments)],
                          env={**os.environ, "PYTHONPATH": str(folder)},
                          capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"llama.cpp failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


class Tailor:
    def __init__(self, program, work):
        self.program = program
        self.environment = {**os.environ, "TAILOR_CACHE": str(work / "cache"),
                            "TAILOR_DATA": str(work / "data")}

    def run(self, *command, fails_with=0):
        done = subprocess.run([str(self.program), *map(str, command)], env=self.environment,
                              capture_output=True, text=True)
        if done.returncode != fails_with:
            sys.exit(f"{command}\nended with {done.returncode}:\n{done.stderr}{done.stdout}")
        return done.stderr if fails_with else done.stdout


def pairs(weight, heads):
    """llama.cpp's order of the rows of llama's q and k."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def expected_tensors(family, model):
    """{GGUF name: float32 array} of transformers' weights; experts may be fused there."""
    import numpy as np
    config = model.config
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "feed_forward.gate_proj": "ffn_gate", "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down", "feed_forward.router": "ffn_gate_inp",
        "mlp.gate": "ffn_gate_inp",
    }
    for shared in ("feed_forward.shared_expert", "mlp.shared_experts"):
        for kind in ("gate", "up", "down"):
            parts[f"{shared}.{kind}_proj"] = f"ffn_{kind}_shexp"
    out = {}
    for name, weight in model.state_dict().items():
        weight = weight.float().numpy()
        module, _, kind = name.rpartition(".")
        if module in names:
            if not (module == "lm_head" and config.tie_word_embeddings):
                out[f"{names[module]}.{kind}"] = weight
            continue
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        block = f"blk.{layer}"
        if part.endswith("experts.gate_up_proj"):
            if family == "llama4":  # inputs first
                weight = weight.swapaxes(1, 2)
            half = weight.shape[1] // 2
            out[f"{block}.ffn_gate_exps.weight"] = weight[:, :half]
            out[f"{block}.ffn_up_exps.weight"] = weight[:, half:]
        elif part.endswith("experts.down_proj"):
            out[f"{block}.ffn_down_exps.weight"] = (
                weight.swapaxes(1, 2) if family == "llama4" else weight)
        elif part == "mlp.gate.e_score_correction_bias":
            out[f"{block}.exp_probs_b.bias"] = weight
        elif part == "self_attn.kv_b_proj.weight":
            heads, nope = config.num_attention_heads, config.qk_nope_head_dim
            both = weight.reshape(heads, nope + config.v_head_dim, -1)
            out[f"{block}.attn_k_b.weight"] = both[:, :nope].swapaxes(1, 2)
            out[f"{block}.attn_v_b.weight"] = both[:, nope:]
        else:
            module, _, kind = part.rpartition(".")
            if family == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = pairs(weight, config.num_attention_heads if "q_proj" in module
                               else config.num_key_value_heads)
            out[f"{block}.{parts[module]}.{kind}"] = weight
    return {name: np.ascontiguousarray(weight) for name, weight in out.items()}


def check_file(path, expected, kind):
    """Every tensor there, no other, and each what gguf itself would write."""
    import gguf
    import numpy as np
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    found.pop("rope_freqs.weight", None)
    if set(found) != set(expected):
        sys.exit(f"{path}: tensors {sorted(set(found) ^ set(expected))}")
    types = set()
    for name, weight in expected.items():
        tensor = found[name]
        if list(reversed(tensor.shape.tolist())) != list(weight.shape):
            sys.exit(f"{name} is {tensor.shape}, needed: {weight.shape} reversed")
        plain = weight.ndim == 1 or "norm" in name or "ffn_gate_inp" in name
        want = "F32" if plain else kind
        if want == "Q8_0" and weight.shape[-1] % 32:
            want = "F16"
        if tensor.tensor_type.name != want:
            sys.exit(f"{name} is {tensor.tensor_type.name}, needed: {want}")
        types.add(want)
        theirs = gguf.quantize(weight, tensor.tensor_type)
        if not np.array_equal(np.asarray(tensor.data).view(np.uint8).reshape(-1),
                              theirs.view(np.uint8).reshape(-1)):
            sys.exit(f"{path}: {name} is not what gguf.quantize writes")
    print(f"{kind}: {len(expected)} tensors of types {sorted(types)} are gguf's, bit for bit")


def check_family(family, tailor, work):
    import torch
    from transformers import AutoModelForCausalLM
    folder = work / "model"
    folder.mkdir()
    source = GOLDEN / MODELS[family] / "model"
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if family == "llama4":
        config = json.loads((folder / "config.json").read_text())
        config.update(LLAMA4)
        for key in ("layer_types", "no_rope_layers"):
            config.pop(key, None)
        (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = expected_tensors(family, model)
    for kind in ("f32", "bf16", "q8_0"):
        tailor.run("model", "gguf", folder, "--to", work / f"{kind}.gguf", "--dtype", kind)
        check_file(work / f"{kind}.gguf", expected, kind.upper())
    ids = [(7 * i + 3) % 250 for i in range(40)]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    theirs = torch.tensor(run_llama_cpp("logits", work / "f32.gguf", json.dumps(ids)))
    worst, largest = (theirs - logits).abs().max().item(), logits.abs().max().item()
    print(f"llama.cpp's logits differ by up to {worst:.1e} from transformers', of up to {largest:.1f}")
    if not worst <= LOGIT:
        sys.exit(f"more than {LOGIT}")


def write_llama(path, model, kinds):
    """A Llama as gguf writes it; `kinds` has a type for every part of a name, "" for the rest."""
    import gguf
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_custom_alignment(64)
    back = {}
    for name, weight in expected_tensors("llama", model).items():
        kind = next(kind for part, kind in kinds.items() if part in name)
        if weight.ndim == 1 or weight.shape[-1] % 32:
            kind = "F32"
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        back[name] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back


def losses(model, rows):
    import torch
    out = []
    for ids in rows:
        text = torch.tensor([ids])
        with torch.no_grad():
            logits = model(text).logits[0, :-1].double()
        out.append(torch.nn.functional.cross_entropy(logits, text[0, 1:]).item())
    return out


def check_written(tailor, work):
    import torch
    from transformers import AutoModelForCausalLM
    source = GOLDEN / MODELS["llama"] / "model"
    rows = [[(start + 7 * i) % 250 for i in range(30)] for start in range(20)]
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in rows))
    cases = {"plain": ({"attn": "F16", "ffn": "BF16", "": "F32"}, EXACT_LOSS),
             "quantised": ({"attn_q": "Q8_0", "attn": "Q5_0", "ffn": "Q4_0", "": "Q8_0"}, ROUNDED_LOSS)}
    for name, (kinds, bound) in cases.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        back = write_llama(work / f"{name}.gguf", model, kinds)
        with torch.no_grad():
            for gguf_name, weight in expected_tensors("llama", model).items():
                assert back[gguf_name].shape == weight.shape
            for parameter, weight in model.named_parameters():
                heads = {"q_proj": model.config.num_attention_heads,
                         "k_proj": model.config.num_key_value_heads}
                key = next(k for k, v in expected_names(model).items() if v == parameter)
                value = back[key]
                for part, count in heads.items():
                    if f"{part}.weight" in parameter:  # the reverse of pairs()
                        rows_each = value.shape[0] // count
                        value = value.reshape(count, rows_each // 2, 2, -1).swapaxes(1, 2)
                        value = value.reshape(back[key].shape)
                weight.copy_(torch.from_numpy(value.copy()))
        document = json.loads(tailor.run(
            "eval", "--model", work / f"{name}.gguf", "--data", data, "--dtype", "float32",
            "--per-row", "--json", "--threads", "2"))
        ours = [row["loss"] for row in document["per_row"]]
        theirs = losses(model, rows)
        worst = max(abs(a / b - 1) for a, b in zip(ours, theirs))
        print(f"{name}: {len(ours)} rows, largest relative difference of a row's loss {worst:.1e}")
        if len(ours) != len(rows) or not worst <= bound:
            sys.exit(f"more than {bound}")


def expected_names(model):
    """{GGUF name: transformers' name}, found by marking every weight."""
    import torch
    marked = {}
    with torch.no_grad():
        kept = {name: weight.clone() for name, weight in model.named_parameters()}
        for i, (_, weight) in enumerate(model.named_parameters()):
            weight.fill_(float(i + 1))
        order = [name for name, _ in model.named_parameters()]
        for name, weight in expected_tensors("llama", model).items():
            marked[name] = order[int(weight.flat[0]) - 1]
        for name, weight in model.named_parameters():
            weight.copy_(kept[name])
    return marked


def check_demo(tailor, work):
    from tokenizers import Tokenizer
    maker = ROOT / "tools" / "demo_model" / "make_demo_model.py"
    dense = work / "dense"
    made = subprocess.run([sys.executable, str(maker), "--arch", "dense", str(dense)],
                          capture_output=True, text=True)
    if made.returncode != 0:
        sys.exit(f"the demo's model cannot be made:\n{made.stderr}{made.stdout}")
    file = work / "dense.gguf"
    tailor.run("model", "gguf", dense, "--to", file, "--dtype", "f32")
    tokenizer = Tokenizer.from_file(str(dense / "tokenizer.json"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for question in ("What is the capital of France?", "Name three colours.",
                     "Define the word: tailor", "2 + 2 ="):
        document = json.loads(tailor.run(
            "generate", "--model", dense, "--prompt", question, "--temperature", "0",
            "--tokens-max", "40", "--dtype", "float32", "--json", "--threads", "2"))[0]
        prompt = (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
                  "<|im_start|>assistant\n")
        theirs = run_llama_cpp("greedy", file, prompt, "40")
        if theirs["prompt_ids"] != tokenizer.encode(prompt, add_special_tokens=False).ids:
            sys.exit(f"llama.cpp reads the prompt as {theirs['prompt_ids']}")
        answer = tokenizer.decode(theirs["ids"], skip_special_tokens=True)
        if answer.strip() != document["answer"].strip():
            sys.exit(f"{question}\nllama.cpp: {answer!r}\nTailor:    {document['answer']!r}")
        print(f"{question} {len(theirs['ids'])} tokens are the same: {answer[:60]!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the built tailor")
    parser.add_argument("case", choices=(*MODELS, "written", "demo"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tailor_gguf_") as work:
        tailor = Tailor(arguments.program.resolve(), Path(work))
        if arguments.case == "written":
            check_written(tailor, Path(work))
        elif arguments.case == "demo":
            check_demo(tailor, Path(work))
        else:
            check_family(arguments.case, tailor, Path(work))


if __name__ == "__main__":
    main()
