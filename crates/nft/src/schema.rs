//! What the tables hold: names, keys and the words that stand for a decision.
//!
//! A change of anything here raises [`LAYOUT`]; an agent that finds another one replaces it at its first
//! [`bulkhead_dataplane::Dataplane::replace`] and changes nothing before.

use bulkhead_model::flow::DropReason;
use bulkhead_model::host_policy::{Cell, RuleId};
use bulkhead_model::verdict::{Builtin, Direction, Verdict};

use crate::object::{INET, NETDEV, SET_DYNAMIC, SET_INTERVAL, SET_MAP, Set, Table};

/// Version of everything in this file and of the rules.
pub(crate) const LAYOUT: u32 = 5;

/// Judges connections.
pub(crate) const JUDGE: Table = Table { family: INET, name: "bulkhead" };
/// Judges addresses at the workloads' interfaces.
pub(crate) const EDGE: Table = Table { family: NETDEV, name: "bulkhead" };

/// Log group by which refused connections are told. One process at a time can listen to a group.
pub(crate) const LOG_GROUP: u16 = 0xb01d;

// Types by which `nft` prints keys and data. The kernel does not look at them.
/// Bytes, printed like a hardware address: `nft` takes no joined type for intervals of this kind.
pub(crate) const BYTES: u32 = 6;
const IPV4: u32 = 7;
const IPV6: u32 = 8;
const MARK: u32 = 19;
const INTERFACE: u32 = 20;

pub(crate) const fn set(table: Table, name: &'static str, key_type: u32, key_len: u32) -> Set {
    Set { table, name, flags: 0, key_type, key_len, data_type: 0, data_len: 0, size: None }
}

const fn map(table: Table, name: &'static str, key: (u32, u32), data: (u32, u32), flags: u32) -> Set {
    let flags = SET_MAP | flags;
    let (key_type, key_len) = key;
    let (data_type, data_len) = data;
    Set { table, name, flags, key_type, key_len, data_type, data_len, size: None }
}

const WORD: (u32, u32) = (MARK, 4);
const TWO_WORDS: (u32, u32) = (BYTES, 8);
const ADDRESS: [(u32, u32); 2] = [(IPV4, 4), (IPV6, 16)];

/// Agent's term: whoever writes says which, and the kernel refuses another than what stands here.
pub(crate) const FENCE: Set = map(JUDGE, "fence", WORD, TWO_WORDS, 0);
/// Rows: (policy, class) → steps or variants.
pub(crate) const ROWS: Set = map(JUDGE, "rows", (BYTES, 12), WORD, 0);
/// Steps: (number, protocol, port) → decision.
pub(crate) const STEPS: Set = map(JUDGE, "steps", (BYTES, 16), TWO_WORDS, SET_INTERVAL);
/// Variants: (number, source port) → steps.
pub(crate) const VARIANTS: Set = map(JUDGE, "variants", (BYTES, 12), WORD, SET_INTERVAL);

/// What exists once for each address family.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Family {
    pub(crate) v6: bool,
    /// Addresses of workloads.
    pub(crate) ours: Set,
    /// Pairs of addresses of one endpoint.
    pub(crate) selves: Set,
    /// Address → policy of what it begins.
    pub(crate) egress: Set,
    /// Address → policy of what it is called for.
    pub(crate) ingress: Set,
    /// Single address → class; of all others, that [`Self::blocks`] has it.
    pub(crate) classes: Set,
    /// Range → class of what is in no smaller block.
    pub(crate) blocks: Set,
    /// Block → class, as they were given. Not looked at by rules.
    pub(crate) prefixes: Set,
    /// Refused connections, counted.
    pub(crate) denied: Set,
    /// (interface, address): who may use what.
    pub(crate) own: Set,
    /// Refused at the edge, counted.
    pub(crate) edge_denied: Set,
    /// Addresses of host endpoints.
    pub(crate) host_own: Set,
    /// Address of a host endpoint → policy of what it begins.
    pub(crate) host_egress: Set,
    /// Address of a host endpoint → policy of what it is called for.
    pub(crate) host_ingress: Set,
    /// (endpoint, address) where [`Self::own`] has none. Not looked at by rules.
    pub(crate) held: Set,
}

/// Both, IPv4 first.
pub(crate) const FAMILIES: [Family; 2] = [family(false), family(true)];

const fn family(v6: bool) -> Family {
    let (kind, len) = ADDRESS[v6 as usize];
    let names: [&str; 8] = if v6 {
        ["ours6", "selves6", "egress6", "ingress6", "classes6", "denied6", "blocks6", "prefixes6"]
    } else {
        ["ours4", "selves4", "egress4", "ingress4", "classes4", "denied4", "blocks4", "prefixes4"]
    };
    let [host_own, host_egress, host_ingress, held] = if v6 {
        ["host_own6", "host_egress6", "host_ingress6", "held6"]
    } else {
        ["host_own4", "host_egress4", "host_ingress4", "held4"]
    };
    // Why and whose, interface, protocol, caller, called, both ports: more fields than `nft` has room for.
    let denied = (BYTES, 5 * 4 + 2 * len);
    let dynamic = Set { size: Some(DENIED_MAX), ..map(JUDGE, names[5], denied, (BYTES, 12), SET_DYNAMIC) };
    Family {
        v6,
        ours: set(JUDGE, names[0], kind, len),
        selves: set(JUDGE, names[1], BYTES, 2 * len),
        egress: map(JUDGE, names[2], (kind, len), WORD, 0),
        ingress: map(JUDGE, names[3], (kind, len), WORD, 0),
        classes: map(JUDGE, names[4], (kind, len), WORD, 0),
        blocks: map(JUDGE, names[6], (kind, len), WORD, SET_INTERVAL),
        prefixes: map(JUDGE, names[7], (BYTES, 4 + len), WORD, 0),
        denied: dynamic,
        own: set(EDGE, if v6 { "own6" } else { "own4" }, BYTES, 4 + len),
        edge_denied: Set { table: EDGE, ..dynamic },
        host_own: set(JUDGE, host_own, kind, len),
        host_egress: map(JUDGE, host_egress, (kind, len), WORD, 0),
        host_ingress: map(JUDGE, host_ingress, (kind, len), WORD, 0),
        held: set(JUDGE, held, BYTES, 8 + len),
    }
}

/// Refused connections that are counted one by one, for each address family and table. Further ones are dropped and
/// counted together.
pub(crate) const DENIED_MAX: u32 = 65_536;

/// Interfaces in charge.
pub(crate) const ATTACHED: Set = set(JUDGE, "attached", INTERFACE, 4);
/// Names of interfaces that are workloads' whoever claims them: see [`crate::guard`].
pub(crate) const GUARDED: Set = Set { flags: SET_INTERVAL, ..set(JUDGE, "guarded", BYTES, 16) };
/// Interfaces of such names that are left alone.
pub(crate) const SPARED: Set = set(JUDGE, "spared", INTERFACE, 4);
/// Interfaces whose workloads may begin connections, if policy lets them.
pub(crate) const SENDERS: Set = set(EDGE, "senders", INTERFACE, 4);
/// Interfaces whose workloads may be called, if policy lets them.
pub(crate) const RECEIVERS: Set = set(EDGE, "receivers", INTERFACE, 4);
/// Those among [`SENDERS`] whose policy allows everything: they may use link-local addresses, too.
pub(crate) const OPEN_SENDERS: Set = set(EDGE, "open_senders", INTERFACE, 4);
/// Those among [`RECEIVERS`] whose policy allows everything: they get what is addressed to groups, too.
pub(crate) const OPEN_RECEIVERS: Set = set(EDGE, "open_receivers", INTERFACE, 4);
/// Endpoint → its two policies. Not looked at by rules.
pub(crate) const BOUND: Set = map(EDGE, "bound", (BYTES, 8), TWO_WORDS, 0);

/// Interfaces behind which the host is an endpoint, as [`host_interface`] has them; with an element for all others where
/// one endpoint has them.
pub(crate) const HOST_INTERFACES: Set = set(JUDGE, "host_interfaces", BYTES, 8);
/// Interface → policy of what the host begins there.
pub(crate) const HOST_EGRESS: Set = map(JUDGE, "host_egress", (BYTES, 8), WORD, 0);
/// Interface → policy of what the host is called for there.
pub(crate) const HOST_INGRESS: Set = map(JUDGE, "host_ingress", (BYTES, 8), WORD, 0);

/// Interfaces through which what the host forwards is judged; 0: all that have nothing of their own.
pub(crate) const FORWARDED: Set = set(JUDGE, "forwarded", MARK, 4);
/// Such an interface → policy of what goes out there.
pub(crate) const FORWARDED_EGRESS: Set = map(JUDGE, "forwarded_egress", WORD, WORD, 0);
/// Such an interface → policy of what comes in there.
pub(crate) const FORWARDED_INGRESS: Set = map(JUDGE, "forwarded_ingress", WORD, WORD, 0);
/// Such an interface → [`GROUP`] and its number.
pub(crate) const FORWARDED_NUMBERS: Set = map(JUDGE, "forwarded_numbers", WORD, WORD, 0);

/// Control groups in charge, by their ids.
pub(crate) const GROUPS: Set = set(JUDGE, "groups", BYTES, 8);
/// Control group → [`GROUP`] and its number, level.
pub(crate) const GROUP_NUMBERS: Set = map(JUDGE, "group_numbers", (BYTES, 8), TWO_WORDS, 0);
/// Control group → policy of what its processes begin.
pub(crate) const GROUP_EGRESS: Set = map(JUDGE, "group_egress", (BYTES, 8), WORD, 0);
/// Control group → policy of what its processes are called for.
pub(crate) const GROUP_INGRESS: Set = map(JUDGE, "group_ingress", (BYTES, 8), WORD, 0);
/// Numbers of control groups.
pub(crate) const NAMED: Set = set(JUDGE, "named", MARK, 4);
/// Number of a control group → last word of the address that stands for it where another process of the host is asked
/// about it.
pub(crate) const NAMES: Set = map(JUDGE, "names", WORD, WORD, 0);
/// Number of a control group → policy of what its processes are called for.
pub(crate) const NAMED_INGRESS: Set = map(JUDGE, "named_ingress", WORD, WORD, 0);

/// Place ([`crate::fresh::Place`]) → bit that a connection's label gets when all have let it through. Empty while tables
/// change.
pub(crate) const CURRENT: Set = map(JUDGE, "current", WORD, (BYTES, 16), 0);
/// What the labels' bits of that kind are, of connections that have been judged since tables last changed.
pub(crate) const FRESH: Set = set(JUDGE, "fresh", BYTES, 16);

/// Whatever says which endpoints there are: what changes with them and not with policy.
pub(crate) fn endpoint_sets() -> impl Iterator<Item = Set> {
    let single = [
        SENDERS,
        RECEIVERS,
        OPEN_SENDERS,
        OPEN_RECEIVERS,
        BOUND,
        HOST_INTERFACES,
        HOST_EGRESS,
        HOST_INGRESS,
        FORWARDED,
        FORWARDED_EGRESS,
        FORWARDED_INGRESS,
        FORWARDED_NUMBERS,
        GROUPS,
        GROUP_NUMBERS,
        GROUP_EGRESS,
        GROUP_INGRESS,
        NAMED,
        NAMES,
        NAMED_INGRESS,
    ];
    let by_family = FAMILIES.iter().flat_map(|f| {
        [f.ours, f.selves, f.egress, f.ingress, f.own, f.host_own, f.host_egress, f.host_ingress, f.held]
    });
    single.into_iter().chain(by_family)
}

/// All of a table.
pub(crate) fn sets(table: Table) -> Vec<Set> {
    let single = [FENCE, ROWS, STEPS, VARIANTS, ATTACHED, GUARDED, SPARED, CURRENT, FRESH];
    let by_family = FAMILIES.iter().flat_map(|f| [f.classes, f.blocks, f.prefixes, f.denied, f.edge_denied]);
    let all = single.into_iter().chain(by_family).chain(endpoint_sets());
    all.filter(|set| set.table == table).collect()
}

/// Why a packet was dropped, as the last byte of counters' names says it.
pub(crate) const COUNTERS: [(&str, DropReason); 6] = {
    use DropReason as R;
    [
        ("policy", R::Policy),
        ("unprogrammed", R::Unprogrammed),
        ("spoofed", R::Spoofed),
        ("malformed", R::Malformed),
        ("revoked", R::Revoked),
        ("ethertype", R::UnknownEthertype),
    ]
};
/// Dropped without an entry of their own.
pub(crate) const UNRECORDED: &str = "unrecorded";
/// Refused, and not told although a rule says so: too many at once.
pub(crate) const UNTOLD: &str = "untold";

/// Largest id of a policy, class, row or variant that rules can carry from one map to the next.
pub(crate) const NUMBER_MAX: u32 = u32::MAX >> 1;
/// Class of the row for all classes without one.
pub(crate) const DEFAULT_ROW: u32 = NUMBER_MAX;
/// In the map of single addresses: ask that of blocks.
pub(crate) const ASK_BLOCKS: u32 = NUMBER_MAX - 1;

/// Bits of a decision's first word, above the rule's id.
pub(crate) const ALLOW: u32 = 1 << 31;
/// The host may: allowed, or no written rule forbids it.
pub(crate) const HOST_MAY: u32 = 1 << 30;
const LOG: u32 = 1 << 29;
const WRITTEN: u32 = 1 << 28;
/// Of a refusal: it is told to whoever is refused.
pub(crate) const REJECT: u32 = 1 << 27;
/// Bits of the second word.
const AUDIT_ALLOW: u32 = 1 << 31;
/// In a label: the side that conntrack takes for the caller was called.
pub(crate) const REVERSED: u32 = 1 << 30;
/// In a label's second or fourth word: the rest of it is no audit rule but the number of the control group whose policy
/// the word before it is from.
pub(crate) const GROUP: u32 = 1 << 29;
/// Rule ids are below this.
pub(crate) const RULE_END: u32 = 1 << 26;
const RULE_MASK: u32 = RULE_END - 1;

/// Bits of one side's decision in a label, or of whose it is.
pub(crate) const DECISION_MASK: [u8; 8] = {
    let first = (ALLOW | HOST_MAY | RULE_MASK).to_be_bytes();
    let second = (AUDIT_ALLOW | GROUP | RULE_MASK).to_be_bytes();
    [first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]]
};

/// A decision as two words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Words(pub(crate) u32, pub(crate) u32);

impl Words {
    pub(crate) fn of(cell: &Cell) -> Self {
        let allowed = cell.verdict == Verdict::Allow;
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let first = flag(allowed, ALLOW)
            | flag(allowed || !cell.written, HOST_MAY)
            | flag(cell.log, LOG)
            | flag(cell.written, WRITTEN)
            | flag(cell.reject, REJECT);
        let audit = flag(cell.audit_verdict == Verdict::Allow, AUDIT_ALLOW);
        Self(first | (cell.rule.0 & RULE_MASK), audit | (cell.audit_rule.0 & RULE_MASK))
    }

    /// Of a decision that no table makes.
    pub(crate) fn builtin(rule: Builtin, verdict: Verdict) -> Self {
        let allowed = if verdict == Verdict::Allow { ALLOW } else { 0 };
        Self(allowed | rule as u32, allowed | rule as u32)
    }

    pub(crate) fn cell(self) -> Cell {
        let verdict = |set: bool| if set { Verdict::Allow } else { Verdict::Deny };
        Cell {
            verdict: verdict(self.0 & ALLOW != 0),
            rule: RuleId(self.0 & RULE_MASK),
            audit_verdict: verdict(self.1 & AUDIT_ALLOW != 0),
            audit_rule: RuleId(self.1 & RULE_MASK),
            log: self.0 & LOG != 0,
            reject: self.0 & REJECT != 0,
            written: self.0 & WRITTEN != 0,
        }
    }

    /// Whether a label's words say anything about a decision.
    pub(crate) fn is_decision(self) -> bool {
        self.0 & (ALLOW | HOST_MAY) != 0
    }

    /// The control group whose decision the first word of a label's two is.
    pub(crate) fn group(self) -> Option<u32> {
        (self.1 & GROUP != 0).then_some(self.1 & RULE_MASK)
    }

    pub(crate) fn bytes(self) -> [u8; 8] {
        (u64::from(self.0) << 32 | u64::from(self.1)).to_be_bytes()
    }

    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some(Self(word(0)?, word(4)?))
    }
}

/// What a packet of the host gets where tables say `cell`.
pub(crate) fn from_host(cell: Cell) -> Cell {
    if cell.verdict == Verdict::Allow || cell.written {
        return cell;
    }
    let rule = RuleId(Builtin::HostToWorkload as u32);
    let mut answer = Cell { verdict: Verdict::Allow, rule, ..cell };
    if cell.audit_rule == cell.rule {
        (answer.audit_verdict, answer.audit_rule) = (Verdict::Allow, rule);
    }
    answer
}

/// Where a forwarded packet meets an endpoint: the interface that it comes by, or goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Through {
    pub(crate) out: bool,
    /// The endpoint for all interfaces that have none of their own.
    pub(crate) any: bool,
}

/// Who is asked: how an endpoint is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Subject {
    /// A workload, by its address.
    Workload,
    /// The host, by its address.
    HostAddress,
    /// The host, by the interface.
    HostInterface,
    /// Whoever has what is forwarded, by the interface.
    Forwarded(Through),
    /// Processes, by the control group at this level above their socket.
    Group(u32),
    /// Processes that are called, by what the connection's label says of them: while there is no whole socket.
    Labelled,
}

/// Kind of an endpoint, as keys have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Workload = 0,
    Host = 1,
    Group = 2,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Workload, Self::Host, Self::Group];
}

impl Subject {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Workload => Kind::Workload,
            Self::HostAddress | Self::HostInterface => Kind::Host,
            // Known by a number as well.
            Self::Group(_) | Self::Labelled | Self::Forwarded(_) => Kind::Group,
        }
    }
}

/// The address of a host where a process of it is asked about somebody who is none that it knows: 100::/64 with no
/// number (see [`bulkhead_model::host_policy::Attachment::own_address`]).
pub(crate) const NO_PROCESS: std::net::IpAddr =
    std::net::IpAddr::V6(std::net::Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0));

/// Where the host's interface stands in [`HOST_INTERFACES`] and the maps beside it: packets that come have no interface
/// to leave by, and the other way round, so one key serves both ways.
pub(crate) fn host_interface(index: u32, incoming: bool) -> Vec<u8> {
    let (from, to) = if incoming { (index, 0) } else { (0, index) };
    [from.to_ne_bytes(), to.to_ne_bytes()].concat()
}

/// A control group's id as the packet path has it.
pub(crate) fn group_id(inode: u32) -> Vec<u8> {
    u64::from(inode).to_ne_bytes().to_vec()
}

/// A control group's number, as labels have it. Two in charge must not have the same.
pub(crate) fn group_number(inode: u32) -> u32 {
    inode & RULE_MASK
}

/// Number of an endpoint for what is forwarded, beside those of control groups. If one of these ever has the same, reports
/// take the one for the other.
pub(crate) fn forwarded_number(index: u32) -> u32 {
    const ABOVE: u32 = RULE_END >> 1;
    ABOVE | (index & (ABOVE - 1))
}

/// Begins a refused connection's key with why, and whose policy.
pub(crate) fn denied_begin(reason: DropReason, direction: Direction, kind: Kind) -> [u8; 4] {
    [reason as u8, u8::from(direction == Direction::Egress), kind as u8, 0]
}

/// What an entry of the refused holds.
pub(crate) fn denied_data(words: Words) -> Vec<u8> {
    [&[0; 4], &words.bytes()[..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_survives_its_words() {
        for bits in 0..32u32 {
            let verdict = |bit: u32| if bits & bit != 0 { Verdict::Allow } else { Verdict::Deny };
            let cell = Cell {
                verdict: verdict(1),
                rule: RuleId(77),
                audit_verdict: verdict(2),
                audit_rule: RuleId(RULE_MASK),
                log: bits & 4 != 0,
                reject: bits & 16 != 0,
                written: bits & 8 != 0,
            };
            assert_eq!(Words::of(&cell).cell(), cell);
            assert_eq!(Words::read(&Words::of(&cell).bytes()), Some(Words::of(&cell)));
        }
    }
}
