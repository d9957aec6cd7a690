//! Generates the protocol's types; needs `protoc` (Debian: protobuf-compiler).

use tonic_build::manual::{Builder, Method, MethodBuilder, Service};

fn main() -> std::io::Result<()> {
    let service = "#[cfg(feature = \"service\")]";
    tonic_prost_build::configure()
        .bytes(".")
        .client_mod_attribute(".", service)
        .build_server(false)
        .compile_protos(&["proto/distribution.proto"], &["proto"])?;
    Builder::new().build_client(false).compile(&[calls()]);
    Ok(())
}

/// What a server leaves to the library: all calls but `Sync`, whose messages it frames itself.
fn calls() -> Service {
    let call = |name: &str, route: &str, input: &str, output: &str| -> MethodBuilder {
        Method::builder()
            .name(name)
            .route_name(route)
            .input_type(format!("crate::proto::{input}"))
            .output_type(format!("crate::proto::{output}"))
            .codec_path("tonic_prost::ProstCodec")
    };
    let flows = call("report_flows", "ReportFlows", "FlowBatch", "FlowReceipt");
    Service::builder()
        .name("Distribution")
        .package("bulkhead.wire.v1")
        .method(flows.client_streaming().server_streaming().build())
        .method(call("enroll", "Enroll", "EnrollRequest", "Enrollment").build())
        .method(call("renew", "Renew", "RenewRequest", "Enrollment").build())
        .build()
}
