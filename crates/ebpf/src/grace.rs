//! Waiting for running programs without standing in the way.

use std::io;
use std::thread::JoinHandle;

use bulkhead_dataplane::grace_period;

/// A grace period that passes while nobody waits for it.
#[derive(Debug, Default)]
pub(crate) struct Grace {
    under_way: Option<JoinHandle<io::Result<()>>>,
}

impl Grace {
    /// Lets a grace period begin now, after the last removal.
    pub(crate) fn begin(&mut self) {
        let waiting = std::thread::Builder::new().name("grace".into()).spawn(grace_period);
        // Without a thread, whoever needs it waits for it then.
        self.under_way = waiting.ok();
    }

    /// Waits for the rest of what began last, or for a whole one.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        match self.under_way.take().map(JoinHandle::join) {
            Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(_)) | Err(_)) | None => grace_period(),
        }
    }
}
