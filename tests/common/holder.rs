//! Other programs that have an image open.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A process of ours that is ended with the test.
pub struct Holder(pub Child);

impl Holder {
    /// Its number.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// qemu-io with the image open for writing, waiting for commands. Nothing else may look at the image before it is back:
/// qemu-io ends when it meets a lock.
#[track_caller]
pub fn qemu_holds(delta: &Path) -> Holder {
    qemu_with(delta, &[])
}

/// The same, with the image open for reading only.
#[track_caller]
pub fn qemu_reads(delta: &Path) -> Holder {
    qemu_with(delta, &["-r"])
}

#[track_caller]
fn qemu_with(delta: &Path, options: &[&str]) -> Holder {
    let mut command = Command::new("qemu-io");
    command.args(options).args(["-f", "parallels"]).arg(delta).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = Holder(command.spawn().expect("qemu-io starts"));
    // It asks for a command when it has the image.
    let mut asks = [0];
    holder.0.stdout.as_mut().expect("piped").read_exact(&mut asks).expect("qemu-io opens the image");
    holder
}
