//! Text and tokens: encoding a prompt, and decoding generated tokens without ever emitting half a
//! character.
//!
//! Start reading in `tokenizer`. **Invariant:** nothing here knows about models, requests or
//! threads; every type is plain data that can be shared behind an `Arc`.

mod added_tokens;
pub mod bitmask;
mod borders;
mod byte_level;
pub mod detokenizer;
mod pre_tokenizer;
pub mod stop;
pub mod stop_sequence;
pub mod token;
pub mod tokenizer;
mod vocabulary;

pub use bitmask::TokenBitmask;
pub use detokenizer::IncrementalDetokenizer;
pub use stop::{StopMatcher, StopOutcome, StopStrings};
pub use stop_sequence::{SequenceMatcher, SequenceOutcome, StopSequences};
pub use token::TokenId;
pub use tokenizer::{SpecialTokens, Tokenizer, TokenizerError, TokenizerSpec};
