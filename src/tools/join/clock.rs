//! How far the clocks of two hosts are apart, by the least delay in each direction. Pure.

/// The other clock minus this one lies within `offset` ± `bound`, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    pub offset: i64,
    pub bound: i64,
}

/// Differences of time stamps: there minus here of packets that went there, here minus there of those that came from there. `None`: no
/// packet in one of the directions; or no offset fits, since the clocks drifted apart.
pub fn offset(forth: Option<i64>, back: Option<i64>) -> Option<Clock> {
    let (forth, back) = (forth?, back?);
    // Delays are not negative: the offset is at most `forth` and at least -`back`.
    let sum = forth.checked_add(back)?;
    (sum >= 0).then(|| Clock {
        offset: forth - sum / 2,
        bound: sum / 2 + sum % 2,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn least_delays_decide() {
        // The other clock is 100 ahead; 3 forth, 5 back.
        let clock = offset(Some(103), Some(-95)).unwrap();
        assert_eq!(
            clock,
            Clock {
                offset: 99,
                bound: 4
            }
        );
        assert_eq!(offset(Some(1), None), None);
        assert_eq!(offset(Some(1), Some(-2)), None, "a negative delay");
    }

    proptest! {
        #[test]
        fn the_truth_is_within(offset_is in -1_000_000i64..1_000_000, forth in 0i64..1000, back in 0i64..1000) {
            let clock = offset(Some(forth + offset_is), Some(back - offset_is)).unwrap();
            prop_assert!((clock.offset - offset_is).abs() <= clock.bound);
        }
    }
}
