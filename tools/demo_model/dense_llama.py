"""A plain forward pass of a dense Llama, for looking inside it.

Shapes: T tokens, H hidden size, h heads, d head size.
"""

import torch
import torch.nn.functional as F


def rms_norm(x_TH, weight_H, epsilon):
    return x_TH * torch.rsqrt(x_TH.pow(2).mean(-1, keepdim=True) + epsilon) * weight_H


def rotate(x_hTd, cos_Td, sin_Td):
    """Rotary embedding: element i turns together with element i + d / 2."""
    first, second = x_hTd.chunk(2, dim=-1)
    return x_hTd * cos_Td + torch.cat([-second, first], dim=-1) * sin_Td


class DenseLlama:
    def __init__(self, config, tensors):
        """`tensors` by Hugging Face name, of any floating type; they are computed in float32."""
        self.config = config
        self.tensors = tensors

    def weight(self, name):
        return self.tensors[name + ".weight"].float()

    def linear(self, x, name):
        return F.linear(x, self.weight(name))

    def attention(self, x_TH, prefix, cos_Td, sin_Td):
        tokens, head_dim = len(x_TH), self.config["head_dim"]

        def heads(name):
            return self.linear(x_TH, prefix + name).view(tokens, -1, head_dim).transpose(0, 1)

        query = rotate(heads("q_proj"), cos_Td, sin_Td)
        key = rotate(heads("k_proj"), cos_Td, sin_Td)
        mixed_hTd = F.scaled_dot_product_attention(
            query[None], key[None], heads("v_proj")[None], is_causal=True, enable_gqa=True
        )[0]
        return self.linear(mixed_hTd.transpose(0, 1).flatten(1), prefix + "o_proj")

    def mlp(self, x_TH, prefix):
        gate, up = self.linear(x_TH, prefix + "gate_proj"), self.linear(x_TH, prefix + "up_proj")
        return self.linear(F.silu(gate) * up, prefix + "down_proj")

    @torch.no_grad()
    def mlp_inputs(self, token_ids, window=1024):
        """What each layer's MLP receives: one [T, H] tensor a layer.

        The text is read in windows that do not see each other. The vocabulary head is not run.
        """
        config, layers = self.config, self.config["num_hidden_layers"]
        epsilon, head_dim = config["rms_norm_eps"], config["head_dim"]
        frequency = config["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        taps = [[] for _ in range(layers)]
        for window_ids in torch.as_tensor(token_ids).split(window):
            angle = torch.arange(len(window_ids)).float()[:, None] * frequency
            cos_Td, sin_Td = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
            hidden = self.tensors["model.embed_tokens.weight"][window_ids].float()
            for layer in range(layers):
                prefix = f"model.layers.{layer}."
                normed = rms_norm(hidden, self.weight(prefix + "input_layernorm"), epsilon)
                hidden = hidden + self.attention(normed, prefix + "self_attn.", cos_Td, sin_Td)
                normed = rms_norm(hidden, self.weight(prefix + "post_attention_layernorm"), epsilon)
                taps[layer].append(normed)
                hidden = hidden + self.mlp(normed, prefix + "mlp.")
        return [torch.cat(pieces) for pieces in taps]
