//! The state of a machine apart from its memory, and its form on the wire: a version, then postcard.

use kvm_bindings::kvm_vcpu_events;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use devices::virtio::VirtioState;
use devices::{I8042State, SerialState};

use crate::config::{ConfigError, MachineConfig};
use crate::exit::Exit;
use crate::msrs::IA32_TSC;
use crate::processor::Processor;
use crate::vcpu_state::VcpuState;
use crate::vm_state::VmState;

/// Version of [`MachineState`]'s form. Any change of a field makes another version.
pub const STATE_VERSION: u32 = 2;

/// Version of a machine's description.
pub const DESCRIPTION_VERSION: u32 = 2;

/// Register of the local APIC that counts down by itself.
const LAPIC_CURRENT_COUNT: usize = 0x390;

/// Everything that a machine is, apart from memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// The vCPUs, by index.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers, timer, clock.
    pub vm: VmState,
    /// The serial port.
    pub serial: SerialState,
    /// The keyboard and its controller.
    pub keyboard: I8042State,
    /// The virtio devices, in the order of the machine's configuration.
    pub virtio: Vec<VirtioState>,
    /// How the run ended, if it had.
    pub ended: Option<Exit>,
}

/// Bytes that are no state or description, or one of another version.
#[derive(Debug, Error)]
pub enum StateError {
    /// Not even a version.
    #[error("the {what} has {len} bytes, too few for its version")]
    Short {
        /// What was to be decoded.
        what: &'static str,
        /// Bytes there are.
        len: usize,
    },
    /// Written by another version of the program.
    #[error(
        "the {what} has version {version}, this program reads version {known}: use the same version on both sides"
    )]
    Version {
        /// What was to be decoded.
        what: &'static str,
        /// Its version.
        version: u32,
        /// The version known here.
        known: u32,
    },
    /// Not what the version promises.
    #[error("the {what} cannot be decoded: {cause}")]
    Decode {
        /// What was to be decoded.
        what: &'static str,
        /// Why.
        cause: postcard::Error,
    },
    /// More than what the version promises.
    #[error("the {what} has {len} bytes too many")]
    Rest {
        /// What was to be decoded.
        what: &'static str,
        /// Bytes left over.
        len: usize,
    },
    /// It cannot be encoded.
    #[error("the {what} cannot be encoded: {cause}")]
    Encode {
        /// What was to be encoded.
        what: &'static str,
        /// Why.
        cause: postcard::Error,
    },
    /// It describes a machine that cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl MachineState {
    /// Appends the state to `out`.
    ///
    /// # Errors
    /// [`StateError::Encode`]; `out` may then hold a part.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), StateError> {
        encode("machine state", STATE_VERSION, self, out)
    }

    /// Reads what [`Self::encode`] wrote.
    ///
    /// # Errors
    /// [`StateError`]
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        decode("machine state", STATE_VERSION, bytes)
    }

    /// The names of the fields in which `other` differs, apart from those that time changes by itself: TSC, kvmclock,
    /// the running count of a timer.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut check = |name: String, equal: bool| {
            if !equal {
                found.push(name);
            }
        };
        check("number of vCPUs".into(), self.vcpus.len() == other.vcpus.len());
        for (index, (a, b)) in self.vcpus.iter().zip(&other.vcpus).enumerate() {
            let mut check = |name: &str, equal| check(format!("vCPU {index}: {name}"), equal);
            check("cpuid", a.cpuid == b.cpuid);
            check("mp_state", a.mp_state == b.mp_state);
            check("regs", a.regs == b.regs);
            check("sregs", a.sregs == b.sregs);
            check("xcrs", a.xcrs == b.xcrs);
            check("xsave", a.xsave == b.xsave);
            check("debugregs", a.debugregs == b.debugregs);
            check("events", told_by_the_api(a.events) == told_by_the_api(b.events));
            check("tsc_khz", a.tsc_khz == b.tsc_khz);
            check("number of MSRs", a.msrs.len() == b.msrs.len());
            for (x, y) in a.msrs.iter().zip(&b.msrs).filter(|(x, _)| x.index != IA32_TSC) {
                check(&format!("MSR {:#x}: {:#x} and {:#x}", x.index, x.data, y.data), x == y);
            }
            let timeless = |lapic: &[u8]| {
                let mut lapic = lapic.to_vec();
                if let Some(count) = lapic.get_mut(LAPIC_CURRENT_COUNT..LAPIC_CURRENT_COUNT + 4) {
                    count.fill(0);
                }
                lapic
            };
            check("lapic", timeless(&a.lapic) == timeless(&b.lapic));
        }
        for (index, name) in ["first PIC", "second PIC", "IOAPIC"].into_iter().enumerate() {
            check(name.into(), self.vm.irqchips[index] == other.vm.irqchips[index]);
        }
        let timeless = |state: &VmState| {
            let mut pit = state.pit;
            pit.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
            pit
        };
        check("pit".into(), timeless(&self.vm) == timeless(&other.vm));
        check("serial".into(), self.serial == other.serial);
        check("keyboard".into(), self.keyboard == other.keyboard);
        check("number of virtio devices".into(), self.virtio.len() == other.virtio.len());
        for (index, (a, b)) in self.virtio.iter().zip(&other.virtio).enumerate() {
            check(format!("virtio device {index}: transport"), a.transport == b.transport);
            check(format!("virtio device {index}"), a.device == b.device);
        }
        check("ended".into(), self.ended == other.ended);
        found
    }
}

/// Writes the description from which a standby builds a twin of a machine of `config`.
pub fn describe(config: &MachineConfig, processor: &Processor) -> Vec<u8> {
    let mut out = Vec::new();
    // Integers, names and paths that were text once can always be encoded.
    encode("machine description", DESCRIPTION_VERSION, &(config, processor), &mut out).expect("plain values");
    out
}

/// Reads what [`mirror::guest::Guest::describe`] of a [`crate::Machine`] wrote.
///
/// # Errors
/// [`StateError`]
pub fn read_description(bytes: &[u8]) -> Result<(MachineConfig, Processor), StateError> {
    let (config, processor): (MachineConfig, Processor) =
        decode("machine description", DESCRIPTION_VERSION, bytes)?;
    config.check()?;
    Ok((config, processor))
}

fn encode(
    what: &'static str,
    version: u32,
    value: &impl Serialize,
    out: &mut Vec<u8>,
) -> Result<(), StateError> {
    out.extend(version.to_le_bytes());
    postcard::to_io(value, out).map_err(|cause| StateError::Encode { what, cause })?;
    Ok(())
}

fn decode<'a, T: Deserialize<'a>>(what: &'static str, known: u32, bytes: &'a [u8]) -> Result<T, StateError> {
    let Some((version, body)) = bytes.split_first_chunk() else {
        return Err(StateError::Short { what, len: bytes.len() });
    };
    let version = u32::from_le_bytes(*version);
    if version != known {
        return Err(StateError::Version { what, version, known });
    }
    let (value, rest) =
        postcard::take_from_bytes(body).map_err(|cause| StateError::Decode { what, cause })?;
    if rest.is_empty() { Ok(value) } else { Err(StateError::Rest { what, len: rest.len() }) }
}

/// `events` as far as KVM promises to keep them: without KVM_CAP_EXCEPTION_PAYLOAD an exception that is pending is told as
/// injected and pending, and taken back as injected alone (KVM API, KVM_GET_VCPU_EVENTS).
fn told_by_the_api(mut events: kvm_vcpu_events) -> kvm_vcpu_events {
    if events.exception.injected != 0 {
        events.exception.pending = 0;
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: MachineConfig = MachineConfig::new(3, 512);

    fn processor() -> Processor {
        Processor { features: vec![1, 2], msrs: vec![3], ..Processor::default() }
    }

    #[test]
    fn description_comes_back_as_it_was() {
        assert_eq!(read_description(&describe(&CONFIG, &processor())).unwrap(), (CONFIG, processor()));
    }

    #[test]
    fn description_of_another_version_or_damaged_is_refused() {
        let good = describe(&CONFIG, &processor());
        let mut newer = good.clone();
        newer[0] += 1;
        assert!(matches!(read_description(&newer), Err(StateError::Version { version: 3, .. })));
        for len in 0..good.len() {
            assert!(read_description(&good[..len]).is_err(), "{len} bytes");
        }
        let longer = [&good[..], &[0]].concat();
        assert!(matches!(read_description(&longer), Err(StateError::Rest { len: 1, .. })));
        let impossible = describe(&MachineConfig { vcpu_count: 0, ..CONFIG }, &processor());
        assert!(matches!(read_description(&impossible), Err(StateError::Config(_))));
    }
}
