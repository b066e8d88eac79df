//! What the command line asks the guest to do.

use super::Content;

/// Most vCPUs that the guest programs are built for.
pub const MAX_CPUS: u32 = 32;
/// Highest rate accepted by `count.rate=` and `dirty.rate=`, per second.
const MAX_RATE: u64 = 100_000_000;
/// Largest `dirty.set=`, in MiB: 1 TiB.
const MAX_SET_MIB: u64 = 1 << 20;
/// Longest `net.spin=`, in microseconds: a second.
const MAX_SPIN_US: u64 = 1_000_000;

/// A key of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// `workload=count,dirty,verify`: any subset.
    Workload,
    /// `cpus=N`: vCPUs to use, 1 to [`MAX_CPUS`].
    Cpus,
    /// `count.rate=N`: `count` lines per second on each vCPU.
    CountRate,
    /// `count.limit=N`: exit after so many lines on vCPU 0.
    CountLimit,
    /// `dirty.rate=N`: pages written per second, all vCPUs together.
    DirtyRate,
    /// `dirty.set=MIB`: size of the working set, all vCPUs together.
    DirtySet,
    /// `dirty.pattern=seq|random|hotcold`.
    DirtyPattern,
    /// `dirty.content=zero|const|text|random`.
    DirtyContent,
    /// `seed=N`: starts the counters and the choice of pages elsewhere.
    Seed,
    /// `net.ip=A.B.C.D/N`: serves TCP on the first network card, at this address.
    NetIp,
    /// `net.port=N`: at this port.
    NetPort,
    /// `net.spin=US`: polls so long after the last request before it waits for an interrupt.
    NetSpin,
}

impl Key {
    const ALL: [Self; 12] = [
        Self::Workload,
        Self::Cpus,
        Self::CountRate,
        Self::CountLimit,
        Self::DirtyRate,
        Self::DirtySet,
        Self::DirtyPattern,
        Self::DirtyContent,
        Self::Seed,
        Self::NetIp,
        Self::NetPort,
        Self::NetSpin,
    ];

    /// The key as it is written on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Workload => "workload",
            Self::Cpus => "cpus",
            Self::CountRate => "count.rate",
            Self::CountLimit => "count.limit",
            Self::DirtyRate => "dirty.rate",
            Self::DirtySet => "dirty.set",
            Self::DirtyPattern => "dirty.pattern",
            Self::DirtyContent => "dirty.content",
            Self::Seed => "seed",
            Self::NetIp => "net.ip",
            Self::NetPort => "net.port",
            Self::NetSpin => "net.spin",
        }
    }

    /// The key with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|key| key.name() == name)
    }
}

/// In which order pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other, round and round.
    Sequential,
    /// Any page, equally likely.
    Random,
    /// Nine writes in ten go to the first tenth of the pages.
    HotCold,
}

/// An IPv4 address and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// As it is written, first byte first.
    pub bytes: [u8; 4],
    /// 0 to 32.
    pub prefix: u8,
}

impl Address {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let mut parts = address.split('.');
        let mut bytes = [0; 4];
        for byte in &mut bytes {
            *byte = number(parts.next()?, 0, 255)? as u8;
        }
        let prefix = number(prefix, 0, 32)? as u8;
        parts.next().is_none().then_some(Self { bytes, prefix })
    }
}

/// The value of this key cannot be honoured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadParameter(pub Key);

/// What a guest was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Print `count` lines.
    pub count: bool,
    /// Write pages.
    pub dirty: bool,
    /// Walk all pages and check each.
    pub verify: bool,
    /// vCPUs to use.
    pub cpus: u32,
    /// `count` lines per second on each vCPU.
    pub count_rate: u64,
    /// Exit after so many `count` lines on vCPU 0.
    pub count_limit: Option<u64>,
    /// Pages written per second, all vCPUs together.
    pub dirty_rate: u64,
    /// Working set of all vCPUs together in MiB; without it, most of the memory.
    pub dirty_set_mib: Option<u64>,
    /// In which order pages are written.
    pub pattern: Pattern,
    /// What they are filled with.
    pub content: Content,
    /// Starts the counters and the choice of pages elsewhere.
    pub seed: u64,
    /// Serve TCP at this address.
    pub net_ip: Option<Address>,
    /// And this port.
    pub net_port: u16,
    /// How long the service polls after its last request, in microseconds.
    pub net_spin_us: u64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            count: true,
            dirty: false,
            verify: false,
            cpus: 1,
            count_rate: 50,
            count_limit: None,
            dirty_rate: 1000,
            dirty_set_mib: None,
            pattern: Pattern::Random,
            content: Content::Random,
            seed: 0,
            net_ip: None,
            net_port: 7000,
            net_spin_us: 50,
        }
    }
}

impl Params {
    /// Reads a kernel command line: words divided by white space, `key=value`; unknown words are not for us.
    ///
    /// # Errors
    /// [`BadParameter`] names the first known key whose value is malformed or out of range.
    pub fn parse(command_line: &str) -> Result<Self, BadParameter> {
        let mut params = Self::default();
        for word in command_line.split_ascii_whitespace() {
            let Some((name, value)) = word.split_once('=') else { continue };
            let Some(key) = Key::from_name(name) else { continue };
            params.set(key, value).ok_or(BadParameter(key))?;
        }
        Ok(params)
    }

    /// Whether the guest keeps a working set at all.
    #[must_use]
    pub const fn has_working_set(&self) -> bool {
        self.dirty || self.verify
    }

    fn set(&mut self, key: Key, value: &str) -> Option<()> {
        match key {
            Key::Workload => self.set_workload(value)?,
            Key::Cpus => self.cpus = number(value, 1, u64::from(MAX_CPUS))? as u32,
            Key::CountRate => self.count_rate = number(value, 1, MAX_RATE)?,
            Key::CountLimit => self.count_limit = Some(number(value, 1, u64::MAX)?),
            Key::DirtyRate => self.dirty_rate = number(value, 0, MAX_RATE)?,
            Key::DirtySet => self.dirty_set_mib = Some(number(value, 1, MAX_SET_MIB)?),
            Key::DirtyPattern => {
                self.pattern = match value {
                    "seq" => Pattern::Sequential,
                    "random" => Pattern::Random,
                    "hotcold" => Pattern::HotCold,
                    _ => return None,
                }
            }
            Key::DirtyContent => {
                self.content = match value {
                    "zero" => Content::Zero,
                    "const" => Content::Const,
                    "text" => Content::Text,
                    "random" => Content::Random,
                    _ => return None,
                }
            }
            Key::Seed => self.seed = number(value, 0, u64::MAX)?,
            Key::NetIp => self.net_ip = Some(Address::parse(value)?),
            Key::NetPort => self.net_port = number(value, 1, u64::from(u16::MAX))? as u16,
            Key::NetSpin => self.net_spin_us = number(value, 0, MAX_SPIN_US)?,
        }
        Some(())
    }

    fn set_workload(&mut self, value: &str) -> Option<()> {
        (self.count, self.dirty, self.verify) = (false, false, false);
        for name in value.split(',') {
            match name {
                "count" => self.count = true,
                "dirty" => self.dirty = true,
                "verify" => self.verify = true,
                _ => return None,
            }
        }
        Some(())
    }
}

/// A decimal number without sign, within `least..=most`.
fn number(text: &str, least: u64, most: u64) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|value| (least..=most).contains(value))
}
