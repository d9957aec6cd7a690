//! What a path names: a kind, perhaps a namespace, perhaps an object; and how its objects look from there.

use std::collections::BTreeMap;

use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;
use bulkhead_model::document::{Node, Value as Tree};
use bulkhead_model::foreign::DEFAULT_NAMESPACE;
use bulkhead_model::kind::Scope;
use bulkhead_model::resource::{API_VERSION, NO_NAMESPACE};
use bulkhead_model::{Kind, ObjectKey, Resource};
use serde_json::{Value, json};

use crate::api::problem::Refusal;
use crate::repository::{Repository, managed_fields};

/// Whether clients have the kind built in.
pub(super) fn is_builtin(kind: Kind) -> bool {
    matches!(kind.api_version(), "v1" | "networking.k8s.io/v1" | "discovery.k8s.io/v1")
}

/// Characters at the end of a name that is made from `generateName`, as in Kubernetes.
const GENERATED_LEN: usize = 5;

/// What a path names.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) kind: Kind,
    /// `apiVersion` that objects have here; `None`: the one that they were written with.
    version: Option<String>,
    /// `None`: the path names none.
    pub(crate) namespace: Option<Lies>,
    name: Option<String>,
    /// Whether the path says [`NO_NAMESPACE`].
    unnamed: bool,
}

/// Where an object lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lies {
    /// In no namespace.
    Outside,
    /// In this one.
    In(String),
}

impl Lies {
    /// As keys have it.
    pub(crate) fn namespace(&self) -> Option<&str> {
        match self {
            Self::Outside => None,
            Self::In(name) => Some(name),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Place {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let variables: Path<BTreeMap<String, String>> = Path::from_request_parts(parts, state)
            .await
            .map_err(|error| Refusal::bad_request(error.to_string()))?;
        let version = match (variables.get("group"), variables.get("version")) {
            (Some(group), Some(version)) => format!("{group}/{version}"),
            _ if parts.uri.path().starts_with("/api/") => "v1".to_owned(),
            _ => API_VERSION.to_owned(),
        };
        Self::of(&version, &variables)
    }
}

impl Place {
    fn of(version: &str, variables: &BTreeMap<String, String>) -> Result<Self, Refusal> {
        let plural = variables.get("plural").map_or("", String::as_str);
        let own = version == API_VERSION;
        // Below Bulkhead's own version every kind is to be had, under its unique name.
        let kind = if own {
            let kind = Kind::ALL.iter().find(|kind| kind.plural() == plural).copied();
            kind.ok_or_else(|| Refusal::no_such_kind(plural))?
        } else {
            Kind::of_resource(version, plural)
                .ok_or_else(|| Refusal::not_found(format!("there is no {plural:?} in {version}")))?
        };
        let given = variables.get("namespace");
        let unnamed = given.is_some_and(|name| name == NO_NAMESPACE);
        let namespace = given.map(|name| match (unnamed, kind.scope()) {
            (false, _) => Lies::In(name.clone()),
            (true, Scope::Namespaced) => Lies::In(DEFAULT_NAMESPACE.to_owned()),
            (true, Scope::Either | Scope::Fleet) => Lies::Outside,
        });
        let version = (!own).then(|| version.to_owned());
        Ok(Self { kind, version, namespace, name: variables.get("name").cloned(), unnamed })
    }

    /// The object that the path names.
    pub(crate) fn key(&self) -> ObjectKey {
        let namespace = self.namespace.as_ref().and_then(Lies::namespace).map(ToOwned::to_owned);
        ObjectKey { kind: self.kind, namespace, name: self.name.clone().unwrap_or_default() }
    }

    /// The name, if the path has one.
    pub(crate) fn name(&self) -> Option<&String> {
        self.name.as_ref()
    }

    /// `apiVersion` and `kind` of a list from here.
    pub(crate) fn list_type(&self) -> (String, String) {
        match &self.version {
            Some(version) => (version.clone(), format!("{}List", self.kind.manifest_kind())),
            None => (API_VERSION.to_owned(), format!("{}List", self.kind)),
        }
    }

    /// `apiVersion` and `kind` of an object from here.
    pub(crate) fn object_type(&self) -> (&str, &'static str) {
        (self.version.as_deref().unwrap_or(self.kind.api_version()), self.kind.manifest_kind())
    }

    /// An object as it looks from here, with who set its fields.
    pub(crate) fn shown(&self, repository: &Repository, resource: &Resource) -> Value {
        let mut object = resource.to_json();
        if let Some(fields) = managed_fields(&repository.owners(resource)) {
            object["metadata"]["managedFields"] = fields;
        }
        self.show(&mut object);
        object
    }

    /// Whether it is the namespace that stands for none: kubectl asks for it when something in it is not found.
    pub(crate) fn is_no_namespace(&self) -> bool {
        self.kind == Kind::KubernetesNamespace && self.name.as_deref() == Some(NO_NAMESPACE)
    }

    /// That namespace, which nobody has made.
    pub(crate) fn no_namespace(&self) -> Value {
        let (version, kind) = self.object_type();
        json!({ "apiVersion": version, "kind": kind, "metadata": { "name": NO_NAMESPACE } })
    }

    /// Makes an object look as it does from here.
    pub(crate) fn show(&self, object: &mut Value) {
        if let Some(version) = &self.version {
            object["apiVersion"] = json!(version);
        }
        // Who asks for objects of a namespace expects to read its name in them.
        if self.unnamed && self.kind.scope() != Scope::Fleet {
            object["metadata"]["namespace"] = json!(NO_NAMESPACE);
        }
    }

    /// Makes what was sent to this place what the model reads: the namespace of the path, and none of what only clients of
    /// Kubernetes send.
    pub(crate) fn take(&self, manifest: &mut Node) {
        let position = manifest.position;
        let Tree::Mapping(fields) = &mut manifest.value else { return };
        let metadata = fields.iter_mut().find(|(key, _)| key.as_str() == Some("metadata"));
        let Some(Tree::Mapping(metadata)) = metadata.map(|(_, metadata)| &mut metadata.value) else { return };
        let mut prefix = None;
        metadata.retain(|(key, value)| match key.as_str() {
            Some("generateName") => {
                prefix = value.as_str().map(ToOwned::to_owned);
                false
            }
            Some("managedFields" | "selfLink") => false,
            // As programs write what they do not know.
            Some("creationTimestamp" | "namespace") => value.value != Tree::Null,
            _ => true,
        });
        let names = |name: &str, metadata: &[(Node, Node)]| {
            metadata.iter().any(|(key, _)| key.as_str() == Some(name))
        };
        let text = |text: &str| Node { position, value: Tree::String(text.to_owned()) };
        if let Some(prefix) = prefix.filter(|_| !names("name", metadata)) {
            let ending = &bulkhead_store::random_id()[..GENERATED_LEN];
            metadata.push((text("name"), text(&format!("{prefix}{ending}"))));
        }
        if let Some(Lies::In(namespace)) = &self.namespace
            && self.kind.scope() != Scope::Fleet
            && !names("namespace", metadata)
        {
            metadata.push((text("namespace"), text(namespace)));
        }
    }
}
