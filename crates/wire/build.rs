//! Generates the protocol's types; needs `protoc` (Debian: protobuf-compiler).

fn main() -> std::io::Result<()> {
    let service = "#[cfg(feature = \"service\")]";
    tonic_prost_build::configure()
        .bytes(".")
        .client_mod_attribute(".", service)
        .server_mod_attribute(".", service)
        .compile_protos(&["proto/distribution.proto"], &["proto"])
}
