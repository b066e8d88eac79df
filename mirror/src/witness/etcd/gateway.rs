//! Questions to whichever member of etcd answers in time.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use ureq::Agent;

use super::access;
use super::protocol::{Answer, Authenticate, AuthenticateAnswer, Fault};
use crate::witness::error::{Tried, WitnessError};
use crate::witness::{WitnessAccess, WitnessAddress};

/// Longest answer that is read, in bytes: a record at its longest in base64, and what is around it.
const MAX_ANSWER: u64 = 128 << 10;

/// Longest part of a foreign answer that is repeated in an error, in characters.
const EXCERPT: usize = 80;

/// Codes of gRPC (`google.rpc.Code`).
mod code {
    pub(super) const INVALID_ARGUMENT: u32 = 3;
    pub(super) const PERMISSION_DENIED: u32 = 7;
    pub(super) const FAILED_PRECONDITION: u32 = 9;
    pub(super) const UNAVAILABLE: u32 = 14;
    pub(super) const UNAUTHENTICATED: u32 = 16;
}

/// When a question is given up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(Instant);

impl Deadline {
    pub(super) fn after(duration: Duration) -> Self {
        Self(Instant::now() + duration)
    }

    fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

/// The members of a cluster.
pub(super) struct Gateway {
    name: String,
    prefix: String,
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    endpoints: Vec<String>,
    /// The one that answered last: asked first.
    preferred: AtomicUsize,
    agent: Agent,
    login: Option<(String, PathBuf)>,
    timeout_ms: u32,
    state: Mutex<State>,
}

/// What was learnt from answers.
#[derive(Default)]
struct State {
    cluster: Option<u64>,
    token: Option<String>,
}

/// Why one endpoint gave no answer.
enum Failure {
    /// Another one may.
    Silent(String),
    /// It is there, but has no leader: another one may have.
    Leaderless(String),
    /// The token is not, or no longer, known.
    Stranger(String),
    /// No other one would.
    Denied(String),
    /// There are no users.
    NoUsers,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Gateway {
    pub(super) fn new(
        endpoints: &[String],
        prefix: &str,
        access: &WitnessAccess,
    ) -> Result<Self, WitnessError> {
        let name = WitnessAddress::Etcd { endpoints: endpoints.into(), prefix: prefix.into() }.to_string();
        let tls = access::tls(&name, access)?;
        let login = access.user.clone().zip(access.password_file.clone());
        if let Some((_, path)) = &login {
            access::password(&name, path)?;
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // Whoever stands between could answer for two witnesses.
            .proxy(None);
        if let Some(tls) = tls {
            config = config.tls_config(tls).https_only(true);
        }
        Ok(Self {
            name,
            prefix: prefix.into(),
            endpoints: endpoints.iter().map(|endpoint| format!("{scheme}://{endpoint}")).collect(),
            preferred: AtomicUsize::new(0),
            agent: config.build().new_agent(),
            login,
            timeout_ms: access.timeout_ms,
            state: Mutex::default(),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn timeout_ms(&self) -> u32 {
        self.timeout_ms
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks one endpoint after the other, each for its share of the time that is left.
    pub(super) fn ask<Q: Serialize, A: Answer>(
        &self,
        path: &str,
        question: &Q,
        until: Deadline,
    ) -> Result<A, WitnessError> {
        let count = self.endpoints.len();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut tried = Tried::default();
        let mut answered = false;
        for turn in 0..count {
            let index = (first + turn) % count;
            let endpoint = &self.endpoints[index];
            let share = Deadline::after(until.left() / (count - turn) as u32);
            let reason = match self.ask_as_user(endpoint, path, question, share) {
                Ok(answer) => {
                    self.check_cluster(endpoint, &answer)?;
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(Asked::Other(error)) => return Err(error),
                Err(Asked::Failed(Failure::Silent(reason))) => reason,
                Err(Asked::Failed(Failure::Leaderless(reason))) => {
                    answered = true;
                    reason
                }
                Err(Asked::Failed(Failure::Stranger(reason) | Failure::Denied(reason))) => {
                    let (witness, endpoint) = (self.name.clone(), endpoint.clone());
                    return Err(WitnessError::Denied {
                        witness,
                        endpoint,
                        reason,
                        prefix: self.prefix.clone(),
                    });
                }
                Err(Asked::Failed(Failure::NoUsers)) => "it has no users".into(),
            };
            tried.0.push((endpoint.clone(), reason));
        }
        let witness = self.name.clone();
        Err(if answered {
            WitnessError::NoQuorum { witness, tried }
        } else {
            WitnessError::Unreachable { witness, within_ms: self.timeout_ms, tried }
        })
    }

    /// As the user that was configured, who logs in first, and once more if the token is out of date.
    fn ask_as_user<Q: Serialize, A: Answer>(
        &self,
        endpoint: &str,
        path: &str,
        question: &Q,
        until: Deadline,
    ) -> Result<A, Asked> {
        let Some((user, password_file)) = &self.login else {
            return Ok(self.post(endpoint, path, question, None, until)?);
        };
        let known = self.state().token.clone();
        if known.is_some() {
            match self.post(endpoint, path, question, known.as_deref(), until) {
                Err(Failure::Stranger(_)) => self.state().token = None,
                other => return Ok(other?),
            }
        }
        let password = access::password(&self.name, password_file).map_err(Asked::Other)?;
        let credentials = Authenticate { name: user, password: &password };
        let token = match self.post(endpoint, "auth/authenticate", &credentials, None, until) {
            Ok(answer) => {
                self.check_cluster(endpoint, &answer).map_err(Asked::Other)?;
                let AuthenticateAnswer { token, .. } = answer;
                self.state().token = Some(token.clone());
                Some(token)
            }
            // Whoever asks for no password is not to be shut out.
            Err(Failure::NoUsers) => None,
            Err(failure) => return Err(failure.into()),
        };
        Ok(self.post(endpoint, path, question, token.as_deref(), until)?)
    }

    fn post<Q: Serialize, A: Answer>(
        &self,
        endpoint: &str,
        path: &str,
        question: &Q,
        token: Option<&str>,
        until: Deadline,
    ) -> Result<A, Failure> {
        let left = until.left();
        if left.is_zero() {
            return Err(Failure::Silent("the time was over".into()));
        }
        let body = serde_json::to_vec(question).map_err(|error| Failure::Silent(error.to_string()))?;
        let explain = |error: &ureq::Error| {
            Failure::Silent(match error {
                ureq::Error::Timeout(_) => format!("no answer within {} ms", left.as_millis()),
                // How TLS 1.3 ends for whom the other side does not know: after the handshake, without a word.
                ureq::Error::Io(error) if endpoint.starts_with("https") && is_hang_up(error.kind()) => {
                    format!("{error}; does it take this side's certificate?")
                }
                other => other.to_string(),
            })
        };
        let mut request = self
            .agent
            .post(format!("{endpoint}/v3/{path}"))
            .config()
            .timeout_global(Some(left))
            .build()
            .content_type("application/json")
            // A member without a leader says so at once, instead of waiting for one.
            .header("Grpc-Metadata-hasleader", "true");
        if let Some(token) = token {
            request = request.header("Authorization", token);
        }
        let mut response = request.send(&body).map_err(|error| explain(&error))?;
        let bytes = response.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
        let bytes = bytes.map_err(|error| explain(&error))?;
        let status = response.status();
        if status.is_success() {
            return serde_json::from_slice(&bytes)
                .map_err(|error| Failure::Silent(format!("its answer is not etcd's: {error}")));
        }
        Err(refusal(status.as_u16(), &bytes))
    }

    /// Two clusters would be two witnesses.
    fn check_cluster(&self, endpoint: &str, answer: &impl Answer) -> Result<(), WitnessError> {
        let theirs = answer.header().cluster_id;
        let ours = *self.state().cluster.get_or_insert(theirs);
        if ours == theirs {
            return Ok(());
        }
        let (witness, endpoint) = (self.name.clone(), endpoint.into());
        Err(WitnessError::OtherCluster { witness, endpoint, theirs, ours })
    }
}

/// What an answer other than success says.
fn refusal(status: u16, body: &[u8]) -> Failure {
    if let Ok(fault) = serde_json::from_slice::<Fault>(body) {
        return fault.into();
    }
    let text: String = String::from_utf8_lossy(body).trim().chars().take(EXCERPT).collect();
    if text.starts_with("CommonName of client") {
        // It is afraid of being taken to have let that name in.
        let reason =
            "where it has users, a certificate that is shown to its gateway must have no common name";
        return Failure::Denied(reason.into());
    }
    Failure::Silent(format!("its answer is not etcd's: status {status}, {text:?}"))
}

fn is_hang_up(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

/// Why [`Gateway::ask_as_user`] has no answer.
enum Asked {
    Failed(Failure),
    Other(WitnessError),
}

impl From<Failure> for Asked {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Fault> for Failure {
    fn from(Fault { code, message }: Fault) -> Self {
        match code {
            code::UNAVAILABLE => Self::Leaderless(message),
            code::UNAUTHENTICATED => Self::Stranger(message),
            code::INVALID_ARGUMENT if message.contains("revision of auth store is old") => {
                Self::Stranger(message)
            }
            code::INVALID_ARGUMENT
                if ["authentication failed", "user name is empty"]
                    .iter()
                    .any(|words| message.contains(words)) =>
            {
                Self::Denied(message)
            }
            code::PERMISSION_DENIED => Self::Denied(message),
            code::FAILED_PRECONDITION if message.contains("authentication is not enabled") => Self::NoUsers,
            _ => Self::Silent(format!("{message} (code {code})")),
        }
    }
}
