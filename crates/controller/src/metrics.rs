//! Counters of what happened, and how they are printed. Gauges are read where they live.

use std::fmt::{Display, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_identity::door::Door;

/// A number that only rises.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters of a controller.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) requests: Counter,
    pub(crate) requests_failed: Counter,
    /// Requests of nobody, and those that are not for whoever asks.
    pub(crate) requests_unauthenticated: Counter,
    pub(crate) requests_forbidden: Counter,
    /// Requests of callers that ask too often.
    pub(crate) requests_too_many: Counter,
    /// Lines that could not be written to the audit log.
    pub(crate) audit_lost: Counter,
    pub(crate) hosts_joined: Counter,
    pub(crate) certificates_renewed: Counter,
    /// Calls of agents without a certificate, with a revoked one, or for another's host.
    pub(crate) agents_refused: Counter,
    /// Attempts to join from addresses that try too often.
    pub(crate) enrolls_too_many: Counter,
    pub(crate) agent_messages_sent: Counter,
    pub(crate) agent_bytes_sent: Counter,
    pub(crate) sessions_opened: Counter,
    pub(crate) sessions_cut_off: Counter,
    pub(crate) sessions_replaced: Counter,
    /// Sent away for a moment, since others were being told what they lack.
    pub(crate) sessions_deferred: Counter,
    pub(crate) workloads_refused: Counter,
    pub(crate) hosts_expired: Counter,
    /// Sessions ended since another controller has a newer one of that host.
    pub(crate) sessions_moved: Counter,
    /// Transactions that registered sessions.
    pub(crate) registrations: Counter,
    /// Times that the controller's lease had ended.
    pub(crate) leases_lost: Counter,
    /// Questions to other controllers, and those that were not answered.
    pub(crate) peers_asked: Counter,
    pub(crate) peers_silent: Counter,
    /// Changes undone, and objects that this left as they were.
    pub(crate) roll_backs: Counter,
    pub(crate) roll_back_objects_left: Counter,
    pub(crate) flows_received: Counter,
    /// Records that agents say they had to drop.
    pub(crate) flows_lost_by_agents: Counter,
    pub(crate) flows_malformed: Counter,
    /// Records not written to disk, since the writer's queue was full or the disk failed.
    pub(crate) flows_not_on_disk: Counter,
    /// Batches of records that a follower did not get, since it read too slowly.
    pub(crate) flow_batches_missed: Counter,
}

/// Text in the format that Prometheus reads.
#[derive(Debug, Default)]
pub(crate) struct Page(String);

impl Page {
    pub(crate) fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, help, "counter");
        self.sample(name, &[], value);
    }

    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, help, "gauge");
        self.sample(name, &[], value);
    }

    /// One name with a label that tells its values apart.
    pub(crate) fn family<'a>(
        &mut self,
        name: &str,
        help: &str,
        kind: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'a str, u64)>,
    ) {
        self.head(name, help, kind);
        for (value_of_label, value) in values {
            self.sample(name, &[(label, value_of_label)], value);
        }
    }

    /// Sessions of agents, with a controller or a relay.
    pub(crate) fn sessions(&mut self, connected: usize, metrics: &Metrics) {
        self.gauge("agents_connected", "Sessions of agents.", connected);
        let counters = [
            ("agent_messages_sent_total", "Messages to agents.", &metrics.agent_messages_sent),
            ("agent_bytes_sent_total", "Bytes of messages to agents.", &metrics.agent_bytes_sent),
            ("agent_sessions_total", "Sessions that agents have begun.", &metrics.sessions_opened),
            (
                "agent_sessions_cut_off_total",
                "Sessions ended since the agent read nothing.",
                &metrics.sessions_cut_off,
            ),
            (
                "agent_sessions_deferred_total",
                "Agents sent away for a moment, since others were being told what they lack.",
                &metrics.sessions_deferred,
            ),
            (
                "agent_sessions_replaced_total",
                "Sessions ended by another of that host.",
                &metrics.sessions_replaced,
            ),
            ("agents_refused_total", "Calls of agents without a right to them.", &metrics.agents_refused),
        ];
        for (name, help, counter) in counters {
            self.counter(name, help, counter.value());
        }
    }

    /// Who stands at listeners' doors, by port, and who was turned away.
    pub(crate) fn doors(&mut self, doors: &[(&'static str, Arc<Door>)], metrics: &Metrics) {
        let all = |value: fn(&Door) -> u64| doors.iter().map(move |(port, door)| (*port, value(door)));
        let gauges = [
            ("connections_pending", "Connections before or in their handshake."),
            ("connections_strangers", "Connections without a certificate."),
            ("connections_known", "Connections with a certificate."),
        ];
        for (which, (name, help)) in gauges.into_iter().enumerate() {
            let there = doors.iter().map(|(port, door)| (*port, door.connections()[which] as u64));
            self.family(name, help, "gauge", "port", there);
        }
        let help = "Connections closed since there are too many.";
        self.family("connections_refused_total", help, "counter", "port", all(Door::refused));
        let help = "Handshakes that failed or took too long.";
        self.family("handshakes_failed_total", help, "counter", "port", all(Door::failed));
        let too_many = metrics.enrolls_too_many.value();
        self.counter("enrolls_refused_total", "Attempts to join of addresses that try too often.", too_many);
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        // Writing to a String does not fail.
        let _ = writeln!(self.0, "# HELP bulkhead_{name} {help}\n# TYPE bulkhead_{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<_> = labels.iter().map(|(key, value)| format!("{key}={value:?}")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "bulkhead_{name}{labels} {value}");
    }

    pub(crate) fn into_text(self) -> String {
        self.0
    }
}
