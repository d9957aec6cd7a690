//! Which dataplane enforces on this host, and what becomes of the one before.

use std::path::Path;

use bulkhead_agent::DataplaneChoice;
use bulkhead_dataplane::{Dataplane, DataplaneError, Handover};
use bulkhead_ebpf::EbpfDataplane;
use bulkhead_nft::{Fence, Fenced, NftDataplane};

fn ebpf(pins: &Path) -> Result<Box<dyn Dataplane>, DataplaneError> {
    let dataplane = EbpfDataplane::open(pins, bulkhead_ebpf::Capacities::default())?;
    Ok(Box::new(dataplane))
}

fn nftables() -> Result<Box<dyn Dataplane>, DataplaneError> {
    let dataplane = NftDataplane::open(bulkhead_nft::Capacities::default())?;
    Ok(Box::new(dataplane))
}

/// Opens the one that was asked for, or that this host can do; what another left stays in force until it has taken over.
/// `fence`: whether the kernel keeps new interfaces closed by itself.
pub(crate) fn open(
    choice: DataplaneChoice,
    fence: bool,
    pins: &Path,
) -> Result<Box<dyn Dataplane>, DataplaneError> {
    let (current, because) = match choice {
        DataplaneChoice::Ebpf => (ebpf(pins)?, None),
        DataplaneChoice::Nftables => (nftables()?, None),
        DataplaneChoice::Auto => match ebpf(pins) {
            Ok(dataplane) => (dataplane, None),
            Err(missing @ DataplaneError::Requirement { .. }) => {
                tracing::warn!(reason = %missing, "no eBPF on this host: enforcing with nftables");
                (nftables()?, Some(format!("not ebpf: {missing}")))
            }
            Err(error) => return Err(error),
        },
    };
    let previous = match current.name() {
        "ebpf" => NftDataplane::is_there()?.then(nftables),
        _ => pins.exists().then(|| ebpf(pins)),
    };
    let previous = match previous.transpose() {
        Ok(previous) => previous,
        Err(error) => {
            tracing::warn!(%error, "another dataplane has left something that cannot be taken over");
            None
        }
    };
    if let Some(previous) = &previous {
        tracing::info!(from = previous.name(), to = current.name(), "taking over from another dataplane");
    }
    let dataplane = Box::new(Handover::new(current, previous, because));
    if fence {
        return Ok(Box::new(Fenced::new(dataplane)));
    }
    // One that is not asked for any more would close what nobody opens.
    Fence::remove()?;
    Ok(dataplane)
}

/// Removes every trace of every dataplane.
pub(crate) fn cleanup(pins: &Path) -> Result<(), DataplaneError> {
    Fence::remove()?;
    if NftDataplane::is_there()? {
        nftables()?.cleanup()?;
    }
    if pins.exists() {
        ebpf(pins)?.cleanup()?;
    }
    Ok(())
}
