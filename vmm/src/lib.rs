//! One virtual machine: KVM, memory, dirty tracking, vCPUs, boot, state. Implements what [`mirror`] asks of a guest.

pub mod boot;
pub mod config;
pub mod cpu_template;
mod cpuid;
mod crew;
pub mod dirty;
pub mod event_loop;
pub mod exit;
mod failure;
pub mod host;
mod kick;
pub mod machine;
pub mod memory;
pub mod msrs;
mod optional_msrs;
mod platform;
pub mod processor;
pub mod snapshot;
pub mod standby;
pub mod state;
mod update;
mod userfault;
mod vcpu;
pub mod vcpu_state;
pub mod vm_state;

pub use boot::{Boot, BootError, KernelImage};
pub use config::{ConfigError, DevicesConfig, HostResources, MachineConfig, UnknownDevice};
pub use cpu_template::{CpuTemplate, TemplateError};
pub use exit::{Exit, ExitHandle};
pub use host::{Host, HostError};
pub use machine::{CreateError, Machine, MachineError, SerialInput};
pub use platform::{AttachError, DeviceCreateError, MAX_VIRTIO_DEVICES, MmioWindow, PlatformError};
pub use standby::StandbyHost;
pub use state::{MachineState, StateError};
pub use update::{BalloonFigures, ChangeImageError, DeviceLimits};
pub use vcpu::ExitCounters;
