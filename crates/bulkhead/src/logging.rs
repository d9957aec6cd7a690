//! What a daemon says of itself: a log for people or programs, and traces for whoever collects them.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Context;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::cli::{LogArgs, LogFormat};
use crate::failure::Failure;

/// Longest that traces under way may take to be sent when the daemon ends.
const FLUSH_TIME_MAX: Duration = Duration::from_secs(3);

/// Sends traces until it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Traces(Option<SdkTracerProvider>);

impl Drop for Traces {
    fn drop(&mut self) {
        // What cannot be sent any more is lost, as what was sampled away.
        if let Some(provider) = self.0.take() {
            let _ = provider.shutdown_with_timeout(FLUSH_TIME_MAX);
        }
    }
}

/// Starts the log of a daemon, and its traces if somebody collects them.
pub(crate) fn start(args: &LogArgs, service: &'static str) -> Result<Traces, Failure> {
    let filter = EnvFilter::try_new(&args.log)
        .map_err(|error| Failure::Usage(format!("--log {}: {error}", args.log)))?;
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let lines = match args.log_format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let provider = args.otlp.as_deref().map(|url| provider(url, service)).transpose()?;
    let traced = provider.as_ref().map(|provider| {
        // Of ours only: what the collector's connection does would be traced, and make more of it.
        let ours = ["bulkhead", "bulkhead_agent", "bulkhead_controller", "bulkhead_store"];
        let ours = ours.into_iter().map(|target| (target, tracing::Level::DEBUG));
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("bulkhead"));
        layer.with_filter(ours.collect::<Targets>())
    });
    tracing_subscriber::registry().with(lines.with_filter(filter)).with(traced).init();
    Ok(Traces(provider))
}

fn provider(url: &str, service: &'static str) -> Result<SdkTracerProvider, Failure> {
    let exporter = SpanExporter::builder().with_tonic().with_endpoint(url).build();
    let exporter = exporter.with_context(|| format!("--otlp {url}"))?;
    let resource = Resource::builder().with_service_name(service).build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}
