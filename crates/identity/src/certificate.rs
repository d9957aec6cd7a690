//! What a certificate says, read once it has been verified.

use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::name::{GROUPS_MAX, Identity};

/// A certificate that is none of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Not DER of a certificate.
    #[error("not a certificate")]
    Unreadable,
    /// Its URI names nobody.
    #[error(
        "the certificate names nobody: expected one URI spiffe://bulkhead/agent|controller|relay|operator/NAME"
    )]
    Nameless,
}

/// Who holds a certificate, and since and until when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Who.
    pub identity: Identity,
    /// Serial number, in hexadecimal.
    pub serial: String,
    /// Valid from then on; revocations of a holder compare with it.
    pub not_before: SystemTime,
    /// Valid until then.
    pub not_after: SystemTime,
}

impl Holder {
    /// Reads a certificate. It must have been verified before.
    ///
    /// # Errors
    /// If it is no certificate, or names nobody, or several.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, CertificateError> {
        let (_rest, parsed) =
            X509Certificate::from_der(certificate).map_err(|_not_der| CertificateError::Unreadable)?;
        let organisations = parsed.subject().iter_organization().filter_map(|name| name.as_str().ok());
        let groups = organisations.flat_map(|names| names.split(',')).take(GROUPS_MAX + 1);
        let groups: Vec<String> = groups.map(ToOwned::to_owned).collect();
        let names = parsed.subject_alternative_name().ok().flatten();
        let names = names.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        let mut uris = names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        // SPIFFE: exactly one.
        let (Some(uri), None) = (uris.next(), uris.next()) else { return Err(CertificateError::Nameless) };
        let identity = Identity::from_uri(uri, &groups).ok_or(CertificateError::Nameless)?;
        let time = |seconds: i64| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
        };
        Ok(Self {
            identity,
            serial: parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
            not_before: time(parsed.validity().not_before.timestamp()),
            not_after: time(parsed.validity().not_after.timestamp()),
        })
    }

    /// When its holder should ask for the next one: at half of its life.
    pub fn renew_at(&self) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_before + life / 2
    }
}
