//! How a command can end other than well, and its exit code.

/// A message for the person, and what it means to a program.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The answer is no: input refused, not found, differences found. Without a message if all was said.
    No(Option<String>),
    /// The command line does not make sense.
    Usage(String),
    /// The controller or the agent cannot be reached.
    Unreachable(String),
    /// Anything else.
    Other(String),
}

impl Failure {
    pub(crate) fn no(message: impl Into<String>) -> Self {
        Self::No(Some(message.into()))
    }

    pub(crate) fn message(&self) -> Option<&str> {
        match self {
            Self::No(message) => message.as_deref(),
            Self::Usage(message) | Self::Unreachable(message) | Self::Other(message) => Some(message),
        }
    }

    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::No(_) => 1,
            Self::Usage(_) => 2,
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
