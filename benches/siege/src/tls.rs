//! One authority and one TLS configuration for all fakes: a certificate is made for whatever domain is asked for.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

/// More domains than a siege has; then all are made anew.
const MAX_MADE: usize = 4096;

pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    key: KeyPair,
    made: Mutex<HashMap<String, Arc<CertifiedKey>>>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "siege");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self {
            issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("CA"),
            key: KeyPair::generate().expect("key"),
            made: Mutex::default(),
        }
    }

    fn make(&self, domain: &str) -> Option<CertifiedKey> {
        let params = CertificateParams::new([domain.to_owned(), format!("*.{domain}")]).ok()?;
        let certificate = params.signed_by(&self.key, &self.issuer).ok()?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let key = ring::sign::any_supported_type(&key).ok()?;
        Some(CertifiedKey::new(vec![certificate.der().clone()], key))
    }
}

impl ResolvesServerCert for Authority {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let (_, domain) = hello.server_name()?.split_once('.')?;
        let mut made = self.made.lock().unwrap();
        if let Some(key) = made.get(domain) {
            return Some(key.clone());
        }
        if made.len() >= MAX_MADE {
            made.clear();
        }
        let key = Arc::new(self.make(domain)?);
        made.insert(domain.to_owned(), key.clone());
        Some(key)
    }
}

/// The configuration of every fake, and the authority's certificate in PEM.
pub fn make() -> (Arc<ServerConfig>, String) {
    let authority = Arc::new(Authority::new());
    let pem = authority.issuer.pem();
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_cert_resolver(authority);
    config.ticketer = ring::Ticketer::new().expect("tickets");
    (Arc::new(config), pem)
}
