//! `kubeconfig`: what kubectl and its like need to reach the controller, from the client configuration.

use std::path::PathBuf;

use bulkhead_identity::write_private;
use bulkhead_model::resource::NO_NAMESPACE;
use serde_json::{Value, json};

use crate::cli::{Common, KubeconfigArgs};
use crate::client::{ClientConfig, client_config};
use crate::failure::Failure;
use crate::output;
use crate::yaml;

/// What cluster, user and context are called unless told otherwise.
const NAME: &str = "bulkhead";

pub(crate) fn kubeconfig(common: &Common, args: &KubeconfigArgs) -> Result<(), Failure> {
    let config = client_config(common)?;
    let text = yaml::document(&document(common, args, config)?);
    let Some(path) = &args.write else { return output::print(&text) };
    if path.exists() && !args.replace {
        return Err(Failure::no(format!(
            "{} exists already: name another file, or replace it with --replace",
            path.display()
        )));
    }
    write_private(path, &text).map_err(|error| Failure::no(format!("{}: {error}", path.display())))?;
    output::note(&format!("wrote {}; it is a secret\nexport KUBECONFIG={}\n", path.display(), shown(path)));
    Ok(())
}

fn shown(path: &PathBuf) -> String {
    std::path::absolute(path).as_ref().unwrap_or(path).display().to_string()
}

fn document(common: &Common, args: &KubeconfigArgs, config: ClientConfig) -> Result<Value, Failure> {
    let ClientConfig { server, authorities, certificate, key, token } = config;
    let url = common.server.clone().unwrap_or(server);
    if url.is_empty() || url.starts_with("unix:") {
        return Err(Failure::Usage(
            "kubectl needs an address and a certificate: name a client configuration with --client-config, as \
             \"bulkhead certificate create operator/NAME --write FILE\" makes it"
                .into(),
        ));
    }
    let url = if url.contains("://") { url } else { format!("https://{url}") };
    let token = common.token.clone().unwrap_or(token);
    let user = if token.is_empty() {
        json!({ "client-certificate-data": base64(&certificate), "client-key-data": base64(&key) })
    } else {
        json!({ "token": token })
    };
    let name = args.name.as_deref().unwrap_or(NAME);
    // In that namespace, what names none is where `bulkhead apply` puts it.
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": name,
            "cluster": { "server": url, "certificate-authority-data": base64(&authorities) },
        }],
        "users": [{ "name": name, "user": user }],
        "contexts": [{
            "name": name,
            "context": { "cluster": name, "user": name, "namespace": NO_NAMESPACE },
        }],
        "current-context": name,
    }))
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}
