//! `init`, `token`, `relay list` and `delete`, `certificate`, `whoami`: who may come in.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use bulkhead_agent::IDENTITY_FILES;
use bulkhead_identity::{Authority, Credentials, Identity, Key, LIFETIME, LIFETIME_MAX, write_private};
use hyper::Method;
use serde_json::{Value, json};

use crate::cli::{CertificateCommand, Common, InitArgs, RelayCommand, TokenCommand};
use crate::client::{API, ClientConfig, call, default_config_path, encode};
use crate::failure::Failure;
use crate::output::{self, text};
use crate::yaml;

fn other(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
    Failure::from(anyhow!(error))
}

pub(crate) fn init(common: &Common, args: &InitArgs) -> Result<(), Failure> {
    let config = bulkhead_controller::Config::default();
    let directory = args.identity_dir.clone().unwrap_or_else(|| config.identity_directory());
    let authority = Authority::generate("bulkhead", SystemTime::now()).map_err(other)?;
    authority.save(&directory).map_err(|error| Failure::no(error.to_string()))?;
    let made = json!({ "directory": directory });
    output::show(common.output, &made, || {
        Ok(format!(
            "made a certificate authority in {}\n\
             Keep ca.key secret and back it up. Copy the directory to every controller, and start them:\n  \
             bulkhead controller --identity-dir {}\n\
             Then, on a controller's host:\n  \
             bulkhead token create                          a machine joins with it\n  \
             bulkhead certificate create operator/NAME …    an operator's client configuration\n",
            directory.display(),
            directory.display(),
        ))
    })
}

pub(crate) async fn token(common: &Common, command: &TokenCommand) -> Result<(), Failure> {
    let path = format!("{API}/tokens");
    match command {
        TokenCommand::Create { host, uses, operator, group, relay, hosts, ttl } => {
            let hosts = (!hosts.is_empty()).then_some(hosts);
            let operator = operator.as_ref().map(|name| json!({ "name": name, "groups": group }));
            let body = given([
                ("host", json!(host)),
                ("uses", json!(uses)),
                ("operator", json!(operator)),
                ("relay", json!(relay)),
                ("hosts", json!(hosts)),
                ("ttl", json!(ttl)),
            ]);
            let made = call(common.controller(), Method::POST, &path, Some(body.to_string())).await?;
            output::show(common.output, &made, || Ok(created(&made)))
        }
        TokenCommand::List => {
            let list = call(common.controller(), Method::GET, &path, None).await?;
            output::show(common.output, &list, || Ok(tokens(&list)))
        }
        TokenCommand::Delete { id } => {
            let path = format!("{path}/{}", encode(id));
            let gone = call(common.controller(), Method::DELETE, &path, None).await?;
            output::show(common.output, &gone, || Ok(format!("token {id} is deleted\n")))
        }
    }
}

/// The fields that say something.
fn given<const N: usize>(fields: [(&str, Value); N]) -> Value {
    fields
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| (name.to_owned(), value))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// The token stands alone on its line, so that it can be copied or cut out.
fn created(made: &Value) -> String {
    let (token, until) = (text(made, "/token"), text(made, "/expiresAt"));
    if made["for"] == "operator" {
        return format!(
            "{token}\n\nGood until {until}, and not shown again. A program shows it as \"Authorization: Bearer TOKEN\", \
             this command takes it from BULKHEAD_TOKEN.\n"
        );
    }
    if let Some(relay) = made["relay"].as_str() {
        let hosts = made["hosts"].as_array().into_iter().flatten().filter_map(Value::as_str);
        return format!(
            "{token}\n\nGood until {until}, and not shown again. With it relay {relay} joins, which may speak for {}:\n  \
             bulkhead relay --name {relay} --upstream https://CONTROLLER:7441 --join-token {token}\n",
            hosts.collect::<Vec<_>>().join(", ")
        );
    }
    let who = made["host"].as_str().map_or_else(|| "a machine".into(), |host| format!("host {host}"));
    format!(
        "{token}\n\nGood until {until}, and not shown again. With it {who} joins:\n  \
         bulkhead agent --controller https://CONTROLLER:7441 --join-token {token}\n"
    )
}

fn tokens(list: &Value) -> String {
    let rows = list["items"].as_array().into_iter().flatten().map(|item| {
        let what = match item["operator"]["name"].as_str() {
            Some(name) => format!("operator/{name}"),
            None => match item["host"].as_str() {
                Some(host) => format!("joins as {host}"),
                None => item["relay"]
                    .as_str()
                    .map_or_else(|| "joins".into(), |relay| format!("joins as relay/{relay}")),
            },
        };
        let uses = item["usesLeft"].as_u64().map_or_else(|| "-".into(), |uses| uses.to_string());
        vec![text(item, "/id"), what, uses, text(item, "/expiresAt"), text(item, "/by")]
    });
    output::table(&["ID", "FOR", "USES", "EXPIRES", "MADE BY"], &rows.collect::<Vec<_>>())
}

pub(crate) async fn relay(common: &Common, command: &RelayCommand) -> Result<(), Failure> {
    let path = format!("{API}/relays");
    match command {
        RelayCommand::List => {
            let list = call(common.controller(), Method::GET, &path, None).await?;
            output::show(common.output, &list, || Ok(relays(&list)))
        }
        RelayCommand::Delete { name } => {
            let path = format!("{path}/{}", encode(name));
            let gone = call(common.controller(), Method::DELETE, &path, None).await?;
            output::show(common.output, &gone, || Ok(format!("relay {name} is deleted\n")))
        }
    }
}

fn relays(list: &Value) -> String {
    let rows = list["items"].as_array().into_iter().flatten().map(|item| {
        let hosts = item["hosts"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let hosts = hosts.collect::<Vec<_>>().join(",");
        vec![text(item, "/name"), hosts, text(item, "/since"), text(item, "/by")]
    });
    output::table(&["NAME", "HOSTS", "SINCE", "BY"], &rows.collect::<Vec<_>>())
}

pub(crate) async fn certificate(common: &Common, command: &CertificateCommand) -> Result<(), Failure> {
    let path = format!("{API}/revocations");
    match command {
        CertificateCommand::Create { holder, group, ttl, api, write, identity_dir } => {
            let identity = identity(holder, group)?;
            let credentials = match identity_dir {
                Some(directory) => signed_here(directory, &identity, ttl.as_deref())?,
                None => signed_there(common, &identity, ttl.as_deref()).await?,
            };
            save(common, &identity, &credentials, api.as_deref(), write)
        }
        CertificateCommand::Revoke { what, reason } => {
            let field = if what.contains('/') { "holder" } else { "serial" };
            let body = json!({ field: what, "reason": reason }).to_string();
            let made = call(common.controller(), Method::POST, &path, Some(body)).await?;
            output::show(common.output, &made, || Ok(format!("{what} is revoked\n")))
        }
        CertificateCommand::Revoked => {
            let list = call(common.controller(), Method::GET, &path, None).await?;
            output::show(common.output, &list, || {
                let rows = list["items"].as_array().into_iter().flatten().map(|item| {
                    let what = item["holder"].as_str().or(item["serial"].as_str()).unwrap_or("-").to_owned();
                    vec![what, text(item, "/since"), text(item, "/by"), text(item, "/reason")]
                });
                Ok(output::table(&["REVOKED", "SINCE", "BY", "REASON"], &rows.collect::<Vec<_>>()))
            })
        }
    }
}

fn identity(holder: &str, groups: &[String]) -> Result<Identity, Failure> {
    let identity = match holder.split_once('/') {
        Some(("operator", name)) => Identity::operator(name, groups),
        Some(("agent", _)) if !groups.is_empty() => {
            return Err(Failure::Usage("an agent is in no group".into()));
        }
        Some(("agent", host)) => Identity::agent(host),
        _ => return Err(Failure::Usage(format!("expected operator/NAME or agent/HOST, found {holder:?}"))),
    };
    identity.map_err(|error| Failure::Usage(error.to_string()))
}

/// Without a controller, by whoever has the authority's key.
fn signed_here(directory: &Path, identity: &Identity, ttl: Option<&str>) -> Result<Credentials, Failure> {
    let lifetime = match ttl {
        None => LIFETIME,
        Some(text) => {
            let parsed = humantime(text).filter(|ttl| *ttl <= LIFETIME_MAX);
            parsed.ok_or_else(|| {
                Failure::Usage(format!("--ttl: expected a time like 12h or 90d, found {text:?}"))
            })?
        }
    };
    let Some(authority) = Authority::load(directory).map_err(|error| Failure::no(error.to_string()))? else {
        return Err(Failure::no(format!("{} has no authority (ca.crt, ca.key)", directory.display())));
    };
    authority.issue(identity, lifetime, SystemTime::now(), &[]).map_err(other)
}

fn humantime(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    Some(Duration::from_secs(number.parse::<u64>().ok()?.checked_mul(seconds)?))
}

/// The key is made here and stays here.
async fn signed_there(
    common: &Common,
    identity: &Identity,
    ttl: Option<&str>,
) -> Result<Credentials, Failure> {
    let key = Key::generate().map_err(other)?;
    let (operator, agent) = match identity {
        Identity::Operator { name, groups } => (Some(json!({ "name": name, "groups": groups })), None),
        Identity::Agent(host) | Identity::Controller(host) | Identity::Relay(host) => {
            (None, Some(host.as_str()))
        }
    };
    let body = given([
        ("signingRequest", json!(key.request().map_err(other)?)),
        ("operator", json!(operator)),
        ("agent", json!(agent)),
        ("ttl", json!(ttl)),
    ]);
    let path = format!("{API}/certificates");
    let made = call(common.controller(), Method::POST, &path, Some(body.to_string())).await?;
    let part = |name: &str| made[name].as_str().unwrap_or_default().to_owned();
    Ok(Credentials { certificate: part("certificate"), key: key.pem(), authorities: part("authorities") })
}

fn save(
    common: &Common,
    identity: &Identity,
    credentials: &Credentials,
    api: Option<&str>,
    path: &Path,
) -> Result<(), Failure> {
    let until = credentials.holder().map_err(other)?.not_after;
    let days = until.duration_since(SystemTime::now()).unwrap_or_default().as_secs().div_ceil(86_400);
    let made = json!({ "holder": identity.to_string(), "path": path });
    if let Identity::Agent(_) = identity {
        credentials.save(path, IDENTITY_FILES).map_err(other)?;
        return output::show(common.output, &made, || {
            Ok(format!(
                "wrote ca.crt, {IDENTITY_FILES}.crt and {IDENTITY_FILES}.key of {identity} to {} ({days} days)\n\
                 They belong into the directory \"identity\" of that agent's state directory.\n",
                path.display()
            ))
        });
    }
    let given = api.map(ToOwned::to_owned).or_else(|| common.server.clone());
    let server = given.filter(|url| !url.starts_with("unix:"));
    let server = server.unwrap_or_else(|| format!("https://{}:7440", bulkhead_agent::Config::default().host));
    let config = ClientConfig {
        server: server.clone(),
        authorities: credentials.authorities.clone(),
        certificate: credentials.certificate.clone(),
        key: credentials.key.clone(),
        token: String::new(),
    };
    let config = serde_json::to_value(config).map_err(other)?;
    write_private(path, &yaml::document(&config)).map_err(other)?;
    output::show(common.output, &made, || {
        let home = default_config_path().map_or_else(String::new, |path| path.display().to_string());
        Ok(format!(
            "wrote {} for {identity}, who reaches the controller at {server} ({days} days)\n\
             It is a secret. Its owner puts it at {home}, or names it with --client-config.\n",
            path.display()
        ))
    })
}

pub(crate) async fn who_am_i(common: &Common) -> Result<(), Failure> {
    let me = call(common.controller(), Method::GET, &format!("{API}/whoami"), None).await?;
    output::show(common.output, &me, || {
        let groups: Vec<_> =
            me["groups"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let groups = if groups.is_empty() { String::new() } else { format!(", in {}", groups.join(", ")) };
        Ok(format!("{}{groups}\n", text(&me, "/caller")))
    })
}
