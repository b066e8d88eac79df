//! Where and how to mirror a guest.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use mirror::ids::Guid;
use mirror::link::Address;
use mirror::primary::{Alone, Pacing, Settings};
use mirror::witness::{Witness, WitnessAccess, WitnessAddress, WitnessError};
use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Schema, Type};

use super::BadValue;

/// What addresses look like.
const ADDRESS: &str = "^(unix:.+|tcp:.+:[0-9]{1,5})$";

/// Most addresses of standbys.
const MAX_STANDBYS: usize = 16;

/// Where and how to mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorSection {
    /// Where the standby listens; several are tried in turn, until one takes the guest.
    #[schema(schema_with = Standbys::schema)]
    pub standby: Standbys,
    /// How many of the standbys mirror the guest at the same time, if they are to be had.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 16)]
    pub standbys_at_once: u32,
    /// How many of several standbys are to acknowledge an epoch before those that lag behind by more than the missed signs
    /// of life are done without; all of them, if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16)]
    pub standbys_needed: Option<u32>,
    /// Where this side waits as a standby once another side runs the guest: `unix:PATH` or `tcp:HOST:PORT`; without it, it
    /// ends then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, pattern = "^(unix:.+|tcp:.+:[0-9]{1,5})$")]
    pub listen: Option<Address>,
    /// Where it hears its primary besides, then: an address that the primary can reach, on another network than `listen` at
    /// best. A primary that is heard there is not lost when only the mirror's link is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, pattern = "^(unix:.+|tcp:.+:[0-9]{1,5})$")]
    pub second_listen: Option<Address>,
    /// What becomes of a guest whose standby is lost.
    #[serde(default)]
    pub standby_lost: StandbyLost,
    /// The witness: a file on storage that both sides share, or `etcd:HOST:PORT,HOST:PORT[/prefix]`; without it there is
    /// no automatic failover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub witness: Option<WitnessAddress>,
    /// What it takes to reach etcd, beside its address.
    #[serde(default, skip_serializing_if = "is_default")]
    pub witness_access: WitnessAccess,
    /// Names the guest to standby and witness; without it a new one is made at each start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = "uuid")]
    pub guid: Option<Guid>,
    /// How long the guest runs before it is mirrored. 0: it is mirrored from its first instruction on, and does not run
    /// if it cannot be; otherwise it runs on, unprotected, if it cannot be.
    #[serde(default)]
    #[schema(maximum = 4_294_967_295_u32)]
    pub delay_ms: u32,
    /// Longest time between two epochs: so long they last while nobody outside waits.
    #[serde(default = "interval_ms")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub interval_ms: u32,
    /// Shortest time between two epochs: output that waits ends them early, but not before the guest has run four times as
    /// long as a pause takes. The same as `interval_ms`: all last just as long.
    #[serde(default = "min_interval_ms")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub min_interval_ms: u32,
    /// What the final pause of seeding may cost.
    #[serde(default = "pause_budget_ms")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub pause_budget_ms: u32,
    /// Dirty pages that end an epoch early.
    #[serde(default = "dirty_budget_pages")]
    #[schema(minimum = 1)]
    pub dirty_budget_pages: u64,
    /// Time between two signs of life.
    #[serde(default = "heartbeat_ms")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub heartbeat_ms: u32,
    /// Missed signs of life after which the other side counts as lost.
    #[serde(default = "heartbeat_misses")]
    #[schema(minimum = 1, maximum = 1000)]
    pub heartbeat_misses: u32,
    /// Time beyond `interval_ms` for which epochs may stand still before the primary counts as lost although it is heard of.
    #[serde(default = "stall_ms")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub stall_ms: u32,
    /// Room for pages copied aside in a pause.
    #[serde(default = "staging_mib")]
    #[schema(minimum = 1, maximum = 65_536)]
    pub staging_mib: u32,
    /// Whether to wait in the standby's queue if it has no space now.
    #[serde(default)]
    pub wait_for_space: bool,
}

/// One or several addresses: `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Standbys {
    /// One.
    One(Address),
    /// Several, the one that is tried first before the others.
    Several(Vec<Address>),
}

impl Standbys {
    /// All of them.
    pub fn all(&self) -> &[Address] {
        match self {
            Self::One(address) => std::slice::from_ref(address),
            Self::Several(addresses) => addresses,
        }
    }

    fn schema() -> Schema {
        let address = || ObjectBuilder::new().schema_type(Type::String).pattern(Some(ADDRESS));
        let several = ArrayBuilder::new().items(address()).min_items(Some(1)).max_items(Some(MAX_STANDBYS));
        OneOfBuilder::new()
            .item(address())
            .item(several)
            .description(Some(
                "Where the standby listens; several are tried in turn, until one takes the guest.",
            ))
            .build()
            .into()
    }
}

/// By hand: what is wrong with an address is to be told.
impl<'de> Deserialize<'de> for Standbys {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct OneOrSeveral;

        impl<'de> Visitor<'de> for OneOrSeveral {
            type Value = Standbys;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the address of a standby, or a list of some")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Standbys, E> {
                text.parse().map(Standbys::One).map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Standbys, A::Error> {
                Deserialize::deserialize(SeqAccessDeserializer::new(list)).map(Standbys::Several)
            }
        }

        from.deserialize_any(OneOrSeveral)
    }
}

impl From<Address> for Standbys {
    fn from(address: Address) -> Self {
        Self::One(address)
    }
}

impl From<Vec<Address>> for Standbys {
    fn from(mut addresses: Vec<Address>) -> Self {
        match addresses.pop() {
            Some(only) if addresses.is_empty() => Self::One(only),
            last => {
                addresses.extend(last);
                Self::Several(addresses)
            }
        }
    }
}

impl fmt::Display for Standbys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.all().iter().map(Address::to_string).collect();
        f.write_str(&all.join(", "))
    }
}

/// What becomes of a guest whose standby is lost, and which the witness says is this side's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum StandbyLost {
    /// It goes on alone, without protection, until a standby takes it
    #[default]
    Solo,
    /// It stands still, and what it has said since the last epoch is held, until a standby takes it or an operator has it go on
    Freeze,
}

impl MirrorSection {
    /// Mirrors to `standby`, all else as by default.
    pub fn to(standby: impl Into<Standbys>) -> Self {
        Self {
            standby: standby.into(),
            standbys_at_once: one(),
            standbys_needed: None,
            listen: None,
            second_listen: None,
            standby_lost: StandbyLost::default(),
            witness: None,
            witness_access: WitnessAccess::default(),
            guid: None,
            delay_ms: 0,
            interval_ms: interval_ms(),
            min_interval_ms: min_interval_ms(),
            pause_budget_ms: pause_budget_ms(),
            dirty_budget_pages: dirty_budget_pages(),
            heartbeat_ms: heartbeat_ms(),
            heartbeat_misses: heartbeat_misses(),
            stall_ms: stall_ms(),
            staging_mib: staging_mib(),
            wait_for_space: false,
        }
    }
}

impl MirrorSection {
    pub(crate) fn check(&self) -> Result<(), BadValue> {
        let positive = [
            ("mirror.interval_ms", self.interval_ms),
            ("mirror.min_interval_ms", self.min_interval_ms),
            ("mirror.pause_budget_ms", self.pause_budget_ms),
            ("mirror.heartbeat_ms", self.heartbeat_ms),
            ("mirror.stall_ms", self.stall_ms),
        ];
        if let Some((field, value)) = positive.into_iter().find(|(_, value)| !(1..=60_000).contains(value)) {
            return Err((field, format!("{value} is out of range; give 1 to 60000 ms")));
        }
        if self.min_interval_ms > self.interval_ms {
            let reason = format!(
                "{} is more than interval_ms, which is {}; give less, or raise interval_ms",
                self.min_interval_ms, self.interval_ms
            );
            return Err(("mirror.min_interval_ms", reason));
        }
        if !(1..=1000).contains(&self.heartbeat_misses) {
            let reason = format!("{} is out of range; give 1 to 1000", self.heartbeat_misses);
            return Err(("mirror.heartbeat_misses", reason));
        }
        if !(1..=MAX_STANDBYS).contains(&self.standby.all().len()) {
            let reason = format!("{} addresses; give 1 to {MAX_STANDBYS}", self.standby.all().len());
            return Err(("mirror.standby", reason));
        }
        let named = self.standby.all().len();
        if !(1..=named).contains(&(self.standbys_at_once as usize)) {
            let reason =
                format!("{} is out of range; {named} are named, give 1 to {named}", self.standbys_at_once);
            return Err(("mirror.standbys_at_once", reason));
        }
        if let Some(needed) = self.standbys_needed
            && !(1..=self.standbys_at_once).contains(&needed)
        {
            let most = self.standbys_at_once;
            let reason =
                format!("{needed} is out of range; give 1 to {most}, as many as mirror the guest at once");
            return Err(("mirror.standbys_needed", reason));
        }
        if let Some(listen) = self.listen.as_ref().filter(|listen| self.standby.all().contains(listen)) {
            let reason = format!("{listen} is a standby's, too; give this side an address of its own");
            return Err(("mirror.listen", reason));
        }
        self.check_second_listen().map_err(|reason| ("mirror.second_listen", reason))?;
        if self.dirty_budget_pages == 0 {
            return Err(("mirror.dirty_budget_pages", "0 is out of range; give at least 1 page".into()));
        }
        if !(1..=65_536).contains(&self.staging_mib) {
            return Err((
                "mirror.staging_mib",
                format!("{} is out of range; give 1 to 65536 MiB", self.staging_mib),
            ));
        }
        match &self.witness {
            Some(witness) => {
                witness.check(&self.witness_access).map_err(|reason| ("mirror.witness_access", reason))?;
            }
            None if is_default(&self.witness_access) => {}
            None => {
                return Err((
                    "mirror.witness_access",
                    "there is no witness; give it, or leave this out".into(),
                ));
            }
        }
        Ok(())
    }

    fn check_second_listen(&self) -> Result<(), String> {
        let Some(second) = &self.second_listen else { return Ok(()) };
        match &self.listen {
            None => Err("this side waits for no guest; give listen, too, or leave this out".into()),
            Some(listen) if second == listen => {
                Err(format!("{second} is where the mirror's link is; give another address"))
            }
            Some(_) if second.is_wildcard() => {
                Err(format!("a primary cannot connect to {second}; name one of this host's addresses"))
            }
            Some(_) => Ok(()),
        }
    }

    /// The settings of the mirror.
    pub fn settings(&self) -> Settings {
        Settings {
            heartbeat: Duration::from_millis(self.heartbeat_ms.into()),
            misses: self.heartbeat_misses,
            stall: Duration::from_millis(self.stall_ms.into()),
            pacing: self.pacing(),
            wait_for_space: self.wait_for_space,
            has_witness: self.witness.is_some(),
            alone: match self.standby_lost {
                StandbyLost::Solo => Alone::Solo,
                StandbyLost::Freeze => Alone::Suspended,
            },
            suspended: false,
            standbys: self.standbys_at_once,
            quorum: self.standbys_needed,
        }
    }

    /// The witness, if there is one.
    ///
    /// # Errors
    /// [`WitnessError`]: a file that it takes cannot be used.
    pub fn open_witness(&self) -> Result<Option<Arc<dyn Witness>>, WitnessError> {
        self.witness.as_ref().map(|witness| witness.open(&self.witness_access)).transpose()
    }

    /// When epochs end.
    pub fn pacing(&self) -> Pacing {
        Pacing {
            interval: Duration::from_millis(self.interval_ms.into()),
            min_interval: Duration::from_millis(self.min_interval_ms.into()),
            pause_budget: Duration::from_millis(self.pause_budget_ms.into()),
            dirty_budget: self.dirty_budget_pages,
        }
    }

    /// Room for pages copied aside in a pause, in pages.
    pub fn staging_pages(&self) -> usize {
        self.staging_mib as usize * ((1 << 20) / mirror::memory::PAGE_SIZE)
    }
}

/// What is to be otherwise while a guest is mirrored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorUpdate {
    /// Longest time between two epochs, 1 to 60000 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub interval_ms: Option<u32>,
    /// Shortest time between two epochs, 1 to 60000 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub min_interval_ms: Option<u32>,
    /// What the final pause of seeding may cost, 1 to 60000 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub pause_budget_ms: Option<u32>,
    /// Dirty pages that end an epoch early, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub dirty_budget_pages: Option<u64>,
}

impl MirrorUpdate {
    /// Changes `section`.
    ///
    /// # Errors
    /// What would be wrong with it then; it has not changed.
    pub fn apply(&self, section: &mut MirrorSection) -> Result<(), BadValue> {
        let next = MirrorSection {
            interval_ms: self.interval_ms.unwrap_or(section.interval_ms),
            min_interval_ms: self.min_interval_ms.unwrap_or(section.min_interval_ms),
            pause_budget_ms: self.pause_budget_ms.unwrap_or(section.pause_budget_ms),
            dirty_budget_pages: self.dirty_budget_pages.unwrap_or(section.dirty_budget_pages),
            ..section.clone()
        };
        next.check()?;
        *section = next;
        Ok(())
    }
}

fn is_default(access: &WitnessAccess) -> bool {
    *access == WitnessAccess::default()
}

// The defaults are those of the mirror itself, told here in the file's units.

fn interval_ms() -> u32 {
    Pacing::default().interval.as_millis() as u32
}

fn min_interval_ms() -> u32 {
    Pacing::default().min_interval.as_millis() as u32
}

fn pause_budget_ms() -> u32 {
    Pacing::default().pause_budget.as_millis() as u32
}

fn dirty_budget_pages() -> u64 {
    Pacing::default().dirty_budget
}

fn one() -> u32 {
    1
}

fn heartbeat_ms() -> u32 {
    Settings::default().heartbeat.as_millis() as u32
}

fn heartbeat_misses() -> u32 {
    Settings::default().misses
}

fn stall_ms() -> u32 {
    Settings::default().stall.as_millis() as u32
}

fn staging_mib() -> u32 {
    64
}
