#!/usr/bin/env python3
"""Golden figures for stream_model_test.cpp.

usage: make_stream_model_golden.py ORACLE.py > golden/stream_model.json

ORACLE.py is the analytic model of a layer-major, weight-streaming trainer: it has MAVERICK, R1,
A100_40, A100_80, H100x4, FORMATS, hbm_plan(), host_plan(), estimate() and crossover(). Every case
is one call of each; the document holds their results with every digit. The grid: a full product
for one device at the default ranks, formats and lengths varied one at a time around it.
"""
import dataclasses
import importlib.util
import itertools
import json
import sys

GB = 1e9
TOKENS = (2048, 4096, 8192, 16384, 32768, 65536)
HBM = ("used", "room", "resident_frac", "experts_per_gpu")
STEP = ("link_fwd", "link_bwd", "comp_fwd", "comp_bwd", "nv_fwd", "nv_bwd", "dequant", "t",
        "stream_bytes", "tok_s", "resident", "flop_tok", "hfu", "mfu4")
FORMATS = ("int4_g128", "nf4_dq64", "fp8_b128x128", "bf16")


def load(path):
    spec = importlib.util.spec_from_file_location("oracle", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module
    spec.loader.exec_module(module)
    return module


def cases():
    """Every case as the oracle's own words; host: 'all', 0 (disk) or bytes of experts in RAM."""
    base = dict(seq=512, r=16, r_expert=None, loss_frac=1.0, mb_tokens=4096, ne_fmt="nf4_dq64",
                ckpt="host", host="all", resident="auto", mode="local")
    singles = [("MAVERICK", "A100_40"), ("MAVERICK", "A100_80"), ("R1", "A100_40"),
               ("R1", "A100_80")]
    for (model, node), fmt, tokens in itertools.product(singles, FORMATS, TOKENS):
        yield dict(base, model=model, node=node, fmt=fmt, tokens=tokens)
    varied = [dict(r=8, r_expert=8), dict(r=64, r_expert=4), dict(r=16, r_expert=16),
              dict(ckpt="hbm"), dict(host=0), dict(host=64 * GB), dict(host=128 * GB),
              dict(resident=0.0), dict(resident=0.25), dict(seq=2048), dict(mb_tokens=2048),
              dict(ne_fmt="int4_g128"), dict(ne_fmt="bf16"), dict(loss_frac=0.5)]
    for (model, node), change, tokens in itertools.product(singles, varied, (2048, 8192, 65536)):
        yield dict(base, **{"model": model, "node": node, "fmt": "int4_g128", "tokens": tokens,
                            **change})
    for model, fmt, tokens in itertools.product(("MAVERICK", "R1"), ("int4_g128", "fp8_b128x128"),
                                                (8192, 32768, 65536)):
        yield dict(base, model=model, node="H100x4", fmt=fmt, tokens=tokens, mode="allgather")


def run(oracle, case):
    model, node = getattr(oracle, case["model"]), getattr(oracle, case["node"])
    r_expert = case["r_expert"] or max(1, case["r"] // model.topk)
    case = dict(case, r_expert=r_expert)
    ram = None if case["host"] == "all" else float(case["host"])
    common = dict(fmt=case["fmt"], seq=case["seq"], r=case["r"], r_expert=r_expert,
                  loss_frac=case["loss_frac"], mb_tokens=case["mb_tokens"], mode=case["mode"],
                  resident=case["resident"], ckpt=case["ckpt"], ne_fmt=case["ne_fmt"],
                  source="disk" if ram == 0 else "ram", ram_experts=ram)
    step = oracle.estimate(model, node, case["tokens"], **common)
    hbm = step.pop("plan")
    host = oracle.host_plan(model, node, case["tokens"], case["fmt"], r_expert=r_expert,
                            ckpt=case["ckpt"], ne_fmt=case["ne_fmt"])
    # Names once, in the oracle's order; rows hold the numbers.
    names = {"hbm_parts": list(hbm["parts"]), "host_parts": [key for key in host if key != "total"]}
    row = {"case": case, "hbm_parts": list(hbm["parts"].values()),
           "hbm": [hbm[key] for key in HBM], "host_parts": [host[key] for key in names["host_parts"]],
           "host_total": host["total"], "step": [step[key] for key in STEP], "bound": step["bound"],
           "crossover": oracle.crossover(model, node, **common)}
    return names, row


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    oracle = load(sys.argv[1])
    models = {name: dataclasses.asdict(getattr(oracle, name)) for name in ("MAVERICK", "R1")}
    nodes = {name: dataclasses.asdict(getattr(oracle, name))
             for name in ("A100_40", "A100_80", "H100x4")}
    ran = [run(oracle, case) for case in cases()]
    names = dict(ran[0][0], hbm=HBM, step=STEP)
    assert all(other["hbm_parts"] == names["hbm_parts"] for other, _ in ran)
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for _, row in ran)
    print('{"models":%s,\n"nodes":%s,\n"names":%s,\n"rows":[\n%s\n]}' % (
        json.dumps(models), json.dumps(nodes), json.dumps(names), rows))


if __name__ == "__main__":
    main()
