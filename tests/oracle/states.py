"""Random small clusters: their objects, what may happen to them, and questions about them.

One `random.Random` decides everything, so a seed says it all."""

APPS, ENVS, TEAMS = ["web", "db", "api"], ["prod", "dev", "test"], ["red", "blue"]
NAMESPACES, NODES = ["a", "b", "c"], ["n1", "n2"]
PORT_NAMES = ["http", "dns", "alt"]
PORTS = [1, 53, 79, 80, 81, 82, 443, 8080, 65535]
DNS = {"api.example.com": ["203.0.113.5", "2001:db8::5"], "x.Y.example.com": ["203.0.113.6"], "example.com": ["203.0.113.7"],
       "db.internal": ["10.0.0.2"]}
OUTSIDE = ["203.0.113.5", "203.0.113.6", "203.0.113.7", "198.51.100.9", "10.0.0.200", "10.0.1.129",
           "2001:db8::5", "2001:db8:1::9", "fd00::200"]
CIDRS = ["0.0.0.0/0", "::/0", "10.0.0.0/8", "10.0.0.0/24", "10.0.0.0/30", "10.0.0.2/32", "10.0.0.4/31", "10.0.1.0/24",
         "10.0.0.200/32", "203.0.113.0/24", "203.0.113.4/31", "192.168.0.0/24", "192.168.0.1/32", "172.16.0.0/12",
         "fd00::/64", "fd00::2/127", "fd00::4/126", "2001:db8::/32", "2001:db8::5/128", "fd01::/64"]
EXCEPTS = {"0.0.0.0/0": ["10.0.0.0/24", "203.0.113.0/25"], "10.0.0.0/8": ["10.0.0.0/30", "10.0.0.5/32"],
           "10.0.0.0/24": ["10.0.0.2/32", "10.0.0.4/30"], "::/0": ["fd00::/64"], "fd00::/64": ["fd00::3/128", "fd00::4/126"]}


class States:
    def __init__(self, random):
        self.random, self.count = random, 0
        self.one, self.chance = random.choice, lambda p: random.random() < p

    def some(self, values, least=0, most=3):
        return self.random.sample(values, min(len(values), self.random.randint(least, most)))

    def name(self):
        self.count += 1
        return self.one("pqrs") + str(self.count)

    # Inventory

    def inventory(self):
        """Namespaces, accounts, nodes and endpoints; all have an address of their own."""
        out, spaces = [], NAMESPACES[: self.random.randint(2, 3)]
        for n in spaces:
            out.append(obj("v1", "Namespace", n, labels=self.space_labels()))
            for account in ("default", "robot"):
                out.append(obj("v1", "ServiceAccount", account, n, labels=self.labels({"role": ["ops", "app"], "team": TEAMS})))
        for i, n in enumerate(NODES, 1):
            out.append({**obj("v1", "Node", n, labels=self.labels({"zone": ["z1", "z2"], "env": ENVS})),
                        "status": {"addresses": [{"type": "InternalIP", "address": a} for a in (f"192.168.0.{i}", f"fd01::{i}")]}})
        calico = self.chance(0.5)
        for i in range(1, self.random.randint(4, 6) + 1):
            out.append(self.workload_endpoint(i, spaces) if calico and self.chance(0.3) else self.pod(i, spaces))
        if calico:
            for i in range(1, self.random.randint(0, 2) + 1):
                out.append(self.host_endpoint(i))
            for n in self.some(["open", "mixed", "empty"]):
                out.append(self.profile(n))
            for n, order in (("first", 10), ("middle", 5000), ("middling", 5000), ("late", None)):
                if self.chance(0.6):
                    spec = {} if order is None else {"order": order}
                    if self.chance(0.5):
                        spec["defaultAction"] = self.one(["Pass", "Deny"])
                    out.append(obj("projectcalico.org/v3", "Tier", n, spec=spec))
        for i in range(self.random.randint(0, 2)):
            out.append(self.slice(spaces))
        return out

    def labels(self, choices, p=0.7):
        return {k: self.one(v) for k, v in choices.items() if self.chance(p)}

    def space_labels(self):
        return self.labels({"env": ENVS, "team": TEAMS})

    def pod_labels(self):
        return self.labels({"app": APPS, "env": ENVS, "team": TEAMS}, 0.6)

    def addresses(self, i):
        return [f"10.0.{0 if i < 5 else 1}.{i}"] * self.chance(0.9) + [f"fd00::{i}"] * self.chance(0.6) or [f"10.0.0.{i}"]

    def ports(self, key):
        return [{"name": n, key: self.one(PORTS), "protocol": self.one(["TCP", "TCP", "UDP", "SCTP"])} for n in self.some(PORT_NAMES)]

    def pod(self, i, spaces):
        node = self.one(NODES)
        host, k = self.chance(0.12), NODES.index(node) + 1
        ips = [f"192.168.0.{k}", f"fd01::{k}"] if host else self.addresses(i)
        return {**obj("v1", "Pod", f"pod{i}", self.one(spaces), labels=self.pod_labels(), spec={
            "nodeName": node, "hostNetwork": host, "serviceAccountName": self.one(["default", "robot"]),
            "containers": [{"name": "c", "image": "none", "ports": self.ports("containerPort")}]}),
            "status": {"podIP": ips[0], "podIPs": [{"ip": a} for a in ips], "phase": "Running"}}

    def workload_endpoint(self, i, spaces):
        n = self.one(spaces)
        account = self.one(["default", "robot"])
        profiles = self.one([[f"kns.{n}", f"ksa.{n}.{account}"], [f"ksa.{n}.{account}", f"kns.{n}"], [], ["open"], ["mixed", "open"], ["empty", "mixed"],
                             ["mixed", "nowhere"], ["mixed", f"kns.{n}"]])
        return obj("projectcalico.org/v3", "WorkloadEndpoint", f"wep{i}", n, labels=self.pod_labels(), spec={
            "node": self.one(NODES), "orchestrator": "k8s", "endpoint": "eth0", "interfaceName": f"cali{i}", "serviceAccountName": account,
            "ipNetworks": [a + ("/128" if ":" in a else "/32") for a in self.addresses(i)], "profiles": profiles, "ports": self.ports("port")})

    def host_endpoint(self, i):
        ips = self.one([[f"192.168.0.{i}"], [f"172.16.0.{i}"], [f"172.16.0.{i}", f"fd02::{i}"]])
        return obj("projectcalico.org/v3", "HostEndpoint", f"hep{i}", labels=self.pod_labels(), spec={
            "node": NODES[i - 1], "interfaceName": "eth0", "expectedIPs": ips, "ports": self.ports("port"),
            "profiles": self.one([[], ["open"], ["mixed", "open"], ["nowhere"]])})

    def profile(self, name):
        spec = {"labelsToApply": self.labels({"env": ENVS, "color": ["green"]}, 0.4)}
        for way in ("ingress", "egress"):
            if name == "open":
                spec[way] = [{"action": "Allow"}]
            elif name == "mixed":
                spec[way] = [self.calico_rule(way, None, ["Allow", "Deny", "Log"]) for _ in range(self.random.randint(0, 2))]
        return obj("projectcalico.org/v3", "Profile", name, spec=spec)

    def slice(self, spaces):
        six = self.chance(0.3)
        ips = self.some(["fd00::1", "fd00::2", "2001:db8::5"] if six else ["10.0.0.1", "10.0.0.2", "10.0.0.3", "203.0.113.5"], 1)
        return {**obj("discovery.k8s.io/v1", "EndpointSlice", self.name(), self.one(spaces), labels={"kubernetes.io/service-name": self.one(["s", "t"])}),
                "addressType": "IPv6" if six else "IPv4", "endpoints": [{"addresses": [a]} for a in ips],
                "ports": [{"name": p, "port": self.one(PORTS), "protocol": self.one(["TCP", "UDP"])} for p in self.some(PORT_NAMES, 1, 2)]}

    def network_set(self, spaces):
        spec, labels = {"nets": self.some(CIDRS, 0, 3)}, self.pod_labels()
        if self.chance(0.5):
            return obj("projectcalico.org/v3", "GlobalNetworkSet", self.name(), labels=labels, spec=spec)
        return obj("projectcalico.org/v3", "NetworkSet", self.name(), self.one(spaces), labels=labels, spec=spec)

    # Policies of Kubernetes

    def label_selector(self, choices):
        out = {}
        if self.chance(0.5):
            key = self.one(list(choices))
            out["matchLabels"] = {key: self.one(choices[key])}
        if self.chance(0.4):
            key, operator = self.one(list(choices)), self.one(["In", "NotIn", "Exists", "DoesNotExist"])
            out["matchExpressions"] = [{"key": key, "operator": operator, **({"values": self.some(choices[key], 1, 2)} if "In" in operator else {})}]
        return out

    def pod_selector(self):
        return self.label_selector({"app": APPS, "env": ENVS, "team": TEAMS})

    def space_selector(self):
        return self.label_selector({"env": ENVS, "team": TEAMS, "kubernetes.io/metadata.name": NAMESPACES})

    def network_policy(self, spaces, api="networking.k8s.io/v1", kind="NetworkPolicy"):
        spec = {"podSelector": self.pod_selector()}
        if self.chance(0.6):
            spec["policyTypes"] = self.some(["Ingress", "Egress"], 0, 2)
        for way, side in (("ingress", "from"), ("egress", "to")):
            if self.chance(0.6):
                spec[way] = [self.network_policy_rule(side) for _ in range(self.random.randint(0, 2))]
        return obj(api, kind, self.name(), self.one(spaces), spec=spec)

    def staged_kubernetes(self, spaces):
        staged = self.network_policy(spaces, "projectcalico.org/v3", "StagedKubernetesNetworkPolicy")
        staged["spec"]["stagedAction"] = self.one(["Set", "Learn", "Ignore"])
        return staged

    def network_policy_rule(self, side):
        rule = {}
        if self.chance(0.7):
            rule[side] = [self.network_policy_peer() for _ in range(self.random.randint(0, 2))]
        if self.chance(0.6):
            rule["ports"] = [self.network_policy_port() for _ in range(self.random.randint(0, 2))]
        return rule

    def network_policy_peer(self):
        if self.chance(0.3):
            cidr = self.one(CIDRS)
            block = {"cidr": cidr}
            if cidr in EXCEPTS and self.chance(0.6):
                block["except"] = self.some(EXCEPTS[cidr], 1, 2)
            return {"ipBlock": block}
        peer = {}
        if self.chance(0.6):
            peer["podSelector"] = self.pod_selector()
        if not peer or self.chance(0.5):
            peer["namespaceSelector"] = self.space_selector()
        return peer

    def network_policy_port(self):
        port = {"protocol": self.one(["TCP", "UDP", "SCTP"])} if self.chance(0.7) else {}
        if self.chance(0.8):
            port["port"] = self.one(PORTS + PORT_NAMES)
            if isinstance(port["port"], int) and self.chance(0.3):
                port["endPort"] = min(65535, port["port"] + self.random.randint(0, 3))
        return port

    def cluster_policy(self, spaces):
        kind = self.one(["ClusterNetworkPolicy"] * 3 + ["AdminNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy"])
        new = kind == "ClusterNetworkPolicy"
        spec = {"subject": self.one([lambda: {"namespaces": self.space_selector()},
                                     lambda: {"pods": {"namespaceSelector": self.space_selector(), "podSelector": self.pod_selector()}}])()}
        tier = "Baseline" if kind.startswith("Baseline") else "Admin"
        if new:
            tier = spec["tier"] = self.one(["Admin", "Baseline"])
        if not kind.startswith("Baseline"):
            spec["priority"] = self.random.randint(0, 4)
        actions = ["Accept" if new else "Allow", "Deny"] + ([] if kind.startswith("Baseline") else ["Pass"])
        for way, side in (("ingress", "from"), ("egress", "to")):
            if self.chance(0.7):
                spec[way] = [self.cluster_rule(new, side, self.one(actions), tier) for _ in range(self.random.randint(0, 3))]
        api = "policy.networking.k8s.io/" + ("v1alpha2" if new else "v1alpha1")
        return obj(api, kind, "default" if kind.startswith("Baseline") else self.name(), spec=spec)

    def cluster_rule(self, new, side, action, tier):
        kinds = ["namespaces", "pods"] * 2
        if side == "to":
            kinds += ["networks", "nodes"]
            if action in ("Accept", "Allow") and tier == "Admin":
                kinds.append("domainNames")
        kinds = [self.one(kinds) for _ in range(self.random.randint(1, 2))]
        named = not set(kinds) & {"networks", "nodes", "domainNames"}
        rule = {"action": action, side: [self.cluster_peer(k, new) for k in kinds]}
        if self.chance(0.04):
            rule[side].append({"future": {}})
        if self.chance(0.5):
            if new:
                rule["protocols"] = [self.cluster_protocol(named) for _ in range(self.random.randint(1, 2))]
            else:
                rule["ports"] = [self.admin_port(named) for _ in range(self.random.randint(1, 2))]
        return rule

    def cluster_peer(self, kind, new):
        if kind == "namespaces":
            return {kind: self.space_selector() if new or self.chance(0.5) else self.old_namespaces()}
        if kind == "pods":
            if not new and self.chance(0.4):
                return {kind: {"namespaces": self.old_namespaces(), "podSelector": self.pod_selector()}}
            return {kind: {"namespaceSelector": self.space_selector(), "podSelector": self.pod_selector()}}
        if kind == "nodes":
            return {kind: self.label_selector({"zone": ["z1", "z2"], "env": ENVS})}
        if kind == "networks":
            return {kind: self.some(CIDRS, 1, 2)}
        return {kind: self.some(["api.example.com", "*.example.com", "example.com.", "*.y.example.com", "db.internal", "nowhere.test"], 1, 2)}

    def old_namespaces(self):
        return self.one([lambda: {"namespaceSelector": self.space_selector()}, lambda: {"sameLabels": self.some(["env", "team", "kubernetes.io/metadata.name"], 0)},
                         lambda: {"notSameLabels": self.some(["env", "team", "kubernetes.io/metadata.name"], 0)}])()

    def range(self):
        start = self.one(PORTS[:-1])
        return {"start": start, "end": start + self.random.randint(1, 3)}

    def cluster_protocol(self, named):
        if named and self.chance(0.3):
            return {"destinationNamedPort": self.one(PORT_NAMES)}
        return {self.one(["tcp", "udp", "sctp"]): {"destinationPort": {"range": self.range()} if self.chance(0.3) else {"number": self.one(PORTS)}}}

    def admin_port(self, named):
        if named and self.chance(0.3):
            return {"namedPort": self.one(PORT_NAMES)}
        protocol = {"protocol": self.one(["TCP", "UDP", "SCTP"])}
        return {"portRange": {**protocol, **self.range()}} if self.chance(0.4) else {"portNumber": {**protocol, "port": self.one(PORTS)}}

    # Policies of Calico

    def blank(self, least=0):
        return self.one(["", " "][least:] + [" ", "\t", "  "])

    def selector(self, choices, depth=2, is_global=False):
        b = self.blank
        if depth and self.chance(0.35):
            return b().join((self.one(["(%s)", "!(%s)", "! ( %s )", "!!(%s)"]) % self.selector(choices, depth - 1, is_global), self.one(["&&", "||"]),
                             self.selector(choices, depth - 1, is_global)))
        if self.chance(0.15):
            return self.one(["all()", "!all()", ""] if depth == 2 else ["all()", "!all()"])
        if is_global and self.chance(0.3):
            return self.one(["global()", "!global()"])
        key = self.one(list(choices))
        value = lambda: self.one(["'%s'", '"%s"']) % (self.one(choices[key]) if self.chance(0.9) else "")
        part = lambda: "'%s'" % self.one(choices[key])[: self.random.randint(0, 2)]
        values = lambda: "{" + (b() + "," + b()).join(value() for _ in range(self.random.randint(0, 2))) + "}"
        return self.one([
            lambda: f"{key}{b()}=={b()}{value()}", lambda: f"{key}{b()}=={b()}{value()}", lambda: f"{key}{b()}!={b()}{value()}",
            lambda: f"has({b()}{key}{b()})", lambda: f"!{b()}has({key})", lambda: f"{key} in{b()}{values()}", lambda: f"{key} not in{b()}{values()}",
            lambda: f"{key} notin {values()}", lambda: f"{key} contains {part()}", lambda: f"{key} starts with {part()}", lambda: f"{key} startswith {part()}",
            lambda: f"{key} ends with '{self.one(choices[key])[-1]}'"])()

    def calico_selector(self):
        return self.selector({"app": APPS, "env": ENVS, "team": TEAMS, "color": ["green"], "projectcalico.org/namespace": NAMESPACES, "pcns.env": ENVS,
                              "pcsa.role": ["ops", "app"], "projectcalico.org/serviceaccount": ["default", "robot"],
                              "pcns.projectcalico.org/name": NAMESPACES, "pcsa.projectcalico.org/name": ["default", "robot"],
                              "projectcalico.org/kind": ["NetworkSet", "GlobalNetworkSet"], "projectcalico.org/name": ["s1", "q2", "r3"],
                              "projectcalico.org/orchestrator": ["k8s"]})

    def selector_soup(self):
        """Tokens in an order that is seldom right."""
        tokens = ["a", "in", "not", "has", "all", "contains", "starts", "with", "ends", "startswith", "endswith", "notin", "global", "==", "!=", "!", "&&", "||",
                  "(", ")", "{", "}", ",", "'x'", '"in"', "''", "has(a)", "has( in )", "has(a", "has (a)", "all()", "all( )", "global()", "a == 'x'",
                  "in in{'x'}", "a not in {'x',}", "contains contains 'x'", "a starts with 'x'", "not == 'x'", "=", "&", "{}", "{,}", "\n", "a/b.c-d_e", "'"]
        shapes = [["L", "O", "S"], ["L", "I", "{", "S", "}"], ["(", "L", "O", "S", ")"], ["!", "L", "O", "S", "&&", "!", "has(a)"]]
        kinds = {"L": ["a", "in", "not", "has", "contains", "all"], "O": ["==", "!=", "contains", "starts with", "startswith", "ends\twith"], "S": ["'x'", '"in"', "''"],
                 "I": ["in", "not in", "notin"]}
        words = [self.one(kinds.get(w, [w])) for w in self.one(shapes)]
        for _ in range(self.random.randint(0, 2)):
            words.insert(self.random.randint(0, len(words)), self.one(tokens))
        return "".join(w + self.one(["", " ", " ", "\t"]) for w in words)

    def namespace_selector(self):
        return self.selector({"env": ENVS, "team": TEAMS, "kubernetes.io/metadata.name": NAMESPACES, "projectcalico.org/name": NAMESPACES}, is_global=True)

    def account_selector(self):
        return self.selector({"role": ["ops", "app"], "team": TEAMS}, 1)

    def calico_policy(self, spaces, tiers, staged=False):
        everywhere, spec = self.chance(0.5), {}
        if tiers and self.chance(0.6):
            spec["tier"] = self.one(tiers + ["default"])
        if self.chance(0.8):
            spec["order"] = self.one([0, 1, 10, 10.5, 999, 1000, 1001, 5000])
        if self.chance(0.85):
            spec["selector"] = self.calico_selector()
        if everywhere and self.chance(0.3):
            spec["namespaceSelector"] = self.namespace_selector()
        if self.chance(0.15):
            spec["serviceAccountSelector"] = self.account_selector()
        if self.chance(0.5):
            spec["types"] = self.some(["Ingress", "Egress"], 1, 2)
        for way in ("ingress", "egress"):
            if self.chance(0.7) and way.capitalize() in spec.get("types", ["Ingress", "Egress"]):
                spec[way] = [self.calico_rule(way, None if everywhere else "x") for _ in range(self.random.randint(0, 3))]
        kind = ("Global" if everywhere else "") + "NetworkPolicy"
        if staged:
            spec["stagedAction"] = self.one(["Set", "Ignore", "Learn"])
            kind = "Staged" + kind
        name = self.name()
        return obj("projectcalico.org/v3", kind, name, None if everywhere else self.one(spaces), spec=spec)

    def calico_rule(self, way, namespace, actions=("Allow", "Allow", "Deny", "Deny", "Pass", "Log")):
        rule, ported = {"action": self.one(list(actions))}, False
        if self.chance(0.1):
            rule["ipVersion"] = self.one([4, 6])
        if self.chance(0.6):
            rule["protocol"] = self.one(["TCP"] * 4 + ["UDP", "UDP", "SCTP", "ICMP", "ICMPv6", "UDPLite", 6, 17, 47])
            ported = rule["protocol"] in ("TCP", "UDP", "SCTP")
            if rule["protocol"] in ("ICMP", "ICMPv6"):
                rule.pop("ipVersion", None)
                if self.chance(0.7):
                    rule[self.one(["icmp", "notICMP"])] = {"type": self.one([3, 8, 128]), **({"code": self.one([0, 1])} if self.chance(0.5) else {})}
        elif self.chance(0.15):
            rule["notProtocol"] = self.one(["TCP", "UDP", "ICMP"])
        for side, p in (("source", 0.7 if way == "ingress" else 0.2), ("destination", 0.7 if way == "egress" else 0.2)):
            entity = self.entity(namespace, p, (side == "source") == (way == "ingress"))
            if ported and side == "destination" and self.chance(0.5) and "services" not in entity:
                for key in self.one([["ports"], ["ports"], ["notPorts"], ["ports", "notPorts"]]):
                    entity[key] = [self.calico_port(True) for _ in range(self.random.randint(1, 2))]
            if ported and side == "source" and self.chance(0.1) and "services" not in entity:
                entity[self.one(["ports", "notPorts"])] = [self.calico_port(False)]
            if entity:
                rule[side] = entity
        return rule

    def calico_port(self, named):
        start = self.one(PORTS[:-1])
        return self.one([start, f"{start}:{start + self.random.randint(0, 3)}"] + ([self.one(PORT_NAMES)] if named else []))

    def entity(self, namespace, p, other_end):
        if not self.chance(p):
            return {}
        if other_end and self.chance(0.1):
            service = {"name": self.one(["s", "t"])}
            if namespace is None or self.chance(0.7):
                service["namespace"] = self.one(NAMESPACES)
            return {"services": service}
        e = {}
        if self.chance(0.3):
            e["nets"] = self.some(CIDRS, 1, 2)
        if self.chance(0.2):
            e["notNets"] = self.some(CIDRS[2:], 1, 2)
        if self.chance(0.5):
            e["selector"] = self.calico_selector()
        if self.chance(0.2):
            e["notSelector"] = self.calico_selector()
        if self.chance(0.25):
            e["namespaceSelector"] = self.namespace_selector()
        if self.chance(0.12):
            e["serviceAccounts"] = {**({"names": self.some(["default", "robot"], 1, 2)} if self.chance(0.6) else {}),
                                    **({"selector": self.account_selector()} if self.chance(0.5) else {})} or {"names": ["robot"]}
        return {k: v for k, v in e.items() if v != ""}

    # What happens

    def policy(self, manifests):
        spaces = [m["metadata"]["name"] for m in manifests if m["kind"] == "Namespace"]
        tiers = [m["metadata"]["name"] for m in manifests if m["kind"] == "Tier"]
        calico = tiers or any(m["kind"] in ("WorkloadEndpoint", "HostEndpoint", "Profile") for m in manifests)
        makers = [lambda: self.network_policy(spaces)] * 3 + [lambda: self.cluster_policy(spaces)] * 3
        makers += [lambda: self.calico_policy(spaces, tiers)] * (8 if calico else 2) + [lambda: self.network_set(spaces)] * 2
        makers += [lambda: self.calico_policy(spaces, tiers, True), lambda: self.staged_kubernetes(spaces)]
        return self.one(makers)()

    def first(self):
        """A state to begin with."""
        manifests = self.inventory()
        for _ in range(self.random.randint(1, 7)):
            manifests = put(manifests, self.policy(manifests))
        return manifests

    def next(self, manifests):
        """The state after a few things have happened to this one."""
        manifests = list(manifests)
        for _ in range(self.random.randint(1, 2)):
            what = self.random.random()
            policies = [m for m in manifests if "Policy" in m["kind"] or "Set" in m["kind"]]
            if what < 0.35:
                manifests = put(manifests, self.policy(manifests))
            elif what < 0.55 and policies:
                manifests.remove(self.one(policies))
            elif what < 0.7 and policies:
                old, new = self.one(policies), self.policy(manifests)
                if old["kind"] == new["kind"] and old["metadata"].get("namespace") == new["metadata"].get("namespace"):
                    new["metadata"]["name"] = old["metadata"]["name"]
                    manifests.remove(old)
                manifests = put(manifests, new)
            elif what < 0.8:
                manifests = self.rearrange(manifests)
            else:
                old = self.one([m for m in manifests if m["kind"] in ("Namespace", "Pod", "WorkloadEndpoint", "HostEndpoint", "ServiceAccount", "Node")])
                labels = self.space_labels() if old["kind"] == "Namespace" else self.pod_labels()
                new = {**old, "metadata": {**old["metadata"], "labels": labels}}
                if old["kind"] == "Pod" and self.chance(0.3) and sum(m["kind"] == "Pod" for m in manifests) > 2:
                    manifests.remove(old)
                else:
                    manifests[manifests.index(old)] = new
        return manifests

    def rearrange(self, manifests):
        """Another tier, profile, slice or host endpoint of the same name, or none."""
        make = {"Tier": lambda n: obj("projectcalico.org/v3", "Tier", n, spec=self.one([{"order": 20}, {"order": 2000000}, {"defaultAction": "Pass"}, {}])),
                "Profile": self.profile, "HostEndpoint": lambda n: self.host_endpoint(int(n[3:])),
                "EndpointSlice": lambda n: self.slice(NAMESPACES[:2])}
        found = [m for m in manifests if m["kind"] in make]
        if not found:
            return manifests
        old = self.one(found)
        if old["kind"] != "Tier" and self.chance(0.3):
            return [m for m in manifests if m is not old]
        return put(manifests, make[old["kind"]](old["metadata"]["name"]))

    def flows(self, manifests, most=260):
        """Questions: every pair of addresses of one family that has a workload or a host endpoint among it."""
        ours = {}
        for i, m in enumerate(manifests):
            for a in own_addresses(m):
                ours[a] = i
        known = list(ours) + [f"{net}{i}" for net in ("192.168.0.", "fd01::") for i in (1, 2) if f"{net}{i}" not in ours] + OUTSIDE
        pairs = [(a, b) for a in known for b in known if a != b and (":" in a) == (":" in b) and (a in ours or b in ours)
                 and not (ours.get(a, -1) == ours.get(b, -2) and manifests[ours[a]]["kind"] == "HostEndpoint")]
        flows = []
        for a, b in pairs:
            for _ in range(2):
                flows.append(self.flow(a, b))
        return flows if len(flows) <= most else self.random.sample(flows, most)

    def flow(self, a, b):
        flow = {"from": "ip:" + a, "to": "ip:" + b, "protocol": self.one(["TCP"] * 6 + ["UDP"] * 3 + ["SCTP", "SCTP", "ICMP", "UDPLite", "47"]), "port": 0}
        if flow["protocol"] == "ICMP":
            if ":" in a:
                flow["protocol"] = "ICMPv6"
            flow["port"] = (self.one([3, 8, 128, 0]) << 8) + self.one([0, 0, 1])
        elif flow["protocol"] != "47":
            flow["port"] = min(65535, max(0, self.one(PORTS + [22, 68, 80, 80, 53]) + self.one([0, 0, 0, 1, 2, -1])))
            if self.chance(0.2):
                flow["sourcePort"] = self.one(PORTS)
        return flow


def own_addresses(m):
    if m["kind"] == "Pod" and not m["spec"]["hostNetwork"]:
        return [i["ip"] for i in m["status"]["podIPs"]]
    if m["kind"] == "WorkloadEndpoint":
        return [a.split("/")[0] for a in m["spec"]["ipNetworks"]]
    return m["spec"]["expectedIPs"] if m["kind"] == "HostEndpoint" else []


def obj(api, kind, name, namespace=None, labels=None, spec=None):
    meta = {"name": name, **({"namespace": namespace} if namespace else {}), **({"labels": labels} if labels else {})}
    return {"apiVersion": api, "kind": kind, "metadata": meta, **({"spec": spec} if spec is not None else {})}


def key(m):
    return m["apiVersion"].split("/")[0], m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]


def put(manifests, new):
    """The manifests with this one, instead of its namesake if there is one."""
    return [m for m in manifests if key(m) != key(new)] + [new]
