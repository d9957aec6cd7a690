//! One decision, asked of the kernel's maps as a packet would ask.

use std::io;
use std::net::IpAddr;

use bulkhead_model::Direction;
use bulkhead_model::host_policy::{Attachment, Cell, CompiledId};
use bulkhead_model::ports::PortKey;

use crate::elements;
use crate::image::endpoints::family_of;
use crate::kernel;
use crate::object::Set;
use crate::schema::{ASK_BLOCKS, BOUND, DEFAULT_ROW, ROWS, STEPS, VARIANTS, Words};
use crate::socket::Talker;

/// What the maps say; `None` if nothing is bound there for that direction.
pub(crate) fn cell(
    talker: &mut Talker,
    attachment: Attachment,
    direction: Direction,
    (peer, key, source_port): (IpAddr, PortKey, u16),
) -> io::Result<Option<Cell>> {
    let Some(bound) = get(talker, BOUND, &elements::attachment_key(attachment))? else { return Ok(None) };
    let half = match direction {
        Direction::Ingress => bound.get(..4),
        Direction::Egress => bound.get(4..),
    };
    let Some(policy) = half.and_then(elements::number).filter(|id| *id != CompiledId::NONE.0) else {
        return Ok(None);
    };
    let family = family_of(peer);
    let octets = elements::octets(peer);
    let mut class = get(talker, family.classes, &octets)?.and_then(|data| elements::number(&data));
    if class.is_none_or(|class| class == ASK_BLOCKS) {
        class = get(talker, family.blocks, &octets)?.and_then(|data| elements::number(&data));
    }
    let row =
        |talker: &mut Talker, class: u32| get(talker, ROWS, &elements::row_key(CompiledId(policy), class));
    let number = match row(talker, class.unwrap_or(0))? {
        Some(number) => Some(number),
        None => row(talker, DEFAULT_ROW)?,
    };
    let Some(mut number) = number.and_then(|data| elements::number(&data)) else { return Ok(None) };
    if let Some(steps) = get(talker, VARIANTS, &elements::variant_key(number, source_port))? {
        number = elements::number(&steps).unwrap_or(number);
    }
    let words = get(talker, STEPS, &elements::step_key(number, key))?;
    Ok(words.and_then(|words| Words::read(&words)).map(Words::cell))
}

/// What a map has for a key; of an interval map, for the interval around it.
fn get(talker: &mut Talker, map: Set, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
    talker.one(&map.get(key), kernel::data_of)
}
