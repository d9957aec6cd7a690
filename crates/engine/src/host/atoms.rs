//! What rules in force ask of addresses, and who answers to it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use bulkhead_model::entity::matches;
use bulkhead_model::ports::NamedPort;
use bulkhead_model::{Entity, Prefix, Selector};

use super::Member;
use crate::classes::{AtomId, Classes};

/// What an atom asks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum AtomKind {
    /// Is it an address of a member of this selector?
    Selector(Selector),
    /// Is it in one of these blocks (sorted)?
    Cidrs(Arc<[Prefix]>),
}

/// A member's blocks: one, as a rule, which then takes no memory of its own.
#[derive(Debug, PartialEq, Eq)]
enum Prefixes {
    One(Prefix),
    Any(Box<[Prefix]>),
}

impl Prefixes {
    fn new(prefixes: &[Prefix]) -> Self {
        match prefixes {
            [prefix] => Self::One(*prefix),
            prefixes => Self::Any(prefixes.into()),
        }
    }

    fn as_slice(&self) -> &[Prefix] {
        match self {
            Self::One(prefix) => std::slice::from_ref(prefix),
            Self::Any(prefixes) => prefixes,
        }
    }
}

#[derive(Debug)]
struct Atom {
    kind: AtomKind,
    /// Compiled policies that read it.
    uses: u32,
    /// Whether its members are known.
    resolved: bool,
    /// Members elsewhere.
    remote: HashMap<Arc<str>, Prefixes>,
    /// Named ports of members elsewhere, of those that have any.
    remote_ports: HashMap<Arc<str>, Vec<NamedPort>>,
    /// Members here.
    local: HashMap<Arc<str>, Prefixes>,
}

impl Atom {
    fn set_ports(&mut self, member: &Member) {
        if member.ports.is_empty() {
            self.remote_ports.remove(&member.entity);
        } else {
            self.remote_ports.insert(Arc::clone(&member.entity), member.ports.clone());
        }
    }
}

/// All atoms in force.
#[derive(Debug, Default)]
pub(super) struct Atoms {
    atoms: BTreeMap<AtomId, Atom>,
    ids: HashMap<AtomKind, AtomId>,
    /// Local entities, for atoms to come.
    locals: BTreeMap<Arc<str>, Entity>,
    /// Atoms that nobody reads any more, still part of the classes.
    retired: BTreeSet<AtomId>,
    next: AtomId,
    /// How often selectors have come, gone or been answered.
    asks: u64,
}

impl Atoms {
    /// The atom that asks this; it is new and without uses if nobody asked before.
    pub(super) fn id(&mut self, classes: &mut Classes, kind: AtomKind) -> AtomId {
        if let Some(id) = self.ids.get(&kind) {
            return *id;
        }
        let id = self.next;
        self.next += 1;
        let mut local = HashMap::new();
        let resolved = match &kind {
            AtomKind::Cidrs(blocks) => {
                blocks.iter().for_each(|block| classes.add(*block, id));
                true
            }
            AtomKind::Selector(selector) => {
                self.asks += 1;
                for entity in self.locals.values().filter(|entity| matches(selector, &entity.labels)) {
                    entity.prefixes.iter().for_each(|prefix| classes.add(*prefix, id));
                    local.insert(Arc::clone(&entity.name), Prefixes::new(&entity.prefixes));
                }
                false
            }
        };
        self.ids.insert(kind.clone(), id);
        self.atoms.insert(
            id,
            Atom { kind, uses: 0, resolved, remote: HashMap::new(), remote_ports: HashMap::new(), local },
        );
        self.retired.insert(id);
        id
    }

    pub(super) fn acquire(&mut self, atoms: impl Iterator<Item = AtomId>) {
        for id in atoms {
            if let Some(atom) = self.atoms.get_mut(&id) {
                atom.uses += 1;
                self.retired.remove(&id);
            }
        }
    }

    pub(super) fn release(&mut self, atoms: impl Iterator<Item = AtomId>) {
        for id in atoms {
            if let Some(atom) = self.atoms.get_mut(&id) {
                atom.uses -= 1;
                if atom.uses == 0 {
                    self.retired.insert(id);
                }
            }
        }
    }

    pub(super) fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Takes atoms that nobody reads out of the classes.
    pub(super) fn collect(&mut self, classes: &mut Classes) {
        for id in std::mem::take(&mut self.retired) {
            let Some(atom) = self.atoms.remove(&id) else { continue };
            if let AtomKind::Cidrs(blocks) = &atom.kind {
                blocks.iter().for_each(|block| classes.remove(*block, id));
            }
            for prefix in atom.remote.values().chain(atom.local.values()).flat_map(Prefixes::as_slice) {
                classes.remove(*prefix, id);
            }
            self.asks += u64::from(matches!(atom.kind, AtomKind::Selector(_)));
            self.ids.remove(&atom.kind);
        }
    }

    pub(super) fn asks(&self) -> u64 {
        self.asks
    }

    pub(super) fn selectors(&self) -> impl Iterator<Item = &Selector> {
        self.atoms.values().filter_map(|atom| match &atom.kind {
            AtomKind::Selector(selector) => Some(selector),
            AtomKind::Cidrs(_) => None,
        })
    }

    pub(super) fn unresolved(&self) -> impl Iterator<Item = &Selector> {
        self.atoms.values().filter(|atom| !atom.resolved).filter_map(|atom| match &atom.kind {
            AtomKind::Selector(selector) => Some(selector),
            AtomKind::Cidrs(_) => None,
        })
    }

    pub(super) fn selector(&self, id: AtomId) -> Option<&Selector> {
        match &self.atoms.get(&id)?.kind {
            AtomKind::Selector(selector) => Some(selector),
            AtomKind::Cidrs(_) => None,
        }
    }

    /// Named ports that members of a selector have, and whether the members are known.
    pub(super) fn ports_of_members(&self, selector: &Selector) -> impl Iterator<Item = &NamedPort> {
        let atom = self.ids.get(&AtomKind::Selector(selector.clone())).and_then(|id| self.atoms.get(id));
        let here =
            atom.into_iter().flat_map(|atom| atom.local.keys()).filter_map(|name| self.locals.get(name));
        let elsewhere = atom.into_iter().flat_map(|atom| atom.remote_ports.values().flatten());
        here.flat_map(|entity| &entity.ports).chain(elsewhere)
    }

    pub(super) fn is_resolved(&self, id: AtomId) -> bool {
        self.atoms.get(&id).is_some_and(|atom| atom.resolved)
    }

    pub(super) fn set_local(&mut self, classes: &mut Classes, name: &Arc<str>, entity: Option<&Entity>) {
        for (id, atom) in &mut self.atoms {
            let AtomKind::Selector(selector) = &atom.kind else { continue };
            let prefixes = entity
                .filter(|entity| matches(selector, &entity.labels))
                .map(|entity| entity.prefixes.as_slice());
            replace(classes, *id, &mut atom.local, name, prefixes);
        }
        match entity {
            Some(entity) => self.locals.insert(Arc::clone(name), entity.clone()),
            None => self.locals.remove(name),
        };
    }

    pub(super) fn set_members(
        &mut self,
        classes: &mut Classes,
        selector: &Selector,
        members: impl Iterator<Item = Member>,
    ) {
        let Some((id, atom)) = self.find(selector) else { return };
        let mut gone: BTreeSet<Arc<str>> = atom.remote.keys().cloned().collect();
        for member in members {
            gone.remove(&member.entity);
            atom.set_ports(&member);
            replace(classes, id, &mut atom.remote, &member.entity, Some(&member.prefixes));
        }
        for name in gone {
            atom.remote_ports.remove(&name);
            replace(classes, id, &mut atom.remote, &name, None);
        }
        self.asks += u64::from(!std::mem::replace(&mut atom.resolved, true));
    }

    pub(super) fn change_members(
        &mut self,
        classes: &mut Classes,
        selector: &Selector,
        joins: impl Iterator<Item = Member>,
        leaves: impl IntoIterator<Item = Arc<str>>,
    ) {
        let Some((id, atom)) = self.find(selector).filter(|(_, atom)| atom.resolved) else { return };
        for member in joins {
            atom.set_ports(&member);
            replace(classes, id, &mut atom.remote, &member.entity, Some(&member.prefixes));
        }
        for name in leaves {
            atom.remote_ports.remove(&name);
            replace(classes, id, &mut atom.remote, &name, None);
        }
    }

    fn find(&mut self, selector: &Selector) -> Option<(AtomId, &mut Atom)> {
        let id = *self.ids.get(&AtomKind::Selector(selector.clone()))?;
        Some((id, self.atoms.get_mut(&id)?))
    }
}

/// Sets one member's blocks; new ones are entered before old ones are taken out.
fn replace(
    classes: &mut Classes,
    atom: AtomId,
    members: &mut HashMap<Arc<str>, Prefixes>,
    name: &Arc<str>,
    prefixes: Option<&[Prefix]>,
) {
    if members.get(name).map(Prefixes::as_slice) == prefixes {
        return;
    }
    for prefix in prefixes.into_iter().flatten() {
        classes.add(*prefix, atom);
    }
    let old = match prefixes {
        Some(prefixes) => members.insert(Arc::clone(name), Prefixes::new(prefixes)),
        None => members.remove(name),
    };
    for prefix in old.iter().flat_map(Prefixes::as_slice) {
        classes.remove(*prefix, atom);
    }
}
