//! The sections that a Firecracker file may have and that nothing stands behind here yet.
//!
//! Firecracker's own files carry them empty (`"drives": []`, `"vsock": null`): such a section asks for nothing and is no
//! error. One with content is refused by its name, as a missing feature and not as a misspelling.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use vmm::CpuTemplate;

use super::devices::{Balloon, Console, Drive, Entropy, NetworkInterface, Vsock};
use super::file::{BootSource, Config, MachineSection, MirrorSection};

/// Accepts nothing but emptiness.
struct Nothing(&'static str);

impl Nothing {
    fn refusal<E: Error>(&self) -> E {
        E::custom(format_args!("the section \"{}\" is not supported yet; remove it", self.0))
    }
}

impl<'de> Visitor<'de> for Nothing {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no section \"{}\", which is not supported yet", self.0)
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        items.next_element::<IgnoredAny>()?.map_or(Ok(()), |_| Err(self.refusal()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        fields.next_key::<IgnoredAny>()?.map_or(Ok(()), |_| Err(self.refusal()))
    }
}

macro_rules! whole_file {
    ($($field:ident $function:literal: $section:literal),* $(,)?) => {
        /// A configuration file with everything that Firecracker knows.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(super) struct WholeFile {
            #[serde(rename = "boot-source")]
            boot: BootSource,
            #[serde(rename = "machine-config")]
            machine: MachineSection,
            #[serde(default)]
            mirror: Option<MirrorSection>,
            #[serde(default)]
            drives: Vec<Drive>,
            #[serde(default, rename = "network-interfaces")]
            network_interfaces: Vec<NetworkInterface>,
            #[serde(default)]
            vsock: Option<Vsock>,
            #[serde(default)]
            entropy: Option<Entropy>,
            #[serde(default)]
            balloon: Option<Balloon>,
            #[serde(default)]
            console: Option<Console>,
            #[serde(default, rename = "cpu-config")]
            cpu_config: Option<PathBuf>,
            $(
                #[serde(default, rename = $section, deserialize_with = $function)]
                #[allow(dead_code, reason = "there to be refused")]
                $field: (),
            )*
        }

        $(
            fn $field<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
                deserializer.deserialize_any(Nothing($section))
            }
        )*
    };
}

whole_file! {
    logger "logger": "logger",
    memory_hotplug "memory_hotplug": "memory-hotplug",
    metrics "metrics": "metrics",
    mmds_config "mmds_config": "mmds-config",
    pmem "pmem": "pmem",
    serial "serial": "serial",
}

impl From<WholeFile> for Config {
    fn from(file: WholeFile) -> Self {
        Self {
            boot: file.boot,
            machine: file.machine,
            mirror: file.mirror,
            drives: file.drives,
            network_interfaces: file.network_interfaces,
            vsock: file.vsock,
            entropy: file.entropy,
            balloon: file.balloon,
            console: file.console,
            cpu_config: file.cpu_config,
            cpu_template: CpuTemplate::NONE,
        }
    }
}
