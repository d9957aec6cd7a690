//! `reject`: whoever is refused is told, by the kernel, in the name of the one who was called. There are rules for it only
//! while some policy says so.
//!
//! The kernel's answer belongs to the refused connection: translated as it is, and a packet of it that policy would refuse as
//! well. It is known by what conntrack says of it, and by where it is.

use super::{ICMP, ICMPV6, SCRATCH, TCP, TCP_FLAGS, joined};
use crate::expression::{Base, Ct, Expression as E, Meta, RELATED, Verdict};
use crate::schema::UNTOLD;

/// Name of the chain that tells.
pub(super) const CHAIN: &str = "tell";

/// As eBPF tells an endpoint; here, of all endpoints together.
const AT_ONCE: u32 = 200;
const A_SECOND: u64 = 1000;

const RST: u8 = 0x04;
/// No interface, and the loopback interface: where a packet of the host's own comes from.
const FROM_HERE: [u32; 2] = [0, 1];

fn protocol(number: u8) -> Vec<E> {
    vec![E::Meta(Meta::Transport, SCRATCH), E::Equal(SCRATCH, vec![number])]
}

fn reset() -> Vec<E> {
    let flags = E::Payload { base: Base::Transport, offset: TCP_FLAGS, len: 1, to: SCRATCH };
    let mask = E::Mask { from: SCRATCH, to: SCRATCH, mask: vec![RST] };
    joined([protocol(TCP), vec![flags, mask, E::NotEqual(SCRATCH, vec![0])]])
}

/// What a refused packet meets last. ICMP errors, broadcasts and fragments the kernel does not answer.
pub(super) fn rules() -> Vec<Vec<E>> {
    let drop = E::Verdict(Verdict::Drop);
    let beyond = E::Beyond { a_second: A_SECOND, at_once: AT_ONCE };
    vec![
        joined([reset(), vec![drop.clone()]]),
        vec![beyond, E::Count(UNTOLD), drop],
        joined([protocol(TCP), vec![E::Reset]]),
        vec![E::Forbid],
    ]
}

/// Lets the answers pass: resets and errors that conntrack knows as about a connection, where the host sends them and, to a
/// process of its own, gets them. Nothing that anybody else sends is a reset of that kind.
pub(super) fn pass() -> Vec<Vec<E>> {
    let related = || vec![E::Ct(Ct::State, None, SCRATCH), E::Equal(SCRATCH, RELATED.to_ne_bytes().to_vec())];
    let mut rules = Vec::new();
    for interface in FROM_HERE {
        for answer in [reset(), protocol(ICMP), protocol(ICMPV6)] {
            let here = vec![
                E::Meta(Meta::InputInterface, SCRATCH),
                E::Equal(SCRATCH, interface.to_ne_bytes().to_vec()),
            ];
            rules.push(joined([related(), here, answer, vec![E::Verdict(Verdict::Accept)]]));
        }
    }
    rules
}
