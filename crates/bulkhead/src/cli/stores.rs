//! Where the repository's store is, and what is done with stores.

use std::path::PathBuf;

use bulkhead_store::Location;
use clap::Args;

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
