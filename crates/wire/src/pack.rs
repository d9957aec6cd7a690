//! Resources that many agents are told alike, compressed once for all of them.

use bytes::Bytes;
use miniz_oxide::deflate::compress_to_vec_zlib;
use miniz_oxide::inflate::decompress_to_vec_zlib_with_limit;
use prost::Message;

use crate::MESSAGE_BYTES_MAX;
use crate::proto::Resources;

/// How resources are packed, as Hello names it.
pub const PACKING: &str = "deflate";
/// Most bytes that may come out of one message.
pub const PACKED_BYTES_MAX: usize = MESSAGE_BYTES_MAX;
/// How hard it is tried to make it small, of 10. It is done once for all agents.
const LEVEL: u8 = 6;

/// Packed resources that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not compressed, cut off, or larger than [`PACKED_BYTES_MAX`] when it is not.
    #[error("packed resources cannot be decompressed: {0}")]
    Compressed(String),
    /// What comes out is no list of resources.
    #[error("packed resources are none: {0}")]
    Message(String),
}

/// Packs objects.
pub fn pack(upserts: Vec<Bytes>) -> Bytes {
    let message = Resources { upserts, ..Resources::default() };
    compress_to_vec_zlib(&message.encode_to_vec(), LEVEL).into()
}

/// Inverse of [`pack`].
///
/// # Errors
/// If it cannot be read.
pub fn unpack(packed: &[u8]) -> Result<Vec<Bytes>, Unreadable> {
    let plain = decompress_to_vec_zlib_with_limit(packed, PACKED_BYTES_MAX)
        .map_err(|error| Unreadable::Compressed(format!("{:?}", error.status)))?;
    let message =
        Resources::decode(Bytes::from(plain)).map_err(|error| Unreadable::Message(error.to_string()))?;
    Ok(message.upserts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_out_and_nothing_else() {
        let objects: Vec<Bytes> =
            (0..50).map(|number| format!("{{\"kind\": \"Policy\", \"n\": {number}}}").into()).collect();
        let packed = pack(objects.clone());
        assert!(packed.len() < objects.iter().map(Bytes::len).sum::<usize>() / 2);
        assert_eq!(unpack(&packed), Ok(objects));
        assert!(matches!(unpack(&packed[..packed.len() - 5]), Err(Unreadable::Compressed(_))));
        assert!(matches!(unpack(&compress_to_vec_zlib(&[0xff; 9], LEVEL)), Err(Unreadable::Message(_))));
        let bomb = compress_to_vec_zlib(&vec![0; PACKED_BYTES_MAX + 1], LEVEL);
        assert!(matches!(unpack(&bomb), Err(Unreadable::Compressed(_))));
    }
}
