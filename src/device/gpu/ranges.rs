//! Which parts of a piece of memory are free. Pure: addresses are offsets.

use std::ops::Range;

/// The free ranges, in order and never touching each other.
#[derive(Debug)]
pub(super) struct FreeRanges {
    free: Vec<Range<usize>>,
}

impl FreeRanges {
    /// All of `0..len` is free.
    pub(super) fn new(len: usize) -> Self {
        Self { free: std::iter::once(0..len).collect() }
    }

    /// Takes `len` bytes from the first range that has them, so that the same calls in the same
    /// order always give the same offsets.
    pub(super) fn take(&mut self, len: usize) -> Option<usize> {
        let index = self.free.iter().position(|range| len <= range.len())?;
        let range = &mut self.free[index];
        let start = range.start;
        range.start += len;
        if range.start == range.end {
            self.free.remove(index);
        }
        Some(start)
    }

    /// Takes exactly these bytes, if all are free.
    pub(super) fn take_range(&mut self, wanted: Range<usize>) -> bool {
        let contains = |free: &Range<usize>| free.start <= wanted.start && wanted.end <= free.end;
        let Some(index) = self.free.iter().position(contains) else { return false };
        let found = self.free.remove(index);
        let parts = [found.start..wanted.start, wanted.end..found.end];
        self.free.splice(index..index, parts.into_iter().filter(|part| part.start < part.end));
        true
    }

    /// Gives a range back that was taken.
    pub(super) fn give_back(&mut self, range: Range<usize>) {
        let index = self.free.partition_point(|free| free.start < range.start);
        debug_assert!(
            self.free.get(index).is_none_or(|next| range.end <= next.start)
                && (index == 0 || self.free[index - 1].end <= range.start),
            "{range:?} is free already"
        );
        self.free.insert(index, range);
        if self.free.get(index + 1).is_some_and(|next| next.start == self.free[index].end) {
            self.free[index].end = self.free.remove(index + 1).end;
        }
        if 0 < index && self.free[index - 1].end == self.free[index].start {
            self.free[index - 1].end = self.free.remove(index).end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_grow_together() {
        let mut ranges = FreeRanges::new(100);
        let starts: Vec<_> = (0..4).map(|_| ranges.take(25).unwrap()).collect();
        assert_eq!(starts, [0, 25, 50, 75]);
        assert_eq!(ranges.take(1), None);
        ranges.give_back(0..25);
        ranges.give_back(50..75);
        assert_eq!(ranges.take(30), None);
        ranges.give_back(25..50);
        assert_eq!(ranges.take(60), Some(0));
    }

    #[test]
    fn a_range_can_be_taken_by_its_place() {
        let mut ranges = FreeRanges::new(100);
        assert!(ranges.take_range(30..50));
        assert!(!ranges.take_range(40..60));
        assert_eq!(ranges.take(40), Some(50));
        assert!(ranges.take_range(0..30));
        ranges.give_back(30..50);
        assert!(ranges.take_range(30..50));
        assert_eq!(ranges.take(11), None);
    }

    proptest! {
        /// Goal: no byte is lost or given twice. Method: random takes and returns beside a map of
        /// bytes.
        #[test]
        fn nothing_is_lost_or_given_twice(actions in prop::collection::vec((any::<bool>(), 1..40usize), 1..200)) {
            let mut ranges = FreeRanges::new(256);
            let mut taken: Vec<Range<usize>> = Vec::new();
            let mut is_taken = [false; 256];
            for (gives_back, len) in actions {
                if gives_back && !taken.is_empty() {
                    let range = taken.swap_remove(len % taken.len());
                    is_taken[range.clone()].fill(false);
                    ranges.give_back(range);
                } else if let Some(start) = ranges.take(len) {
                    prop_assert!(is_taken[start..start + len].iter().all(|taken| !taken));
                    is_taken[start..start + len].fill(true);
                    taken.push(start..start + len);
                } else {
                    let fits = is_taken.split(|taken| *taken).any(|free| len <= free.len());
                    prop_assert!(!fits);
                }
            }
            for range in taken {
                ranges.give_back(range);
            }
            prop_assert_eq!(ranges.take(256), Some(0));
        }
    }
}
