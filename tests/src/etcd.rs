//! A real etcd, on addresses of this machine.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mirror::ids::{Guid, Term};
use mirror::witness::{Claim, Witness, WitnessAccess, WitnessAddress, WitnessError};
use rustix::process::{Pid, Signal, kill_process};

use crate::pair::PATIENCE;

/// How often it is looked whether a cluster answers.
const GLANCE: Duration = Duration::from_millis(10);

/// A cluster; its members are killed when it is dropped.
pub struct Cluster {
    members: Vec<Member>,
    access: WitnessAccess,
    folder: tempfile::TempDir,
}

struct Member {
    host: String,
    arguments: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
}

impl Cluster {
    /// Starts a cluster without TLS or users.
    ///
    /// # Panics
    /// If it does not come up within [`PATIENCE`].
    pub fn start(members: usize) -> Self {
        Self::start_with(members, |_, _| (Vec::new(), WitnessAccess::default()))
    }

    /// Starts a cluster. `how` is told a folder and the members' hosts, and gives flags for etcd and what it takes to
    /// reach it then.
    ///
    /// # Panics
    /// If it does not come up within [`PATIENCE`].
    pub fn start_with(
        members: usize,
        how: impl FnOnce(&Path, &[String]) -> (Vec<String>, WitnessAccess),
    ) -> Self {
        static CLUSTERS: AtomicU8 = AtomicU8::new(1);
        let folder = tempfile::tempdir().expect("a folder");
        // Each member has an address of its own, which nobody else takes in this process or another.
        let net = CLUSTERS.fetch_add(1, Ordering::Relaxed);
        let [high, low] = (std::process::id() as u16).to_be_bytes();
        let hosts: Vec<String> = (1..=members)
            .map(|member| format!("127.{}.{high}.{low}", usize::from(net) * 4 % 248 + member))
            .collect();
        let (flags, access) = how(folder.path(), &hosts);
        let scheme = if access.ca.is_some() { "https" } else { "http" };
        let initial: Vec<_> = hosts.iter().map(|host| format!("{host}=http://{host}:2380")).collect();
        let members = hosts.iter().map(|host| {
            let arguments = [
                ["--name", host].map(String::from),
                ["--data-dir".into(), folder.path().join(host).display().to_string()],
                ["--listen-client-urls".into(), format!("{scheme}://{host}:2379")],
                ["--advertise-client-urls".into(), format!("{scheme}://{host}:2379")],
                ["--listen-peer-urls".into(), format!("http://{host}:2380")],
                ["--initial-advertise-peer-urls".into(), format!("http://{host}:2380")],
                ["--initial-cluster".into(), initial.join(",")],
                ["--initial-cluster-token".into(), folder.path().display().to_string()],
            ];
            Member {
                host: host.clone(),
                arguments: arguments.into_iter().flatten().chain(flags.clone()).collect(),
                log: folder.path().join(format!("{host}.log")),
                child: None,
            }
        });
        let mut cluster = Self { members: members.collect(), access, folder };
        (0..cluster.members.len()).for_each(|member| cluster.restart(member));
        for member in 0..cluster.members.len() {
            let witness = cluster.member(member).open(&cluster.access).expect("usable files");
            until_some(|| witness.read(Guid::nil()).map_err(|error| cluster.explain(member, &error)).ok());
        }
        cluster
    }

    /// All members.
    ///
    /// # Panics
    /// Never.
    pub fn address(&self) -> WitnessAddress {
        self.members_from(0)
    }

    /// All members, this one first.
    ///
    /// # Panics
    /// Never.
    pub fn members_from(&self, first: usize) -> WitnessAddress {
        let mut endpoints: Vec<_> =
            self.members.iter().map(|member| format!("{}:2379", member.host)).collect();
        endpoints.rotate_left(first);
        format!("etcd:{}", endpoints.join(",")).parse().expect("an address")
    }

    /// One member.
    ///
    /// # Panics
    /// If there is none with this number.
    pub fn member(&self, member: usize) -> WitnessAddress {
        format!("etcd:{}:2379", self.members[member].host).parse().expect("an address")
    }

    /// What it takes to reach it.
    pub fn access(&self) -> &WitnessAccess {
        &self.access
    }

    /// The witness in it.
    ///
    /// # Panics
    /// If a file that it takes is gone.
    pub fn witness(&self) -> Arc<dyn Witness> {
        self.address().open(&self.access).expect("usable files")
    }

    /// A folder that is removed in the end.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Kills a member.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill(&mut self, member: usize) {
        let mut child = self.members[member].child.take().expect("it runs");
        child.kill().and_then(|()| child.wait()).expect("it is killed");
    }

    /// Starts a member that was killed; it has what it had.
    ///
    /// # Panics
    /// If etcd cannot be started.
    pub fn restart(&mut self, member: usize) {
        let Member { arguments, log, child, .. } = &mut self.members[member];
        let log = File::options().create(true).append(true).open(log).expect("a log");
        // It is not to survive a test that is killed.
        let started = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "etcd"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        *child = Some(started.expect("etcd starts (Debian's package etcd-server)"));
    }

    /// Sends a member `signal`.
    ///
    /// # Panics
    /// If it does not run.
    pub fn signal(&self, member: usize, signal: Signal) {
        let child = self.members[member].child.as_ref().expect("it runs");
        kill_process(Pid::from_child(child), signal).expect("it runs");
    }

    /// Runs etcdctl with the cluster's certificates, and gives what it says.
    ///
    /// # Panics
    /// If it fails.
    pub fn etcdctl(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("etcdctl");
        command.args(["--endpoints", &format!("{}:2379", self.members[0].host)]);
        for (flag, file) in
            [("--cacert", &self.access.ca), ("--cert", &self.access.cert), ("--key", &self.access.key)]
        {
            command.args(file.iter().flat_map(|file| [flag.into(), file.display().to_string()]));
        }
        let output = command.env("ETCDCTL_API", "3").args(arguments).output().expect("etcdctl starts");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "etcdctl {arguments:?}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn explain(&self, member: usize, error: &WitnessError) {
        let Member { child, log, host, .. } = &self.members[member];
        let ended = child.as_ref().is_none_or(|child| {
            std::fs::read_to_string(format!("/proc/{}/stat", child.id()))
                .is_ok_and(|stat| stat.contains(") Z "))
        });
        if ended {
            let log = std::fs::read_to_string(log).unwrap_or_default();
            panic!("etcd on {host} has ended ({error}); it said:\n{log}");
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.members.iter_mut().filter_map(|member| member.child.as_mut()) {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Tries until there is something.
///
/// # Panics
/// If there is nothing within [`PATIENCE`].
pub fn until_some<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(Instant::now() < until, "it does not come");
        thread::sleep(GLANCE);
    }
}

/// Claims as the two sides do: again, until there is an answer.
///
/// # Panics
/// If there is none within [`PATIENCE`], or an error that asking again does not mend.
pub fn claim(witness: &dyn Witness, guid: Guid, expected: Term, owner: &str) -> Claim {
    until_some(|| match witness.claim(guid, expected, owner) {
        Ok(claim) => Some(claim),
        Err(WitnessError::Unreachable { .. } | WitnessError::NoQuorum { .. }) => None,
        Err(error) => panic!("{error}"),
    })
}
