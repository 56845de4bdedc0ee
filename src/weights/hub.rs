//! Fetches model files from the Hugging Face hub, or a mirror of it, into its usual cache.
//!
//! The cache has the layout of other Hugging Face tools, so what they fetched is found and what
//! is fetched here is found by them:
//!
//! ```text
//! models--Org--Name/refs/main               the commit that "main" meant
//! models--Org--Name/blobs/<etag>            the bytes; <etag>.incomplete while they arrive
//! models--Org--Name/snapshots/<commit>/f    a link to the blob
//! ```
//!
//! **Invariant:** a blob gets its final name only after its size and, where known, its SHA-256
//! were checked. An interrupted download keeps its bytes and goes on where it ended.

mod cache;
mod error;
#[cfg(test)]
mod tests;
mod transfer;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

pub use error::{HubError, Reason};
use transfer::Transfer;

/// The branch whose files are fetched.
const REVISION: &str = "main";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Enough for the description of any repository.
const MAX_LISTING_BYTES: u64 = 32 << 20;
/// Repositories that were renamed answer with a redirect on the same host.
const MAX_MOVES: usize = 5;

/// How to reach the hub and where its files are kept.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// The cache: `$HF_HOME/hub`.
    pub cache_dir: PathBuf,
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// Sent to the endpoint only.
    pub token: Option<String>,
    /// Never use the network.
    pub offline: bool,
    /// The proxy to go through.
    pub proxy: Option<String>,
}

/// Shows how a download goes.
pub trait Progress {
    /// A file of so many bytes begins, of which some are already here.
    fn start(&mut self, file_name: &str, num_bytes: u64, num_bytes_done: u64);
    /// More bytes arrived.
    fn advance(&mut self, num_bytes: u64);
    /// Something the user should know, such as a retry.
    fn note(&mut self, text: &str);
    /// The file is complete and checked.
    fn finish(&mut self);
}

/// Shows nothing.
impl Progress for () {
    fn start(&mut self, _file_name: &str, _num_bytes: u64, _num_bytes_done: u64) {}
    fn advance(&mut self, _num_bytes: u64) {}
    fn note(&mut self, _text: &str) {}
    fn finish(&mut self) {}
}

/// A file of a repository.
#[derive(Clone, Copy, Debug)]
pub struct RemoteFile<'a> {
    /// The repository's id, `Org/Name`.
    pub repo: &'a str,
    /// The file's path in it.
    pub name: &'a str,
    /// The digest it must have, if known.
    pub sha256: Option<&'a str>,
}

/// The hub and its cache on this machine.
#[derive(Debug)]
pub struct Hub {
    config: HubConfig,
    agent: ureq::Agent,
    cache: hf_hub::Cache,
    retry_delay: Duration,
}

impl Hub {
    /// Prepares access; nothing is sent yet.
    pub fn new(config: HubConfig) -> Result<Self, HubError> {
        let mut builder = ureq::builder()
            .timeout_connect(CONNECT_TIMEOUT)
            .timeout_read(READ_TIMEOUT)
            .redirects(0)
            .user_agent(concat!("qwen-server/", env!("CARGO_PKG_VERSION")));
        if let Some(proxy) = &config.proxy {
            let proxy = ureq::Proxy::new(proxy).map_err(|_| HubError {
                what: "set up access to the hub".to_owned(),
                reason: Reason::BadProxy(proxy.clone()),
            })?;
            builder = builder.proxy(proxy);
        }
        let cache = hf_hub::Cache::new(config.cache_dir.clone());
        Ok(Self { config, agent: builder.build(), cache, retry_delay: Duration::from_secs(1) })
    }

    /// The configuration in use.
    pub fn config(&self) -> &HubConfig {
        &self.config
    }

    /// Where a file is, if it was fetched before.
    pub fn cached(&self, repo: &str, file_name: &str) -> Option<PathBuf> {
        if !is_repo_id(repo) || !is_safe_path(file_name) {
            return None;
        }
        cache::find(&self.cache, repo, file_name)
    }

    /// The directories of a repository that were fetched before, the current one first.
    pub fn snapshots(&self, repo: &str) -> Vec<PathBuf> {
        if is_repo_id(repo) { cache::snapshots(&self.cache, repo) } else { Vec::new() }
    }

    /// Where a file is, after fetching it if it is not here yet.
    pub fn fetch(
        &self,
        file: RemoteFile<'_>,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, HubError> {
        if let Some(path) = self.cached(file.repo, file.name) {
            return Ok(path);
        }
        self.download(file, progress).map_err(|reason| HubError {
            what: format!("fetch `{}` of `{}`", file.name, file.repo),
            reason,
        })
    }

    /// The names of all files of a repository.
    pub fn file_names(&self, repo: &str) -> Result<Vec<String>, HubError> {
        self.listing(repo)
            .map_err(|reason| HubError { what: format!("list the files of `{repo}`"), reason })
    }

    /// Puts a file from elsewhere into the cache, after checking its digest where one is known.
    pub fn install(
        &self,
        file: RemoteFile<'_>,
        revision: &str,
        source: &Path,
    ) -> Result<PathBuf, HubError> {
        let what = || format!("install {} as `{}` of `{}`", source.display(), file.name, file.repo);
        if !is_repo_id(file.repo) || !is_safe_path(file.name) || !is_safe_component(revision) {
            return Err(HubError { what: what(), reason: Reason::BadName });
        }
        cache::install(&self.cache, file, revision, source)
            .map_err(|reason| HubError { what: what(), reason })
    }

    fn download(
        &self,
        file: RemoteFile<'_>,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, Reason> {
        if !is_repo_id(file.repo) || !is_safe_path(file.name) {
            return Err(Reason::BadName);
        }
        if self.config.offline {
            return Err(Reason::Offline { cache_dir: self.config.cache_dir.clone() });
        }
        let metadata = self.metadata(file.repo, file.name)?;
        let sha256 = match (file.sha256, metadata.sha256()) {
            (Some(known), Some(served)) if known != served => {
                return Err(Reason::OtherFile {
                    known: known.to_owned(),
                    served: served.to_owned(),
                });
            }
            (Some(known), _) => Some(known.to_owned()),
            (None, served) => served.map(str::to_owned),
        };
        let blob = cache::blob_path(&self.cache, file.repo, &metadata.etag);
        let _lock = cache::lock(&self.cache, file.repo, &metadata.etag, progress)?;
        if !blob.is_file() {
            let transfer = Transfer {
                agent: &self.agent,
                url: self.file_url(file.repo, file.name),
                token: self.config.token.as_deref(),
                endpoint: &self.config.endpoint,
                file_name: file.name,
                num_bytes: metadata.num_bytes,
                sha256: sha256.as_deref(),
                retry_delay: self.retry_delay,
            };
            transfer.run(&blob, progress)?;
        }
        cache::link(&self.cache, file, &metadata.commit, &blob)
    }

    /// Asks where a file is and what it should be, without fetching it.
    fn metadata(&self, repo: &str, file_name: &str) -> Result<Metadata, Reason> {
        let mut url = self.file_url(repo, file_name);
        for _ in 0..MAX_MOVES {
            let request = self.agent.head(&url).set("Accept-Encoding", "identity");
            let response = self.call(request)?;
            let location = response.header("Location").filter(|l| l.starts_with('/'));
            let is_moved = (300..400).contains(&response.status());
            match location {
                Some(location) if is_moved && response.header("X-Linked-Etag").is_none() => {
                    url = format!("{}{location}", transfer::origin(&self.config.endpoint));
                }
                _ if response.status() < 400 => return Metadata::read(&response),
                _ => return Err(self.refusal(repo, file_name, &response)),
            }
        }
        Err(Reason::BadAnswer("too many redirects".to_owned()))
    }

    fn listing(&self, repo: &str) -> Result<Vec<String>, Reason> {
        #[derive(Deserialize)]
        struct Listing {
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        if !is_repo_id(repo) {
            return Err(Reason::BadName);
        }
        if self.config.offline {
            return Err(Reason::Offline { cache_dir: self.config.cache_dir.clone() });
        }
        let endpoint = &self.config.endpoint;
        let mut url = format!("{endpoint}/api/models/{repo}/revision/{REVISION}");
        for _ in 0..MAX_MOVES {
            let response = self.call(self.agent.get(&url))?;
            let location = response.header("Location").filter(|l| l.starts_with('/'));
            if let (Some(location), 300..400) = (location, response.status()) {
                url = format!("{}{location}", transfer::origin(endpoint));
                continue;
            }
            if response.status() != 200 {
                return Err(self.refusal(repo, "", &response));
            }
            let body = response.into_reader().take(MAX_LISTING_BYTES);
            let listing: Listing = serde_json::from_reader(body)
                .map_err(|error| Reason::BadAnswer(format!("the list of files: {error}")))?;
            return Ok(listing.siblings.into_iter().map(|sibling| sibling.rfilename).collect());
        }
        Err(Reason::BadAnswer("too many redirects".to_owned()))
    }

    /// Sends a request to the endpoint; any status is an answer.
    fn call(&self, request: ureq::Request) -> Result<ureq::Response, Reason> {
        let request = match &self.config.token {
            Some(token) => request.set("Authorization", &format!("Bearer {token}")),
            None => request,
        };
        match request.call() {
            Ok(response) | Err(ureq::Error::Status(_, response)) => Ok(response),
            Err(ureq::Error::Transport(error)) => Err(Reason::Unreachable {
                endpoint: self.config.endpoint.clone(),
                cause: transfer::cause(&error),
            }),
        }
    }

    fn refusal(&self, repo: &str, file_name: &str, response: &ureq::Response) -> Reason {
        let has_token = self.config.token.is_some();
        match (response.status(), response.header("X-Error-Code")) {
            (_, Some("GatedRepo")) | (403, _) => Reason::Gated { repo: repo.to_owned() },
            (401, _) => Reason::Unauthorized { repo: repo.to_owned(), has_token },
            (404, Some("EntryNotFound")) if !file_name.is_empty() => {
                let names = self.listing(repo).unwrap_or_default();
                Reason::NoSuchFile { available: gguf_names(&names) }
            }
            (404, _) => Reason::NotFound { endpoint: self.config.endpoint.clone() },
            (status, _) => Reason::Status { endpoint: self.config.endpoint.clone(), status },
        }
    }

    fn file_url(&self, repo: &str, file_name: &str) -> String {
        format!("{}/{repo}/resolve/{REVISION}/{file_name}", self.config.endpoint)
    }
}

/// What the hub says about a file.
#[derive(Debug)]
struct Metadata {
    commit: String,
    etag: String,
    num_bytes: Option<u64>,
}

impl Metadata {
    fn read(response: &ureq::Response) -> Result<Self, Reason> {
        let missing =
            |header: &str| Reason::BadAnswer(format!("its answer lacks the header {header}"));
        let etag = response
            .header("X-Linked-Etag")
            .or_else(|| response.header("ETag"))
            .ok_or_else(|| missing("ETag"))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        let commit = response.header("X-Repo-Commit").ok_or_else(|| missing("X-Repo-Commit"))?;
        // Both become parts of paths.
        if !is_safe_component(&etag) || !is_safe_component(commit) {
            return Err(Reason::BadAnswer("its headers are not a hub's".to_owned()));
        }
        let is_whole = response.status() == 200;
        let num_bytes = response
            .header("X-Linked-Size")
            .or_else(|| response.header("Content-Length").filter(|_| is_whole))
            .and_then(|size| size.parse().ok());
        Ok(Self { commit: commit.to_owned(), etag, num_bytes })
    }

    /// Large files' etag is their digest; other files have one of another length.
    fn sha256(&self) -> Option<&str> {
        let is_digest = self.etag.len() == 64
            && self.etag.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        is_digest.then_some(self.etag.as_str())
    }
}

/// Whether a text is `Org/Name`.
pub fn is_repo_id(text: &str) -> bool {
    text.split_once('/')
        .is_some_and(|(org, name)| is_safe_component(org) && is_safe_component(name))
}

/// Whether a text can be one part of a path or an address.
fn is_safe_component(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=128).contains(&text.len()) && text.bytes().all(is_plain) && !text.starts_with('.')
}

fn is_safe_path(text: &str) -> bool {
    text.split('/').all(is_safe_component)
}

fn gguf_names(names: &[String]) -> Vec<String> {
    let is_gguf = |name: &&String| {
        Path::new(name).extension().is_some_and(|found| found.eq_ignore_ascii_case("gguf"))
    };
    names.iter().filter(is_gguf).cloned().collect()
}
