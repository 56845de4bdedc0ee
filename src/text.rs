//! Text and tokens: encoding a prompt, and decoding generated tokens without ever emitting half a
//! character.

pub mod token;

pub use token::TokenId;
