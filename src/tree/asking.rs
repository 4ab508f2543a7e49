//! One answer for all who ask the same question at the same time, found on a thread that may wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sync::{Mutex, lock};
use crate::vdisk::Job;

type Waiter<T> = Box<dyn FnOnce(T) + Send>;

/// One question.
pub(super) struct Question<T> {
    /// Protects the answer and who waits for it. A leaf; no waiter is called under it.
    state: Mutex<State<T>>,
}

struct State<T> {
    /// The last answer, and when it was begun to be found.
    last: Option<(T, Instant)>,
    waiting: Vec<Waiter<T>>,
    /// A thread is finding the answer.
    running: bool,
}

impl<T: Clone + Send + 'static> Question<T> {
    /// It was not asked yet.
    pub(super) fn new() -> Arc<Question<T>> {
        let state = State { last: None, waiting: Vec::new(), running: false };
        Arc::new(Question { state: Mutex::new(state) })
    }

    /// Calls `done` with the answer: at once where there is one that was begun less than `holds` ago, else from the thread
    /// that finds it, on which `spawn` runs jobs. With `holds` 0 an answer is never older than the question.
    pub(super) fn ask(
        self: &Arc<Self>,
        holds: Duration,
        spawn: impl FnOnce(Job),
        find: impl Fn() -> T + Send + 'static,
        done: impl FnOnce(T) + Send + 'static,
    ) {
        let mut state = lock(&self.state);
        if let Some(answer) = state.fresh(holds) {
            drop(state);
            return done(answer);
        }
        state.waiting.push(Box::new(done));
        if std::mem::replace(&mut state.running, true) {
            return;
        }
        drop(state);
        let question = self.clone();
        spawn(Box::new(move || question.find(holds, find)));
    }

    fn find(&self, holds: Duration, find: impl Fn() -> T) {
        // Should it panic, the waiters are released, and the next requester tries again.
        let guard = Abandon(self);
        loop {
            let mut state = lock(&self.state);
            let waiting = std::mem::take(&mut state.waiting);
            if waiting.is_empty() {
                state.running = false;
                drop(state);
                return std::mem::forget(guard);
            }
            let fresh = state.fresh(holds);
            drop(state);
            let answer = fresh.unwrap_or_else(|| {
                let began = Instant::now();
                let answer = find();
                lock(&self.state).last = Some((answer.clone(), began));
                answer
            });
            waiting.into_iter().for_each(|done| done(answer.clone()));
        }
    }

    /// The last answer, however old.
    pub(super) fn last(&self) -> Option<T> {
        lock(&self.state).last.as_ref().map(|(answer, _)| answer.clone())
    }
}

impl<T: Clone> State<T> {
    fn fresh(&self, holds: Duration) -> Option<T> {
        let (answer, began) = self.last.as_ref()?;
        (began.elapsed() < holds).then(|| answer.clone())
    }
}

struct Abandon<'a, T>(&'a Question<T>);

impl<T> Drop for Abandon<'_, T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.running = false;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        drop(waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::{Sender, channel};
    use std::thread;

    fn spawn(job: Job) {
        thread::spawn(job);
    }

    fn ask(question: &Arc<Question<u32>>, found: &Arc<AtomicU32>, holds: Duration, answers: &Sender<u32>) {
        let (found, answers) = (found.clone(), answers.clone());
        let find = move || {
            let n = found.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(5));
            n
        };
        question.ask(holds, spawn, find, move |n| {
            let _ = answers.send(n);
        });
    }

    #[test]
    fn many_who_ask_at_once_are_one_rendering() {
        let (question, found, (send, receive)) = (Question::new(), Arc::default(), channel());
        for _ in 0..500 {
            ask(&question, &found, Duration::from_secs(3600), &send);
        }
        assert!(receive.iter().take(500).all(|n| n == 0));
        ask(&question, &found, Duration::from_secs(3600), &send);
        assert_eq!((receive.recv(), found.load(Ordering::SeqCst)), (Ok(0), 1));
        assert_eq!(question.last(), Some(0));
    }

    #[test]
    fn without_worth_no_asker_is_answered_with_what_was_found_before() {
        let (question, found, (send, receive)) = (Question::new(), Arc::default(), channel());
        for n in 0..10 {
            ask(&question, &found, Duration::ZERO, &send);
            assert_eq!(receive.recv(), Ok(n));
        }
    }

    #[test]
    fn a_question_that_panics_lets_its_askers_go_and_can_be_asked_again() {
        let question = Question::<u32>::new();
        let (send, receive) = channel();
        let answer = send.clone();
        question.ask(
            Duration::ZERO,
            spawn,
            || panic!("on purpose"),
            move |n| {
                let _ = answer.send(n);
            },
        );
        while receive.try_recv().is_err() {
            let answer = send.clone();
            question.ask(
                Duration::ZERO,
                spawn,
                || 7,
                move |n| {
                    let _ = answer.send(n);
                },
            );
            thread::yield_now();
        }
    }
}
