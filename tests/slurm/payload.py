#!/usr/bin/env python3
"""Stands in for `tailor train RECIPE ... --resume` in the Slurm tests, with what a run of several
ranks needs of its launcher: ranks find each other through MASTER_ADDR and MASTER_PORT and go step by
step together; a signal on any rank stops all after the same step, saved, with 75; --resume goes on
from there.

What it was given and did is written below output_dir: one line a rank and attempt in attempts,
steps one a line, checkpoint with the last one. PAYLOAD_FAIL=RANK:STEP:CODE makes a rank fail;
PAYLOAD_HOLD=STEP has the first attempt wait there for a signal, so that it is not done before one.
"""

import json
import os
import re
import signal
import socket
import struct
import sys
import time
from pathlib import Path

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
               "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME", "SLURM_JOB_ID",
               "SLURM_RESTART_COUNT", "TAILOR_LAUNCHER", "TAILOR_LAUNCHER_JOB")
PATIENCE = 120  # seconds for the others, who share the machine with whatever else runs on it
asked = []


class Ranks:
    """Sums over all ranks, by way of rank 0."""

    def __init__(self, rank, size, address, port):
        self.rank, self.size = rank, size
        if rank == 0:
            server = socket.create_server(("", port), backlog=size)
            server.settimeout(PATIENCE)
            self.peers = [server.accept()[0] for _ in range(size - 1)]
        else:
            end = time.time() + PATIENCE
            while True:
                try:
                    self.peers = [socket.create_connection((address, port), timeout=5)]
                    break
                except OSError:
                    if time.time() > end:
                        sys.exit(69)
                    time.sleep(0.1)
        for peer in self.peers:
            peer.settimeout(PATIENCE)

    @staticmethod
    def receive(peer):
        got = b""
        while len(got) < 8:
            piece = peer.recv(8 - len(got))
            if not piece:
                raise ConnectionError("closed")
            got += piece
        return struct.unpack("q", got)[0]

    def sum(self, value):
        try:
            if self.rank == 0:
                total = value + sum(self.receive(peer) for peer in self.peers)
                for peer in self.peers:
                    peer.sendall(struct.pack("q", total))
                return total
            self.peers[0].sendall(struct.pack("q", value))
            return self.receive(self.peers[0])
        except OSError as error:
            print(f"rank {self.rank}: lost another rank: {error}", file=sys.stderr)
            sys.exit(69)


def main():
    if sys.argv[1] != "train" or sys.argv[-1] != "--resume":
        sys.exit(2)
    text = Path(sys.argv[2]).read_text()
    out = Path(re.search(r"^output_dir: *(.*)$", text, re.M).group(1).strip('"'))
    steps = 10
    for override in sys.argv[3:-1]:
        key, value = override.split("=", 1)
        if key == "training.max_steps":
            steps = int(value)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda received, _: asked.append(received))
    rank = int(os.environ["RANK"])
    ranks = Ranks(rank, int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint"
    begin = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with open(out / "attempts", "a") as file:
        told = {name: os.environ.get(name) for name in ENVIRONMENT}
        file.write(json.dumps({**told, "arguments": sys.argv[1:], "begin": begin}) + "\n")
    fail = [int(part) for part in os.environ.get("PAYLOAD_FAIL", "-1:0:0").split(":")]
    hold = int(os.environ.get("PAYLOAD_HOLD", "0")) if "SLURM_RESTART_COUNT" not in os.environ else 0
    for step in range(begin + 1, steps + 1):
        time.sleep(0.2)
        if rank == fail[0] and step == fail[1]:
            print(f"rank {rank} fails with {fail[2]}", file=sys.stderr)
            sys.exit(fail[2])
        stop = ranks.sum(len(asked))
        while step == hold and not stop:
            time.sleep(0.2)
            stop = ranks.sum(len(asked))
        if rank == 0:
            with open(out / "steps", "a") as file:
                file.write(f"{step}\n")
            checkpoint.write_text(str(step))
            print(f"step {step}", flush=True)
        if stop and step < steps:
            # The last rank to leave has most to write.
            time.sleep(1.5 if rank == 0 else 0)
            if rank == 0:
                (out / "left").write_text(f"{sorted(asked)}")
            sys.exit(75)
    if rank == 0:
        (out / "done").write_text("done")


main()
