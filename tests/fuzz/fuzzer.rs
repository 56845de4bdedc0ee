//! The loop: pick, mutate, run, keep what is new.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

const DEFAULT_SECONDS: u64 = 3;
/// Longest input.
const MAX_BYTES: usize = 4096;
/// Most inputs that are mutated further.
const MAX_POOL: usize = 4096;

/// Numbers that depend on a seed and nothing else.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not zero.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// What an outcome was like, in one number.
pub(crate) fn outcome(parts: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect(name))
}

/// Runs `target` on mutations of the corpus of that name. It panics if something is wrong, and
/// returns what the outcome was like. `words` are texts that mean something to it.
pub(crate) fn fuzz(name: &str, words: &[&str], mut target: impl FnMut(&[u8], &mut Random) -> u64) {
    let seed = setting("QWEN_SERVER_FUZZ_SEED", 1);
    let time = Duration::from_secs(setting("QWEN_SERVER_FUZZ_SECONDS", DEFAULT_SECONDS));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(!corpus.is_empty(), "no inputs in {}", folder.display());
    let mut random = Random::new(seed);
    let (mut pool, mut seen) = (corpus.clone(), BTreeSet::new());
    let mut num_runs = 0_u64;
    let mut run = |input: &[u8], random: &mut Random| {
        let result = catch_unwind(AssertUnwindSafe(|| target(input, random)));
        result.unwrap_or_else(|panic| {
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
            let _ = std::fs::write(&path, input);
            eprintln!("{name} fails on {:?}", String::from_utf8_lossy(input));
            eprintln!("kept as {}", path.display());
            resume_unwind(panic)
        })
    };
    for input in &corpus {
        seen.insert(run(input, &mut random));
    }
    let begin = Instant::now();
    while begin.elapsed() < time {
        // What was found is mutated further, but sound inputs lead farther than broken ones.
        let from = if random.below(3) == 0 { &corpus } else { &pool };
        let mut input = random.pick(from).clone();
        for _ in 0..=random.below(3) {
            let other = random.pick(&pool).clone();
            mutate(&mut input, &other, words, &mut random);
        }
        input.truncate(MAX_BYTES);
        num_runs += 1;
        if seen.insert(run(&input, &mut random)) && pool.len() < MAX_POOL {
            pool.push(input);
        }
    }
    println!("{name}: {num_runs} runs, {} outcomes", seen.len());
    assert!(corpus.len() < seen.len(), "nothing new was found: is the target called?");
}

fn mutate(input: &mut Vec<u8>, other: &[u8], words: &[&str], random: &mut Random) {
    let at = random.below(input.len() + 1);
    let end = (at + random.below(32)).min(input.len());
    match random.below(10) {
        0 => {
            input.drain(at..end);
        }
        1 => {
            let copy = input[at..end].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, copy);
        }
        2 if at < input.len() => input[at] = random.below(256) as u8,
        3 => input.insert(at, *random.pick(b"\"\\{}[]<>/:,=\n 0-9\xc3\xa9")),
        4 => {
            let from = random.below(other.len() + 1);
            let to = (from + random.below(64)).min(other.len());
            input.splice(at..at, other[from..to].iter().copied());
        }
        5 => input.truncate(at),
        6 => {
            let word = random.pick(words).bytes();
            input.splice(at..at, word);
        }
        _ => {
            // Where something may begin, a word is likely to make sense.
            let is_start = |at: &usize| b"{[,: \n%".contains(&input[*at]);
            let starts: Vec<usize> = (0..input.len()).filter(is_start).collect();
            let to = if starts.is_empty() { 0 } else { random.pick(&starts) + 1 };
            let word = random.pick(words).bytes();
            input.splice(to..to, word);
        }
    }
}
