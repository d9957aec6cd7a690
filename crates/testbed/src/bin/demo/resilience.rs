//! What goes on when processes die.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Result, ensure};
use bulkhead_testbed::{
    Example, Family, HOSTS, Member, OTHER_PORT, Outcome, PROBE_WAIT, PingPong, Probe, Protocol, Server,
    UdpStream, Workload, eventually, expected, probe,
};

use crate::paint::Show;

pub(crate) fn controller(show: &mut Show, example: &mut Example) -> Result<Member> {
    show.scene("The controller is killed: labels are still enforced");
    example.bulkhead.kill_controller();
    eventually("the agents notice", || {
        for host in HOSTS {
            ensure!(example.bulkhead.agent(host).status()?["connected"] == false, "{host}");
        }
        Ok(())
    })?;
    let observed = example.observe(Family::V4, |component| Protocol::Tcp(component.port))?;
    let cells = observed.rows.iter().flatten().flatten().count();
    let wrong = example.differences(&observed, expected).len();
    show.equal("pairs that are as expected", cells - wrong, cells);

    show.note("A new European credit check starts on host-1, and nobody is there to be asked.");
    let new = example.bulkhead.lab.workload("host-1", "credit-check-eu-2")?;
    let server = Server::start(&new.netns, &[OTHER_PORT])?;
    let labels = [("application", "orderInput"), ("role", "creditCheck"), ("region", "eu")];
    example.bulkhead.register(&new, &labels)?;
    let reached = |from: &Workload, to: &Workload, port: u16| -> Result<bool> {
        let target = Probe { address: to.v4.into(), protocol: Protocol::Tcp(port) };
        Ok(probe(from, &[target], PROBE_WAIT)? == [Outcome::Reached])
    };
    let map = example.workload("ip-map");
    let allowed = eventually("it reaches ip-map", || {
        ensure!(reached(&new, map, 8084)?);
        Ok(())
    });
    show.equal("it reaches ip-map by its labels", if allowed.is_ok() { "yes" } else { "no" }, "yes");
    let mut open = 0;
    for name in ["customer-web-int", "customer-db", "ip-map", "geo-web"] {
        open += usize::from(reached(example.workload(name), &new, OTHER_PORT)?);
    }
    show.equal("strangers of 4 that reach it", open, 0);

    let restarted = Instant::now();
    example.bulkhead.start_controller()?;
    example.bulkhead.wait_connected()?;
    let mut bytes = 0;
    for host in HOSTS {
        bytes += example.bulkhead.agent_session(host)?["bytesSent"].as_u64().unwrap_or(u64::MAX / 4);
    }
    show.note(&format!("Started again; all agents are back after {} ms.", restarted.elapsed().as_millis()));
    let sent = format!("{bytes} bytes");
    show.figure("told to three agents: only what is new", &sent, "below 10 kB", bytes < 10_000);
    Ok(Member { workload: new, server })
}

pub(crate) fn agent(show: &mut Show, example: &mut Example) -> Result<()> {
    show.scene("An agent dies of SIGKILL and comes back under traffic");
    let of = |name: &str| example.workload(name);
    let (from, to, stranger) = (of("order-web"), of("geo-check"), of("ip-map"));
    let allowed = UdpStream::start(from, to, to.v4.into(), 7001, 2000, 16)?;
    let forbidden = UdpStream::start(stranger, to, to.v4.into(), 7002, 2000, 16)?;
    let live = PingPong::start(from, SocketAddr::new(to.v4.into(), 8082))?;
    let sent = |count: u64| {
        eventually("traffic flows", || {
            ensure!(allowed.so_far().sent >= count && forbidden.so_far().sent >= count);
            Ok(())
        })
    };
    sent(1000)?;
    let mut restarts = 0;
    for host in ["host-2", "host-1", "host-2"] {
        example.bulkhead.kill_agent(host);
        sent(allowed.so_far().sent.max(forbidden.so_far().sent) + 1000)?;
        example.bulkhead.start_agent(host)?;
        example.bulkhead.wait_connected()?;
        sent(allowed.so_far().sent.max(forbidden.so_far().sent) + 1000)?;
        restarts += 1;
    }
    let before = live.round_trips();
    let lives = eventually("the connection lives", || {
        ensure!(live.round_trips() > before + 50);
        Ok(())
    });
    let (allowed, forbidden, live) = (allowed.finish(), forbidden.finish(), live.finish());
    show.note(&format!(
        "{restarts} kills, 2000 packets a second each way; longest gap {:.1} ms.",
        allowed.longest_gap.as_secs_f64() * 1000.0
    ));
    println!();
    show.equal(&format!("lost of {} allowed packets", allowed.sent), allowed.lost(), 0);
    show.equal(&format!("leaked of {} forbidden packets", forbidden.sent), forbidden.received, 0);
    let tcp = if lives.is_ok() && live.broken.is_none() { "lives" } else { "broken" };
    show.equal(&format!("TCP connection after {} round trips", live.round_trips), tcp, "lives");
    Ok(())
}
