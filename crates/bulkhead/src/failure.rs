//! How a command can end other than well, and its exit code.

/// A message for the person, and what it means to a program.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The answer is no: input refused, not found, differences found. Without a message if all was said.
    No(Option<String>),
    /// The command line does not make sense.
    Usage(String),
    /// Of `test` and `lint`, to which 1 means findings: the tool or a file is wrong, so that there is no telling.
    Broken(String),
    /// The controller or the agent cannot be reached.
    Unreachable(String),
    /// Anything else.
    Other(String),
}

impl Failure {
    pub(crate) fn no(message: impl Into<String>) -> Self {
        Self::No(Some(message.into()))
    }

    /// The same where only findings may end with 1.
    #[must_use]
    pub(crate) fn broken(self) -> Self {
        match self {
            Self::No(Some(message)) | Self::Other(message) | Self::Unreachable(message) => {
                Self::Broken(message)
            }
            other => other,
        }
    }

    pub(crate) fn message(&self) -> Option<&str> {
        match self {
            Self::No(message) => message.as_deref(),
            Self::Usage(message)
            | Self::Broken(message)
            | Self::Unreachable(message)
            | Self::Other(message) => Some(message),
        }
    }

    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::No(_) => 1,
            Self::Usage(_) | Self::Broken(_) => 2,
            Self::Unreachable(_) => 3,
            Self::Other(_) => 4,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(format!("{error:#}"))
    }
}
