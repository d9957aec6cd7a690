//! The kinds of findings: one table for messages, `lint --explain`, SARIF and documentation.

use std::fmt;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Most likely not what was meant.
    Warning,
    /// Certainly wrong.
    Error,
}

impl Severity {
    /// As SARIF calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What there is to know of a code.
#[derive(Debug, Clone, Copy)]
pub struct CodeInfo {
    /// Which.
    pub code: Code,
    /// Its number, like `BH001`.
    pub id: &'static str,
    /// Its name, like `shadowed-rule`.
    pub name: &'static str,
    /// How much it matters unless told otherwise.
    pub severity: Severity,
    /// One line.
    pub summary: &'static str,
    /// Why it matters, what is looked at, and what to do.
    pub explanation: &'static str,
}

macro_rules! codes {
    ($($code:ident $id:literal $name:literal $severity:ident $summary:literal $explanation:literal;)*) => {
        /// A kind of finding.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Code { $(#[doc = $summary] $code,)* }

        /// All of them, by number.
        pub const CODES: &[CodeInfo] = &[$(CodeInfo {
            code: Code::$code,
            id: $id,
            name: $name,
            severity: Severity::$severity,
            summary: $summary,
            explanation: $explanation,
        },)*];
    };
}

codes! {
    ShadowedRule "BH001" "shadowed-rule" Warning
        "Earlier rules decide everything that this rule matches."
        "No connection ever reaches this rule: removing it changes no verdict. Either it is left over, or it stands too late. Peers are compared one by one (equal, any, CIDR containment, selectors that follow from each other label by label), ports, families and source ports as intervals; earlier rules count if they stand in the same list, or in a policy that is asked before for the same endpoints and at the same times, in the same tier or an earlier one. What only several selectors or several blocks together cover, or what depends on which workloads there are, is not reported.";
    UnreachableRule "BH002" "unreachable-rule" Warning
        "The rule stands behind one that decides everything, or behind a tier that ends in Deny."
        "A rule without peers and ports that allows, denies or passes decides every connection; what stands behind it in the same list is never asked. The same holds for policies behind a tier that ends in Deny, in which nothing passes, and that has a policy for all of their endpoints. Move the rule up, narrow the one before it, or let the earlier tier end in Pass.";
    DuplicateRule "BH003" "duplicate-rule" Warning
        "The rule says the same as an earlier one of its list."
        "It has no effect. Usually one of the two was meant to say something else.";
    UnknownTier "BH004" "unknown-tier" Error
        "There is no tier of the policy's tier name."
        "A policy whose tier does not exist is refused by the repository. Give the Tier with the manifests, or correct the name; quarantine, admin, application and baseline exist already.";
    SelectsNothing "BH005" "selects-nothing" Warning
        "appliesTo selects no endpoint of the inventory."
        "The policy has no effect on the workloads that are among the manifests. Only reported where workloads, pods or host endpoints are among them.";
    PeerMatchesNothing "BH006" "peer-matches-nothing" Warning
        "A peer's selector, network sets or hosts match nothing in the inventory."
        "The rule never matches by this peer. Selectors, namespaces and service accounts are looked for together, as they must hold of one workload. Only reported where workloads (for networkSets also network sets, for hosts hosts) are among the manifests.";
    UnknownLabel "BH007" "unknown-label" Warning
        "A selector reads a label that nothing has, and a very similar one is in use."
        "Probably a typing error: selectors over labels that nobody has are legal, and silently match nobody (or, negated, everybody).";
    UnknownLabelValue "BH008" "unknown-label-value" Warning
        "A selector compares a label with a value that nothing has, and a very similar one is in use."
        "Probably a typing error. Values that differ in digits only are left alone.";
    AllowsEverything "BH009" "allows-everything" Warning
        "The rule allows every connection, from or to anybody on any port."
        "The endpoints are open in this direction, and no later tier is asked either. Name the peers or the ports; for what is meant to be open, --allow BH009 or a rule of action Pass that leaves the decision to the tiers behind.";
    OnlyLogs "BH010" "only-logs" Warning
        "All rules of one direction only log, and so the policy refuses everything."
        "Log notes a connection and goes on to the next rule. Behind the last rule stands the end of the tier, which denies: a policy meant to watch isolates its endpoints. Use mode: Audit to watch, or end the list with Pass or Allow.";
    OrderUndefined "BH011" "equal-order" Note
        "Two policies of one tier and order disagree about the same endpoints; their names decide who wins."
        "Policies of equal order are asked by kind, namespace and name. Here one allows, denies or passes what the other may decide otherwise, so that renaming one could change verdicts. Give them different orders. Reported if the policies select a common endpoint of the inventory or, without one, if one's selector follows from the other's, and rules of different action may meet on a port.";
    Expired "BH012" "expired" Warning
        "validUntil is past: the policy never counts again."
        "Remove it, or set a new end. The time is now unless --at says otherwise.";
    UnknownNamedPort "BH013" "unknown-named-port" Warning
        "No destination gives this name to a port."
        "A named port means whatever number the destination gives to it; where nobody does, the rule matches nothing by it. For ingress the policy's own endpoints are looked at, for egress everything. Only reported where an inventory is among the manifests.";
    RedundantDeny "BH014" "redundant-deny" Note
        "The rule denies everything where the tier would do so anyway."
        "The tier ends in Deny, nothing in it is asked after this rule, and it asks for no log and tells nobody. It does no harm, and names itself in flows instead of the end of the tier.";
    UnknownService "BH016" "unknown-service" Warning
        "No EndpointSlice gives backends to this service."
        "The rule never matches by this service. Only reported where services or pods are among the manifests.";
    UnknownDomain "BH017" "unknown-domain" Warning
        "No address is known of this DNS name."
        "The rule never matches by this name. Only reported where a NameTable is among the manifests.";
}

impl Code {
    /// What there is to know of it.
    pub fn info(self) -> &'static CodeInfo {
        &CODES[self as usize]
    }

    /// By number or name, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        let lower = text.to_ascii_lowercase();
        let info = CODES.iter().find(|info| info.id.to_ascii_lowercase() == lower || info.name == lower);
        info.map(|info| info.code)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.info().id)
    }
}
