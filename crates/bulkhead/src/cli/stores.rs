//! Where the repository's store is, and what is done with stores.

use std::path::PathBuf;

use bulkhead_store::Location;
use clap::{Args, Subcommand};

/// How to be let in by etcd.
#[derive(Debug, Default, Args)]
pub(crate) struct EtcdArgs {
    /// User of etcd, if it asks for one
    #[arg(long, requires = "etcd_password_file", value_name = "NAME")]
    pub(crate) etcd_user: Option<String>,
    /// File with that user's password
    #[arg(long, requires = "etcd_user", value_name = "FILE")]
    pub(crate) etcd_password_file: Option<PathBuf>,
    /// Authority of etcd's certificates; with it, etcd is asked over TLS
    #[arg(long, value_name = "FILE")]
    pub(crate) etcd_ca_file: Option<PathBuf>,
    /// Certificate to show to etcd
    #[arg(long, requires_all = ["etcd_ca_file", "etcd_key_file"], value_name = "FILE")]
    pub(crate) etcd_cert_file: Option<PathBuf>,
    /// Key of that certificate
    #[arg(long, requires = "etcd_cert_file", value_name = "FILE")]
    pub(crate) etcd_key_file: Option<PathBuf>,
}

impl EtcdArgs {
    /// A location with these on it, if it is in etcd.
    pub(crate) fn complete(&self, location: Location) -> Location {
        let Location::Etcd(mut options) = location else { return location };
        let Self { etcd_user, etcd_password_file, etcd_ca_file, etcd_cert_file, etcd_key_file } = self;
        for (given, option) in [
            (etcd_password_file, &mut options.password_file),
            (etcd_ca_file, &mut options.ca_file),
            (etcd_cert_file, &mut options.cert_file),
            (etcd_key_file, &mut options.key_file),
        ] {
            if given.is_some() {
                option.clone_from(given);
            }
        }
        if etcd_user.is_some() {
            options.user.clone_from(etcd_user);
        }
        Location::Etcd(options)
    }
}

/// Which store a controller keeps the repository in.
#[derive(Debug, Default, Args)]
pub(crate) struct StoreSettings {
    /// Where the repository is kept: embedded:///DIRECTORY, etcd://HOST:PORT,…/PREFIX or memory:
    /// [default: embedded, in --data-dir]
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<Location>,
    #[command(flatten)]
    pub(crate) etcd: EtcdArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    #[command(subcommand)]
    pub(crate) command: StoreCommand,
}

/// Stores are named embedded:///DIRECTORY or etcd://HOST:PORT,…/PREFIX.
#[derive(Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Copy everything as of one revision into a file
    Backup {
        /// The store [default: that of the running controller, which is asked for it]
        #[arg(value_name = "STORE")]
        store: Option<Location>,
        /// Where to write it; - is standard output
        #[arg(short, long, value_name = "FILE")]
        file: PathBuf,
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Take a copy into a store that is empty, and that no controller uses meanwhile
    Restore {
        /// The store; made if there is none
        #[arg(value_name = "STORE")]
        store: Location,
        /// The copy; - is standard input
        #[arg(short, long, value_name = "FILE")]
        file: PathBuf,
        /// Make a store equal to the copy that is not empty
        #[arg(long)]
        replace: bool,
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Copy one store into another, with what changes meanwhile
    Migrate {
        /// The store that is copied
        #[arg(value_name = "FROM")]
        from: Location,
        /// The store that it is copied into; made if there is none
        #[arg(value_name = "TO")]
        to: Location,
        /// Go on with every change until interrupted
        #[arg(long, conflicts_with = "once")]
        follow: bool,
        /// End as soon as everything is copied; this is the default
        #[arg(long)]
        once: bool,
        /// Make a target equal that is not empty
        #[arg(long)]
        replace: bool,
        #[command(flatten)]
        etcd: EtcdArgs,
    },
    /// Make the file of an embedded store smaller that no controller uses
    Compact {
        /// The store
        #[arg(value_name = "STORE")]
        store: Location,
    },
    /// Show a store's epoch, revision and size
    Info {
        /// The store
        #[arg(value_name = "STORE")]
        store: Location,
        #[command(flatten)]
        etcd: EtcdArgs,
    },
}
