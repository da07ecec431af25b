"""Sparse upcycling: a dense Llama becomes a mixture of experts that computes nearly the same.

In a mixture layer the dense MLP's even neurons become the shared expert, and the odd neurons are
copied into every routed expert, with a little noise of its own so that experts differ. Wherever the
router's gate is 1, shared(x) + expert(x) = dense(x) up to that noise. What is left to each target
architecture is to bring its gate to 1 and to lay attention out its own way.

To add one: a subclass of Upcycled, and a line in ARCHITECTURES.
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


class Upcycled:
    """What the target architectures share. A subclass gives `config`, `moe_layers`, names, and
    `attention()` and `experts()`."""

    mlp_name = ""  # between "model.layers.N." and its projections
    shared_name = ""

    def __init__(self, dense, experts, token_ids):
        self.dense = dense
        self.experts = experts
        self.token_ids = token_ids

    def common_config(self):
        source = self.dense.config
        keys = (
            "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range",
            "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "pad_token_id",
            "rms_norm_eps", "vocab_size",
        )
        return {
            **{key: source[key] for key in keys},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
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
            yield from self.attention(prefix)
            if layer in self.moe_layers:
                yield from self.mixture(prefix, mlp_inputs[layer])
            else:
                for part in ("gate_proj", "up_proj", "down_proj"):
                    weight = dense.weight(f"{prefix}mlp.{part}")
                    yield f"{prefix}{self.mlp_name}{part}.weight", weight
        yield "model.norm.weight", dense.weight("model.norm")
        tied = dense.config["tie_word_embeddings"]
        yield "lm_head.weight", dense.weight("model.embed_tokens" if tied else "lm_head")

    def mixture(self, layer_prefix, x_TH):
        prefix = layer_prefix + self.mlp_name
        gate, up, down = (
            self.dense.weight(f"{layer_prefix}mlp.{part}_proj") for part in ("gate", "up", "down")
        )
        yield f"{prefix}{self.shared_name}.gate_proj.weight", gate[0::2]
        yield f"{prefix}{self.shared_name}.up_proj.weight", up[0::2]
        yield f"{prefix}{self.shared_name}.down_proj.weight", down[:, 0::2]
        yield from self.routed(prefix, gate[1::2], up[1::2], down[:, 1::2])
        yield from self.router(prefix, spreading_router(x_TH, self.experts))


class Llama4(Upcycled):
    """Llama4ForCausalLM shaped as Maverick is: every second layer a mixture, the best expert only,
    a shared expert, no qk-norm, an untied head. Every layer uses rotary embedding, as the dense
    model does. The gate is sigmoid(top logit): a loud router brings it to 1."""

    mlp_name, shared_name = "feed_forward.", "shared_expert"

    def __init__(self, dense, experts, token_ids):
        super().__init__(dense, experts, token_ids)
        source = dense.config
        layers = source["num_hidden_layers"]
        self.moe_layers = list(range(1, layers, 2))
        self.config = {
            **self.common_config(),
            "architectures": ["Llama4ForCausalLM"],
            "attention_chunk_size": 8192,
            "attn_scale": 0.1,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "head_dim": source["head_dim"],
            "interleave_moe_layer_step": 2,
            "intermediate_size": source["intermediate_size"] // 2,  # of an expert
            "intermediate_size_mlp": source["intermediate_size"],  # of a dense layer
            "layer_types": ["chunked_attention"] * layers,
            "model_type": "llama4_text",
            "moe_layers": self.moe_layers,
            "no_rope_layers": [1] * layers,  # 1 means rotary embedding IS used
            "num_experts_per_tok": 1,
            "num_key_value_heads": source["num_key_value_heads"],
            "num_local_experts": experts,
            "output_router_logits": False,
            "rope_scaling": None,
            "rope_theta": source["rope_theta"],
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "use_qk_norm": False,
        }
        self.config = dict(sorted(self.config.items()))

    def attention(self, layer_prefix):
        prefix = layer_prefix + "self_attn."
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = self.dense.weight(prefix + part)
            if part in heads:
                weight = pairs_from_halves(weight, heads[part])
            yield f"{prefix}{part}.weight", weight

    def routed(self, prefix, gate, up, down):
        # Llama 4 stores experts in one tensor, as [expert, in, out], gate before up.
        def copies(name, weight):
            return torch.stack([
                noisy(weight, f"{prefix}{name}.{expert}").T for expert in range(self.experts)
            ])

        yield prefix + "experts.gate_up_proj", copies("gate_up_proj", torch.cat([gate, up]))
        yield prefix + "experts.down_proj", copies("down_proj", down)

    def router(self, prefix, weight):
        yield prefix + "router.weight", weight


class DeepseekV3(Upcycled):
    """DeepseekV3ForCausalLM shaped as R1 is: latent attention, a dense first layer, 2 experts
    a token from one of 2 groups, normalised weights, a shared expert. Weights sum to 1 whatever the router says.

    The latents hold the whole input: W_qa = W_kva = diag(1 / w) undoes the input norm's weights w,
    so a latent is x / rms(x), which its own norm leaves as it is, and what expands it carries w.
    The shared rotary key is all key-value heads of the dense model side by side; a query head is
    zero outside its own group's part. Rotary frequencies of so wide a key are not the dense
    model's: longrope's factor for each pair brings them back."""

    mlp_name, shared_name = "mlp.", "shared_experts"
    NOPE_DIM = 16  # the dense model has none: these columns are zero
    ROUTER_LOGITS = 2.0  # their standard deviation: choices spread, weights stay away from 0 and 1

    def __init__(self, dense, experts, token_ids):
        super().__init__(dense, experts, token_ids)
        source = dense.config
        heads, kv_heads = source["num_attention_heads"], source["num_key_value_heads"]
        head_dim, theta = source["head_dim"], source["rope_theta"]
        hidden = source["hidden_size"]
        self.moe_layers = list(range(1, source["num_hidden_layers"]))
        pairs = kv_heads * head_dim // 2
        wanted = [theta ** (2 * (j % (head_dim // 2)) / head_dim) for j in range(pairs)]
        factors = [want / theta ** (j / pairs) for j, want in enumerate(wanted)]
        self.config = dict(sorted({
            **self.common_config(),
            "architectures": ["DeepseekV3ForCausalLM"],
            "first_k_dense_replace": 1,
            "intermediate_size": source["intermediate_size"],
            "kv_lora_rank": hidden,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": source["intermediate_size"] // 2,
            "n_group": 2,
            "n_routed_experts": experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": min(2, experts // 2),
            "num_key_value_heads": heads,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": hidden,
            "qk_nope_head_dim": self.NOPE_DIM,
            "qk_rope_head_dim": kv_heads * head_dim,
            "rope_interleave": True,
            "rope_parameters": {
                "attention_factor": 1.0,
                "factor": 1.0,
                "long_factor": factors,
                "original_max_position_embeddings": source["max_position_embeddings"],
                "rope_theta": theta,
                "rope_type": "longrope",
                "short_factor": factors,
            },
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "v_head_dim": head_dim,
        }.items()))

    def attention(self, layer_prefix):
        source, prefix = self.dense.config, layer_prefix + "self_attn."
        heads, kv_heads = source["num_attention_heads"], source["num_key_value_heads"]
        head_dim, hidden = source["head_dim"], source["hidden_size"]
        rope = kv_heads * head_dim
        q, k, v, o = (self.dense.weight(f"{prefix}{part}_proj") for part in "qkvo")
        w = self.dense.weight(layer_prefix + "input_layernorm")
        q = pairs_from_halves(q, heads).view(heads, head_dim, hidden)
        k = pairs_from_halves(k, kv_heads)
        # Scores are divided by sqrt(nope + rope) here, by sqrt(head_dim) in the dense model.
        gain = ((self.NOPE_DIM + rope) / head_dim) ** 0.5
        q_b = torch.zeros(heads, self.NOPE_DIM + rope, hidden)
        kv_b = torch.zeros(heads, self.NOPE_DIM + head_dim, hidden)
        for head in range(heads):
            group = head * kv_heads // heads
            first = self.NOPE_DIM + group * head_dim
            q_b[head, first : first + head_dim] = q[head] * gain
            kv_b[head, self.NOPE_DIM :] = v.view(kv_heads, head_dim, hidden)[group]
        yield prefix + "q_a_proj.weight", torch.diag(1 / w)
        yield prefix + "q_a_layernorm.weight", torch.ones(hidden)
        yield prefix + "q_b_proj.weight", q_b.reshape(-1, hidden) * w
        yield prefix + "kv_a_proj_with_mqa.weight", torch.cat([torch.diag(1 / w), k])
        yield prefix + "kv_a_layernorm.weight", torch.ones(hidden)
        yield prefix + "kv_b_proj.weight", kv_b.reshape(-1, hidden) * w
        yield prefix + "o_proj.weight", o

    def routed(self, prefix, gate, up, down):
        for expert in range(self.experts):
            for part, weight in (("gate", gate), ("up", up), ("down", down)):
                name = f"{prefix}experts.{expert}.{part}_proj.weight"
                yield name, noisy(weight, name)

    def router(self, prefix, weight):
        yield prefix + "gate.weight", weight * (self.ROUTER_LOGITS / ROUTER_GAIN)
        yield prefix + "gate.e_score_correction_bias", torch.zeros(self.experts)


ARCHITECTURES = {"llama4": Llama4, "deepseek_v3": DeepseekV3}
