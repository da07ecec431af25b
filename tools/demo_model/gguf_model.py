"""Reads a Llama model out of a GGUF file into Hugging Face names, config and tokenizer."""

import json

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from demo_data.problem import Problem

WHOLE_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # GGUF's token type for tokens that text must not produce


def halves_from_pairs(weight, heads):
    """Undoes the row order GGUF gives to q and k.

    GGUF keeps the two numbers that rotary embedding turns side by side (0, 1), (2, 3), ...;
    Hugging Face's Llama keeps them half a head apart.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


class GgufModel:
    def __init__(self, path):
        self.path = path
        self.reader = GGUFReader(path)
        architecture = self.field("general.architecture")
        if architecture != "llama" or self.field("tokenizer.ggml.pre") != "smollm":
            raise Problem(
                f"this GGUF holds a {architecture} model; only SmolLM2's kind is understood",
                path,
                "Delete the file, so that the right one is downloaded.",
            )

    def field(self, key):
        return self.reader.fields[key].contents()

    def tensors(self):
        """{Hugging Face name: bfloat16 tensor}, dequantised."""
        heads = {
            "attn_q": self.field("llama.attention.head_count"),
            "attn_k": self.field("llama.attention.head_count_kv"),
        }
        result = {}
        for tensor in self.reader.tensors:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if tensor.name in WHOLE_MODEL_NAMES:
                name = WHOLE_MODEL_NAMES[tensor.name]
            else:
                _, layer, kind, _ = tensor.name.split(".")  # blk.LAYER.KIND.weight
                name = f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"
                if kind in heads:
                    weight = halves_from_pairs(weight, heads[kind])
            result[name] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
        return result

    def config(self):
        """config.json of LlamaForCausalLM.

        Spelled as transformers 4 spells it (rope_theta, torch_dtype), as published checkpoints
        do: transformers 5 and the serving programs read that too.
        """
        hidden = self.field("llama.embedding_length")
        heads = self.field("llama.attention.head_count")
        has_head = any(tensor.name == "output.weight" for tensor in self.reader.tensors)
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": self.field("llama.feed_forward_length"),
            "max_position_embeddings": self.field("llama.context_length"),
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": self.field("llama.block_count"),
            "num_key_value_heads": self.field("llama.attention.head_count_kv"),
            "pad_token_id": self.field("tokenizer.ggml.padding_token_id"),
            # GGUF keeps it as float32: 1e-5 comes back as 9.99999974e-06.
            "rms_norm_eps": float(f"{self.field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_scaling": None,
            "rope_theta": self.field("llama.rope.freq_base"),
            "tie_word_embeddings": not has_head,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": len(self.field("tokenizer.ggml.tokens")),
        }

    def tokenizer(self):
        """A tokenizers.Tokenizer: byte-level BPE, digits one by one, GPT-2's splitting."""
        tokens = self.field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ])
        tokenizer.decoder = decoders.ByteLevel()
        types = self.field("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens([
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types)
            if kind == CONTROL_TOKEN
        ])
        return tokenizer

    def side_files(self):
        """{file name: text} of everything in the checkpoint but its weights and config."""
        tokens = self.field("tokenizer.ggml.tokens")
        ids = {
            kind: self.field(f"tokenizer.ggml.{field}_token_id")
            for kind, field in
            (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        }
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{kind}_token": tokens[index] for kind, index in ids.items()},
            "add_bos_token": self.field("tokenizer.ggml.add_bos_token"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.field("llama.context_length"),
            "chat_template": self.field("tokenizer.chat_template"),
        }
        generation_config = {f"{kind}_token_id": ids[kind] for kind in ("bos", "eos", "pad")}
        return {
            "tokenizer.json": self.tokenizer().to_str(pretty=True),
            "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
            "generation_config.json": json.dumps(generation_config, indent=2) + "\n",
        }
