//! An address that goes from one workload to another at once, with traffic of both.

use std::net::SocketAddr;

use anyhow::ensure;
use bulkhead_testbed::{Bulkhead, Knocks, Outcome, PingPong, Protocol, UdpStream, Workload, eventually};

use crate::common::{member, outcome, start, wait_outcome};

const SERVED: u16 = 5000;
const LIVE: u16 = 7001;
const KNOCKED: u16 = 7002;
const OWN: u16 = 7003;
/// Both holders use the same source ports, so what the one leaves behind fits the other's packets.
const TO_NEAR: [u16; 4] = [40_001, 40_002, 40_003, 40_004];
const TO_FAR: [u16; 4] = [40_011, 40_012, 40_013, 40_014];

/// The client may everything, whoever inherits its address only one port.
const POLICY: &str = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: server}
spec:
  appliesTo: role == 'server'
  ingress:
  - action: Allow
    from: {selector: role == 'client'}
  - action: Allow
    from: {selector: role == 'heir'}
    ports: [udp/7003]
";

fn live(from: &Workload, to: &Workload, sources: [u16; 4]) -> UdpStream {
    UdpStream::start_from(from, to, SocketAddr::new(to.v4.into(), LIVE), 1000, sources.to_vec()).unwrap()
}

fn hand_on(bulkhead: &Bulkhead, from: &Workload, to: &mut Workload) {
    (to.v4, to.v6) = (from.v4, from.v6);
    bulkhead.unregister(from).unwrap();
    bulkhead.host(&from.host).netns.ip(&[format!("link del {}", from.interface)]).unwrap();
    bulkhead.lab.join(to).unwrap();
    bulkhead.register(to, &[("role", "heir")]).unwrap();
}

#[test]
fn whoever_gets_the_address_of_another_gets_none_of_its_permissions() {
    let bulkhead = start("bt-heir", &["host-1", "host-2"]);
    let near = member(&bulkhead, "host-1", "near", &[("role", "server")], &[SERVED]);
    let far = member(&bulkhead, "host-2", "far", &[("role", "server")], &[SERVED]);
    bulkhead.apply_text("server.yaml", POLICY).unwrap();
    let (near, far) = (&near.workload, &far.workload);
    let mut holder = bulkhead.lab.workload("host-1", "holder").unwrap();
    for round in 0..3 {
        bulkhead.register(&holder, &[("role", "client")]).unwrap();
        bulkhead.wait_endpoint(&holder).unwrap();
        wait_outcome(&holder, near, Protocol::Tcp(SERVED), Outcome::Reached);
        wait_outcome(&holder, far, Protocol::Tcp(SERVED), Outcome::Reached);
        // Connections that live, over UDP and TCP, to somebody on the same host and on another.
        let streams = [live(&holder, near, TO_NEAR), live(&holder, far, TO_FAR)];
        let talks =
            [near, far].map(|to| PingPong::start(&holder, SocketAddr::new(to.v4.into(), SERVED)).unwrap());
        eventually("the first holder talks", || {
            for (stream, talk) in streams.iter().zip(&talks) {
                ensure!(stream.so_far().received > 100 && talk.round_trips() > 20, "{:?}", stream.so_far());
            }
            Ok(())
        })
        .unwrap();
        for (stream, to) in streams.into_iter().zip(["near", "far"]) {
            assert_eq!(stream.finish().lost(), 0, "to {to}");
        }

        // The next one sends before it has the address, from the same ports to the same ones.
        let mut heir = bulkhead.lab.unjoined_workload("host-1", &format!("heir-{round}")).unwrap();
        let forbidden = live(&heir, near, TO_NEAR);
        let knocks = Knocks::start(&heir, near, KNOCKED).unwrap();
        let own = SocketAddr::new(near.v4.into(), OWN);
        let allowed = UdpStream::start_from(&heir, near, own, 1000, vec![0; 4]).unwrap();
        hand_on(&bulkhead, &holder, &mut heir);
        eventually("what the heir may reaches the one on its host", || {
            ensure!(allowed.so_far().received > 300, "{:?}", allowed.so_far());
            ensure!(forbidden.so_far().sent > 300 && knocks.tried() > 20, "{:?}", forbidden.so_far());
            Ok(())
        })
        .unwrap();
        let (forbidden, knocks) = (forbidden.finish(), knocks.finish(near).unwrap());
        println!("round {round}, same host: {forbidden:?} {knocks:?} {:?}", allowed.so_far());
        assert_eq!(
            (forbidden.received, knocks.arrived, knocks.answered),
            (0, 0, 0),
            "{forbidden:?} {knocks:?}"
        );

        // Another host hears of it a moment later: from then on the address is the heir's there, too, whatever the
        // first one has left in its tables.
        let own = UdpStream::start(&heir, far, far.v4.into(), OWN, 1000, 4).unwrap();
        eventually("what the heir may reaches the one on the other host", || {
            ensure!(own.so_far().received > 0, "{:?}", own.so_far());
            let list = bulkhead.json(&["get", "workloads"])?.to_string();
            ensure!(!list.contains(&holder.full_name()) && list.contains(&heir.full_name()), "{list}");
            Ok(())
        })
        .unwrap();
        wait_outcome(&heir, far, Protocol::Tcp(SERVED), Outcome::Silent);
        let (forbidden, knocks) = (live(&heir, far, TO_FAR), Knocks::start(&heir, far, KNOCKED).unwrap());
        eventually("the heir tries", || {
            ensure!(forbidden.so_far().sent > 300 && knocks.tried() > 20, "{:?}", forbidden.so_far());
            Ok(())
        })
        .unwrap();
        let (forbidden, knocks) = (forbidden.finish(), knocks.finish(far).unwrap());
        println!("round {round}, other host: {forbidden:?} {knocks:?}");
        assert_eq!(
            (forbidden.received, knocks.arrived, knocks.answered),
            (0, 0, 0),
            "{forbidden:?} {knocks:?}"
        );
        assert_eq!(outcome(&heir, near, Protocol::Tcp(SERVED)), Outcome::Silent);
        for talk in talks {
            assert!(talk.finish().broken.is_some(), "the first holder's connection is nobody's");
        }
        holder = heir;
    }
}
