//! One differential over everything that answers: reference evaluator, compiled tables, what a dataplane holds, and real
//! packets through it, in every state of a history.
//!
//! A [`Case`] is data. [`World::run`] answers where the four disagree about it, [`smallest`] makes it as small as it
//! can be, [`random_case`] makes one from a number.

mod case;
mod generate;
mod history;
mod run;
mod shrink;
mod world;

pub use case::{Case, Expected, Question, Step};
pub use generate::random_case;
pub use run::{Answered, Mismatch};
pub use shrink::{Shrunk, smallest};
pub use world::World;
