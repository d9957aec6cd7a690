//! What happens to the fleet, by a script that a seed decides.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::{mpsc, watch};

use crate::agent::Change;
use crate::catalogue::CHANGE;
use crate::dice::Dice;
use crate::fleet::{APPLICATION_WORKLOADS, Fleet, MONITORING, SLICE_WORKLOADS};
use crate::link::Command;
use crate::rest::Rest;
use crate::world::World;

/// How often the script goes on.
const STEP: Duration = Duration::from_millis(5);
/// Time between two changes of a policy.
const POLICY_EVERY: Duration = Duration::from_secs(1);
/// Time between two restarts of a workload that everybody reads.
const MONITORING_EVERY: Duration = Duration::from_secs(5);
/// Time between two lost connections, one agent each.
const BREAK_EVERY: Duration = Duration::from_millis(200);
/// Of a thousand changes of applications, those that stop a part of one; it starts again when its turn comes.
const STOPS: u32 = 100;
/// Of a thousand, those that take a workload out of service or back, and nothing else.
const RELABELS: u32 = 50;
/// Applications that are tried when one is still busy.
const TRIES_MAX: u32 = 8;
/// Activations that may be made up for after a pause, as a part of a second.
const MAKE_UP: f64 = 0.1;

/// What is known of the applications.
#[derive(Debug)]
pub(crate) struct Churn {
    world: Arc<World>,
    commands: Vec<mpsc::Sender<Command>>,
    dice: Dice,
    /// Slices that were stopped.
    stopped: BTreeSet<crate::fleet::Slice>,
    /// Slices with a workload that is out of service.
    draining: BTreeSet<crate::fleet::Slice>,
    policy_changes: u64,
}

impl Churn {
    pub(crate) fn new(world: Arc<World>, commands: Vec<mpsc::Sender<Command>>, seed: u64) -> Self {
        let dice = Dice::new(seed);
        let (stopped, draining) = (BTreeSet::new(), BTreeSet::new());
        Self { world, commands, dice, stopped, draining, policy_changes: 0 }
    }

    /// Lets things happen for a time, at this rate of activations. Ends early when `stop` turns true.
    pub(crate) async fn run(
        &mut self,
        rate: f64,
        duration: Duration,
        rest: &Rest,
        stop: &watch::Receiver<bool>,
    ) {
        let begun = Instant::now();
        let mut owed = 0.0;
        let mut last = begun;
        let (mut policy_due, mut monitoring_due, mut break_due) =
            (begun + POLICY_EVERY, begun + MONITORING_EVERY, begun + BREAK_EVERY);
        let mut steps = tokio::time::interval(STEP);
        steps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while begun.elapsed() < duration && !*stop.borrow() {
            steps.tick().await;
            let now = Instant::now();
            owed = f64::min(
                owed + rate * (now - last).as_secs_f64(),
                rate * MAKE_UP + f64::from(APPLICATION_WORKLOADS),
            );
            last = now;
            while owed >= f64::from(APPLICATION_WORKLOADS) {
                let Some(application) = self.idle() else { break };
                owed -= f64::from(self.change(application));
            }
            if now >= policy_due {
                policy_due = now + POLICY_EVERY;
                self.change_policy(rest);
            }
            if now >= monitoring_due {
                monitoring_due = now + MONITORING_EVERY;
                if let Some(slice) = self.world.fleet.slices_of(MONITORING).next() {
                    self.tell(slice, Change::Start(slice));
                }
            }
            if now >= break_due {
                break_due = now + BREAK_EVERY;
                let agent = self.dice.roll(self.world.fleet.agents) as usize;
                // One that has no time for it is not bothered.
                let _ = self.commands[agent].try_send(Command::Break);
            }
        }
    }

    /// An application of which nothing is under way.
    fn idle(&mut self) -> Option<u32> {
        (0..TRIES_MAX).find_map(|_| {
            let application = self.dice.roll(self.world.fleet.applications);
            (application != MONITORING && !self.world.tracker.is_busy(application)).then_some(application)
        })
    }

    fn tell(&self, slice: crate::fleet::Slice, change: Change) -> bool {
        let host = self.world.fleet.host_of(slice) as usize;
        self.commands[host].try_send(Command::Change(change, true)).is_ok()
    }

    /// Answers how many workloads start.
    fn change(&mut self, application: u32) -> u32 {
        let slices: Vec<_> = self.world.fleet.slices_of(application).collect();
        let one = slices[self.dice.roll(u32::try_from(slices.len()).unwrap_or(1)) as usize];
        if self.dice.chance(RELABELS) && !self.stopped.contains(&one) {
            let ready = self.draining.contains(&one);
            if self.tell(one, Change::Ready(one, ready)) {
                if ready {
                    self.draining.remove(&one)
                } else {
                    self.draining.insert(one)
                };
            }
            return 0;
        }
        if self.dice.chance(STOPS) && !self.stopped.contains(&one) {
            if self.tell(one, Change::Stop(one)) {
                self.stopped.insert(one);
                // What is stopped starts again as new.
                self.draining.remove(&one);
            }
            return 0;
        }
        let mut starts = 0;
        for slice in slices {
            if self.tell(slice, Change::Start(slice)) {
                self.stopped.remove(&slice);
                starts += SLICE_WORKLOADS;
            }
        }
        // A host that takes no more would keep the script here for ever.
        starts.max(1)
    }

    fn change_policy(&mut self, rest: &Rest) {
        let fleet = &self.world.fleet;
        if fleet.changeable() == 0 {
            return;
        }
        self.policy_changes += 1;
        let change = self.policy_changes;
        let number = self.dice.roll(fleet.changeable());
        let application = (number / 2) % fleet.applications;
        let mut manifest = fleet.policy(number, 8000 + u16::try_from(change % 1000).unwrap_or(0));
        manifest["metadata"]["annotations"] = json!({ CHANGE: change.to_string() });
        let running = fleet.slices_of(application).filter(|slice| !self.stopped.contains(slice));
        let concerned = running.map(|slice| fleet.host_of(slice)).filter(|host| !Fleet::is_slow(*host));
        let concerned: BTreeSet<u32> = concerned.collect();
        let (world, rest) = (Arc::clone(&self.world), rest.clone());
        if !world.tracker.policy_changes(change, number, concerned.into_iter().collect()) {
            return;
        }
        tokio::spawn(async move {
            let result = rest.apply(&[manifest]).await;
            world.tracker.policy_stored(change, result.is_ok());
            if let Err(error) = result {
                world.complain(format!("a policy could not be changed: {error:#}"));
            }
        });
    }

    /// All connections break at once.
    pub(crate) async fn storm(&self) {
        for agent in &self.commands {
            // An agent that has ended has no connection.
            let _ = agent.send(Command::Break).await;
        }
    }

    /// Starts acknowledged so far.
    pub(crate) fn activations(&self) -> u64 {
        self.world.activations.load(Relaxed)
    }
}
