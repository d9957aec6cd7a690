//! One transaction, applied once, however often its answer is lost.
//!
//! A request whose answer is lost may have been applied, may be applied later, or never. Each transaction therefore
//! also writes a name of its own into a slot, a key that no other transaction uses meanwhile, under the condition that
//! the slot is as it was before. So a request that is repeated cannot be applied twice, and what stands in the slot
//! tells whether an earlier one was. A repeated request that is refused writes into the slot as well: nothing that is
//! still on its way can be applied after that, so the refusal is final.
//!
//! Only if nobody answers at all for [`OPERATION_TIME_MAX`] the outcome stays unknown, and the error says so.

use std::time::Instant;

use etcd_client::{
    Compare, CompareOp, GetOptions, GetResponse, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
};
use tonic::Code;

use crate::random_id;
use crate::types::{Applied, LeaseId, OpKind, Precondition, Revision, StoreError, Transaction};

use super::cluster::{ANSWER_BYTES_MAX, Backoff, Cluster, Failed, OPERATION_TIME_MAX, revision, revision_of};
use super::slots::{Place, Slots};
use super::{leases, number};

/// What stands in a slot after a refusal.
const REFUSED: &str = "refused";

/// What an answer says.
enum Verdict {
    Applied(Applied),
    /// An earlier attempt was applied in this revision.
    AppliedBefore(i64),
    Conflict(StoreError),
    /// It was refused by an attempt whose answer was lost, and cannot be applied any more; now it may be another matter.
    Anew,
    /// Somebody has removed the slot.
    SlotLost,
}

/// Applies a transaction, once.
pub(super) async fn apply(
    cluster: &Cluster,
    slots: &Slots,
    transaction: &Transaction,
) -> Result<Applied, StoreError> {
    let deadline = Instant::now() + OPERATION_TIME_MAX;
    let unknown = |reason: String| StoreError::OutcomeUnknown { store: cluster.name().to_owned(), reason };
    let mut slot = slots.take(cluster).await?;
    let name = random_id();
    let mut backoff = Backoff::default();
    // Whether an attempt may have been applied, or may still be.
    let mut doubt = false;
    loop {
        let request = request(cluster, &slot.place, &name, transaction, doubt);
        let answer = cluster.attempt(|client| async move {
            client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX).txn(request).await
        });
        let reason = match answer.await {
            Ok(response) => match judge(&response, &mut slot.place, &name, transaction, doubt) {
                Verdict::Applied(applied) => {
                    slots.give_back(slot).await;
                    return Ok(applied);
                }
                Verdict::AppliedBefore(at) => {
                    slots.give_back(slot).await;
                    let changed = changed_anything(cluster, transaction, at).await;
                    return Ok(Applied { revision: revision(at), changed });
                }
                Verdict::Conflict(conflict) => {
                    slots.give_back(slot).await;
                    return Err(conflict);
                }
                Verdict::Anew => {
                    doubt = false;
                    "it was refused once".to_owned()
                }
                Verdict::SlotLost if doubt => {
                    return Err(unknown("somebody has removed the writer's own key".into()));
                }
                Verdict::SlotLost => {
                    slots.forget(slot.place.writer).await;
                    slot = slots.take(cluster).await?;
                    "somebody has removed the writer's own key".to_owned()
                }
            },
            Err(Failed::NoAnswer(reason)) => {
                doubt = true;
                reason
            }
            Err(Failed::Refused(_, reason)) if doubt => return Err(unknown(reason)),
            Err(Failed::Refused(Code::NotFound, _)) => {
                // A lease that is gone: one of the caller's, or else the writer's own.
                for lease in transaction.leases() {
                    leases::check(cluster, lease).await?;
                }
                slots.forget(slot.place.writer).await;
                slot = slots.take(cluster).await?;
                "the writer's lease was revoked".to_owned()
            }
            Err(Failed::Refused(_, reason)) => return Err(refusal(cluster, transaction, reason)),
        };
        if Instant::now() >= deadline {
            return Err(if doubt { unknown(reason) } else { cluster.unavailable(reason) });
        }
        backoff.pause().await;
    }
}

fn request(cluster: &Cluster, slot: &Place, name: &str, transaction: &Transaction, doubt: bool) -> Txn {
    let mut conditions = vec![Compare::mod_revision(slot.key.clone(), CompareOp::Equal, slot.modified)];
    let mut apply = Vec::with_capacity(transaction.ops.len() + 1);
    let mut refuse = vec![TxnOp::get(slot.key.clone(), None)];
    for op in &transaction.ops {
        let key = cluster.object_key(&op.key);
        conditions.extend(condition(&key, op.precondition));
        if op.precondition != Precondition::Any {
            refuse.push(TxnOp::get(key.clone(), Some(GetOptions::new().with_keys_only())));
        }
        apply.push(match &op.kind {
            OpKind::Put(value) => TxnOp::put(key, value.as_ref(), None),
            OpKind::PutUnder(value, LeaseId(lease)) => {
                TxnOp::put(key, value.as_ref(), Some(PutOptions::new().with_lease(*lease)))
            }
            OpKind::Delete => TxnOp::delete(key, None),
        });
    }
    let write =
        |text: &str| TxnOp::put(slot.key.clone(), text, Some(PutOptions::new().with_lease(slot.writer)));
    apply.push(write(name));
    if doubt {
        refuse.push(write(REFUSED));
    }
    Txn::new().when(conditions).and_then(apply).or_else(refuse)
}

fn condition(key: &[u8], precondition: Precondition) -> Option<Compare> {
    match precondition {
        Precondition::Any => None,
        Precondition::Absent => Some(Compare::create_revision(key, CompareOp::Equal, 0)),
        Precondition::Present => Some(Compare::create_revision(key, CompareOp::Greater, 0)),
        // To etcd a key that does not exist is at revision 0; to us it is at none.
        Precondition::AtRevision(Revision(0)) => Some(Compare::create_revision(key, CompareOp::Less, 0)),
        Precondition::AtRevision(Revision(at)) => {
            Some(Compare::mod_revision(key, CompareOp::Equal, number(at)))
        }
    }
}

/// Reads an answer, and notes what it says of the slot.
fn judge(
    response: &TxnResponse,
    slot: &mut Place,
    name: &str,
    transaction: &Transaction,
    doubt: bool,
) -> Verdict {
    let now = revision_of(response.header());
    let answers = response.op_responses();
    if response.succeeded() {
        slot.modified = number(now.0);
        let changed = answers.iter().zip(&transaction.ops).any(|(answer, _)| match answer {
            TxnOpResponse::Put(_) => true,
            TxnOpResponse::Delete(deleted) => deleted.deleted() > 0,
            TxnOpResponse::Get(_) | TxnOpResponse::Txn(_) => false,
        });
        return Verdict::Applied(Applied { revision: now, changed });
    }
    let mut found = answers.iter().filter_map(|answer| match answer {
        TxnOpResponse::Get(found) => Some(modified(found)),
        _ => None,
    });
    let at = found.next().unwrap_or_default();
    let text = answers.first().and_then(|answer| match answer {
        TxnOpResponse::Get(found) => found.kvs().first().map(|pair| pair.value()),
        _ => None,
    });
    let expected = slot.modified;
    slot.modified = if doubt { number(now.0) } else { at };
    if at != expected {
        return match text {
            Some(text) if text == name.as_bytes() => Verdict::AppliedBefore(at),
            Some(text) if text == REFUSED.as_bytes() && doubt => Verdict::Anew,
            _ => Verdict::SlotLost,
        };
    }
    let conditions = transaction.ops.iter().filter(|op| op.precondition != Precondition::Any);
    for (op, at) in conditions.zip(found) {
        let found = (at > 0).then(|| revision(at));
        if !op.precondition.holds(found) {
            let (key, expected) = (op.key.clone(), op.precondition);
            return Verdict::Conflict(StoreError::Conflict { key, expected, found });
        }
    }
    // All hold, and etcd says that one does not.
    Verdict::SlotLost
}

/// Revision of a key's last write, 0 if it does not exist.
fn modified(found: &GetResponse) -> i64 {
    found.kvs().first().map_or(0, |pair| pair.mod_revision())
}

/// Whether a transaction changed anything in the revision that it made, which an answer that was lost said.
async fn changed_anything(cluster: &Cluster, transaction: &Transaction, at: i64) -> bool {
    for op in &transaction.ops {
        if op.kind != OpKind::Delete {
            return true;
        }
        let key = cluster.object_key(&op.key);
        let before = cluster.call(|mut kv| {
            let options = GetOptions::new().with_count_only().with_revision(at - 1);
            let key = key.clone();
            async move { kv.get(key, Some(options)).await }
        });
        // If etcd does not know or say: more likely than not, and nobody is harmed by looking once more.
        if before.await.map_or(true, |found| found.count() > 0) {
            return true;
        }
    }
    false
}

/// Says which of etcd's own limits a transaction has met.
fn refusal(cluster: &Cluster, transaction: &Transaction, reason: String) -> StoreError {
    let store = cluster.name().to_owned();
    if reason.contains("too many operations") {
        let found = format!("{} operations (the store adds one of its own)", transaction.ops.len());
        return StoreError::ServerLimit { store, found, flag: "--max-txn-ops", default: "128" };
    }
    // The first is etcd's, the second its transport's.
    if reason.contains("request is too large") || reason.contains("received message larger than max") {
        let found = format!("{} bytes", transaction.bytes());
        return StoreError::ServerLimit { store, found, flag: "--max-request-bytes", default: "1.5 MiB" };
    }
    cluster.refused(reason)
}
