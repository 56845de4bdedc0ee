//! Over a real socket: encrypted connections, and the operators' own address.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qwen_server::http::{HttpLimits, Listeners, Tls, TlsFiles, serve};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::api_fake::{FakeServer, MODEL, config};

/// An authority, and the files of a server that it vouches for.
struct Authority {
    folder: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { folder, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a certificate for `host` and its key to `NAME.pem` and `NAME.key`.
    fn issue(&self, name: &str, host: &str) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.path(&format!("{name}.pem")), cert.pem()).unwrap();
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn files(&self) -> TlsFiles {
        TlsFiles { cert: self.path("server.pem"), key: self.path("server.key"), client_ca: None }
    }

    /// A client that believes this authority, with a certificate of `identity`'s if any.
    fn client(&self, identity: Option<&str>) -> ClientConfig {
        self.client_of(identity, rustls::ALL_VERSIONS)
    }

    fn client_of(
        &self,
        identity: Option<&str>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        let Some(name) = identity else { return builder.with_no_client_auth() };
        let cert = CertificateDer::from_pem_file(self.path(&format!("{name}.pem"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key"))).unwrap();
        builder.with_client_auth_cert(vec![cert], key).unwrap()
    }
}

async fn connect(
    address: SocketAddr,
    client: ClientConfig,
    host: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await.unwrap();
    let name = host.to_owned().try_into().unwrap();
    TlsConnector::from(Arc::new(client)).connect(name, stream).await
}

/// One exchange, to the end of the connection.
async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    request: &str,
) -> std::io::Result<String> {
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
}

fn post(path: &str, body: &serde_json::Value) -> String {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

struct Listening {
    fake: FakeServer,
    clients: SocketAddr,
    operators: SocketAddr,
    tls: Option<Arc<Tls>>,
}

/// Listens at two addresses until the test is over.
async fn listen(fake: FakeServer, tls: Option<Tls>) -> Listening {
    let clients = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let operators = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tls = tls.map(Arc::new);
    let listening = Listening {
        clients: clients.local_addr().unwrap(),
        operators: operators.local_addr().unwrap(),
        tls: tls.clone(),
        fake,
    };
    let listeners = Listeners { clients, operators: Some(operators), tls };
    tokio::spawn(serve(listeners, listening.fake.state.clone(), std::future::pending()));
    listening
}

fn replace(path: &Path, content: impl AsRef<[u8]>) {
    fs::write(path, content).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_and_streams_come_encrypted_in_both_versions() {
    let authority = Authority::new();
    authority.issue("server", "localhost");
    let tls = Tls::open(authority.files()).unwrap();
    let server = listen(FakeServer::start(), Some(tls)).await;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let client = authority.client_of(None, &[version]);
        let stream = connect(server.clients, client, "localhost").await.unwrap();
        let body = json!({"model": MODEL, "prompt": "say:hello;", "stream": true});
        let request = post("/v1/completions", &body).replace("host:", "connection: close\r\nhost:");
        let text = exchange(stream, &request).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("[DONE]"), "{text}");
    }
    // Who does not encrypt gets nothing, and disturbs nobody.
    let plain = TcpStream::connect(server.clients).await.unwrap();
    let text = exchange(plain, &get("/health")).await.unwrap_or_default();
    assert!(!text.contains("HTTP/1.1"), "{text:?}");
    let wrong_name = connect(server.clients, authority.client(None), "example.org").await;
    assert!(wrong_name.is_err());
    let stream = connect(server.operators, authority.client(None), "localhost").await.unwrap();
    assert!(exchange(stream, &get("/metrics")).await.unwrap().starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_frees_its_sequence_here_too() {
    let authority = Authority::new();
    authority.issue("server", "localhost");
    let tls = Tls::open(authority.files()).unwrap();
    let server = listen(FakeServer::start(), Some(tls)).await;
    let endless = json!({"model": MODEL, "prompt": "go", "max_tokens": 500, "stream": true});
    for is_stream in [true, false] {
        let mut body = endless.clone();
        body["stream"] = json!(is_stream);
        let client = authority.client(None);
        let mut stream = connect(server.clients, client, "localhost").await.unwrap();
        // A byte behind the request keeps hyper from noticing by itself.
        let request = post("/v1/completions", &body) + "\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        server.fake.wait_until_running(1).await;
        drop(stream);
        server.fake.wait_until_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_renewed_without_a_restart_and_a_broken_one_is_not_taken() {
    let authority = Authority::new();
    authority.issue("server", "old.test");
    let tls = Tls::open(authority.files()).unwrap();
    let server = listen(FakeServer::start(), Some(tls)).await;
    let tls = server.tls.as_ref().unwrap();
    let open = connect(server.clients, authority.client(None), "old.test").await.unwrap();
    let good = fs::read(authority.path("server.key")).unwrap();
    // Half written, of another certificate, empty, gone.
    authority.issue("other", "other.test");
    let foreign = fs::read(authority.path("other.key")).unwrap();
    for broken in [&good[..good.len() / 2], &foreign, b""] {
        replace(&authority.path("server.key"), broken);
        assert!(tls.reload().is_err());
    }
    fs::remove_file(authority.path("server.key")).unwrap();
    assert!(tls.reload().is_err());
    connect(server.clients, authority.client(None), "old.test").await.unwrap();
    authority.issue("server", "new.test");
    tls.reload().unwrap();
    connect(server.clients, authority.client(None), "new.test").await.unwrap();
    assert!(connect(server.clients, authority.client(None), "old.test").await.is_err());
    // Who came before goes on.
    let text = exchange(open, &get("/health")).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_may_have_to_show_a_certificate() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    authority.issue("server", "localhost");
    authority.issue("ann", "ann");
    stranger.issue("bob", "bob");
    fs::copy(stranger.path("bob.pem"), authority.path("bob.pem")).unwrap();
    fs::copy(stranger.path("bob.key"), authority.path("bob.key")).unwrap();
    let client_ca = Some(authority.path("ca.pem"));
    let tls = Tls::open(TlsFiles { client_ca, ..authority.files() }).unwrap();
    let server = listen(FakeServer::start(), Some(tls)).await;
    for (identity, is_let_in) in [(Some("ann"), true), (Some("bob"), false), (None, false)] {
        let client = authority.client(identity);
        // In TLS 1.3 a client learns of its refusal when it reads.
        let text = match connect(server.clients, client, "localhost").await {
            Ok(stream) => exchange(stream, &get("/health")).await.unwrap_or_default(),
            Err(_) => String::new(),
        };
        assert_eq!(text.starts_with("HTTP/1.1 200"), is_let_in, "{identity:?}: {text}");
    }
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let authority = Authority::new();
    authority.issue("server", "localhost");
    let open = |files: TlsFiles| Tls::open(files).err().map(|error| error.to_string());
    let key = authority.path("server.key");
    let swapped = open(TlsFiles { cert: key.clone(), ..authority.files() });
    assert!(swapped.unwrap().starts_with("cannot read certificates from `"));
    let missing = open(TlsFiles { key: authority.path("none"), ..authority.files() });
    assert!(missing.unwrap().contains("none`"));
    let no_authority = open(TlsFiles { client_ca: Some(key), ..authority.files() });
    assert!(no_authority.unwrap().starts_with("cannot read certificates from `"));
}

/// Operators have an address of their own, where this machine needs no key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_have_their_own_address() {
    let server = listen(FakeServer::with_keys(&[("ann", "role = 'admin'")]), None).await;
    let ask = async |address: SocketAddr, path: &str| {
        let request = get(path).replace("host:", "x-api-key: ann\r\nhost:");
        let stream = TcpStream::connect(address).await.unwrap();
        exchange(stream, &request).await.unwrap()[9..12].to_owned()
    };
    assert_eq!(ask(server.clients, "/metrics").await, "404");
    assert_eq!(ask(server.clients, "/v1/models").await, "200");
    assert_eq!(ask(server.operators, "/v1/models").await, "404");
    for path in ["/metrics", "/health/ready"] {
        let stream = TcpStream::connect(server.operators).await.unwrap();
        let text = exchange(stream, &get(path)).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    }
}

/// Whoever connects and says nothing is not waited for for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_that_does_not_come_is_given_up() {
    let authority = Authority::new();
    authority.issue("server", "localhost");
    let tls = Tls::open(authority.files()).unwrap();
    let handshake_timeout = Duration::from_millis(50);
    let limits = HttpLimits { handshake_timeout, ..HttpLimits::default() };
    let server = listen(FakeServer::with(&config(), limits), Some(tls)).await;
    let mut stream = TcpStream::connect(server.clients).await.unwrap();
    let closed = timeout(Duration::from_secs(5), stream.read(&mut [0])).await;
    assert_eq!(closed.expect("it is closed").unwrap_or(0), 0);
}
