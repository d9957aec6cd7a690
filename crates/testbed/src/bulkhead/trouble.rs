//! What befalls processes and hosts.

use anyhow::{Result, ensure};
use rustix::process::Signal;

use super::Bulkhead;

impl Bulkhead {
    /// SIGKILL for the controller.
    pub fn kill_controller(&mut self) {
        if let Some(mut process) = self.controller.take() {
            process.kill();
        }
    }

    /// SIGTERM for the controller; answers when it has ended, and whether it ended well.
    pub fn stop_controller(&mut self) -> bool {
        let ended = self.controller.take().and_then(|mut controller| controller.stop());
        ended.is_some_and(|status| status.success())
    }

    /// SIGKILL for a host's agent.
    pub fn kill_agent(&mut self, host: &str) {
        if let Some(mut process) = self.agents.get_mut(host).and_then(|agent| agent.process.take()) {
            process.kill();
        }
    }

    /// SIGTERM for a host's agent; answers whether it ended well.
    pub fn stop_agent(&mut self, host: &str) -> bool {
        let process = self.agents.get_mut(host).and_then(|agent| agent.process.take());
        process.is_some_and(|mut process| process.stop().is_some_and(|status| status.success()))
    }

    /// What a reboot does to a host whose agent does not run: everything in the kernel goes.
    ///
    /// # Errors
    /// If the clean-up fails.
    pub fn clean_kernel(&self, host: &str) -> Result<()> {
        let mut command = self.agent_command(host);
        command.arg("--cleanup");
        let output = self.lab.host(host).netns.run(|| Ok(command.output()?))?;
        ensure!(output.status.success(), "cleanup: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// SIGSTOP for a host's agent: it hangs, and holds all that it has open.
    pub fn hang_agent(&self, host: &str) {
        self.signal_agent(host, Signal::STOP);
    }

    /// SIGCONT for a host's agent.
    pub fn wake_agent(&self, host: &str) {
        self.signal_agent(host, Signal::CONT);
    }

    fn signal_agent(&self, host: &str, signal: Signal) {
        if let Some(process) = self.agents.get(host).and_then(|agent| agent.process.as_ref()) {
            process.signal(signal);
        }
    }
}
