//! Who may do what with the repository: role bindings.

use serde_json::{Map, Value as Json, json};

use crate::document::{Decoder, Node};
use crate::resource::is_name;

/// Most subjects, tiers or namespaces of a binding.
const LIST_MAX: usize = 1000;

/// What its holder may do; each may also do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Read everything but tokens and the like; with namespaces, only what is in these.
    Viewer,
    /// Change policies, in the tiers and namespaces of the binding, and network sets in its namespaces.
    Editor,
    /// Change everything but role bindings and settings.
    Operator,
    /// Everything.
    Admin,
}

const ROLES: [(&str, Role); 4] = [
    ("Viewer", Role::Viewer),
    ("Editor", Role::Editor),
    ("Operator", Role::Operator),
    ("Admin", Role::Admin),
];

impl Role {
    /// As manifests have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "Viewer",
            Self::Editor => "Editor",
            Self::Operator => "Operator",
            Self::Admin => "Admin",
        }
    }
}

/// `spec` of a RoleBinding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleBindingSpec {
    /// What they may do.
    pub role: Role,
    /// Names of operators.
    pub users: Vec<String>,
    /// Names of groups.
    pub groups: Vec<String>,
    /// Of an editor: only policies in these tiers; absent: in all.
    pub tiers: Option<Vec<String>>,
    /// Of an editor or viewer: only objects in these namespaces; absent: in all, and in none.
    pub namespaces: Option<Vec<String>>,
}

impl RoleBindingSpec {
    pub(crate) fn decode(decoder: &mut Decoder, node: &Node) -> Option<Self> {
        let mut fields = decoder.fields(node, "the binding")?;
        let role = fields.required(decoder, "role", |decoder, node| decoder.word(node, &ROLES));
        let users = fields.optional(decoder, "users", subjects);
        let groups = fields.optional(decoder, "groups", subjects);
        let (mut tiers, mut namespaces) = (None, None);
        if matches!(role, None | Some(Role::Editor)) {
            tiers = fields.optional(decoder, "tiers", names);
        } else {
            fields.refuse(decoder, "tiers", "only the role Editor is bound to tiers");
        }
        if matches!(role, None | Some(Role::Editor | Role::Viewer)) {
            namespaces = fields.optional(decoder, "namespaces", names);
        } else {
            fields.refuse(decoder, "namespaces", "only the roles Editor and Viewer are bound to namespaces");
        }
        fields.finish(decoder);
        let (users, groups) = (users.unwrap_or_default(), groups.unwrap_or_default());
        if users.is_empty() && groups.is_empty() {
            decoder.problem(node, "expected users or groups: nobody is bound to the role");
            return None;
        }
        Some(Self { role: role?, users, groups, tiers, namespaces })
    }

    pub(crate) fn to_json(&self) -> Json {
        let Self { role, users, groups, tiers, namespaces } = self;
        let mut spec = Map::new();
        spec.insert("role".into(), json!(role.as_str()));
        for (name, list) in [("users", users), ("groups", groups)] {
            if !list.is_empty() {
                spec.insert(name.into(), json!(list));
            }
        }
        for (name, list) in [("tiers", tiers), ("namespaces", namespaces)] {
            if let Some(list) = list {
                spec.insert(name.into(), json!(list));
            }
        }
        Json::Object(spec)
    }

    /// Whether somebody is bound by it.
    pub fn binds<'a>(&self, user: &str, groups: impl IntoIterator<Item = &'a str>) -> bool {
        self.users.iter().any(|name| name == user)
            || groups.into_iter().any(|group| self.groups.iter().any(|name| name == group))
    }
}

/// Names of users or groups: what a certificate or a token can say.
fn subjects(decoder: &mut Decoder, node: &Node) -> Option<Vec<String>> {
    decoder.list(node, LIST_MAX, |decoder, node| {
        let text = decoder.string(node)?;
        let allowed =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'@' | b':');
        if (1..=253).contains(&text.len()) && text.bytes().all(allowed) {
            return Some(text);
        }
        decoder.expected(node, "a name of letters, digits, '.', '-', '_', '@' or ':'")
    })
}

/// Names of objects.
fn names(decoder: &mut Decoder, node: &Node) -> Option<Vec<String>> {
    decoder.list(node, LIST_MAX, |decoder, node| {
        let text = decoder.string(node)?;
        if is_name(&text) { Some(text) } else { decoder.expected(node, "the name of an object") }
    })
}

#[cfg(test)]
mod tests {
    use crate::document::parse;

    const HEAD: &str = "apiVersion: bulkhead.dev/v1\nkind: RoleBinding\nmetadata: {name: a}\nspec: ";

    #[test]
    fn bindings_come_back_as_they_were_written() {
        for spec in [
            "{role: Viewer, users: [ann@example.org]}",
            "{role: Viewer, groups: [shop], namespaces: [shop]}",
            "{role: Editor, groups: [net], tiers: [application], namespaces: [shop, blog]}",
            "{role: Admin, users: [ann], groups: ['bulkhead:admins']}",
        ] {
            let resource = parse("test", &format!("{HEAD}{spec}")).unwrap().remove(0).resource;
            let again = crate::Resource::from_json(&resource.to_json()).unwrap();
            assert_eq!(again, resource);
        }
    }

    #[test]
    fn wrong_bindings_are_refused_with_the_place() {
        for (spec, expected) in [
            ("{role: Viewer}", "nobody is bound"),
            ("{role: Root, users: [ann]}", "expected Viewer, Editor, Operator, Admin"),
            ("{role: Viewer, users: [a b]}", "expected a name"),
            ("{role: Operator, users: [ann], tiers: [x]}", "only the role Editor"),
            ("{role: Viewer, users: [ann], tiers: [x]}", "only the role Editor"),
            ("{role: Admin, users: [ann], namespaces: [x]}", "only the roles Editor and Viewer"),
            ("{role: Editor, users: [ann], tier: [x]}", "unknown field"),
        ] {
            let problems = parse("test", &format!("{HEAD}{spec}")).unwrap_err();
            let text: String = problems.iter().map(ToString::to_string).collect();
            assert!(text.contains(expected), "{spec}: {text}");
        }
    }
}
