//! The protocol between controller and agents: generated types and conversions to the model's.
//!
//! The conversation's rules stand in `proto/distribution.proto`.

/// Generated from `proto/distribution.proto`.
#[allow(
    missing_debug_implementations,
    unreachable_pub,
    unused_qualifications,
    elided_lifetimes_in_paths,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::unwrap_used,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/bulkhead.wire.v1.rs"));
    #[cfg(feature = "service")]
    include!(concat!(env!("OUT_DIR"), "/bulkhead.wire.v1.Distribution.rs"));
}

#[cfg(feature = "service")]
mod come_back;
mod convert;
mod pack;

#[cfg(feature = "service")]
pub use come_back::{COME_BACK_MAX, come_back, come_back_elsewhere, is_elsewhere, when_to_come_back};
pub use convert::{
    InvalidPrefix, address_from_wire, address_to_wire, port_from_wire, port_to_wire, prefix_from_wire,
    prefix_to_wire,
};

pub use pack::{PACKED_BYTES_MAX, PACKING, Unreadable, pack, unpack};

/// Version of the protocol. A peer that names another is refused.
pub const PROTOCOL: u32 = 1;

/// Largest message either side accepts, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
