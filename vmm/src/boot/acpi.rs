//! ACPI tables: how a guest finds its processors, interrupts, keyboard, virtio devices and the switch that turns it off.
//!
//! The machine is one of reduced hardware (ACPI 6.5, 4.1): no power management timer, no RTC, no legacy interrupt
//! controller and timer that a guest would wait for at boot. Time comes from the local APICs and KVM's clock.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use devices::i8042::{I8042_PORT, KEYBOARD_IRQ, RESET_COMMAND, RESET_PORT};
use devices::power_switch::{POWER_OFF_STATE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};
use devices::serial::{SERIAL_IRQ, SERIAL_LEN, SERIAL_PORT};
use mirror::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use super::map::FIRMWARE;
use crate::platform::MmioWindow;

const OEM: [u8; 6] = *b"UNDSTD";
const OEM_TABLE: [u8; 8] = *b"UNDRSTDY";
const OEM_REVISION: u32 = 1;

const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;

/// IAPC_BOOT_ARCH bits of the FADT (ACPI 6.5, 5.2.9.3).
const HAS_I8042: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// Revision of the DSDT from which integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 16;

/// Writes the tables for `vcpus` processors and the devices in `windows`, and returns where their root is.
pub(super) fn write(ram: &GuestRam, vcpus: u8, windows: &[MmioWindow]) -> Result<u64, BootError> {
    let mut place = FIRMWARE + (Rsdp::len() as u64).next_multiple_of(ALIGNMENT);
    let mut put = |table: Vec<u8>| -> Result<u64, BootError> {
        let at = place;
        ram.write_slice(&table, GuestAddress(at))?;
        place += (table.len() as u64).next_multiple_of(ALIGNMENT);
        Ok(at)
    };
    let dsdt = put(dsdt(vcpus, windows))?;
    let fadt = put(bytes(&fadt(dsdt)))?;
    let madt = put(bytes(&madt(vcpus)))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(bytes(&xsdt))?;
    ram.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(FIRMWARE))?;
    Ok(FIRMWARE)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u64| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port);
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (HAS_I8042 | NO_VGA | NO_CMOS_RTC).into();
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_COMMAND;
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LAPIC_ADDRESS));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, IOAPIC_ADDRESS, 0));
    madt
}

/// A processor of the namespace.
struct Processor(u8);

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(id) = *self;
        let name = Path::new(&format!("C{id:03}"));
        Device::new(
            name,
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &u32::from(id))],
        )
        .to_aml_bytes(sink);
    }
}

/// A virtio device of the namespace.
struct Virtio(usize, MmioWindow);

impl Aml for Virtio {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(index, window) = *self;
        Device::new(
            Path::new(&format!("V{index:03}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &(index as u32)),
                // Devices see what the processors' caches hold.
                &Name::new("_CCA".into(), &1_u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, window.base as u32, window.len as u32),
                        &edge(window.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A device of the namespace that PCs have always had, at its ports.
struct Legacy {
    name: &'static str,
    id: &'static str,
    dos_name: Option<&'static str>,
    irq: u32,
    /// First port and how many.
    ports: &'static [(u64, u64)],
}

const SERIAL: Legacy = Legacy {
    name: "COM1",
    id: "PNP0501",
    dos_name: Some("COM1"),
    irq: SERIAL_IRQ,
    ports: &[(SERIAL_PORT, SERIAL_LEN)],
};

const KEYBOARD: Legacy = Legacy {
    name: "KBD_",
    id: "PNP0303",
    dos_name: None,
    irq: KEYBOARD_IRQ,
    // Linux takes the first for data and the second for commands.
    ports: &[(I8042_PORT, 1), (RESET_PORT, 1)],
};

impl Aml for Legacy {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let id = EISAName::new(self.id);
        let interrupt = edge(self.irq);
        let port = |&(port, len): &(u64, u64)| IO::new(port as u16, port as u16, 1, len as u8);
        let ports: Vec<_> = self.ports.iter().map(port).collect();
        let mut resources: Vec<&dyn Aml> = vec![&interrupt];
        resources.extend(ports.iter().map(|port| port as &dyn Aml));
        let resources = ResourceTemplate::new(resources);
        let mut fields = vec![Name::new("_HID".into(), &id), Name::new("_UID".into(), &0_u8)];
        fields.extend(self.dos_name.as_ref().map(|name| Name::new("_DDN".into(), name)));
        fields.push(Name::new("_CRS".into(), &resources));
        let fields = fields.iter().map(|field| field as &dyn Aml).collect();
        Device::new(self.name.into(), fields).to_aml_bytes(sink);
    }
}

/// An interrupt of one device, by an edge.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(vcpus: u8, windows: &[MmioWindow]) -> Vec<u8> {
    let processors: Vec<_> = (0..vcpus).map(Processor).collect();
    let devices: Vec<_> = windows.iter().enumerate().map(|(index, &window)| Virtio(index, window)).collect();

    let mut children: Vec<&dyn Aml> = vec![&SERIAL, &KEYBOARD];
    children.extend(processors.iter().map(|processor| processor as &dyn Aml));
    children.extend(devices.iter().map(|device| device as &dyn Aml));
    let mut body = bytes(&Scope::new("_SB_".into(), children));
    let off = Package::new(vec![&POWER_OFF_STATE]);
    body.extend(bytes(&Name::new("_S5_".into(), &off)));

    let mut table = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Memory, layout};
    use crate::platform::window;

    fn read(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// The table at `at`, its length and checksum checked.
    fn table(ram: &GuestRam, at: u64, signature: [u8; 4]) -> Vec<u8> {
        let len = number(&read(ram, at + 4, 4)) as usize;
        assert!((FIRMWARE..0x10_0000).contains(&at) && at + len as u64 <= 0x10_0000, "below 1 MiB");
        let table = read(ram, at, len);
        assert_eq!(table[..4], signature);
        assert_eq!(table.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte)), 0, "{signature:?}");
        table
    }

    #[test]
    fn madt_names_every_processor_by_its_apic_id_and_the_ioapic_by_another() {
        let table = bytes(&madt(32));
        assert_eq!(number(&table[36..40]), u64::from(LAPIC_ADDRESS));
        let mut rest = &table[44..];
        let mut entries = Vec::new();
        while let [kind, len, ..] = *rest {
            let (entry, behind) = rest.split_at(len.into());
            entries.push((kind, entry));
            rest = behind;
        }
        for (id, (kind, entry)) in entries[..32].iter().enumerate() {
            // ACPI 6.5, 5.2.12.2: processor UID, APIC ID, flags: enabled.
            assert_eq!((*kind, &entry[2..]), (0, &[id as u8, id as u8, 1, 0, 0, 0][..]));
        }
        let [(1, ioapic)] = entries[32..] else { panic!("one IOAPIC and nothing else: {entries:?}") };
        assert_eq!((ioapic[2], number(&ioapic[4..8])), (32, u64::from(IOAPIC_ADDRESS)));
        assert_eq!(number(&ioapic[8..12]), 0, "its first interrupt");
    }

    #[test]
    fn keyboard_controller_is_announced_at_its_ports_with_its_interrupt() {
        let memory = Memory::new(layout(16).unwrap(), false).unwrap();
        let root = write(memory.ram(), 1, &[]).unwrap();
        let xsdt = table(memory.ram(), number(&read(memory.ram(), root + 24, 8)), *b"XSDT");
        let fadt = table(memory.ram(), number(&xsdt[36..44]), *b"FACP");
        // Linux does not look for a keyboard unless IAPC_BOOT_ARCH (ACPI 6.5, 5.2.9.3) has this bit.
        assert_eq!(number(&fadt[109..111]) & 1 << 1, 1 << 1);
        let dsdt = table(memory.ram(), number(&fadt[140..148]), *b"DSDT");
        // PNP0303, compressed (6.1.5); extended interrupt, edge, active high (6.4.3.6); two I/O ports (6.4.2.5).
        let found = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|part| part == bytes);
        assert!(found(&[0x41, 0xd0, 0x03, 0x03]), "{dsdt:x?}");
        let ports = [0x47, 1, 0x60, 0, 0x60, 0, 1, 1, 0x47, 1, 0x64, 0, 0x64, 0, 1, 1];
        assert!(found(&[&[0x89, 6, 0, 0b11, 1, 1, 0, 0, 0][..], &ports].concat()), "{dsdt:x?}");
    }

    #[test]
    fn every_table_is_found_from_the_root_and_sound() {
        for (vcpus, devices) in [(1, 0), (2, 3), (32, 19)] {
            let memory = Memory::new(layout(16).unwrap(), false).unwrap();
            let windows: Vec<_> = (0..devices).map(window).collect();
            let root = write(memory.ram(), vcpus, &windows).unwrap();
            let rsdp = read(memory.ram(), root, 36);
            assert_eq!(&rsdp[..8], b"RSD PTR ");
            assert_eq!(rsdp.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte)), 0);
            let xsdt = table(memory.ram(), number(&rsdp[24..32]), *b"XSDT");
            let fadt = table(memory.ram(), number(&xsdt[36..44]), *b"FACP");
            let madt = table(memory.ram(), number(&xsdt[44..52]), *b"APIC");
            let dsdt = table(memory.ram(), number(&fadt[140..148]), *b"DSDT");
            assert_eq!(madt.len(), 44 + 8 * usize::from(vcpus) + 12);
            let count = |needle: &[u8]| dsdt.windows(needle.len()).filter(|part| part == &needle).count();
            assert_eq!(count(b"LNRO0005"), devices);
            assert_eq!(count(b"ACPI0007"), usize::from(vcpus));
            for window in windows {
                assert_eq!(count(&(window.base as u32).to_le_bytes()), 1, "{window:?}");
            }
        }
    }
}
