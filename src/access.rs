//! Who may ask, and for how much: keys, the file that holds them, and what a key has left.
//!
//! Pure but for reading and writing the file: time and random numbers come as arguments. Start at
//! [`key::Key`]. **Invariant:** a secret is kept nowhere, only its digest.

pub mod key;
pub mod key_file;
pub mod quota;
pub mod timestamp;

pub use key::{Digest, Key, KeyName, Role};
pub use key_file::{KeyFile, KeyFileError};
pub use quota::{Allowance, Limits, Quota, Refusal, Resource};
pub use timestamp::Timestamp;
