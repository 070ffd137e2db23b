//! Which containers sockets' processes are in: the answers that a live run got, for its recording, or those out of a recording.

use std::collections::HashMap;

/// Answers that are remembered to tell new ones.
const MOST: usize = 65_536;

/// A cgroup, a process, and the name of the container.
pub type Answer = (u64, u32, Option<String>);

#[derive(Debug, Default)]
pub struct Containers {
    answers: HashMap<(u64, u32), Option<String>>,
    /// `None`: nobody asks for them
    new: Option<Vec<Answer>>,
}

impl Containers {
    /// A live answer.
    pub fn note(&mut self, cgroup: u64, pid: u32, answer: Option<&String>) {
        let Some(new) = &mut self.new else {
            return;
        };
        let known = self.answers.get(&(cgroup, pid));
        if known.map(Option::as_ref) == Some(answer) {
            return;
        }
        if self.answers.len() >= MOST {
            self.answers.clear();
        }
        self.answers.insert((cgroup, pid), answer.cloned());
        new.push((cgroup, pid, answer.cloned()));
    }

    /// Every answer is forgotten: [`Containers::news`] has it again when it is given the next time.
    pub fn tell_anew(&mut self) {
        self.answers.clear();
        self.new = Some(Vec::new());
    }

    /// New answers since the last call.
    pub fn news(&mut self) -> Vec<Answer> {
        self.new.as_mut().map_or_else(Vec::new, std::mem::take)
    }

    /// Every answer that was given.
    pub fn all(&self) -> Vec<Answer> {
        let all = self.answers.iter();
        all.map(|((cgroup, pid), name)| (*cgroup, *pid, name.clone()))
            .collect()
    }

    /// An answer out of a recording.
    pub fn learn(&mut self, (cgroup, pid, answer): Answer) {
        self.answers.insert((cgroup, pid), answer);
    }

    /// What the recording says.
    pub fn of(&self, cgroup: u64, pid: u32) -> Option<String> {
        self.answers.get(&(cgroup, pid)).cloned().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_once_and_known_again() {
        let mut live = Containers::default();
        let name = "web".to_owned();
        live.note(1, 2, Some(&name));
        assert_eq!(live.news(), [], "nobody asks");
        live.tell_anew();
        live.note(1, 2, Some(&name));
        live.note(1, 2, Some(&name));
        live.note(1, 3, None);
        let news = live.news();
        assert_eq!(news, [(1, 2, Some(name.clone())), (1, 3, None)]);
        live.note(1, 3, Some(&name));
        assert_eq!(live.news(), [(1, 3, Some(name.clone()))]);
        let mut recorded = Containers::default();
        news.into_iter().for_each(|answer| recorded.learn(answer));
        assert_eq!(recorded.of(1, 2), Some(name));
        assert_eq!((recorded.of(1, 3), recorded.of(4, 4)), (None, None));
    }
}
