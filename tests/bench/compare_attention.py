#!/usr/bin/env python3
"""Latent attention alone, forward and backward with LoRA, beside transformers' DeepseekV3Attention with PEFT.

Both compute x + attention(norm(x)) of one document and its gradients, of x and of the factors of q_a, q_b, kv_a and o
(rank 8), from the same weights, factors and inputs; results are compared before times are. Rounds are interleaved and
the fastest of all counts. The peer's attention is LibTorch's scaled_dot_product_attention; its factors are float32, as
PEFT makes them, and bfloat16, which is faster.

usage: compare_attention.py [--geometry r1 small] [--dtype bfloat16 float32] [--tokens 1024] [--rounds 4]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "oracle"))
from hugging_face import run_main

import torch

ROOT = Path(__file__).resolve().parents[2]
RANK, ALPHA = 8, 16
TARGETS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
# R1's own heads, and those of the demo's model (tools/demo_model/upcycle.py).
GEOMETRIES = {
    "r1": {"hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
           "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    "small": {"hidden_size": 576, "num_attention_heads": 9, "q_lora_rank": 576, "kv_lora_rank": 576,
              "qk_nope_head_dim": 16, "qk_rope_head_dim": 192, "v_head_dim": 64},
}


def make_config(geometry):
    import transformers

    sizes = GEOMETRIES[geometry]
    return transformers.DeepseekV3Config(
        **sizes, num_key_value_heads=sizes["num_attention_heads"], vocab_size=8, num_hidden_layers=1,
        first_k_dense_replace=0, intermediate_size=8, moe_intermediate_size=8, n_shared_experts=1, n_routed_experts=2,
        n_group=1, topk_group=1, num_experts_per_tok=2, num_mtp_layers=0, max_position_embeddings=163840,
        rope_parameters=YARN, attn_implementation="sdpa", architectures=["DeepseekV3ForCausalLM"],
    )


class Block(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RMSNorm

        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DeepseekV3Attention(config, 0)


class Model(torch.nn.Module):
    """Named as the whole model is, so that PEFT's files are."""

    def __init__(self, config):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([Block(config)])

    def forward(self, x, rotary):
        block = self.model.layers[0]
        return x + block.self_attn(block.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[0]


def write_model(config, model, folder):
    """The attention under test in a model whose every other part is as small as it can be."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    D, mlp = config.hidden_size, "model.layers.0.mlp."
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    for name, shape in {
        "model.embed_tokens.weight": (8, D), "lm_head.weight": (8, D), "model.norm.weight": (D,),
        "model.layers.0.post_attention_layernorm.weight": (D,), mlp + "gate.weight": (2, D),
        mlp + "gate.e_score_correction_bias": (2,),
        **{mlp + f"{expert}.{part}_proj.weight": ((D, 8) if part == "down" else (8, D))
           for expert in ("experts.0", "experts.1", "shared_experts") for part in ("gate", "up", "down")},
    }.items():
        tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")


class Peer:
    def __init__(self, config, model, adapter, dtype, wide_factors, x, dh):
        import copy

        import peft
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

        base = copy.deepcopy(model).to(dtype)
        self.model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True, autocast_adapter_dtype=wide_factors)
        if not wide_factors:
            self.model = self.model.to(dtype)
        self.x, self.dh = x.to(dtype)[None].requires_grad_(), dh.to(dtype)[None]
        self.rotary = DeepseekV3RotaryEmbedding(config)(self.x, torch.arange(x.shape[0])[None])

    def step(self):
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None
        began = time.perf_counter()
        h = self.model(self.x, self.rotary)
        turned = time.perf_counter()
        h.backward(self.dh)
        return h.detach(), {"forward": turned - began, "backward": time.perf_counter() - turned}


def apart(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check(folder, peer, h):
    """Largest relative difference of results and gradients."""
    from safetensors.torch import load_file

    ours, gradients = load_file(folder / "output.safetensors"), load_file(folder / "gradients/adapter_model.safetensors")
    worst = {"h": apart(ours["h"], h[0]), "dx": apart(ours["dx"], peer.x.grad[0])}
    named = {name.replace(".default", ""): p.grad for name, p in peer.model.named_parameters() if p.grad is not None}
    if named.keys() != gradients.keys() or len(named) != 2 * len(TARGETS):
        sys.exit(f"error: factors {sorted(named)} of the peer, {sorted(gradients)} of ours")
    worst["factors"] = max(apart(gradients[name], named[name]) for name in named)
    return worst


def compare(geometry, dtype, arguments, work):
    import peft

    torch.manual_seed(0)
    config = make_config(geometry)
    folder, tokens = work / f"{geometry}-{dtype}", arguments.tokens
    base = Model(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    write_model(config, base, folder / "model")
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    import copy

    adapted = peft.get_peft_model(copy.deepcopy(base), lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(folder / "adapter")
    del adapted
    from safetensors.torch import save_file

    # Of numbers that bfloat16 has, so that both types see the same.
    x, dh = (torch.randn(tokens, config.hidden_size).to(torch.bfloat16).float() for _ in range(2))
    save_file({"x": x, "dh": dh}, folder / "input.safetensors")

    kind = getattr(torch, dtype)
    factors = {"float32": True} if dtype == "float32" else {"float32": True, "bfloat16": False}
    command = [arguments.program, str(folder), dtype, str(arguments.threads), str(arguments.steps)]
    ours, theirs, worst = [], {name: [] for name in factors}, None
    peers = {name: Peer(config, base, folder / "adapter", kind, wide, x, dh) for name, wide in factors.items()}
    for _ in range(arguments.rounds):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        ours += json.loads(done.stdout)["rounds"]
        for name, peer in peers.items():
            for _ in range(arguments.steps):
                h, seconds = peer.step()
                theirs[name].append(seconds)
            if name == "float32" and worst is None:
                worst = check(folder, peer, h)

    def fastest(steps):
        best = {part: min(step[part] for step in steps) for part in ("forward", "backward")}
        best["tokens_per_second"] = round(tokens / min(step["forward"] + step["backward"] for step in steps), 1)
        return best

    result = {"geometry": geometry, "dtype": dtype, "tokens": tokens, "apart": worst, "tailor": fastest(ours), "peer": {}}
    for name, steps in theirs.items():
        best = fastest(steps)
        best["speed_ratio"] = round(result["tailor"]["tokens_per_second"] / best["tokens_per_second"], 2)
        result["peer"][f"{name} factors"] = best
    print(json.dumps(result), flush=True)
    limit = 1e-4 if dtype == "float32" else 3e-2
    if not max(worst.values()) <= limit:
        sys.exit(f"error: results differ by more than {limit}: {worst}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: compare_attention.py --geometry small --tokens 2048",
    )
    parser.add_argument("--geometry", nargs="+", choices=sorted(GEOMETRIES), default=["small", "r1"])
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--steps", type=int, default=3, help="forward and backward in each (default 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--program", default=str(ROOT / "build/release/bin/bench_attention"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="tailor_attention_") as work:
        for geometry in arguments.geometry:
            for dtype in arguments.dtype:
                compare(geometry, dtype, arguments, Path(work))
    return 0


if __name__ == "__main__":
    run_main(main)
