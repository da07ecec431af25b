#!/usr/bin/env python3
"""Golden figures for tests/tools/plan_oracle_test.cpp.

usage: make_plan_golden.py ORACLE.py > tests/golden/plan/oracle.json

ORACLE.py is the analytic model of a layer-major, weight-streaming trainer (docs/planning.md). Each
case has the recipe's keys as `tailor plan --oracle-assumptions` takes them, and what the oracle says
of the same inputs: T = sequence_len x micro_batch_size x gradient_accumulation_steps x ranks,
mb_tokens = sequence_len x micro_batch_size, host_memory 0 = everything from disk, other bytes =
ram_experts, nf4 = nf4_dq64, all tokens carry loss, dequantising is not fused, several GPUs gather.
A job is 15.36 M tokens at the node's price, the experts loaded from its disk.
"""
import importlib.util
import itertools
import json
import math
import sys

GB = 10**9
JOB_TOKENS = 15_360_000
RECIPES = {"MAVERICK": "maverick-a100", "R1": "r1-4xh100"}
PROFILES = {"A100_40": "a100-40gb", "A100_80": "a100-80gb", "H100x4": "4xh100-80gb"}
FORMATS = {"int4": "int4_g128", "int4/32": "int4_g32", "nf4": "nf4_dq64", "fp8": "fp8_b128x128",
           "bf16": "bf16"}
PLAIN = dict(seq=512, micro=8, rank=16, expert_rank=None, other="nf4", home="host", host=None,
             resident=None)


def load(path):
    spec = importlib.util.spec_from_file_location("oracle", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module
    spec.loader.exec_module(module)
    return module


def cases():
    for model, node, form, tokens in itertools.product(RECIPES, PROFILES, FORMATS,
                                                       (16384, 65536)):
        yield dict(PLAIN, model=model, node=node, format=form, tokens=tokens)
    varied = [dict(tokens=8192 * 4, micro=4), dict(home="device"), dict(host=0),
              dict(host=64 * GB), dict(rank=8, expert_rank=8), dict(rank=64, expert_rank=4),
              dict(other="int4"), dict(other="bf16"), dict(resident=0), dict(seq=2048, micro=2)]
    for model, node, change in itertools.product(RECIPES, PROFILES, varied):
        yield dict(PLAIN, **{"model": model, "node": node, "format": "int4", "tokens": 32768,
                             **change})


def keys_of(case, node, price, steps):
    ranks = node.gpus
    rows = case["tokens"] // case["seq"]
    assert rows % (case["micro"] * ranks) == 0
    form, _, group = case["format"].partition("/")
    keys = {
        "machine.profile": PROFILES[case["node"]], "machine.ranks": ranks,
        "data.sequence_len": case["seq"], "training.micro_batch_size": case["micro"],
        "training.gradient_accumulation_steps": rows // (case["micro"] * ranks),
        "training.max_steps": steps, "lora.rank": case["rank"],
        "lora.expert_rank": case["expert_rank"], "base.format": form,
        "base.non_expert_format": case["other"], "base.activations": case["home"],
        "cost.price": "{usd_per_gpu_hour: %s}" % price}
    if group:
        keys["base.group_size"] = group
    if case["host"] is not None:
        keys["base.host_memory"] = case["host"]
    if case["resident"] is not None:
        keys["base.device_memory"] = case["resident"]
    return [f"{key}={value}" for key, value in keys.items()]


def run(oracle, case):
    model, node = getattr(oracle, case["model"]), getattr(oracle, case["node"])
    case = dict(case, expert_rank=case["expert_rank"] or max(1, case["rank"] // model.topk))
    tokens, form = case["tokens"], FORMATS[case["format"]]
    ckpt = "hbm" if case["home"] == "device" else "host"
    other = FORMATS[case["other"]]
    common = dict(fmt=form, seq=case["seq"], r=case["rank"], r_expert=case["expert_rank"],
                  mb_tokens=case["seq"] * case["micro"], ckpt=ckpt, ne_fmt=other,
                  resident="auto" if case["resident"] is None else case["resident"],
                  ram_experts=case["host"], mode="local" if node.gpus == 1 else "allgather")
    job = oracle.job(model, node, tokens, JOB_TOKENS, **common)
    host = oracle.host_plan(model, node, tokens, form, r_expert=case["expert_rank"], ckpt=ckpt,
                            ne_fmt=other)
    in_ram = host["expert base"] if case["host"] is None else case["host"]
    hbm = job["plan"]
    steps = math.ceil(JOB_TOKENS / tokens)
    figures = {
        "flops_per_token": job["flop_tok"], "seconds_per_step": job["t"],
        "tokens_per_second": job["tok_s"], "stream_bytes_per_step": job["stream_bytes"],
        "crossover_tokens_per_step": oracle.crossover(model, node, **common),
        "device_bytes_peak": hbm["used"] + job["resident"] * hbm["experts_per_gpu"],
        "host_bytes_peak": host["total"] - host["expert base"] + in_ram,
        "steps": steps, "hours": job["hours"], "gpu_hours": job["hours"] * node.gpus,
        "usd": job["usd"], "resident_fraction": job["resident"], "bound": job["bound"],
        "device_used": hbm["used"]}
    price = "%.2f" % (node.usd_h / node.gpus)
    assert abs(float(price) * node.gpus - node.usd_h) < 1e-9
    return {"recipe": RECIPES[case["model"]], "keys": keys_of(case, node, price, steps),
            "figures": figures}


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    oracle = load(sys.argv[1])
    rows = ",\n".join(json.dumps(run(oracle, case), separators=(",", ":")) for case in cases())
    print("[\n%s\n]" % rows)


if __name__ == "__main__":
    main()
