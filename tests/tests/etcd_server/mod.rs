//! Tests with a real etcd.

mod access;
mod claims;
mod faults;
mod kvm;
