//! `--max-cpu`: what netprobe itself may take of one CPU. Counts stay exact whatever it does: only examples and the time of tables give way.

use std::time::{Duration, Instant};

use crate::os::cpu_time as cpu;

/// Rows that always have their example: the largest ones.
const ALWAYS: u64 = 20;

/// What user space has taken since the last table began.
pub struct Guard {
    /// of one CPU: 0.05
    share: f64,
    began: Instant,
    cpu: Duration,
    /// since the last table
    pub delayed: u64,
}

impl Guard {
    pub fn new(percent: f64) -> Self {
        Self {
            share: percent / 100.0,
            began: Instant::now(),
            cpu: cpu(),
            delayed: 0,
        }
    }

    /// Whether the last table has been paid for; if not, the next one is delayed.
    pub fn is_due(&mut self) -> bool {
        let due = self.used() <= self.budget(1.0);
        self.delayed += u64::from(!due);
        due
    }

    /// A table begins.
    pub fn begin(&mut self) {
        self.began = Instant::now();
        self.cpu = cpu();
    }

    /// Whether a table that comes every `period` has time for the example of one more row, its `at`th: half of the budget is for them.
    pub fn has_time(&self, at: u64, period: Duration) -> bool {
        at < ALWAYS || self.used() <= period.mul_f64(self.share / 2.0)
    }

    fn used(&self) -> Duration {
        cpu().saturating_sub(self.cpu)
    }

    fn budget(&self, part: f64) -> Duration {
        self.began.elapsed().mul_f64(self.share * part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_delays_the_next_table() {
        let mut guard = Guard::new(0.1);
        guard.begin();
        assert!(guard.has_time(50, Duration::from_secs(1000)));
        let until = cpu() + Duration::from_millis(20);
        while cpu() < until {
            std::hint::black_box(0);
        }
        assert!(!guard.is_due() && !guard.has_time(50, Duration::from_secs(1)));
        assert!(guard.has_time(0, Duration::from_secs(1)));
        assert_eq!(guard.delayed, 1);
        guard.share = 1000.0;
        assert!(guard.is_due());
    }
}
