//! The tables in force as the kernel holds them: for a process that comes after another, and for whoever asks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_dataplane::DataplaneError;
use bulkhead_model::host_policy::{
    Attachment, ClassId, Column, CompiledId, CompiledPolicy, EndpointBinding, HostPolicy, Row, Variant,
    merged,
};

use crate::elements;
use crate::image::endpoints::{self, Content};
use crate::image::{Image, numbers::Numbers};
use crate::kernel;
use crate::schema::{self, ATTACHED, BOUND, DEFAULT_ROW, FAMILIES, Family, ROWS, STEPS, VARIANTS};
use crate::segments::Segments;
use crate::socket::Talker;

/// Everything that was written.
pub(crate) struct Found {
    policy: HostPolicy,
    attached: BTreeSet<u32>,
    rows: HashMap<(CompiledId, u32), u32>,
    steps: HashMap<u32, Arc<[Column]>>,
    variants: HashMap<u32, Arc<Row>>,
    blocks: [Segments; 2],
    endpoints: Content,
}

fn broken(what: &str) -> DataplaneError {
    DataplaneError::Inconsistent(format!("{what} in the kernel are no tables of this layout"))
}

/// Reads all of it.
pub(crate) fn read(talker: &mut Talker) -> Result<Found, DataplaneError> {
    let failed = |error| DataplaneError::io("read the tables back", error);
    let mut policy = HostPolicy::default();
    let mut blocks: [Segments; 2] = Default::default();
    for family in &FAMILIES {
        for (key, data) in kernel::pairs(talker, family.classes).map_err(failed)? {
            policy.addresses.extend(elements::read_single(&key, &data));
        }
        for (key, data) in kernel::pairs(talker, family.prefixes).map_err(failed)? {
            policy.addresses.extend(elements::read_prefix(&key, &data));
        }
        let ranges = kernel::elements(talker, family.blocks).map_err(failed)?;
        blocks[usize::from(family.v6)] = Segments::from_segments(elements::segments(ranges, family.v6));
    }
    let steps = read_steps(talker).map_err(failed)?;
    let variants = read_variants(talker, &steps).map_err(failed)?.ok_or_else(|| broken("variants"))?;
    let mut rows = HashMap::new();
    let mut own: BTreeMap<CompiledId, BTreeMap<u32, Arc<Row>>> = BTreeMap::new();
    for (key, data) in kernel::pairs(talker, ROWS).map_err(failed)? {
        let (id, class, number) = elements::read_row(&key, &data).ok_or_else(|| broken("rows"))?;
        let plain = || steps.get(&number).map(plain_row);
        let row = variants.get(&number).cloned().or_else(plain).ok_or_else(|| broken("rows"))?;
        rows.insert((id, class), number);
        own.entry(id).or_default().insert(class, row);
    }
    for (id, mut rows) in own {
        let default_row = rows.remove(&DEFAULT_ROW).ok_or_else(|| broken("rows"))?;
        let rows = rows.into_iter().map(|(class, row)| (ClassId(class), row)).collect();
        policy.policies.insert(id, CompiledPolicy { id, default_row, rows });
    }
    let mut content = Content::new();
    for set in schema::endpoint_sets() {
        content.insert(set, endpoints::pairs(kernel::elements(talker, set).map_err(failed)?));
    }
    policy.endpoints = bindings(&content);
    let attached = read_attached(talker).map_err(failed)?;
    Ok(Found { policy, attached, rows, steps, variants, blocks, endpoints: content })
}

/// Interfaces in charge, whether they still exist or not.
pub(crate) fn read_attached(talker: &mut Talker) -> io::Result<BTreeSet<u32>> {
    let pairs = kernel::pairs(talker, ATTACHED)?;
    Ok(pairs.iter().filter_map(|(key, _)| elements::index(key)).collect())
}

fn plain_row(columns: &Arc<[Column]>) -> Arc<Row> {
    Arc::new(Row::by_source_port([Variant { first: 0, columns: Arc::clone(columns) }]))
}

fn read_steps(talker: &mut Talker) -> io::Result<HashMap<u32, Arc<[Column]>>> {
    let mut steps: HashMap<u32, BTreeMap<u32, Column>> = HashMap::new();
    for (key, data) in kernel::pairs(talker, STEPS)? {
        if let Some((number, column)) = elements::read_step(&key, &data) {
            steps.entry(number).or_default().insert(column.first, column);
        }
    }
    let whole = steps.into_iter().filter(|(_, columns)| columns.contains_key(&0));
    Ok(whole.map(|(number, columns)| (number, merged(columns.into_values()))).collect())
}

/// `None` if they refer to steps that are not there.
fn read_variants(
    talker: &mut Talker,
    steps: &HashMap<u32, Arc<[Column]>>,
) -> io::Result<Option<HashMap<u32, Arc<Row>>>> {
    let mut variants: HashMap<u32, BTreeMap<u16, u32>> = HashMap::new();
    for (key, data) in kernel::pairs(talker, VARIANTS)? {
        if let Some((number, first, steps)) = elements::read_variant(&key, &data) {
            variants.entry(number).or_default().insert(first, steps);
        }
    }
    let mut rows = HashMap::new();
    for (number, parts) in variants {
        let mut whole = Vec::new();
        for (first, number) in parts {
            let Some(columns) = steps.get(&number) else { return Ok(None) };
            whole.push(Variant { first, columns: Arc::clone(columns) });
        }
        if whole.first().is_none_or(|variant| variant.first != 0) {
            return Ok(None);
        }
        rows.insert(number, Arc::new(Row::by_source_port(whole)));
    }
    Ok(Some(rows))
}

/// Addresses of an endpoint: a workload's as its interface may use them.
fn addresses_of(attachment: Attachment, content: &Content) -> Vec<IpAddr> {
    let begin = match attachment {
        Attachment::Interface(index) => index.to_ne_bytes().to_vec(),
        Attachment::Host(_) | Attachment::Forwarded(_) | Attachment::Cgroup(_) => {
            elements::attachment_key(attachment)
        }
    };
    let set = |family: &Family| if begin.len() == 4 { family.own } else { family.held };
    let all = FAMILIES.iter().flat_map(|family| content.get(&set(family)).into_iter().flatten());
    all.filter_map(|(key, _)| elements::address(key.strip_prefix(&begin[..])?)).collect()
}

/// Endpoints by the names of their attachments.
fn bindings(content: &Content) -> BTreeMap<Arc<str>, EndpointBinding> {
    let mut all = BTreeMap::new();
    for (key, data) in content.get(&BOUND).into_iter().flatten() {
        let (Some(attachment), Some(ingress), Some(egress)) = (
            elements::read_attachment(key),
            data.get(..4).and_then(elements::number),
            data.get(4..).and_then(elements::number),
        ) else {
            continue;
        };
        let mut addresses = addresses_of(attachment, content);
        addresses.sort_unstable();
        let (ingress, egress) = (CompiledId(ingress), CompiledId(egress));
        let binding = EndpointBinding { attachment, addresses, ingress, egress };
        all.insert(attachment.to_string().into(), binding);
    }
    all
}

impl Found {
    /// Whether this is what was written.
    pub(crate) fn is(&self, image: &Image) -> bool {
        image.holds(&self.policy.addresses, &self.rows, &self.blocks, &self.endpoints)
    }

    /// What endpoints can reach of it.
    pub(crate) fn policy(mut self) -> HostPolicy {
        let bound: BTreeSet<_> =
            self.policy.endpoints.values().flat_map(|binding| [binding.ingress, binding.egress]).collect();
        self.policy.policies.retain(|id, _| bound.contains(id));
        self.policy
    }

    /// As what the next plan is compared with.
    pub(crate) fn image(self) -> Image {
        let mut numbers = Numbers::default();
        numbers.found(self.steps, self.variants);
        let mut image =
            Image::found(self.policy, self.attached, self.rows, numbers, self.blocks, self.endpoints);
        image.hold_rows();
        image
    }
}
