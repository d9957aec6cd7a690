#!/usr/bin/env python3
"""Compare `bulkhead decide` with oracle.py about random clusters, and with itself: with --check Bulkhead asks its own
reference evaluator too. Prints the smallest state that still shows a difference. Exit 0 iff there is none.

  fuzz.py [--bulkhead target/release/bulkhead] [--seed N] [--rounds N] [--seconds N]"""
import argparse
import copy
import json
import random
import shlex
import subprocess
import sys
import time

import oracle
import selector
import states


class Bulkhead:
    """One `bulkhead decide --batch`, asked line by line."""

    def __init__(self, command):
        self.process = subprocess.Popen(shlex.split(command) + ["decide", "--batch", "--check"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, manifests, flows, reset=True):
        question = {"id": "q", "reset": reset, "manifests": manifests, "dns": states.DNS, "flows": flows}
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("bulkhead decide has ended")
        return json.loads(answer)


def selectors(bulkhead, make):
    """A selector that is perhaps none: is it refused by both, or does it mean the same to both? What is different, if so."""
    text = make.selector_soup()
    labels = make.labels({"a": ["x", "in"], "in": ["x", "in"], "not": ["x"], "contains": ["x", "in"], "has": ["x"], "all": ["in"]})
    pod = {**states.obj("v1", "Pod", "p", "n", labels, {"containers": []}), "status": {"podIPs": [{"ip": "10.0.0.1"}]}}
    policy = states.obj("projectcalico.org/v3", "GlobalNetworkPolicy", "g", spec={"selector": text, "ingress": [{"action": "Deny"}]})
    answer = bulkhead.ask([pod, policy], [{"from": "ip:203.0.113.1", "to": "ip:10.0.0.1", "protocol": "TCP", "port": 80}])
    got = answer["results"][0]["verdict"] == "deny" if answer["results"] else "refused"
    try:
        want = selector.matches(text, labels)
    except selector.Wrong:
        want = "refused"
    return None if got == want else f"selector {text!r} of {labels}: oracle {want}, bulkhead {got} {answer['errors']}"


def difference(bulkhead, manifests, flow):
    """What both say about one flow, if they differ."""
    try:
        (want, why), = oracle.decide(manifests, states.DNS, [flow])
    except KeyError:
        return None  # a state that has lost too much to mean anything
    answer = bulkhead.ask(manifests, [flow])
    if not answer["results"] or not answer["results"][0]:
        return None
    got = answer["results"][0]
    return (want, why, got) if answer["errors"] or (got["verdict"] == "allow") != want else None


def smaller(value):
    """Every value with one thing less in it: an element of a list or a field."""
    if isinstance(value, list):
        for i in range(len(value)):
            yield value[:i] + value[i + 1:]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    for k, v in list(items):
        if isinstance(value, dict) and k not in ("apiVersion", "kind", "name", "namespace", "metadata", "status", "action"):
            yield {a: b for a, b in value.items() if a != k}
        for less in smaller(v):
            changed = copy.copy(value)
            changed[k] = less
            yield changed


def minimise(bulkhead, manifests, flow, budget=3000):
    """Remove objects and parts of objects for as long as the difference stays."""
    again = True
    while again and budget > 0:
        again = False
        for candidate in smaller(manifests):
            budget -= 1
            if budget <= 0:
                break
            if difference(bulkhead, candidate, flow):
                manifests, again = candidate, True
                break
    return manifests


def show(bulkhead, manifests, flow, seed):
    print(f"\nDIFFERENCE (seed {seed}): {json.dumps(flow)}")
    if not difference(bulkhead, manifests, flow):
        print("  only after the states before it: not of the state alone")
        return
    manifests = minimise(bulkhead, manifests, flow)
    want, why, got = difference(bulkhead, manifests, flow)
    for m in manifests:
        print("  " + json.dumps(m))
    print(f"  oracle:   {'allow' if want else 'deny'}: {'; '.join(why) or 'nobody says anything'}")
    print(f"  bulkhead: {got['verdict']}: egress {json.dumps(got['egress'])}, ingress {json.dumps(got['ingress'])}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bulkhead", default="target/release/bulkhead")
    parser.add_argument("--seed", type=int, default=1, help="of the first round; every round has the next one")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=4, help="states of a round")
    parser.add_argument("--selectors", type=int, default=5, help="selectors of a round that may be none")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after this time")
    parser.add_argument("--show", type=int, default=5, help="differences to print")
    args = parser.parse_args()
    bulkhead, begin = Bulkhead(args.bulkhead), time.monotonic()
    asked = flows_asked = refused = wrong = shown = rounds = 0
    for seed in range(args.seed, args.seed + args.rounds):
        if time.monotonic() - begin > args.seconds:
            break
        rounds += 1
        make, manifests = states.States(random.Random(seed)), []
        for _ in range(args.selectors):
            problem = selectors(bulkhead, make)
            if problem:
                wrong += 1
                print(f"DIFFERENCE (seed {seed}): {problem}", flush=True)
        for step in range(args.steps):
            manifests = make.next(manifests) if step else make.first()
            flows = make.flows(manifests)
            answer = bulkhead.ask(manifests, flows, reset=step == 0)
            asked += 1
            if len(answer["results"]) != len(flows):
                refused += 1
                if shown < args.show:
                    shown += 1
                    print(f"REFUSED (seed {seed}): {answer['errors'][:3]}", flush=True)
                break
            flows_asked += len(flows)
            # Errors about single flows: Bulkhead's tables and its reference evaluator differ.
            suspects = flows if answer["errors"] else []
            bad = [f for f in suspects if bulkhead.ask(manifests, [f])["errors"]] or [
                   f for f, (want, _), got in zip(flows, oracle.decide(manifests, states.DNS, flows), answer["results"])
                   if (got["verdict"] == "allow") != want]
            wrong += len(bad)
            if bad:
                if shown < args.show:
                    shown += 1
                    show(bulkhead, manifests, bad[0], seed)
                break
    print(f"{rounds} rounds, {asked} states, {flows_asked} flows: {wrong} differ, {refused} states refused ({time.monotonic() - begin:.0f} s)")
    sys.exit(1 if wrong or refused or not flows_asked else 0)


main()
