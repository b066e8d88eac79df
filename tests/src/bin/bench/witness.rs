//! How long a claim takes at an etcd of three members on this machine.

use std::time::Instant;

use mirror::ids::{Guid, Term};
use mirror::witness::Claim;
use serde::Serialize;
use tests::etcd::Cluster;

use crate::figures::quantile;

const CLAIMS: u64 = 400;

/// Milliseconds of a claim by a side that knows the record, as both do once a guest is mirrored, and of one by a side
/// that has to look first.
#[derive(Debug, Serialize)]
// The figures are named as they are reported.
#[allow(clippy::struct_field_names)]
pub(crate) struct Claims {
    claim_p50_ms: f64,
    claim_p99_ms: f64,
    first_claim_p50_ms: f64,
    first_claim_p99_ms: f64,
}

pub(crate) fn measure() -> Claims {
    let cluster = Cluster::start(3);
    let known = cluster.witness();
    let guid = Guid::new_v4();
    let mut claims: Vec<f64> = Vec::new();
    let mut first_claims: Vec<f64> = Vec::new();
    for term in 0..CLAIMS {
        let series = if term % 2 == 0 { &mut claims } else { &mut first_claims };
        let witness = if term % 2 == 0 { known.clone() } else { cluster.witness() };
        if term % 2 == 0 {
            known.read(guid).expect("etcd answers");
        }
        let asked = Instant::now();
        let claim = witness.claim(guid, Term(term), "bench").expect("etcd answers");
        series.push(asked.elapsed().as_secs_f64() * 1e3);
        assert_eq!(claim, Claim::Granted(Term(term + 1)));
    }
    Claims {
        claim_p50_ms: quantile(&mut claims, 0.5),
        claim_p99_ms: quantile(&mut claims, 0.99),
        first_claim_p50_ms: quantile(&mut first_claims, 0.5),
        first_claim_p99_ms: quantile(&mut first_claims, 0.99),
    }
}
