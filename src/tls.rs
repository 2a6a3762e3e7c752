//! TLS for every outgoing connection: one set of roots, one configuration (decisions P10 and P11).

use std::sync::{Arc, OnceLock};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// Servers whose sessions are remembered for a quick second handshake. Names come from strangers: this is the bound.
const SESSIONS: usize = 64;

/// The configuration of all outgoing connections, made at first use: reading the CA bundle takes longer than the whole
/// rest of the start.
pub struct Tls {
    skip_verification: bool,
    config: OnceLock<Arc<ClientConfig>>,
}

impl Tls {
    /// With `skip_verification` (`LIVEKIT_INSECURE_SKIP_VERIFY_TLS`) any certificate is accepted.
    #[must_use]
    pub fn new(skip_verification: bool) -> Self {
        Self {
            skip_verification,
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
        let made = Arc::new(client_config(self.skip_verification)?);
        Ok(self.config.get_or_init(|| made).clone())
    }
}

/// TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up TLS: {0}")]
pub struct TlsError(#[from] rustls::Error);

/// The client configuration: the system's roots (`SSL_CERT_FILE`, `SSL_CERT_DIR` included), Mozilla's where the system
/// has none, or no verification at all when `skip_verification`.
fn client_config(skip_verification: bool) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let mut config = if skip_verification {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAnything(provider)))
            .with_no_client_auth()
    } else {
        builder.with_root_certificates(roots()).with_no_client_auth()
    };
    config.resumption = Resumption::in_memory_sessions(SESSIONS);
    Ok(config)
}

fn roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(
            error = error.to_string(),
            "a CA file cannot be read; check SSL_CERT_FILE and SSL_CERT_DIR"
        );
    }
    let (added, ignored) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        tracing::info!("the system has no CA certificates; Mozilla's built-in ones are used");
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
