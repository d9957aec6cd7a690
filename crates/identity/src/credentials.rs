//! What a holder has: a key, a certificate for it, and the authorities that it trusts.

use std::path::Path;
use std::time::SystemTime;

use rcgen::{CertificateParams, KeyPair, SigningKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::certificate::{CertificateError, Holder};
use crate::files::{FileError, read_text, write_private, write_public};

/// Files of credentials in their directory.
const AUTHORITIES: &str = "ca.crt";

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Something in a PEM text is wrong.
    #[error("{what}: {why}")]
    Pem {
        /// Which.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The certificate is none of ours.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// A private key, P-256.
#[derive(Debug)]
pub struct Key {
    pair: KeyPair,
}

impl Key {
    /// A new one.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn generate() -> Result<Self, CredentialsError> {
        let pair = KeyPair::generate().map_err(|error| wrong("key", &error))?;
        Ok(Self { pair })
    }

    /// Inverse of [`Key::pem`].
    ///
    /// # Errors
    /// If it is no key.
    pub fn from_pem(pem: &str) -> Result<Self, CredentialsError> {
        let pair = KeyPair::from_pem(pem).map_err(|error| wrong("key", &error))?;
        Ok(Self { pair })
    }

    /// As PEM (PKCS #8). A secret.
    pub fn pem(&self) -> String {
        self.pair.serialize_pem()
    }

    /// A signing request (RFC 2986), as PEM. It proves that whoever asks has the key; names are the authority's.
    ///
    /// # Errors
    /// If it cannot be signed.
    pub fn request(&self) -> Result<String, CredentialsError> {
        let request = CertificateParams::default().serialize_request(&self.pair);
        let request = request.and_then(|request| request.pem());
        request.map_err(|error| wrong("signing request", &error))
    }
}

/// Certificate, key and authorities, as PEM.
#[derive(Clone)]
pub struct Credentials {
    /// The certificate, and others up to the authority if there are any between.
    pub certificate: String,
    /// Its key. A secret.
    pub key: String,
    /// Authorities whose certificates are trusted.
    pub authorities: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads `NAME.crt`, `NAME.key` and `ca.crt` of a directory; `None` unless all three are there.
    ///
    /// # Errors
    /// If one of them cannot be read, or says nothing that can be used.
    pub fn load(directory: &Path, name: &str) -> Result<Option<Self>, CredentialsError> {
        let read = |file: String| read_text(&directory.join(file));
        let (certificate, key) = (read(format!("{name}.crt"))?, read(format!("{name}.key"))?);
        let (Some(certificate), Some(key), Some(authorities)) =
            (certificate, key, read_text(&directory.join(AUTHORITIES))?)
        else {
            return Ok(None);
        };
        let credentials = Self { certificate, key, authorities };
        credentials.check()?;
        Ok(Some(credentials))
    }

    /// Writes the three files. The certificate comes last: [`Credentials::load`] meets a whole set or none.
    ///
    /// # Errors
    /// If one cannot be written.
    pub fn save(&self, directory: &Path, name: &str) -> Result<(), CredentialsError> {
        let certificate = directory.join(format!("{name}.crt"));
        // The old one does not fit the new key.
        match std::fs::remove_file(&certificate) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(FileError { path: certificate, source }.into());
            }
            _ => {}
        }
        write_private(&directory.join(format!("{name}.key")), &self.key)?;
        write_public(&directory.join(AUTHORITIES), &self.authorities)?;
        write_public(&certificate, &self.certificate)?;
        Ok(())
    }

    /// Who they make their holder.
    ///
    /// # Errors
    /// If the certificate names nobody.
    pub fn holder(&self) -> Result<Holder, CredentialsError> {
        let chain = self.chain()?;
        let first = chain.first().ok_or_else(|| wrong("certificate", &"none found"))?;
        Ok(Holder::of(first)?)
    }

    /// Whether they can be used at a moment.
    ///
    /// # Errors
    /// As [`Credentials::holder`].
    pub fn valid_at(&self, now: SystemTime) -> Result<bool, CredentialsError> {
        let holder = self.holder()?;
        Ok(now >= holder.not_before && now < holder.not_after)
    }

    /// Proves to whoever knows the certificate that its holder said something: [`crate::proves`].
    ///
    /// # Errors
    /// If the key cannot be used.
    pub fn sign(&self, said: &[u8]) -> Result<Vec<u8>, CredentialsError> {
        let pair = KeyPair::from_pem(&self.key).map_err(|error| wrong("key", &error))?;
        pair.sign(&signed(said)).map_err(|error| wrong("signature", &error))
    }

    fn check(&self) -> Result<(), CredentialsError> {
        self.holder()?;
        self.private_key()?;
        certificates("authority", &self.authorities)?;
        Ok(())
    }

    pub(crate) fn chain(&self) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
        certificates("certificate", &self.certificate)
    }

    pub(crate) fn private_key(&self) -> Result<PrivateKeyDer<'static>, CredentialsError> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(|error| wrong("key", &error))
    }
}

/// What is signed never is anything that TLS or an authority signs.
fn signed(said: &[u8]) -> Vec<u8> {
    [b"bulkhead renewal\n", said].concat()
}

/// Whether the holder of a certificate (DER, verified before) said something: inverse of [`Credentials::sign`].
pub fn proves(certificate: &[u8], said: &[u8], signature: &[u8]) -> bool {
    let Ok((_rest, parsed)) = x509_parser::parse_x509_certificate(certificate) else { return false };
    let key = &parsed.public_key().subject_public_key.data;
    let said = signed(said);
    // One that is for another kind of key refuses it.
    let all = rustls::crypto::ring::default_provider().signature_verification_algorithms.all;
    all.iter().any(|algorithm| algorithm.verify_signature(key, &said, signature).is_ok())
}

/// All certificates of a PEM text: at least one.
pub(crate) fn certificates(
    what: &'static str,
    pem: &str,
) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let all = all.map_err(|error| wrong(what, &error))?;
    if all.is_empty() { Err(wrong(what, &"no certificate found")) } else { Ok(all) }
}

pub(crate) fn wrong(what: &'static str, why: &dyn std::fmt::Display) -> CredentialsError {
    CredentialsError::Pem { what, why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::{Authority, Identity};

    #[test]
    fn only_the_holder_of_a_key_proves_what_he_says() {
        let authority = Authority::generate("test", SystemTime::now()).unwrap();
        let issue = || {
            let identity = Identity::agent("h1").unwrap();
            authority.issue(&identity, Duration::from_secs(600), SystemTime::now(), &[]).unwrap()
        };
        let (one, other) = (issue(), issue());
        let der = |own: &Credentials| own.chain().unwrap()[0].to_vec();
        let proof = one.sign(b"request").unwrap();
        assert!(proves(&der(&one), b"request", &proof));
        assert!(!proves(&der(&other), b"request", &proof), "another key of the same host");
        assert!(!proves(&der(&one), b"another", &proof) && !proves(&der(&one), b"request", b""));
        assert!(!proves(b"", b"request", &proof));
    }
}
