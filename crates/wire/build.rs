//! Generates the protocol's types; needs `protoc` (Debian: protobuf-compiler).

fn main() -> std::io::Result<()> {
    tonic_prost_build::configure().bytes(".").compile_protos(&["proto/distribution.proto"], &["proto"])
}
