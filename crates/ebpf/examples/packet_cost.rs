//! Prints what a packet costs at several sizes of policy. Run as root.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("ns per packet: peers empty established judged denied opened | replace apply");
    for peers in [10, 1000, 100_000] {
        let root = format!("/sys/fs/bpf/bulkhead-bench-{}", std::process::id());
        let cost = bulkhead_ebpf::bench::packet_cost(Path::new(&root), peers, 1_000_000)?;
        println!(
            "{:>7} {:>4} {:>4} {:>4} {:>4} {:>5} | {:?} {:?}",
            cost.peers,
            cost.empty.as_nanos(),
            cost.established.as_nanos(),
            cost.judged.as_nanos(),
            cost.denied.as_nanos(),
            cost.opened.as_nanos(),
            cost.replace,
            cost.apply
        );
    }
    Ok(())
}
