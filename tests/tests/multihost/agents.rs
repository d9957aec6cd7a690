//! Agents that are killed, hung, restarted and rebooted under traffic.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::ensure;
use bulkhead_testbed::{
    AgentOptions, Bulkhead, Example, Family, HOSTS, Knocks, Lab, OTHER_PORT, Outcome, PingPong, Protocol,
    UdpStream, eventually, expected, find_binary,
};

use crate::common::{example, member, wait_outcome};
use crate::traffic::Traffic;

#[test]
fn an_agent_killed_and_restarted_under_traffic_loses_and_leaks_nothing() {
    let mut example = example("bt-kill");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    let Example { members, bulkhead } = &mut example;
    let of = |name: &str| {
        let (_, member) = members.iter().find(|(component, _)| component.name == name).unwrap();
        &member.workload
    };
    // Both ends on hosts whose agents die; inside an application every port is allowed.
    let traffic = Traffic::start(of("order-web"), of("ip-map"), of("geo-check"), OTHER_PORT);
    // Between applications, by a policy with a port.
    let tcp = PingPong::start(of("credit-check-eu"), SocketAddr::new(of("ip-map").v4.into(), 8084)).unwrap();
    for _ in 0..2 {
        for host in ["host-1", "host-2"] {
            bulkhead.kill_agent(host);
            traffic.goes_on();
            bulkhead.start_agent(host).unwrap();
            bulkhead.wait_connected().unwrap();
            traffic.goes_on();
        }
    }
    let talked = tcp.round_trips();
    eventually("the TCP connection lives", || {
        ensure!(tcp.round_trips() > talked + 20);
        Ok(())
    })
    .unwrap();
    traffic.end("agents killed");
    assert_eq!(tcp.finish().broken, None);
    example.check(Family::V4, |component| Protocol::Tcp(component.port), expected).unwrap();
}

const SECOND_TOO: &str = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: server}
spec:
  appliesTo: role == 'server'
  ingress:
  - action: Allow
    from: {selector: role == 'client' || role == 'second'}
";

const LATE_TOO: &str = "
apiVersion: bulkhead.dev/v1
kind: Policy
metadata: {name: server}
spec:
  appliesTo: role == 'server'
  ingress:
  - action: Allow
    from: {selector: role == 'client' || role == 'late'}
";

#[test]
fn a_hung_agent_leaves_in_force_what_was_and_hears_of_the_rest_when_it_goes_on() {
    let lab = Lab::new("bt-hung", &["host-1", "host-2"]).unwrap();
    let registrations = lab.directory().join("registrations");
    std::fs::create_dir_all(&registrations).unwrap();
    // An agent is unseen after a second, and its workloads are kept for long.
    let config = lab.directory().join("controller.yaml");
    std::fs::write(&config, "leaseMs: 1000\ngraceMs: 600000\n").unwrap();
    let watch = ["--workload-dir".to_owned(), registrations.display().to_string()];
    let options = AgentOptions { arguments: watch.into(), ..AgentOptions::default() };
    let options = BTreeMap::from([("host-1".to_owned(), options)]);
    let mut bulkhead = Bulkhead::without_processes(lab, &find_binary().unwrap(), &options);
    bulkhead.controller_arguments = vec!["--config".to_owned(), config.display().to_string()];
    bulkhead.start_controller().unwrap();
    bulkhead.start_agents().unwrap();
    bulkhead.wait_connected().unwrap();
    let server = member(&bulkhead, "host-2", "server", &[("role", "server")], &[5000]);
    let of = |name: &str| member(&bulkhead, "host-1", name, &[("role", name)], &[5000]);
    let (client, second, stranger) = (of("client"), of("second"), of("stranger"));
    let server = &server.workload;
    bulkhead.apply_text("server.yaml", SECOND_TOO).unwrap();
    wait_outcome(&client.workload, server, Protocol::Tcp(5000), Outcome::Reached);
    wait_outcome(&second.workload, server, Protocol::Tcp(5000), Outcome::Reached);
    wait_outcome(&stranger.workload, server, Protocol::Tcp(5000), Outcome::Silent);
    let traffic = Traffic::start(&client.workload, &stranger.workload, server, 5000);
    let revoked = PingPong::start(&second.workload, SocketAddr::new(server.v4.into(), 5000)).unwrap();

    let hosts = ["host-1", "host-2"];
    hosts.iter().for_each(|host| bulkhead.hang_agent(host));
    eventually("the controller has not heard of them for a lease", || {
        for host in hosts {
            let session = bulkhead.agent_session(host)?;
            ensure!(session["connected"] == false, "{session}");
        }
        Ok(())
    })
    .unwrap();
    let listed = bulkhead.json(&["get", "workloads"]).unwrap().to_string();
    assert!(listed.contains("client.host-1") && listed.contains("server.host-2"), "kept: {listed}");
    // A change of policy, and a new workload for which it is.
    let change = bulkhead.file("late.yaml", LATE_TOO).unwrap();
    bulkhead.ok(&["apply", "-f", &change.display().to_string()]).unwrap();
    let late = bulkhead.lab.workload("host-1", "late").unwrap();
    let text = format!("name: late\nlabels: {{role: late}}\nnetns: {}\n", late.netns.path().display());
    std::fs::write(registrations.join("late.yaml"), text).unwrap();
    let early = UdpStream::start(&late, server, server.v4.into(), 7010, 500, 8).unwrap();
    traffic.goes_on();
    let talked = revoked.round_trips();
    eventually("what was in force is", || {
        ensure!(revoked.round_trips() > talked + 20 && early.so_far().sent > 200, "{:?}", early.so_far());
        Ok(())
    })
    .unwrap();
    assert_eq!(early.so_far().received, 0, "whom nobody knows does not get in: {:?}", early.so_far());

    hosts.iter().for_each(|host| bulkhead.wake_agent(host));
    wait_outcome(&late, server, Protocol::Tcp(5000), Outcome::Reached);
    eventually("what is allowed no longer is cut", || {
        ensure!(revoked.has_stalled(), "{} round trips", revoked.round_trips());
        Ok(())
    })
    .unwrap();
    bulkhead.wait_connected().unwrap();
    for host in hosts {
        eventually("the controller sees them again", || {
            let session = bulkhead.agent_session(host)?;
            ensure!(session["connected"] == true, "{session}");
            Ok(())
        })
        .unwrap();
    }
    traffic.goes_on();
    traffic.end("agents hung");
    assert!(revoked.finish().broken.is_some());
}

/// Its workloads come back after the agent, as they do when a unit starts before those that it is to guard.
#[test]
fn a_host_that_reboots_under_traffic_lets_nobody_in_and_loses_nothing_once_it_is_back() {
    let mut example = example("bt-reboot");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    let Example { members, bulkhead } = &mut example;
    let of = |name: &str| {
        let (_, member) = members.iter().find(|(component, _)| component.name == name).unwrap();
        &member.workload
    };
    let (from, to, stranger) = (of("order-web"), of("geo-check"), of("ip-map"));
    let forbidden = [7101, 7102].map(|port| {
        let address = if port == 7101 { to.v4.into() } else { to.v6.into() };
        UdpStream::start(stranger, to, address, port, 1000, 8).unwrap()
    });
    let knocks = Knocks::start(stranger, to, 7103).unwrap();
    let host = to.host.clone();
    let before: Vec<u64> = forbidden.iter().map(|stream| stream.so_far().sent).collect();
    bulkhead.kill_agent(&host);
    for (_, member) in members.iter().filter(|(component, _)| component.host == host) {
        bulkhead.host(&host).netns.ip(&[format!("link del {}", member.workload.interface)]).unwrap();
    }
    bulkhead.clean_kernel(&host).unwrap();
    bulkhead.kill_controller();
    bulkhead.start_agent(&host).unwrap();
    for (_, member) in members.iter().filter(|(component, _)| component.host == host) {
        bulkhead.lab.join(&member.workload).unwrap();
    }
    wait_outcome(from, to, Protocol::Tcp(OTHER_PORT), Outcome::Reached);
    let allowed = UdpStream::start(from, to, to.v4.into(), 7104, 1000, 8).unwrap();
    eventually("traffic goes on", || {
        ensure!(allowed.so_far().received > 300, "{:?}", allowed.so_far());
        for (stream, before) in forbidden.iter().zip(&before) {
            ensure!(stream.so_far().sent > before + 300, "{:?}", stream.so_far());
        }
        Ok(())
    })
    .unwrap();
    let (knocks, allowed) = (knocks.finish(to).unwrap(), allowed.finish());
    let forbidden = forbidden.map(UdpStream::finish);
    println!("rebooted: {allowed:?} {forbidden:?} {knocks:?}");
    assert_eq!(allowed.lost(), 0, "{allowed:?}");
    assert_eq!(forbidden.map(|stream| stream.received), [0, 0]);
    assert_eq!((knocks.arrived, knocks.answered), (0, 0), "{knocks:?}");
}

#[test]
fn an_agent_that_is_told_to_stop_leaves_its_tables_in_force() {
    let mut example = example("bt-stop");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    assert!(example.bulkhead.stop_agent("host-2"), "it ends well");
    example.check(Family::V4, |component| Protocol::Tcp(component.port), expected).unwrap();
    example.bulkhead.start_agent("host-2").unwrap();
    example.bulkhead.wait_connected().unwrap();
    example.check(Family::V4, |component| Protocol::Tcp(component.port), expected).unwrap();
}

#[test]
fn a_host_that_reboots_without_a_controller_enforces_what_it_remembers() {
    let mut example = example("bt-boot");
    example.apply().unwrap();
    example.wait_expected().unwrap();
    example.bulkhead.kill_controller();
    for host in HOSTS {
        example.bulkhead.kill_agent(host);
        example.bulkhead.clean_kernel(host).unwrap();
    }
    example
        .check(Family::V4, |component| Protocol::Tcp(component.port), |_, _| true)
        .expect("after the clean-up nothing is judged");
    for host in HOSTS {
        example.bulkhead.start_agent(host).unwrap();
    }
    eventually("everything is enforced again", || {
        example.check(Family::V4, |component| Protocol::Tcp(component.port), expected)
    })
    .unwrap();
    example.check(Family::V6, |component| Protocol::Tcp(component.port), expected).unwrap();
    example
        .check(
            Family::V6,
            |_| Protocol::Icmp,
            |from, to| from.application == to.application && expected(from, to),
        )
        .unwrap();
}
