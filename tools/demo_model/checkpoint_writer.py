"""Writes a Hugging Face checkpoint folder: sharded safetensors, their index, and small files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 200_000_000  # small enough that reading several shards is exercised


def json_text(value):
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


class ShardWriter:
    """Takes tensors one by one and holds one shard in memory."""

    def __init__(self, folder, shard_bytes=SHARD_BYTES):
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self.pending, self.pending_bytes = {}, 0
        self.shards = []  # tensor names of each shard written
        self.total_bytes = self.parameters = 0

    def add(self, name, tensor):
        tensor = tensor.to(torch.bfloat16).contiguous()
        if self.pending and self.pending_bytes + tensor.nbytes > self.shard_bytes:
            self.flush()
        self.pending[name] = tensor
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.parameters += tensor.numel()

    def flush(self):
        # The final names say how many shards there are, which is not known yet.
        path = self.folder / f"shard-{len(self.shards)}"
        save_file(self.pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files only their owner can read
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self):
        """Gives the shards their names; more than one get an index. The model is then readable."""
        if self.pending:
            self.flush()
        count = len(self.shards)
        weight_map = {}
        for number, names in enumerate(self.shards):
            one = count == 1
            file_name = (
                "model.safetensors" if one else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            )
            (self.folder / f"shard-{number}").rename(self.folder / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        if count > 1:
            index = {
                "metadata": {
                    "total_parameters": self.parameters,
                    "total_size": self.total_bytes,
                },
                "weight_map": weight_map,
            }
            text = json_text(index)
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_checkpoint(folder, config, tensors, side_files, shard_bytes=SHARD_BYTES):
    """`tensors`: pairs of name and tensor; `side_files`: {file name: text}."""
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.finish()
    for file_name, text in {"config.json": json_text(config), **side_files}.items():
        (Path(folder) / file_name).write_text(text, encoding="utf-8")
    return writer.parameters
