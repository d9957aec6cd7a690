//! How agents and operators of a lab come in.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{API, Bulkhead};

impl Bulkhead {
    /// What an agent that has no certificate yet joins with: a token, or, where there is no controller to make one, a
    /// certificate that is made beforehand.
    ///
    /// # Errors
    /// If neither can be made.
    pub fn invite(&self, host: &str, state: &Path) -> Result<Vec<String>> {
        let files = state.join("identity");
        if files.join("agent.crt").exists() {
            return Ok(Vec::new());
        }
        if self.controller.is_some() {
            let made = self.json(&["token", "create", "--host", host])?;
            let token = made["token"].as_str().context("a token")?;
            return Ok(vec!["--join-token".into(), token.into()]);
        }
        let identity = self.identity().display().to_string();
        if !self.identity().join("ca.key").exists() {
            self.ok(&["init", "--identity-dir", &identity])?;
        }
        let (holder, files) = (format!("agent/{host}"), files.display().to_string());
        self.ok(&["certificate", "create", &holder, "--identity-dir", &identity, "--write", &files])?;
        Ok(Vec::new())
    }

    /// A client configuration of an administrator who reaches the controller over the network.
    ///
    /// # Errors
    /// If the controller does not make it.
    pub fn administrator(&self) -> Result<PathBuf> {
        let path = self.lab.directory().join("client.yaml");
        if !path.exists() {
            let (api, write) = (format!("https://{API}"), path.display().to_string());
            let arguments =
                ["certificate", "create", "operator/lab", "--group", "bulkhead:admins", "--api", &api];
            self.ok(&[&arguments[..], &["--write", &write]].concat())?;
        }
        Ok(path)
    }
}
