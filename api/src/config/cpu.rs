//! A CPU template, as the file that `cpu-config` names has it. Names, types and meaning are Firecracker's (CpuConfig).

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};
use vmm::cpu_template::{Bits, LeafChange, MsrChange};
use vmm::{CpuTemplate, processor};

/// Most entries of each list: KVM takes no more of either.
const MAX_ENTRIES: usize = 256;

/// What the guest's processors offer otherwise than the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Capabilities of KVM that the host must have, or, behind `!`, need not have.
    #[serde(default)]
    #[schema(max_items = 256)]
    pub kvm_capabilities: Vec<Capability>,
    /// Changes of CPUID.
    #[serde(default)]
    #[schema(max_items = 256)]
    pub cpuid_modifiers: Vec<LeafModifier>,
    /// Changes of model-specific registers.
    #[serde(default)]
    #[schema(max_items = 256)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// Changes of a leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeafModifier {
    /// The leaf.
    pub leaf: Number,
    /// The subleaf; 0 if the leaf has none.
    pub subleaf: Number,
    /// KVM's flags: 1 if the leaf has subleaves.
    #[schema(maximum = 4_294_967_295_u32)]
    pub flags: u32,
    /// The registers in which there are other bits.
    pub modifiers: Vec<RegisterModifier>,
}

/// Changes of a register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which.
    pub register: Register,
    /// Its bits.
    pub bitmap: Bitmap<32>,
}

/// A register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "they are called so everywhere")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Changes of a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Which.
    pub addr: Number,
    /// Its bits.
    pub bitmap: Bitmap<64>,
}

impl CpuConfig {
    /// The template that it asks for.
    pub fn template(&self) -> CpuTemplate {
        let register = |modifier: &RegisterModifier| {
            let register = match modifier.register {
                Register::Eax => processor::Register::Eax,
                Register::Ebx => processor::Register::Ebx,
                Register::Ecx => processor::Register::Ecx,
                Register::Edx => processor::Register::Edx,
            };
            (register, modifier.bitmap.0)
        };
        let leaf = |modifier: &LeafModifier| LeafChange {
            leaf: modifier.leaf.0,
            subleaf: modifier.subleaf.0,
            flags: modifier.flags,
            registers: modifier.modifiers.iter().map(register).collect(),
        };
        let msr = |modifier: &MsrModifier| MsrChange { index: modifier.addr.0, bits: modifier.bitmap.0 };
        CpuTemplate {
            capabilities: self
                .kvm_capabilities
                .iter()
                .filter(|cap| cap.needed)
                .map(|cap| cap.number)
                .collect(),
            leaves: self.cpuid_modifiers.iter().map(leaf).collect(),
            msrs: self.msr_modifiers.iter().map(msr).collect(),
        }
    }

    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        let lists = [
            ("kvm_capabilities", self.kvm_capabilities.len()),
            ("cpuid_modifiers", self.cpuid_modifiers.len()),
            ("msr_modifiers", self.msr_modifiers.len()),
        ];
        match lists.into_iter().find(|&(_, len)| len > MAX_ENTRIES) {
            Some((field, len)) => Err((field, format!("has {len} entries; KVM takes at most {MAX_ENTRIES}"))),
            None => Ok(()),
        }
    }
}

/// A number written as `"0x…"` or `"0b…"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number(pub u32);

impl FromStr for Number {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = |prefix, radix| {
            let digits = text.strip_prefix(prefix).filter(|digits| !digits.starts_with('+'))?;
            u32::from_str_radix(digits, radix).ok()
        };
        let number = digits("0x", 16).or_else(|| digits("0b", 2));
        number.map(Self).ok_or_else(|| format!("{text:?} is no number of 32 bits; write \"0x…\" or \"0b…\""))
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A capability of KVM by its number, `"121"`, or `"!121"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its number (KVM_CAP_…).
    pub number: u32,
    /// Whether the host must have it.
    pub needed: bool,
}

impl FromStr for Capability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix('!');
        let needed = digits.is_none();
        let digits = digits.unwrap_or(text);
        let number = digits.parse().ok().filter(|_| !digits.starts_with('+'));
        let wrong = || {
            format!("{text:?} is no capability of KVM; write its number, behind \"!\" if it is not needed")
        };
        number.map(|number| Self { number, needed }).ok_or_else(wrong)
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.needed { "" } else { "!" }, self.number)
    }
}

/// Up to `WIDTH` bits, the lowest last: 0, 1, or x for one that stays as it is. What is not written stays as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap<const WIDTH: u32>(pub Bits);

impl<const WIDTH: u32> FromStr for Bitmap<WIDTH> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut bits = Bits::default();
        let mut count = 0;
        let digits = text.strip_prefix("0b").unwrap_or(text).chars().rev().filter(|&digit| digit != '_');
        for digit in digits {
            if count == WIDTH {
                return Err(format!("{text:?} has more than {WIDTH} bits"));
            }
            let bit = 1 << count;
            match digit {
                'x' => {}
                '0' => bits.mask |= bit,
                '1' => {
                    bits.mask |= bit;
                    bits.value |= bit;
                }
                other => return Err(format!("{other:?} in {text:?} is no bit; write 0, 1, or x")),
            }
            count += 1;
        }
        if count == 0 { Err(format!("{text:?} has no bits; write up to {WIDTH}")) } else { Ok(Self(bits)) }
    }
}

impl<const WIDTH: u32> fmt::Display for Bitmap<WIDTH> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        for bit in (0..WIDTH).rev().map(|index| 1 << index) {
            let digit = match (self.0.mask & bit != 0, self.0.value & bit != 0) {
                (false, _) => "x",
                (true, false) => "0",
                (true, true) => "1",
            };
            f.write_str(digit)?;
        }
        Ok(())
    }
}

macro_rules! as_text {
    ($(($($generic:tt)*) $kind:ty),*) => {$(
        impl<'de, $($generic)*> Deserialize<'de> for $kind {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }

        impl<$($generic)*> Serialize for $kind {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}

as_text!(() Number, () Capability, (const WIDTH: u32) Bitmap<WIDTH>);

/// The schema of a text that matches `pattern`.
fn text(pattern: impl Into<String>) -> RefOr<Schema> {
    ObjectBuilder::new().schema_type(Type::String).pattern(Some(pattern)).into()
}

impl PartialSchema for Number {
    fn schema() -> RefOr<Schema> {
        text("^(0x0*[0-9a-fA-F]{1,8}|0b0*[01]{1,32})$")
    }
}

impl ToSchema for Number {}

impl PartialSchema for Capability {
    fn schema() -> RefOr<Schema> {
        text("^!?0*[0-9]{1,9}$")
    }
}

impl ToSchema for Capability {}

impl<const WIDTH: u32> PartialSchema for Bitmap<WIDTH> {
    fn schema() -> RefOr<Schema> {
        text(format!("^(0b)?_*([01x]_*){{1,{WIDTH}}}$"))
    }
}

impl<const WIDTH: u32> ToSchema for Bitmap<WIDTH> {
    fn name() -> Cow<'static, str> {
        format!("Bitmap{WIDTH}").into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"{
        "kvm_capabilities": ["171", "!172"],
        "cpuid_modifiers": [{
            "leaf": "0x7", "subleaf": "0b0", "flags": 1,
            "modifiers": [{ "register": "ebx", "bitmap": "0bx01xxxxxxxxxxxxxxxxxxxxxxxxxxx10" }]
        }],
        "msr_modifiers": [{ "addr": "0x10a", "bitmap": "0b1_x0" }]
    }"#;

    fn error(text: &str) -> String {
        serde_json::from_str::<CpuConfig>(text).unwrap_err().to_string()
    }

    #[test]
    fn firecrackers_format_is_read_and_written_back() {
        let config: CpuConfig = serde_json::from_str(FILE).unwrap();
        let registers = vec![(processor::Register::Ebx, Bits { mask: 0x6000_0003, value: 0x2000_0002 })];
        assert_eq!(
            config.template(),
            CpuTemplate {
                capabilities: vec![171],
                leaves: vec![LeafChange { leaf: 7, subleaf: 0, flags: 1, registers }],
                msrs: vec![MsrChange { index: 0x10a, bits: Bits { mask: 0b101, value: 0b100 } }],
            }
        );
        let written = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<CpuConfig>(&written).unwrap(), config);
        assert!(written.contains("\"!172\"") && written.contains("\"0bx01xx"), "{written}");
    }

    #[test]
    fn bits_of_a_wrong_length_or_kind_are_refused() {
        let cpuid = |bitmap: &str| {
            error(&format!(
                r#"{{"cpuid_modifiers": [{{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
                    "modifiers": [{{"register": "eax", "bitmap": "{bitmap}"}}]}}]}}"#
            ))
        };
        let msr = |bitmap: &str| {
            error(&format!(r#"{{"msr_modifiers": [{{"addr": "0x1", "bitmap": "{bitmap}"}}]}}"#))
        };
        assert!(cpuid(&format!("0b{}", "x".repeat(33))).contains("has more than 32 bits"));
        assert!(msr(&"1".repeat(65)).contains("has more than 64 bits"));
        assert!(cpuid("0b").contains("has no bits"));
        assert!(cpuid("0b012").contains("'2' in \"0b012\" is no bit"));
        assert!(msr("0bxü").contains("is no bit"));
        assert!("x".repeat(64).parse::<Bitmap<64>>().is_ok() && "0".repeat(32).parse::<Bitmap<32>>().is_ok());
    }

    #[test]
    fn what_is_no_number_register_or_field_is_named() {
        let cases = [
            (r#"{"msr_modifiers": [{"addr": "16", "bitmap": "1"}]}"#, "\"16\" is no number of 32 bits"),
            (r#"{"msr_modifiers": [{"addr": "0x1ffffffff", "bitmap": "1"}]}"#, "is no number of 32 bits"),
            (r#"{"msr_modifiers": [{"addr": "0x+1", "bitmap": "1"}]}"#, "is no number of 32 bits"),
            (r#"{"msr_modifiers": [{"addr": 16, "bitmap": "1"}]}"#, "invalid type: integer"),
            (r#"{"kvm_capabilities": ["!!1"]}"#, "\"!!1\" is no capability of KVM"),
            (r#"{"reg_modifiers": []}"#, "unknown field `reg_modifiers`"),
            (r#"{"cpuid_modifiers": [{"leaf": "0x1"}]}"#, "missing field `subleaf`"),
            ("[1]", "invalid type"),
        ];
        for (text, expected) in cases {
            let message = error(text);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn list_that_no_kvm_takes_is_refused() {
        let config = CpuConfig {
            msr_modifiers: vec![MsrModifier { addr: Number(1), bitmap: Bitmap(Bits::default()) }; 257],
            ..CpuConfig::default()
        };
        assert_eq!(config.check().unwrap_err().0, "msr_modifiers");
    }
}
