//! What rules in force ask of addresses, and who answers to it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

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

#[derive(Debug)]
struct Atom {
    kind: AtomKind,
    /// Compiled policies that read it.
    uses: u32,
    /// Whether its members are known.
    resolved: bool,
    /// Members elsewhere.
    remote: HashMap<Arc<str>, Vec<Prefix>>,
    /// Members here.
    local: HashMap<Arc<str>, Vec<Prefix>>,
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
                for entity in self.locals.values().filter(|entity| selector.matches(&entity.labels)) {
                    entity.prefixes.iter().for_each(|prefix| classes.add(*prefix, id));
                    local.insert(Arc::clone(&entity.name), entity.prefixes.clone());
                }
                false
            }
        };
        self.ids.insert(kind.clone(), id);
        self.atoms.insert(id, Atom { kind, uses: 0, resolved, remote: HashMap::new(), local });
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
            for prefix in atom.remote.values().chain(atom.local.values()).flatten() {
                classes.remove(*prefix, id);
            }
            self.ids.remove(&atom.kind);
        }
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

    pub(super) fn is_resolved(&self, id: AtomId) -> bool {
        self.atoms.get(&id).is_some_and(|atom| atom.resolved)
    }

    pub(super) fn set_local(&mut self, classes: &mut Classes, name: &Arc<str>, entity: Option<&Entity>) {
        for (id, atom) in &mut self.atoms {
            let AtomKind::Selector(selector) = &atom.kind else { continue };
            let prefixes = entity
                .filter(|entity| selector.matches(&entity.labels))
                .map(|entity| entity.prefixes.clone());
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
            replace(classes, id, &mut atom.remote, &member.entity, Some(member.prefixes));
        }
        for name in gone {
            replace(classes, id, &mut atom.remote, &name, None);
        }
        atom.resolved = true;
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
            replace(classes, id, &mut atom.remote, &member.entity, Some(member.prefixes));
        }
        for name in leaves {
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
    members: &mut HashMap<Arc<str>, Vec<Prefix>>,
    name: &Arc<str>,
    prefixes: Option<Vec<Prefix>>,
) {
    if members.get(name) == prefixes.as_ref() {
        return;
    }
    for prefix in prefixes.iter().flatten() {
        classes.add(*prefix, atom);
    }
    let old = match prefixes {
        Some(prefixes) => members.insert(Arc::clone(name), prefixes),
        None => members.remove(name),
    };
    for prefix in old.iter().flatten() {
        classes.remove(*prefix, atom);
    }
}
