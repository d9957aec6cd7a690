//! What happens to interfaces and addresses under an agent's hands.

use std::net::IpAddr;

use anyhow::ensure;
use bulkhead_testbed::{
    Bulkhead, Knocks, Outcome, PROBE_WAIT, Probe, Protocol, Server, UdpStream, Workload, eventually, probe,
};

use crate::common::{CLIENT_TO_SERVER, member, outcome, start, wait_outcome};
use crate::traffic::Traffic;

const STRANGER: &str = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: stranger}
spec:
  appliesTo: role == 'stranger'
  egress: []
";

fn on_host(bulkhead: &Bulkhead, workload: &Workload, lines: &[String]) {
    bulkhead.host(&workload.host).netns.ip(lines).unwrap();
}

#[test]
fn renamed_made_anew_and_handed_on_an_interface_stays_what_it_is() {
    let bulkhead = start("bt-iface", &["host-1", "host-2"]);
    let server = member(&bulkhead, "host-2", "server", &[("role", "server")], &[5000]);
    let client = member(&bulkhead, "host-1", "client", &[("role", "client")], &[5000]);
    let stranger = member(&bulkhead, "host-1", "stranger", &[("role", "stranger")], &[5000]);
    bulkhead.apply_text("server.yaml", &format!("{CLIENT_TO_SERVER}---{STRANGER}")).unwrap();
    let (server, mut client, stranger) = (&server.workload, client.workload, &stranger.workload);
    let tcp = Protocol::Tcp(5000);
    wait_outcome(&client, server, tcp, Outcome::Reached);
    wait_outcome(stranger, server, tcp, Outcome::Silent);

    // Renamed: it is the same interface, and nobody has to notice. (One can be renamed while it is up.)
    let traffic = Traffic::start(&client, stranger, server, 5000);
    let (old, new) = (client.interface.clone(), "wl-client".to_owned());
    on_host(&bulkhead, &client, &[format!("link set {old} name {new}")]);
    client.interface = new;
    let (old, new) = (stranger.interface.clone(), "wl-renamed".to_owned());
    on_host(&bulkhead, stranger, &[format!("link set {old} name {new}")]);
    for _ in 0..10 {
        assert_eq!(outcome(stranger, server, tcp), Outcome::Silent);
        assert_eq!(outcome(&client, server, tcp), Outcome::Reached);
    }
    traffic.goes_on();
    traffic.end("interfaces renamed");
    // What follows takes links away: what is forbidden is counted all the while.
    let forbidden = [server.v4.into(), server.v6.into()].map(|address: IpAddr| {
        let port = if address.is_ipv4() { 7001 } else { 7002 };
        UdpStream::start(stranger, server, address, port, 500, 8).unwrap()
    });
    let knocks = Knocks::start(stranger, server, 7003).unwrap();

    // Deleted and made anew under the same name: closed from its first packet on, until it is known again.
    on_host(&bulkhead, &client, &[format!("link del {}", client.interface)]);
    bulkhead.lab.join(&client).unwrap();
    wait_outcome(&client, server, tcp, Outcome::Reached);

    // Taken out of the host, as a container runtime does, and put back: another index, the same workload.
    on_host(&bulkhead, &client, &[format!("link set {} netns {}", client.interface, client.netns.name())]);
    let moved = client.interface.clone();
    client.netns.ip(&[format!("link set {moved} netns {}", bulkhead.host("host-1").netns.name())]).unwrap();
    let addresses = [
        format!("addr add 169.254.1.1/32 dev {moved}"),
        format!("addr add fe80::1/64 dev {moved} nodad"),
        format!("link set {moved} up"),
        format!("route add {}/32 dev {moved}", client.v4),
        format!("route add {}/128 dev {moved}", client.v6),
    ];
    on_host(&bulkhead, &client, &addresses);
    wait_outcome(&client, server, tcp, Outcome::Reached);
    // The stranger's too: nobody registers it anew, and none of its packets is anybody else's.
    let name = "wl-renamed";
    on_host(&bulkhead, stranger, &[format!("link set {name} netns {}", stranger.netns.name())]);
    stranger.netns.ip(&[format!("link set {name} netns {}", bulkhead.host("host-1").netns.name())]).unwrap();
    let addresses = [
        format!("addr add 169.254.1.1/32 dev {name}"),
        format!("addr add fe80::1/64 dev {name} nodad"),
        format!("link set {name} up"),
        format!("route add {}/32 dev {name}", stranger.v4),
        format!("route add {}/128 dev {name}", stranger.v6),
    ];
    on_host(&bulkhead, stranger, &addresses);
    let before = forbidden.each_ref().map(|stream| stream.so_far().sent);
    eventually("what is forbidden is sent again", || {
        for (stream, before) in forbidden.iter().zip(before) {
            ensure!(stream.so_far().sent > before + 200, "{:?}", stream.so_far());
        }
        Ok(())
    })
    .unwrap();
    let (forbidden, knocks) = (forbidden.map(UdpStream::finish), knocks.finish(server).unwrap());
    println!("interfaces taken away: {forbidden:?} {knocks:?}");
    assert_eq!(forbidden.map(|stream| stream.received), [0, 0]);
    assert_eq!((knocks.arrived, knocks.answered), (0, 0), "{knocks:?}");

    // Its address goes to another workload at once: nobody takes the one for the other for longer than a change takes.
    bulkhead.unregister(&client).unwrap();
    on_host(&bulkhead, &client, &[format!("link del {}", client.interface)]);
    let mut heir = bulkhead.lab.unjoined_workload("host-1", "heir").unwrap();
    (heir.v4, heir.v6) = (client.v4, client.v6);
    bulkhead.lab.join(&heir).unwrap();
    // Nobody has claimed its interface yet.
    assert_eq!(outcome(&heir, server, tcp), Outcome::Silent);
    bulkhead.register(&heir, &[("role", "heir")]).unwrap();
    bulkhead.wait_endpoint(&heir).unwrap();
    wait_outcome(&heir, server, tcp, Outcome::Silent);
    for _ in 0..5 {
        assert_eq!(outcome(&heir, server, tcp), Outcome::Silent);
    }
    // And it is itself, not its predecessor, for those who call it.
    let listening = Server::start(&heir.netns, &[5000]).unwrap();
    let target = Probe { address: heir.v4.into(), protocol: tcp };
    eventually("the heir is called by name", || {
        ensure!(probe(server, &[target], PROBE_WAIT)?[0] == Outcome::Reached);
        let flows = bulkhead.ok(&["flows", "--limit", "500", "-o", "json"])?;
        ensure!(flows.contains("heir.host-1"), "{flows}");
        Ok(())
    })
    .unwrap();
    bulkhead.register(&heir, &[("role", "client")]).unwrap();
    wait_outcome(&heir, server, tcp, Outcome::Reached);
    client.name.clear();
    drop(listening);
}
