//! Atoms, the addresses that match them, and peer classes.
//!
//! An *atom* is one thing that rules in force ask of an address: a peer selector or a list of blocks. The
//! set of atoms that an address matches is its *signature*; equal signatures are one peer class. A block's
//! signature holds what its own members and all enclosing blocks contribute, so that the longest matching
//! block alone tells an address's class.
//!
//! INVARIANT: a class id stands for one signature for as long as anybody may hold it; ids are not reused.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bulkhead_model::Prefix;
use bulkhead_model::host_policy::ClassId;

/// Number of an atom; not reused.
pub(crate) type AtomId = u32;

/// What one address block contributes, and where it stands.
#[derive(Debug, Default)]
struct Block {
    /// Atoms that this very block was entered for, sorted, with the number of entries.
    own: Vec<(AtomId, u32)>,
    class: Option<ClassId>,
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
    dirty: BTreeSet<Prefix>,
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
            dirty: BTreeSet::new(),
            by_signature: HashMap::new(),
            classes: BTreeMap::new(),
            next_class: ClassId::NOBODY.0 + 1,
        }
    }

    /// Enters a block for an atom; it may be entered several times.
    pub(crate) fn add(&mut self, prefix: Prefix, atom: AtomId) {
        let lengths = &mut self.lengths;
        let block = self.blocks.entry(prefix).or_insert_with(|| {
            if !prefix.is_host() {
                *lengths.entry(prefix.mapped_len()).or_default() += 1;
            }
            // One atom, as a rule.
            Block { own: Vec::with_capacity(1), class: None }
        });
        match block.own.binary_search_by_key(&atom, |(atom, _)| *atom) {
            Ok(at) => {
                block.own[at].1 += 1;
                return;
            }
            Err(at) => block.own.insert(at, (atom, 1)),
        }
        self.touch(prefix);
    }

    /// Takes back one [`Classes::add`].
    pub(crate) fn remove(&mut self, prefix: Prefix, atom: AtomId) {
        let Some(block) = self.blocks.get_mut(&prefix) else { return };
        let Ok(at) = block.own.binary_search_by_key(&atom, |(atom, _)| *atom) else { return };
        block.own[at].1 -= 1;
        if block.own[at].1 == 0 {
            block.own.remove(at);
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

    fn touch(&mut self, prefix: Prefix) {
        self.dirty.insert(prefix);
        if !prefix.is_host() {
            let inside = self.blocks.range(prefix..).map(|(block, _)| *block);
            let inside = inside.take_while(|block| block.bits() <= prefix.last_bits());
            self.dirty.extend(inside.filter(|block| prefix.contains(*block)));
        }
    }

    /// Brings the classes up to date and answers the difference.
    pub(crate) fn settle(&mut self) -> ClassChanges {
        let mut changes = ClassChanges::default();
        for prefix in std::mem::take(&mut self.dirty) {
            let signature = self.signature_of(prefix);
            let Some(block) = self.blocks.get(&prefix) else { continue };
            let before = block.class;
            let after =
                if block.own.is_empty() { None } else { Some(self.class_for(signature, &mut changes)) };
            self.rebind(prefix, before, after, &mut changes);
        }
        changes
    }

    fn rebind(
        &mut self,
        prefix: Prefix,
        before: Option<ClassId>,
        after: Option<ClassId>,
        changes: &mut ClassChanges,
    ) {
        if before == after {
            if after.is_none() {
                self.forget(prefix);
            }
            return;
        }
        if let Some(class) = after.and_then(|class| self.classes.get_mut(&class)) {
            class.blocks += 1;
        }
        if let Some(id) = before
            && let Some(class) = self.classes.get_mut(&id)
        {
            class.blocks -= 1;
            if class.blocks == 0 {
                let signature = std::mem::take(&mut class.signature);
                self.by_signature.remove(&signature);
                self.classes.remove(&id);
                changes.died.push(id);
            }
        }
        if let Some(block) = self.blocks.get_mut(&prefix) {
            block.class = after;
        }
        if after.is_none() {
            self.forget(prefix);
        }
        changes.addresses.insert(prefix, after);
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
        let own = |block: &Block| block.own.iter().map(|(atom, _)| *atom).collect::<Vec<_>>();
        let mut atoms = self.blocks.get(&prefix).map(own).unwrap_or_default();
        for length in self.lengths.range(..prefix.mapped_len()).map(|(length, _)| *length) {
            let outer = prefix.truncate(length);
            if outer.contains(prefix) {
                atoms.extend(self.blocks.get(&outer).map(own).unwrap_or_default());
            }
        }
        atoms.sort_unstable();
        atoms.dedup();
        atoms.into()
    }
}
