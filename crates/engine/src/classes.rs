//! Atoms, the addresses that match them, and peer classes.
//!
//! An *atom* is one thing that rules in force ask of an address: a peer selector or a list of blocks. The
//! set of atoms that an address matches is its *signature*; equal signatures are one peer class. A block's
//! signature holds what its own members and all enclosing blocks contribute, so that the longest matching
//! block alone tells an address's class.
//!
//! INVARIANT: a class id stands for one signature for as long as anybody may hold it; ids are not reused.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};

use bulkhead_model::Prefix;
use bulkhead_model::host_policy::ClassId;

/// Number of an atom; not reused.
pub(crate) type AtomId = u32;

/// What one address block contributes, and where it stands.
#[derive(Debug)]
struct Block {
    own: Own,
    /// [`ClassId::NOBODY`] before the first [`Classes::settle`], and once nothing is entered any more.
    class: ClassId,
    /// Whether it stands in the list of what is to be settled.
    dirty: bool,
}

/// Atoms that a block was entered for, with the number of entries. One atom, as a rule, which then takes no memory of
/// its own: there may be hundreds of thousands of blocks.
#[derive(Debug)]
#[expect(clippy::box_collection, reason = "the rare case, and half as large in the usual one")]
enum Own {
    One((AtomId, u32)),
    /// Sorted. None at all means that the block is about to go.
    Any(Box<Vec<(AtomId, u32)>>),
}

impl Own {
    fn entries(&self) -> &[(AtomId, u32)] {
        match self {
            Self::One(entry) => std::slice::from_ref(entry),
            Self::Any(entries) => entries,
        }
    }

    fn atoms(&self) -> impl Iterator<Item = AtomId> {
        self.entries().iter().map(|(atom, _)| *atom)
    }

    /// Answers whether the atom is new.
    fn add(&mut self, atom: AtomId) -> bool {
        let found = self.entries().binary_search_by_key(&atom, |(atom, _)| *atom);
        match (self, found) {
            (Self::One((_, count)), Ok(_)) => *count += 1,
            (Self::Any(entries), Ok(at)) => entries[at].1 += 1,
            (own, Err(at)) => {
                let mut entries = own.entries().to_vec();
                entries.insert(at, (atom, 1));
                *own = Self::of(entries);
                return true;
            }
        }
        false
    }

    /// Answers whether the atom is gone.
    fn remove(&mut self, atom: AtomId) -> bool {
        let Ok(at) = self.entries().binary_search_by_key(&atom, |(atom, _)| *atom) else { return false };
        let mut entries = self.entries().to_vec();
        entries[at].1 -= 1;
        let gone = entries[at].1 == 0;
        if gone {
            entries.remove(at);
        }
        *self = Self::of(entries);
        gone
    }

    fn of(entries: Vec<(AtomId, u32)>) -> Self {
        match entries.as_slice() {
            [entry] => Self::One(*entry),
            _ => Self::Any(Box::new(entries)),
        }
    }
}

#[derive(Debug)]
struct Class {
    signature: Box<[AtomId]>,
    blocks: u32,
}

/// Blocks by address, and the classes that come of them.
#[derive(Debug)]
pub(crate) struct Classes {
    blocks: BTreeMap<Prefix, Block>,
    /// How many blocks there are of each length, single addresses left out.
    lengths: BTreeMap<u8, u32>,
    dirty: Vec<Prefix>,
    by_signature: HashMap<Box<[AtomId]>, ClassId>,
    classes: BTreeMap<ClassId, Class>,
    next_class: u32,
}

/// What a [`Classes::settle`] changed.
#[derive(Debug, Default)]
pub(crate) struct ClassChanges {
    pub(crate) addresses: BTreeMap<Prefix, Option<ClassId>>,
    pub(crate) born: Vec<ClassId>,
    pub(crate) died: Vec<ClassId>,
}

impl Classes {
    pub(crate) fn new() -> Self {
        Self {
            blocks: BTreeMap::new(),
            lengths: BTreeMap::new(),
            dirty: Vec::new(),
            by_signature: HashMap::new(),
            classes: BTreeMap::new(),
            next_class: ClassId::NOBODY.0 + 1,
        }
    }

    /// Enters a block for an atom; it may be entered several times.
    pub(crate) fn add(&mut self, prefix: Prefix, atom: AtomId) {
        match self.blocks.entry(prefix) {
            Entry::Occupied(mut block) => {
                if !block.get_mut().own.add(atom) {
                    return;
                }
            }
            Entry::Vacant(vacant) => {
                if !prefix.is_host() {
                    *self.lengths.entry(prefix.mapped_len()).or_default() += 1;
                }
                vacant.insert(Block { own: Own::One((atom, 1)), class: ClassId::NOBODY, dirty: false });
            }
        }
        self.touch(prefix);
    }

    /// Takes back one [`Classes::add`].
    pub(crate) fn remove(&mut self, prefix: Prefix, atom: AtomId) {
        if self.blocks.get_mut(&prefix).is_some_and(|block| block.own.remove(atom)) {
            self.touch(prefix);
        }
    }

    /// The atoms of a class, sorted; none for [`ClassId::NOBODY`].
    pub(crate) fn signature(&self, class: ClassId) -> &[AtomId] {
        self.classes.get(&class).map_or(&[], |class| &class.signature)
    }

    /// Every class that some block has.
    pub(crate) fn iter(&self) -> impl Iterator<Item = ClassId> {
        self.classes.keys().copied()
    }

    /// Remembers that a block and all that it encloses are to be settled.
    fn touch(&mut self, prefix: Prefix) {
        let inside = self.blocks.range_mut(prefix..);
        let inside = inside.take_while(|(block, _)| block.bits() <= prefix.last_bits());
        let inside = inside.take(if prefix.is_host() { 1 } else { usize::MAX });
        for (inner, block) in inside.filter(|(inner, block)| !block.dirty && prefix.contains(**inner)) {
            block.dirty = true;
            self.dirty.push(*inner);
        }
    }

    /// Brings the classes up to date and answers the difference.
    pub(crate) fn settle(&mut self) -> ClassChanges {
        let mut changes = ClassChanges::default();
        let mut dirty = std::mem::take(&mut self.dirty);
        // The order in which classes get their numbers must not depend on the order of updates.
        dirty.sort_unstable();
        let mut addresses = Vec::new();
        for prefix in dirty {
            let signature = self.signature_of(prefix);
            let Some(block) = self.blocks.get_mut(&prefix) else { continue };
            block.dirty = false;
            let (before, empty) = (block.class, block.own.entries().is_empty());
            let after = if empty { ClassId::NOBODY } else { self.class_for(signature, &mut changes) };
            if before != after {
                self.rebind(prefix, before, after, &mut changes.died);
                addresses.push((prefix, (after != ClassId::NOBODY).then_some(after)));
            }
            if empty {
                self.forget(prefix);
            }
        }
        // Sorted already: a map made at once has full nodes.
        changes.addresses = addresses.into_iter().collect();
        changes
    }

    fn rebind(&mut self, prefix: Prefix, before: ClassId, after: ClassId, died: &mut Vec<ClassId>) {
        if let Some(class) = self.classes.get_mut(&after) {
            class.blocks += 1;
        }
        if let Some(class) = self.classes.get_mut(&before) {
            class.blocks -= 1;
            if class.blocks == 0 {
                let signature = std::mem::take(&mut class.signature);
                self.by_signature.remove(&signature);
                self.classes.remove(&before);
                died.push(before);
            }
        }
        if let Some(block) = self.blocks.get_mut(&prefix) {
            block.class = after;
        }
    }

    fn forget(&mut self, prefix: Prefix) {
        self.blocks.remove(&prefix);
        if !prefix.is_host()
            && let Some(count) = self.lengths.get_mut(&prefix.mapped_len())
        {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&prefix.mapped_len());
            }
        }
    }

    fn class_for(&mut self, signature: Box<[AtomId]>, changes: &mut ClassChanges) -> ClassId {
        if let Some(class) = self.by_signature.get(&signature) {
            return *class;
        }
        let id = ClassId(self.next_class);
        self.next_class += 1;
        self.by_signature.insert(signature.clone(), id);
        self.classes.insert(id, Class { signature, blocks: 0 });
        changes.born.push(id);
        id
    }

    /// Atoms of the block itself and of all that enclose it, sorted.
    fn signature_of(&self, prefix: Prefix) -> Box<[AtomId]> {
        let own = |block: Prefix| self.blocks.get(&block).into_iter().flat_map(|block| block.own.atoms());
        let mut atoms: Vec<AtomId> = own(prefix).collect();
        for length in self.lengths.range(..prefix.mapped_len()).map(|(length, _)| *length) {
            let outer = prefix.truncate(length);
            if outer.contains(prefix) {
                atoms.extend(own(outer));
            }
        }
        atoms.sort_unstable();
        atoms.dedup();
        atoms.into()
    }
}
