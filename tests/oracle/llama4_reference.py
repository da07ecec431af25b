"""Llama 4 with LoRA in plain torch, the router's LoRA included: the slow, obvious version.

Letters: B rows, T tokens of a row, N = B * T, H hidden size, h heads, d head size, E experts,
I expert width, r rank. Everything runs in the dtype of the weights given (float32 or float64).

What is easy to get wrong:
  - the gate, sigmoid of the winning logit, multiplies the expert's INPUT, and not the shared
    expert's;
  - experts are stored [E, in, out], gate before up;
  - rotary embedding turns neighbours (0, 1), (2, 3), ...;
  - layers with rotary embedding attend within chunks; layers without it attend to everything before
    them, and scale their queries by a logarithm of the position;
  - the router gets its gradient through that sigmoid alone: which expert wins has none.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

PEFT_PREFIX = "base_model.model."


def load_weights(folder):
    weights = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        weights.update(load_file(path))
    return weights


def rms_norm(x, weight, epsilon):
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return x if weight is None else x * weight


def rotate_neighbours(x_BhTd, cos_Tc, sin_Tc):
    """c = d / 2: element 2i turns together with element 2i + 1."""
    even, odd = x_BhTd[..., 0::2], x_BhTd[..., 1::2]
    turned = (even * cos_Tc - odd * sin_Tc, odd * cos_Tc + even * sin_Tc)
    return torch.stack(turned, dim=-1).flatten(-2)


class Adapter:
    """LoRA factors under PEFT's names and in PEFT's shapes."""

    def __init__(self, tensors, config):
        self.tensors, self.config = tensors, config

    def scale(self):
        rank = self.config["r"]
        return self.config["lora_alpha"] / (math.sqrt(rank) if self.config["use_rslora"] else rank)

    def pair(self, module):
        """(A [r, in], B [out, r]) of a linear module, or None."""
        key = PEFT_PREFIX + module
        if key + ".lora_A.weight" not in self.tensors:
            return None
        return self.tensors[key + ".lora_A.weight"], self.tensors[key + ".lora_B.weight"]

    def expert_pairs(self, module, parameter, experts):
        """(A [E, r, second dimension], B [E, first dimension, r]), or None.

        PEFT reads a stored [E, first, second] parameter as E matrices B_e A_e. A's rows are expert
        by expert; B's columns run over the experts fastest. Llama 4 stores [E, in, out], so A lies
        on the output side.
        """
        inner = ".base_layer" if parameter == "gate_up_proj" else ""
        pair = self.pair(module + inner)
        if pair is None:
            return None
        stacked_a, stacked_b = pair
        factors_a = stacked_a.reshape(experts, -1, stacked_a.shape[1])
        factors_b = stacked_b.reshape(stacked_b.shape[0], -1, experts).permute(2, 0, 1)
        return factors_a, factors_b


class Llama4:
    def __init__(self, model_dir, adapter=None, dtype=torch.float32):
        self.config = json.loads((Path(model_dir) / "config.json").read_text())
        if self.config["model_type"] != "llama4_text":
            raise ValueError(f"{model_dir} is not a llama4_text model")
        if self.config["rope_parameters"]["rope_type"] != "default":
            raise ValueError("only plain rotary embedding is written down here")
        self.weights = {name: w.to(dtype) for name, w in load_weights(model_dir).items()}
        self.adapter, self.dtype = adapter, dtype
        self.routes = {}  # layer: winning expert of every token of the last forward, [N]
        self.smallest_margin = math.inf  # of all forwards: winning logit minus the runner-up

    def linear(self, x, module):
        y = F.linear(x, self.weights[module + ".weight"])
        pair = self.adapter.pair(module) if self.adapter else None
        if pair is None:
            return y
        return y + F.linear(F.linear(x, pair[0]), pair[1]) * self.adapter.scale()

    def mlp(self, x, prefix):
        hidden = F.silu(self.linear(x, prefix + "gate_proj")) * self.linear(x, prefix + "up_proj")
        return self.linear(hidden, prefix + "down_proj")

    def expert_linear(self, x, module, parameter, expert):
        y = x @ self.weights[f"{module}.{parameter}"][expert]
        count = self.config["num_local_experts"]
        pairs = self.adapter.expert_pairs(module, parameter, count) if self.adapter else None
        if pairs is None:
            return y
        factors_a, factors_b = pairs
        return y + (x @ factors_b[expert]) @ factors_a[expert] * self.adapter.scale()

    def mixture(self, x_NH, layer):
        prefix = f"model.layers.{layer}.feed_forward."
        logits_NE = self.linear(x_NH, prefix + "router")
        best_two = logits_NE.topk(2, dim=1)
        margin = (best_two.values[:, 0] - best_two.values[:, 1]).min().item()
        self.smallest_margin = min(self.smallest_margin, margin)
        self.routes[layer] = best_two.indices[:, 0]
        gated_NH = x_NH * torch.sigmoid(best_two.values[:, :1])
        routed_NH = torch.zeros_like(x_NH)
        for expert in self.routes[layer].unique().tolist():
            rows = (self.routes[layer] == expert).nonzero()[:, 0]
            experts = prefix + "experts"
            gate_up = self.expert_linear(gated_NH[rows], experts, "gate_up_proj", expert)
            gate, up = gate_up.chunk(2, dim=-1)
            down = self.expert_linear(up * F.silu(gate), experts, "down_proj", expert)
            routed_NH = routed_NH.index_add(0, rows, down)
        return routed_NH + self.mlp(x_NH, prefix + "shared_expert.")

    def attention(self, x_BTH, layer, cos_Tc, sin_Tc, causal_BTT, chunked_BTT):
        config, prefix = self.config, f"model.layers.{layer}.self_attn."
        rows, tokens, _ = x_BTH.shape

        def heads(name):
            projected = self.linear(x_BTH, prefix + name)
            return projected.view(rows, tokens, -1, config["head_dim"]).transpose(1, 2)

        query, key, value = heads("q_proj"), heads("k_proj"), heads("v_proj")
        mask_BTT = causal_BTT
        if config["no_rope_layers"][layer]:  # 1 means rotary embedding IS used
            query = rotate_neighbours(query, cos_Tc, sin_Tc)
            key = rotate_neighbours(key, cos_Tc, sin_Tc)
            mask_BTT = chunked_BTT
            if config["use_qk_norm"]:
                query = rms_norm(query, None, config["rms_norm_eps"])
                key = rms_norm(key, None, config["rms_norm_eps"])
        elif config["attn_temperature_tuning"]:
            position = torch.arange(tokens).float()
            floors = torch.floor((position + 1.0) / config["floor_scale"])
            temperature = torch.log1p(floors) * config["attn_scale"] + 1.0
            query = query * temperature[:, None]
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(2, 3) * config["head_dim"] ** -0.5
        # The lowest number rather than -inf: a padding row that sees nothing stays finite.
        scores = scores.masked_fill(~mask_BTT[:, None], torch.finfo(torch.float32).min)
        mixed = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)
        return self.linear(mixed, prefix + "o_proj")

    def forward(self, ids_BT, attention_mask_BT):
        """Logits [B, T, V]."""
        config, epsilon = self.config, self.config["rms_norm_eps"]
        rows, tokens = ids_BT.shape
        position = torch.arange(tokens)
        causal_TT = position[:, None] >= position
        chunk = position // config["attention_chunk_size"]
        seen_B1T = attention_mask_BT.bool()[:, None]
        causal_BTT = causal_TT & seen_B1T
        chunked_BTT = causal_BTT & (chunk[:, None] == chunk)
        # The tables stay float32 in a float64 run, so that both runs turn by the same angles.
        theta, head_dim = config["rope_parameters"]["rope_theta"], config["head_dim"]
        frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
        angle_Tc = position.float()[:, None] * frequency
        cos_Tc, sin_Tc = angle_Tc.cos(), angle_Tc.sin()

        x_BTH = self.weights["model.embed_tokens.weight"][ids_BT]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            normed = rms_norm(x_BTH, self.weights[prefix + "input_layernorm.weight"], epsilon)
            x_BTH = x_BTH + self.attention(
                normed, layer, cos_Tc, sin_Tc, causal_BTT, chunked_BTT
            )
            norm_weight = self.weights[prefix + "post_attention_layernorm.weight"]
            normed = rms_norm(x_BTH, norm_weight, epsilon)
            if layer in config["moe_layers"]:
                x_BTH = x_BTH + self.mixture(normed.flatten(0, 1), layer).view_as(x_BTH)
            else:
                x_BTH = x_BTH + self.mlp(normed, prefix + "feed_forward.")
        x_BTH = rms_norm(x_BTH, self.weights["model.norm.weight"], epsilon)
        return F.linear(x_BTH, self.weights["lm_head.weight"])


def loss_of(logits_BTV, labels_BT):
    """Mean over the tokens with a label; position t predicts label t + 1."""
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100
    )
