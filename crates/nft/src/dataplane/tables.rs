//! Writing the tables: the fence, whole states, differences, repair.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Instant;

use bulkhead_dataplane::{DataplaneError, grace_period};
use bulkhead_model::host_policy::HostPolicy;

use super::epochs::Settling;
use super::{NftDataplane, failed};
use crate::flows::Judge;
use crate::groups::Groups;
use crate::guard::{self, Guard};
use crate::image::{Changes, Image};
use crate::message::{Request, SUBSYSTEM_NFTABLES, messages};
use crate::object::Element;
use crate::rules::Shape;
use crate::schema::{ATTACHED, EDGE, FENCE, GUARDED, JUDGE, SPARED};
use crate::socket::{Refused, Talker};
use crate::{kernel, links, readback, requirements, rules, skeleton};

/// `NFNLGRP_NFTABLES`: whatever anybody changes in any table.
const GROUP_TABLES: u32 = 7;
/// The only key of the fence.
const FENCE_KEY: [u8; 4] = [0, 0, 0, 1];

impl NftDataplane {
    /// Raises the fence and learns what is there, or makes it.
    pub(super) fn take_over(&mut self, exists: bool) -> Result<(), DataplaneError> {
        if !self.ours {
            // Tables of another layout go on until the first replacement.
            self.generation = 1;
            return if exists {
                Ok(())
            } else {
                self.rebuild(&HostPolicy::default(), &BTreeSet::new(), &Groups::new())
            };
        }
        let before = self.fence()?.unwrap_or(0);
        self.generation = before + 1;
        let mut requests = Vec::new();
        FENCE.remove(&[fence_element(before)], &mut requests);
        FENCE.add(&[fence_element(self.generation)], &mut requests);
        self.transact(&requests)?;
        self.image = readback::read(&mut self.talker)?.image();
        // The rules may be able to ask more: they are written anew at the first replacement.
        self.shape = None;
        Ok(())
    }

    /// Generation in the kernel; `None` if there is none.
    pub(super) fn fence(&mut self) -> Result<Option<u64>, DataplaneError> {
        let pairs = kernel::pairs(&mut self.talker, FENCE).map_err(failed("read the generation"))?;
        Ok(pairs.first().and_then(|(_, data)| Some(u64::from_be_bytes(data.as_slice().try_into().ok()?))))
    }

    pub(super) fn check_fence(&mut self) -> Result<(), DataplaneError> {
        match self.fence()? {
            Some(current) if current > self.generation => {
                Err(DataplaneError::Fenced { current, own: self.generation })
            }
            _ => Ok(()),
        }
    }

    /// One transaction, which the kernel refuses if somebody has taken over.
    pub(super) fn write(&mut self, requests: Vec<Request>) -> Result<(), DataplaneError> {
        if requests.is_empty() {
            return Ok(());
        }
        let mut fenced = Vec::with_capacity(requests.len() + 1);
        FENCE.add(&[fence_element(self.generation)], &mut fenced);
        fenced.extend(requests);
        self.transact(&fenced)
    }

    pub(super) fn transact(&mut self, requests: &[Request]) -> Result<(), DataplaneError> {
        // What we change ourselves would come back, element by element.
        let quiet = failed("listen to changes of tables");
        let before = kernel::generation(&mut self.talker).map_err(&quiet)?;
        self.tables.leave(GROUP_TABLES).map_err(&quiet)?;
        let result = self.talker.transact(requests);
        self.tables.join(GROUP_TABLES).map_err(&quiet)?;
        let after = kernel::generation(&mut self.talker).map_err(&quiet)?;
        let own = u32::from(result.is_ok() && !requests.is_empty());
        // Somebody else may have changed tables of ours while nobody listened.
        self.suspicious |= after.wrapping_sub(before) != own;
        result.map_err(|refused| self.describe(&refused))
    }

    pub(super) fn describe(&mut self, refused: &Refused) -> DataplaneError {
        let code = refused.error.raw_os_error();
        if refused.index == 0 && matches!(code, Some(libc::EBUSY | libc::EEXIST)) {
            let current = self.fence().ok().flatten().unwrap_or(self.generation + 1);
            return DataplaneError::Fenced { current, own: self.generation };
        }
        // Something that must be there is not.
        self.disturbed |= code == Some(libc::ENOENT);
        let error = io::Error::from_raw_os_error(code.unwrap_or(libc::EIO));
        DataplaneError::io(format!("change the tables (request {})", refused.index), error)
    }

    /// Everything anew, in one transaction: whatever is there under our name goes in the same moment.
    pub(super) fn rebuild(
        &mut self,
        policy: &HostPolicy,
        attached: &BTreeSet<u32>,
        groups: &Groups,
    ) -> Result<(), DataplaneError> {
        let context = failed("read the tables");
        for table in [JUDGE, EDGE] {
            kernel::counters(&mut self.talker, table, &mut self.counted).map_err(&context)?;
        }
        let (image, changes) = Image::rebuild(policy, attached.clone(), groups.clone());
        let mut requests = Vec::new();
        for table in [JUDGE, EDGE] {
            if kernel::user_data(&mut self.talker, table).map_err(&context)?.is_some() {
                requests.push(table.delete());
            }
        }
        let user_data = skeleton::user_data(&self.settings);
        requests.extend(skeleton::create(&user_data, &self.counted, image.shape()));
        FENCE.add(&[fence_element(self.generation)], &mut requests);
        for (ifindex, name) in named(attached) {
            requests.extend(skeleton::hook(ifindex, &name));
            ATTACHED.add(&[interface_element(ifindex)], &mut requests);
        }
        if self.guard.is_none() && self.ours {
            // Of an earlier process, until this one is told.
            for set in [GUARDED, SPARED] {
                let found = kernel::elements(&mut self.talker, set).unwrap_or_default();
                set.add(&guard::in_order(found), &mut requests);
            }
        }
        for (set, elements) in self.guard.iter().flat_map(Guard::elements) {
            set.add(&elements, &mut requests);
        }
        requests.extend(changes.requests().into_iter().flatten());
        self.transact(&requests)?;
        (self.shape, self.ours, self.disturbed) = (Some(image.shape()), true, false);
        // What labels say stays, and may be of tables of another layout.
        let mut epochs = self.epochs.take().unwrap_or_default();
        epochs.end();
        self.epochs = Some(epochs);
        self.settling = Settling::Changed(Instant::now());
        self.set_image(image);
        Ok(())
    }

    pub(super) fn set_image(&mut self, image: Image) {
        self.image = image;
        self.know_endpoints();
    }

    /// Follows who has which address; connections are to be judged again.
    pub(super) fn know_endpoints(&mut self) {
        self.judge = Judge::of(&self.image, kernel::own_addresses());
        self.unsettled = true;
    }

    /// Writes what the image has become; `before`: what the rules had to be able to ask until now.
    pub(super) fn commit(&mut self, changes: &Changes, before: Shape) -> Result<(), DataplaneError> {
        let replaced = std::mem::take(&mut self.replaced);
        let written = self.write_changes(changes, before);
        self.know_endpoints();
        if written.is_ok() {
            self.replaced = replaced;
        } else {
            // What is there is not what we take it for, until a replacement has read it.
            (self.shape, self.epochs) = (None, None);
        }
        written
    }

    fn write_changes(&mut self, changes: &Changes, before: Shape) -> Result<(), DataplaneError> {
        let mut all = changes.requests();
        let wanted = self.image.shape();
        // Packets on their way meet rules that can ask what either state needs.
        let meanwhile = self.shape.map_or(wanted.union(before), |shape| shape.union(wanted));
        if self.shape != Some(meanwhile) {
            let chains = kernel::chains(&mut self.talker, JUDGE).map_err(failed("list chains"))?;
            all[0].extend(skeleton::rewrite(meanwhile, &chains));
        }
        if wanted != meanwhile {
            all[2].extend(skeleton::rewrite(wanted, &rules::names(meanwhile)));
        }
        if let Some(earliest) = all.iter_mut().find(|requests| !requests.is_empty()) {
            earliest.splice(0..0, self.end_epoch()?);
        }
        let [first, second, last] = all;
        self.write(first)?;
        self.write(second)?;
        if !last.is_empty() {
            // A packet that has read the old half of something must still find what it leads to.
            grace_period().map_err(|error| DataplaneError::io("wait for packets on their way", error))?;
            self.write(last)?;
        }
        self.shape = Some(wanted);
        Ok(())
    }

    pub(super) fn replace_all(&mut self, policy: &HostPolicy) -> Result<Changes, DataplaneError> {
        self.check_fence()?;
        Image::check_policy(policy, &self.capacities)?;
        let (attached, groups) = (self.image.attached().clone(), self.image.groups().clone());
        let there =
            |table, talker: &mut Talker| kernel::user_data(talker, table).map_err(failed("read the tables"));
        let whole = there(JUDGE, &mut self.talker)?.is_some() && there(EDGE, &mut self.talker)?.is_some();
        if !self.ours || !whole || self.disturbed {
            self.rebuild(policy, &attached, &groups)?;
            self.replaced = true;
            return Ok(Image::rebuild(policy, attached, groups).1);
        }
        if !self.replaced {
            self.image = readback::read(&mut self.talker)?.image();
        }
        let before = self.image.shape();
        let changes = self.image.replace(policy);
        self.commit(&changes, before)?;
        self.replaced = true;
        Ok(changes)
    }

    /// Has the tables close what the agent has named, before anybody is in charge of it.
    pub(super) fn put_guard(&mut self) -> Result<(), DataplaneError> {
        self.check_fence()?;
        if !self.ours {
            // With the tables that come.
            return Ok(());
        }
        let mut requests = Vec::new();
        for (set, wanted) in self.guard.iter().flat_map(Guard::elements) {
            let found = kernel::elements(&mut self.talker, set).map_err(failed("read the tables"))?;
            let found = guard::in_order(found);
            if found != guard::in_order(wanted.clone()) {
                set.remove(&found, &mut requests);
                set.add(&wanted, &mut requests);
            }
        }
        self.write(requests)
    }

    /// Whether the tables close what they have to.
    fn guards(&mut self) -> bool {
        let wanted = self.guard.as_ref().map(Guard::elements);
        wanted.into_iter().flatten().all(|(set, wanted)| {
            let found = kernel::elements(&mut self.talker, set);
            found.is_ok_and(|found| guard::in_order(found) == guard::in_order(wanted))
        })
    }

    pub(super) fn put_groups(&mut self, groups: Groups) -> Result<(), DataplaneError> {
        let before = self.image.shape();
        let changes = self.image.set_groups(groups);
        self.commit(&changes, before)
    }

    pub(super) fn put_attached(
        &mut self,
        attached: BTreeSet<u32>,
        mut requests: Vec<Request>,
    ) -> Result<(), DataplaneError> {
        let changes = self.image.set_attached(attached);
        requests.extend(changes.requests().into_iter().flatten());
        requests.splice(0..0, self.end_epoch()?);
        let written = self.write(requests);
        if written.is_err() {
            self.epochs = None;
        }
        self.know_endpoints();
        written
    }

    /// Has the kernel show us what bridges carry, once an interface in charge is a port of one. It may have become one
    /// after it was taken charge of: that is how containers come.
    pub(super) fn see_bridges(&mut self) -> Result<(), DataplaneError> {
        if self.bridged {
            return Ok(());
        }
        for ifindex in self.image.attached() {
            self.bridged |= links::is_bridge_port(*ifindex).map_err(failed("look at an interface"))?;
        }
        if self.bridged {
            kernel::settings::set_for_bridges().map_err(|error| {
                let advice = format!("what a bridge carries is not seen without br_netfilter ({error})");
                requirements::missing("bridge-nf-call-iptables", advice)
            })?;
        }
        Ok(())
    }

    /// Puts back what somebody else has taken away or changed.
    pub(super) fn repair(&mut self) -> Result<(), DataplaneError> {
        self.check_fence()?;
        let (policy, attached) = (self.image.policy().clone(), self.image.attached().clone());
        let groups = self.image.groups().clone();
        self.rebuild(&policy, &attached, &groups)
    }

    /// Whether somebody else has changed a table of ours.
    pub(super) fn watch(&mut self) -> Result<(), DataplaneError> {
        if std::mem::take(&mut self.suspicious) {
            let whole = readback::read(&mut self.talker).is_ok_and(|found| found.is(&self.image));
            self.disturbed |= !whole || !self.guards();
        }
        loop {
            match self.tables.next() {
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => {
                    self.disturbed |= messages(&bytes).any(|message| {
                        message.subsystem() == SUBSYSTEM_NFTABLES
                            && [JUDGE, EDGE].iter().any(|table| {
                                message.family() == table.family
                                    && message.attributes().text(1) == Some(table.name)
                            })
                    });
                }
                // More has happened than we could follow.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.disturbed = true,
                Err(error) => return Err(DataplaneError::io("hear of changes of tables", error)),
            }
        }
    }
}

pub(super) fn user_data(talker: &mut Talker) -> Result<Option<Vec<u8>>, DataplaneError> {
    let context = failed("read the tables");
    let judge = kernel::user_data(talker, JUDGE).map_err(&context)?;
    let edge = kernel::user_data(talker, EDGE).map_err(&context)?;
    Ok(match (judge, edge) {
        (Some(judge), Some(edge)) if judge == edge => Some(judge),
        (None, None) => None,
        // Half of something.
        _ => Some(Vec::new()),
    })
}

fn fence_element(generation: u64) -> Element {
    Element::Key { key: FENCE_KEY.to_vec(), data: generation.to_be_bytes().to_vec() }
}

pub(super) fn interface_element(ifindex: u32) -> Element {
    Element::Key { key: ifindex.to_ne_bytes().to_vec(), data: Vec::new() }
}

/// Those of the interfaces that exist, with their names.
pub(super) fn named(interfaces: &BTreeSet<u32>) -> BTreeMap<u32, String> {
    interfaces.iter().filter_map(|index| Some((*index, kernel::interface_name(*index)?))).collect()
}
