//! Runs single packets through the loaded programs with `BPF_PROG_TEST_RUN`: for tests and benchmarks.

use std::time::Duration;

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::verdict::Direction;
use libbpf_rs::ProgramInput;

use crate::EbpfDataplane;
use crate::loader::{Hook, libbpf_error};

/// A packet and where it is said to come from.
#[derive(Debug, Clone, Copy)]
pub struct TestPacket<'a> {
    /// Egress: from the workload. Ingress: to the workload.
    pub direction: Direction,
    /// Host-side interface of the workload. It must exist in this thread's network namespace.
    pub ifindex: u32,
    /// Interface through which the packet came to this host; 0: this host made it.
    pub ingress_ifindex: u32,
    /// Ethernet frame.
    pub frame: &'a [u8],
}

/// Offset of `ingress_ifindex` in `struct __sk_buff`; `ifindex` follows it.
const INGRESS_IFINDEX_OFFSET: usize = 36;
const SK_BUFF_SIZE: usize = 192;

impl EbpfDataplane {
    /// Whether the packet passes, and the mean time of one of `repeat` runs.
    pub fn test_run(&self, packet: TestPacket<'_>, repeat: u32) -> Result<(bool, Duration), DataplaneError> {
        let hook = match packet.direction {
            Direction::Egress => Hook::FromWorkload,
            Direction::Ingress => Hook::ToWorkload,
        };
        let mut context = [0u8; SK_BUFF_SIZE];
        let numbers = [packet.ingress_ifindex.to_ne_bytes(), packet.ifindex.to_ne_bytes()].concat();
        context[INGRESS_IFINDEX_OFFSET..][..numbers.len()].copy_from_slice(&numbers);
        let input = ProgramInput {
            context_in: Some(&mut context),
            data_in: Some(packet.frame),
            repeat,
            ..ProgramInput::default()
        };
        let program = self.loaded().program(hook)?;
        let output = program.test_run(input).map_err(|error| libbpf_error("test run", &error))?;
        // TCX_NEXT is -1.
        Ok((output.return_value == u32::MAX, output.duration))
    }
}
