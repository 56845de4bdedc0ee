//! Moves the bytes of one file: resumes, retries, checks, and renames at the end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::{Progress, Reason};

/// How often a download may break without a byte having arrived.
const MAX_FRUITLESS_ATTEMPTS: u32 = 5;
const MAX_REDIRECTS: usize = 8;
const BUFFER_BYTES: usize = 1 << 18;

/// One file to fetch.
pub(super) struct Transfer<'a> {
    pub(super) agent: &'a ureq::Agent,
    pub(super) url: String,
    pub(super) token: Option<&'a str>,
    pub(super) endpoint: &'a str,
    pub(super) file_name: &'a str,
    pub(super) num_bytes: Option<u64>,
    pub(super) sha256: Option<&'a str>,
    pub(super) retry_delay: Duration,
}

/// What has arrived so far.
struct Partial {
    file: File,
    hasher: Sha256,
    len: u64,
}

impl Transfer<'_> {
    /// Fetches into `<blob>.incomplete`, checks, and renames to `blob`.
    pub(super) fn run(&self, blob: &Path, progress: &mut dyn Progress) -> Result<(), Reason> {
        let dir = blob.parent().expect("a blob has a directory");
        fs::create_dir_all(dir).map_err(Reason::write(dir))?;
        let path = blob.with_extension("incomplete");
        let mut partial = Partial::open(&path)?;
        if self.num_bytes.is_some_and(|num_bytes| num_bytes < partial.len) {
            partial.restart().map_err(Reason::write(&path))?;
        }
        progress.start(self.file_name, self.num_bytes.unwrap_or(0), partial.len);
        self.receive_all(&mut partial, &path, progress)?;
        if self.num_bytes.is_some_and(|num_bytes| num_bytes < partial.len) {
            discard(&path);
            return Err(Reason::TooLong { expected: self.num_bytes.unwrap_or(0) });
        }
        let found = hex(&partial.hasher.finalize());
        if let Some(expected) = self.sha256
            && expected != found
        {
            discard(&path);
            return Err(Reason::Digest { expected: expected.to_owned(), found });
        }
        partial.file.sync_all().map_err(Reason::write(&path))?;
        fs::rename(&path, blob).map_err(Reason::write(blob))?;
        progress.finish();
        Ok(())
    }

    fn receive_all(
        &self,
        partial: &mut Partial,
        path: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), Reason> {
        let mut num_fruitless = 0;
        loop {
            if self.num_bytes.is_some_and(|num_bytes| num_bytes <= partial.len) {
                return Ok(());
            }
            let before = partial.len;
            let cause = match self.receive(partial, path, progress) {
                Ok(()) if self.num_bytes.is_none() => return Ok(()),
                Ok(()) => "the connection was closed early".to_owned(),
                Err(Failure::Passing(cause)) => cause,
                Err(Failure::Final(reason)) => return Err(reason),
            };
            if self.num_bytes.is_some_and(|num_bytes| num_bytes <= partial.len) {
                return Ok(());
            }
            num_fruitless = if before < partial.len { 0 } else { num_fruitless + 1 };
            if MAX_FRUITLESS_ATTEMPTS <= num_fruitless {
                return Err(Reason::Interrupted { cause });
            }
            progress.note(&format!("{cause}; going on from byte {}", partial.len));
            std::thread::sleep(self.retry_delay * 2_u32.pow(num_fruitless));
        }
    }

    /// One request, as far as it goes.
    fn receive(
        &self,
        partial: &mut Partial,
        path: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), Failure> {
        let response = self.request(partial.len)?;
        let is_rest = response.status() == 206
            && response.header("Content-Range").and_then(range_start) == Some(partial.len);
        if !is_rest && 0 < partial.len {
            // The server cannot resume, or what is here is not a beginning of its file.
            partial.restart().map_err(|e| Failure::Final(Reason::write(path)(e)))?;
            progress.start(self.file_name, self.num_bytes.unwrap_or(0), 0);
        }
        if response.status() != 200 && !is_rest {
            return Err(Failure::Passing(format!("status {}", response.status())));
        }
        let mut reader = response.into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::Passing(one_line(&error.to_string()))),
            };
            partial.append(&buffer[..count]).map_err(|e| Failure::Final(Reason::write(path)(e)))?;
            progress.advance(count as u64);
            if self.num_bytes.is_some_and(|num_bytes| num_bytes < partial.len) {
                return Ok(());
            }
        }
    }

    /// Follows redirects itself, so that the token goes to the endpoint only.
    fn request(&self, start: u64) -> Result<ureq::Response, Failure> {
        let mut url = self.url.clone();
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.agent.get(&url).set("Accept-Encoding", "identity");
            if 0 < start {
                request = request.set("Range", &format!("bytes={start}-"));
            }
            if let Some(token) = self.token
                && origin(&url) == origin(self.endpoint)
            {
                request = request.set("Authorization", &format!("Bearer {token}"));
            }
            let response = match request.call() {
                Ok(response) | Err(ureq::Error::Status(_, response)) => response,
                Err(ureq::Error::Transport(error)) => {
                    return Err(Failure::Passing(cause(&error)));
                }
            };
            let status = response.status();
            match (status, response.header("Location")) {
                (300..400, Some(location)) => url = absolute(&url, location),
                // Too many requests, or the server's own trouble.
                (200..300 | 416 | 429 | 500..600, _) => return Ok(response),
                _ => {
                    let endpoint = origin(&url).to_owned();
                    return Err(Failure::Final(Reason::Status { endpoint, status }));
                }
            }
        }
        Err(Failure::Final(Reason::BadAnswer("too many redirects".to_owned())))
    }
}

/// Why one request ended early.
enum Failure {
    /// It is worth trying again.
    Passing(String),
    /// It is not.
    Final(Reason),
}

impl Partial {
    /// Opens what an earlier attempt left, and takes its bytes into the digest.
    fn open(path: &Path) -> Result<Self, Reason> {
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(path)
            .map_err(Reason::write(path))?;
        let mut hasher = Sha256::new();
        let len = io::copy(&mut file, &mut hasher).map_err(Reason::read(path))?;
        Ok(Self { file, hasher, len })
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.hasher = Sha256::new();
        self.len = 0;
        Ok(())
    }
}

/// Removes bytes that must not be resumed from. If that fails, the next digest fails as well.
fn discard(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(%error, path = %path.display(), "cannot remove damaged bytes");
    }
}

/// `bytes 5-9/10` starts at 5.
fn range_start(header: &str) -> Option<u64> {
    header.trim().strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Scheme, host and port of an address.
pub(super) fn origin(url: &str) -> &str {
    let host_start = url.find("://").map_or(0, |position| position + 3);
    let host_len = url[host_start..].find('/').unwrap_or(url.len() - host_start);
    &url[..host_start + host_len]
}

fn absolute(base: &str, location: &str) -> String {
    if location.starts_with('/') {
        format!("{}{location}", origin(base))
    } else {
        location.to_owned()
    }
}

/// What the network said, without the address.
pub(super) fn cause(error: &ureq::Transport) -> String {
    let parts = [Some(error.kind().to_string()), error.message().map(str::to_owned)];
    let source = std::error::Error::source(error).map(ToString::to_string);
    let parts: Vec<String> = parts.into_iter().chain([source]).flatten().collect();
    one_line(&parts.join(": "))
}

/// Messages of the network can span lines; ours do not.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}
