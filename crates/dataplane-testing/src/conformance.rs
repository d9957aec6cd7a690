//! Public policy cases through real namespaces and real sockets: an allowed connection is answered, a refused one meets
//! silence. What Kubernetes' own conformance tests ask of a cluster.

mod cases;
mod cluster;
mod exchange;

pub use cases::{State, groups};
pub use cluster::{Cluster, Tally};
