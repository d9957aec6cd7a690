//! Secrets that are shown once, and what is kept of them.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};

/// What a join token begins with: tools that look for leaked secrets find it by this.
const JOIN_PREFIX: &str = "bhj1";
/// Bytes of an id; two tokens never share one.
const ID_BYTES: usize = 8;
/// Bytes of a secret.
const SECRET_BYTES: usize = 32;

/// Random bytes of the system.
///
/// # Panics
/// If the system has none, in which case nothing can be secret.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let filled = rustls::crypto::ring::default_provider().secure_random.fill(&mut bytes);
    assert!(filled.is_ok(), "the system has no randomness");
    bytes
}

/// A secret; its text is the only way to have it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; SECRET_BYTES]);

/// What is kept of a secret: SHA-256. The secret has 256 random bits, so nothing slower is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretDigest(String);

impl Secret {
    /// A new one.
    pub fn generate() -> Self {
        Self(random_bytes())
    }

    /// Its digest.
    pub fn digest(&self) -> SecretDigest {
        SecretDigest(URL_SAFE_NO_PAD.encode(Sha256::digest(self.0)))
    }

    /// Its text, of 43 letters, digits, `-` and `_`.
    pub fn reveal(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    /// Inverse of [`Secret::reveal`].
    pub fn parse(text: &str) -> Option<Self> {
        URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok().map(Self)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl SecretDigest {
    /// As stored.
    pub fn from_text(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// To be stored.
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// What a machine joins with: `bhj1.ID.SECRET.AUTHORITY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Which token; no secret.
    pub id: String,
    /// What proves it.
    pub secret: Secret,
    /// Digest of the authority's certificate, by which the machine recognises the controller.
    pub authority: String,
}

/// A text that is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a join token: expected bhj1.ID.SECRET.AUTHORITY, as bulkhead token create prints it")]
pub struct TokenError;

impl JoinToken {
    /// A new one for the machines of an authority.
    pub fn generate(authority: &CertificateDer<'_>) -> Self {
        let id: String = random_bytes::<ID_BYTES>().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { id, secret: Secret::generate(), authority: authority_digest(authority) }
    }
}

impl JoinToken {
    /// Whether its authority is one of these, given as PEM. What cannot be read has none.
    pub fn is_of(&self, authorities: &str) -> bool {
        let all = crate::credentials::certificates("authority", authorities).unwrap_or_default();
        all.iter().any(|one| authority_digest(one) == self.authority)
    }
}

/// Digest of an authority's certificate.
pub(crate) fn authority_digest(certificate: &CertificateDer<'_>) -> String {
    digest(certificate)
}

/// SHA-256 as text.
pub(crate) fn digest(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(Sha256::digest(bytes))
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{JOIN_PREFIX}.{}.{}.{}", self.id, self.secret.reveal(), self.authority)
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [JOIN_PREFIX, id, secret, authority] = parts.as_slice() else { return Err(TokenError) };
        let id_is_one = id.len() == 2 * ID_BYTES && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        let digest = URL_SAFE_NO_PAD.decode(authority).ok().filter(|digest| digest.len() == 32);
        let secret = Secret::parse(secret).ok_or(TokenError)?;
        if !id_is_one || digest.is_none() {
            return Err(TokenError);
        }
        Ok(Self { id: (*id).to_owned(), secret, authority: (*authority).to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tokens_are_read_back_and_do_not_show_themselves() {
        let token = JoinToken::generate(&CertificateDer::from(b"authority".as_slice()));
        let text = token.to_string();
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token.clone()), "as a file has it");
        assert!(!format!("{token:?}").contains(&token.secret.reveal()));
        assert_ne!(token.secret.digest(), Secret::generate().digest());
        for wrong in ["", "bhj1", "bhj2.a.b.c", &text[..text.len() - 1], &format!("{text}.x")] {
            assert_eq!(wrong.parse::<JoinToken>(), Err(TokenError), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,200}") {
            let _ = text.parse::<JoinToken>();
            let _ = format!("bhj1.{text}.{text}.{text}").parse::<JoinToken>();
        }
    }
}
