//! Figures of a series.

/// The middle of `series`.
pub(crate) fn median(series: &mut [f64]) -> f64 {
    quantile(series, 0.5)
}

/// The value that a share `q` of `series` does not exceed. 0 for an empty series.
pub(crate) fn quantile(series: &mut [f64], q: f64) -> f64 {
    series.sort_by(f64::total_cmp);
    let last = series.len().saturating_sub(1);
    series.get((last as f64 * q).round() as usize).copied().unwrap_or(0.0)
}
