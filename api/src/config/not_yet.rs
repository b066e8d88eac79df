//! The sections that a Firecracker file may have and that nothing stands behind here yet.
//!
//! Firecracker's own files carry them empty (`"drives": []`, `"vsock": null`): such a section asks for nothing and is no
//! error. One with content is refused by its name, as a missing feature and not as a misspelling.

use std::fmt;

use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

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

macro_rules! refused {
    ($($field:ident: $section:literal),* $(,)?) => {
        $(
            pub(super) fn $field<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
                deserializer.deserialize_any(Nothing($section))
            }
        )*
    };
}

refused! {
    memory_hotplug: "memory-hotplug",
    pmem: "pmem",
}
