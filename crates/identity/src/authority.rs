//! The certificate authority of a fleet.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;

use crate::credentials::{Credentials, Key, certificates};
use crate::files::{FileError, read_text, write_private, write_public};
use crate::name::Identity;
use crate::tls::CONTROLLER_NAME;
use crate::token::{digest, random_bytes};

/// How long a certificate lasts unless told otherwise. Holders renew at half of it, so an agent that cannot reach a
/// controller for two weeks still gets in by itself.
pub const LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Longest that one may last.
pub const LIFETIME_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Of the authority itself.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// A controller's certificate begins so much earlier, for clients whose clocks are behind. Those of agents, relays and operators do
/// not: when they begin is what a revocation of their holder compares with.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(3600);
/// 16 random bytes, the first of them without its highest bit (RFC 5280, 4.1.2.2: positive, at most 20).
const SERIAL_BYTES: usize = 16;
const CERTIFICATE_FILE: &str = "ca.crt";
const KEY_FILE: &str = "ca.key";

/// Why an authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The directory has an authority already.
    #[error("{0} has an authority already: everybody's certificates would become worthless with another")]
    Exists(String),
    /// Its files are wrong.
    #[error("the authority cannot be used: {0}")]
    Broken(String),
    /// A signing request that is none.
    #[error("not a signing request: {0}")]
    Request(String),
}

/// A certificate and its key, with which others are signed.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// What is trusted, the authority's own certificate first.
    bundle: String,
    certificate: CertificateDer<'static>,
}

impl Authority {
    /// Makes one, in memory.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn generate(name: &str, now: SystemTime) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate().map_err(broken)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - CLOCK_TOLERANCE).into();
        params.not_after = (now + AUTHORITY_LIFETIME).into();
        params.serial_number = Some(serial());
        let certificate = params.self_signed(&key).map_err(broken)?;
        let bundle = certificate.pem();
        Ok(Self { issuer: Issuer::new(params, key), bundle, certificate: certificate.der().clone() })
    }

    /// Reads `ca.crt` and `ca.key`; `None` if there is no key. The first certificate of `ca.crt` is the key's; others are
    /// trusted besides, while one authority replaces another.
    ///
    /// # Errors
    /// If a file cannot be read or used.
    pub fn load(directory: &Path) -> Result<Option<Self>, AuthorityError> {
        let Some(key) = read_text(&directory.join(KEY_FILE))? else { return Ok(None) };
        let path = directory.join(CERTIFICATE_FILE);
        let Some(bundle) = read_text(&path)? else {
            return Err(AuthorityError::Broken(format!("{} is missing beside its key", path.display())));
        };
        let key = KeyPair::from_pem(&key).map_err(broken)?;
        let certificate = certificates("ca.crt", &bundle).map_err(broken)?.swap_remove(0);
        let fits = x509_parser::parse_x509_certificate(&certificate)
            .is_ok_and(|(_, parsed)| parsed.public_key().raw == key.subject_public_key_info());
        if !fits {
            return Err(AuthorityError::Broken(format!(
                "{KEY_FILE} is not the key of the first certificate in {CERTIFICATE_FILE}"
            )));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(broken)?;
        Ok(Some(Self { issuer, bundle, certificate }))
    }

    /// Writes it where there is none.
    ///
    /// # Errors
    /// If there is one, or it cannot be written.
    pub fn save(&self, directory: &Path) -> Result<(), AuthorityError> {
        let (certificate, key) = (directory.join(CERTIFICATE_FILE), directory.join(KEY_FILE));
        if certificate.exists() || key.exists() {
            return Err(AuthorityError::Exists(directory.display().to_string()));
        }
        write_public(&certificate, &self.bundle)?;
        write_private(&key, &self.issuer.key().serialize_pem())?;
        Ok(())
    }

    /// What everybody trusts, as PEM.
    pub fn bundle(&self) -> &str {
        &self.bundle
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Signs the key of a request for somebody; answers the certificate as PEM. Whatever names the request asks for are
    /// ignored.
    ///
    /// # Errors
    /// If it is no signing request, or was not signed with its key.
    pub fn sign(
        &self,
        request: &str,
        identity: &Identity,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<String, AuthorityError> {
        let request = CertificateSigningRequestParams::from_pem(request)
            .map_err(|error| AuthorityError::Request(error.to_string()))?;
        self.certify(&request.public_key, identity, lifetime, now, &[])
    }

    /// Digest of the key that a signing request is for: the same key, the same digest.
    ///
    /// # Errors
    /// As [`Authority::sign`].
    pub fn key_digest(request: &str) -> Result<String, AuthorityError> {
        let request = CertificateSigningRequestParams::from_pem(request)
            .map_err(|error| AuthorityError::Request(error.to_string()))?;
        Ok(digest(&request.public_key.subject_public_key_info()))
    }

    /// New credentials for somebody, with a new key. A controller is also known under `addresses` and names.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn issue(
        &self,
        identity: &Identity,
        lifetime: Duration,
        now: SystemTime,
        known_as: &[String],
    ) -> Result<Credentials, AuthorityError> {
        let key = Key::generate().map_err(broken)?;
        let pair = KeyPair::from_pem(&key.pem()).map_err(broken)?;
        let certificate = self.certify(&pair, identity, lifetime, now, known_as)?;
        Ok(Credentials { certificate, key: key.pem(), authorities: self.bundle.clone() })
    }

    fn certify(
        &self,
        key: &impl PublicKeyData,
        identity: &Identity,
        lifetime: Duration,
        now: SystemTime,
        known_as: &[String],
    ) -> Result<String, AuthorityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished(identity.name(), identity.groups());
        let uri = identity.uri().try_into().map_err(broken)?;
        params.subject_alt_names.push(SanType::URI(uri));
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = now.into();
        if matches!(identity, Identity::Controller(_)) {
            params.not_before = (now - CLOCK_TOLERANCE).into();
        }
        // To the agents of its site a relay is a controller.
        if matches!(identity, Identity::Controller(_) | Identity::Relay(_)) {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
            for name in std::iter::once(CONTROLLER_NAME).chain(known_as.iter().map(String::as_str)) {
                params.subject_alt_names.push(match name.parse::<IpAddr>() {
                    Ok(address) => SanType::IpAddress(address),
                    Err(_a_name) => SanType::DnsName(name.try_into().map_err(broken)?),
                });
            }
        }
        params.not_after = (now + lifetime.min(LIFETIME_MAX)).into();
        params.serial_number = Some(serial());
        let certificate = params.signed_by(key, &self.issuer).map_err(broken)?;
        Ok(certificate.pem())
    }
}

fn serial() -> SerialNumber {
    let mut bytes = random_bytes::<SERIAL_BYTES>();
    // Positive, and without a leading zero that encodings treat differently.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn distinguished(name: &str, groups: &[String]) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    if !groups.is_empty() {
        distinguished.push(DnType::OrganizationName, groups.join(","));
    }
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn broken(error: impl std::fmt::Display) -> AuthorityError {
    AuthorityError::Broken(error.to_string())
}
