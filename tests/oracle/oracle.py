"""A second opinion about Kubernetes' and Calico's policies.

It walks the foreign objects as they are written, as somebody who knows them would explain a verdict, and shares nothing
with the code it is to check. Slow and short on purpose. The letters (N7, C14, ...) are those of docs/kubernetes.md."""
import functools
import ipaddress

import selector

INFINITY = float("inf")
PROTOCOLS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132, "UDPLite": 136}
# Ports of host endpoints that no policy can close.
FAILSAFE = {
    "ingress": {("TCP", 22), ("UDP", 68), ("TCP", 179), ("TCP", 2379), ("TCP", 2380), ("TCP", 5473), ("TCP", 6443), ("TCP", 6666), ("TCP", 6667)},
    "egress": {("UDP", 53), ("UDP", 67), ("TCP", 179), ("TCP", 2379), ("TCP", 2380), ("TCP", 5473), ("TCP", 6443), ("TCP", 6666), ("TCP", 6667)},
}
# Policies of one order: by kind as docs/kubernetes.md lists them, then by namespace and name.
KINDS = ["KubernetesNetworkPolicy", "ClusterNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy", "NetworkPolicy", "GlobalNetworkPolicy"]
address = functools.lru_cache(maxsize=None)(ipaddress.ip_address)
network = functools.lru_cache(maxsize=None)(functools.partial(ipaddress.ip_network, strict=False))


def inside(ip, cidrs):
    """N12: a block of one family never has an address of the other."""
    return any(address(ip) in network(cidr) for cidr in cidrs)


def number(protocol):
    return PROTOCOLS[protocol] if protocol in PROTOCOLS else int(protocol)


class Owner:
    """Something with labels and addresses: a pod, a workload endpoint, a host endpoint or a network set."""

    def __init__(self, kind, name, namespace, labels, cidrs, ports=(), account=None, node=None, profiles=None):
        self.kind, self.name, self.namespace, self.own, self.cidrs = kind, name, namespace, labels, cidrs
        self.ports, self.account, self.node, self.profiles = list(ports), account, node, profiles
        self.labels = {}
        self.workload = kind in ("Pod", "WorkloadEndpoint")

    def __repr__(self):
        return f"{self.kind} {self.namespace + '/' if self.namespace else ''}{self.name}"

    def has_port(self, name, conn):
        """N10: a named port is a number of this owner's, with its protocol."""
        return any(p == (name, conn.protocol, conn.port) for p in self.ports)


class Connection:
    def __init__(self, source, destination, protocol, port, source_port=50000):
        self.source, self.destination, self.source_port = source, destination, source_port
        self.protocol, self.port = number(protocol), port
        self.version = address(source).version


class State:
    """The objects of one state, sorted by what they are."""

    def __init__(self, manifests, dns=None):
        self.dns = dns or {}
        self.namespaces, self.accounts, self.nodes = {}, {}, {}
        self.owners, self.slices, self.profiles = [], [], {}
        self.tiers = {"kube-admin": (1000, "Pass"), "default": (1e6, "Deny"), "kube-baseline": (1e7, "Pass")}
        self.policies = []
        for m in manifests:
            getattr(self, "read_" + m["kind"], self.read_policy)(m, m["metadata"], m.get("spec") or {})
        for owner in self.owners:
            owner.labels = self.labels(owner)
        self.policies.sort(key=lambda p: p.place)

    # Inventory

    def read_Namespace(self, m, meta, spec):
        self.namespaces[meta["name"]] = {"kubernetes.io/metadata.name": meta["name"], **(meta.get("labels") or {})}

    def read_ServiceAccount(self, m, meta, spec):
        self.accounts[meta["namespace"], meta["name"]] = meta.get("labels") or {}

    def read_Node(self, m, meta, spec):
        self.nodes[meta["name"]] = (meta.get("labels") or {}, [a["address"] for a in m["status"]["addresses"]])

    def read_EndpointSlice(self, m, meta, spec):
        self.slices.append((meta["namespace"], meta["labels"]["kubernetes.io/service-name"],
                            [a for e in m["endpoints"] for a in e["addresses"]],
                            [(number(p.get("protocol", "TCP")), p["port"]) for p in m.get("ports") or []]))

    def read_Pod(self, m, meta, spec):
        if spec.get("hostNetwork"):
            return  # N14, C7: nobody's subject and nobody's peer
        ports = [(p.get("name"), number(p.get("protocol", "TCP")), p["containerPort"])
                 for c in spec["containers"] for p in c.get("ports") or []]
        self.owners.append(Owner("Pod", meta["name"], meta["namespace"], meta.get("labels") or {},
                                 [i["ip"] for i in m["status"]["podIPs"]], ports, spec.get("serviceAccountName", "default"), spec.get("nodeName")))

    def read_WorkloadEndpoint(self, m, meta, spec):
        ports = [(p["name"], number(p["protocol"]), p["port"]) for p in spec.get("ports") or []]
        self.owners.append(Owner("WorkloadEndpoint", meta["name"], meta["namespace"], meta.get("labels") or {}, spec["ipNetworks"],
                                 ports, spec.get("serviceAccountName"), spec.get("node"), spec.get("profiles") or []))
        self.owners[-1].orchestrator = spec.get("orchestrator")

    def read_HostEndpoint(self, m, meta, spec):
        ports = [(p["name"], number(p["protocol"]), p["port"]) for p in spec.get("ports") or []]
        self.owners.append(Owner("HostEndpoint", meta["name"], None, meta.get("labels") or {}, spec["expectedIPs"], ports,
                                 None, spec.get("node"), spec.get("profiles") or []))

    def read_NetworkSet(self, m, meta, spec):
        self.owners.append(Owner(m["kind"], meta["name"], meta.get("namespace"), meta.get("labels") or {}, spec.get("nets") or []))

    read_GlobalNetworkSet = read_NetworkSet

    def read_Profile(self, m, meta, spec):
        self.profiles[meta["name"]] = spec

    def read_Tier(self, m, meta, spec):
        order = spec.get("order")
        self.tiers[meta["name"]] = (INFINITY if order is None else order, spec.get("defaultAction") or "Deny")

    def read_policy(self, m, meta, spec):
        if m["kind"].startswith("Staged"):
            return  # never enforced
        if m["apiVersion"].startswith("projectcalico.org/"):
            self.policies.append(Calico(self, m))
        elif m["kind"] == "NetworkPolicy":
            self.policies.append(Kubernetes(self, m))
        else:
            self.policies.append(Cluster(self, m))

    def labels(self, owner):
        """All that selectors of Calico see: inherited labels, those Calico sets, and on top the owner's own."""
        labels = {}
        for name in reversed(owner.profiles or []):
            labels.update((self.profiles.get(name) or {}).get("labelsToApply") or {})
        if owner.namespace:
            for key, value in self.namespaces.get(owner.namespace, {}).items():
                labels["pcns." + key] = value
            labels["pcns.projectcalico.org/name"] = owner.namespace
        if owner.account:
            for key, value in self.accounts.get((owner.namespace, owner.account), {}).items():
                labels["pcsa." + key] = value
            labels["pcsa.projectcalico.org/name"] = owner.account
        labels.update(owner.own)
        # Calico converts Kubernetes' selectors into its own, which see what endpoints inherit from their profiles.
        owner.own = {k: v for k, v in labels.items() if not k.startswith(("pcns.", "pcsa."))}
        if owner.namespace:
            labels["projectcalico.org/namespace"] = owner.namespace
        if owner.account:
            labels["projectcalico.org/serviceaccount"] = owner.account
        if owner.kind == "Pod":
            labels["projectcalico.org/orchestrator"] = "k8s"
        if getattr(owner, "orchestrator", None):
            labels["projectcalico.org/orchestrator"] = owner.orchestrator
        if owner.kind in ("NetworkSet", "GlobalNetworkSet"):
            labels["projectcalico.org/name"], labels["projectcalico.org/kind"] = owner.name, owner.kind
        return labels

    # Who has an address

    def owners_of(self, ip):
        return [o for o in self.owners if inside(ip, o.cidrs)]

    def workloads_of(self, ip):
        return [o for o in self.owners_of(ip) if o.workload]

    def endpoint(self, ip):
        found = [o for o in self.owners_of(ip) if o.workload or o.kind == "HostEndpoint"]
        return found[0] if found else None

    def host_addresses(self, node):
        return self.nodes.get(node, ({}, []))[1] + [a for o in self.owners if o.kind == "HostEndpoint" and o.node == node for a in o.cidrs]

    # Verdicts

    def verdict(self, conn):
        """(allow?, why): both ends must allow (N13); an end that is not ours imposes nothing."""
        source, destination = self.endpoint(conn.source), self.endpoint(conn.destination)
        if source is not None and source is destination and source.workload:
            return True, ["itself (N17, C15)"]
        why = []
        for way, end in (("egress", source), ("ingress", destination)):
            if end is not None:
                allowed, reason = self.direction(way, end, conn)
                why.append(f"{way} of {end}: {'allow' if allowed else 'deny'} by {reason}")
        return not any(": deny by" in w for w in why), why

    def direction(self, way, end, conn):
        protocol = {6: "TCP", 17: "UDP"}.get(conn.protocol)
        if end.kind == "HostEndpoint" and (protocol, conn.port) in FAILSAFE[way]:
            return True, "fail-safe port"
        action, reason, written = self.walk(way, end, conn)
        if action == "Deny" and not written and way == "ingress" and end.workload and conn.source in self.host_addresses(end.node):
            return True, "its own host (N15)"
        return action == "Allow", reason

    def walk(self, way, end, conn):
        """(Allow or Deny, by what, by a rule that somebody wrote?)"""
        for _, name, default in sorted((order, name, default) for name, (order, default) in self.tiers.items()):
            here = [p for p in self.policies if p.tier == name and p.applies(way, end)]
            if not here:
                continue
            for policy in here:
                action, rule = policy.decide(way, end, conn)
                if action in ("Allow", "Deny"):
                    return action, f"{policy.name} rule {rule}", True
                if action == "Pass":
                    break
            else:
                if default == "Deny":
                    return "Deny", f"end of tier {name}", False
        if end.kind == "Pod":
            return "Allow", "its namespace's profile", False
        for name in end.profiles:
            if name.startswith("kns.") and name[4:] in self.namespaces:
                return "Allow", "profile " + name, False
            if name.startswith("ksa.") and tuple(name[4:].split(".", 1)) in self.accounts:
                continue
            if name not in self.profiles:
                return "Deny", f"profile {name}, which is missing", False
            for i, rule in enumerate(self.profiles[name].get(way) or []):
                if rule["action"] in ("Allow", "Deny") and Rule(self, rule, None).matches(conn, way, end):
                    return rule["action"], f"profile {name} rule {i}", True
        return "Deny", "no profile decides", False


# Kubernetes

def label_selector(s, labels):
    """N6."""
    if s is None:
        return False
    for key, value in (s.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for e in s.get("matchExpressions") or []:
        key, has, values = e["key"], e["key"] in labels, e.get("values") or []
        if not {"In": has and labels.get(key) in values, "NotIn": not has or labels.get(key) not in values,
                "Exists": has, "DoesNotExist": not has}[e["operator"]]:
            return False
    return True


class Kubernetes:
    """NetworkPolicy of networking.k8s.io/v1: in the default tier at order 1000, rules that allow."""
    tier = "default"

    def __init__(self, state, m):
        self.state, self.spec, self.namespace = state, m.get("spec") or {}, m["metadata"]["namespace"]
        self.name = f"Kubernetes NetworkPolicy {self.namespace}/{m['metadata']['name']}"
        self.place = (1000, KINDS.index("KubernetesNetworkPolicy"), self.namespace, m["metadata"]["name"])

    def applies(self, way, end):
        types = self.spec.get("policyTypes") or ["Ingress"] + (["Egress"] if self.spec.get("egress") else [])  # N3
        return (end.workload and end.namespace == self.namespace and way.capitalize() in types
                and label_selector(self.spec.get("podSelector") or {}, end.own))

    def decide(self, way, end, conn):
        side, ip = ("from", conn.source) if way == "ingress" else ("to", conn.destination)
        for i, rule in enumerate(self.spec.get(way) or []):
            peers, ports = rule.get(side) or [], rule.get("ports") or []
            if (not peers or any(self.peer(p, ip) for p in peers)) and (not ports or any(self.port(p, conn) for p in ports)):
                return "Allow", i
        return None, None

    def peer(self, peer, ip):
        """N7, N11."""
        if "ipBlock" in peer:
            return inside(ip, [peer["ipBlock"]["cidr"]]) and not inside(ip, peer["ipBlock"].get("except") or [])
        for pod in self.state.workloads_of(ip):
            if "namespaceSelector" in peer:
                here = label_selector(peer["namespaceSelector"], self.state.namespaces.get(pod.namespace, {}))
            else:
                here = pod.namespace == self.namespace
            if here and ("podSelector" not in peer or label_selector(peer["podSelector"], pod.own)):
                return True
        return False

    def port(self, port, conn):
        """N8, N9, N10."""
        if conn.protocol != number(port.get("protocol") or "TCP"):
            return False
        wanted = port.get("port")
        if wanted is None:
            return True
        if isinstance(wanted, str):
            return any(o.has_port(wanted, conn) for o in self.state.workloads_of(conn.destination))
        return wanted <= conn.port <= (port.get("endPort") or wanted)


class Cluster:
    """ClusterNetworkPolicy, AdminNetworkPolicy and BaselineAdminNetworkPolicy."""

    def __init__(self, state, m):
        self.state, self.spec, kind = state, m["spec"], m["kind"]
        baseline = kind == "BaselineAdminNetworkPolicy" or self.spec.get("tier") == "Baseline"
        self.tier = "kube-baseline" if baseline else "kube-admin"
        self.name = f"{kind} {m['metadata']['name']}"
        self.place = (self.spec.get("priority", 0), KINDS.index(kind), "", m["metadata"]["name"])

    def applies(self, way, end):
        subject = self.spec["subject"]
        return end.workload and bool(self.spec.get(way)) and (
            self.namespaces(subject["namespaces"], end, end) if "namespaces" in subject else self.pods(subject["pods"], end, end))

    def decide(self, way, end, conn):
        side, ip = ("from", conn.source) if way == "ingress" else ("to", conn.destination)
        for i, rule in enumerate(self.spec.get(way) or []):
            action = {"Accept": "Allow"}.get(rule["action"], rule["action"])
            known = [p for p in rule[side] if set(p) & {"namespaces", "pods", "nodes", "networks", "domainNames"}]
            if len(known) < len(rule[side]):  # C14: fail closed
                if action == "Allow":
                    continue
                return "Deny", f"{i}, which has a peer of an unknown kind (C14)"
            if any(self.peer(p, end, ip) for p in known) and self.ports(rule, conn):
                return action, i
        return None, None

    def namespaces(self, wanted, pod, subject):
        """A label selector, or (A4) that and comparisons with the subject's namespace."""
        labels = self.state.namespaces.get(pod.namespace, {})
        ours = self.state.namespaces.get(subject.namespace, {})
        if "sameLabels" in wanted:
            keys = wanted["sameLabels"]
            return bool(keys) and all(k in labels and labels[k] == ours.get(k) for k in keys)
        if "notSameLabels" in wanted:
            keys = wanted["notSameLabels"]
            return bool(keys) and all(k in labels and k in ours for k in keys) and any(labels[k] != ours[k] for k in keys)
        return label_selector(wanted.get("namespaceSelector", wanted), labels)

    def pods(self, wanted, pod, subject):
        where = wanted["namespaces"] if "namespaces" in wanted else wanted.get("namespaceSelector") or {}
        return self.namespaces(where, pod, subject) and label_selector(wanted.get("podSelector") or {}, pod.own)

    def peer(self, peer, subject, ip):
        if "namespaces" in peer:
            return any(self.namespaces(peer["namespaces"], pod, subject) for pod in self.state.workloads_of(ip))
        if "pods" in peer:
            return any(self.pods(peer["pods"], pod, subject) for pod in self.state.workloads_of(ip))
        if "nodes" in peer:  # C11
            return any(ip in ips for labels, ips in self.state.nodes.values() if label_selector(peer["nodes"], labels))
        if "networks" in peer:  # C12
            return inside(ip, peer["networks"])
        return any(ip in ips for name, ips in self.state.dns.items() if any(domain(d, name) for d in peer["domainNames"]))

    def ports(self, rule, conn):
        """C9, C10, A3."""
        named = lambda name: any(o.has_port(name, conn) for o in self.state.workloads_of(conn.destination))
        entries = rule.get("protocols") or rule.get("ports") or []
        return not entries or any(self.port(e, conn, named) for e in entries)

    def port(self, entry, conn, named):
        for key in ("destinationNamedPort", "namedPort"):
            if key in entry:
                return named(entry[key])
        for key in ("portNumber", "portRange"):
            if key in entry:
                e = entry[key]
                return conn.protocol == number(e.get("protocol") or "TCP") and e.get("start", e.get("port")) <= conn.port <= e.get("end", e.get("port"))
        (protocol, e), = entry.items()
        port = (e or {}).get("destinationPort") or {"range": {"start": 0, "end": 65535}}
        first, last = (port["number"],) * 2 if "number" in port else (port["range"]["start"], port["range"]["end"])
        return conn.protocol == number(protocol.upper()) and first <= conn.port <= last


def domain(pattern, name):
    """C13: exact, or `*.` for one label or more."""
    pattern, name = pattern.lower().rstrip("."), name.lower().rstrip(".")
    return name.endswith(pattern[1:]) and len(name) >= len(pattern) if pattern.startswith("*.") else name == pattern


# Calico

class Calico:
    """NetworkPolicy and GlobalNetworkPolicy of projectcalico.org/v3."""

    def __init__(self, state, m):
        self.state, self.spec, self.namespace = state, m.get("spec") or {}, m["metadata"].get("namespace")
        self.tier = self.spec.get("tier") or "default"
        self.name = f"Calico {m['kind']} {self.namespace or ''}/{m['metadata']['name']}"
        order = self.spec.get("order")
        self.place = (INFINITY if order is None else order, KINDS.index(m["kind"]), self.namespace or "", m["metadata"]["name"])

    def applies(self, way, end):
        spec = self.spec
        types = spec.get("types") or [t for t in ("Ingress", "Egress") if spec.get(t.lower())] or ["Ingress"]
        if way.capitalize() not in types or not selector.matches(spec.get("selector"), end.labels):
            return False
        if self.namespace:
            if not (end.workload and end.namespace == self.namespace):
                return False
        elif spec.get("namespaceSelector") and not in_namespace(self.state, spec["namespaceSelector"], end):
            return False
        return not spec.get("serviceAccountSelector") or has_account(self.state, {"selector": spec["serviceAccountSelector"]}, end)

    def decide(self, way, end, conn):
        for i, rule in enumerate(self.spec.get(way) or []):
            if rule["action"] != "Log" and Rule(self.state, rule, self.namespace).matches(conn, way, end):
                return rule["action"], i
        return None, None


def in_namespace(state, wanted, owner):
    """Is the owner in a namespace with such labels? Endpoints and sets inherit them, so what is in no namespace has none of
    them: `env != 'prod'` means it too. `global()` means just what is in none, `all()` by itself what is in any."""
    inside = owner.namespace is not None
    labels = {**state.namespaces.get(owner.namespace, {}), "projectcalico.org/name": owner.namespace} if inside else {}
    return selector.matches(wanted, labels, not inside) and (inside or wanted.strip() != "all()")


def has_account(state, wanted, owner):
    """Likewise by the labels of its service account, if it has one."""
    labels, wanted_labels = {}, wanted.get("selector") or ""
    if owner.account:
        labels = {**state.accounts.get((owner.namespace, owner.account), {}), "projectcalico.org/name": owner.account}
    elif wanted_labels.strip() == "all()":
        return False
    return (not wanted.get("names") or owner.account in wanted["names"]) and selector.matches(wanted_labels, labels)


class Rule:
    """One rule of Calico's: everything it says must hold."""

    def __init__(self, state, rule, namespace):
        self.state, self.rule, self.namespace = state, rule, namespace

    def matches(self, conn, way, end):
        rule = self.rule
        # At the end where the rule is asked selectors mean the endpoint itself (docs/migrating.md).
        source = [end] if way == "egress" else self.state.owners_of(conn.source)
        destination = [end] if way == "ingress" else self.state.owners_of(conn.destination)
        if rule.get("ipVersion") not in (None, conn.version):
            return False
        if "protocol" in rule and conn.protocol != number(rule["protocol"]):
            return False
        if "notProtocol" in rule and conn.protocol == number(rule["notProtocol"]):
            return False
        if "icmp" in rule and not self.icmp(rule["icmp"], conn):
            return False
        if "notICMP" in rule and self.icmp(rule["notICMP"], conn):
            return False
        return (self.entity(rule.get("source") or {}, source, conn.source, conn.source_port, conn, False)
                and self.entity(rule.get("destination") or {}, destination, conn.destination, conn.port, conn, True))

    def icmp(self, icmp, conn):
        return "type" not in icmp or (conn.port >> 8 == icmp["type"] and icmp.get("code", conn.port & 255) == conn.port & 255)

    def entity(self, e, owners, ip, port, conn, destination):
        if e.get("nets") and not inside(ip, e["nets"]) or inside(ip, e.get("notNets") or []):
            return False
        scope = lambda o: self.scope(e, o)
        # In a namespace any selector says that the other end is known and of that namespace, a negative one too.
        confined = self.namespace is not None and e.get("notSelector")
        if confined or e.get("selector") or e.get("namespaceSelector") or e.get("serviceAccounts"):
            if not any(scope(o) and selector.matches(e.get("selector"), o.labels, o.namespace is None)
                       and (not e.get("serviceAccounts") or has_account(self.state, e["serviceAccounts"], o)) for o in owners):
                return False
        if e.get("notSelector") and any(selector.matches(e["notSelector"], o.labels, o.namespace is None) for o in owners):
            return False
        if e.get("services") and not self.service(e["services"], ip, conn, destination):
            return False
        is_port = lambda p: self.port(p, port, owners, conn)
        if e.get("ports") and not any(map(is_port, e["ports"])):
            return False
        return not any(map(is_port, e.get("notPorts") or []))

    def scope(self, e, owner):
        """Selectors of a namespaced policy mean its namespace, unless they say otherwise."""
        if e.get("namespaceSelector"):
            return in_namespace(self.state, e["namespaceSelector"], owner)
        return self.namespace is None or owner.namespace == self.namespace

    def service(self, service, ip, conn, destination):
        """The addresses behind a service; of a destination, its ports too."""
        for namespace, name, ips, ports in self.state.slices:
            if (namespace, name) == (service.get("namespace") or self.namespace, service["name"]) and ip in ips:
                if not destination or (conn.protocol, conn.port) in ports:
                    return True
        return False

    def port(self, wanted, port, owners, conn):
        if isinstance(wanted, int):
            return port == wanted
        if ":" in wanted:
            first, last = wanted.split(":")
            return int(first) <= port <= int(last)
        return any(o.has_port(wanted, conn) for o in owners)


def decide(manifests, dns, flows):
    """[(allow?, why)] for flows as `bulkhead decide --batch` takes them; their ends must be `ip:`."""
    state = State(manifests, dns)
    return [state.verdict(Connection(f["from"][3:], f["to"][3:], f["protocol"], f["port"], f.get("sourcePort", 50000))) for f in flows]
