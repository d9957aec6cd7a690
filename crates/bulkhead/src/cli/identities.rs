//! What administrators do about who may come in.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Where the authority is to be [default: /var/lib/bulkhead/controller/identity]
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) identity_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct KubeconfigArgs {
    /// Where to write it [default: to standard output]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) write: Option<PathBuf>,
    /// Write it though there is such a file
    #[arg(long, requires = "write")]
    pub(crate) replace: bool,
    /// What cluster, user and context are called [default: bulkhead]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    pub(crate) command: TokenCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token, and show it this once
    Create {
        /// Only this host may join with it, also if it has joined before
        #[arg(long, value_name = "NAME", conflicts_with = "operator")]
        host: Option<String>,
        /// How many machines may join with it [default: 1]
        #[arg(long, value_name = "COUNT", conflicts_with = "operator")]
        uses: Option<u32>,
        /// Make a token for a program that uses the API instead, with this name
        #[arg(long, value_name = "NAME")]
        operator: Option<String>,
        /// Make a token for the relay of this name instead
        #[arg(long, value_name = "NAME", conflicts_with_all = ["operator", "host", "uses"])]
        relay: Option<String>,
        /// Hosts for which that relay may speak, names or patterns like site1-*, with commas between [default: as before]
        #[arg(long, value_name = "PATTERN", value_delimiter = ',', requires = "relay")]
        hosts: Vec<String>,
        /// A group that the program is in; may be given several times
        #[arg(long, value_name = "NAME", requires = "operator")]
        group: Vec<String>,
        /// How long it is good, like 30m, 12h or 7d [default: 1h, operators 90d]
        #[arg(long, value_name = "TIME")]
        ttl: Option<String>,
    },
    /// Show the tokens that are still good
    List,
    /// Delete a token: nobody joins or asks with it any more
    Delete {
        /// Its id
        id: String,
    },
}

/// What is done about relays, beside running one.
#[derive(Debug, Subcommand)]
pub(crate) enum RelayCommand {
    /// Show the relays that there may be, and for which hosts they may speak
    List,
    /// Delete a relay: its sessions end, its certificates and tokens are good for nothing, and its name is free
    Delete {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CertificateArgs {
    #[command(subcommand)]
    pub(crate) command: CertificateCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CertificateCommand {
    /// Make a key and a certificate for an operator or an agent
    Create {
        /// operator/NAME or agent/HOST
        holder: String,
        /// A group that the operator is in; may be given several times. Members of bulkhead:admins may do everything
        #[arg(long, value_name = "NAME")]
        group: Vec<String>,
        /// How long it is valid, like 12h or 90d [default: 30d]
        #[arg(long, value_name = "TIME")]
        ttl: Option<String>,
        /// The API as the operator is to reach it, https://HOST:PORT [default: as this command does]
        #[arg(long, value_name = "URL")]
        api: Option<String>,
        /// Where to write: an operator's client configuration (a file), an agent's files (a directory)
        #[arg(short, long, value_name = "PATH")]
        write: PathBuf,
        /// Sign with the authority in this directory instead of asking a controller
        #[arg(long, value_name = "DIRECTORY")]
        identity_dir: Option<PathBuf>,
    },
    /// Refuse a certificate, or all that somebody has, from now on
    Revoke {
        /// operator/NAME, agent/HOST, relay/NAME, or a serial number
        what: String,
        /// Why, for the record
        #[arg(long, default_value = "", value_name = "TEXT")]
        reason: String,
    },
    /// Show what is revoked
    Revoked,
}
