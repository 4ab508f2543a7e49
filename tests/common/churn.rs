//! Live operations one after the other on images in use: snapshots that are kept with their sums, merges, growth.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::{Mount, Run, ok, text};

/// (image, snapshot) -> the sum of its content.
pub type Kept = BTreeMap<(String, String), String>;

/// Snapshots an image has at most: then one is merged away.
const MOST: usize = 4;

/// The operations in progress.
pub struct Churn {
    stop: Arc<AtomicBool>,
    kept: Arc<Mutex<Kept>>,
    thread: Option<JoinHandle<Result<u64, String>>>,
}

/// A snapshot's flat file.
pub fn snapshot(mount: &Path, image: &str, label: &str) -> PathBuf {
    mount.join(".snapshots").join(image).join(format!("{label}.img"))
}

/// A CRC of a file: enough against chance.
#[track_caller]
pub fn sum(file: &Path) -> String {
    let said = ok("cksum", &[text(file)]);
    said.split(' ').next().expect("a sum").to_owned()
}

impl Churn {
    /// Begins on these images of a mount.
    pub fn start(mount: &Mount, images: &[&str]) -> Churn {
        let (stop, kept) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::default()));
        let worker = Worker {
            point: mount.point().to_owned(),
            images: images.iter().map(|name| (*name).to_owned()).collect(),
            stop: stop.clone(),
            kept: kept.clone(),
        };
        Churn { stop, kept, thread: Some(std::thread::spawn(move || worker.run())) }
    }

    /// The snapshots that are there for certain: created, and nobody has begun to delete them.
    pub fn kept(&self) -> Kept {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends it; how many operations there were, or what failed.
    pub fn stop(&mut self) -> Result<u64, String> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().map_or(Ok(0), |thread| thread.join().expect("the operations' thread panicked"))
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Which of `kept` are missing or different in a mount, in words.
pub fn contradictions(mount: &Path, kept: &Kept) -> Vec<String> {
    let of = |((image, label), then): (&(String, String), &String)| {
        let file = snapshot(mount, image, label);
        if !file.exists() {
            return Some(format!("{image}@{label} is gone"));
        }
        let now = sum(&file);
        (now != *then).then(|| format!("{image}@{label} has changed: {now}, was {then}"))
    };
    kept.iter().filter_map(of).collect()
}

struct Worker {
    point: PathBuf,
    images: Vec<String>,
    stop: Arc<AtomicBool>,
    kept: Arc<Mutex<Kept>>,
}

impl Worker {
    fn run(self) -> Result<u64, String> {
        let mut operations = 0;
        let mut ploopfs = |args: &[&str]| {
            operations += 1;
            let done = Run::ploopfs().args(args).limit(120).run();
            if done.success() { Ok(()) } else { Err(format!("{args:?}: {done}")) }
        };
        let mut size = 256;
        for n in 0.. {
            if self.stop.load(Ordering::SeqCst) {
                break;
            }
            let image = &self.images[n % self.images.len()];
            let flat = self.point.join(format!("{image}.img"));
            let label = format!("c{n}");
            ploopfs(&["snapshot", "create", text(&flat), &label])?;
            // A daemon that is killed in between takes the snapshot's file along.
            let Ok(said) =
                std::process::Command::new("cksum").arg(snapshot(&self.point, image, &label)).output()
            else {
                return Err("cksum cannot be run".into());
            };
            if !said.status.success() {
                return Err(String::from_utf8_lossy(&said.stderr).into_owned());
            }
            let text_of = String::from_utf8_lossy(&said.stdout).into_owned();
            let then = text_of.split(' ').next().unwrap_or_default().to_owned();
            let gone = {
                let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.insert((image.clone(), label), then);
                let own: Vec<_> = kept.keys().filter(|(of, _)| of == image).cloned().collect();
                // By turns the first and a later one: merges at the base and in the middle.
                let victim = (own.len() > MOST).then(|| own[n % own.len()].clone());
                if let Some(victim) = &victim {
                    kept.remove(victim);
                }
                victim
            };
            if let Some((_, label)) = gone {
                ploopfs(&["snapshot", "delete", text(&flat), &label])?;
            }
            if n % 8 == 7 {
                size += 16;
                let size = format!("{size}M");
                for image in &self.images {
                    ploopfs(&["resize", text(&self.point.join(format!("{image}.img"))), &size])?;
                }
            }
        }
        Ok(operations)
    }
}
