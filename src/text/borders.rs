//! Finding a sequence of symbols in a stream of them, one at a time and without looking back.

/// The failure function of Knuth, Morris and Pratt for one sequence.
#[derive(Clone, Debug)]
pub(super) struct Borders {
    /// At `i`: length of the longest proper prefix of the first `i + 1` symbols that is also their
    /// suffix.
    lengths: Vec<u32>,
}

impl Borders {
    pub(super) fn new<S: PartialEq>(sequence: &[S]) -> Self {
        let mut lengths = vec![0; sequence.len()];
        let mut border = 0;
        for index in 1..sequence.len() {
            while 0 < border && sequence[border] != sequence[index] {
                border = lengths[border - 1] as usize;
            }
            if sequence[border] == sequence[index] {
                border += 1;
            }
            lengths[index] = border as u32;
        }
        Self { lengths }
    }

    /// Whether the stream up to and with `symbol` ends with the whole sequence, of which it ended
    /// with `num_matched` symbols before. An empty sequence is never found.
    pub(super) fn advance<S: PartialEq>(
        &self,
        sequence: &[S],
        num_matched: &mut u32,
        symbol: &S,
    ) -> bool {
        if sequence.is_empty() {
            return false;
        }
        // After a whole match the search goes on behind its longest border.
        let is_over =
            |num: u32| num as usize == sequence.len() || sequence[num as usize] != *symbol;
        while 0 < *num_matched && is_over(*num_matched) {
            *num_matched = self.lengths[*num_matched as usize - 1];
        }
        if sequence[*num_matched as usize] == *symbol {
            *num_matched += 1;
        }
        *num_matched as usize == sequence.len()
    }
}
