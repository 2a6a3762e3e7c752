//! TLS for every outgoing connection: one set of roots, one configuration (decisions P10 and P11).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use chrono::{DateTime, Utc};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_native_certs::CertificateResult;

/// Time for a connection to stand, shared by the addresses of a name: one that is dead must leave some for the next.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// The variable that names a file of CA certificates.
pub const CERT_FILE: &str = "SSL_CERT_FILE";
/// The variable that names directories of them, separated by colons.
pub const CERT_DIR: &str = "SSL_CERT_DIR";

/// Remedy for a handshake that failed, as far as the TLS library's words tell the cause.
#[must_use]
pub fn remedy(error: &str) -> Option<&'static str> {
    let says = |words: &[&str]| words.iter().any(|word| error.contains(word));
    if says(&["UnknownIssuer"]) {
        Some(
            "its certificate is signed by somebody who is not trusted here: put that CA into SSL_CERT_FILE or SSL_CERT_DIR, or let the server send its whole chain",
        )
    } else if says(&["not valid for name", "NotValidForName"]) {
        Some("its certificate is for another name: use a name that the certificate has, or get one for this name")
    } else if says(&["certificate expired", "Expired"]) {
        Some(
            "its certificate has expired: renew it, and see that the server has loaded the new one (if it is new, this machine's clock is wrong)",
        )
    } else if says(&["InvalidContentType", "corrupt message"]) {
        Some("that port speaks plain HTTP: name the port with TLS, or write http:// (ws://) where that is what you want")
    } else {
        None
    }
}

/// Words of the TLS library with the moment of which they speak as a date.
#[must_use]
pub fn with_date(error: String) -> String {
    const BEFORE: &str = "certificate is not valid after ";
    let Some(at) = error.find(BEFORE).map(|at| at + BEFORE.len()) else {
        return error;
    };
    let digits = error[at..].bytes().take_while(u8::is_ascii_digit).count();
    let date = error[at..at + digits]
        .parse()
        .ok()
        .and_then(|seconds| DateTime::<Utc>::from_timestamp(seconds, 0));
    match date {
        Some(date) => format!("{}{}", &error[..at], date.format("%Y-%m-%d %H:%M:%S UTC")),
        None => error,
    }
}

/// Servers whose sessions are remembered for a quick second handshake. Names come from strangers: this is the bound.
const MAX_SESSIONS: usize = 64;

/// The configuration of all outgoing connections, made at first use: reading the CA bundle takes longer than the whole
/// rest of the start.
pub struct Tls {
    skip_verification: bool,
    certificates: Given,
    config: OnceLock<Arc<ClientConfig>>,
}

impl Tls {
    /// With `skip_verification` (`LIVEKIT_INSECURE_SKIP_VERIFY_TLS`) any certificate is accepted.
    #[must_use]
    pub const fn new(skip_verification: bool, certificates: Given) -> Self {
        Self {
            skip_verification,
            certificates,
            config: OnceLock::new(),
        }
    }

    /// The configuration.
    ///
    /// # Errors
    /// When the TLS library refuses its own defaults.
    pub fn config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        if let Some(config) = self.config.get() {
            return Ok(config.clone());
        }
        let made = Arc::new(client_config(self.skip_verification, &self.certificates)?);
        Ok(self.config.get_or_init(|| made).clone())
    }

    /// Beginning of a client for addresses of the operator's choice: HTTP/1.1, no redirects, [`CONNECT_TIMEOUT`].
    ///
    /// # Errors
    /// When the TLS library refuses its own defaults.
    pub fn client(&self) -> Result<reqwest::ClientBuilder, TlsError> {
        let builder = reqwest::Client::builder()
            .tls_backend_preconfigured(self.config()?.as_ref().clone())
            .redirect(reqwest::redirect::Policy::none())
            // Its tries are for what HTTP/1.1 does not know, and cost a copy of each request.
            .retry(reqwest::retry::never().max_retries_per_request(0))
            .http1_only()
            .tcp_nodelay(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(concat!("lk-jwt-service/", env!("CARGO_PKG_VERSION")));
        Ok(builder)
    }
}

/// TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up TLS: {0}")]
pub struct TlsError(#[from] rustls::Error);

/// Where the operator says that CA certificates are. Blank is not said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// File that `SSL_CERT_FILE` names.
    pub file: Option<PathBuf>,
    /// Directories that `SSL_CERT_DIR` names.
    pub dirs: Vec<PathBuf>,
}

impl Given {
    /// Takes the values of the two variables.
    #[must_use]
    pub fn new(file: Option<String>, dirs: Option<String>) -> Self {
        let set = |value: Option<String>| value.map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let dirs = set(dirs).unwrap_or_default();
        Self {
            file: set(file).map(PathBuf::from),
            dirs: dirs.split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect(),
        }
    }

    fn is_nothing(&self) -> bool {
        self.file.is_none() && self.dirs.is_empty()
    }

    /// Loads the certificates of the file and of the directories: each the operator's, or else the system's, as OpenSSL and Go have it. A
    /// directory is read as one, whichever variable names it.
    fn load(&self) -> CertificateResult {
        let system = openssl_probe::probe();
        let file = self.file.clone().or(system.cert_file);
        let dirs = if self.dirs.is_empty() { system.cert_dir } else { self.dirs.clone() };
        let (dirs, files): (Vec<_>, Vec<_>) = file.into_iter().chain(dirs).partition(|path| path.is_dir());
        let (mut dirs, mut files) = (dirs.iter(), files.iter());
        let mut found = CertificateResult::default();
        loop {
            // In pairs, since what both have is read once then: most systems have the file in the directory.
            let (file, dir) = (files.next(), dirs.next());
            if file.is_none() && dir.is_none() {
                break;
            }
            let more = rustls_native_certs::load_certs_from_paths(file.map(PathBuf::as_path), dir.map(PathBuf::as_path));
            found.certs.extend(more.certs);
            found.errors.extend(more.errors);
        }
        found.certs.sort_unstable_by(|a, b| a.as_ref().cmp(b.as_ref()));
        found.certs.dedup();
        found
    }
}

/// Whether a file, or one of the files in a directory, holds a CA certificate. It stops at the first.
///
/// # Errors
/// When it cannot be read, or is neither a file nor a directory.
pub fn holds_certificates(path: &Path) -> io::Result<bool> {
    let kind = fs::metadata(path)?.file_type();
    if kind.is_file() {
        return file_holds_certificates(path);
    }
    if !kind.is_dir() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a directory"));
    }
    for entry in fs::read_dir(path)? {
        let path = entry?.path();
        // What is odd in such a directory is passed over, as when it is loaded.
        if fs::metadata(&path).is_ok_and(|entry| entry.is_file()) && file_holds_certificates(&path).unwrap_or(false) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn file_holds_certificates(path: &Path) -> io::Result<bool> {
    let readable = |error| {
        if let pem::Error::Io(error) = error { Err(error) } else { Ok(false) }
    };
    let certificates = match CertificateDer::pem_file_iter(path) {
        Ok(certificates) => certificates,
        Err(error) => return readable(error),
    };
    for certificate in certificates {
        match certificate {
            Ok(certificate) => {
                if RootCertStore::empty().add(certificate).is_ok() {
                    return Ok(true);
                }
            }
            Err(error) => {
                readable(error)?;
            }
        }
    }
    Ok(false)
}

/// The client configuration: the system's roots (`SSL_CERT_FILE`, `SSL_CERT_DIR` included), Mozilla's where the system
/// has none, or no verification at all when `skip_verification`.
fn client_config(skip_verification: bool, certificates: &Given) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let mut config = if skip_verification {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAnything(provider)))
            .with_no_client_auth()
    } else {
        builder.with_root_certificates(roots(certificates)).with_no_client_auth()
    };
    config.resumption = Resumption::in_memory_sessions(MAX_SESSIONS);
    Ok(config)
}

fn roots(given: &Given) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let found = given.load();
    for error in &found.errors {
        tracing::warn!(name: "ca_file_unreadable",
            error = error.to_string(),
            "a CA file cannot be read; check SSL_CERT_FILE and SSL_CERT_DIR"
        );
    }
    let (added, ignored) = roots.add_parsable_certificates(found.certs);
    if added == 0 && !given.is_nothing() {
        // They were there at the start. Whoever named them does not trust the built-in ones.
        tracing::error!(name: "no_ca_certificates",
            "SSL_CERT_FILE and SSL_CERT_DIR hold no CA certificate any more: no certificate will be accepted"
        );
    } else if added == 0 {
        tracing::info!(name: "builtin_ca_certificates", "the system has no CA certificates; Mozilla's built-in ones are used");
        roots.add_parsable_certificates(webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().cloned());
    } else {
        tracing::debug!(added, ignored, "CA certificates of the system loaded");
    }
    roots
}

/// For labs, behind `LIVEKIT_INSECURE_SKIP_VERIFY_TLS`: the connection is encrypted, the other end unknown.
#[derive(Debug)]
struct AcceptAnything(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnything {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_has_its_remedy() {
        for (error, expected) in [
            ("invalid peer certificate: UnknownIssuer", "SSL_CERT_FILE"),
            (
                "invalid peer certificate: certificate not valid for name \"a.example\"; it is only valid for b",
                "another name",
            ),
            (
                "invalid peer certificate: certificate expired: verification time 1700000000 (UNIX), but certificate is not valid after 1600000000 (100000000 seconds ago)",
                "renew",
            ),
            ("received corrupt message of type InvalidContentType", "plain HTTP"),
        ] {
            assert!(remedy(error).is_some_and(|text| text.contains(expected)), "{error}");
        }
        assert_eq!(remedy("connection reset"), None);
        let dated = with_date("certificate is not valid after 1600000000 (100 seconds ago)".to_owned());
        assert_eq!(dated, "certificate is not valid after 2020-09-13 12:26:40 UTC");
        assert_eq!(with_date("other".to_owned()), "other");
    }

    #[test]
    fn what_is_given_is_trimmed_and_blank_is_nothing() {
        let text = |text: &str| Some(text.to_owned());
        assert!(Given::new(None, None).is_nothing());
        assert!(Given::new(text(""), text(" \r\n")).is_nothing());
        let given = Given::new(text("/ca.crt\r"), text("/a::/b:"));
        assert_eq!(given.file, Some(PathBuf::from("/ca.crt")));
        assert_eq!(given.dirs, [PathBuf::from("/a"), PathBuf::from("/b")]);
    }

    #[test]
    fn looks_for_certificates_in_files_and_directories() {
        let directory = std::env::temp_dir().join(format!("lk-jwt-ca-{}", std::process::id()));
        let (empty, full) = (directory.join("empty"), directory.join("full"));
        for directory in [&empty, &full] {
            fs::create_dir_all(directory).unwrap();
        }
        let key = rcgen::KeyPair::generate().unwrap();
        let ca = rcgen::CertificateParams::new(vec!["ca.example".into()])
            .unwrap()
            .self_signed(&key)
            .unwrap()
            .pem();
        fs::write(full.join("ca.pem"), format!("# ours\n{ca}")).unwrap();
        fs::write(full.join("key.pem"), key.serialize_pem()).unwrap();
        fs::write(
            full.join("broken.pem"),
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        )
        .unwrap();
        fs::write(full.join("cut.pem"), "-----BEGIN CERTIFICATE-----\nAAAA\n").unwrap();
        fs::write(full.join("blank.pem"), "").unwrap();
        for (path, holds) in [
            (full.join("ca.pem"), true),
            (full.join("key.pem"), false),
            (full.join("broken.pem"), false),
            (full.join("cut.pem"), false),
            (full.join("blank.pem"), false),
            (full.clone(), true),
            (empty.clone(), false),
        ] {
            assert_eq!(holds_certificates(&path).unwrap(), holds, "{}", path.display());
        }
        // Named by the wrong variable it counts all the same.
        for (file, dirs) in [
            (Some(full.as_path()), vec![]),
            (None, vec![&empty, &full.join("ca.pem")]),
            (Some(&full.join("ca.pem")), vec![&empty]),
        ] {
            let given = Given {
                file: file.map(Path::to_owned),
                dirs: dirs.into_iter().cloned().collect(),
            };
            let found = given.load().certs;
            let own = found.iter().filter(|found| found.windows(10).any(|text| text == b"ca.example"));
            assert_eq!(own.count(), 1, "{given:?}");
            // The other one is the system's, where it has any.
            let is_all = given.file.is_some() && !given.dirs.is_empty();
            assert_eq!(found.len() > 2, !is_all && Given::default().load().certs.len() > 2, "{given:?}");
        }
        for path in ["/nonexistent", "/dev/null"] {
            assert!(holds_certificates(Path::new(path)).is_err(), "{path}");
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
