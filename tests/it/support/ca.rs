//! A certificate authority of this test run.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use rcgen::{BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

pub(crate) struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
    file: PathBuf,
}

impl Ca {
    /// The authority that services under test trust (`SSL_CERT_FILE`).
    pub(crate) fn trusted() -> &'static Self {
        static CA: LazyLock<Ca> = LazyLock::new(|| Ca::new("trusted"));
        &CA
    }

    /// Another authority, which nobody trusts.
    pub(crate) fn untrusted() -> &'static Self {
        static CA: LazyLock<Ca> = LazyLock::new(|| Ca::new("untrusted"));
        &CA
    }

    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("lk-jwt-service tests, {name}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("CA");
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ca-{name}-{}.pem", std::process::id()));
        std::fs::write(&file, issuer.pem()).expect("CA file");
        Self { issuer, file }
    }

    /// The PEM file with this authority's certificate.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// TLS for a server with these names or addresses in its certificate.
    pub(crate) fn server(&self, names: &[String]) -> Arc<ServerConfig> {
        self.server_until(names, None)
    }

    /// The same with a certificate whose last day was the first of this year.
    pub(crate) fn server_until(&self, names: &[String], last_year: Option<i32>) -> Arc<ServerConfig> {
        let (certificate, key) = self.issue(names, last_year);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| {
                builder.with_no_client_auth().with_single_cert(
                    vec![certificate.der().clone()],
                    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
                )
            })
            .expect("TLS configuration");
        Arc::new(config)
    }

    /// Certificate and key in PEM, for a server with these names or addresses.
    pub(crate) fn server_pem(&self, names: &[String]) -> (String, String) {
        self.server_pem_until(names, None)
    }

    /// The same with a certificate whose last day was the first of this year.
    pub(crate) fn server_pem_until(&self, names: &[String], last_year: Option<i32>) -> (String, String) {
        let (certificate, key) = self.issue(names, last_year);
        (certificate.pem(), key.serialize_pem())
    }

    fn issue(&self, names: &[String], last_year: Option<i32>) -> (Certificate, KeyPair) {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(names).expect("names");
        if let Some(year) = last_year {
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
        }
        let certificate = params.signed_by(&key, &self.issuer).expect("server certificate");
        (certificate, key)
    }
}
