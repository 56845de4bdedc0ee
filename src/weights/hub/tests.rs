//! Goal: what arrives is exact, resumed, checked and found by other tools; what cannot arrive is
//! explained. Method: a hub in miniature on a local port that can cut, damage and refuse.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use super::*;

const REPO: &str = "Qwen/Tiny-GGUF";
const FILE: &str = "tiny-q4_k_m.gguf";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the hub in miniature misbehaves.
#[derive(Clone, Default)]
struct Behaviour {
    /// Cut each answer after this many bytes of the file.
    cut_after: Option<usize>,
    /// Serve other bytes than the digest says.
    is_damaged: bool,
    /// Answer every request for the file with this status and error code.
    refuse: Option<(u16, &'static str)>,
    /// Ignore `Range`.
    ignores_ranges: bool,
}

struct FakeHub {
    address: String,
    /// Method, path, range and authorization of each request.
    requests: Arc<Mutex<Vec<String>>>,
}

fn content() -> Vec<u8> {
    (0..50_000_u32).flat_map(|i| (i.wrapping_mul(2_654_435_761)).to_le_bytes()).collect()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    transfer::hex(&sha2::Sha256::digest(bytes))
}

impl FakeHub {
    fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that went away is no trouble of the hub's.
                let _ = stream.and_then(|stream| answer(&stream, &behaviour, &log));
            }
        });
        Self { address, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn answer(
    stream: &TcpStream,
    behaviour: &Behaviour,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let path = words.next().unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let range = headers.get("range").cloned().unwrap_or_default();
    let token = headers.get("authorization").cloned().unwrap_or_default();
    log.lock().unwrap().push(format!("{method} {path} {range} {token}"));
    let mut out = stream;
    let resolve = format!("/{REPO}/resolve/main/{FILE}");
    if path.starts_with("/api/models/") {
        let body = format!(r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"{FILE}"}}]}}"#);
        return write!(
            out,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    if path == resolve
        && let Some((status, code)) = behaviour.refuse
    {
        return write!(
            out,
            "HTTP/1.1 {status} No\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    if path == resolve {
        let (etag, size) = (sha256(&content()), content().len());
        return write!(
            out,
            "HTTP/1.1 302 Found\r\nLocation: /cdn/{FILE}?signed\r\nX-Repo-Commit: {COMMIT}\r\n\
             X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\nContent-Length: 0\r\n\
             Connection: close\r\n\r\n"
        );
    }
    if path != format!("/cdn/{FILE}?signed") {
        return write!(
            out,
            "HTTP/1.1 404 No\r\nX-Error-Code: EntryNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    }
    let mut bytes = content();
    if behaviour.is_damaged {
        bytes[100] ^= 1;
    }
    let start = range.strip_prefix("bytes=").and_then(|r| r.trim_end_matches('-').parse().ok());
    let start = start.filter(|_| !behaviour.ignores_ranges).unwrap_or(0_usize);
    let status = if start == 0 { "200 OK" } else { "206 Partial Content" };
    let total = bytes.len();
    write!(
        out,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{total}\r\n\
         Connection: close\r\n\r\n",
        total - start,
        total - 1
    )?;
    let end = behaviour.cut_after.map_or(total, |cut| total.min(start + cut));
    out.write_all(&bytes[start..end])
}

fn hub(endpoint: &str, cache: &TempDir) -> Hub {
    let mut hub = Hub::new(HubConfig {
        cache_dir: cache.path().join("hub"),
        endpoint: endpoint.to_owned(),
        token: Some("secret".to_owned()),
        offline: false,
        proxy: None,
    })
    .unwrap();
    hub.retry_delay = Duration::from_millis(1);
    hub
}

fn file(sha256: Option<&str>) -> RemoteFile<'_> {
    RemoteFile { repo: REPO, name: FILE, sha256 }
}

fn incomplete(cache: &TempDir) -> PathBuf {
    let blobs = cache.path().join("hub/models--Qwen--Tiny-GGUF/blobs");
    blobs.join(format!("{}.incomplete", sha256(&content())))
}

/// The bytes arrive, the layout is the usual one, and the second time needs no network.
#[test]
fn a_file_is_fetched_once() {
    let fake = FakeHub::start(Behaviour::default());
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(&fake.address, &cache);
    assert_eq!(hub.cached(REPO, FILE), None);
    let path = hub.fetch(file(None), &mut ()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), content());
    let repo_dir = cache.path().join("hub/models--Qwen--Tiny-GGUF");
    assert_eq!(path, repo_dir.join("snapshots").join(COMMIT).join(FILE));
    assert_eq!(
        std::fs::read_link(&path).unwrap(),
        Path::new("../../blobs").join(sha256(&content()))
    );
    assert_eq!(std::fs::read_to_string(repo_dir.join("refs/main")).unwrap(), COMMIT);
    assert!(!incomplete(&cache).exists());
    let num_requests = fake.requests().len();
    assert_eq!(hub.fetch(file(None), &mut ()).unwrap(), path);
    assert_eq!(fake.requests().len(), num_requests);
    assert!(fake.requests().iter().all(|request| request.ends_with("Bearer secret")));

    // Offline, it is found all the same; so it is when the reference is lost.
    let mut config = hub.config().clone();
    config.offline = true;
    let offline = Hub::new(config).unwrap();
    assert_eq!(offline.fetch(file(None), &mut ()).unwrap(), path);
    std::fs::remove_file(repo_dir.join("refs/main")).unwrap();
    assert_eq!(offline.cached(REPO, FILE), Some(path));
    let other = RemoteFile { name: "other.gguf", ..file(None) };
    let message = offline.fetch(other, &mut ()).unwrap_err().to_string();
    assert!(message.contains("HF_HUB_OFFLINE") && message.contains("--model PATH"), "{message}");
}

/// Every answer is cut; each request asks for the rest only.
#[test]
fn a_cut_download_is_resumed() {
    let behaviour = Behaviour { cut_after: Some(60_000), ..Behaviour::default() };
    let fake = FakeHub::start(behaviour);
    let cache = tempfile::tempdir().unwrap();
    let path = hub(&fake.address, &cache).fetch(file(None), &mut ()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), content());
    let ranges: Vec<String> = fake
        .requests()
        .iter()
        .filter(|request| request.starts_with("GET /cdn"))
        .map(|request| request.split(' ').nth(2).unwrap().to_owned())
        .collect();
    assert_eq!(ranges, ["", "bytes=60000-", "bytes=120000-", "bytes=180000-"]);
}

/// What an earlier program left is used, if it is a beginning of the file.
#[test]
fn an_earlier_download_is_continued() {
    for (left, is_right) in [(&content()[..77_777], true), (&[7; 300][..], false)] {
        let fake = FakeHub::start(Behaviour::default());
        let cache = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(incomplete(&cache).parent().unwrap()).unwrap();
        std::fs::write(incomplete(&cache), left).unwrap();
        let hub = hub(&fake.address, &cache);
        let fetched = hub.fetch(file(None), &mut ());
        let range = format!(" bytes={}- ", left.len());
        assert!(fake.requests().iter().any(|request| request.contains(&range)));
        assert_eq!(fetched.is_ok(), is_right);
        // Wrong bytes were discarded, so trying again starts afresh.
        let path = hub.fetch(file(None), &mut ()).unwrap();
        assert_eq!(std::fs::read(path).unwrap(), content());
    }
}

#[test]
fn a_server_without_ranges_starts_over() {
    let behaviour = Behaviour { ignores_ranges: true, ..Behaviour::default() };
    let fake = FakeHub::start(behaviour);
    let cache = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(incomplete(&cache).parent().unwrap()).unwrap();
    std::fs::write(incomplete(&cache), &content()[..1000]).unwrap();
    let path = hub(&fake.address, &cache).fetch(file(None), &mut ()).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), content());
}

#[test]
fn wrong_bytes_are_refused() {
    let fake = FakeHub::start(Behaviour { is_damaged: true, ..Behaviour::default() });
    let cache = tempfile::tempdir().unwrap();
    let fetching = hub(&fake.address, &cache);
    let message = fetching.fetch(file(None), &mut ()).unwrap_err().to_string();
    assert!(message.contains(&sha256(&content())) && message.contains("discarded"), "{message}");
    assert!(!incomplete(&cache).exists());
    assert_eq!(fetching.cached(REPO, FILE), None);

    let wanted = "ab".repeat(32);
    let message = fetching.fetch(file(Some(&wanted)), &mut ()).unwrap_err().to_string();
    assert!(message.contains("serves another file") && message.contains(&wanted), "{message}");
}

#[test]
fn refusals_are_explained() {
    for (status, code, parts) in [
        (404, "EntryNotFound", ["no such file (404)", FILE]),
        (404, "RepoNotFound", ["404", "--model PATH"]),
        (401, "RepoNotFound", ["private", "HF_TOKEN"]),
        (401, "GatedRepo", ["gated", "HF_TOKEN"]),
        (403, "GatedRepo", ["gated", "licence"]),
        (503, "", ["status 503", "HF_ENDPOINT"]),
    ] {
        let behaviour = Behaviour { refuse: Some((status, code)), ..Behaviour::default() };
        let fake = FakeHub::start(behaviour);
        let cache = tempfile::tempdir().unwrap();
        let error = hub(&fake.address, &cache).fetch(file(None), &mut ()).unwrap_err();
        let message = error.to_string();
        for part in parts {
            assert!(message.contains(part), "{message} lacks {part}");
        }
        assert!(!message.contains('\n'));
    }
}

#[test]
fn an_unreachable_hub_names_the_alternatives() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let cache = tempfile::tempdir().unwrap();
    let message = hub(&endpoint, &cache).fetch(file(None), &mut ()).unwrap_err().to_string();
    for part in [&endpoint, "HF_ENDPOINT", "--model PATH"] {
        assert!(message.contains(part), "{message} lacks {part}");
    }
    assert!(!message.contains('\n'));
}

#[test]
fn names_cannot_leave_the_cache() {
    let fake = FakeHub::start(Behaviour::default());
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(&fake.address, &cache);
    for (repo, name) in
        [("../..", "x"), ("a/..", "x"), ("a/b", "../x"), ("a/b", "/x"), ("a", "x"), ("a/b/c", "x")]
    {
        let file = RemoteFile { repo, name, sha256: None };
        assert!(matches!(hub.fetch(file, &mut ()).unwrap_err().reason, Reason::BadName));
    }
    assert!(fake.requests().is_empty());
}

#[test]
fn a_file_from_elsewhere_is_installed() {
    let cache = tempfile::tempdir().unwrap();
    let hub = hub("http://127.0.0.1:1", &cache);
    let source = cache.path().join("source");
    std::fs::write(&source, content()).unwrap();
    let wrong = "0".repeat(64);
    assert!(hub.install(file(Some(&wrong)), COMMIT, &source).is_err());
    let digest = sha256(&content());
    let path = hub.install(file(Some(&digest)), COMMIT, &source).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), content());
    assert_eq!(hub.cached(REPO, FILE), Some(path.clone()));
    assert_eq!(hub.install(file(Some(&digest)), COMMIT, &source).unwrap(), path);
    assert_eq!(hub.snapshots(REPO).len(), 1);
}

#[test]
fn repositories_are_listed() {
    let fake = FakeHub::start(Behaviour::default());
    let cache = tempfile::tempdir().unwrap();
    assert_eq!(hub(&fake.address, &cache).file_names(REPO).unwrap(), [FILE]);
}
